"""Vertices of ``Spectral`` balls from the last step's singular directions, improved by another power iteration.

They are approximate but lie in the unit ball: an inexact direction costs optimality, never feasibility. The loss of
optimality is measured every few steps, and a tensor whose vertices fall short gets more iterations per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.linalg import leading_directions, polar, starting_directions
from pliant.norms import KSparse, KSupport, Lp, NormBall, Shape, Spectral
from pliant.optim.oracle import Oracle, State
from pliant.optim.vertices import MANY, SMALL, Vertex, along, group_matrices, l2_norms, rows_first

AT_FIRST = 2  # additional iterations when no directions are kept yet
# Every MEASURE_EVERY steps, first at step MEASURE_AT, MEASURE_BY further iterations measure the quality of the kept
# directions: their share of ⟨direction, vertex⟩ after the further iterations. Below ENOUGH a tensor gets one more
# iteration in each step, above PLENTY one less.
MEASURE_EVERY, MEASURE_AT, MEASURE_BY = 64, 8, 4
ENOUGH, PLENTY = 0.98, 0.998


def keeps_directions(norm: Spectral, shapes: Sequence[Shape]) -> bool:
    """Return whether :func:`leading_vertices` is used for a ball over these shapes, rather than exact vertices.

    It is used for the balls of k-sparse, k-support and nuclear norms, if some matrix is large enough for it to pay.
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
    """Return vertices from the singular directions in the states, and keep the new directions for the next step.

    Every :data:`MEASURE_EVERY` steps a few further iterations measure their quality. The measured value is read only at
    the next measurement: by then the device has computed it, so reading does not wait.

    Args:
        oracle: the oracle over the tensors.
        norm: a norm that :func:`keeps_directions` accepts.
        directions: J well-scaled stacks (L, *shape).
        states: the states of the L × J tensors, which keep ``basis``, ``steps``, ``iterations`` and ``quality``.
        options: ``power_iterations`` and ``capturable`` of the parameter group.
        memory: tensors of the shapes of the directions, for the carriers of the vertices; None: new memory.
    """
    leaders = [state[0] for state in states]  # the first tensor of each ball keeps its counters
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
            # Set these in the first step: a distributed checkpoint loads only entries that a state has already.
            state.setdefault("iterations", 1)
            state.setdefault("quality", torch.tensor((ENOUGH + PLENTY) / 2, device="cpu"))
    return vertices


def _adapted(iterations: int, quality: float) -> int:
    """Return the number of power iterations per step after a measurement of quality."""
    if quality < ENOUGH:
        return min(iterations + 1, MEASURE_BY)
    return max(iterations - 1, 1) if quality > PLENTY else iterations


def _to_host(values: Tensor) -> list[Tensor]:
    """Return the entries as tensors on the host, which the device may fill later: this does not wait for it."""
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
    """Return vertices of the unit balls for well-scaled directions, without a singular value decomposition of these.

    Args:
        norm: a norm with vertices of low rank, see :func:`keeps_directions`.
        stacks: one stack (L, *shape), or J stacks with L = 1 for a joint ball.
        basis: the basis that the last call returned, perhaps for another rank; None: start afresh, with
            :data:`AT_FIRST` additional iterations.
        iterations: the number of block power iterations.
        memory: tensors of the shapes of the stacks, for the carriers; None: new memory.

    Returns:
        The vertices; the basis for the next call, (L, all columns, directions); and −⟨direction, vertex⟩ of each
        member, (L,), at most the dual norm: the closer to it, the better the vertex.
    """
    rank = norm.rank_of_vertices
    assert rank is not None, f"{norm} has vertices of full rank"
    memory = [torch.empty_like(x) for x in stacks] if memory is None else memory
    matrices = [matrix for x in stacks for matrix in group_matrices(x, norm)]  # (L, rows, columns) each
    # QR makes the left directions orthonormal: let them be on the smaller side.
    upright = [a.shape[1] > a.shape[2] for a in matrices]
    matrices = [a.mT if up else a for a, up in zip(matrices, upright, strict=True)]  # now rows <= columns
    columns = [a.shape[2] for a in matrices]
    if basis is None or basis.shape[1] != sum(columns):
        start, iterations = starting_directions(matrices, rank), iterations + AT_FIRST
    else:
        kept = basis.to(matrices[0].dtype).split(columns, dim=1)
        start = resized(kept, rank, lambda count: starting_directions(matrices, count))
    # For each matrix: (L, rows, directions), (L, columns, directions), (L, columns, directions).
    left, right, start = leading_directions(matrices, start, iterations)
    if isinstance(norm.inner, KSparse):
        left, right, value = equal_lengths(left, right)
        factor = torch.ones_like(value)
    else:
        # Any basis of the directions serves: left·rightᵀ/‖right‖ has rank k and Frobenius norm 1.
        value = l2_norms(right, None)[0]
        factor = torch.where(value == 0, 0, 1 / value)
    factors = [(z, u) if up else (u, z) for u, z, up in zip(left, right, upright, strict=True)]
    for index, out in enumerate(memory):
        _write_products(factors[index * norm.groups : (index + 1) * norm.groups], norm, out)
    vertices = [Vertex(out, along(factor, out)) for out in memory]
    return vertices, start[0] if len(start) == 1 else torch.cat(start, dim=1), value


