"""In which order the channels of all groups leave, and what that saves.

The channels of a group leave in one order, and a group *stops* only at the numbers that the controls allow: ``stops``,
counts of removed channels, ascending. The first one is where it starts: 0, unless it has to lose channels. An
allocation puts the *steps* of all groups, each from one stop to the next, in a row; a ratio says how many are taken::

    uniform_steps(channels, stops)        every group loses the same share of its channels
    greedy_steps(size, energies, stops)   the least energy per freed cost goes first; costs are those of the dense model
    share_steps(losses, stops)            every group loses the same share of what it can lose
    curve_steps(size, curves, stops)      the least loss per freed cost goes first; costs are those of the moment
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from pliant.compression.allocation import nearest
from pliant.structure import ChannelGroup, larger_counts, largest_sound

Step = tuple[int, int]
"""The index of a group, and how many channels it has lost afterwards."""
Stops = Sequence[Sequence[int]]

_TINY = 2.0**-1022  # the smallest normal float: a group that can lose nothing has shares of 0


class Size:
    """The number of parameters in all tensors that the groups touch, for any number of removed channels.

    With ``applied``, how often each weight is applied, it is the number of multiply-accumulates instead.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], applied: Mapping[str, int] | None = None
    ) -> None:
        parameters = dict(model.named_parameters())
        # tensor → dim → position of the group → positions per channel
        self.touched: dict[str, dict[int, dict[int, int]]] = {}
        for g, group in enumerate(groups):
            for slot in group.slots:
                for name, dim in slot.tensors:
                    if name in parameters and (applied is None or applied.get(name)):
                        self.touched.setdefault(name, {}).setdefault(dim, {})[g] = slot.indices.shape[1]
        self.shapes = {name: tuple(parameters[name].shape) for name in self.touched}
        self.times = {name: 1 if applied is None else applied[name] for name in self.touched}
        everything = {g: group.channels for g, group in enumerate(groups)}
        self.compressible = {name: self._entries(name, {}) - self._entries(name, everything) for name in self.touched}

    def after(self, removed: Mapping[int, int]) -> int:
        """Return the remaining number when the group at index g has lost ``removed[g]`` channels."""
        return sum(self._entries(name, removed) for name in self.touched)

    def _entries(self, name: str, removed: Mapping[int, int]) -> int:
        shape = list(self.shapes[name])
        for dim, widths in self.touched[name].items():
            shape[dim] -= sum(removed.get(g, 0) * width for g, width in widths.items())
        return prod(shape) * self.times[name]


class Shrinking:
    """A size while channels leave; only the tensors that a group touches are counted again."""

    def __init__(self, size: Size, starts: Mapping[int, int]) -> None:
        self.total = size.after({})
        self.shapes = {name: list(shape) for name, shape in size.shapes.items()}
        self.times = size.times
        self.places: dict[int, dict[str, list[tuple[int, int]]]] = {}
        for name, dims in size.touched.items():
            for dim, widths in dims.items():
                for g, width in widths.items():
                    self.places.setdefault(g, {}).setdefault(name, []).append((dim, width))
        for g, count in starts.items():
            self.remove(g, count)

    def freed(self, group: int, channels: int) -> int:
        """Return what removing so many channels of a group would free now."""
        return sum(
            (prod(self.shapes[name]) - prod(self._without(name, dims, channels))) * self.times[name]
            for name, dims in self.places.get(group, {}).items()
        )

    def remove(self, group: int, channels: int) -> int:
        """Remove channels of a group, and return the total."""
        self.total -= self.freed(group, channels)
        for name, dims in self.places.get(group, {}).items():
            self.shapes[name] = self._without(name, dims, channels)
        return self.total

    def _without(self, name: str, dims: Iterable[tuple[int, int]], channels: int) -> list[int]:
        shape = self.shapes[name].copy()
        for dim, width in dims:
            shape[dim] -= channels * width
        return shape


@dataclass(frozen=True, eq=False)
class Removals:
    """The order in which channels leave, the same for all ratios.

    Args:
        groups: the groups that lose channels.
        costs: the cost that the ratio counts.
        orders: for each group, its channels, the one that leaves first first.
        starts: for each group, how many channels it loses in any case.
        steps: the further removals in order.
        left: the cost after the starts and the first n steps, for n = 0, 1, ...
    """

    groups: tuple[ChannelGroup, ...]
    costs: Size
    orders: tuple[Tensor, ...]
    starts: tuple[int, ...]
    steps: tuple[Step, ...]
    left: tuple[int, ...]

    @classmethod
    def of(
        cls,
        groups: tuple[ChannelGroup, ...],
        costs: Size,
        orders: Iterable[Tensor],
        stops: Stops,
        steps: Sequence[Step],
    ) -> Removals:
        """Return the removals of these steps, with their costs."""
        starts = [stop[0] for stop in stops]
        state = Shrinking(costs, dict(enumerate(starts)))
        left, removed = [state.total], starts.copy()
        for g, stop in steps:
            left.append(state.remove(g, stop - removed[g]))
            removed[g] = stop
        return cls(groups, costs, tuple(orders), tuple(starts), tuple(steps), tuple(left))

    def counts(self, target: float) -> list[int]:
        """Return how many channels each group loses for the total cost nearest to ``target``."""
        n = nearest(self.left.__getitem__, len(self.steps), target)
        return list({**dict(enumerate(self.starts)), **dict(self.steps[:n])}.values())


