"""The reference that may train again."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pliant.errors import BadInput
from pliant.experiments import baselines
from pliant.experiments.baselines import (
    cycles,
    rates,
    retrain,
)

ORIGINAL = [0.1] * 50 + [0.01] * 25 + [0.001] * 25


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("FT", {0: 0.001, 10: 0.001, 19: 0.001}),
        ("LRW", {0: 0.001, 19: 0.001}),
        ("SLR", {0: 0.1 / 3, 1: 0.2 / 3, 2: 0.1, 10: 0.1, 11: 0.01, 15: 0.01, 16: 0.001, 19: 0.001}),
        ("CLR", {0: 0.1 / 3, 2: 0.1, 11: 0.0505, 19: 0.001 + 0.0495 * (1 + math.cos(math.pi * 17 / 18))}),
        ("LLR", {0: 0.1 / 3, 1: 0.2 / 3, 2: 0.1, 11: 0.05, 19: 0.1 / 18}),
    ],
)
def test_learning_rates_of_retraining(schedule: str, expected: dict[int, float]) -> None:
    found = rates(schedule, ORIGINAL, 20)
    assert len(found) == 20
    assert {step: found[step] for step in expected} == pytest.approx(expected)


def test_a_squeezed_schedule_warms_up_once() -> None:
    found = rates("SLR", [0.02, 0.06, *ORIGINAL], 20)
    assert found == pytest.approx(rates("SLR", ORIGINAL, 20))


def test_rewinding_repeats_the_end_of_the_training() -> None:
    assert rates("LRW", ORIGINAL, 60) == ORIGINAL[40:]
    assert rates("LRW", ORIGINAL, 100) == ORIGINAL


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [("LRW", 101, "101 steps"), ("FT", 0, "0 steps"), ("LRR", 5, "did you mean")],
)
def test_retraining_that_cannot_be_is_refused(schedule: str, steps: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        rates(schedule, ORIGINAL, steps)


@pytest.mark.parametrize("schedule", baselines.retraining.SCHEDULES)
def test_a_single_step_of_retraining_has_a_rate(schedule: str) -> None:
    (rate,) = rates(schedule, ORIGINAL, 1)
    assert rate > 0


def test_retraining_learns_and_keeps_zeros() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[3].bias.zero_()  # a bias may be 0 by chance, and is free
    before = functional.cross_entropy(model(x), y)
    retrain(model, [(x, y)] * 30, rates("LLR", [0.3], 30))
    assert functional.cross_entropy(model(x), y) < before - 0.3
    assert torch.equal(model[0].weight[:, ::2], torch.zeros(16, 3))
    assert (model[0].weight[:, 1::2] != 0).all()
    assert (model[3].bias != 0).all()
    assert not model.training
    with pytest.raises(ValueError, match="zip"):
        retrain(model, [(x, y)], [0.1, 0.1])


def test_cycles_of_pruning_take_the_same_share_of_what_is_left() -> None:
    assert cycles(0.875, 3) == pytest.approx([0.5, 0.75, 0.875])
    assert cycles(0.7, 1) == pytest.approx([0.7])
