"""How norms read tensors: as matrices with one row per output, divided by a power of two, one or several at a time.

**Row = filter.** A weight is read as a matrix with one row per output: ``x.movedim(dim, 0).flatten(1)``. A 1-D tensor
of n entries is n×1.
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


def matrix_shape(shape: Shape, dim: int) -> tuple[int, int]:
    """Return (rows, columns) of a tensor of this shape read as a matrix.

    Raises:
        ValueError: the shape has no dimension ``dim``.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    if not 0 <= dim < len(shape):
        raise ValueError(f"rows are counted by dimension {dim}, but the tensor has shape {tuple(shape)}")
    return shape[dim], math.prod(shape) // shape[dim]


def as_matrix(x: Tensor, dim: int) -> Tensor:
    """Return a tensor as a matrix (rows, columns)."""
    return x.reshape(-1, 1) if x.ndim < 2 else x.movedim(dim, 0).flatten(1)


def from_matrix(matrix: Tensor, shape: Shape, dim: int) -> Tensor:
    """Return the tensor of this shape whose matrix is ``matrix``, (rows, columns); the inverse of :func:`as_matrix`."""
    if len(shape) < 2:
        return matrix.reshape(tuple(shape))
    moved = [shape[dim], *(n for i, n in enumerate(shape) if i != dim)]
    return matrix.reshape(moved).movedim(0, dim)
