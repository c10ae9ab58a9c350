"""TRP: truncated singular value decompositions during the training.

Every m steps, with r the least rank that leaves out at most the share e of Σσ²:

    W ← U_r (diag(σ_r) − lr·λ·I) V_rᵀ

The second term is a step along the sub-gradient U_r V_rᵀ of the nuclear norm. In between, plain SGD.

Xu et al. 2020, TRP: trained rank pruning for efficient deep neural networks, IJCAI, arXiv 2004.14566. The sub-gradient
is applied where the decomposition is at hand, every m steps, and not through the momentum.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.matrices import svd


class TRP(MatrixSGD):
    """SGD that truncates the weights after every ``every`` steps, up to the share ``energy`` of their squared norm."""

    options: ClassVar[dict[str, Any]] = {"energy": 0.02, "every": 20, "strength": 3e-4}

    def after(self, w: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        """Truncate, if it is time to."""
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] % group["every"]:
            return None
        u, s, vh = svd(w)
        kept = needed(s, group["energy"])
        lowered = torch.where(kept, (s - group["lr"] * group["strength"]).clamp_min(0), 0)
        return (u * lowered[..., None, :]) @ vh


def needed(s: Tensor, energy: float) -> Tensor:
    """Mark the fewest leading singular values (descending) that leave out at most ``energy`` of the sum of squares."""
    squares = s.square()
    tails = squares.flip(-1).cumsum(-1).flip(-1)  # what goes if this one and all after it go
    return tails > energy * squares.sum(-1, keepdim=True)
