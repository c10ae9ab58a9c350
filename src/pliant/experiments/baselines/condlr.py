"""CondLR: weights of fixed rank whose singular values are close to each other.

    W = U S Vᵀ,    U: rows × r and V: columns × r with orthonormal columns

After each SGD step on U, S and V, with QR decompositions U = Q_U R_U and V = Q_V R_V, the diagonals of R_U and R_V ≥ 0:

    U, S, V ← Q_U, R_U S R_Vᵀ, Q_V                          the same product
    σ(S) ← clamp(σ(S), s̄·(1 − t), s̄·(1 + t))                s̄: their mean, t = (c − 1)/(c + 1)

so that the condition number of S, the ratio of the largest to the smallest singular value, is at most c. The purpose is
robustness against small changes of the input, at a rank chosen before the training.

Savostianova, Zangrando, Ceruti, Tudisco 2023, Robust low-rank training via approximate orthonormal constraints, arXiv
2306.01485. The momentum is not changed: the sign convention makes the decomposition unique and continuous, so that a
small step changes U, S and V only a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from pliant.experiments.baselines.matrices import svd
from pliant.experiments.baselines.products import Product
from pliant.linalg import orthonormalised


class Conditioned(Product):
    """A weight as U S Vᵀ of rank k, with the condition number of S at most ``condition``."""

    def __init__(self, shape: torch.Size, row_dim: int, blocks: int, *, k: int, condition: float) -> None:
        super().__init__(shape, row_dim, blocks)
        self.k = k
        self.condition = condition

    def factors(self, w: Tensor) -> tuple[Tensor, ...]:
        """Return U, S and Vᵀ of the leading singular directions, conditioned."""
        u, s, vh = svd(w.detach())
        core = torch.diag_embed(near_mean(s[..., : self.k], self.condition))
        return u[..., : self.k].contiguous(), core, vh[..., : self.k, :].contiguous()


class CondLR(SGD):
    """SGD that brings each U, S, Vᵀ back to orthonormal factors and a well-conditioned core.

    Args:
        params: groups; one with a ``"condition"`` holds the factors U, S and Vᵀ of one weight, in this order.
        lr: learning rate.
        momentum: as in ``torch.optim.SGD``.
        weight_decay: as in ``torch.optim.SGD``.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, by default one without a condition."""
        super().add_param_group({"condition": None, **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; raise torch.linalg.LinAlgError if a factor became NaN or infinite."""
        loss = super().step(closure)
        for group in self.param_groups:
            if group["condition"] is not None:
                left, core, right = group["params"]
                condition_(left, core, right, group["condition"])
        return None if loss is None else float(loss)


def condition_(left: Tensor, core: Tensor, right: Tensor, condition: float) -> None:
    """Make the columns of ``left`` and the rows of ``right`` orthonormal and ``core`` well-conditioned, in place.

    Args:
        left: (blocks, rows, r).
        core: (blocks, r, r).
        right: (blocks, r, columns).
        condition: largest condition number of ``core``.
    """
    q_left, r_left = orthonormalised(left)
    q_right, r_right = orthonormalised(right.mT)
    u, s, vh = svd(r_left @ core @ r_right.mT)
    left.copy_(q_left)
    core.copy_((u * near_mean(s, condition)[..., None, :]) @ vh)
    right.copy_(q_right.mT)


def near_mean(s: Tensor, condition: float) -> Tensor:
    """Return numbers (..., n) clamped to an interval around their mean whose ends have the ratio ``condition``."""
    mean = s.mean(dim=-1, keepdim=True)
    t = (condition - 1) / (condition + 1)
    return torch.minimum(torch.maximum(s, mean * (1 - t)), mean * (1 + t))
