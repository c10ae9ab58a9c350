"""Vector norms look at the magnitudes of the entries: a vertex has, for example, k non-zero entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from pliant.linalg import divide_or_zero, long_norm, topk_mask
from pliant.norms.base import Norm
from pliant.norms.projections import project_ksparse, project_ksupport
from pliant.norms.shapes import Rebuild, Shape


class VectorNorm(Norm):
    """A norm of the magnitudes of all entries; the ``inner`` of every lift."""

    def size_of(self, shape: Shape) -> int:
        """Return the number of entries."""
        return math.prod(shape)

    def magnitudes(self, x: Tensor) -> Tensor:
        """Return abs(x), flattened."""
        return x.abs().flatten()

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return abs(x), flattened to (entries,), and a function that gives other magnitudes the signs of x."""
        return self.magnitudes(x), lambda w: x.sign() * w.reshape(x.shape)


@dataclass(frozen=True)
class Lp(VectorNorm):
    """The p-norm (Σ abs(x_i)^p)^(1/p), 1 <= p <= ∞; dual: the q-norm with 1/p + 1/q = 1.

    The vertex is Hölder's equality case: one signed entry for p = 1, −g/‖g‖₂ for p = 2, −sign(g) for p = ∞.

    Args:
        p: the exponent, ``math.inf`` included.
    """

    p: float

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"Lp needs 1 <= p <= inf, got p={self.p}")

    def parts_of_vertex(self, shape: Shape | Sequence[Shape]) -> int | None:
        """Return 1 for p = 1, whose vertices have a single entry; else None."""
        return 1 if self.p == 1 else None

    def norm_of(self, a: Tensor) -> Tensor:
        """Return ‖a‖_p."""
        return _p_norm(a, self.p)

    def dual_of(self, a: Tensor) -> Tensor:
        """Return ‖a‖_q with 1/p + 1/q = 1."""
        return _p_norm(a, self._conjugate())

    def align(self, a: Tensor) -> Tensor:
        """Return the point of the unit ball where Hölder's inequality is an equality."""
        if self.p == 1:
            return (topk_mask(a, 1) & (a > 0)).to(a.dtype)
        if self.p == math.inf:
            return (a > 0).to(a.dtype)
        if self.p == 2:
            return divide_or_zero(a, long_norm(a, 2)[..., None])
        q = self._conjugate()
        largest = a.amax(dim=-1, keepdim=True)
        shape = divide_or_zero(a, largest)
        # Dividing last makes the norm 1, however the power magnified rounding errors (q is huge for p near 1).
        powers = shape ** (q - 1)
        return divide_or_zero(powers, _p_norm(powers, self.p)[..., None])

    def diameter_of(self, n: int) -> float:
        """Return 2·n^max(0, 1/2 − 1/p)."""
        return 2 * math.pow(n, max(0.0, 0.5 - 1 / self.p))

    def nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        """Return the projection for p = 1, 2 and ∞."""
        match self.p:
            case 1:
                return project_ksparse(a, 1, radius)
            case 2:
                return a  # the nearest point is on the ray through a: Norm.project shrinks it
            case math.inf:
                return a.minimum(radius)
        return super().nearest(a, radius)

    def _conjugate(self) -> float:
        if self.p == 1:
            return math.inf
        return 1.0 if self.p == math.inf else self.p / (self.p - 1)


@dataclass(frozen=True)
class KNorm(VectorNorm):
    """A vector norm whose vertices have at most k non-zero entries.

    Args:
        k: a positive integer.
    """

    k: int = field()  # without field(), the None of the base class would be the default

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"{type(self).__name__} needs an integer k >= 1, got k={self.k!r}")

    def with_k(self, k: int) -> Self:
        """Return the same norm with another k."""
        return replace(self, k=k)

    def check_length(self, n: int) -> None:
        """Raise ValueError if there are fewer than k magnitudes."""
        if self.k > n:
            raise ValueError(f"{self} needs k <= {n}, the number of magnitudes of this tensor")


