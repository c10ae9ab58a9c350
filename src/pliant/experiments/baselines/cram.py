"""CrAM: gradients at compressed weights, added to those at the weights.

    g = ∇L(θ)
    θ ← SGD step along  g + M ∘ ∇L(C(θ + ρ·g))

C keeps a part of the weights, a share drawn at random in every step, and M keeps the same part of the gradient: entries
(the largest over all layers, as published), whole filters, or the span of leading left singular vectors (both per
layer). The version with the clean gradient g and the sparse second gradient is the paper's CrAM+.

Peste et al. 2023, CrAM: a compression-aware minimizer, ICLR, arXiv 2207.14200.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.matrices import as_matrices, svd, write_matrices
from pliant.linalg import keep_largest, topk_mask, vector_norm

SHARES = (0.5, 0.3, 0.1)  # the shares that C keeps, with equal probabilities: the published sparsities


class CrAM(MatrixSGD):
    """SGD along the sum of the gradients at the weights and at their compressed, perturbed copy.

    ``step`` needs a closure that recomputes the gradients, like ``torch.optim.LBFGS``; it is called once, at the
    compressed weights. The gradients of the first pass must exist already.

    Options: ``strength`` is ρ, and ``part`` is the part that C keeps: "weights", "filters" or "rank".
    """

    options: ClassVar[dict[str, Any]] = {"strength": 0.05, "part": "weights"}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step and return the loss at the compressed weights.

        Raises:
            TypeError: there is no closure.
            ValueError: there is no group of matrices.
            FloatingPointError: a gradient is NaN or infinite.
        """
        if closure is None:
            raise TypeError("CrAM needs a closure that computes the gradients anew")
        self._check_finite()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        matrices = list(self._weights())
        if not matrices:
            raise ValueError("CrAM needs a group of matrices, one with a row_dim, to compress")
        weights, clean = [p.clone() for p in parameters], [p.grad.clone() for p in parameters]
        torch._foreach_add_(parameters, clean, alpha=matrices[0][1]["strength"])
        # From torch's own generator, whose state a checkpoint keeps.
        share = SHARES[int(torch.randint(len(SHARES), ()))]
        keeps = _compress(matrices, share)
        with torch.enable_grad():
            loss = closure()
        for keep in keeps:
            keep()
        torch._foreach_copy_(parameters, weights)
        torch._foreach_add_([p.grad for p in parameters], clean)
        super().step()
        return loss


def _compress(matrices: list[tuple[Tensor, dict[str, Any]]], share: float) -> list[Callable[[], None]]:
    """Apply C to weights in place; return functions that apply M to their gradients."""
    if matrices[0][1]["part"] == "weights":
        tensors = [p for p, _ in matrices]
        keep_largest(tensors, _count(share, sum(p.numel() for p in tensors)), tensors)
        return [_masking(p, p != 0) for p in tensors]
    return [_project(p, group, share) for p, group in matrices]


def _project(p: Tensor, group: dict[str, Any], share: float) -> Callable[[], None]:
    w = as_matrices(p, group["row_dim"], group["blocks"])
    if group["part"] == "filters":
        kept = topk_mask(vector_norm(w, dim=-1).flatten(), _count(share, p.shape[group["row_dim"]]))
        projector = torch.diag_embed(kept.view(w.shape[:2]).to(w.dtype))
    else:
        left = svd(w)[0][..., : _count(share, min(w.shape[-2:]))]
        projector = left @ left.mT
    write_matrices(projector @ w, p, group["row_dim"])

    def keep() -> None:
        assert p.grad is not None
        g = as_matrices(p.grad, group["row_dim"], group["blocks"])
        write_matrices(projector @ g, p.grad, group["row_dim"])

    return keep


def _masking(p: Tensor, mask: Tensor) -> Callable[[], None]:
    def keep() -> None:
        assert p.grad is not None
        p.grad.mul_(mask)

    return keep


def _count(share: float, n: int) -> int:
    return max(1, math.floor(share * n + 0.5))
