"""Least squares for one layer: the weights of a small network that bring its outputs back to those of the dense one.

From sums over rows (x, y), x the inputs of a layer in the small network and y the outputs of the same layer in the
dense network, :func:`fit` solves

    min_W E‖y − W x − b‖² + λ‖W − W_cut‖²

for several λ, and keeps the solution with the least error on rows that were held out: the weights of the cut if none is
better. Entries of W that are zero in the cut stay zero, and so does the bias of a filter of zeros, if it is zero: masks
and patterns survive.

Source: He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks", §3.1, for the
reconstruction; Zhang et al. 2016, "Accelerating very deep convolutional networks", §3.2, for inputs of the small and
outputs of the dense network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.compression.moments import gram

DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""The λ that are tried, in units of the mean of E[x_i²] over the columns that are not zero."""
_CONSTANT = 1e-7  # share of E[x_i²] below which the variance of x_i is taken for zero
_ROUNDING = 1e-9  # a gain below this share of the outputs' energy may be rounding, and decides nothing
_STEPS = 50  # of conjugate gradients: enough for float32 accuracy at the smallest damping that matters
_SOLVED = 1e-7  # residual, as a share of the right side, at which these stop


@dataclass(eq=False)
class Sums:
    """Sums over rows: x (groups, rows, n) with a column of ones, y (groups, rows, m).

    Args:
        xx: Σ x xᵀ, float64 (groups, n + 1, n + 1).
        xy: Σ x yᵀ, float64 (groups, n + 1, m).
        yy: Σ y², float64 (groups, m).
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Sums:
        """Return the sums over the given rows."""
        xx, sum_x, _ = gram(x, x)
        xy, _, sum_y = gram(x, y)
        rows = xx.new_full((len(xx), 1), x.shape[1])
        below = torch.cat([sum_x, rows], 1).unsqueeze(1)
        xx = torch.cat([torch.cat([xx, sum_x.unsqueeze(2)], 2), below], 1)
        return cls(xx, torch.cat([xy, sum_y.unsqueeze(1)], 1), y.double().square().sum(1))

    def add(self, other: Sums) -> None:
        """Add sums over more rows, in place."""
        self.xx += other.xx
        self.xy += other.xy
        self.yy += other.yy

    @property
    def rows(self) -> float:
        """The number of rows."""
        return float(self.xx[0, -1, -1])

    def means(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return E[x xᵀ] (groups, n, n), E[x yᵀ] (groups, n, m) and E[y²] (groups, m); covariances if centred."""
        xx, xy, yy = self.xx / self.rows, self.xy / self.rows, self.yy / self.rows
        second, cross = xx[:, :-1, :-1], xy[:, :-1]
        if centred:
            x, y = self.mean_x, self.mean_y
            second = second - x.unsqueeze(2) * x.unsqueeze(1)
            cross = cross - x.unsqueeze(2) * y.unsqueeze(1)
            yy = yy - y.square()
        return second, cross, yy

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return all(bool(x.isfinite().all()) for x in (self.xx, self.xy, self.yy))

    @property
    def mean_x(self) -> Tensor:
        """E[x], (groups, n)."""
        return self.xx[:, -1, :-1] / self.rows

    @property
    def mean_y(self) -> Tensor:
        """E[y], (groups, m)."""
        return self.xy[:, -1] / self.rows


@dataclass(frozen=True, eq=False)
class Fit:
    """The result for one layer.

    Args:
        weight: (groups, m, n), float64.
        bias: (groups, m), or None.
        damping: the chosen λ; None if the weights are those of the cut.
        error, error_before: share of the energy of y that the layer misses on the held-out rows, with these weights
            and with those before.
    """

    weight: Tensor
    bias: Tensor | None
    damping: float | None
    error: float
    error_before: float


