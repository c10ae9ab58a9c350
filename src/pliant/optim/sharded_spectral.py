"""Leading singular directions of matrices whose rows lie on many processes.

An iteration sums Gᵀ(GZ), columns × directions, over the processes, and a triangle of directions × directions if there
are more columns than rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from pliant.linalg import advanced, divide_or_zero, orthonormalised, starting_directions, stirred, times
from pliant.norms import KSparse, Spectral
from pliant.optim.kept_directions import AT_FIRST, equal_lengths, leading_vertices, resized
from pliant.optim.oracle import State
from pliant.optim.pieces import Pieces
from pliant.optim.vertices import Vertex


def leading_vertices_of_pieces(
    pieces: Pieces, norm: Spectral, directions: Sequence[Tensor], basis: Tensor | None, iterations: int
) -> tuple[list[Vertex], Tensor, Tensor]:
    """Return the results of :func:`~pliant.optim.kept_directions.leading_vertices` for pieces of directions.

    The basis of a matrix with more rows than columns has the matrix's rows, and is cut over processes as they are. The
    basis of any other matrix is the same on every process.

    Args:
        pieces: how the tensors of the ball lie on processes.
        norm: the norm of the ball.
        directions: well-scaled pieces (1, *shape).
        basis: the basis that the last call returned; None: start afresh.
        iterations: the number of block power iterations.

    Returns:
        The vertices, as pieces; the basis for the next call, (1, all rows of bases here, directions); and
        −⟨direction, vertex⟩, (1,).
    """
    if not _by_whole_rows(pieces, norm):
        wholes = [x[None] for x in pieces.whole([x[0] for x in directions])]
        vertices, basis, value = leading_vertices(norm, wholes, basis, iterations)
        cut = pieces.cut_up([(v.factor * v.carrier)[0] for v in vertices])
        return [Vertex(x[None], v.factor.new_ones(1)) for x, v in zip(cut, vertices, strict=True)], basis, value
    rank = norm.rank_of_vertices
    assert rank is not None, f"{norm} has vertices of full rank"
    matrices = [x.flatten(2) for x in directions]  # (1, rows here, columns)
    # A sum over rows that are cut needs all processes. The cut rows are the right side of an upright matrix, the left
    # side of any other.
    upright = _upright(pieces)
    wide = [not up for up in upright]
    lengths = _basis_lengths(pieces, norm)
    if basis is None or basis.shape[1] != sum(lengths):
        start, iterations = _start(pieces, matrices, rank), iterations + AT_FIRST
    else:
        kept = basis.to(matrices[0].dtype).split(lengths, dim=1)
        start = resized(kept, rank, lambda count: _start(pieces, matrices, count))
    for _ in range(iterations):
        # start, right: (1, larger side, directions); image, left: (1, smaller side, directions)
        start = [_stirred(pieces, z, j) for j, z in enumerate(start)]
        image = [times(g.mT if up else g, z) for g, z, up in zip(matrices, start, upright, strict=True)]
        left, triangle = _orthonormalised(pieces, pieces.summed(image, upright), wide)
        right = [times(g if up else g.mT, u) for g, u, up in zip(matrices, left, upright, strict=True)]
        right = pieces.summed(right, wide)
        squares = [torch.linalg.vecdot(z, z, dim=1) for z in right]
        start = advanced(right, start, triangle, pieces.added(squares, upright))
    basis = torch.cat(start, dim=1)
    if isinstance(norm.inner, KSparse):
        left, right, value = equal_lengths(left, pieces.all_rows(right, upright))
        right = pieces.own_rows(right, upright)
    else:
        value = pieces.length([z.flatten() for z in right], upright)
        right = [divide_or_zero(z, value) for z in right]
    products = [z @ u.mT if up else u @ z.mT for u, z, up in zip(left, right, upright, strict=True)]
    one = torch.ones_like(value)
    return [Vertex(v.view_as(x), one) for v, x in zip(products, directions, strict=True)], basis, value


def joined_basis(pieces: Pieces, norm: Spectral, states: Sequence[State]) -> Tensor | None:
    """Return the basis that :func:`part_basis` split, (1, all rows, directions); None if a part is missing or unfit."""
    parts = [state.get("basis") for state in states]
    local = [z.to_local() if isinstance(z, DTensor) else z for z in parts]
    lengths = _basis_lengths(pieces, norm)
    if any(z is None or len(z) != n for z, n in zip(local, lengths, strict=True)):
        return None
    return torch.cat([z for z in local if z is not None])[None]


def part_basis(pieces: Pieces, norm: Spectral, basis: Tensor, states: Sequence[State]) -> None:
    """Put the basis of each tensor, (rows, directions), into its state: as a DTensor if it lies in pieces."""
    parts = basis[0].split(_basis_lengths(pieces, norm))
    by_rows = _by_whole_rows(pieces, norm)
    layout = zip(states, parts, pieces.shapes, pieces.placements, _upright(pieces), strict=True)
    for state, z, shape, placed, up in layout:
        if not (up and by_rows):
            state["basis"] = z.clone()
            continue
        size, stride = torch.Size((shape[0], z.shape[1])), (z.shape[1], 1)
        state["basis"] = DTensor.from_local(
            z.contiguous(), pieces.mesh, placed, run_check=False, shape=size, stride=stride
        )


def _by_whole_rows(pieces: Pieces, norm: Spectral) -> bool:
    """Return whether each process has whole rows of single matrices; otherwise the tensors are put together."""
    return pieces.by_rows and norm.dim == 0 and norm.groups == 1 and not norm.spatial


def _upright(pieces: Pieces) -> list[bool]:
    """Return, for each matrix, whether it has more rows than columns."""
    return [shape[0] > math.prod(shape[1:]) for shape in pieces.shapes]


def _basis_lengths(pieces: Pieces, norm: Spectral) -> list[int]:
    """Return, for each tensor, how many rows of its basis this process has."""
    if not _by_whole_rows(pieces, norm):
        return [norm.groups * max(norm.group_shape(shape)) for shape in pieces.shapes]
    return [
        stop - start if up else math.prod(shape[1:])
        for shape, (start, stop), up in zip(pieces.shapes, pieces.spans, _upright(pieces), strict=True)
    ]


def _start(pieces: Pieces, matrices: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return this process's rows of the directions that a single process would start from."""
    columns = [max(shape[0], math.prod(shape[1:])) for shape in pieces.shapes]
    like = [x.new_empty((1, 0, n)) for x, n in zip(matrices, columns, strict=True)]
    return pieces.own_rows(starting_directions(like, count), _upright(pieces))


