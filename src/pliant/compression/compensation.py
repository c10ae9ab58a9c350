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
for zeros; Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers", for
rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.compression.fitting import masked_solve

BLOCK = 128  # columns between two updates of all columns to the right
GONE = (0.0, 0.3, 0.5, 0.65, 0.75, 0.84, 0.9, 0.95, 0.98, 1.0)
"""The shares of zeros at which losses are estimated."""
_RHO = 0.05  # the first ρ
_FULL, _QUICK = (60, 1.1), (20, 1.3)  # rounds and growth of ρ; the errors of the quick ones are a tenth larger
_FILTERS = 64  # how many filters of each group an estimate looks at
_BETTER = 1 - 1e-9  # of an error, to rule out rounding


def prune(weight: Tensor, moment: Tensor, kept: int) -> Tensor:
    """Return the weights with all but ``kept`` entries zeroed, over all groups and filters."""
    return _with_zeros(weight, moment, _keeping(kept))


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


def loss_curve(weight: Tensor, moment: Tensor) -> Tensor:
    """Return the losses once the shares :data:`GONE` of the entries are zero, in units of tr(W H Wᵀ), never falling.

    This is a quick estimate, from some of the filters and fewer rounds.
    """
    weight = weight[:, :: -(-weight.shape[1] // _FILTERS)]
    w, h, _ = _scaled(weight, moment)
    basis = torch.linalg.eigh(h)
    unit = energy(w, h).clamp(min=torch.finfo(w.dtype).tiny)  # a layer of zeros loses nothing
    losses = [0.0]
    for gone in GONE[1:-1]:
        found = _alternating(w, h, basis, _keeping(round((1 - gone) * w.numel())), _QUICK)
        losses.append(float(energy(w - found, h) / unit))
    return torch.tensor([*losses, float(unit > torch.finfo(w.dtype).tiny)]).double().cummax(0).values.clamp(max=1.0)


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


def _keeping(count: int) -> Callable[[Tensor], Tensor]:
    """Return a function from magnitudes to the mask of the largest ones of all filters."""
    return lambda x: largest(x.flatten(), count).view_as(x)


def _with_zeros(weight: Tensor, moment: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the better weights of two masks: that of the alternating directions, and that of magnitude times power."""
    w, h, scale = _scaled(weight, moment)
    target = w @ h
    candidates = []
    for mask in (choose(w.abs()), _alternating(w, h, torch.linalg.eigh(h), choose, _FULL) != 0):
        mask = mask & (w != 0)
        start = w.masked_fill(~mask, 0.0)
        candidates.append(_better(w, h, masked_solve(h, target, start, mask), start))
    plain, found = candidates
    better = energy(w - found, h) < _BETTER * energy(w - plain, h)
    return (found if better else plain) / scale + 0.0  # no −0


def _scaled(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight and moment in units in which the diagonal of the moment is one, and these units (groups, 1, n)."""
    scale = moment.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    return weight * scale, moment / scale / scale.mT, scale


def _alternating(
    weight: Tensor,
    moment: Tensor,
    basis: tuple[Tensor, Tensor],
    choose: Callable[[Tensor], Tensor],
    effort: tuple[int, float],
) -> Tensor:
    """Return the weights with zeros that the alternating directions end with.

    Args:
        weight, moment: as above, scaled.
        basis: eigenvalues and eigenvectors of the moment.
        choose: maps magnitudes to the mask of the entries that stay.
        effort: the number of rounds, and the growth of ρ from one to the next.
    """
    values, vectors = basis[0].unsqueeze(1), basis[1]
    free = weight != 0
    target = weight @ moment
    zeroed, multiplier, rho = weight, torch.zeros_like(weight), _RHO
    rounds, growth = effort
    for _ in range(rounds):
        solution = ((target + rho * zeroed - multiplier) @ vectors / (values + rho)) @ vectors.mT
        shifted = (solution + multiplier / rho).mul_(free)
        zeroed = shifted * choose(shifted.abs())
        multiplier = multiplier + rho * (solution - zeroed)
        rho *= growth
    return zeroed


def _nearest(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (weight / scale).round().clamp(-levels, levels)


def _energies(weight: Tensor, moment: Tensor) -> Tensor:
    return (weight @ moment).mul_(weight).sum(2, keepdim=True)


def _better(weight: Tensor, moment: Tensor, new: Tensor, plain: Tensor) -> Tensor:
    """Return, for each filter, the new weights with the smaller error."""
    worse = _energies(weight - new, moment) > _energies(weight - plain, moment)
    return torch.where(worse, plain, new)
