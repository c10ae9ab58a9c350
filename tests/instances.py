"""The norms that every property is checked on: all vector norms under all lifts, on shapes that each can hold."""

import math
from collections.abc import Callable
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm
from pliant.norms.shapes import row_dims

Shape = tuple[int, ...]
Lift = Callable[[VectorNorm], Norm]

VECTOR_NORMS = [Lp(1), Lp(1.5), Lp(2), Lp(3), Lp(math.inf), KSparse(1), KSparse(3), KSupport(1), KSupport(3)]


def entries(inner: VectorNorm) -> Norm:
    """No lift: the vector norm itself."""
    return inner


blocks_of_4 = partial(Blocks, size=4)

# (lift, shape, number of magnitudes that the vector norm sees: what k can be at most)
LIFTED_SHAPES: list[tuple[Lift, Shape, int]] = [
    (entries, (7,), 7),
    (entries, (1, 5), 5),
    (entries, (5, 1), 5),
    (entries, (4, 3, 2, 2), 48),
    (Rows, (5,), 5),
    (Rows, (1, 4), 1),
    (Rows, (6, 1), 6),
    (Rows, (4, 3, 2, 2), 4),
    (partial(Rows, dim=1), (2, 4), 4),
    (partial(Rows, dim=1), (3, 5, 2, 1), 5),
    (partial(Rows, dim=(0, 1)), (2, 3, 4), 6),
    (Spectral, (1, 6), 1),
    (Spectral, (6, 1), 1),
    (Spectral, (4, 6), 4),
    (Spectral, (5, 3, 2, 2), 5),
    (partial(Spectral, dim=1), (3, 4, 2, 2), 4),
    (partial(Spectral, groups=2), (8, 3, 2, 1), 8),
    (partial(Spectral, dim=(0, 2), groups=2), (2, 4, 3), 6),
    (partial(Spectral, spatial=True), (2, 4, 2, 3), 6),
    (partial(Spectral, dim=1, groups=2, spatial=True), (3, 4, 1, 2), 6),
    (blocks_of_4, (1, 8), 4),
    (blocks_of_4, (3, 8), 4),
    (blocks_of_4, (2, 4, 3, 1), 4),
    (partial(blocks_of_4, dim=0), (8, 1), 4),
    (partial(blocks_of_4, dim=0), (8, 3), 4),
]

INSTANCES: list[tuple[Norm, Shape]] = [
    (lift(inner), shape)
    for lift, shape, magnitudes in LIFTED_SHAPES
    for inner in VECTOR_NORMS
    if (inner.k or 1) <= magnitudes
]


def gaussian(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal entries: no ties, no zeros, full rank; the same numbers in every dtype, up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unfolded(norm: Spectral, x: Tensor) -> Tensor:
    """Return the matrices (groups, rows, columns) whose singular values a spectral norm sees."""
    dims = row_dims(norm.dim)
    moved = x.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
    if norm.spatial:
        filters, channels, height, width = moved.shape
        moved = moved.movedim(3, 1).reshape(filters * width, channels * height)
    return moved.reshape(norm.groups, len(moved) // norm.groups, -1)


def folded(norm: Spectral, matrices: Tensor, shape: Shape) -> Tensor:
    """Return the tensor of this shape that :func:`unfolded` takes to the matrices."""
    order = unfolded(norm, torch.arange(math.prod(shape)).reshape(shape)).flatten()
    flat = torch.empty_like(matrices).flatten()
    flat[order] = matrices.flatten()
    return flat.reshape(shape)


# Twelve small integers repeat through a tensor: full of ties and zeros, and its matrices have low rank.
few_integers = st.lists(st.integers(-2, 2), min_size=12, max_size=12)


def tiled(values: list[int], shape: Shape) -> Tensor:
    repeats = -(-math.prod(shape) // len(values))
    return torch.tensor(values, dtype=torch.float64).repeat(repeats)[: math.prod(shape)].reshape(shape)


# The same values in other orders in memory; the identity where a tensor has no such order.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "transposed": lambda x: x if x.ndim < 2 else x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
}
