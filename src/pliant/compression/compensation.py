"""Zeroing and rounding the weights of one layer, column by column, while the columns to the right make up for it.

Let a layer with weight W (filters × columns) read inputs with second moment H = E[x xᵀ], and let H⁻¹ = Uᵀ U with U
upper triangular. If column j of W changes from w to q and the columns to its right are refitted, the best is

    W_:,k ← W_:,k − (w − q)/U_jj · U_jk   for k > j,

and the layer's outputs change by ‖w − q‖²/U_jj². The columns to the left stay as they are. So |w|/U_jj is what an
entry is worth once the sweep has reached it. Updates of columns that are far to the right wait until a block is done,
and then are one product of matrices.

All functions take weights (groups, m, n) and positive definite moments (groups, n, n) in float64, and return new
weights. An entry that is zero stays zero, so masks and patterns survive. No filter gets worse than without updates.

Source: Frantar and Alistarh 2023, "SparseGPT", for zeros and patterns; Frantar et al. 2023, "GPTQ", for rounding; both
after Hassibi and Stork 1993, "Second order derivatives for network pruning: optimal brain surgeon".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns between two updates of all columns to the right

Rule = Callable[[Tensor, int, int], Tensor]
"""Gets the weights at the moment, a column and the end of its block; returns what becomes of the column."""


def prune(weight: Tensor, moment: Tensor, kept: int) -> Tensor:
    """Return the weights with all but ``kept`` entries zeroed, over all groups and filters.

    When the sweep reaches a block of columns, the ``kept`` entries of the whole rest that are worth most are found, and
    those of the block that are not among them go. So the count is exact, and how it is shared out follows the updates.
    """
    factor = inverse_factor(moment)
    spread, free = _diagonal(factor), weight != 0
    stays = torch.zeros_like(free)
    left = kept

    def rule(now: Tensor, column: int, end: int) -> Tensor:
        nonlocal left
        if column % BLOCK == 0:
            worth = (now.abs() / spread * free)[:, :, column:]
            best = largest(worth.flatten(), left).view_as(worth)[:, :, : end - column]
            stays[:, :, column:end] = best
            left -= int(best.sum())
        return now[:, :, column] * (stays & free)[:, :, column]

    return _better(weight, moment, _sweep(weight, factor, rule, BLOCK), weight * stays)


def prune_blocks(weight: Tensor, moment: Tensor, n: int, m: int) -> Tensor:
    """Return the weights with all but ``n`` of every ``m`` consecutive columns zeroed, for each filter by itself."""
    factor = inverse_factor(moment)
    spread, free = _diagonal(factor), weight != 0
    stays = torch.zeros_like(free)

    def rule(now: Tensor, column: int, end: int) -> Tensor:
        if column % m == 0:
            block = slice(column, column + m)
            stays[:, :, block] = largest((now.abs() / spread * free)[:, :, block], n)
        return now[:, :, column] * (stays & free)[:, :, column]

    return _better(weight, moment, _sweep(weight, factor, rule, max(1, BLOCK // m) * m), weight * stays)


def round_to_grid(weight: Tensor, moment: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Return whole numbers from −levels to levels, float64 (groups, m, n); times ``scale`` they are the new weights.

    Args:
        weight, moment: as above.
        scale: the step of the grid of each filter, float64 (groups, m, 1).
        levels: the largest number.
    """
    steps, free = scale.squeeze(2), weight != 0
    nearest = (weight / scale).round().clamp(-levels, levels)

    def rule(now: Tensor, column: int, end: int) -> Tensor:
        return (now[:, :, column] / steps).round().clamp(-levels, levels) * steps * free[:, :, column]

    swept = _sweep(weight, inverse_factor(moment), rule, BLOCK)
    return (_better(weight, moment, swept, nearest * scale) / scale).round()


def inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper triangular U with H⁻¹ = Uᵀ U, (groups, n, n)."""
    lower = torch.linalg.cholesky(moment.flip(1, 2))  # H = R Rᵀ with R upper triangular, U = R⁻¹
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, identity.expand_as(moment), upper=False).flip(1, 2)
    return factor


def single_losses(weight: Tensor, moment: Tensor) -> Tensor:
    """Return w²/(H⁻¹)_jj, (groups, m, n): what each entry loses if it goes alone and all others of its row make up."""
    return weight.square() / inverse_factor(moment).square().sum(1).unsqueeze(1)


def energy(weight: Tensor, moment: Tensor) -> Tensor:
    """Return tr(W H Wᵀ), summed over the groups: the energy of the outputs, or the error if W is a difference."""
    return (weight @ moment).mul_(weight).sum()


def largest(x: Tensor, count: int) -> Tensor:
    """Return the mask, shaped as x, of the ``count`` largest entries along the last dim; ties go to the lower index."""
    if count == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    # This takes linear time: a stable sort of a large network's weights takes seconds, and topk leaves open which of
    # equal entries it takes.
    smallest = x.kthvalue(x.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, equal = x > smallest, x == smallest
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=1, dim2=2).unsqueeze(1)


def _better(weight: Tensor, moment: Tensor, swept: Tensor, plain: Tensor) -> Tensor:
    """Return, for each filter, the weights with the smaller error: a sweep looks to the right only, and can fail."""

    def errors(new: Tensor) -> Tensor:
        difference = weight - new
        return (difference @ moment).mul_(difference).sum(2, keepdim=True)

    return torch.where(errors(swept) <= errors(plain), swept, plain)


def _sweep(weight: Tensor, factor: Tensor, rule: Rule, block: int) -> Tensor:
    """Change the columns one by one from left to right as the rule says, and pass the errors on to the right."""
    now = weight.clone()
    for start in range(0, weight.shape[2], block):
        end = min(start + block, weight.shape[2])
        errors = now.new_empty(*now.shape[:2], end - start)
        for column in range(start, end):
            new = rule(now, column, end)
            error = (now[:, :, column] - new) / factor[:, column, column].unsqueeze(1)
            now[:, :, column] = new
            now[:, :, column + 1 : end] -= error.unsqueeze(2) * factor[:, column, column + 1 : end].unsqueeze(1)
            errors[:, :, column - start] = error
        now[:, :, end:] -= errors @ factor[:, start:end, end:]
    return now
