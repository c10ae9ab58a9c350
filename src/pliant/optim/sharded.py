"""The oracle over DTensors, which lie in pieces on many processes.

``fully_shard`` (FSDP2) cuts every parameter along dim 0, and dim 0 counts the rows of most matrices. So a process has
whole rows, and processes need to exchange only a little to find a vertex:

* ``Rows`` and ``Channels``, unless ``orthogonal``: the norms of the rows, one float per filter or channel.
* Entries (``KSparse``, ``KSupport``, ``Lp(1)``): how many entries lie in which range of values, a few thousand counts
  regardless of the size of the tensor and of k; each round narrows the range that contains the k-th largest entry.
* ``Spectral`` with kept directions: see ``sharded_spectral``.
* ``Lp(2)``, ``Lp(inf)``, and ``Blocks`` whose blocks are not cut: a single norm.

For everything else (``Lp`` with other p, small or full-rank ``Spectral`` balls, orthogonal rows, grouped convolutions,
pieces along another dimension, blocks across pieces) :meth:`Sharded.whole_vertices` puts the tensor together on every
process, computes the vertex of the whole and keeps this process's piece. The tests compare the short ways with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from pliant.linalg import common_dtype, divide_or_zero, keep_n_of_m, long_norm, vector_norm
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.norms.shapes import as_matrix, without_vanished
from pliant.optim.oracle import Oracle, State
from pliant.optim.pieces import Pieces, or_one, scale_of
from pliant.optim.sharded_spectral import joined_basis, leading_vertices_of_pieces, part_basis
from pliant.optim.vertices import Vertex, persistent, powers, unit_vertices

# The bits of a magnitude are examined in portions of these widths, most significant first: at most 2^11 counts are sent
# at a time.
_PORTIONS = {torch.float32: (11, 10, 10), torch.float64: (11, 11, 11, 10, 10, 10)}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Sharded(Oracle):
    """The oracle of one ball over J DTensors, as stacks (1, *shape) of pieces; ``Oracle`` documents the methods.

    Args:
        tensors: the parameters, see :class:`~pliant.optim.pieces.Pieces`.
        names: the names of the parameters, for messages.

    Raises:
        ValueError: the placement of the tensors is not supported.
    """

    def __init__(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        self.pieces = Pieces(tensors, names)
        super().__init__(self.pieces.shapes)

    def stacks(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Give the pieces a first dimension of 1."""
        return [x[None] for x in tensors[0]]

    def takes_memory(self, directions: Sequence[Tensor]) -> bool:
        """Return False: pieces get new memory."""
        return False

    def well_scaled(self, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Divide by a power of two near the largest entry on all processes."""
        return self.pieces.well_scaled(directions)

    # --- vertices ---

    def vertices(
        self,
        norm: Norm,
        directions: Sequence[Tensor],
        memory: Sequence[Tensor] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[Tensor, list[Vertex]]:
        """Find the vertices without whole tensors where possible; ``memory`` is ignored."""
        dtype = common_dtype(directions)
        local = [x[0].to(dtype) for x in directions]  # J pieces of shape *shape
        if self._is_frobenius(norm):
            lengths, local = self.pieces.well_scaled(local)
            return lengths, self._on_the_sphere(local)
        match norm:
            case Lp(p) if p == math.inf:
                lengths = self.pieces.length(local)
                return lengths, [Vertex(torch.sign(x)[None], torch.ones_like(lengths)) for x in local]
            case Rows() | Channels() if self._has_rows(norm) and not norm.orthogonal:
                return self._row_vertices(norm, local)
            case KSparse() | KSupport() | Lp(1) if self.pieces.by_rows:
                lengths, local = self.pieces.well_scaled(local)
                kept = self._largest(local, norm.k if isinstance(norm, KSparse | KSupport) else 1)
                if isinstance(norm, KSupport):
                    return lengths, self._on_the_sphere(kept)
                return lengths, [Vertex(x.sign_()[None], torch.ones_like(lengths)) for x in kept]
            case Blocks() if self._has_blocks(norm):
                lengths, local = self.pieces.well_scaled(local)
                return lengths, self._block_vertices(norm, local)
        return self.whole_vertices(norm, directions, exact=exact)

    def whole_vertices(
        self, norm: Norm, directions: Sequence[Tensor], *, exact: bool = False
    ) -> tuple[Tensor, list[Vertex]]:
        """Return the results of :meth:`vertices`, by putting the directions together on every process."""
        dtype = common_dtype(directions)
        lengths, vertices = unit_vertices(
            norm, [x[None] for x in self.pieces.whole([d[0].to(dtype) for d in directions])], exact=exact
        )
        cut = self.pieces.cut_up([(v.factor * v.carrier)[0] for v in vertices])
        return lengths, [Vertex(x[None], v.factor.new_ones(1)) for x, v in zip(cut, vertices, strict=True)]

    def leading_vertices(
        self,
        norm: Spectral,
        directions: Sequence[Tensor],
        basis: Tensor | None,
        iterations: int,
        memory: Sequence[Tensor] | None = None,
    ) -> tuple[list[Vertex], Tensor, Tensor]:
        """Iterate on the pieces; ``memory`` is ignored."""
        return leading_vertices_of_pieces(self.pieces, norm, directions, basis, iterations)

    def basis(self, norm: Spectral, states: Sequence[Sequence[State]]) -> Tensor | None:
        """Join the parts in the states of all tensors."""
        return joined_basis(self.pieces, norm, states[0])

    def keep_basis(self, norm: Spectral, basis: Tensor, states: Sequence[Sequence[State]]) -> None:
        """Put each tensor's part of the basis into its state."""
        part_basis(self.pieces, norm, basis, states[0])

    def persistent(
        self, norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
    ) -> list[Tensor]:
        """Multiply the rows here by powers of their lengths, relative to the mean over all processes."""
        if not self._has_rows(norm):
            wholes = [[x[None] for x in self.pieces.whole([x[0] for x in xs])] for xs in (directions, weights)]
            scaled = persistent(norm, wholes[0], wholes[1], persistence)
            return [x[None] for x in self.pieces.cut_up([x[0] for x in scaled])]
        own = [w[0].to(d.dtype) for w, d in zip(weights, directions, strict=True)]
        _, lengths, places = self._magnitudes(norm, own)
        factors = powers(lengths, persistence)
        return [
            x * factors[place].view(1, -1, *(1 for _ in x.shape[2:]))
            for x, place in zip(directions, places, strict=True)
        ]

    def _row_vertices(self, norm: Rows | Channels, directions: list[Tensor]) -> tuple[Tensor, list[Vertex]]:
        scale, a, places = self._magnitudes(norm, directions)
        factors = divide_or_zero(norm.align(a), a)  # (magnitudes,)
        vertices = [
            Vertex((x / or_one(scale))[None], factors[place].view(1, -1, *(1 for _ in x.shape[1:])))
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
        blocks, rebuilds = zip(*(norm.split(x) for x in directions), strict=True)
        duals = [norm.inner.dual_of(a) if len(a) else a.sum(dim=1) for a in blocks]
        length = self.pieces.length(duals)
        vertices = []
        for a, dual, rebuild in zip(blocks, duals, rebuilds, strict=True):
            aligned = norm.inner.align(a) if len(a) else a
            vertices.append(
                Vertex(rebuild(divide_or_zero(dual, length)[:, None] * aligned)[None], torch.ones_like(length))
            )
        return vertices

    def _on_the_sphere(self, directions: Sequence[Tensor]) -> list[Vertex]:
        length = self.pieces.length(directions)
        factor = torch.where(length == 0, 0, 1 / length)
        return [Vertex(x[None], factor) for x in directions]

    def _largest(self, tensors: list[Tensor], k: int) -> list[Tensor]:
        """Return the tensors with all entries set to 0 except the k of largest magnitude over tensors and processes.

        Non-negative floats are ordered as their bits are. So the bits of the k-th largest are found from the most
        significant on: the number of entries for each value of the next bits shows which value the k-th largest has.
        """
        dtype = tensors[0].dtype
        bits = [x.abs().flatten().view(_INTEGERS[dtype]) for x in tensors]
        all_bits = torch.cat(bits)  # of all tensors on this process
        place = sum(_PORTIONS[dtype])
        prefix = torch.zeros((), dtype=all_bits.dtype, device=all_bits.device)  # the bits found so far
        room = torch.full((), k, dtype=torch.int64, device=all_bits.device)  # how many entries with the prefix are kept
        for width in _PORTIONS[dtype]:
            place -= width
            candidate = (all_bits >> place) >> width == prefix
            value = (all_bits >> place) & (2**width - 1)
            counts = torch.zeros(2**width, dtype=torch.int64, device=all_bits.device)
            counts.scatter_add_(0, value.long(), candidate.long())
            dist.all_reduce(counts, group=self.pieces.group)
            at_least = counts.flip(0).cumsum(0).flip(0)
            chosen = (at_least >= room).sum() - 1
            room = room - (at_least - counts).gather(0, chosen.view(1)).squeeze(0)
            prefix = (prefix << width) | chosen.to(prefix.dtype)
        # Among equal entries the lower index wins: the earlier tensor, then the earlier process.
        tied = [x == prefix for x in bits]
        everywhere = self.pieces.gather(torch.stack([t.sum() for t in tied])).T.flatten()  # (tensors · processes,)
        before = (everywhere.cumsum(0) - everywhere).view(len(tensors), -1)[:, self.pieces.rank]
        kept = []
        for x, b, tie, earlier in zip(tensors, bits, tied, before, strict=True):
            mask = (b > prefix) | (tie & (tie.cumsum(0) + earlier <= room))
            kept.append(torch.where(mask.view(x.shape), x, 0))
        return kept

    # --- norms ---

    def length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over tensors and processes, (1,)."""
        return self.pieces.length(tensors)

    def shrinkage(self, ball: NormBall, tensors: Sequence[Tensor]) -> Tensor:
        """Return the shrinkage, from the norm of the whole tensors."""
        return ball.shrinkage_of(self.norm(ball.norm, tensors), tensors)

    def norm(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of the whole tensors, given this process's pieces of them; a scalar tensor."""
        dtype = common_dtype(tensors)
        tensors = [x.to(dtype) for x in tensors]
        if self._is_frobenius(norm):
            return self.length(tensors)[0]
        if isinstance(norm, Rows | Channels) and self._has_rows(norm):
            scale, a, _ = self._magnitudes(norm, tensors)
            return scale * norm.norm_of(a)
        return norm(self.pieces.whole(tensors))

    def gap(self, ball: NormBall, tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """Sum ⟨g, x − v⟩ over the pieces; if vertices are inexact, use the dual norm of the whole tensors instead."""
        norm, dtype = ball.norm, common_dtype([*tensors, *directions])
        tensors, directions = ([x.to(dtype) for x in xs] for xs in (tensors, directions))
        turned = isinstance(norm, Rows | Channels) and norm.orthogonal
        if turned or (isinstance(norm, Spectral) and not self._is_frobenius(norm)):
            inner = [torch.sum(g * x) for g, x in zip(directions, tensors, strict=True)]
            return self.pieces.sum(inner) + ball.radius * norm.dual(self.pieces.whole(directions))
        _, vertices = self.vertices(norm, [g[None] for g in directions])
        return self.pieces.sum(
            [
                torch.sum(g * (x + ball.radius * (v.factor * v.carrier)[0]))
                for g, x, v in zip(directions, tensors, vertices, strict=True)
            ]
        )

    def _magnitudes(self, norm: Rows | Channels, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the magnitudes of the whole tensors, and which of them each row here belongs to.

        Returns:
            A scale, a scalar tensor; the magnitudes divided by it, (magnitudes,); and for each tensor the index of the
            magnitude of each row here, (rows here,).
        """
        scale, device = scale_of(tensors), tensors[0].device
        rows = [vector_norm(as_matrix(x / or_one(scale), 0), dim=1) for x in tensors]
        if isinstance(norm, Rows):
            sent = [pad(r, (0, size - len(r))) for r, size in zip(rows, self.pieces.sizes, strict=True)]
            starts = torch.tensor([0, *(shape[0] for shape in self.shapes)], device="cpu").cumsum(0).tolist()
            places = [
                torch.arange(start + first, start + last, device=device)
                for start, (first, last) in zip(starts, self.pieces.spans, strict=False)
            ]
        else:
            places = [self._channels(norm, j, device) for j in range(len(tensors))]
            squares = rows[0].new_zeros(norm.count)
            for r, place in zip(rows, places, strict=True):
                squares.index_add_(0, place, r.square())
            sent = [squares.sqrt()]
        received = self.pieces.gather(torch.cat([scale.view(1), *sent]))  # (processes, 1 + all values sent)
        scales = received[:, 0]
        scale = scales.amax()
        parts = (received[:, 1:] * (scales / or_one(scale))[:, None]).split([len(s) for s in sent], dim=1)
        if isinstance(norm, Rows):
            a = torch.cat([part.flatten()[: shape[0]] for part, shape in zip(parts, self.shapes, strict=True)])
        else:
            a = vector_norm(parts[0], dim=0)
        return scale, without_vanished(a), places

    def _channels(self, norm: Channels, j: int, device: torch.device) -> Tensor:
        """Return the channel of each row of tensor ``j`` here, (rows here,)."""
        in_part = self.shapes[j][0] // norm.parts
        return torch.arange(*self.pieces.spans[j], device=device) % in_part // (in_part // norm.count)

    def _has_rows(self, norm: Rows | Channels) -> bool:
        """Return whether each process has whole rows of the norm."""
        return self.pieces.by_rows and (norm.dim == 0 or all(len(shape) < 2 for shape in self.shapes))

    def _has_blocks(self, norm: Blocks) -> bool:
        return self.pieces.by_rows and (norm.dim > 0 or all(size % norm.size == 0 for size in self.pieces.sizes))

    def _is_frobenius(self, norm: Norm) -> bool:
        match norm:
            case Lp(2) | Spectral(Lp(2)):
                return True
            case Spectral(KSupport(k)):
                return k == norm.length(self.shapes)
        return False
