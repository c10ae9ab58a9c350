"""Euclidean projections on magnitudes: the nearest point w >= 0 to a >= 0 in the ball of a k-norm.

Both kernels cut the magnitudes at two levels, t and t + d. The pairs (t, d) of both kernels lie on one path: for a
given k and width d > 0, the threshold t is the largest solution of

    Σ_l clamp(a_l − t, 0, d) = k·d.                                                              (1)

* k-sparse ball (box ∩ ℓ1 ball): w = clamp(a − t, 0, d) with d = radius; the ℓ1 ball is k = 1.
* k-support ball: w = min(max(a − t, 0), a/(1 + λ)) with t = λd, and λ such that the norm is the radius.

Sorted in descending order, the entries of (1) fall into i < k *tops* above t + d, a *middle* of q + j entries with
q = k − i, and the *rest*, at or below t. The k-th largest entry, the *pivot*, is always in the middle, and everything
is measured from it: differences of neighbours are exact, whereas entries of 1e9 in a ball of radius 1 would drown the
answer.

Nothing here synchronises with the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.linalg import vector_norm


def project_ksparse(a: Tensor, k: int, radius: Tensor) -> Tensor:
    """Return argmin ‖w − a‖₂ subject to max w <= radius and Σw <= k·radius, for a >= 0; exact.

    Args:
        a: (..., n); each row has its own ball.
        k: 1 <= k <= n.
        radius: a scalar tensor.

    Returns:
        The projections, (..., n).
    """
    path = _Path(a, k)
    j = (path.widths < radius).sum(dim=-1, keepdim=True)  # (..., 1)
    i = path.tops(j, radius)  # (..., 1)
    shift = path.shift(i, j, radius)
    # A threshold below 0 means that the box alone is enough.
    shifted = torch.where(shift >= path.pivot, a, a - path.pivot + shift)
    return shifted.clamp_min(0).minimum(radius)


def project_ksupport(a: Tensor, k: int, radius: Tensor) -> Tensor:
    """Return argmin ‖w − a‖₂ subject to (Σ_b ‖w_b‖²)^½ <= radius, the k-support norm of each row b, for a >= 0.

    With one row it is the k-support ball itself.

    With ‖w‖² = min Σ w_l²/θ_l over 0 <= θ <= 1, Σθ <= k, and a multiplier λ/2 of the squared norm, the optimum is
    w_l = a_l·θ_l/(θ_l + λ) with θ_l = clamp(a_l/d − λ, 0, 1) and d such that Σθ = k: equation (1) with t = λd. In
    closed form, with a middle of q + j entries,

        d = (Σ_middle a)/(q + (q + j)λ),    ‖w‖² = (Σ_tops a²)/(1 + λ)² + q·d².

    The rows share λ, and their joint norm falls as λ grows. Because a − w is λ times a point of dual norm
    ‖w‖ = radius, and the dual norm is at most the norm, ‖a‖*/radius − 1 <= λ <= ‖a‖*/radius: bisection ends after a
    fixed number of steps.

    (McDonald, Pontil, Stamos 2016, New perspectives on k-support and cluster norms: the form with θ and the proximal
    operator; the closed form, the path and the bracket are derived from it here.)

    Args:
        a: (blocks, n), outside of the ball (inside, the projection is ``a`` itself).
        k: 1 <= k <= n.
        radius: a scalar tensor.

    Returns:
        The projection, (blocks, n).
    """
    path = _Path(a, k)
    z = path.sorted
    top_squares = pad(z[..., : k - 1].square().cumsum(dim=-1), (1, 0))
    head_sums, rest_sums = _sums_from_pivot(z, k)  # (blocks, k), (blocks, n−k+1)
    # The threshold t = λd rises with λ: an entry a_l is above it while λ < a_l/d, with d the width where t = a_l.
    # (A zero below a zero pivot never is: 0/0 compares as false.)
    limits = radius * (z[..., k:] / path.widths)  # (blocks, n−k)
    q = k - torch.arange(k, device=a.device)  # (k,)

    def solve(multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The multiplier is λ·radius: it is of the order of a, whereas λ itself may overflow.
        j = (limits > multiplier).sum(dim=-1, keepdim=True)  # (blocks, 1)
        widths = (head_sums + rest_sums.gather(-1, j)) / (q * radius + (q + j) * multiplier)  # in units of the radius
        i = path.tops(j, (widths * radius)[..., 1:])
        width = widths.gather(-1, i)
        squared_norm = torch.sum(top_squares.gather(-1, i) / (radius + multiplier).square() + (k - i) * width.square())
        return i, j, width * radius, squared_norm

    high = vector_norm(z[..., :k])
    low = (high - radius).clamp_min(0)
    # The norm depends on (q + j)λ: the last bits of a small λ count up to n-fold, hence the bits of n beside eps.
    for _ in range(round(-math.log2(torch.finfo(a.dtype).eps)) + a.shape[-1].bit_length()):
        halfway = (low + high) / 2
        inside = solve(halfway)[3] <= 1
        low, high = torch.where(inside, low, halfway), torch.where(inside, halfway, high)
    i, j, width, _ = solve(high)
    above_threshold = (a - path.pivot + path.shift(i, j, width)).clamp_min(0)
    return above_threshold.minimum(a * (radius / (radius + high)))


class _Path:
    """The solutions (d, t) of equation (1) for the rows of ``a``; every count and index is per row.

    Attributes:
        sorted: (..., n), ``a`` in descending order.
        pivot: (..., 1), its k-th entry.
        widths: (..., n−k), ascending: for each entry beyond the pivot, the width d at which t equals that entry. For a
            given d, j of them are less than d.
    """

    def __init__(self, a: Tensor, k: int) -> None:
        self.sorted = a.sort(dim=-1, descending=True).values
        self.pivot = self.sorted[..., k - 1 : k]
        self._k = k
        self._y = self.sorted - self.pivot
        self._head_sums, self._rest_sums = _sums_from_pivot(self._y, k)
        self.widths = self._widths_at_entries()

    def tops(self, j: Tensor, width: Tensor) -> Tensor:
        """Return i, (..., 1), given j, (..., 1); width is a scalar, or (..., k−1), the width for each i = 1 … k−1."""
        q = self._k - torch.arange(1, self._k, device=j.device)  # (k−1,)
        sums = self._head_sums[..., 1:] + self._rest_sums.gather(-1, j)
        # The i-th largest entry is a top if it is above t + d, with the t that belongs to i tops. This holds for all i
        # up to the answer, and for none after it.
        return ((q + j) * self._y[..., : self._k - 1] - sums > j * width).sum(dim=-1, keepdim=True)

    def shift(self, i: Tensor, j: Tensor, width: Tensor) -> Tensor:
        """Return s = pivot − t of equation (1), (..., 1), given i and j, (..., 1)."""
        sums = self._head_sums.gather(-1, i) + self._rest_sums.gather(-1, j)
        q = self._k - i
        return (q * width - sums) / (q + j)

    def _widths_at_entries(self) -> Tensor:
        # At t = y_l the width is the minimum over i of (Σ_{i<=h<l} y_h − y_l)/(k − i). These values fall up to the
        # minimum: search by powers of two, always staying on the falling side.
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
    """Return the sums of values[i:k] for i < k, (..., k), and of values[k:k+j] for j = 0 … n−k, (..., n−k+1).

    Summing away from the pivot keeps entries outside the middle from adding rounding errors.
    """
    return values[..., :k].flip(-1).cumsum(dim=-1).flip(-1), pad(values[..., k:].cumsum(dim=-1), (1, 0))
