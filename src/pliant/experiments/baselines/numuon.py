"""NuMuon: Muon along the k leading singular directions, with k annealed from all to few.

    m ← μ·m + (1 − μ)·g = U diag(σ) Vᵀ
    W ← (1 − lr·λ)·W − lr·0.2·√max(rows, columns)·U_k V_kᵀ

Dolatabadi et al. 2026, NuMuon: nuclear-norm-constrained Muon for compressible LLM training, arXiv 2603.03597. The
directions come from a full SVD (in the paper: a randomised block Krylov method), and k falls linearly (in the paper
also by steps or a cosine). The step is SFW's with the ball ``Spectral(KSparse(k))`` of radius
0.2·√max(rows, columns)/λ, without rescaling, at the learning rate lr·λ.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.matrices import positive, svd
from pliant.experiments.baselines.muon import Directed, adam_size


class NuMuon(Directed):
    """Low-rank steps for matrices, SGD for the rest.

    Options: ``k`` counts directions, ``strength`` is the decoupled decay λ. In a group with a ``"k_start"``, k falls
    from ``"k_start"`` to ``"k"`` over the first ``"k_steps"`` steps of each of its weights.
    """

    options: ClassVar[dict[str, Any]] = {"k": 1, "strength": 0.1}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; in a group of matrices k is constant by default."""
        if param_group.get("row_dim") is not None:
            param_group = {"k_start": None, "k_steps": 1, **param_group}
        super().add_param_group(param_group)

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the direction, which replaces the gradient."""
        u, s, vh = svd(self.average(g, state, group))
        done: int = state.get("step", 0)
        state["step"] = done + 1
        k = k_of_step(group, done)
        decay: float = group["strength"]
        leading = (u[..., :k] * positive(s)[..., None, :k]) @ vh[..., :k, :]
        return adam_size(w) * leading + decay * w

    def skip(self, steps: int) -> None:
        """Advance the annealing of k by this many steps."""
        for state in self.state.values():
            if "step" in state:
                state["step"] += steps


def k_of_step(group: dict[str, Any], done: int) -> int:
    """Return the k of a group after ``done`` steps; after ``"k_steps"`` steps it is ``"k"``."""
    end: int = group["k"]
    if group["k_start"] is None:
        return end
    start: int = group["k_start"]
    progress: float = min(1.0, done / group["k_steps"])
    return math.floor(start + progress * (end - start) + 0.5)
