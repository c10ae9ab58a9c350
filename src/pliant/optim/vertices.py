"""The oracles as an optimizer asks them, step after step: the vertices of ``Norm.lmo`` for less time and memory.

``norms.py`` says what a vertex is. Here are the shorter ways to it, each tested against ``Norm.lmo``:

* :func:`unit_vertices`: exact vertices, of one ball at a time in memory that exists already, or of many small balls of
  one kind in one batch; the large ones among polar factors (``Spectral``, full rank) to about one in a thousand.
* :func:`leading_vertices`: vertices of a ``Spectral`` ball whose singular directions are kept from the last step. They
  are approximate, and in the unit ball all the same: an inexact direction costs optimality, never feasibility.

A *stack* below is a tensor (L, *shape): L tensors of one shape, each with a ball of its own. A ball over several
tensors jointly has a list of J stacks with L = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pliant.linalg import (
    common_dtype,
    divide_or_zero,
    keep_largest,
    keep_n_of_m,
    leading_directions,
    long_norm,
    polar,
    power_of_two_below,
    readable,
    starting_directions,
    vector_norm,
)
from pliant.norms.lifts import Blocks, Channels, KSparse, KSupport, Lp, Norm, Rows, Shape, Spectral, without_vanished

MANY = 32  # from this many singular directions on, products that find a polar factor cost less than a decomposition
SMALL = 16  # up to this many rows or columns a full decomposition costs no more than an iteration
AT_FIRST = 2  # iterations more where nothing is known of the directions
LEAST = 1e-3  # the length, relative to the mean, that a part of the weights counts at least: so what is 0 can come back
SAFE = 2.0**40  # squares of numbers between 1/SAFE and SAFE, and their sums, neither overflow nor vanish in float32


class Vertex(NamedTuple):
    """The vertex −factor·carrier: scaled where it is used, so that scaling needs no pass over memory of its own."""

    carrier: Tensor  # (L, *shape)
    factor: Tensor  # broadcasts with the carrier


def well_scaled(stacks: Sequence[Tensor], row_dim: int | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the L2 norms of the members, stacks whose entries can be squared without loss, and the norms of those.

    Each member is divided by a power of two near its largest entry. Where a look at the norms shows that nothing can
    overflow or vanish, the stacks are returned as they are. Half precision becomes float32, mixed ones the widest.

    Args:
        stacks: J tensors (L, *shape).
        row_dim: the dimension of ``shape`` that counts rows, if the norms of single rows are wanted.

    Returns:
        The norm over all J stacks of each member, (L,); the stacks; and for each one its norms, (L, rows, 1, …, 1), or
        (L, 1, …, 1) without ``row_dim``.
    """
    dtype = common_dtype(stacks)
    stacks = [x.to(dtype) for x in stacks]
    norms, parts = _norms(stacks, row_dim)
    if all(readable(x) for x in stacks) and all(1 / SAFE < value < SAFE for value in norms.tolist()):
        return norms, stacks, parts
    largest = torch.stack([x.flatten(1).abs().amax(dim=1) if x.ndim > 1 else x.abs() for x in stacks]).amax(dim=0)
    scale = power_of_two_below(largest)
    stacks = [x / along(scale, x) for x in stacks]
    norms, parts = _norms(stacks, row_dim)
    return scale * norms, stacks, parts


def _norms(stacks: list[Tensor], row_dim: int | None) -> tuple[Tensor, list[Tensor]]:
    parts = []
    for x in stacks:
        # Rows first, also of the whole: the rounding of a long sum in float32 would show.
        rows = 1 if row_dim is None else row_dim + 1
        others = tuple(d for d in range(1, x.ndim) if d != rows)
        part = vector_norm(x, dim=others, keepdim=True) if others else x.abs()
        if row_dim is None and x.ndim > 1:
            part = along(long_norm(part.flatten(1), 2), x)
        parts.append(part)
    if row_dim is None and len(parts) == 1:
        return parts[0].view(-1), parts
    return vector_norm(torch.cat([part.view(len(part), -1) for part in parts], dim=1), dim=1), parts


