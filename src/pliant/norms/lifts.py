"""Lifts apply a vector norm to other magnitudes of a tensor: lengths of rows, singular values, blocks of entries.

``Rows(inner)`` looks at the L2 norms of the rows, ``Channels(inner, count)`` at the L2 norms of runs of rows that leave
a network together, ``Spectral(inner)`` at the singular values, ``Blocks(inner, size)`` at each block of consecutive
entries. Their vertices have k filters, k channels, k singular directions, or k entries in every block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pliant.errors import BadInput
from pliant.linalg import divide_or_zero, long_norm, polar, vector_norm
from pliant.norms.base import Norm
from pliant.norms.projections import project_ksupport
from pliant.norms.shapes import (
    Rebuild,
    RowDims,
    Shape,
    as_matrix,
    check_row_dims,
    from_matrix,
    matrix_shape,
    row_dims,
    shapes_of,
    without_vanished,
)
from pliant.norms.vector import KSparse, KSupport, Lp, VectorNorm


@dataclass(frozen=True)
class Lift(Norm):
    """A vector norm applied to magnitudes other than the entries'.

    Args:
        inner: the vector norm.
    """

    inner: VectorNorm

    @property
    def k(self) -> int | None:  # type: ignore[override]  # vector norms define it as a field, or as None
        """The k of the vector norm."""
        return self.inner.k

    def with_k(self, k: int) -> Self:
        """Return the same lift of the vector norm with another k."""
        if self.inner.k is None:
            raise BadInput(f"{self} has no k")
        return replace(self, inner=self.inner.with_k(k))

    def parts_of_vertex(self, shape: Shape | Sequence[Shape]) -> int | None:
        """Return the largest number of filters, channels or directions of a vertex; None if there is no limit."""
        return self.inner.parts_of_vertex(shape)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, VectorNorm):
            raise ValueError(f"{type(self).__name__} lifts a vector norm (Lp, KSparse, KSupport), got {self.inner!r}")

    def check_length(self, n: int) -> None:
        """Raise ValueError unless the vector norm is defined for n magnitudes."""
        self.inner.check_length(n)

    def norm_of(self, a: Tensor) -> Tensor:
        """Return the vector norm."""
        return self.inner.norm_of(a)

    def dual_of(self, a: Tensor) -> Tensor:
        """Return the dual of the vector norm."""
        return self.inner.dual_of(a)

    def align(self, a: Tensor) -> Tensor:
        """Return the vertex of the vector norm."""
        return self.inner.align(a)

    def diameter_of(self, n: int) -> float:
        """Return the diameter of the vector norm's ball."""
        return self.inner.diameter_of(n)

    def nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        """Return the nearest point of the vector norm's ball."""
        return self.inner.nearest(a, radius)


