"""How norms read tensors: as matrices with one row per output, divided by a power of two, one or several at a time.

**Row = filter.** A weight is read as a matrix with one row per output: ``x.movedim(dim, 0).flatten(1)``. Where one
tensor holds many matrices, such as those of the experts of a mixture, several dimensions count the rows together: with
``dim=(0, 1)``, a tensor of shape (experts, rows, columns) has experts·rows rows. A 1-D tensor of n entries is n×1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.linalg import accumulation_dtype, power_of_two_scale

Tensors = Tensor | Sequence[Tensor]
Shape = Sequence[int]
Rebuild = Callable[[Tensor], Tensor]
RowDims = int | tuple[int, ...]
"""The dimension that counts the rows of a matrix, or those that count them together, the slowest first."""


def scaled(x: Tensors) -> tuple[list[Tensor], Tensor]:
    """Divide tensors by one power of two near their largest entry; half precision becomes float32.

    Returns:
        The divided tensors, and the power of two, a scalar tensor.

    Raises:
        ValueError: there is no tensor, or one is sparse, empty or not real floating-point.
    """
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


def tolerance(x: Tensors) -> float:
    """Return the relative error of a norm that counts as rounding: of points inside a ball, and of their combinations.

    A norm of many entries in float32 or float64 gathers the rounding of each step; half precision is coarse enough.
    """
    tensors = [x] if isinstance(x, Tensor) else x
    return max((32 if t.dtype == accumulation_dtype(t) else 4) * torch.finfo(t.dtype).eps for t in tensors)


def without_vanished(a: Tensor) -> Tensor:
    """Return row norms, with 0 for the tiniest: their squares underflow, so dividing by them would leave the ball."""
    return a.masked_fill(a < 8 * torch.finfo(a.dtype).tiny ** 0.5, 0)


def shapes_of(shape: Shape | Sequence[Shape]) -> list[Shape]:
    """Return a list of shapes, given one or several."""
    if len(shape) == 0 or isinstance(shape[0], int):
        return [shape]  # type: ignore[list-item]
    return list(shape)  # type: ignore[arg-type]


def row_dims(dim: RowDims) -> tuple[int, ...]:
    """Return the dimensions that count the rows."""
    return (dim,) if isinstance(dim, int) else dim


def check_row_dims(norm: str, dim: RowDims) -> None:
    """Raise ValueError unless ``dim`` is a dimension >= 0, or a tuple of different ones."""
    dims = row_dims(dim) if isinstance(dim, int | tuple) else ()
    whole = all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in dims)
    if not dims or not whole or len(set(dims)) < len(dims):
        raise ValueError(f"{norm} needs dim to be a dimension >= 0 or a tuple of different ones, got {dim!r}")


def matrix_shape(shape: Shape, dim: RowDims) -> tuple[int, int]:
    """Return (rows, columns) of a tensor of this shape read as a matrix.

    Raises:
        ValueError: the shape has no dimension ``dim``.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    dims = row_dims(dim)
    if not all(0 <= d < len(shape) for d in dims):
        named = "dimension" if len(dims) == 1 else "dimensions"
        raise ValueError(
            f"rows are counted by {named} {', '.join(map(str, dims))}, but the tensor has shape {tuple(shape)}"
        )
    rows = math.prod(shape[d] for d in dims)
    return rows, math.prod(shape) // rows


def as_matrix(x: Tensor, dim: RowDims) -> Tensor:
    """Return a tensor as a matrix (rows, columns)."""
    if x.ndim < 2:
        return x.reshape(-1, 1)
    dims = row_dims(dim)
    moved = x.movedim(dims, tuple(range(len(dims))))
    return moved.reshape(matrix_shape(x.shape, dim)) if len(dims) > 1 else moved.flatten(1)


def from_matrix(matrix: Tensor, shape: Shape, dim: RowDims) -> Tensor:
    """Return the tensor of this shape whose matrix is ``matrix``, (rows, columns); the inverse of :func:`as_matrix`."""
    if len(shape) < 2:
        return matrix.reshape(tuple(shape))
    dims = row_dims(dim)
    moved = [shape[d] for d in dims] + [n for i, n in enumerate(shape) if i not in dims]
    return matrix.reshape(moved).movedim(tuple(range(len(dims))), dims)