def _stirred(pieces: Pieces, z: Tensor, j: int) -> Tensor:
    """Return the directions ``z`` of matrix ``j``, with a small multiple of a fixed vector added to the last one."""
    if not _upright(pieces)[j]:
        return stirred(z)
    return stirred(z, pieces.spans[j][0], pieces.shapes[j][0], pieces.length([z[0, :, -1]], [True]))


def _orthonormalised(pieces: Pieces, image: Sequence[Tensor], cut: Sequence[bool]) -> tuple[list[Tensor], Tensor]:
    """Return the orthonormal factor of the parts, stacked on top of each other, and the triangle R.

    The counterpart of :func:`~pliant.linalg.orthonormalised`. Each process has some rows of the parts that are cut. It
    sends the R of its rows; the QR factorisation of all these R, one above the other, gives the rest. (Demmel, Grigori,
    Hoemmen, Langou 2012, Communication-optimal parallel and sequential QR and LU factorizations.)

    Args:
        pieces: how the tensors of the ball lie on processes.
        image: for each tensor (1, rows here, directions).
        cut: which of them are cut over processes; the others are the same everywhere.

    Returns:
        The rows here of the orthonormal factor, shaped as ``image``; and R, (1, directions, directions).
    """
    own = [torch.linalg.qr(x) if is_cut else None for x, is_cut in zip(image, cut, strict=True)]
    tops, places = [], []
    for x, factors, size in zip(image, own, pieces.sizes, strict=True):
        if factors is None:
            tops.append(x)
            places.append(slice(0, x.shape[1]))
            continue
        _, r = factors
        most = min(size, x.shape[2])
        padded = pad(r, (0, 0, 0, most - r.shape[1]))
        tops.append(pieces.gather(padded.flatten()).view(1, -1, x.shape[2]))
        places.append(slice(pieces.rank * most, pieces.rank * most + r.shape[1]))
    basis, triangle = orthonormalised(torch.cat(tops, dim=1))
    parts = basis.split([top.shape[1] for top in tops], dim=1)
    left = []
    for x, factors, part, place in zip(image, own, parts, places, strict=True):
        u = part[:, place]
        left.append(u if factors is None else (factors[0] @ u).mul_((x != 0).any(dim=2, keepdim=True)))
    return left, triangle
