"""Norms whose unit balls have sparse extreme points: three vector norms, four lifts.

A norm here answers four questions, all that Frank-Wolfe asks: its value ``norm(x)``, the dual norm
``norm.dual(g)``, a minimiser of ⟨g, ·⟩ over the unit ball ``norm.lmo(g)`` (linear minimisation oracle), and
the L2 ``norm.diameter(shape)`` of the unit ball.

The pieces combine:

* **Vector norms** look at the magnitudes of the entries: ``Lp(p)``, ``KSparse(k)``, ``KSupport(k)``. Their
  vertices have, for example, k entries.
* **Lifts** apply a vector norm to other magnitudes of the same tensor: ``Rows(inner)`` to the L2 norms of the
  rows, ``Channels(inner, count)`` to those of runs of rows that leave a network together, ``Spectral(inner)`` to the
  singular values, ``Blocks(inner, size)`` to each block of consecutive entries. Their vertices have k filters,
  k channels, k singular directions, k entries in every block.

So ``Rows(KSupport(8))`` is the ball for "few filters", ``Spectral(KSupport(8))`` the one for "low rank", and
``Blocks(KSupport(2), 4)`` the one for 2:4 patterns.

All of them work by the same two moves. ``_split`` takes a tensor apart into magnitudes a >= 0 and a function
that rebuilds a tensor from other magnitudes; ``_norm``, ``_dual`` and ``_align`` work on the magnitudes alone,
along the last dimension. ``_align(a)`` is the point w >= 0 of the unit ball that maximises ⟨a, w⟩, so that

    lmo(g) = −rebuild(align(a)),    where g = rebuild(a).

**Row = filter.** A weight is read as a matrix with one row per output: ``x.movedim(dim, 0).flatten(1)``; a 1-D
tensor of n entries is n×1.

**One or several tensors.** Every method takes a tensor or a sequence of tensors; a sequence is read jointly,
as one block-diagonal object with one k for all; under ``Channels``, as one tensor whose channels all share.

**Precision.** Half-precision input is computed in float32; norms of it are returned in float32, vertices in the
input's dtype. Values are divided by a power of two near the largest entry first, so nothing overflows or
vanishes where the result itself does not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from torch import Tensor

from pliant.linalg import (
    accumulation_dtype,
    divide_or_zero,
    long_norm,
    polar,
    power_of_two_scale,
    topk_mask,
    vector_norm,
)
from pliant.norms.projections import project_ksparse, project_ksupport

Tensors = Tensor | Sequence[Tensor]
Shape = Sequence[int]
Rebuild = Callable[[Tensor], Tensor]


class Norm(ABC):
    """A norm on tensors, stateless and hashable; the base of all norms in this file."""

    def __call__(self, x: Tensors) -> Tensor:
        """Return ‖x‖, a scalar tensor; differentiable."""
        tensors, scale = _scaled(x)
        return scale * self._norm(self._join(tensors))

    def dual(self, g: Tensors) -> Tensor:
        """Return the dual norm max ⟨g, v⟩ over the unit ball, a scalar tensor; differentiable."""
        tensors, scale = _scaled(g)
        return scale * self._dual(self._join(tensors))

    @overload
    def lmo(self, g: Tensor) -> Tensor: ...
    @overload
    def lmo(self, g: Sequence[Tensor]) -> list[Tensor]: ...
    @torch.no_grad()
    def lmo(self, g: Tensors) -> Tensor | list[Tensor]:
        """Return a vertex v of the unit ball with ⟨g, v⟩ = −dual(g), of g's shape(s); lmo(0) = 0."""
        tensors, _ = _scaled(g)
        self.length([x.shape for x in tensors])
        magnitudes, rebuilds = zip(*(self._split_for_vertex(x) for x in tensors), strict=True)
        parts = self._spread(self._align(self._combine(magnitudes)), magnitudes)
        given = [g] if isinstance(g, Tensor) else list(g)
        parts = [part.to(x.dtype) for part, x in zip(parts, tensors, strict=True)]
        vertices = [-rebuild(part).to(x.dtype) for rebuild, part, x in zip(rebuilds, parts, given, strict=True)]
        return vertices[0] if isinstance(g, Tensor) else vertices

    def diameter(self, shape: Shape | Sequence[Shape]) -> float:
        """Return the largest L2 distance of two points of the unit ball for tensor(s) of this shape."""
        return self._diameter(self.length(shape))

    def length(self, shape: Shape | Sequence[Shape]) -> int:
        """Return how many magnitudes the vector norm sees: what a fraction of k is a fraction of.

        Entries for a vector norm, filters for ``Rows``, channels for ``Channels``, singular values for
        ``Spectral``, the block size for ``Blocks``. Raises ValueError where this norm is not defined for the shape.
        """
        shapes = _shapes(shape)
        for s in shapes:
            if math.prod(s) == 0:
                raise ValueError(f"a norm needs non-empty tensors, got shape {tuple(s)}")
        n = self._joint_length([self._length(s) for s in shapes])
        self._check_length(n)
        return n

    @torch.no_grad()
    def project(self, x: Tensor, radius: float) -> Tensor:
        """Return the nearest point to x, in L2, of the ball of this radius; x itself where ``NormBall.contains`` it.

        Known for Lp(1), Lp(2), Lp(inf), KSparse and KSupport, under Rows and Spectral too, and for Blocks(KSupport);
        else raises NotImplementedError.

        Args:
            x: of any shape that this norm is defined for.
            radius: positive and finite, in the units of x.
        """
        if not (radius > 0 and math.isfinite(radius)):
            raise ValueError(f"project needs a positive, finite radius, got {radius}")
        (scaled,), scale = _scaled(x)
        self.length(x.shape)
        magnitudes, rebuild = self._split(scaled)
        nearest = scale * rebuild(self._nearest(magnitudes, radius / scale))
        # The rounding of singular vectors, or of one threshold for many entries, adds up: shrink what it put outside.
        nearest = nearest / (self(nearest) / radius).clamp_min(1)
        inside = self(x) <= radius * (1 + 4 * torch.finfo(x.dtype).eps)
        return torch.where(inside, x, nearest.to(x.dtype))

    @overload
    def soft_threshold(self, x: Tensor, amount: float | Tensor) -> Tensor: ...
    @overload
    def soft_threshold(self, x: Sequence[Tensor], amount: float | Tensor) -> list[Tensor]: ...
    @torch.no_grad()
    def soft_threshold(self, x: Tensors, amount: float | Tensor) -> Tensor | list[Tensor]:
        """Return x with each of its parts shorter by ``amount``, those that are not longer gone.

        Parts are entries, filters under ``Rows``, channels under ``Channels``, singular directions under ``Spectral``.
        It is the proximal step argmin_y ½‖y − x‖² + amount·Ω(y), Ω the sum of the parts' lengths: soft threshold,
        group lasso (Yuan & Lin 2006) and the nuclear norm (Cai, Candès, Shen 2010). No norm of this file grows by it,
        so y lies in every ball that x lies in.

        Args:
            x: tensor(s) of any shape that this norm is defined for.
            amount: >= 0, in the units of x.
        """
        tensors, scale = _scaled(x)
        self.length([t.shape for t in tensors])
        magnitudes, rebuilds = zip(*(self._split_into_parts(t) for t in tensors), strict=True)
        shorter = (self._combine(magnitudes) - amount / scale).clamp_min(0)
        parts = self._spread(shorter, magnitudes)
        given = [x] if isinstance(x, Tensor) else list(x)
        shrunk = [(scale * rebuild(part)).to(t.dtype) for rebuild, part, t in zip(rebuilds, parts, given, strict=True)]
        return shrunk[0] if isinstance(x, Tensor) else shrunk

    def to_spec(self) -> dict[str, Any]:
        """Return this norm as plain data: strings, numbers and dicts (p = ∞ is the string "inf")."""
        spec: dict[str, Any] = {"norm": type(self).__name__}
        for field in fields(self):  # type: ignore[arg-type]  # every final class is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Norm):
                value = value.to_spec()
            spec[field.name] = "inf" if value == math.inf else value
        return spec

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> Norm:
        """Return the norm that :meth:`to_spec` described; raises ValueError for anything else."""
        finals: list[type[Norm]] = [Lp, KSparse, KSupport, Rows, Channels, Spectral, Blocks]
        known = {final.__name__: final for final in finals}
        arguments = dict(spec)
        name = arguments.pop("norm", None)
        if name not in known:
            raise ValueError(f"a norm's spec needs 'norm' as one of {', '.join(known)}; got {spec!r}")
        if "inner" in arguments:
            arguments["inner"] = Norm.from_spec(arguments["inner"])
        if arguments.get("p") == "inf":
            arguments["p"] = math.inf
        try:
            return known[name](**arguments)
        except TypeError as error:
            raise ValueError(f"not the spec of a {name} norm: {spec!r} ({error})") from None

    def _join(self, tensors: list[Tensor]) -> Tensor:
        self.length([x.shape for x in tensors])
        return self._combine([self._magnitudes(x) for x in tensors])

    def _combine(self, magnitudes: Sequence[Tensor]) -> Tensor:
        """Return the magnitudes of several tensors as those of the joint object."""
        return torch.cat(list(magnitudes))

    def _spread(self, w: Tensor, magnitudes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the share of each tensor in new magnitudes of the joint object."""
        return list(w.split([len(a) for a in magnitudes]))

    def _joint_length(self, lengths: list[int]) -> int:
        return sum(lengths)

    @abstractmethod
    def _length(self, shape: Shape) -> int: ...

    @abstractmethod
    def _check_length(self, n: int) -> None: ...

    @abstractmethod
    def _magnitudes(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _split(self, x: Tensor) -> tuple[Tensor, Rebuild]: ...

    def _split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        return self._split(x)

    def _split_into_parts(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        return self._split(x)

    @abstractmethod
    def _norm(self, a: Tensor) -> Tensor: ...

    @abstractmethod
    def _dual(self, a: Tensor) -> Tensor: ...

    @abstractmethod
    def _align(self, a: Tensor) -> Tensor: ...

    @abstractmethod
    def _diameter(self, n: int) -> float: ...

    def _nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        raise NotImplementedError(f"no Euclidean projection is known for {self}")


# --- vector norms -----------------------------------------------------------------------------------------


class VectorNorm(Norm):
    """A norm of the magnitudes of all entries; the ``inner`` of every lift."""

    def _length(self, shape: Shape) -> int:
        return math.prod(shape)

    def _check_length(self, n: int) -> None:
        pass

    def _magnitudes(self, x: Tensor) -> Tensor:
        return x.abs().flatten()

    def _split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        return self._magnitudes(x), lambda w: x.sign() * w.reshape(x.shape)


@dataclass(frozen=True)
class Lp(VectorNorm):
    """The p-norm (Σ abs(x_i)^p)^(1/p), 1 <= p <= ∞; dual: the q-norm with 1/p + 1/q = 1.

    The vertex is Hölder's equality case: one signed entry for p = 1, −g/‖g‖₂ for p = 2, −sign(g) for p = ∞.
    """

    p: float

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"Lp needs 1 <= p <= inf, got p={self.p}")

    def _norm(self, a: Tensor) -> Tensor:
        return _p_norm(a, self.p)

    def _dual(self, a: Tensor) -> Tensor:
        return _p_norm(a, self._conjugate())

    def _align(self, a: Tensor) -> Tensor:
        if self.p == 1:
            return (topk_mask(a, 1) & (a > 0)).to(a.dtype)
        if self.p == math.inf:
            return (a > 0).to(a.dtype)
        if self.p == 2:
            return divide_or_zero(a, long_norm(a, 2)[..., None])
        q = self._conjugate()
        largest = a.amax(dim=-1, keepdim=True)
        shape = divide_or_zero(a, largest)
        # Dividing last makes the norm 1 whatever the power did to the rounding (q is huge for p near 1).
        powers = shape ** (q - 1)
        return divide_or_zero(powers, _p_norm(powers, self.p)[..., None])

    def _diameter(self, n: int) -> float:
        return 2 * math.pow(n, max(0.0, 0.5 - 1 / self.p))

    def _nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        match self.p:
            case 1:
                return project_ksparse(a, 1, radius)
            case 2:
                return a  # the nearest point is on the ray through a: project shrinks it
            case math.inf:
                return a.minimum(radius)
        return super()._nearest(a, radius)

    def _conjugate(self) -> float:
        if self.p == 1:
            return math.inf
        return 1.0 if self.p == math.inf else self.p / (self.p - 1)


@dataclass(frozen=True)
class _KNorm(VectorNorm):
    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"{type(self).__name__} needs an integer k >= 1, got k={self.k!r}")

    def _check_length(self, n: int) -> None:
        if self.k > n:
            raise ValueError(f"{self} needs k <= {n}, the number of magnitudes of this tensor")


@dataclass(frozen=True)
class KSparse(_KNorm):
    """max(‖x‖∞, ‖x‖₁/k): the unit ball is the convex hull of the vectors with k entries ±1.

    The dual is the sum of the k largest abs(g_i); the vertex has −sign(g_i) at exactly those k.
    """

    def _norm(self, a: Tensor) -> Tensor:
        return torch.maximum(a.amax(dim=-1), a.sum(dim=-1) / self.k)

    def _dual(self, a: Tensor) -> Tensor:
        return a.topk(self.k, dim=-1).values.sum(dim=-1)

    def _align(self, a: Tensor) -> Tensor:
        return (topk_mask(a, self.k) & (a > 0)).to(a.dtype)

    def _diameter(self, n: int) -> float:
        return 2.0 * math.sqrt(self.k)

    def _nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        return project_ksparse(a, self.k, radius)


@dataclass(frozen=True)
class KSupport(_KNorm):
    """The k-support norm: the unit ball is the convex hull of the L2 unit vectors with k non-zeros.

    The dual is the L2 norm of the k largest abs(g_i); the vertex is −g/‖g‖₂ restricted to those k.
    (Argyriou, Foygel, Srebro 2012, Sparse prediction with the k-support norm.)
    """

    def _norm(self, a: Tensor) -> Tensor:
        # With z sorted in descending order and tails t_j = Σ_{i>=j} z_i (0-based), the norm is the L2 norm of
        # (z_0, …, z_{j−1}, t_j/√(k−j)) for the largest j < k with j = 0 or z_{j−1}(k−j) > t_j. (Proposition 2.1.)
        z = a.sort(dim=-1, descending=True).values
        tails = z.flip(-1).cumsum(-1).flip(-1)[..., : self.k]
        z = z[..., : self.k]
        j = torch.arange(self.k, device=a.device)
        before = torch.cat([torch.full_like(z[..., :1], math.inf), z[..., :-1]], dim=-1)
        split = torch.where(before * (self.k - j) > tails, j, 0).amax(dim=-1, keepdim=True)
        head = torch.where(j < split, z, 0)
        tail = tails.gather(-1, split) / (self.k - split).to(a.dtype).sqrt()
        return long_norm(torch.cat([head, tail], dim=-1), 2)

    def _dual(self, a: Tensor) -> Tensor:
        return long_norm(a.topk(self.k, dim=-1).values, 2)

    def _align(self, a: Tensor) -> Tensor:
        kept = torch.where(topk_mask(a, self.k), a, 0)
        return Lp(2)._align(kept)

    def _diameter(self, n: int) -> float:
        return 2.0

    def _nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        return project_ksupport(a[None], self.k, radius)[0]


# --- lifts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lift(Norm):
    """A vector norm applied to other magnitudes than those of the entries."""

    inner: VectorNorm

    def __post_init__(self) -> None:
        if not isinstance(self.inner, VectorNorm):
            raise ValueError(f"{type(self).__name__} lifts a vector norm (Lp, KSparse, KSupport), got {self.inner!r}")

    def _check_length(self, n: int) -> None:
        self.inner._check_length(n)

    def _norm(self, a: Tensor) -> Tensor:
        return self.inner._norm(a)

    def _dual(self, a: Tensor) -> Tensor:
        return self.inner._dual(a)

    def _align(self, a: Tensor) -> Tensor:
        return self.inner._align(a)

    def _diameter(self, n: int) -> float:
        return self.inner._diameter(n)

    def _nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        return self.inner._nearest(a, radius)


@dataclass(frozen=True)
class Rows(_Lift):
    """``inner`` of the L2 norms of the rows (filters, neurons); ``dim`` is the dimension that counts them.

    ``Rows(Lp(1))`` is the group lasso's norm; a vertex of ``Rows(KSupport(k))`` has k non-zero filters.

    With ``orthogonal``, for ``KSparse`` alone, the oracle turns the k filters that it chose towards the nearest
    orthogonal ones: row i of −lmo(g) is pᵢ/‖pᵢ‖ for the polar factor P of these k rows of g, in place of gᵢ/‖gᵢ‖. It
    stays in the ball, which is the same, but ⟨g, lmo(g)⟩ reaches −dual(g) only where the rows are orthogonal already;
    ``norm``, ``dual`` and the gap are those of the ball. Filters that look for the same thing are told apart, which
    networks learn faster with: for k = all rows this is the direction of Muon.
    """

    dim: int = 0
    orthogonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_orthogonal(self.orthogonal, self.inner)

    def _length(self, shape: Shape) -> int:
        return _matrix_shape(shape, self.dim)[0]

    def _magnitudes(self, x: Tensor) -> Tensor:
        return vector_norm(_as_matrix(x, self.dim), dim=1)

    def _split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        matrix = _as_matrix(x, self.dim)
        a = without_vanished(vector_norm(matrix, dim=1))
        return a, lambda w: _from_matrix(divide_or_zero(w, a)[:, None] * matrix, x.shape, self.dim)

    def _times(self, x: Tensor, factors: Tensor) -> Tensor:
        return _from_matrix(factors[:, None] * _as_matrix(x, self.dim), x.shape, self.dim)

    def _split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        a, rebuild = self._split(x)
        if not self.orthogonal:
            return a, rebuild
        matrix = _as_matrix(x, self.dim)
        return a, lambda w: _from_matrix(_turned(matrix[None], w, self.inner, matrix.shape[1])[0], x.shape, self.dim)


@dataclass(frozen=True)
class Channels(_Lift):
    """``inner`` of the L2 norms of channels, each made of rows of one or several tensors.

    What leaves a network together shares a channel: a filter with its bias, its BatchNorm scale and shift and the
    filters that a residual connection ties to it; all rows of an attention head; a neuron's row in each of its layers.
    In every tensor the rows are ``count`` equal runs, one a channel; in packed tensors (query, key and value in one
    weight) they are so in each of ``parts`` equal parts. Tensors of a joint ball share their channels: a vertex of
    ``Channels(KSupport(k), count)`` is non-zero in k channels, in all tensors the same.

    ``Channels(inner, rows)`` of a single tensor is ``Rows(inner)``. With ``orthogonal`` the chosen rows of every tensor
    are turned towards orthogonal ones, as under ``Rows``; each tensor keeps its share of each channel.
    """

    count: int
    dim: int = 0
    parts: int = 1
    orthogonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("count", self.count), ("parts", self.parts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Channels needs an integer {name} >= 1, got {value!r}")
        self.inner._check_length(self.count)
        _check_orthogonal(self.orthogonal, self.inner)

    def _length(self, shape: Shape) -> int:
        rows, _ = _matrix_shape(shape, self.dim)
        if rows % (self.count * self.parts):
            raise ValueError(f"{self}: {rows} rows do not split into {self.parts} x {self.count} equal runs")
        return self.count

    def _joint_length(self, lengths: list[int]) -> int:
        return self.count

    def _combine(self, magnitudes: Sequence[Tensor]) -> Tensor:
        return magnitudes[0] if len(magnitudes) == 1 else vector_norm(torch.stack(list(magnitudes)), dim=0)

    def _spread(self, w: Tensor, magnitudes: Sequence[Tensor]) -> Sequence[Tensor]:
        return [divide_or_zero(w * a, self._combine(magnitudes)) for a in magnitudes]

    def _magnitudes(self, x: Tensor) -> Tensor:
        return vector_norm(self._runs(x), dim=(0, 2))

    def _split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        runs = self._runs(x)
        a = without_vanished(vector_norm(runs, dim=(0, 2)))

        def rebuild(w: Tensor) -> Tensor:
            return _from_matrix((divide_or_zero(w, a)[:, None] * runs).flatten(0, 1), x.shape, self.dim)

        return a, rebuild

    def _times(self, x: Tensor, factors: Tensor) -> Tensor:
        return _from_matrix((factors[:, None] * self._runs(x)).flatten(0, 1), x.shape, self.dim)

    def _split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        a, rebuild = self._split(x)
        if not self.orthogonal:
            return a, rebuild
        runs, columns = self._runs(x), _matrix_shape(x.shape, self.dim)[1]
        return a, lambda w: _from_matrix(_turned(runs, w, self.inner, columns).flatten(0, 1), x.shape, self.dim)

    def _runs(self, x: Tensor) -> Tensor:
        return _as_matrix(x, self.dim).reshape(self.parts, self.count, -1)


@dataclass(frozen=True)
class Spectral(_Lift):
    """``inner`` of the singular values of the matrix whose rows are counted by ``dim``.

    ``Spectral(Lp(1))`` is the nuclear norm, ``Spectral(Lp(inf))`` the operator norm; a vertex of
    ``Spectral(KSupport(k))`` has rank at most k. With ``groups`` > 1 (grouped convolutions) the rows fall into that
    many consecutive matrices, read as one block-diagonal matrix.

    ``spatial``: the matrix of a 2-d convolution has a row for each filter and kernel column, and a column for each
    input channel and kernel row. Of rank r it is a k×1 convolution with r filters, then a 1×k one (Jaderberg et al.
    2014), where otherwise it is a k×k one, then a 1×1.
    """

    dim: int = 0
    groups: int = 1
    spatial: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"Spectral needs an integer groups >= 1, got {self.groups!r}")
        if not isinstance(self.spatial, bool):
            raise ValueError(f"Spectral needs spatial to be True or False, got {self.spatial!r}")

    def _length(self, shape: Shape) -> int:
        rows, columns = self._block_shape(shape)
        return self.groups * min(rows, columns)

    def _magnitudes(self, x: Tensor) -> Tensor:
        if self.inner == Lp(2):
            return x.abs().flatten()  # the Frobenius norm needs no singular values
        values: Tensor = torch.linalg.svdvals(self._blocks(x))
        return values.flatten()

    def _split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        if self.inner == Lp(2):
            return self.inner._split(x)
        blocks = self._blocks(x)
        u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
        s = _without_noise(s, blocks)
        u = u * (blocks != 0).any(dim=2, keepdim=True)  # a zero row stays exactly zero

        def rebuild(w: Tensor) -> Tensor:
            return self._from_blocks((u * w.reshape(s.shape)[:, None, :]) @ vh, x)

        return s.flatten(), rebuild

    def _split_into_parts(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        blocks = self._blocks(x)
        if blocks.dtype == torch.float64:
            return replace(self, inner=Lp(1))._split(x)
        # The Gram matrix in double precision has the singular values of a float32 matrix to within its own rounding,
        # in less than half the time.
        wide = blocks.shape[1] <= blocks.shape[2]
        a = (blocks if wide else blocks.mT).double()
        squares, u = torch.linalg.eigh(a @ a.mT)
        u = u * (a != 0).any(dim=2, keepdim=True)  # a zero row stays exactly zero
        s = _without_noise(squares.clamp_min(0).sqrt(), blocks)

        def rebuild(w: Tensor) -> Tensor:
            factors = divide_or_zero(w.double(), s.flatten()).reshape(s.shape)
            matrix = (u * factors[:, None, :]) @ (u.mT @ a)
            return self._from_blocks((matrix if wide else matrix.mT).to(x.dtype), x)

        return s.flatten().to(x.dtype), rebuild

    def _block_shape(self, shape: Shape) -> tuple[int, int]:
        if len(shape) < 2:
            raise ValueError(f"{self} needs a matrix or more dimensions, got shape {tuple(shape)}: use a vector norm")
        if self.spatial and len(shape) != 4:
            raise ValueError(f"{self} needs the weight of a 2-d convolution, got shape {tuple(shape)}")
        rows, columns = _matrix_shape(shape, self.dim)
        if rows % self.groups:
            raise ValueError(f"{self}: {rows} rows do not split into {self.groups} groups")
        if self.spatial:
            rows, columns = rows * shape[3], columns // shape[3]
        return rows // self.groups, columns

    def _blocks(self, x: Tensor) -> Tensor:
        rows, columns = self._block_shape(x.shape)
        matrix = x.permute(self._spatial_order()).flatten(2) if self.spatial else _as_matrix(x, self.dim)
        return matrix.reshape(self.groups, rows, columns)

    def _from_blocks(self, blocks: Tensor, like: Tensor) -> Tensor:
        if not self.spatial:
            return _from_matrix(blocks.flatten(0, 1), like.shape, self.dim)
        order = self._spatial_order()
        moved = blocks.reshape([like.shape[d] for d in order])
        return moved.permute([order.index(d) for d in range(4)])

    def _spatial_order(self) -> tuple[int, int, int, int]:
        """Return the dimensions of filters, kernel columns, channels, kernel rows."""
        return self.dim, 3, 1 - self.dim, 2


@dataclass(frozen=True)
class Blocks(_Lift):
    """The L2 norm over all blocks of ``inner`` of each block: ``size`` consecutive entries along ``dim``.

    A vertex of ``Blocks(KSupport(n), m)`` has at most n non-zeros in every block of m, the N:M pattern that hardware
    reads along the input channels (dim 1). dual(g) is the L2 norm over blocks of inner.dual, and block b of the
    vertex is inner.lmo(g_b) weighted by inner.dual(g_b)/dual(g).
    """

    size: int
    dim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Blocks needs an integer size >= 1, got {self.size!r}")
        if self.dim < 0:
            raise ValueError(f"Blocks needs dim >= 0, got {self.dim}")
        self.inner._check_length(self.size)

    def _length(self, shape: Shape) -> int:
        if len(shape) <= self.dim:
            raise ValueError(f"{self} needs a dimension {self.dim}, got shape {tuple(shape)}")
        if shape[self.dim] % self.size:
            raise ValueError(f"{self}: dimension {self.dim} of shape {tuple(shape)} is not a multiple of {self.size}")
        return self.size

    def _joint_length(self, lengths: list[int]) -> int:
        return self.size

    def _magnitudes(self, x: Tensor) -> Tensor:
        return x.movedim(self.dim, -1).abs().reshape(-1, self.size)

    def _split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        moved = x.movedim(self.dim, -1)
        signs = moved.sign()
        return moved.abs().reshape(-1, self.size), lambda w: (signs * w.reshape(moved.shape)).movedim(-1, self.dim)

    def _norm(self, a: Tensor) -> Tensor:
        return long_norm(self.inner._norm(a), 2)

    def _dual(self, a: Tensor) -> Tensor:
        return long_norm(self.inner._dual(a), 2)

    def _align(self, a: Tensor) -> Tensor:
        weights = Lp(2)._align(self.inner._dual(a))
        return weights[:, None] * self.inner._align(a)

    def _nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        if isinstance(self.inner, KSupport):
            return project_ksupport(a, self.inner.k, radius)
        return Norm._nearest(self, a, radius)


def _without_noise(s: Tensor, blocks: Tensor) -> Tensor:
    """Return singular values of blocks with 0 for those that are rounding: their vectors would write into zero rows."""
    noise = s.amax(dim=1, keepdim=True) * max(blocks.shape[1:]) * torch.finfo(blocks.dtype).eps
    return torch.where(s <= noise, 0, s)


# --- orthogonal rows --------------------------------------------------------------------------------------


def _check_orthogonal(orthogonal: bool, inner: VectorNorm) -> None:
    if not isinstance(orthogonal, bool):
        raise ValueError(f"orthogonal must be True or False, got {orthogonal!r}")
    if orthogonal and not isinstance(inner, KSparse):
        raise ValueError(f"orthogonal rows have equal lengths, as in a vertex of KSparse(k); got {inner!r}")


def _turned(runs: Tensor, w: Tensor, inner: VectorNorm, columns: int) -> Tensor:
    """Return channels of the lengths w along the polar factor of the rows where w > 0.

    Args:
        runs: (parts, channels, entries), each entry of a channel's rows.
        w: (channels,), at most ``inner.k`` of them positive.
        inner: a ``KSparse``.
        columns: of a row.
    """
    assert isinstance(inner, KSparse)
    chosen = w.topk(min(inner.k, len(w))).indices  # one of several tensors may have fewer rows
    # Where a chosen channel has no part in these tensors, another one would come in its place.
    rows = runs[:, chosen] * (w[chosen] > 0)[:, None]
    turned = polar(rows.reshape(1, -1, columns)).reshape(rows.shape)
    # The iteration is not exact: lengths are, so that the result is in the ball.
    lengths = without_vanished(vector_norm(turned, dim=(0, 2)))
    factors = torch.where(lengths == 0, 0, divide_or_zero(w[chosen], lengths))
    return torch.zeros_like(runs).index_copy(1, chosen, factors[:, None] * turned)


# --- shapes and scales ------------------------------------------------------------------------------------


def _scaled(x: Tensors) -> tuple[list[Tensor], Tensor]:
    """Return the tensors divided by one power of two near their largest entry, and that power."""
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("a norm needs at least one tensor, got none")
    for t in tensors:
        if not t.is_floating_point():
            raise ValueError(f"a norm needs real floating-point tensors, got dtype {t.dtype}")
        if t.is_sparse or t.numel() == 0:
            raise ValueError(f"a norm needs dense, non-empty tensors, got {t.layout} of shape {tuple(t.shape)}")
    tensors = [t.to(accumulation_dtype(t)) for t in tensors]
    scale = power_of_two_scale([t.detach() for t in tensors])
    return [t / scale for t in tensors], scale


def without_vanished(a: Tensor) -> Tensor:
    """Return row norms with 0 for the smallest: their squares underflow, and to divide by them would leave the ball."""
    return a.masked_fill(a < 8 * torch.finfo(a.dtype).tiny ** 0.5, 0)


def _p_norm(a: Tensor, p: float) -> Tensor:
    if p in (1, 2, math.inf):
        return long_norm(a, p)
    # Large powers of numbers below 1 vanish: raise a/max(a), whose largest entry stays 1.
    largest = a.detach().amax(dim=-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    return largest.squeeze(-1) * long_norm(a / largest, p)


def _shapes(shape: Shape | Sequence[Shape]) -> list[Shape]:
    if len(shape) == 0 or isinstance(shape[0], int):
        return [shape]  # type: ignore[list-item]
    return list(shape)  # type: ignore[arg-type]


def _matrix_shape(shape: Shape, dim: int) -> tuple[int, int]:
    if len(shape) < 2:
        return math.prod(shape), 1
    if not 0 <= dim < len(shape):
        raise ValueError(f"rows are counted by dimension {dim}, but the tensor has shape {tuple(shape)}")
    return shape[dim], math.prod(shape) // shape[dim]


def _as_matrix(x: Tensor, dim: int) -> Tensor:
    return x.reshape(-1, 1) if x.ndim < 2 else x.movedim(dim, 0).flatten(1)


def _from_matrix(matrix: Tensor, shape: Shape, dim: int) -> Tensor:
    if len(shape) < 2:
        return matrix.reshape(tuple(shape))
    moved = [shape[dim], *(n for i, n in enumerate(shape) if i != dim)]
    return matrix.reshape(moved).movedim(0, dim)
