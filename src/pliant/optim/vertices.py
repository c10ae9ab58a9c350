"""The linear minimisation oracle as an optimizer needs it in every step: ``Norm.lmo`` in less time and memory.

The norms define what a vertex is. Here are shorter ways to compute it, each tested against ``Norm.lmo``:

* :func:`unit_vertices`: exact vertices, of one ball in memory that exists already, or of many small balls of one kind
  in one batch; large polar factors (``Spectral``, full rank) are accurate to about one in a thousand.
* ``kept_directions``: vertices of a ``Spectral`` ball whose singular directions are kept from the last step.

A *stack* is a tensor (L, *shape): L tensors of one shape, its *members*, each with a ball of its own. A joint ball over
J tensors has a list of J stacks with L = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pliant.linalg import (
    common_dtype,
    divide_or_zero,
    keep_largest,
    keep_n_of_m,
    long_norm,
    polar,
    power_of_two_below,
    readable,
    vector_norm,
)
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, Rows, Shape, Spectral
from pliant.norms.shapes import row_dims, without_vanished

MANY = 32  # from this many singular directions on, finding a polar factor by products costs less than a decomposition
SMALL = 16  # up to this many rows or columns a full decomposition costs no more than an iteration
LEAST = 1e-3  # the smallest length, relative to the mean, that a part of the weights counts with: 0 could never recover
SAFE = 2.0**40  # squares of numbers between 1/SAFE and SAFE, and their sums, neither overflow nor vanish in float32


class Vertex(NamedTuple):
    """The vertex −factor·carrier; the step multiplies by the factor, which saves a pass over memory here.

    Args:
        carrier: (L, *shape).
        factor: of a shape that broadcasts with the carrier.
    """

    carrier: Tensor
    factor: Tensor


def well_scaled(stacks: Sequence[Tensor], row_dim: int | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scale the members of stacks so that their entries can be squared without loss, and return their L2 norms.

    Each member is divided by a power of two near its largest entry. If the norms show that nothing can overflow or
    vanish, the entries are returned unchanged. Half precision becomes float32, mixed dtypes the widest of them.

    Args:
        stacks: J tensors (L, *shape).
        row_dim: the dimension of ``shape`` that counts rows, if the norms of single rows are wanted.

    Returns:
        The norm of each member before scaling, over all J stacks, (L,); the J scaled stacks; and for each scaled stack
        the norms of its rows, (L, rows, 1, …, 1), or of its members, (L, 1, …, 1), without ``row_dim``.
    """
    dtype = common_dtype(stacks)
    stacks = [x.to(dtype) for x in stacks]
    norms, parts = l2_norms(stacks, row_dim)
    if all(readable(x) for x in stacks) and all(1 / SAFE < value < SAFE for value in norms.tolist()):
        return norms, stacks, parts
    largest = torch.stack([x.flatten(1).abs().amax(dim=1) if x.ndim > 1 else x.abs() for x in stacks]).amax(dim=0)
    scale = power_of_two_below(largest)
    stacks = [x / along(scale, x) for x in stacks]
    norms, parts = l2_norms(stacks, row_dim)
    return scale * norms, stacks, parts


