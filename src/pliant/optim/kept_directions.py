"""Vertices of ``Spectral`` balls whose singular directions are kept from the last step, and made better by one more.

They are approximate, and in the unit ball all the same: an inexact direction costs optimality, never feasibility. How
much it costs is measured every now and then, and a tensor whose vertices fall short gets more iterations per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.linalg import leading_directions, polar, starting_directions
from pliant.norms import KSparse, KSupport, Lp, Shape, Spectral
from pliant.optim.oracle import Oracle, State
from pliant.optim.vertices import MANY, Vertex, along, group_matrices, l2_norms, rows_first

SMALL = 16  # up to this many rows or columns a full decomposition costs no more than an iteration
AT_FIRST = 2  # iterations more where nothing is known of the directions
# Every MEASURE_EVERY steps, first at step MEASURE_AT, MEASURE_BY more iterations show how good kept directions are: a
# share of what these reach. Below ENOUGH a tensor gets one iteration more in each step, above PLENTY one less.
MEASURE_EVERY, MEASURE_AT, MEASURE_BY = 64, 8, 4
ENOUGH, PLENTY = 0.98, 0.998


def keeps_directions(norm: Spectral, shapes: Sequence[Shape]) -> bool:
    """Tell whether :func:`leading_vertices` serves a ball over these shapes; otherwise the exact vertices do.

    It is for the balls of k-sparse, k-support and nuclear norms, if some matrix is large enough to be worth it.
    """
    if not isinstance(norm.inner, KSparse | KSupport) and norm.inner != Lp(1):
        return False
    rank = norm.rank_of_vertices
    large = any(min(norm.group_shape(shape)) > SMALL for shape in shapes)
    return rank is not None and large and rank != norm.length(shapes)


def vertices_from_last_step(
    oracle: Oracle,
    norm: Spectral,
    directions: Sequence[Tensor],
    states: Sequence[Sequence[State]],
    options: Mapping[str, Any],
    memory: Sequence[Tensor] | None = None,
) -> list[Vertex]:
    """Return vertices from the singular directions in the states, and keep the new ones there for the next step.

    Every :data:`MEASURE_EVERY` steps a few more iterations measure their quality. The result is read at the next
    measurement only: the device has finished by then, and reading does not wait for it.

    Args:
        oracle: over the tensors.
        norm: see :func:`keeps_directions`.
        directions: well-scaled stacks.
        states: of the L × J tensors; ``basis``, ``steps``, ``iterations`` and ``quality`` are kept there.
        options: of the parameter group: ``power_iterations`` and ``capturable``.
        memory: for the carriers of the vertices.
    """
    leaders = [state[0] for state in states]
    iterations = options["power_iterations"] or leaders[0].get("iterations", 1)
    basis = oracle.basis(norm, states)
    measured = "steps" in leaders[0] and leaders[0]["steps"] % MEASURE_EVERY == MEASURE_AT
    vertices, basis, value = oracle.leading_vertices(norm, directions, basis, iterations, memory)
    if measured:
        vertices, basis, better = oracle.leading_vertices(norm, directions, basis, MEASURE_BY, memory)
        qualities = torch.where(better == 0, 1, value / better)
        for state, quality in zip(leaders, _to_host(qualities), strict=True):
            if "quality" in state:
                state["iterations"] = _adapted(state.get("iterations", 1), state["quality"].item())
            state["quality"] = quality
    oracle.keep_basis(norm, basis, states)
    if options["power_iterations"] is None and not options["capturable"]:
        for state in leaders:
            state["steps"] = state.get("steps", 0) + 1
            # From the first step on: a distributed checkpoint loads only entries that a state has already.
            state.setdefault("iterations", 1)
            state.setdefault("quality", torch.tensor((ENOUGH + PLENTY) / 2))
    return vertices


def _adapted(iterations: int, quality: float) -> int:
    """Return how many power iterations to take after a measured quality."""
    if quality < ENOUGH:
        return min(iterations + 1, MEASURE_BY)
    return max(iterations - 1, 1) if quality > PLENTY else iterations


def _to_host(values: Tensor) -> list[Tensor]:
    """Return the entries as tensors on the host, which the device fills later: nobody waits for it here."""
    if values.device.type == "cuda":
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        return list(host.copy_(values, non_blocking=True).unbind())
    return list(values.cpu().unbind())


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
    rank = norm.rank_of_vertices
    assert rank is not None, f"{norm} has vertices of full rank"
    memory = [torch.empty_like(x) for x in stacks] if memory is None else memory
    matrices = [matrix for x in stacks for matrix in group_matrices(x, norm)]
    # QR makes the left directions orthonormal: take the smaller side for them.
    upright = [a.shape[1] > a.shape[2] for a in matrices]
    matrices = [a.mT if up else a for a, up in zip(matrices, upright, strict=True)]
    columns = [a.shape[2] for a in matrices]
    if basis is None or basis.shape[1] != sum(columns):
        start, iterations = starting_directions(matrices, rank), iterations + AT_FIRST
    else:
        kept = basis.to(matrices[0].dtype).split(columns, dim=1)
        start = resized(kept, rank, lambda count: starting_directions(matrices, count))
    left, right, start = leading_directions(matrices, start, iterations)
    if isinstance(norm.inner, KSparse):
        left, right, value = equal_lengths(left, right)
        factor = torch.ones_like(value)
    else:
        # Any basis will do: left·rightᵀ/‖right‖ has rank k and Frobenius norm 1.
        value = l2_norms(right, None)[0]
        factor = torch.where(value == 0, 0, 1 / value)
    factors = [(z, u) if up else (u, z) for u, z, up in zip(left, right, upright, strict=True)]
    for index, out in enumerate(memory):
        _write_products(factors[index * norm.groups : (index + 1) * norm.groups], norm, out)
    vertices = [Vertex(out, along(factor, out)) for out in memory]
    return vertices, start[0] if len(start) == 1 else torch.cat(start, dim=1), value


def equal_lengths(left: list[Tensor], right: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
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
    """Return ``count`` directions: the leading ones of those kept, or all of them and new ones for the rest."""
    missing = count - kept[0].shape[2]
    if missing <= 0:
        return [z[:, :, :count] for z in kept]
    return [torch.cat([z, new], dim=2) for z, new in zip(kept, start(missing), strict=True)]


def _write_products(factors: list[tuple[Tensor, Tensor]], norm: Spectral, out: Tensor) -> None:
    """Write first·secondᵀ of each group to its rows of ``out``."""
    view = rows_first(out, norm)
    if norm.spatial:
        products = torch.cat([first @ second.mT for first, second in factors], dim=1)
        view.copy_(products.view(view.shape))
        return
    matrix = view.flatten(2)
    for (first, second), place in zip(factors, matrix.chunk(norm.groups, dim=1), strict=True):
        torch.matmul(first, second.mT, out=place)
    if view.ndim > 3 and view.stride(1) != max(view.stride()[1:]):
        view.copy_(matrix.view(view.shape))  # columns with rows between them: flatten made a copy
