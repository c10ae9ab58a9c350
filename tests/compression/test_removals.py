"""In which order channels leave: by curves of losses, at the costs of the moment, as far as the controls allow."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, filters
from pliant.compression.elimination import Curve
from pliant.compression.filters import Channels
from pliant.compression.removals import Removals, Shrinking, Size, curve_steps, share_steps, uniform_steps

WIDTHS = (5, 4, 6)


class Branches(nn.Module):
    """Hidden layers side by side: what a channel costs does not depend on the other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(3 + i, width) for i, width in enumerate(WIDTHS))
        self.out = nn.ModuleList(nn.Linear(width, 2 + 2 * i) for i, width in enumerate(WIDTHS))

    def forward(self, x: Tensor) -> Tensor:
        hidden = [layer(x[:, : layer.in_features]).relu() for layer in self.into]
        return torch.cat([layer(h) for layer, h in zip(self.out, hidden, strict=True)], 1)


def chain() -> nn.Module:
    """Hidden layers one behind the other: a channel costs less when those beside it have left."""
    widths = (7, *WIDTHS, 3)
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers)).append(nn.Linear(3, 3))


def random_losses(channels: Sequence[int], seed: int) -> list[list[float]]:
    draw = torch.Generator().manual_seed(seed)
    return [[0.0, *torch.rand(n, generator=draw, dtype=torch.float64).cumsum(0).tolist()] for n in channels]


def with_curves(model: nn.Module, x: Tensor, seed: int = 0) -> Channels:
    analysis = FilterPruning().analyse(model, x)
    losses = random_losses([group.channels for group in analysis.groups], seed)
    draw = torch.Generator().manual_seed(seed)
    curves = [
        Curve(torch.randperm(group.channels, generator=draw), torch.tensor(values, dtype=torch.float64))
        for group, values in zip(analysis.groups, losses, strict=True)
    ]
    return dataclasses.replace(analysis, curves=tuple(curves))


def lost(analysis: Channels, counts: Sequence[int]) -> float:
    assert analysis.curves is not None
    return sum(float(curve.losses[n]) for curve, n in zip(analysis.curves, counts, strict=True))


def stops_of(analysis: Channels) -> list[list[int]]:
    return [list(range(group.channels)) for group in analysis.groups]


def losses_of(analysis: Channels) -> list[list[float]]:
    assert analysis.curves is not None
    return [curve.losses.tolist() for curve in analysis.curves]


# --- the least loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_is_the_least_of_all_choices_that_cost_as_little(seed: int) -> None:
    model, x = Branches(), torch.randn(2, 5)
    analysis = with_curves(model, x, seed)
    size, stops = Size(model, analysis.groups), stops_of(analysis)
    every = [
        (size.after(dict(enumerate(counts))), lost(analysis, counts))
        for counts in itertools.product(*(range(group.channels) for group in analysis.groups))
    ]
    steps = curve_steps(size, losses_of(analysis), stops)
    corners = set(greedy(size, losses_of(analysis), stops)[1])
    state = [0] * len(stops)
    checked = 0
    for g, stop in steps:
        state[g] = stop
        if tuple(state) in corners:  # between two corners of a hull there may be something better
            cost = size.after(dict(enumerate(state)))
            assert lost(analysis, state) <= min(loss for c, loss in every if c <= cost) + 1e-12
            checked += 1
    assert checked >= 3
    assert state == [group.channels - 1 for group in analysis.groups]


def greedy(
    size: Size, losses: Sequence[Sequence[float]], stops: Sequence[Sequence[int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, ...]]]:
    """Return steps and the states at corners, by evaluating everything anew: from each group the steepest chord."""
    state = [offer[0] for offer in stops]
    steps: list[tuple[int, int]] = []
    corners = []
    while True:
        best = None
        for g, offer in enumerate(stops):
            ahead = [stop for stop in offer if stop > state[g]]
            if ahead:
                gains = [(losses[g][b] - losses[g][state[g]]) / (b - state[g]) for b in ahead]
                b = min(zip(gains, ahead, strict=True))[1]
                now = size.after(dict(enumerate(state)))
                freed = now - size.after(dict(enumerate([*state[:g], b, *state[g + 1 :]])))
                price = (losses[g][b] - losses[g][state[g]]) / freed
                best = min(best, (price, g, b)) if best else (price, g, b)
        if best is None:
            return steps, corners
        _, g, b = best
        steps += [(g, stop) for stop in stops[g] if state[g] < stop <= b]
        state[g] = b
        corners.append(tuple(state))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cost", ["params", "macs"])
def test_costs_are_those_of_the_moment(seed: int, cost: str) -> None:
    model, x = chain(), torch.randn(2, 7)
    analysis = with_curves(model, x, seed)
    size = Size(model, analysis.groups, analysis.applied if cost == "macs" else None)
    for stops in (stops_of(analysis), [list(range(1, g.channels, 2)) for g in analysis.groups]):
        steps = curve_steps(size, losses_of(analysis), stops)
        assert steps == greedy(size, losses_of(analysis), stops)[0]
        removals = Removals.of(analysis.groups, size, [c.order for c in analysis.curves or ()], stops, steps)
        counts = [offer[0] for offer in stops]
        assert removals.left[0] == size.after(dict(enumerate(counts)))
        for (g, stop), left in zip(steps, removals.left[1:], strict=True):
            counts[g] = stop
            assert left == size.after(dict(enumerate(counts)))
        assert removals.counts(0) == counts == [offer[-1] for offer in stops]


