"""Euclidean projections on magnitudes: the nearest point w >= 0 to a >= 0 in the ball of a k-norm.

Both kernels cut the magnitudes at two levels, a threshold t and t + d, and both pairs lie on one path: with
k and the width d > 0 given, t is the largest solution of

    Σ_l clamp(a_l − t, 0, d) = k·d.                                                              (1)

* k-sparse ball (box ∩ ℓ1 ball): w = clamp(a − t, 0, d) with d = radius; the ℓ1 ball is k = 1.
* k-support ball: w = min(max(a − t, 0), a/(1 + λ)) with t = λd, and λ such that the norm is the radius.

Sorted in descending order, the entries of (1) fall into i < k *tops* above t + d, a *middle* of q + j entries with
q = k − i, and the rest, at or below t. The k-th largest entry, the *pivot*, is always in the middle, and everything is
measured from it: differences of neighbours are exact where the entries themselves, 1e9 in a ball of radius 1, would
drown the answer.

Like the rest of the kernels, nothing here synchronises with the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.linalg import vector_norm


def project_ksparse(a: Tensor, k: int, radius: Tensor) -> Tensor:
    """Return argmin ‖w − a‖₂ subject to max w <= radius and Σw <= k·radius, for a >= 0; exact.

    Shapes: ``a`` (..., n) with 1 <= k <= n, ``radius`` a scalar -> (..., n); each row has its own ball.
    """
    path = _Path(a, k)
    j = (path.widths < radius).sum(dim=-1, keepdim=True)
    i = path.tops(j, radius)
    shift = path.shift(i, j, radius)
    # A threshold below 0 means that the box alone is enough.
    shifted = torch.where(shift >= path.pivot, a, a - path.pivot + shift)
    return shifted.clamp_min(0).minimum(radius)


def project_ksupport(a: Tensor, k: int, radius: Tensor) -> Tensor:
    """Return argmin ‖w − a‖₂ subject to (Σ_b ‖w_b‖²)^½ <= radius, the k-support norm of each row b, for a >= 0.

    One row is the k-support ball itself. The point ``a`` lies outside of the ball (inside, the answer is a).

    With ‖w‖² = min Σ w_l²/θ_l over 0 <= θ <= 1, Σθ <= k, and a multiplier λ/2 of the squared norm, the optimum is
    w_l = a_l·θ_l/(θ_l + λ) with θ_l = clamp(a_l/d − λ, 0, 1), d such that Σθ = k: equation (1) with t = λd. In
    closed form, with a middle of q + j entries,

        d = (Σ_middle a)/(q + (q + j)λ),    ‖w‖² = (Σ_tops a²)/(1 + λ)² + q·d².

    The rows share λ, and their joint norm falls as λ grows. As a − w is λ times a point of dual norm ‖w‖ = radius, and
    the dual norm is below the norm, ‖a‖*/radius − 1 <= λ <= ‖a‖*/radius: bisection ends after a fixed number of steps.

    (McDonald, Pontil, Stamos 2016, New perspectives on k-support and cluster norms: the form with θ and the proximal
    operator; closed form, path and bracket are derived from it here.)

    Shapes: ``a`` (blocks, n) with 1 <= k <= n, ``radius`` a scalar -> (blocks, n).
    """
    path = _Path(a, k)
    z = path.sorted
    top_squares = pad(z[..., : k - 1].square().cumsum(dim=-1), (1, 0))
    head_sums, rest_sums = _sums_from_pivot(z, k)
    # The threshold t = λd rises with λ: an entry a_l is above it while λ < a_l/d, with d the width where t = a_l.
    # (A zero under a zero pivot is never: 0/0 compares as false.)
    limits = radius * (z[..., k:] / path.widths)
    q = k - torch.arange(k, device=a.device)

    def solve(multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The multiplier is λ·radius: it has the size of a, where λ itself may overflow.
        j = (limits > multiplier).sum(dim=-1, keepdim=True)
        widths = (head_sums + rest_sums.gather(-1, j)) / (q * radius + (q + j) * multiplier)  # in units of the radius
        i = path.tops(j, (widths * radius)[..., 1:])
        width = widths.gather(-1, i)
        squared_norm = torch.sum(top_squares.gather(-1, i) / (radius + multiplier).square() + (k - i) * width.square())
        return i, j, width * radius, squared_norm

    high = vector_norm(z[..., :k])
    low = (high - radius).clamp_min(0)
    # The norm sees (q + j)λ: the last bits of a small λ count up to n-fold.
    for _ in range(round(-math.log2(torch.finfo(a.dtype).eps)) + a.shape[-1].bit_length()):
        halfway = (low + high) / 2
        inside = solve(halfway)[3] <= 1
        low, high = torch.where(inside, low, halfway), torch.where(inside, halfway, high)
    i, j, width, _ = solve(high)
    above_threshold = (a - path.pivot + path.shift(i, j, width)).clamp_min(0)
    return above_threshold.minimum(a * (radius / (radius + high)))


class _Path:
    """The solutions (d, t) of equation (1) for the rows of ``a``; every count and index is per row.

    ``sorted`` (..., n) is a in descending order, ``pivot`` (..., 1) its k-th entry, and ``widths`` (..., n−k) the
    width d at which t is each of the entries beyond the pivot, ascending: j of them are less than a given d.
    """

    def __init__(self, a: Tensor, k: int) -> None:
        self.sorted = a.sort(dim=-1, descending=True).values
        self.pivot = self.sorted[..., k - 1 : k]
        self._k = k
        self._y = self.sorted - self.pivot
        self._head_sums, self._rest_sums = _sums_from_pivot(self._y, k)
        self.widths = self._widths_at_entries()

    def tops(self, j: Tensor, width: Tensor) -> Tensor:
        """Return i given j; width is a scalar, or (..., k−1), the width for each of i = 1 … k−1."""
        q = self._k - torch.arange(1, self._k, device=j.device)
        sums = self._head_sums[..., 1:] + self._rest_sums.gather(-1, j)
        # The i-th largest entry is a top if it is above t + d with t for i tops; true up to the answer, false after.
        return ((q + j) * self._y[..., : self._k - 1] - sums > j * width).sum(dim=-1, keepdim=True)

    def shift(self, i: Tensor, j: Tensor, width: Tensor) -> Tensor:
        """Return s = pivot − t of equation (1), given i and j."""
        sums = self._head_sums.gather(-1, i) + self._rest_sums.gather(-1, j)
        q = self._k - i
        return (q * width - sums) / (q + j)

    def _widths_at_entries(self) -> Tensor:
        # At t = y_l the width is the least of (Σ_{i<=h<l} y_h − y_l)/(k − i) over i, and they fall until the least:
        # step down by powers of two, always staying on the falling side.
        k, head, rest = self._k, self._y[..., : self._k], self._y[..., self._k :]
        beyond = self._rest_sums[..., :-1] - torch.arange(rest.shape[-1], device=rest.device) * rest

        def sums(i: Tensor) -> Tensor:
            return self._head_sums.gather(-1, i) + beyond - (k - i) * rest

        i = torch.zeros_like(rest, dtype=torch.long)
        for step in [2**b for b in reversed(range((k - 1).bit_length()))]:
            further = (i + step).clamp_max(k - 1)
            falls = (head.gather(-1, (further - 1).clamp_min(0)) - rest) * (k - further) > sums(further)
            i = torch.where(falls, further, i)
        return sums(i) / (k - i)


def _sums_from_pivot(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the sums of values[i:k] for i < k, and of values[k:k+j] for j = 0 … n−k.

    Summing away from the pivot keeps entries that are not in the middle out of the rounding.
    """
    return values[..., :k].flip(-1).cumsum(dim=-1).flip(-1), pad(values[..., k:].cumsum(dim=-1), (1, 0))