def l2_norms(stacks: list[Tensor], row_dim: int | None) -> tuple[Tensor, list[Tensor]]:
    """Return the L2 norms of the members over all stacks, (L,), and for each stack the norms of its rows or members.

    Args:
        stacks: J tensors (L, *shape).
        row_dim: the dimension of ``shape`` that counts rows; None for the norms of whole members.

    Returns:
        See :func:`well_scaled`.
    """
    parts = []
    for x in stacks:
        # Sum by rows first, even for the norm of the whole: one long sum in float32 loses digits.
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
    norm: Norm, stacks: Sequence[Tensor], memory: Sequence[Tensor] | None = None, *, exact: bool = False
) -> tuple[Tensor, list[Vertex]]:
    """Return the L2 norms of directions, and the vertices of the unit balls that minimise ⟨direction, ·⟩.

    The vertices are exact, except polar factors of :data:`MANY` directions or more, unless ``exact``: these are inside
    the ball, and nearly optimal for singular values that are not far apart (:func:`pliant.linalg.polar`).

    Args:
        norm: the norm of the balls.
        stacks: directions, one stack (L, *shape), or J stacks with L = 1 for a joint ball.
        memory: tensors of the shapes of the stacks, which the carriers are written to if L = 1; None: new memory.
        exact: decompose matrices of any size.

    Returns:
        The norms, (L,), and a vertex for each stack.
    """
    row_dim = None
    if isinstance(norm, Rows) and not norm.orthogonal and all(x.ndim > 2 for x in stacks):
        row_dim = norm.dim if isinstance(norm.dim, int) else None
    lengths, stacks, parts = well_scaled(stacks, row_dim)
    if isinstance(norm, Spectral) and not exact and _asks_for_polar_factors(norm, [x.shape[1:] for x in stacks]):
        return lengths, [Vertex(_polar_factors(x, norm), torch.ones_like(lengths[:1])) for x in stacks]
    if len(lengths) > 1:
        batched: Tensor = torch.vmap(norm.lmo)(stacks[0])
        return lengths, [Vertex(batched, -torch.ones_like(lengths[:1]))]
    memory = [torch.empty_like(x) for x in stacks] if memory is None else memory
    count = norm.length([x.shape[1:] for x in stacks])
    match norm:
        case Lp(p) | Spectral(Lp(p)) if p == 2:
            return lengths, on_the_sphere(stacks, parts)
        case Spectral(KSupport(k)) if k == count:  # the Frobenius norm as well
            return lengths, on_the_sphere(stacks, parts)
        case Lp(p) if p == math.inf:
            signs = [torch.sign(x, out=out) for x, out in zip(stacks, memory, strict=True)]
            return lengths, [Vertex(sign, torch.ones_like(lengths)) for sign in signs]
        case KSparse(k):
            keep_largest(stacks, k, memory)
            return lengths, [Vertex(out.sign_(), torch.ones_like(lengths)) for out in memory]
        case KSupport(k):
            keep_largest(stacks, k, memory)
            return lengths, on_the_sphere(memory)
        case Rows(inner) if row_dim is not None:
            a = without_vanished(torch.cat([part.flatten() for part in parts]))  # (rows of all J tensors,)
            factors = divide_or_zero(inner.align(a), a).split([part.numel() for part in parts])
            return lengths, [Vertex(x, f.view_as(part)) for x, f, part in zip(stacks, factors, parts, strict=True)]
        case Blocks(KSupport(n), size, dim):
            for x, out in zip(stacks, memory, strict=True):
                keep_n_of_m(x, n, size, dim + 1, out)
            return lengths, on_the_sphere(memory)
    return lengths, [Vertex(v[None], -torch.ones_like(lengths)) for v in norm.lmo([x[0] for x in stacks])]


def persistent(
    norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
) -> list[Tensor]:
    """Return directions whose rows or channels are multiplied by a power of their lengths in the weights.

    The vertex for the result has the parts with the largest ‖mᵢ‖·‖θᵢ‖^persistence: among the parts that the loss asks
    for, it prefers those that are already long. Lengths are relative to the mean over the ball, and at least
    :data:`LEAST`.

    Args:
        norm: the norm of the balls.
        directions: one stack (L, *shape), or J stacks with L = 1 for a joint ball.
        weights: of the shapes of the directions.
        persistence: the exponent.

    Returns:
        Stacks of the shapes of the directions.
    """
    if len(directions) == 1:

        def single(direction: Tensor, weight: Tensor) -> Tensor:
            return norm.scale_parts(direction, powers(norm.magnitudes(weight), persistence))

        return [torch.vmap(single)(directions[0], weights[0].to(directions[0].dtype))]
    magnitudes = [norm.magnitudes(w[0].to(d.dtype)) for w, d in zip(weights, directions, strict=True)]
    factors = powers(norm.combine(magnitudes), persistence)
    own = [factors] * len(magnitudes) if isinstance(norm, Channels) else factors.split([len(a) for a in magnitudes])
    return [norm.scale_parts(d[0], f)[None] for d, f in zip(directions, own, strict=True)]