def equal_lengths(left: list[Tensor], right: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Replace left·rightᵀ by its polar factor: the vertex of the k-sparse norm gives each direction the same weight.

    Args:
        left: for each matrix (L, rows, directions), orthonormal together.
        right: for each matrix (L, columns, directions).

    Returns:
        The factors of the polar factor, shaped as the arguments; and its inner product with left·rightᵀ, (L,).
    """
    if right[0].shape[2] >= MANY:
        whole = torch.cat(right, dim=1)  # (L, all columns, directions)
        turned = polar(whole, inside=True)
        return left, list(turned.split([z.shape[1] for z in right], dim=1)), (turned * whole).sum(dim=(1, 2))
    u, s, vh = torch.linalg.svd(torch.cat(right, dim=1), full_matrices=False)
    real = s > s[:, :1] * u.shape[1] * torch.finfo(s.dtype).eps
    rotated = (u * real[:, None, :]).split([z.shape[1] for z in right], dim=1)
    return [x @ vh.mT for x in left], list(rotated), s.sum(dim=1)


def resized(kept: Sequence[Tensor], count: int, start: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """Return ``count`` directions: the leading kept ones, or all of the kept ones and new ones for the rest.

    Args:
        kept: for each matrix (L, columns, directions).
        count: the number of directions wanted.
        start: returns a given number of new directions for each matrix.
    """
    missing = count - kept[0].shape[2]
    if missing <= 0:
        return [z[:, :, :count] for z in kept]
    return [torch.cat([z, new], dim=2) for z, new in zip(kept, start(missing), strict=True)]


def fit_directions(state: State, ball: NormBall | None) -> None:
    """Let the state of a tensor go on with another ball: drop the kept directions that it has no use for."""
    if "basis" not in state:
        return
    if ball is None:
        for name in ("basis", "steps", "iterations", "quality"):
            state.pop(name, None)
    elif isinstance(ball.norm, Spectral):
        state["basis"] = state["basis"][:, : ball.norm.rank_of_vertices]


def _write_products(factors: list[tuple[Tensor, Tensor]], norm: Spectral, out: Tensor) -> None:
    """Write first·secondᵀ of each group to its rows of ``out``."""
    view = rows_first(out, norm)
    if norm.row_dims > 1:
        products = torch.cat([first @ second.mT for first, second in factors], dim=1)
        view.copy_(products.view(view.shape))
        return
    matrix = view.flatten(2)
    for (first, second), place in zip(factors, matrix.chunk(norm.groups, dim=1), strict=True):
        torch.matmul(first, second.mT, out=place)
    if view.ndim > 3 and view.stride(1) != max(view.stride()[1:]):
        view.copy_(matrix.view(view.shape))  # rows lie between the columns in memory, so flatten made a copy
