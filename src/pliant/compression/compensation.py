"""Zeroing and rounding the weights of one layer, while its other weights make up for it.

Let a layer with weight W (filters × columns) read inputs with second moment H = E[x xᵀ]. With new weights W' its
outputs change by tr((W − W') H (W − W')ᵀ).

*Zeros.* :func:`prune` and :func:`prune_blocks` look for the W' of least error among those with few entries, or with few
in every block, by the alternating direction method of multipliers: X = W' is any weight, D = W' has the zeros, and

    X ← (W H + ρ D − V)(H + ρ)⁻¹,   D ← the largest entries of X + V/ρ,   V ← V + ρ (X − D)

with growing ρ, where the diagonal of H is scaled to one. So all entries of a filter decide together which of them go.
At last the entries that stay are refitted by conjugate gradients.

*Rounding.* :func:`round_to_grid` rounds column by column. With H⁻¹ = Uᵀ U, U upper triangular, the columns to the right
make up best for column j, which changes from w to q, by

    W_:,k ← W_:,k − (w − q)/U_jj · U_jk   for k > j.

Updates of columns that are far to the right wait until a block is done, and then are one product of matrices.

All functions take weights (groups, m, n) and positive definite moments (groups, n, n) in float64, and return new
weights. An entry that is zero stays zero, so masks and patterns survive. No filter gets worse than without making up.

Source: Meng et al. 2024, "ALPS: improved optimization for highly sparse one-shot pruning for large language models",
for zeros; Frantar et al. 2023, "GPTQ", for rounding; Hassibi and Stork 1993, "Second order derivatives for network
pruning: optimal brain surgeon", for the losses of single entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.compression.fitting import masked_solve

BLOCK = 128  # columns between two updates of all columns to the right
ROUNDS = 60  # of the alternating directions
_RHO, _GROWTH = 0.05, 1.1  # twice the rounds with a tenth of the first ρ lower the error by another half percent
_BETTER = 1 - 1e-9  # of an error, to rule out rounding


def prune(weight: Tensor, moment: Tensor, kept: int) -> Tensor:
    """Return the weights with all but ``kept`` entries zeroed, over all groups and filters."""

    def choose(x: Tensor) -> Tensor:
        return largest(x.flatten(), kept).view_as(x)

    return _with_zeros(weight, moment, choose)


def prune_blocks(weight: Tensor, moment: Tensor, n: int, m: int) -> Tensor:
    """Return the weights with all but ``n`` of every ``m`` consecutive columns zeroed, for each filter by itself."""

    def choose(x: Tensor) -> Tensor:
        return largest(x.unflatten(2, (-1, m)), n).flatten(2)

    return _with_zeros(weight, moment, choose)


def round_to_grid(weight: Tensor, moment: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Return whole numbers from −levels to levels, float64 (groups, m, n); times ``scale`` they are the new weights.

    Args:
        weight, moment: as above.
        scale: the step of the grid of each filter, float64 (groups, m, 1).
        levels: the largest number.
    """
    factor, free = inverse_factor(moment), weight != 0
    now = weight.clone()
    for start in range(0, weight.shape[2], BLOCK):
        end = min(start + BLOCK, weight.shape[2])
        errors = now.new_empty(*now.shape[:2], end - start)
        for j in range(start, end):
            column = slice(j, j + 1)
            rounded = _nearest(now[:, :, column], scale, levels) * scale * free[:, :, column]
            error = (now[:, :, column] - rounded) / factor[:, column, column]
            now[:, :, column] = rounded
            now[:, :, j + 1 : end] -= error * factor[:, column, j + 1 : end]
            errors[:, :, j - start] = error.squeeze(2)
        now[:, :, end:] -= errors @ factor[:, start:end, end:]
    plain = _nearest(weight, scale, levels) * scale
    return (_better(weight, moment, now, plain) / scale).round()


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
    return _energies(weight, moment).sum()


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


def _with_zeros(weight: Tensor, moment: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the better weights of two masks: that of the alternating directions, and that of magnitude times power."""
    scale = moment.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    w, h = weight * scale, moment / scale / scale.mT
    target = w @ h
    candidates = []
    for mask in (choose(w.abs()), _alternating(w, h, choose)):
        mask = mask & (w != 0)
        start = w.masked_fill(~mask, 0.0)
        candidates.append(_better(w, h, masked_solve(h, target, start, mask), start))
    plain, found = candidates
    better = energy(w - found, h) < _BETTER * energy(w - plain, h)
    return (found if better else plain) / scale + 0.0  # no −0


def _alternating(weight: Tensor, moment: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mask that the alternating directions end with."""
    values, vectors = torch.linalg.eigh(moment)
    values, free = values.unsqueeze(1), weight != 0
    target = weight @ moment
    zeroed, multiplier, rho = weight, torch.zeros_like(weight), _RHO
    mask = free
    for _ in range(ROUNDS):
        any_weight = ((target + rho * zeroed - multiplier) @ vectors / (values + rho)) @ vectors.mT
        shifted = (any_weight + multiplier / rho).mul_(free)
        mask = choose(shifted.abs())
        zeroed = shifted * mask
        multiplier = multiplier + rho * (any_weight - zeroed)
        rho *= _GROWTH
    return mask


def _nearest(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (weight / scale).round().clamp(-levels, levels)


def _energies(weight: Tensor, moment: Tensor) -> Tensor:
    return (weight @ moment).mul_(weight).sum(2, keepdim=True)


def _better(weight: Tensor, moment: Tensor, new: Tensor, plain: Tensor) -> Tensor:
    """Return, for each filter, the new weights with the smaller error."""
    worse = _energies(weight - new, moment) > _energies(weight - plain, moment)
    return torch.where(worse, plain, new)
