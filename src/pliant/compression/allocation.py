"""How much to take from each layer.

A layer offers *options*: costs (parameters or multiply-accumulates) it can be cut down to, in falling order, the
first one dense, and for each the loss of energy that comes with it. An allocation orders single steps of single
layers from the first to the last; the budget decides how many of them are taken::

    uniform_steps(options)    every layer gives the same share of its cost
    greedy_steps(options)     the least energy per cost goes first, over all layers
    energy_steps(options)     every layer keeps the same share of its energy
    allocate(options, steps, target) -> the chosen option of each layer
    nearest(cost, steps, target)        the search that the above and filter pruning share
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Options:
    """What one layer can be cut down to. ``costs`` fall strictly; ``losses`` never fall and start at 0."""

    costs: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """Layer ``layer`` goes down to its option ``option`` (positions)."""

    layer: int
    option: int


def allocate(options: Sequence[Options], steps: Sequence[Step], target: float) -> list[int]:
    """Take steps in order until the total cost is as near as it gets to ``target``; return an option per layer.

    Where the last step leaps over options of its layer, the one of them that comes nearest is taken.
    """
    chosen = [0] * len(options)
    total = sum(layer.costs[0] for layer in options)
    for step in steps:
        costs = options[step.layer].costs
        rest = total - costs[chosen[step.layer]]
        if rest + costs[step.option] > target:
            total = rest + costs[step.option]
            chosen[step.layer] = step.option
            continue
        within = range(chosen[step.layer], step.option + 1)
        chosen[step.layer] = min(within, key=lambda i: (abs(rest + costs[i] - target), i))
        break
    return chosen


def uniform_steps(options: Sequence[Options]) -> list[Step]:
    """Order the steps so that every layer removes the same share of its cost, each to its nearest option."""
    events = []
    for layer, offer in enumerate(options):
        for option in range(1, len(offer.costs)):
            halfway = (offer.costs[option - 1] + offer.costs[option]) / (2 * offer.costs[0])
            events.append((1 - halfway, layer, option))
    return [Step(layer, option) for _, layer, option in sorted(events)]


def greedy_steps(options: Sequence[Options]) -> list[Step]:
    """Order the steps by loss per parameter saved, along the lower convex hull of each layer's curve.

    Between hull points the slope rises, so the greedy order is optimal for every budget that it meets exactly:
    the Lagrangian argument of rate-distortion optimisation (Shoham and Gersho 1988).
    """
    events = []
    for layer, offer in enumerate(options):
        corners = _lower_hull(offer)
        for a, b in pairwise(corners):
            events.append((_slope(offer, a, b), layer, b))
    return [Step(layer, option) for _, layer, option in sorted(events)]


def energy_steps(options: Sequence[Options]) -> list[Step]:
    """Order the steps so that every layer loses about the same share of its energy, whatever that saves."""
    events = [
        (loss, layer, option)
        for layer, offer in enumerate(options)
        for option, loss in enumerate(offer.losses)
        if option
    ]
    return [Step(layer, option) for _, layer, option in sorted(events)]


def nearest(cost: Callable[[int], int], steps: int, target: float) -> int:
    """Return the n in 0..steps whose ``cost(n)``, which must fall strictly, is nearest to ``target``.

    The smaller one of two that are equally near.
    """
    after = bisect.bisect_left(range(steps + 1), -target, key=lambda n: -cost(n))
    if after == 0:
        return 0
    if after > steps or cost(after - 1) - target <= target - cost(after):
        return after - 1
    return after


STEPS = {"uniform": uniform_steps, "global": greedy_steps, "energy": energy_steps}


def _lower_hull(offer: Options) -> list[int]:
    """Return the options on the lower convex hull of loss over saved cost, from dense to smallest."""
    hull: list[int] = []
    for i in range(len(offer.costs)):
        while len(hull) > 1 and _slope(offer, hull[-1], i) <= _slope(offer, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def _slope(offer: Options, a: int, b: int) -> float:
    return (offer.losses[b] - offer.losses[a]) / (offer.costs[a] - offer.costs[b])
