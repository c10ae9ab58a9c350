"""What one layer offers to low rank: its decomposition, and the ranks that it can be cut down to with cost and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from pliant.compression.base import COSTS
from pliant.compression.costs import Applied

Allowed = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Outline:
    """What a layer costs at each rank under one scheme.

    Args:
        scheme: how the weight is read as matrices.
        groups, rows, columns: the shape of the matrices, (groups, m, n).
        applied: how often the layer's weight is applied in one forward pass of the example.
    """

    scheme: str
    groups: int
    rows: int
    columns: int
    applied: Applied

    def dense(self, cost: str) -> int:
        """Return the entries of the weight, or the multiply-accumulates of the layer."""
        return self.groups * self.rows * self.columns * (1 if cost == "params" else self.applied.whole)

    def cost(self, rank: int, cost: str) -> int:
        """Return the entries of the two factors, or their multiply-accumulates."""
        if cost == "params":
            return self.groups * rank * (self.columns + self.rows)
        reducing = self.applied.tall if self.scheme == "spatial" else self.applied.whole
        return self.groups * rank * (self.columns * reducing + self.rows * self.applied.whole)

    @property
    def full(self) -> int:
        """The full rank."""
        return min(self.rows, self.columns)

    @property
    def max_rank(self) -> int:
        """The largest rank that makes the layer smaller in parameters and in multiply-accumulates; may be 0."""
        return min((self.dense(cost) - 1) // self.cost(1, cost) for cost in COSTS)


@dataclass(frozen=True, eq=False)
class Spectrum(Outline):
    """The decomposition of one layer under one scheme: matrices of shape (groups, m, n), s = min(m, n).

    Args:
        scheme, groups, rows, columns, applied: as in :class:`Outline`.
        basis: (groups, m, s), orthonormal columns, leading first, in the dtype of the weight.
        coordinates: (groups, s, n), the weight in that basis; for rank r take the first r columns of ``basis`` and the
            first r rows of ``coordinates``.
        energies: float64 (s,), falling, summed over the groups: σ² of the weight, or of the outputs if whitened.
        norm: ‖W‖.
    """

    basis: Tensor
    coordinates: Tensor
    energies: Tensor
    norm: float


@dataclass(frozen=True, eq=False)
class Cut:
    """An option of a layer: a rank under a scheme, or rank 0 to leave it dense."""

    cost: int
    loss: float
    rank: int
    spectrum: Spectrum


def dense_cut(spectra: Sequence[Spectrum], cost: str) -> Cut:
    """Return the option to leave a layer dense."""
    return Cut(spectra[0].dense(cost), 0.0, 0, spectra[0])


def _any(total: int, useful: int) -> Sequence[int]:
    return range(total, 0, -1)


def ranks_of(spectrum: Outline, allowed: Allowed) -> list[int]:
    """Return the allowed ranks that make a layer smaller, falling."""
    return [rank for rank in allowed(spectrum.full, spectrum.max_rank) if rank <= spectrum.max_rank]


def cuts_of(spectra: Sequence[Spectrum], cost: str, allowed: Allowed = _any, own: float | None = None) -> list[Cut]:
    """Return what is allowed by falling cost: dense, then every rank that loses less than all cheaper ones.

    Args:
        spectra: the decompositions of the layer.
        cost: what the options cost.
        allowed: full rank, and the largest one that saves anything → the ranks that the layer may keep.
        own: the ratio of this layer, which leaves only the nearest one; None if it has none.
    """
    dense = dense_cut(spectra, cost)
    ranks = []
    for spectrum in spectra:
        kept = list(accumulate(spectrum.energies.tolist()))
        for rank in ranks_of(spectrum, allowed):
            loss = max(0.0, 1.0 - kept[rank - 1] / kept[-1]) if kept[-1] else 0.0  # a zero weight loses nothing
            ranks.append(Cut(spectrum.cost(rank, cost), loss, rank, spectrum))
    front: list[Cut] = []
    for cut in sorted(ranks, key=lambda c: (c.cost, c.loss)):
        if not front or (cut.cost > front[-1].cost and (cut.loss < front[-1].loss or len(spectra) == 1)):
            front.append(cut)
    whole = not front or any(spectrum.full in allowed(spectrum.full, spectrum.max_rank) for spectrum in spectra)
    offer = [*([dense] if whole else []), *reversed(front)]
    return offer if own is None else [min(offer, key=lambda cut: abs(cut.cost - (1 - own) * dense.cost))]