def unit_vertices(
    norm: Norm, stacks: Sequence[Tensor], memory: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Vertex]]:
    """Return the L2 norms of directions, (L,), and the vertices of the unit balls for them.

    They are exact, but for polar factors of :data:`MANY` directions or more: inside the ball, and nearly the best.

    Args:
        norm: of the balls.
        stacks: directions, one stack (L, *shape), or J stacks with L = 1 for a joint ball.
        memory: for carriers where L = 1, shaped as the stacks.
    """
    row_dim = None
    if isinstance(norm, Rows) and not norm.orthogonal and all(x.ndim > 2 for x in stacks):
        row_dim = norm.dim
    lengths, stacks, parts = well_scaled(stacks, row_dim)
    if isinstance(norm, Spectral) and _asks_for_polar_factors(norm, [x.shape[1:] for x in stacks]):
        return lengths, [Vertex(_polar_factors(x, norm), torch.ones_like(lengths[:1])) for x in stacks]
    if len(lengths) > 1:
        batched: Tensor = torch.vmap(norm.lmo)(stacks[0])
        return lengths, [Vertex(batched, -torch.ones_like(lengths[:1]))]
    memory = [torch.empty_like(x) for x in stacks] if memory is None else memory
    count = norm.length([x.shape[1:] for x in stacks])
    match norm:
        case Lp(p) | Spectral(Lp(p)) if p == 2:
            return lengths, _on_the_sphere(stacks, parts)
        case Spectral(KSupport(k)) if k == count:  # the Frobenius norm, too
            return lengths, _on_the_sphere(stacks, parts)
        case Lp(p) if p == math.inf:
            signs = [torch.sign(x, out=out) for x, out in zip(stacks, memory, strict=True)]
            return lengths, [Vertex(sign, torch.ones_like(lengths)) for sign in signs]
        case KSparse(k):
            keep_largest(stacks, k, memory)
            return lengths, [Vertex(out.sign_(), torch.ones_like(lengths)) for out in memory]
        case KSupport(k):
            keep_largest(stacks, k, memory)
            return lengths, _on_the_sphere(memory)
        case Rows(inner) if row_dim is not None:
            a = without_vanished(torch.cat([part.flatten() for part in parts]))
            factors = divide_or_zero(inner._align(a), a).split([part.numel() for part in parts])
            return lengths, [Vertex(x, f.view_as(part)) for x, f, part in zip(stacks, factors, parts, strict=True)]
        case Blocks(KSupport(n), size, dim):
            for x, out in zip(stacks, memory, strict=True):
                keep_n_of_m(x, n, size, dim + 1, out)
            return lengths, _on_the_sphere(memory)
    return lengths, [Vertex(v[None], -torch.ones_like(lengths)) for v in norm.lmo([x[0] for x in stacks])]


def persistent(
    norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
) -> list[Tensor]:
    """Return directions whose rows or channels are multiplied by a power of how long they are in the weights.

    The vertex for these has the parts with the largest ‖mᵢ‖·‖θᵢ‖^persistence: of those that the loss asks for, rather
    the ones that there are. Lengths are relative to the mean over the ball, and at least :data:`LEAST`.

    Args:
        norm: of the balls.
        directions: one stack (L, *shape), or J stacks with L = 1 for a joint ball.
        weights: shaped as the directions.
        persistence: the exponent.
    """
    if len(directions) == 1:

        def single(direction: Tensor, weight: Tensor) -> Tensor:
            return norm._times(direction, powers(norm._magnitudes(weight), persistence))

        return [torch.vmap(single)(directions[0], weights[0].to(directions[0].dtype))]
    magnitudes = [norm._magnitudes(w[0].to(d.dtype)) for w, d in zip(weights, directions, strict=True)]
    factors = powers(norm._combine(magnitudes), persistence)
    own = [factors] * len(magnitudes) if isinstance(norm, Channels) else factors.split([len(a) for a in magnitudes])
    return [norm._times(d[0], f)[None] for d, f in zip(directions, own, strict=True)]


