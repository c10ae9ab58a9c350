"""TRP: truncated singular value decompositions during the training.

Every m steps, with r the smallest rank that leaves out at most the share e of Σσ²:

    W ← U_r (diag(σ_r) − lr·λ·I) V_rᵀ

The second term is a step along the sub-gradient U_r V_rᵀ of the nuclear norm. In between, plain SGD.

Xu et al. 2020, TRP: trained rank pruning for efficient deep neural networks, IJCAI, arXiv 2004.14566. The sub-gradient
is applied together with the decomposition, every m steps, and not through the momentum.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.matrices import svd


class TRP(MatrixSGD):
    """SGD that truncates the weights every ``every`` steps and leaves out at most ``energy`` of their squared norm."""

    options: ClassVar[dict[str, Any]] = {"energy": 0.02, "every": 20, "strength": 3e-4}

    def after(self, w: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        """Truncate the weight every ``every`` steps."""
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] % group["every"]:
            return None
        u, s, vh = svd(w)
        kept = needed(s, group["energy"])
        lowered = torch.where(kept, (s - group["lr"] * group["strength"]).clamp_min(0), 0)
        return (u * lowered[..., None, :]) @ vh


def needed(s: Tensor, energy: float) -> Tensor:
    """Return a mask of the fewest leading singular values that leave out at most the share ``energy`` of Σσ².

    Args:
        s: (blocks, n), descending.
        energy: the share.
    """
    squares = s.square()
    tails = squares.flip(-1).cumsum(-1).flip(-1)  # the energy of each singular value and all smaller ones
    return tails > energy * squares.sum(-1, keepdim=True)