@dataclass(frozen=True)
class KSparse(KNorm):
    """max(‖x‖∞, ‖x‖₁/k): the unit ball is the convex hull of the vectors with k entries ±1.

    The dual is the sum of the k largest abs(g_i); the vertex has −sign(g_i) at exactly those k.

    Args:
        k: the number of non-zero entries of a vertex.
    """

    def norm_of(self, a: Tensor) -> Tensor:
        """Return max(‖a‖∞, ‖a‖₁/k)."""
        return torch.maximum(a.amax(dim=-1), a.sum(dim=-1) / self.k)

    def dual_of(self, a: Tensor) -> Tensor:
        """Return the sum of the k largest magnitudes."""
        return a.topk(self.k, dim=-1).values.sum(dim=-1)

    def align(self, a: Tensor) -> Tensor:
        """Return 1 at the k largest magnitudes, but 0 where a is 0."""
        return (topk_mask(a, self.k) & (a > 0)).to(a.dtype)

    def diameter_of(self, n: int) -> float:
        """Return 2√k, the distance between a vertex and its negative."""
        return 2.0 * math.sqrt(self.k)

    def nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        """Return the projection onto the intersection of the box and the ℓ1 ball."""
        return project_ksparse(a, self.k, radius)


@dataclass(frozen=True)
class KSupport(KNorm):
    """The k-support norm: the unit ball is the convex hull of the L2 unit vectors with k non-zeros.

    The dual is the L2 norm of the k largest abs(g_i); the vertex is −g/‖g‖₂ restricted to those k.
    (Argyriou, Foygel, Srebro 2012, Sparse prediction with the k-support norm.)

    Args:
        k: the number of non-zero entries of a vertex.
    """

    def norm_of(self, a: Tensor) -> Tensor:
        """Return the k-support norm."""
        # With z sorted in descending order and tails t_j = Σ_{i>=j} z_i (0-based), the norm is the L2 norm of
        # (z_0, …, z_{j−1}, t_j/√(k−j)) for the largest j < k with j = 0 or z_{j−1}(k−j) > t_j. (Proposition 2.1.)
        z = a.sort(dim=-1, descending=True).values
        tails = z.flip(-1).cumsum(-1).flip(-1)[..., : self.k]
        z = z[..., : self.k]
        j = torch.arange(self.k, device=a.device)
        before = torch.cat([torch.full_like(z[..., :1], math.inf), z[..., :-1]], dim=-1)  # z_{j−1}, (..., k)
        split = torch.where(before * (self.k - j) > tails, j, 0).amax(dim=-1, keepdim=True)  # the largest j, (..., 1)
        head = torch.where(j < split, z, 0)
        tail = tails.gather(-1, split) / (self.k - split).to(a.dtype).sqrt()
        return long_norm(torch.cat([head, tail], dim=-1), 2)

    def dual_of(self, a: Tensor) -> Tensor:
        """Return the L2 norm of the k largest magnitudes."""
        return long_norm(a.topk(self.k, dim=-1).values, 2)

    def align(self, a: Tensor) -> Tensor:
        """Return the k largest magnitudes, divided by their L2 norm."""
        kept = torch.where(topk_mask(a, self.k), a, 0)
        return Lp(2).align(kept)

    def diameter_of(self, n: int) -> float:
        """Return 2."""
        return 2.0

    def nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        """Return the projection onto the k-support ball."""
        return project_ksupport(a[None], self.k, radius)[0]


def _p_norm(a: Tensor, p: float) -> Tensor:
    if p in (1, 2, math.inf):
        return long_norm(a, p)
    # Large powers of numbers below 1 vanish: take powers of a/max(a), whose largest entry stays 1.
    largest = a.detach().amax(dim=-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    return largest.squeeze(-1) * long_norm(a / largest, p)