def powers(lengths: Tensor, exponent: float) -> Tensor:
    """Return powers of lengths (n,) relative to their mean; of those that are all 0, 1."""
    mean = lengths.mean()
    relative = torch.where(mean == 0, 1, divide_or_zero(lengths, mean))
    return relative.clamp_min(LEAST) ** exponent


def _asks_for_polar_factors(norm: Spectral, shapes: Sequence[Shape]) -> bool:
    """Tell whether a vertex has all singular values 1, and some matrix is too large to be decomposed in each step."""
    full = norm.inner == Lp(math.inf) or norm.inner == KSparse(norm.length(shapes))
    return full and any(min(norm._block_shape(shape)) >= MANY for shape in shapes)


def _polar_factors(stack: Tensor, norm: Spectral) -> Tensor:
    out = torch.empty_like(stack)
    rows_first = _rows_first(out, norm)
    turned = [polar(matrix, inside=True) for matrix in _matrices(stack, norm)]
    rows_first.copy_(torch.cat(turned, dim=1).view(rows_first.shape))
    return out


def _on_the_sphere(stacks: Sequence[Tensor], parts: list[Tensor] | None = None) -> list[Vertex]:
    length = vector_norm(torch.cat([part.view(1) for part in parts or _norms(list(stacks), None)[1]]))
    factor = torch.where(length == 0, 0, 1 / length)
    return [Vertex(x, factor) for x in stacks]


# --- spectral balls ---------------------------------------------------------------------------------------------------


def keeps_directions(norm: Spectral, shapes: Sequence[Shape]) -> bool:
    """Tell whether :func:`leading_vertices` serves a ball over these shapes; else :func:`unit_vertices` does.

    It is for balls with vertices of low rank, if some matrix is large enough to be worth it.
    """
    rank = rank_of_vertices(norm)
    large = any(min(norm._block_shape(shape)) > SMALL for shape in shapes)
    return rank is not None and large and rank != norm.length(shapes)


def leading_vertices(
    norm: Spectral,
    stacks: Sequence[Tensor],
    basis: Tensor | None,
    iterations: int,
    memory: Sequence[Tensor] | None = None,
) -> tuple[list[Vertex], Tensor, Tensor]:
    """Return vertices of the unit balls for well-scaled directions, without a singular value decomposition of them.

    Args:
        norm: with vertices of low rank, see :func:`keeps_directions`.
        stacks: one stack (L, *shape), or J stacks with L = 1 for a joint ball.
        basis: what the last call returned, perhaps for another rank; None: start anew, with a few more iterations.
        iterations: of block power iteration.
        memory: for carriers where L = 1, shaped as the stacks.

    Returns:
        The vertices; the basis for the next call, (L, all columns, directions); and −⟨direction, vertex⟩ per member
        (L,), which is at most the dual norm and tells how good the vertex is.
    """
    rank = rank_of_vertices(norm)
    assert rank is not None, f"{norm} has vertices of full rank"
    memory = [torch.empty_like(x) for x in stacks] if memory is None else memory
    blocks = [block for x in stacks for block in _matrices(x, norm)]
    # The left directions, which QR makes orthonormal, are those of the smaller side.
    upright = [a.shape[1] > a.shape[2] for a in blocks]
    blocks = [a.mT if up else a for a, up in zip(blocks, upright, strict=True)]
    columns = [a.shape[2] for a in blocks]
    if basis is None or basis.shape[1] != sum(columns):
        start, iterations = starting_directions(blocks, rank), iterations + AT_FIRST
    else:
        kept = basis.to(blocks[0].dtype).split(columns, dim=1)
        start = resized(kept, rank, lambda count: starting_directions(blocks, count))
    left, right, start = leading_directions(blocks, start, iterations)
    if isinstance(norm.inner, KSparse):
        left, right, value = _equal_lengths(left, right)
        factor = torch.ones_like(value)
    else:
        # Any basis will do: left·rightᵀ/‖right‖ has rank k and Frobenius norm 1.
        value = _norms(right, None)[0]
        factor = torch.where(value == 0, 0, 1 / value)
    factors = [(z, u) if up else (u, z) for u, z, up in zip(left, right, upright, strict=True)]
    for index, out in enumerate(memory):
        _write_products(factors[index * norm.groups : (index + 1) * norm.groups], norm, out)
    vertices = [Vertex(out, along(factor, out)) for out in memory]
    return vertices, start[0] if len(start) == 1 else torch.cat(start, dim=1), value