def test_what_a_channel_frees_shrinks_with_its_neighbours() -> None:
    model = chain()
    groups = FilterPruning().analyse(model, torch.randn(2, 7)).groups
    state = Shrinking(Size(model, groups), {})
    before = state.freed(0, 1)
    assert before == 7 + 1 + WIDTHS[1]
    total = state.total
    assert state.remove(1, 2) == state.total == total - 2 * (WIDTHS[0] + 1 + WIDTHS[2])
    assert state.freed(0, 1) == before - 2


def test_thousands_of_channels_are_looked_at_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 256
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(9)))
    groups = FilterPruning().analyse(model, torch.randn(2, width)).groups
    asked = 0
    freed = Shrinking.freed

    def counted(*arguments: Any) -> int:
        nonlocal asked
        asked += 1
        return freed(*arguments)

    monkeypatch.setattr(Shrinking, "freed", counted)
    losses = [[0.0, *sorted(values)] for values in random_losses([width] * len(groups), 0)]
    steps = curve_steps(Size(model, groups), losses, [range(width) for _ in groups])
    assert len(steps) == 8 * (width - 1)
    assert asked < 10 * len(steps)


# --- plans by curves ----------------------------------------------------------------------------------------


def kept(plan: Any) -> dict[str, tuple[int, ...] | None]:
    return {layer.name: layer.outputs for layer in plan.layers}


def two() -> tuple[nn.Module, Tensor, Channels]:
    """Two layers of four and two channels, of which the first loses little: in the order 2, 0, 3, 1."""
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 6)), torch.randn(2, 6)
    analysis = FilterPruning().analyse(model, x)
    curves = (
        Curve(torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0], dtype=torch.float64)),
        Curve(torch.tensor([1, 0]), torch.tensor([0.0, 3.0, 10.0], dtype=torch.float64)),
    )
    assert [group.channels for group in analysis.groups] == [4, 2]
    return model, x, dataclasses.replace(analysis, curves=curves)


@pytest.mark.parametrize(
    ("allocation", "ratio", "first", "second"),
    [
        ("global", 0.2, (0, 1, 3), None),
        ("global", 0.35, (1, 3), None),
        ("global", 0.5, (1,), None),
        ("uniform", 0.35, (0, 1, 3), (0,)),
        ("energy", 0.2, (0, 1, 3), None),
        ("energy", 0.6, (1, 3), (0,)),  # 0.2 of the loss, then 0.3 of it
        ("energy", 0.99, (1,), (0,)),
    ],
)
def test_channels_leave_in_the_order_of_the_curves(
    allocation: str, ratio: float, first: tuple[int, ...], second: tuple[int, ...] | None
) -> None:
    model, x, analysis = two()
    plan = FilterPruning(ratio, allocation).plan(model, x, analysis=analysis)
    assert (kept(plan)["0"], kept(plan)["2"]) == (first, second)
    assert FilterPruning(ratio, allocation).apply(model, plan)(x).shape == (2, 6)


def test_controls_hold_for_curves() -> None:
    model, x, analysis = two()
    even = FilterPruning(0.3, multiple_of=2).plan(model, x, analysis=analysis)
    assert (kept(even)["0"], kept(even)["2"]) == ((1, 3), None)
    half = FilterPruning(0.1, at_most=0.5).plan(model, x, analysis=analysis)
    assert (kept(half)["0"], kept(half)["2"]) == ((1, 3), (0,))
    alone = FilterPruning(0.9, keep=("4",)).plan(model, x, analysis=analysis)
    assert kept(alone) == {"0": (1,), "2": None}
    assert dict(alone.refused)["2"] == "is coupled with 4, which is kept by name"
    own = FilterPruning(0.6, ratios={"0": 0.25}).plan(model, x, analysis=analysis)
    assert (kept(own)["0"], kept(own)["2"]) == ((0, 1, 3), (0,))


def test_many_ratios_share_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain(), torch.randn(2, 7)
    analysis = with_curves(model, x)
    made: list[str] = []
    monkeypatch.setattr(filters, "curve_steps", lambda *a: made.append("") or curve_steps(*a))
    fresh = [FilterPruning(r / 10).plan(model, x, analysis=dataclasses.replace(analysis)) for r in range(10)]
    assert len(made) == 10
    made.clear()
    assert [FilterPruning(r / 10).plan(model, x, analysis=analysis) for r in range(10)] == fresh
    assert len(made) == 1
    FilterPruning(0.5, cost="macs").plan(model, x, analysis=analysis)
    FilterPruning(0.5, at_least=1).plan(model, x, analysis=analysis)
    assert len(made) == 3


# --- orders -------------------------------------------------------------------------------------------------


def test_groups_step_from_stop_to_stop() -> None:
    assert uniform_steps([4, 2], [[0, 2, 3], [0, 1]]) == [(0, 2), (1, 1), (0, 3)]
    assert uniform_steps([4, 2], [[2, 3], [1]]) == [(0, 3)]
    assert share_steps([[0, 1, 2, 9, 10], [0, 5, 10]], [[0, 2, 3], [0, 1]]) == [(0, 2), (1, 1), (0, 3)]
    assert share_steps([[0.0, 0.0, 0.0]], [[0, 1]]) == [(0, 1)]


def test_a_hull_skips_what_a_longer_step_loses_less_for() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    groups = FilterPruning().analyse(model, torch.randn(2, 3)).groups
    other = [0.0, 0.5, 1.0, 1.5, 2.0]
    (group,) = groups
    size = Size(model, (group,))
    assert curve_steps(size, [[0.0, 1.0, 1.1, 1.2, 5.0]], [range(4)]) == [(0, 1), (0, 2), (0, 3)]
    assert curve_steps(size, [other], [[0, 3]]) == [(0, 3)]
    assert curve_steps(size, [other], [[2]]) == []
