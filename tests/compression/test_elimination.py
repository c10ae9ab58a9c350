"""Block elimination: orders and losses against least squares with the columns that are left."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.compression.elimination import Curve, Reader, elimination_order


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reader(channels: int, width: int, extra: int = 0, filters: int = 5, seed: int = 0) -> Reader:
    """Return a layer with correlated inputs, whose columns belong to channels in a random order."""
    n = channels * width + extra
    x = drawn(3 * n, n, seed=seed) @ drawn(n, n, seed=seed + 1)
    places = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: channels * width]
    return Reader(drawn(filters, n, seed=seed + 2), x.T @ x / len(x), places.view(channels, width))


def loss(readers: Iterable[Reader], gone: Sequence[int]) -> float:
    """Return what the readers lose without the channels ``gone``, by least squares in numpy."""
    total = 0.0
    for r in readers:
        root = np.linalg.cholesky(r.moment.numpy()).T
        target = root @ r.weight.numpy().T
        keep = np.setdiff1d(np.arange(len(root)), r.blocks[list(gone)].flatten().numpy())
        solution = np.linalg.lstsq(root[:, keep], target, rcond=None)[0] if len(keep) else np.zeros((0, len(r.weight)))
        total += float(((target - root[:, keep] @ solution) ** 2).sum() / (target**2).sum())
    return total


def assert_losses(readers: Sequence[Reader], curve: Curve, every: int = 1) -> None:
    channels = len(readers[0].blocks)
    assert sorted(curve.order.tolist()) == list(range(channels))
    assert curve.losses.dtype == torch.float64
    assert curve.losses.shape == (channels + 1,)
    assert curve.losses[0] == 0
    assert (curve.losses.diff() >= 0).all()
    for count in range(0, channels + 1, every):
        expected = loss(readers, curve.order[:count].tolist())
        assert float(curve.losses[count]) == pytest.approx(expected, rel=1e-8, abs=1e-10)


READERS: dict[str, list[Reader]] = {
    "one": [reader(7, 1)],
    "blocks of four": [reader(6, 4)],
    "blocks of nine": [reader(5, 9)],
    "extra columns": [reader(6, 1, extra=5)],
    "blocks and extra columns": [reader(5, 4, extra=7)],
    "several": [reader(6, 1, seed=1), reader(6, 4, extra=3, seed=4), reader(6, 9, filters=2, seed=7)],
    "one channel": [reader(1, 4, extra=2)],
    "one column": [reader(1, 1)],
    "two channels": [reader(2, 1, filters=1)],
    "more filters than columns": [reader(4, 1, filters=30)],
}


@pytest.mark.parametrize("name", READERS)
def test_losses_are_those_of_least_squares_with_what_is_left(name: str) -> None:
    assert_losses(READERS[name], elimination_order(READERS[name]))


@pytest.mark.parametrize("name", READERS)
def test_every_channel_is_the_cheapest_at_its_turn(name: str) -> None:
    readers = READERS[name]
    order = elimination_order(readers).order.tolist()
    for turn, channel in enumerate(order):
        costs = {other: loss(readers, [*order[:turn], other]) for other in order[turn:]}
        assert costs[channel] <= min(costs.values()) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_exhaustive_for_the_first_channel_never_better_and_near(seed: int) -> None:
    readers = [reader(7, 1 + seed % 2, extra=seed % 3, seed=3 * seed), reader(7, 1, seed=3 * seed + 50)]
    curve = elimination_order(readers)
    ratios = []
    for count in range(1, 7):
        best = min(loss(readers, gone) for gone in itertools.combinations(range(7), count))
        ratios.append(float(curve.losses[count]) / best)
    assert ratios[0] == pytest.approx(1, rel=1e-8)
    assert min(ratios) >= 1 - 1e-8
    assert max(ratios) < 2
    assert sum(ratio < 1 + 1e-8 for ratio in ratios) >= 2


@given(
    channels=st.integers(1, 6),
    width=st.integers(1, 3),
    extra=st.integers(0, 3),
    filters=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_losses_of_any_small_problem(channels: int, width: int, extra: int, filters: int, seed: int) -> None:
    readers = [reader(channels, width, extra, filters, seed), reader(channels, 1, 1, 2, seed + 9)]
    assert_losses(readers, elimination_order(readers))


def test_the_order_of_names_and_the_scale_of_outputs_do_not_matter() -> None:
    one, two = reader(9, 2, seed=1), reader(9, 1, seed=5)
    curve = elimination_order([one, two])
    louder = elimination_order([two, Reader(one.weight * 7, one.moment * 3, one.blocks)])
    assert torch.equal(curve.order, louder.order)
    torch.testing.assert_close(curve.losses, louder.losses)
    back = torch.arange(8, -1, -1)
    turned = elimination_order([Reader(r.weight, r.moment, r.blocks[back]) for r in (one, two)])
    assert torch.equal(back[turned.order], curve.order)


# --- rounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "width"), [(64, 1), (127, 1), (150, 1), (300, 1), (130, 4)])
def test_rounds_of_many_channels_record_the_losses_of_their_sets(channels: int, width: int) -> None:
    readers = [reader(channels, width, extra=3, seed=2), reader(channels, 1, seed=6)]
    assert_losses(readers, elimination_order(readers), every=29)


def one_by_one(readers: Sequence[Reader]) -> Curve:
    """Return the greedy curve, by inverses of the moments of what is left."""
    gone: list[int] = []
    losses = [0.0]
    channels = len(readers[0].blocks)
    while len(gone) < channels:
        total = np.zeros(channels)
        for r in readers:
            left = np.setdiff1d(np.arange(len(r.moment)), r.blocks[gone].flatten().numpy())
            h, w = r.moment.numpy(), r.weight.numpy()
            fitted = np.linalg.solve(h[np.ix_(left, left)], h[left] @ w.T).T
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            energy = float(((w @ h) * w).sum())
            for channel in set(range(channels)) - set(gone):
                at = np.searchsorted(left, r.blocks[channel].numpy())
                part = fitted[:, at]
                total[channel] += float((part @ np.linalg.inv(inverse[np.ix_(at, at)]) * part).sum()) / energy
        total[gone] = np.inf
        gone.append(int(total.argmin()))
        losses.append(losses[-1] + total.min())
    return Curve(torch.tensor(gone), torch.tensor(losses, dtype=torch.float64))


@pytest.mark.parametrize("channels", [64, 100])
def test_up_to_127_channels_leave_one_by_one(channels: int) -> None:
    readers = [reader(channels, 1, extra=2, seed=3)]
    exact, curve = one_by_one(readers), elimination_order(readers)
    assert torch.equal(exact.order, curve.order)
    torch.testing.assert_close(exact.losses, curve.losses, rtol=1e-7, atol=1e-9)


def test_rounds_lose_hardly_more_than_one_by_one() -> None:
    readers = [reader(200, 1, seed=3), reader(200, 1, seed=8)]
    exact, curve = one_by_one(readers), elimination_order(readers)
    assert not torch.equal(exact.order, curve.order)
    middle = slice(20, 190)
    assert (curve.losses[middle] / exact.losses[middle]).max() < 1.1


# --- known answers ------------------------------------------------------------------------------------------


def moment(x: Tensor, ridge: float = 1e-12) -> Tensor:
    second = x.T @ x / len(x)
    return second + ridge * second.trace() / len(second) * torch.eye(len(second), dtype=torch.float64)


def test_duplicates_and_combinations_of_others_leave_for_nothing() -> None:
    x = drawn(200, 6, seed=0)
    x = torch.cat([x, x[:, :1], x[:, 1:2] - 2 * x[:, 2:3]], 1)  # 0 = 6, 7 = 1 − 2·2
    curve = elimination_order([Reader(drawn(4, 8, seed=1), moment(x), torch.arange(8).view(8, 1))])
    first = set(curve.order[:2].tolist())
    assert len(first & {0, 6}) == len(first & {1, 2, 7}) == 1
    assert curve.losses[2] < 1e-10
    assert curve.losses[3] > 1e-3


def test_what_extra_columns_know_leaves_for_nothing() -> None:
    x = drawn(200, 6, seed=0)
    x[:, 2] = x[:, 5] - x[:, 4]  # columns 4 and 5 are of no channel
    curve = elimination_order([Reader(drawn(4, 6, seed=1), moment(x), torch.arange(4).view(4, 1))])
    assert curve.order[0] == 2
    assert curve.losses[1] < 1e-10 < 1e-3 < curve.losses[2]
    assert curve.losses[-1] < 1  # the extra columns stay


def test_unread_and_silent_channels_leave_for_nothing() -> None:
    x, weight = drawn(200, 5, seed=0), drawn(4, 5, seed=1)
    x[:, 3], weight[:, 1] = 0, 0
    curve = elimination_order([Reader(weight, moment(x, 1e-9), torch.arange(5).view(5, 1))])
    # What is not read costs nothing even before others make up for it.
    assert set(curve.order[:2].tolist()) == {1, 3}
    assert curve.losses[2] < 1e-8


def test_all_that_a_layer_reads_is_worth_the_energy_of_its_outputs() -> None:
    curve = elimination_order([reader(6, 2)])
    assert float(curve.losses[-1]) == pytest.approx(1)
    assert float(elimination_order([reader(6, 2), reader(6, 1)]).losses[-1]) == pytest.approx(2)


def test_independent_inputs_are_worth_their_own_energy() -> None:
    weight, scale = drawn(4, 8, seed=1), torch.arange(1.0, 9.0, dtype=torch.float64)
    curve = elimination_order([Reader(weight, scale.diag(), torch.arange(8).view(4, 2))])
    energies = (weight.square().sum(0) * scale).view(4, 2).sum(1)
    assert torch.equal(curve.order, energies.argsort())
    torch.testing.assert_close(curve.losses[1:], energies.sort().values.cumsum(0) / energies.sum())


def test_a_layer_of_zeros_loses_nothing() -> None:
    one, two = reader(5, 1, seed=2), reader(5, 2, seed=3)
    silent = Reader(torch.zeros_like(one.weight), one.moment, one.blocks)
    assert elimination_order([silent]).losses.abs().max() == 0
    assert torch.equal(elimination_order([silent, two]).order, elimination_order([two]).order)


def test_inputs_do_not_change() -> None:
    one = reader(80, 2, extra=1)
    before = [one.weight.clone(), one.moment.clone(), one.blocks.clone()]
    elimination_order([one])
    assert all(torch.equal(a, b) for a, b in zip((one.weight, one.moment, one.blocks), before, strict=True))