def smaller_removals(
    groups: Sequence[ChannelGroup], counts: Sequence[int], fault: Callable[[Mapping[int, int]], str | None]
) -> tuple[list[int], dict[str, str]]:
    """Return removals that a network works with, and layer → reason for groups that lose less than planned.

    Args:
        groups: the groups.
        counts: how many channels each was to lose.
        fault: returns why the network fails if groups, by index, lose so many channels; None if it works.
    """
    asked = {g: count for g, count in enumerate(counts) if count}
    sound, failed = largest_sound(list(asked), lambda some: fault({g: asked[g] for g in some}))
    good = {g: asked[g] for g in sound}
    limits: dict[str, str] = {}
    for g, why in failed:
        group = groups[g]
        kept = group.channels - asked[g]
        runs = group.counts or range(1, group.channels)
        offers = [count for count in larger_counts(kept, group.channels) if count in runs]
        stay = next((n for n in offers if fault({**good, g: group.channels - n}) is None), group.channels)
        good[g] = group.channels - stay
        limits |= dict.fromkeys((s.module for s in group.producers), f"keeps {stay} channels: with {kept}, {why}")
    return [good.get(g, 0) for g in range(len(groups))], limits


def uniform_steps(channels: Sequence[int], stops: Stops) -> list[Step]:
    """Order the steps so that every prefix takes about the same share of each group's channels."""
    events = [
        ((a + b) / (2 * count), g, b)
        for g, (count, offer) in enumerate(zip(channels, stops, strict=True))
        for a, b in pairwise(offer)
    ]
    return [(g, b) for _, g, b in sorted(events)]


def greedy_steps(size: Size, energies: Sequence[Sequence[float]], stops: Stops) -> list[Step]:
    """Order the steps by energy per cost freed from the dense model.

    Args:
        size: the cost.
        energies: for each group, the energies of its channels in the order in which they leave, never falling.
        stops: for each group, where it may stop.
    """
    dense = Shrinking(size, {})
    events = []
    for g, (values, offer) in enumerate(zip(energies, stops, strict=True)):
        freed = max(1, dense.freed(g, 1))  # it is 0 if the cost of no layer is known
        last = 0.0
        for a, b in pairwise(offer):
            last = max(last, sum(values[a:b]) / ((b - a) * freed))  # rounding must not turn equal ones around
            events.append((last, g, b))
    return [(g, b) for _, g, b in sorted(events)]


def share_steps(losses: Sequence[Sequence[float]], stops: Stops) -> list[Step]:
    """Order the steps by the share of the group's loss that they reach.

    Args:
        losses: for each group, the loss after 0, 1, ..., all channels, never falling.
        stops: for each group, where it may stop.
    """
    events = [
        (values[stop] / max(values[-1], _TINY), g, stop)
        for g, (values, offer) in enumerate(zip(losses, stops, strict=True))
        for stop in offer[1:]
    ]
    return [(g, stop) for _, g, stop in sorted(events)]


def curve_steps(size: Size, losses: Sequence[Sequence[float]], stops: Stops) -> list[Step]:
    """Order the steps by loss per cost freed at the moment, along the lower convex hull of each group's losses.

    The groups go from corner to corner of their hulls. What a channel frees shrinks while other groups lose channels,
    so the price of a step only rises: a price from before is a lower bound, and only the lowest one is looked at again.

    Args:
        size: the cost.
        losses: for each group, the loss after 0, 1, ..., all channels, never falling.
        stops: for each group, where it may stop.
    """
    state = Shrinking(size, {g: offer[0] for g, offer in enumerate(stops)})
    corners = [_hull(values, offer) for values, offer in zip(losses, stops, strict=True)]
    at = [0] * len(corners)  # the corner of each group

    def price(g: int) -> float:
        a, b = corners[g][at[g]], corners[g][at[g] + 1]
        return (losses[g][b] - losses[g][a]) / max(1, state.freed(g, b - a))

    heap = [(price(g), g) for g, own in enumerate(corners) if len(own) > 1]
    heapq.heapify(heap)
    steps: list[Step] = []
    while heap:
        g = heap[0][1]
        now = (price(g), g)
        if len(heap) > 1 and now > min(heap[1:3]):
            heapq.heapreplace(heap, now)
            continue
        a, b = corners[g][at[g]], corners[g][at[g] + 1]
        offer = stops[g]
        steps += [(g, stop) for stop in offer[bisect_right(offer, a) : bisect_right(offer, b)]]
        state.remove(g, b - a)
        at[g] += 1
        if at[g] + 1 < len(corners[g]):
            heapq.heapreplace(heap, (price(g), g))
        else:
            heapq.heappop(heap)
    return steps


def _hull(losses: Sequence[float], stops: Sequence[int]) -> list[int]:
    """Return the stops on the lower convex hull of loss over removed channels."""

    def slope(a: int, b: int) -> float:
        return (losses[b] - losses[a]) / (b - a)

    hull: list[int] = []
    for stop in stops:
        while len(hull) > 1 and slope(hull[-1], stop) < slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(stop)
    return hull
