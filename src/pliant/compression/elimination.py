"""Which channels can leave: those for which the others can make up.

Let a layer with weight W (filters × columns) read inputs with second moment H = E[x xᵀ]. If the columns J of a channel
leave and the other columns are refitted, the outputs change by

    L = tr(W_J S_J W_Jᵀ),   S_J = ((H⁻¹)_JJ)⁻¹,

the error of the best approximation of W x by the other inputs. Afterwards W and H⁻¹ are those of the smaller problem:

    W ← W − W_J S_J (H⁻¹)_J:,      H⁻¹ ← H⁻¹ − (H⁻¹)_:J S_J (H⁻¹)_J:.

:func:`elimination_order` repeats this with the channel that costs least, summed over all layers that read the channel,
each loss relative to the energy tr(W H Wᵀ) of the layer's outputs. One order and one curve of losses serve all sizes.

Source: block version of Hassibi and Stork 1993, "Second order derivatives for network pruning: optimal brain surgeon",
as in Frantar and Alistarh 2022, "Optimal brain compression", and Kurtic et al. 2023, "ZipLM".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 64  # rounds per group: a round eliminates this part of the channels with one update of the large matrices
_CANDIDATES = 4  # how many times as many channels a round looks at as it eliminates


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the channels of a group.

    Args:
        weight: float64 (filters, columns).
        moment: second moment of its inputs, float64 (columns, columns), positive definite.
        blocks: int64 (channels, width), the columns that read each channel. Other columns never leave.
    """

    weight: Tensor
    moment: Tensor
    blocks: Tensor


@dataclass(frozen=True, eq=False)
class Curve:
    """The order in which the channels of a group leave.

    Args:
        order: int64 (channels,), the channel that leaves first first.
        losses: float64 (channels + 1,), the loss once that many channels have left, in units of output energy; 0 first
            and never falling.
    """

    order: Tensor
    losses: Tensor


def elimination_order(readers: Sequence[Reader]) -> Curve:
    """Return the order in which the channels of a group leave, and the losses.

    Channels leave one by one. For speed, those of one round are chosen among the candidates that were cheapest when
    the round began; groups of up to 64 channels have a round for each channel.

    Args:
        readers: all layers that read the channels.
    """
    states = [_State(reader) for reader in readers]
    channels = len(readers[0].blocks)
    names = torch.arange(channels, device=readers[0].weight.device)  # of the channels at the positions of the states
    per_round = max(1, channels // _ROUNDS)
    order: list[int] = []
    steps: list[float] = []
    while len(order) < channels - 1:
        scores = torch.stack([state.scores() for state in states]).sum(0)
        count = min(per_round, channels - 1 - len(order))
        candidates = scores.argsort(stable=True)[: min(_CANDIDATES * count, channels - len(order))]
        if count == 1:
            leaving = candidates[:1]
            steps.append(float(scores[leaving]))
        else:
            leaving = candidates[_cheapest([state.part(candidates) for state in states], count, steps)]
        for state in states:
            state.eliminate(leaving)
        order += names[leaving].tolist()
        if 2 * (channels - len(order)) < len(names):
            stays = states[0].stays
            names = names[stays]
            for state in states:
                state.compact(stays)
    order += names[states[0].stays].tolist()
    steps.append(float(torch.stack([state.scores() for state in states]).sum(0).min()))
    losses = torch.tensor([0.0, *steps], dtype=torch.float64).clamp(min=0).cumsum(0)
    return Curve(torch.tensor(order), losses)


def _cheapest(states: list[_State], count: int, steps: list[float]) -> list[int]:
    """Eliminate ``count`` channels of small problems one by one; append their losses, return their indices."""
    gone = []
    for _ in range(count):
        scores = torch.stack([state.scores() for state in states]).sum(0)
        cheapest = int(scores.argmin())
        steps.append(float(scores[cheapest]))
        gone.append(cheapest)
        for state in states:
            state.eliminate(torch.tensor([cheapest], device=scores.device))
    return gone


class _State:
    """The weight and the inverse moment of one reader during the elimination.

    The columns are ordered by channel, those that belong to no channel last. Eliminated channels keep their places, as
    zeros up to rounding, until the matrices are made compact: that copies them, and takes longer than a step.
    """

    def __init__(self, reader: Reader) -> None:
        self.channels, self.width = reader.blocks.shape
        columns = reader.blocks.flatten()
        rest = torch.ones(len(reader.moment), dtype=torch.bool, device=columns.device).index_fill_(0, columns, False)
        columns = torch.cat([columns, rest.nonzero().flatten()])
        self.weight = reader.weight[:, columns]
        moment = reader.moment[columns][:, columns]
        energy = (self.weight @ moment).mul_(self.weight).sum()
        self.unit = energy.clamp(min=torch.finfo(energy.dtype).tiny)  # a layer of zeros loses nothing
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        self.gone = torch.zeros(self.channels, dtype=torch.bool, device=columns.device)

    @property
    def stays(self) -> Tensor:
        """The positions of the channels that are left, ascending."""
        return (~self.gone).nonzero().flatten()

    def scores(self) -> Tensor:
        """Return the loss by each channel's elimination, (channels,); infinite for those that have left."""
        size, width = self.channels * self.width, self.width
        blocks = self.inverse[:size, :size].unflatten(1, (-1, width)).unflatten(0, (-1, width))
        blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (channels, width, width)
        identity = torch.eye(width, dtype=blocks.dtype, device=blocks.device)
        blocks = torch.where(self.gone[:, None, None], identity, blocks)
        columns: Tensor = self.weight[:, :size].T.unflatten(0, (-1, width))  # (channels, width, filters)
        if width == 1:
            losses = columns.square().sum((1, 2)) / blocks.flatten()
        else:
            halves = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False)
            losses = halves.square().sum((1, 2))
        return torch.where(self.gone, torch.inf, losses / self.unit)

    def eliminate(self, channels: Tensor) -> None:
        """Remove channels, by position, and make up for them."""
        gone = self._columns(channels)
        across = self.inverse[gone]  # (removed columns, columns)
        root = torch.linalg.cholesky(across[:, gone])
        half = torch.linalg.solve_triangular(root, across, upper=False)
        # W_J S_J (H⁻¹)_J: with S_J = (root rootᵀ)⁻¹
        part = torch.linalg.solve_triangular(root, self.weight[:, gone].T, upper=False)
        self.weight.addmm_(part.T, half, alpha=-1)
        self.inverse.addmm_(half.T, half, alpha=-1)
        self.gone[channels] = True

    def compact(self, stays: Tensor) -> None:
        """Keep only the channels at the given positions."""
        size = self.channels * self.width
        rest = torch.arange(size, len(self.inverse), device=stays.device)
        columns = torch.cat([self._columns(stays), rest])
        self.weight, self.inverse = self.weight[:, columns], self.inverse[columns][:, columns]
        self.channels, self.gone = len(stays), self.gone[stays]

    def part(self, channels: Tensor) -> _State:
        """Return the state of a problem in which only ``channels`` can leave."""
        part = object.__new__(_State)
        part.channels, part.width, part.unit = len(channels), self.width, self.unit
        columns = self._columns(channels)
        part.weight, part.inverse = self.weight[:, columns], self.inverse[columns][:, columns]
        part.gone = self.gone[channels]
        return part

    def _columns(self, channels: Tensor) -> Tensor:
        within = torch.arange(self.width, device=channels.device)
        return (channels.unsqueeze(1) * self.width + within).flatten()
