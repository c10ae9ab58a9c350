"""How much to remove from each layer.

A layer offers *options*: costs (parameters or multiply-accumulates) that it can be cut down to, in falling order, the
first one dense unless it has to be cut, and the loss of energy of each. An allocation puts the reductions of single
layers, from one option to a later one, in an order; the target determines how many of them are carried out::

    uniform_order(options)    every layer gives the same share of its cost
    greedy_order(options)     the least energy per cost goes first, over all layers
    energy_order(options)     every layer keeps the same share of its energy
    allocate(options, reductions, target) -> the chosen option of each layer

Filter pruning removes channels in an order of its own (``removals``); :func:`nearest` returns how many.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Options:
    """The sizes that one layer can be cut down to.

    Args:
        costs: the cost of each option, strictly falling; the first is dense, unless the layer has to be cut.
        losses: the loss of energy of each option, never falling; that of the dense layer is 0.
        dense: the cost of the dense layer if that is not an option; None if it is the first one.
    """

    costs: tuple[int, ...]
    losses: tuple[float, ...]
    dense: int | None = None


@dataclass(frozen=True)
class Reduction:
    """The reduction of a layer to one of its options.

    Args:
        layer: index of the layer.
        option: index of the option.
    """

    layer: int
    option: int


def allocate(options: Sequence[Options], reductions: Sequence[Reduction], target: float) -> list[int]:
    """Carry out reductions in order until the total cost is as near as possible to ``target``.

    If the last reduction would skip options of its layer, the nearest of the skipped options is taken.

    Args:
        options: the options of each layer.
        reductions: the reductions, in order.
        target: the total cost to reach.

    Returns:
        The index of the chosen option of each layer.
    """
    chosen = [0] * len(options)
    total = sum(layer.costs[0] for layer in options)
    for reduction in reductions:
        costs = options[reduction.layer].costs
        others = total - costs[chosen[reduction.layer]]
        if others + costs[reduction.option] > target:
            total = others + costs[reduction.option]
            chosen[reduction.layer] = reduction.option
            continue
        within = range(chosen[reduction.layer], reduction.option + 1)
        chosen[reduction.layer] = min(within, key=lambda i: (abs(others + costs[i] - target), i))
        break
    return chosen


def uniform_order(options: Sequence[Options]) -> list[Reduction]:
    """Order the reductions so that every layer removes the same share of its cost, each to its nearest option."""
    events = []
    for layer, offer in enumerate(options):
        dense = offer.costs[0] if offer.dense is None else offer.dense
        for option in range(1, len(offer.costs)):
            halfway = (offer.costs[option - 1] + offer.costs[option]) / (2 * dense)
            events.append((1 - halfway, layer, option))
    return [Reduction(layer, option) for _, layer, option in sorted(events)]


def greedy_order(options: Sequence[Options]) -> list[Reduction]:
    """Order the reductions by loss per parameter saved, along the lower convex hull of each layer's curve.

    Between hull points the slope rises, so the greedy order is optimal for every budget that it meets exactly:
    the Lagrangian argument of rate-distortion optimisation (Shoham and Gersho 1988).
    """
    events = []
    for layer, offer in enumerate(options):
        corners = _lower_hull(offer)
        for a, b in pairwise(corners):
            events.append((_slope(offer, a, b), layer, b))
    return [Reduction(layer, option) for _, layer, option in sorted(events)]


def energy_order(options: Sequence[Options]) -> list[Reduction]:
    """Order the reductions so that every layer loses about the same share of its energy, whatever cost that saves."""
    events = [
        (loss, layer, option)
        for layer, offer in enumerate(options)
        for option, loss in enumerate(offer.losses)
        if option
    ]
    return [Reduction(layer, option) for _, layer, option in sorted(events)]


def nearest(cost: Callable[[int], int], most: int, target: float) -> int:
    """Return the n in 0..most whose ``cost(n)`` is nearest to ``target``; the smaller n if two are equally near.

    Args:
        cost: a strictly falling function.
        most: the largest n.
        target: the cost to reach.
    """
    after = bisect.bisect_left(range(most + 1), -target, key=lambda n: -cost(n))
    if after == 0:
        return 0
    if after > most or cost(after - 1) - target <= target - cost(after):
        return after - 1
    return after


ORDERS = {"uniform": uniform_order, "global": greedy_order, "energy": energy_order}


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