@dataclass(frozen=True)
class Rows(Lift):
    """``inner`` of the L2 norms of the rows (filters, neurons).

    ``Rows(Lp(1))`` is the group lasso's norm; a vertex of ``Rows(KSupport(k))`` has k non-zero filters.

    With ``orthogonal``, the oracle turns the k filters that it chose towards the nearest orthogonal ones: row i of
    −lmo(g) is pᵢ/‖pᵢ‖ for the polar factor P of these k rows of g, instead of gᵢ/‖gᵢ‖. The ball, ``norm``, ``dual`` and
    the gap do not change, and the result stays in the ball, but ⟨g, lmo(g)⟩ reaches −dual(g) only if the rows are
    already orthogonal. Filters that look for the same thing are driven apart, and networks learn faster; with k = all
    rows this is the direction of Muon.

    Args:
        inner: the vector norm; a ``KSparse`` if ``orthogonal``.
        dim: the dimension that counts the rows, or several that count them together: (0, 1) for the rows of all slices
            of a tensor (slices, rows, columns).
        orthogonal: whether the oracle orthogonalises the chosen rows.
    """

    dim: RowDims = 0
    orthogonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_row_dims("Rows", self.dim)
        _check_orthogonal(self.orthogonal, self.inner)

    def size_of(self, shape: Shape) -> int:
        """Return the number of rows."""
        return matrix_shape(shape, self.dim)[0]

    def magnitudes(self, x: Tensor) -> Tensor:
        """Return the L2 norms of the rows, (rows,)."""
        return vector_norm(as_matrix(x, self.dim), dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the L2 norms of the rows, (rows,), and a function that gives the rows of x other lengths."""
        matrix = as_matrix(x, self.dim)  # (rows, columns)
        a = without_vanished(vector_norm(matrix, dim=1))
        return a, lambda w: from_matrix(divide_or_zero(w, a)[:, None] * matrix, x.shape, self.dim)

    def scale_parts(self, x: Tensor, factors: Tensor) -> Tensor:
        """Return x with each row multiplied by its own factor; ``factors`` is (rows,)."""
        return from_matrix(factors[:, None] * as_matrix(x, self.dim), x.shape, self.dim)

    def split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return :meth:`split`; with ``orthogonal``, the chosen rows are orthogonalised as well."""
        a, rebuild = self.split(x)
        if not self.orthogonal:
            return a, rebuild
        matrix = as_matrix(x, self.dim)
        return a, lambda w: from_matrix(_turned(matrix[None], w, self.inner, matrix.shape[1])[0], x.shape, self.dim)


@dataclass(frozen=True)
class Channels(Lift):
    """``inner`` of the L2 norms of channels; a channel consists of rows of one or several tensors.

    Rows that leave a network together share a channel: a filter with its bias, its BatchNorm scale and shift and the
    filters that a residual connection ties to it; all rows of an attention head; a neuron's row in each of its layers.
    The rows of every tensor are ``count`` equal runs, one for each channel; in packed tensors (query, key and value in
    one weight), each of ``parts`` equal parts is divided in this way. Tensors of a joint ball share their channels: a
    vertex of ``Channels(KSupport(k), count)`` is non-zero in the same k channels of all tensors.

    ``Channels(inner, rows)`` of a single tensor is ``Rows(inner)``. With ``orthogonal`` the chosen rows of every tensor
    are turned towards orthogonal ones, as under ``Rows``; each tensor keeps its share of each channel.

    Args:
        inner: the vector norm; a ``KSparse`` if ``orthogonal``.
        count: the number of channels.
        dim: the dimension that counts the rows.
        parts: the number of equal parts of a packed tensor.
        orthogonal: whether the oracle orthogonalises the chosen rows.
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
        self.inner.check_length(self.count)
        _check_orthogonal(self.orthogonal, self.inner)

    def size_of(self, shape: Shape) -> int:
        """Return the number of channels; raise ValueError if the rows do not split into them."""
        rows, _ = matrix_shape(shape, self.dim)
        if rows % (self.count * self.parts):
            raise ValueError(f"{self}: {rows} rows do not split into {self.parts} x {self.count} equal runs")
        return self.count

    def joint_size(self, sizes: list[int]) -> int:
        """Return the number of channels, which all tensors share."""
        return self.count

    def combine(self, magnitudes: Sequence[Tensor]) -> Tensor:
        """Return the L2 norms of the channels over all tensors, (channels,)."""
        return magnitudes[0] if len(magnitudes) == 1 else vector_norm(torch.stack(list(magnitudes)), dim=0)

    def spread(self, w: Tensor, magnitudes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each tensor's share of the lengths w, in proportion to its earlier share."""
        return [divide_or_zero(w * a, self.combine(magnitudes)) for a in magnitudes]

    def magnitudes(self, x: Tensor) -> Tensor:
        """Return the L2 norms of the channels in one tensor, (channels,)."""
        return vector_norm(self.runs(x), dim=(0, 2))

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the L2 norms of the channels, (channels,), and a function that gives them other lengths."""
        runs = self.runs(x)  # (parts, channels, entries)
        a = without_vanished(vector_norm(runs, dim=(0, 2)))

        def rebuild(w: Tensor) -> Tensor:
            return from_matrix((divide_or_zero(w, a)[:, None] * runs).flatten(0, 1), x.shape, self.dim)

        return a, rebuild

    def scale_parts(self, x: Tensor, factors: Tensor) -> Tensor:
        """Return x with each channel multiplied by its own factor; ``factors`` is (channels,)."""
        return from_matrix((factors[:, None] * self.runs(x)).flatten(0, 1), x.shape, self.dim)

    def split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return :meth:`split`; with ``orthogonal``, the chosen rows are orthogonalised as well."""
        a, rebuild = self.split(x)
        if not self.orthogonal:
            return a, rebuild
        runs, columns = self.runs(x), matrix_shape(x.shape, self.dim)[1]
        return a, lambda w: from_matrix(_turned(runs, w, self.inner, columns).flatten(0, 1), x.shape, self.dim)

    def runs(self, x: Tensor) -> Tensor:
        """Return the entries of the rows of each channel, (parts, channels, entries)."""
        return as_matrix(x, self.dim).reshape(self.parts, self.count, -1)


@dataclass(frozen=True)
class Spectral(Lift):
    """``inner`` of the singular values of a weight read as a matrix.

    ``Spectral(Lp(1))`` is the nuclear norm, ``Spectral(Lp(inf))`` the operator norm; a vertex of
    ``Spectral(KSupport(k))`` has rank at most k.

    Args:
        inner: the vector norm.
        dim: the dimension that counts the rows, or several that count them together, as under ``Rows``.
        groups: in how many consecutive matrices the rows fall; they are read as one block-diagonal matrix. Grouped
            convolutions have one for each group, ``dim=(0, 1), groups=slices`` reads one for each slice of a tensor
            (slices, rows, columns), and ``groups=3`` separates packed queries, keys and values.
        spatial: read the weight of a 2-d convolution as a matrix with a row for each filter and kernel column, and a
            column for each input channel and kernel row. With rank r the layer is then a k×1 convolution with r
            filters, followed by a 1×k one (Jaderberg et al. 2014); otherwise a k×k one, followed by a 1×1 one.
    """

    dim: RowDims = 0
    groups: int = 1
    spatial: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_row_dims("Spectral", self.dim)
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"Spectral needs an integer groups >= 1, got {self.groups!r}")
        if not isinstance(self.spatial, bool):
            raise ValueError(f"Spectral needs spatial to be True or False, got {self.spatial!r}")
        if self.spatial and len(row_dims(self.dim)) > 1:
            raise ValueError(f"a spatial Spectral needs a single dimension of filters, got dim={self.dim}")

    def size_of(self, shape: Shape) -> int:
        """Return the number of singular values of all groups."""
        rows, columns = self.group_shape(shape)
        return self.groups * min(rows, columns)

    def magnitudes(self, x: Tensor) -> Tensor:
        """Return the singular values, (groups·min(rows, columns),)."""
        if self.inner == Lp(2):
            return x.abs().flatten()  # the Frobenius norm needs no singular values
        values: Tensor = torch.linalg.svdvals(self.matrices(x))
        return values.flatten()

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the singular values, and a function that replaces them by others."""
        if self.inner == Lp(2):
            return self.inner.split(x)
        matrices = self.matrices(x)  # (groups, rows, columns)
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)  # s: (groups, min(rows, columns))
        s = _without_noise(s, matrices)
        u = u * (matrices != 0).any(dim=2, keepdim=True)  # a zero row stays exactly zero

        def rebuild(w: Tensor) -> Tensor:
            return self.from_matrices((u * w.reshape(s.shape)[:, None, :]) @ vh, x)

        return s.flatten(), rebuild

    def split_into_parts(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the singular values, and a function that replaces them by others, also for the L2 norm."""
        matrices = self.matrices(x)
        if matrices.dtype == torch.float64:
            return replace(self, inner=Lp(1)).split(x)
        # The Gram matrix in double precision gives the singular values of a float32 matrix to float32 rounding, in less
        # than half the time.
        wide = matrices.shape[1] <= matrices.shape[2]
        a = (matrices if wide else matrices.mT).double()  # (groups, n, m) with n <= m
        squares, u = torch.linalg.eigh(a @ a.mT)  # (groups, n), (groups, n, n)
        u = u * (a != 0).any(dim=2, keepdim=True)  # a zero row stays exactly zero
        s = _without_noise(squares.clamp_min(0).sqrt(), matrices)

        def rebuild(w: Tensor) -> Tensor:
            factors = divide_or_zero(w.double(), s.flatten()).reshape(s.shape)
            matrix = (u * factors[:, None, :]) @ (u.mT @ a)
            return self.from_matrices((matrix if wide else matrix.mT).to(x.dtype), x)

        return s.flatten().to(x.dtype), rebuild

    @property
    def rank_of_vertices(self) -> int | None:
        """The largest rank of a vertex; None where it is full."""
        return self.inner.parts_of_vertex(())

    def group_shape(self, shape: Shape) -> tuple[int, int]:
        """Return (rows, columns) of the matrix of one group.

        Raises:
            ValueError: a tensor of this shape is not such a matrix, or its rows do not split into the groups.
        """
        if len(shape) < 2:
            raise ValueError(f"{self} needs a matrix or more dimensions, got shape {tuple(shape)}: use a vector norm")
        if self.spatial and len(shape) != 4:
            raise ValueError(f"{self} needs the weight of a 2-d convolution, got shape {tuple(shape)}")
        rows, columns = matrix_shape(shape, self.dim)
        if rows % self.groups:
            raise ValueError(f"{self}: {rows} rows do not split into {self.groups} groups")
        if self.spatial:
            rows, columns = rows * shape[3], columns // shape[3]
        return rows // self.groups, columns

    def matrices(self, x: Tensor) -> Tensor:
        """Return the matrices, (groups, rows, columns)."""
        rows, columns = self.group_shape(x.shape)
        matrix = x.permute(self.spatial_order()).flatten(2) if self.spatial else as_matrix(x, self.dim)
        return matrix.reshape(self.groups, rows, columns)

    def from_matrices(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Return the tensor of the shape of ``like`` with these matrices, (groups, rows, columns)."""
        if not self.spatial:
            return from_matrix(matrices.flatten(0, 1), like.shape, self.dim)
        order = self.spatial_order()
        moved = matrices.reshape([like.shape[d] for d in order])
        return moved.permute([order.index(d) for d in range(4)])

    def spatial_order(self) -> tuple[int, int, int, int]:
        """Return the dimensions of the filters, kernel columns, input channels and kernel rows."""
        (filters,) = row_dims(self.dim)
        return filters, 3, 1 - filters, 2

    @property
    def row_dims(self) -> int:
        """The number of dimensions that count the rows together."""
        return 2 if self.spatial else len(row_dims(self.dim))


@dataclass(frozen=True)
class Blocks(Lift):
    """The L2 norm, over all blocks of ``size`` consecutive entries along ``dim``, of ``inner`` of each block.

    A vertex of ``Blocks(KSupport(n), m)`` has at most n non-zeros in every block of m, the N:M pattern that hardware
    reads along the input channels (dim 1). dual(g) is the L2 norm over blocks of inner.dual, and block b of the
    vertex is inner.lmo(g_b) weighted by inner.dual(g_b)/dual(g).

    Args:
        inner: the vector norm of a block.
        size: the number of entries in a block.
        dim: the dimension along which entries are consecutive.
    """

    size: int
    dim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Blocks needs an integer size >= 1, got {self.size!r}")
        if self.dim < 0:
            raise ValueError(f"Blocks needs dim >= 0, got {self.dim}")
        self.inner.check_length(self.size)

    def size_of(self, shape: Shape) -> int:
        """Return the size of a block; raise ValueError if blocks do not fill the dimension."""
        if len(shape) <= self.dim:
            raise ValueError(f"{self} needs a dimension {self.dim}, got shape {tuple(shape)}")
        if shape[self.dim] % self.size:
            raise ValueError(f"{self}: dimension {self.dim} of shape {tuple(shape)} is not a multiple of {self.size}")
        return self.size

    def joint_size(self, sizes: list[int]) -> int:
        """Return the size of a block, which does not depend on the number of tensors."""
        return self.size

    def parts_of_vertex(self, shape: Shape | Sequence[Shape]) -> int | None:
        """Return the largest number of non-zero entries in all blocks of a vertex together."""
        in_block = self.inner.parts_of_vertex(shape)
        return None if in_block is None else in_block * (sum(map(math.prod, shapes_of(shape))) // self.size)

    def magnitudes(self, x: Tensor) -> Tensor:
        """Return abs(x) by blocks, (blocks, size)."""
        return x.movedim(self.dim, -1).abs().reshape(-1, self.size)

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return abs(x) by blocks, (blocks, size), and a function that gives other magnitudes the signs of x."""
        moved = x.movedim(self.dim, -1)  # (…, entries along dim)
        signs = moved.sign()
        return moved.abs().reshape(-1, self.size), lambda w: (signs * w.reshape(moved.shape)).movedim(-1, self.dim)

    def norm_of(self, a: Tensor) -> Tensor:
        """Return the L2 norm over blocks of the vector norm."""
        return long_norm(self.inner.norm_of(a), 2)

    def dual_of(self, a: Tensor) -> Tensor:
        """Return the L2 norm over blocks of the vector norm's dual."""
        return long_norm(self.inner.dual_of(a), 2)

    def align(self, a: Tensor) -> Tensor:
        """Return the vertex of each block, in proportion to its dual norm."""
        weights = Lp(2).align(self.inner.dual_of(a))  # (blocks,)
        return weights[:, None] * self.inner.align(a)

    def nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        """Return the projection for ``KSupport``."""
        if isinstance(self.inner, KSupport):
            return project_ksupport(a, self.inner.k, radius)
        return Norm.nearest(self, a, radius)


def _without_noise(s: Tensor, matrices: Tensor) -> Tensor:
    """Return singular values, with 0 for rounding noise, whose singular vectors would write into zero rows.

    Args:
        s: (groups, n).
        matrices: (groups, rows, columns), whose singular values they are.
    """
    noise = s.amax(dim=1, keepdim=True) * max(matrices.shape[1:]) * torch.finfo(matrices.dtype).eps
    return torch.where(s <= noise, 0, s)


# --- orthogonal rows --------------------------------------------------------------------------------------------------


def _check_orthogonal(orthogonal: bool, inner: VectorNorm) -> None:
    if not isinstance(orthogonal, bool):
        raise ValueError(f"orthogonal must be True or False, got {orthogonal!r}")
    if orthogonal and not isinstance(inner, KSparse):
        raise ValueError(f"orthogonal rows have equal lengths, as in a vertex of KSparse(k); got {inner!r}")


def _turned(runs: Tensor, w: Tensor, inner: VectorNorm, columns: int) -> Tensor:
    """Return channels with the lengths w, along the polar factor of the rows whose w is positive.

    Args:
        runs: (parts, channels, entries), the entries of each channel's rows.
        w: (channels,), at most ``inner.k`` of them positive.
        inner: a ``KSparse``.
        columns: the number of entries in a row.

    Returns:
        A tensor of the shape of ``runs``.
    """
    assert isinstance(inner, KSparse)
    chosen = w.topk(min(inner.k, len(w))).indices  # (k,); a tensor of a joint ball may have fewer rows
    # If fewer than k channels are positive, topk picks others too: zero their rows.
    rows = runs[:, chosen] * (w[chosen] > 0)[:, None]  # (parts, k, entries)
    turned = polar(rows.reshape(1, -1, columns)).reshape(rows.shape)
    # The polar iteration is only approximate; setting the lengths exactly keeps the result in the ball.
    lengths = without_vanished(vector_norm(turned, dim=(0, 2)))
    factors = torch.where(lengths == 0, 0, divide_or_zero(w[chosen], lengths))
    return torch.zeros_like(runs).index_copy(1, chosen, factors[:, None] * turned)
