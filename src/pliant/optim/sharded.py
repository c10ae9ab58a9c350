"""Balls over tensors that lie in pieces on many processes: what :class:`~pliant.SFW` asks of DTensors.

``fully_shard`` (FSDP2) cuts every parameter along dim 0, and dim 0 counts the rows of most matrices. So a process has
whole rows, and a vertex needs little of the others:

* ``Rows``, ``Channels``, but ``orthogonal``: the norms of the rows; one float per filter or channel.
* entries (``KSparse``, ``KSupport``, ``Lp(1)``): how many entries lie in which range, a few thousand counts however
  large the tensor and k are; each round narrows the range that the k-th largest entry is in.
* ``Spectral`` with kept directions: the sum over processes of Gᵀ(GZ), columns × directions, and where there are more
  columns than rows a triangle of directions × directions.
* ``Lp(2)``, ``Lp(inf)`` and ``Blocks`` inside the pieces: a single norm.

For everything else (``Lp`` with other p, small or full-rank ``Spectral`` balls, orthogonal rows, grouped convolutions,
pieces along another dimension, blocks across pieces) :meth:`Shards.whole_vertices` puts the tensor together on every
process, asks the oracle of one process and keeps its own piece. That is also the reference which the short ways are
tested against.

Every process makes the same calls with tensors of the same sizes, whatever it holds: pieces may be uneven or empty.
All of this module works on the *pieces*, the local tensors; sums over processes are made in the order of processes, so
that all get the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import pad

from pliant.linalg import (
    _stirred,
    advanced,
    common_dtype,
    divide_or_zero,
    keep_n_of_m,
    long_norm,
    orthonormalised,
    power_of_two_scale,
    starting_directions,
    times,
    vector_norm,
)
from pliant.norms.ball import NormBall
from pliant.norms.lifts import (
    Blocks,
    Channels,
    KSparse,
    KSupport,
    Lp,
    Norm,
    Rows,
    Shape,
    Spectral,
    _as_matrix,
    without_vanished,
)
from pliant.optim.vertices import (
    AT_FIRST,
    Vertex,
    _equal_lengths,
    leading_vertices,
    persistent,
    powers,
    rank_of_vertices,
    resized,
    unit_vertices,
)

# The bits of a magnitude are looked at in these portions, from the first on: 2^11 counts at most are sent at a time.
_PORTIONS = {torch.float32: (11, 10, 10), torch.float64: (11, 11, 11, 10, 10, 10)}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Shards:
    """How the tensors of one ball lie on processes, and the oracles over their pieces.

    Args:
        tensors: the parameters, all DTensors of one mesh; each one cut along one dimension of the tensor over one and
            the same dimension of the mesh, or not cut at all. Other dimensions of the mesh hold replicas (HSDP).
        names: theirs, for messages.

    Raises:
        ValueError: the tensors lie in a way that is not supported; says which and what to do.
    """

    def __init__(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        cut_over = _check_placements(tensors, names)
        first = cast(DTensor, tensors[0])
        self.mesh: DeviceMesh = first.device_mesh
        self.placements = [cast(DTensor, x).placements for x in tensors]
        self.shapes: list[Shape] = [x.shape for x in tensors]
        self._strides = [x.stride() for x in tensors]
        self._group: Any = self.mesh.get_group(cut_over)
        self._rank, self._processes = self.mesh.get_local_rank(cut_over), self.mesh.size(cut_over)
        dims = [next((p.dim for p in placed if isinstance(p, Shard)), None) for placed in self.placements]
        self._cut = [dim is not None for dim in dims]
        self._by_rows = all(dim == 0 for dim in dims)
        # As torch.chunk: pieces of equal size but the last ones.
        self._sizes = [math.ceil(shape[0] / self._processes) if shape else 1 for shape in self.shapes]
        self._spans = [
            (min(self._rank * size, shape[0]), min((self._rank + 1) * size, shape[0])) if shape else (0, 1)
            for size, shape in zip(self._sizes, self.shapes, strict=True)
        ]

    # --- vertices -----------------------------------------------------------------------------------------------------

    def unit_vertices(self, norm: Norm, directions: Sequence[Tensor]) -> tuple[Tensor, list[Vertex]]:
        """Return the L2 norm of the directions, (1,), and the pieces of the exact vertex of the unit ball for them.

        Args:
            norm: of the ball.
            directions: pieces, one for each tensor of the ball.
        """
        dtype = common_dtype(directions)
        directions = [x.to(dtype) for x in directions]
        if self._is_frobenius(norm):
            lengths, directions = self.well_scaled(directions)
            return lengths, self._on_the_sphere(directions)
        match norm:
            case Lp(p) if p == math.inf:
                lengths = self.length(directions)
                return lengths, [Vertex(torch.sign(x)[None], torch.ones_like(lengths)) for x in directions]
            case Rows() | Channels() if self._has_rows(norm) and not norm.orthogonal:
                return self._row_vertices(norm, directions)
            case KSparse() | KSupport() | Lp(1) if self._by_rows:
                lengths, directions = self.well_scaled(directions)
                kept = self._largest(directions, norm.k if isinstance(norm, KSparse | KSupport) else 1)
                if isinstance(norm, KSupport):
                    return lengths, self._on_the_sphere(kept)
                return lengths, [Vertex(x.sign_()[None], torch.ones_like(lengths)) for x in kept]
            case Blocks() if self._has_blocks(norm):
                lengths, directions = self.well_scaled(directions)
                return lengths, self._block_vertices(norm, directions)
        return self.whole_vertices(norm, directions)

    def whole_vertices(self, norm: Norm, directions: Sequence[Tensor]) -> tuple[Tensor, list[Vertex]]:
        """Return the same as :meth:`unit_vertices`, by putting the directions together on every process."""
        lengths, vertices = unit_vertices(norm, [x[None] for x in self._whole(directions)])
        return lengths, self._pieces(vertices)

    def persistent(
        self, norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
    ) -> list[Tensor]:
        """Return what :func:`~pliant.optim.vertices.persistent` does, for pieces.

        Args:
            norm: of the ball.
            directions: pieces (1, *shape).
            weights: pieces (*shape).
            persistence: the exponent.
        """
        if not self._has_rows(norm):
            all_of = [[x[None] for x in self._whole(some)] for some in ([x[0] for x in directions], weights)]
            scaled = persistent(norm, all_of[0], all_of[1], persistence)
            return [v.carrier for v in self._pieces([Vertex(x, _ones(x.new_ones(1))) for x in scaled])]
        _, lengths, places = self._magnitudes(norm, [w.to(d.dtype) for w, d in zip(weights, directions, strict=True)])
        factors = powers(lengths, persistence)
        return [
            x * factors[place].view(1, -1, *(1 for _ in x.shape[2:]))
            for x, place in zip(directions, places, strict=True)
        ]

    def _row_vertices(self, norm: Rows | Channels, directions: list[Tensor]) -> tuple[Tensor, list[Vertex]]:
        scale, a, places = self._magnitudes(norm, directions)
        factors = divide_or_zero(norm._align(a), a)
        vertices = [
            Vertex((x / _or_one(scale))[None], factors[place].view(1, -1, *(1 for _ in x.shape[1:])))
            for x, place in zip(directions, places, strict=True)
        ]
        return (scale * long_norm(a, 2)).view(1), vertices

    def _block_vertices(self, norm: Blocks, directions: list[Tensor]) -> list[Vertex]:
        if isinstance(norm.inner, KSupport):
            kept = [torch.empty_like(x) for x in directions]
            for x, out in zip(directions, kept, strict=True):
                if x.numel():
                    keep_n_of_m(x, norm.inner.k, norm.size, norm.dim, out)
            return self._on_the_sphere(kept)
        blocks, rebuilds = zip(*(norm._split(x) for x in directions), strict=True)
        duals = [norm.inner._dual(a) if len(a) else a.sum(dim=1) for a in blocks]
        length = self.length(duals)
        vertices = []
        for a, dual, rebuild in zip(blocks, duals, rebuilds, strict=True):
            aligned = norm.inner._align(a) if len(a) else a
            vertices.append(Vertex(rebuild(divide_or_zero(dual, length)[:, None] * aligned)[None], _ones(length)))
        return vertices

    def _on_the_sphere(self, directions: Sequence[Tensor]) -> list[Vertex]:
        length = self.length(directions)
        factor = torch.where(length == 0, 0, 1 / length)
        return [Vertex(x[None], factor) for x in directions]

    def _largest(self, tensors: list[Tensor], k: int) -> list[Tensor]:
        """Return the tensors with all but the k largest magnitudes of all of them, everywhere, set to zero.

        As non-negative floats are ordered as their bits are, the k-th largest one is found from its first bits to its
        last: how many there are of each value of the next bits tells which value it has.
        """
        dtype = tensors[0].dtype
        bits = [x.abs().flatten().view(_INTEGERS[dtype]) for x in tensors]
        every = torch.cat(bits)
        place = sum(_PORTIONS[dtype])
        prefix = torch.zeros((), dtype=every.dtype, device=every.device)
        room = torch.full((), k, dtype=torch.int64, device=every.device)  # of those with the prefix, so many are kept
        for width in _PORTIONS[dtype]:
            place -= width
            candidate = (every >> place) >> width == prefix
            value = (every >> place) & (2**width - 1)
            counts = torch.zeros(2**width, dtype=torch.int64, device=every.device)
            counts.scatter_add_(0, value.long(), candidate.long())
            dist.all_reduce(counts, group=self._group)
            at_least = counts.flip(0).cumsum(0).flip(0)
            chosen = (at_least >= room).sum() - 1
            room = room - (at_least - counts).gather(0, chosen.view(1)).squeeze(0)
            prefix = (prefix << width) | chosen.to(prefix.dtype)
        # Among equals the lower index wins: those of former tensors, and of former processes in the same tensor.
        tied = [x == prefix for x in bits]
        everywhere = self._gather(torch.stack([t.sum() for t in tied])).T.flatten()
        before = (everywhere.cumsum(0) - everywhere).view(len(tensors), -1)[:, self._rank]
        kept = []
        for x, b, tie, earlier in zip(tensors, bits, tied, before, strict=True):
            mask = (b > prefix) | (tie & (tie.cumsum(0) + earlier <= room))
            kept.append(torch.where(mask.view(x.shape), x, 0))
        return kept

    # --- spectral balls -----------------------------------------------------------------------------------------------

    def leading_vertices(
        self,
        norm: Spectral,
        directions: Sequence[Tensor],
        basis: Tensor | None,
        iterations: int,
        memory: Sequence[Tensor] | None = None,
    ) -> tuple[list[Vertex], Tensor, Tensor]:
        """Return what :func:`~pliant.optim.vertices.leading_vertices` does, for pieces of well-scaled directions.

        The basis of a matrix with more rows than columns has its rows, and lies on the processes as they do; that of
        any other is the same everywhere.

        Args:
            norm: as there.
            directions: pieces (1, *shape).
            basis: what the last call returned; None: start anew.
            iterations: of block power iteration.
            memory: not used.
        """
        if not self._has_directions(norm):
            whole = [x[None] for x in self._whole([x[0] for x in directions])]
            vertices, basis, value = leading_vertices(norm, whole, basis, iterations)
            return self._pieces(vertices), basis, value
        rank = rank_of_vertices(norm)
        assert rank is not None, f"{norm} has vertices of full rank"
        matrices = [x.flatten(2) for x in directions]
        # Over cut rows a sum takes all processes: those are on the right of an upright matrix, on the left of others.
        upright = self._upright()
        wide = [not up for up in upright]
        lengths = self._basis_lengths(norm)
        if basis is None or basis.shape[1] != sum(lengths):
            start, iterations = self._start(matrices, rank), iterations + AT_FIRST
        else:
            kept = basis.to(matrices[0].dtype).split(lengths, dim=1)
            start = resized(kept, rank, lambda count: self._start(matrices, count))
        for _ in range(iterations):
            start = [self._stirred(z, j) for j, z in enumerate(start)]
            image = [times(g.mT if up else g, z) for g, z, up in self._zip(matrices, start)]
            left, triangle = self._orthonormalised(self._summed(image, upright), wide)
            right = [times(g if up else g.mT, u) for g, u, up in self._zip(matrices, left)]
            right = self._summed(right, wide)
            squares = [torch.linalg.vecdot(z, z, dim=1) for z in right]
            start = advanced(right, start, triangle, self._added(squares, upright))
        basis = torch.cat(start, dim=1)
        if isinstance(norm.inner, KSparse):
            left, right, value = _equal_lengths(left, self._all_rows(right, upright))
            right = self._own_rows(right, upright)
        else:
            value = self.length([z.flatten() for z in right], upright)
            right = [divide_or_zero(z, value) for z in right]
        products = [z @ u.mT if up else u @ z.mT for u, z, up in zip(left, right, upright, strict=True)]
        one = torch.ones_like(value)
        return [Vertex(v.view_as(x), one) for v, x in zip(products, directions, strict=True)], basis, value

    def _start(self, matrices: list[Tensor], count: int) -> list[Tensor]:
        """Return this process's part of the directions that one process would start from."""
        columns = [max(shape[0], math.prod(shape[1:])) for shape in self.shapes]
        like = [x.new_empty((1, 0, n)) for x, n in zip(matrices, columns, strict=True)]
        return self._own_rows(starting_directions(like, count), self._upright())

    def _stirred(self, z: Tensor, j: int) -> Tensor:
        if not self._upright()[j]:
            return _stirred(z)
        return _stirred(z, self._spans[j][0], self.shapes[j][0], self.length([z[0, :, -1]], [True]))

    def _orthonormalised(self, image: list[Tensor], cut: list[bool]) -> tuple[list[Tensor], Tensor]:
        """Return what :func:`~pliant.linalg.orthonormalised` does of the parts one above the other, and R.

        Of parts that are cut each process has some rows. The QR factorisation of all is that of all processes' R.
        (Demmel, Grigori, Hoemmen, Langou 2012, Communication-optimal parallel and sequential QR and LU factorizations.)
        """
        own = [torch.linalg.qr(x) if c else None for x, c in zip(image, cut, strict=True)]
        tops, places = [], []
        for x, factors, size in zip(image, own, self._sizes, strict=True):
            if factors is None:
                tops.append(x)
                places.append(slice(0, x.shape[1]))
                continue
            _, r = factors
            most = min(size, x.shape[2])
            padded = pad(r, (0, 0, 0, most - r.shape[1]))
            tops.append(self._gather(padded.flatten()).view(1, -1, x.shape[2]))
            places.append(slice(self._rank * most, self._rank * most + r.shape[1]))
        basis, triangle = orthonormalised(torch.cat(tops, dim=1))
        left = []
        for x, factors, part, place in zip(
            image, own, basis.split([top.shape[1] for top in tops], dim=1), places, strict=True
        ):
            u = part[:, place]
            left.append(u if factors is None else (factors[0] @ u).mul_((x != 0).any(dim=2, keepdim=True)))
        return left, triangle

    def _all_rows(self, parts: list[Tensor], cut: list[bool]) -> list[Tensor]:
        """Return the parts (1, rows, columns) with the rows of all processes, those that are cut."""
        result = []
        for x, c, size, shape in zip(parts, cut, self._sizes, self.shapes, strict=True):
            if c:
                padded = pad(x, (0, 0, 0, size - x.shape[1]))
                x = self._gather(padded.flatten()).view(1, -1, x.shape[2])[:, : shape[0]]
            result.append(x)
        return result

    def _own_rows(self, parts: list[Tensor], cut: list[bool]) -> list[Tensor]:
        """Undo :meth:`_all_rows`."""
        return [x[:, slice(*span)] if c else x for x, c, span in zip(parts, cut, self._spans, strict=True)]

    def _summed(self, parts: list[Tensor], over: list[bool]) -> list[Tensor]:
        """Return the parts, those marked in ``over`` summed over processes."""
        parts = [x.contiguous() if c else x for x, c in zip(parts, over, strict=True)]
        for x, c in zip(parts, over, strict=True):
            if c:
                dist.all_reduce(x, group=self._group)
        return parts

    def _added(self, parts: list[Tensor], over: list[bool]) -> Tensor:
        """Return the sum of the parts (1, n), those marked in ``over`` summed over processes, too."""
        if not any(over):
            return torch.stack(parts).sum(dim=0)
        own = torch.stack(self._own(parts, over)).sum(dim=0)
        return self._gather(own.flatten()).sum(dim=0, keepdim=True)

    def joined_basis(self, norm: Spectral, bases: Sequence[Tensor | None]) -> Tensor | None:
        """Return what :meth:`parted_basis` took apart; None if some part is missing or of another kind."""
        found = [z.to_local() if isinstance(z, DTensor) else z for z in bases]
        lengths = self._basis_lengths(norm)
        if any(z is None or len(z) != n for z, n in zip(found, lengths, strict=True)):
            return None
        return torch.cat([z for z in found if z is not None])[None]

    def parted_basis(self, norm: Spectral, basis: Tensor) -> list[Tensor]:
        """Return the basis of each tensor, (columns, directions), as a DTensor where it lies on processes in pieces."""
        parts = basis[0].split(self._basis_lengths(norm))
        cut = [up and self._has_directions(norm) for up in self._upright()]
        return [
            DTensor.from_local(
                z.contiguous(), self.mesh, placed, run_check=False, shape=torch.Size((shape[0], z.shape[1])),
                stride=(z.shape[1], 1),
            )
            if c
            else z.clone()
            for z, shape, placed, c in zip(parts, self.shapes, self.placements, cut, strict=True)
        ]  # fmt: skip

    def _basis_lengths(self, norm: Spectral) -> list[int]:
        """Return the number of rows that this process has of the basis of each tensor."""
        if not self._has_directions(norm):
            blocks = [norm._block_shape(shape) for shape in self.shapes]
            return [norm.groups * max(block) for block in blocks]
        return [
            stop - start if up else math.prod(shape[1:])
            for shape, (start, stop), up in zip(self.shapes, self._spans, self._upright(), strict=True)
        ]

    def _upright(self) -> list[bool]:
        return [shape[0] > math.prod(shape[1:]) for shape in self.shapes]

    def _zip(self, first: list[Tensor], second: list[Tensor]) -> list[tuple[Tensor, Tensor, bool]]:
        return list(zip(first, second, self._upright(), strict=True))

    # --- norms --------------------------------------------------------------------------------------------------------

    def length(self, tensors: Sequence[Tensor], cut: Sequence[bool] | None = None) -> Tensor:
        """Return the L2 norm of all entries on all processes, (1,), safe from overflow and underflow.

        Args:
            tensors: pieces.
            cut: which of them are pieces; the others are the same everywhere and count once. By default, as the
                tensors of the ball.
        """
        scale, norms = self._scaled_norms(tensors, cut)
        return (scale * vector_norm(norms)).view(1)

    def shrinkage(self, ball: NormBall, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``ball.shrinkage`` of the tensors that these are the pieces of, a scalar tensor."""
        return ball.shrinkage_of(self.norm(ball.norm, tensors), tensors)

    def norm(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of the tensors that these are the pieces of, a scalar tensor."""
        dtype = common_dtype(tensors)
        tensors = [x.to(dtype) for x in tensors]
        if self._is_frobenius(norm):
            return self.length(tensors)[0]
        if isinstance(norm, Rows | Channels) and self._has_rows(norm):
            scale, a, _ = self._magnitudes(norm, tensors)
            return scale * norm._norm(a)
        return norm(self._whole(tensors))

    def gap(self, ball: NormBall, tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """Return ``ball.gap`` of the tensors that these are the pieces of, ⟨g, x⟩ + radius·dual(g); a scalar."""
        norm = ball.norm
        turned = isinstance(norm, Rows | Channels) and norm.orthogonal
        if turned or (isinstance(norm, Spectral) and not self._is_frobenius(norm)):
            # Their vertices may fall short of the dual norm.
            inner = [torch.sum(g * x) for g, x in zip(directions, tensors, strict=True)]
            return self._sum(inner) + ball.radius * norm.dual(self._whole(directions))
        _, vertices = self.unit_vertices(norm, directions)
        return self._sum(
            [
                torch.sum(g * (x + ball.radius * (v.factor * v.carrier)[0]))
                for g, x, v in zip(directions, tensors, vertices, strict=True)
            ]
        )

    def _sum(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the sum over tensors and processes of one number for each piece."""
        return self._gather(torch.stack(self._own(terms, None)).sum().view(1)).sum()

    def _magnitudes(self, norm: Rows | Channels, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the magnitudes that the norm looks at, divided by a scale; and for each row here, which one is its."""
        scale, device = _scale(tensors), tensors[0].device
        rows = [vector_norm(_as_matrix(x / _or_one(scale), 0), dim=1) for x in tensors]
        if isinstance(norm, Rows):
            sent = [pad(r, (0, size - len(r))) for r, size in zip(rows, self._sizes, strict=True)]
            starts = torch.tensor([0, *(shape[0] for shape in self.shapes)]).cumsum(0).tolist()
            places = [
                torch.arange(start + first, start + last, device=device)
                for start, (first, last) in zip(starts, self._spans, strict=False)
            ]
        else:
            places = [self._channels(norm, j, device) for j in range(len(tensors))]
            squares = rows[0].new_zeros(norm.count)
            for r, place in zip(rows, places, strict=True):
                squares.index_add_(0, place, r.square())
            sent = [squares.sqrt()]
        received = self._gather(torch.cat([scale.view(1), *sent]))
        scales = received[:, 0]
        scale = scales.amax()
        parts = (received[:, 1:] * (scales / _or_one(scale))[:, None]).split([len(s) for s in sent], dim=1)
        if isinstance(norm, Rows):
            a = torch.cat([part.flatten()[: shape[0]] for part, shape in zip(parts, self.shapes, strict=True)])
        else:
            a = vector_norm(parts[0], dim=0)
        return scale, without_vanished(a), places

    def _channels(self, norm: Channels, j: int, device: torch.device) -> Tensor:
        """Return the channel that each row here belongs to."""
        in_part = self.shapes[j][0] // norm.parts
        return torch.arange(*self._spans[j], device=device) % in_part // (in_part // norm.count)

    def well_scaled(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the L2 norm, (1,), and the tensors divided by a power of two near the largest entry of all."""
        dtype = common_dtype(tensors)
        tensors = [x.to(dtype) for x in tensors]
        scale, norms = self._scaled_norms(tensors, None)
        return (scale * vector_norm(norms)).view(1), [x / _or_one(scale) for x in tensors]

    def _scaled_norms(self, tensors: Sequence[Tensor], cut: Sequence[bool] | None) -> tuple[Tensor, Tensor]:
        """Return a scale of all entries, and the L2 norm of each process's part divided by it, (processes,)."""
        scale = _scale(tensors)
        counted = self._own(tensors, cut)
        flat = torch.cat([(x / _or_one(scale)).flatten() for x in counted]) if counted else scale.new_zeros(0)
        received = self._gather(torch.stack([scale, long_norm(flat, 2)]))
        scales, norms = received.unbind(dim=1)
        scale = scales.amax()
        return scale, norms * (scales / _or_one(scale))

    def _own(self, tensors: Sequence[Tensor], cut: Sequence[bool] | None) -> list[Tensor]:
        """Return what this process counts in a sum: its pieces; the first one also what is the same everywhere."""
        cut = self._cut if cut is None else cut
        return [x if c or self._rank == 0 else torch.zeros_like(x) for x, c in zip(tensors, cut, strict=True)]

    # --- pieces and processes -----------------------------------------------------------------------------------------

    def _gather(self, values: Tensor) -> Tensor:
        """Return the values (n,) of all processes, (processes, n)."""
        received = values.new_empty(self._processes * len(values))
        dist.all_gather_single(received, values.contiguous(), group=self._group)
        return received.view(self._processes, -1)

    def _whole(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        return [
            DTensor.from_local(
                x.contiguous(), self.mesh, placed, run_check=False, shape=torch.Size(shape), stride=stride
            ).full_tensor()
            for x, placed, shape, stride in zip(pieces, self.placements, self.shapes, self._strides, strict=True)
        ]

    def _pieces(self, vertices: Sequence[Vertex]) -> list[Vertex]:
        """Return this process's piece of whole vertices."""
        everywhere = [Replicate()] * self.mesh.ndim
        result = []
        for vertex, placed in zip(vertices, self.placements, strict=True):
            whole = (vertex.factor * vertex.carrier)[0].contiguous()
            spread = DTensor.from_local(whole, self.mesh, everywhere, run_check=False)
            piece = spread.redistribute(placements=placed).to_local()
            result.append(Vertex(piece[None], _ones(vertex.factor)))
        return result

    def _has_rows(self, norm: Rows | Channels) -> bool:
        """Tell whether each process has whole rows of the norm."""
        return self._by_rows and (norm.dim == 0 or all(len(shape) < 2 for shape in self.shapes))

    def _has_blocks(self, norm: Blocks) -> bool:
        return self._by_rows and (norm.dim > 0 or all(size % norm.size == 0 for size in self._sizes))

    def _has_directions(self, norm: Spectral) -> bool:
        return self._by_rows and norm.dim == 0 and norm.groups == 1 and not norm.spatial

    def _is_frobenius(self, norm: Norm) -> bool:
        match norm:
            case Lp(2) | Spectral(Lp(2)):
                return True
            case Spectral(KSupport(k)):
                return k == norm.length(self.shapes)
        return False


def whole_copy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a layer with whole parameters on the CPU, whose values are not set, for its DTensors.

    What ``fully_shard`` has added to the layer, its hooks among them, stays behind.

    Args:
        layer: it, or layers inside, may be wrapped.
        memo: of copy.deepcopy, by id; copies are added.
    """
    for child in layer.children():
        memo[id(child)] = whole_copy(child, memo)
    for p in layer.parameters(recurse=False):
        if isinstance(p, DTensor):
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    classes = type(layer).__mro__
    kind: Any = classes[classes.index(FSDPModule) + 1] if isinstance(layer, FSDPModule) else classes[0]
    copied: nn.Module = kind.__new__(kind)
    nn.Module.__init__(copied)
    added = {name for name in vars(copied) if "hooks" in name}
    own = {n: v for n, v in vars(layer).items() if n not in added and not n.startswith("__composable_api_state_key")}
    copied.__dict__.update(copy.deepcopy(own, memo))
    return copied


def wrap(piece: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor that lies on processes as another one, of which this is the piece here."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(p: Tensor) -> Tensor:
    """Return the whole of a DTensor, on every process."""
    assert isinstance(p, DTensor)
    return cast(DTensor, p.detach()).full_tensor()


def cut(values: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, the same on every process, cut as a DTensor is; the first process's counts."""
    assert isinstance(like, DTensor)
    return distribute_tensor(values, like.device_mesh, like.placements)


def gradient_piece(p: Tensor) -> Tensor:
    """Return this process's piece of the gradient of a DTensor, cut as the tensor is."""
    assert isinstance(p, DTensor)
    gradient = p.grad
    assert isinstance(gradient, DTensor)
    if gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return gradient.to_local()


def agreed(
    finite: Sequence[Tensor], present: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[list[bool], list[bool]]:
    """Return which gradients are finite on all processes, and which are there on some processes but not on all.

    Args:
        finite: of each gradient that is there, a boolean scalar tensor.
        present: of each tensor, whether there is a gradient.
        tensors: some are DTensors; the processes of all their meshes get the same answer.
    """
    device = tensors[0].device
    there = torch.tensor(present, device=device)
    ok = torch.ones_like(there)
    if finite:
        ok[there] = torch.stack(list(finite)).to(device)
    flags = torch.stack([ok, there, ~there]).to(torch.int32)
    meshes = {x.device_mesh: None for x in tensors if isinstance(x, DTensor)}
    for mesh in meshes:
        flags = flags.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=mesh.get_group(dim))
    everywhere, all_there, none_there = (row.bool() for row in flags.cpu())
    return everywhere.tolist(), (~(all_there | none_there)).tolist()


def _check_placements(tensors: Sequence[Tensor], names: Sequence[str]) -> int:
    """Return the dimension of the mesh that tensors are cut over; ValueError for what is not supported."""
    mesh: DeviceMesh | None = None
    cut_over: dict[int, str] = {}
    for x, name in zip(tensors, names, strict=True):
        if not isinstance(x, DTensor):
            raise ValueError(
                f"{name} is whole on every process, but {names[0]} of the same joint ball is a DTensor: shard all "
                "tensors of a joint ball, or give them balls of their own"
            )
        if mesh is None:
            mesh = x.device_mesh
        elif x.device_mesh != mesh:
            raise ValueError(
                f"{name} lies on {x.device_mesh}, but {names[0]} of the same joint ball on {mesh}: shard all tensors "
                "of a joint ball over one mesh, or give them balls of their own"
            )
        cuts = []
        for dim, placement in enumerate(x.placements):
            if isinstance(placement, Shard):
                cuts.append(dim)
            elif not isinstance(placement, Replicate):
                raise ValueError(
                    f"SFW cannot constrain {name} placed as {placement}: redistribute it to Shard or Replicate first"
                )
        if len(cuts) > 1:
            raise ValueError(
                f"{name} is cut over {len(cuts)} dimensions of its mesh (placements {x.placements}), as a tensor "
                "parallel layer under FSDP is: SFW constrains tensors cut over one; shard this layer with fully_shard "
                "alone, or put it in a group without a ball"
            )
        cut_over.update(dict.fromkeys(cuts, name))
    if len(cut_over) > 1:
        raise ValueError(
            f"{' and '.join(cut_over.values())} of one joint ball are cut over different dimensions of their mesh: "
            "give them balls of their own"
        )
    return next(iter(cut_over), 0)


def _scale(tensors: Sequence[Tensor]) -> Tensor:
    """Return the power of two near the largest entry, 0 where there is none but zeros."""
    filled = [x for x in tensors if x.numel()]
    if not filled:
        return tensors[0].new_zeros(())
    largest = torch.stack([vector_norm(x, math.inf) for x in filled]).amax()
    return torch.where(largest == 0, largest, power_of_two_scale(filled))


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(1)