def powers(lengths: Tensor, exponent: float) -> Tensor:
    """Return powers, (n,), of lengths (n,) relative to their mean; 1 if all lengths are 0."""
    mean = lengths.mean()
    relative = torch.where(mean == 0, 1, divide_or_zero(lengths, mean))
    return relative.clamp_min(LEAST) ** exponent


def _asks_for_polar_factors(norm: Spectral, shapes: Sequence[Shape]) -> bool:
    """Return whether all singular values of a vertex are 1, and a matrix is too large to decompose in every step."""
    full = norm.inner == Lp(math.inf) or norm.inner == KSparse(norm.length(shapes))
    return full and any(min(norm.group_shape(shape)) >= MANY for shape in shapes)


def decomposes(norm: Norm, shapes: Sequence[Shape], *, exact: bool = False) -> bool:
    """Return whether vertices of a ball over these shapes are found by a decomposition of torch.

    On CUDA it waits for the device; anywhere it fails on NaN and infinite entries.
    """
    if not isinstance(norm, Spectral) or norm.inner == Lp(2) or norm.inner == KSupport(norm.length(shapes)):
        return False
    if exact:
        return True
    if _asks_for_polar_factors(norm, shapes):
        return False
    large = any(min(norm.group_shape(shape)) > SMALL for shape in shapes)
    if large and (isinstance(norm.inner, KSupport) or norm.inner == Lp(1)):
        return False
    return not (large and isinstance(norm.inner, KSparse) and norm.inner.k >= MANY)


def _polar_factors(stack: Tensor, norm: Spectral) -> Tensor:
    out = torch.empty_like(stack)
    view = rows_first(out, norm)
    turned = [polar(matrix, inside=True) for matrix in group_matrices(stack, norm)]
    view.copy_(torch.cat(turned, dim=1).view(view.shape))
    return out


def on_the_sphere(stacks: Sequence[Tensor], parts: list[Tensor] | None = None) -> list[Vertex]:
    """Return the stacks, with L = 1, divided by their L2 norm, as vertices; ``parts`` are their norms, if known."""
    length = vector_norm(torch.cat([part.view(1) for part in parts or l2_norms(list(stacks), None)[1]]))
    factor = torch.where(length == 0, 0, 1 / length)
    return [Vertex(x, factor) for x in stacks]


# --- matrices of a stack ----------------------------------------------------------------------------------------------


def group_matrices(stack: Tensor, norm: Spectral) -> list[Tensor]:
    """Return the stack as matrices (L, rows, columns), one for each group of rows."""
    view = rows_first(stack, norm)
    matrix = view.flatten(1, norm.row_dims).flatten(2)
    return list(matrix.chunk(norm.groups, dim=1))


def rows_first(stack: Tensor, norm: Spectral) -> Tensor:
    """Return the view (L, rows, …) of a stack, with the other dimensions in the order of memory.

    Any order of the columns has the same singular values and left directions; this one needs no copy. Where several
    dimensions count the rows, these come first, one by one. For a spatial matrix the view is (L, filters, kernel
    columns, input channels, kernel rows).
    """
    if norm.spatial:
        return stack.permute(0, *(d + 1 for d in norm.spatial_order()))
    strides = stack.stride()
    rows = [d + 1 for d in row_dims(norm.dim)]
    others = sorted((d for d in range(1, stack.ndim) if d not in rows), key=lambda d: (-strides[d], d))
    return stack.permute(0, *rows, *others)


def along(values: Tensor, stack: Tensor) -> Tensor:
    """Return values (L,) as (L, 1, …, 1), so that they broadcast with a stack."""
    return values.view(-1, *(1 for _ in range(stack.ndim - 1)))