def _equal_lengths(left: list[Tensor], right: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Turn left·rightᵀ into its polar factor: the vertex of the k-sparse norm gives each direction the same weight."""
    if right[0].shape[2] >= MANY:
        whole = torch.cat(right, dim=1)
        turned = polar(whole, inside=True)
        return left, list(turned.split([z.shape[1] for z in right], dim=1)), (turned * whole).sum(dim=(1, 2))
    u, s, vh = torch.linalg.svd(torch.cat(right, dim=1), full_matrices=False)
    real = s > s[:, :1] * u.shape[1] * torch.finfo(s.dtype).eps
    rotated = (u * real[:, None, :]).split([z.shape[1] for z in right], dim=1)
    return [x @ vh.mT for x in left], list(rotated), s.sum(dim=1)


def resized(kept: Sequence[Tensor], count: int, start: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """Return so many directions: the leading ones of those kept, or all and as many as are missing of new ones."""
    missing = count - kept[0].shape[2]
    if missing <= 0:
        return [z[:, :, :count] for z in kept]
    return [torch.cat([z, new], dim=2) for z, new in zip(kept, start(missing), strict=True)]


def rank_of_vertices(norm: Spectral) -> int | None:
    """Return the largest rank of a vertex, None where it is full."""
    match norm.inner:
        case KSupport(k) | KSparse(k):
            return k
        case Lp(p) if p == 1:
            return 1
    return None


def _matrices(stack: Tensor, norm: Spectral) -> list[Tensor]:
    """Return the stack as matrices (L, rows, columns), one for each group of rows."""
    rows_first = _rows_first(stack, norm)
    matrix = (rows_first.flatten(1, 2) if norm.spatial else rows_first).flatten(2)
    return list(matrix.chunk(norm.groups, dim=1))


def _write_products(factors: list[tuple[Tensor, Tensor]], norm: Spectral, out: Tensor) -> None:
    """Write first·secondᵀ of each group to its rows of ``out``."""
    rows_first = _rows_first(out, norm)
    if norm.spatial:
        products = torch.cat([first @ second.mT for first, second in factors], dim=1)
        rows_first.copy_(products.view(rows_first.shape))
        return
    matrix = rows_first.flatten(2)
    for (first, second), place in zip(factors, matrix.chunk(norm.groups, dim=1), strict=True):
        torch.matmul(first, second.mT, out=place)
    if rows_first.ndim > 3 and rows_first.stride(1) != max(rows_first.stride()[1:]):
        rows_first.copy_(matrix.view(rows_first.shape))  # columns with rows between them: flatten made a copy


def _rows_first(stack: Tensor, norm: Spectral) -> Tensor:
    """Return the view (L, rows, …) with the other dimensions in the order of memory.

    Any order of the columns has the same singular values and left directions; this one needs no copy. Of a spatial
    matrix the view is (L, filters, kernel columns, channels, kernel rows).
    """
    if norm.spatial:
        return stack.permute(0, *(d + 1 for d in norm._spatial_order()))
    strides = stack.stride()
    others = sorted((d for d in range(1, stack.ndim) if d != norm.dim + 1), key=lambda d: (-strides[d], d))
    return stack.permute(0, norm.dim + 1, *others)


def along(values: Tensor, stack: Tensor) -> Tensor:
    """Return (L,) as (L, 1, …, 1), to be multiplied with a stack."""
    return values.view(-1, *(1 for _ in range(stack.ndim - 1)))
