"""NuMuon: Muon along the k leading singular directions, k falling from all to few.

    m ← μ·m + (1 − μ)·g = U diag(σ) Vᵀ
    W ← (1 − lr·λ)·W − lr·0.2·√max(rows, columns)·U_k V_kᵀ

Dolatabadi et al. 2026, NuMuon: nuclear-norm-constrained Muon for compressible LLM training, arXiv 2603.03597. The
directions come from a full SVD (there: a randomised block Krylov method), k falls linearly (there also by steps or a
cosine). The step is SFW's with the ball ``Spectral(KSparse(k))`` of radius 0.2·√max(rows, columns)/λ, without
rescaling, at the learning rate lr·λ.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.matrices import positive, svd
from pliant.experiments.baselines.muon import Directed, adam_size


class NuMuon(Directed):
    """Low-rank steps for matrices, SGD for the rest; ``k`` counts directions, ``strength`` is the decoupled decay."""

    options: ClassVar[dict[str, Any]] = {"k": 1, "strength": 0.1}

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the direction in the place of the gradient."""
        u, s, vh = svd(self.average(g, state, group))
        k: int = group["k"]
        decay: float = group["strength"]
        leading = (u[..., :k] * positive(s)[..., None, :k]) @ vh[..., :k, :]
        return adam_size(w) * leading + decay * w


class KAnnealing:
    """Move the ``"k"`` of each group linearly from a start to the value that it has now.

    Constructing sets the start values. To resume, load the optimizer's state and this one's, in any order.

    Args:
        optimizer: with a ``"k"`` in some groups.
        starts: k at the first step for each group, None for one without k.
        steps: number of steps from start to end, at least 1.
    """

    def __init__(self, optimizer: NuMuon, starts: list[int | None], *, steps: int) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.last_step = 0
        groups = zip(starts, optimizer.param_groups, strict=True)
        self._spans = [None if start is None else (start, int(group["k"])) for start, group in groups]
        self._apply()

    def step(self) -> None:
        """Go one step further; after ``steps`` steps k stays at its end."""
        self.last_step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.last_step = state["last_step"]
        self._apply()

    def _apply(self) -> None:
        progress = min(1.0, self.last_step / self.steps)
        for span, group in zip(self._spans, self.optimizer.param_groups, strict=True):
            if span is not None:
                start, end = span
                group["k"] = math.floor(start + progress * (end - start) + 0.5)