def fit(sums: Sums, held: Sums, cut: Tensor, now: Tensor, bias: Tensor | None, *, centred: bool) -> Fit:
    """Fit the weights of one layer.

    Args:
        sums: sums over the rows to fit.
        held: sums over the rows that were held out.
        cut: the weight that the solution is damped towards, float64 (groups, m, n).
        now: the weight at the moment, float64 (groups, m, n).
        bias: the bias at the moment, float64 (groups, m), or None.
        centred: without a bias: whether the mean of the outputs does not matter, because a BatchNorm follows.
    """
    free = bias is not None or centred
    second, cross, _ = sums.means(centred=free)
    fixed = cut == 0
    used = (~fixed).any(1)  # (groups, n)
    # Inputs that are constant have a covariance of rounding errors, which must not count as a signal.
    least = (sums.xx.diagonal(dim1=1, dim2=2)[:, :-1] / sums.rows * _CONSTANT).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    level = (second.diagonal(dim1=1, dim2=2).maximum(least) * used).sum(1) / used.sum(1).clamp(min=1)
    level = level.clamp(min=torch.finfo(torch.float32).tiny)  # (groups,)
    silent = None if bias is None else fixed.all(2) & (bias == 0)  # filters that a mask has removed

    def error(weight: Tensor, offset: Tensor | None) -> float:
        return _error(held, weight, offset, centred=centred and bias is None)

    def offset_of(weight: Tensor) -> Tensor | None:
        if silent is None:
            return None
        return (sums.mean_y - (weight @ sums.mean_x.unsqueeze(2)).squeeze(2)).masked_fill(silent, 0.0)

    before = error(now, bias)
    fits: list[tuple[float, float, Tensor]] = []  # error, damping, weight
    scattered = _is_scattered(fixed)
    start = cut
    for damping in DAMPINGS:
        solution = _solve(second, cross, cut, damping * level, fixed, start if scattered else None)
        if solution is None:
            continue
        fits.append((error(solution, offset_of(solution)), damping, solution))
        start = solution
        # Each of these solutions takes many steps, from the one before, and less damping hardly turns worse to better.
        if scattered and len(fits) > 1 and fits[-1][0] > fits[-2][0]:
            break
    missed, chosen, weight = min(fits, key=lambda each: each[:2], default=(math.inf, 0.0, now))
    if missed > before - _ROUNDING:
        return Fit(now, bias, None, before, before)
    return Fit(weight, offset_of(weight), chosen, missed, before)


def _error(held: Sums, weight: Tensor, bias: Tensor | None, *, centred: bool) -> float:
    """Return E‖y − W x − b‖² / E‖y − E y‖² on the held-out rows."""
    second, cross, yy = held.means(centred=True)
    energy = yy.sum()
    missed = ((weight @ second * weight).sum() - 2 * (weight.mT * cross).sum() + energy).clamp(min=0)
    if not centred:
        rest = held.mean_y - (weight @ held.mean_x.unsqueeze(2)).squeeze(2)
        missed += (rest if bias is None else rest - bias).square().sum()
    limits = torch.finfo(energy.dtype)
    return float((missed / energy.clamp(min=limits.tiny)).clamp(max=limits.max))  # finite, for plans


def _is_scattered(fixed: Tensor) -> bool:
    """Return whether other entries are fixed than whole filters and columns."""
    rows, columns = fixed.all(2), fixed.all(1)
    return bool((fixed & ~rows.unsqueeze(2) & ~columns.unsqueeze(1)).any())


def _solve(
    second: Tensor, cross: Tensor, cut: Tensor, damping: Tensor, fixed: Tensor, start: Tensor | None
) -> Tensor | None:
    """Return argmin_W tr(W A Wᵀ) − 2 tr(W B) + λ‖W − W_cut‖², with zeros where ``fixed``, (groups, m, n).

    None if the damping is too small for the rounding errors of A: covariances of few rows far from zero lose digits.

    Args:
        second, cross, cut, damping, fixed: A, B, W_cut, λ and where W is zero.
        start: where iterations begin; None if only whole filters and columns are fixed, which takes none.
    """
    rows, columns = fixed.all(2), fixed.all(1)  # whole filters and columns that are zero are left out
    system = second.clone()
    system.diagonal(dim1=1, dim2=2).add_(damping.unsqueeze(1))
    right = cross + damping[:, None, None] * cut.mT  # (groups, n, m)
    if start is None:
        system = system.masked_fill(columns.unsqueeze(1) | columns.unsqueeze(2), 0.0)
        system.diagonal(dim1=1, dim2=2).add_(columns.double())
        right = right.masked_fill(columns.unsqueeze(2) | rows.unsqueeze(1), 0.0)
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if bool(failed.any()) else torch.cholesky_solve(right, factor).mT
    return masked_solve(system, right.mT, start, ~fixed)


def masked_solve(system: Tensor, right: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Solve W A = B on the entries of each row where ``mask`` is True, by conjugate gradients on all rows at once.

    Args:
        system: A, positive definite, float64 (groups, n, n).
        right: B, (groups, m, n).
        start: where to start, zero outside of the mask, (groups, m, n).
        mask: bool (groups, m, n).
    """
    scale = system.diagonal(dim1=1, dim2=2).rsqrt().unsqueeze(1)  # Jacobi preconditioner
    scaled = scale.mT * system * scale
    w = start / scale
    residual = (right * scale - w @ scaled) * mask
    direction = residual.clone()
    old = residual.square().sum(2, keepdim=True)
    enough = (right * scale * mask).square().sum() * _SOLVED**2
    tiny = torch.finfo(old.dtype).tiny
    for _ in range(_STEPS):
        image = (direction @ scaled) * mask
        length = old / (direction * image).sum(2, keepdim=True).clamp(min=tiny)
        w += length * direction
        residual -= length * image
        new = residual.square().sum(2, keepdim=True)
        direction = residual + new / old.clamp(min=tiny) * direction
        old = new
        if new.sum() <= enough:
            break
    return w * scale * mask
