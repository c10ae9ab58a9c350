"""The refit at the edges: odd normalisations, outputs and batches; and records of it that are damaged."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, HeadPruning, Magnitude, Plan, compress, compress_to
from pliant.compression.calibration import Calibration
from pliant.compression.refit import Refitter
from pliant.errors import BadInput, DamagedFile
from tests.compression.test_refit import IMAGES, TOKENS, VECTORS, attention, drawn, error, normed, perceptron, refitted

pytestmark = pytest.mark.filterwarnings("ignore:few calibration")


def record_of(plan: Plan) -> Any:
    assert plan.refit is not None
    return plan.refit


# --- normalisations -----------------------------------------------------------------------------------------


def conv_net(norm: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), norm(8, **options), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)]
    return nn.Sequential(*layers, norm(8, **options), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_batchnorm_that_uses_the_statistics_of_each_batch(ratio: float) -> None:
    model = conv_net(nn.BatchNorm2d, track_running_stats=False).double()
    cut, small, plan = refitted(model, FilterPruning(ratio), IMAGES[:2], IMAGES.split(16))
    assert "reestimated" not in record_of(plan).errors
    assert record_of(plan).errors["refitted"] < record_of(plan).errors["cut"]
    assert error(model, small, drawn(64, 3, 8, 8, seed=7)) < error(model, cut, drawn(64, 3, 8, 8, seed=7))


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_batchnorm_with_statistics_of_other_data(ratio: float) -> None:
    model = normed(conv_net(nn.BatchNorm2d), IMAGES * 2 + 1)
    cut, small, plan = refitted(model, FilterPruning(ratio), IMAGES[:2], IMAGES.split(16))
    errors = record_of(plan).errors
    assert errors["refitted"] < errors["cut"] < errors["reestimated"]
    assert error(model, small, IMAGES) < error(model, cut, IMAGES)


def test_groups_and_instances_and_layers_are_normalised() -> None:
    def group(channels: int) -> nn.Module:
        return nn.GroupNorm(1, channels)

    def instance(channels: int) -> nn.Module:
        return nn.InstanceNorm2d(channels, affine=True)

    for norm in (group, instance):
        model = conv_net(norm).double().append(nn.Linear(5, 6)).append(nn.ReLU()).append(nn.Linear(6, 5)).double()
        cut, small, _ = refitted(model, FilterPruning(0.5), IMAGES[:2], IMAGES.split(16))
        assert error(model, small, IMAGES) < error(model, cut, IMAGES)
    model = nn.Sequential(nn.LayerNorm(6), *perceptron(), nn.LayerNorm(3)).double()
    cut, small, _ = refitted(model, FilterPruning(0.5), VECTORS[:2], VECTORS.split(40))
    assert error(model, small, VECTORS) < error(model, cut, VECTORS)


@pytest.mark.parametrize("batch", [2, 13, 400])
def test_batchnorm_over_vectors(batch: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Tanh()]
    model = normed(nn.Sequential(*layers, nn.Linear(7, 3)), VECTORS)
    cut, small, _ = refitted(model, FilterPruning(0.5), VECTORS[:2], VECTORS.split(batch))
    assert error(model, small, VECTORS) <= error(model, cut, VECTORS)


def test_batchnorm_over_vectors_of_single_samples_is_bad_input() -> None:
    model = normed(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)), VECTORS)
    with pytest.raises(BadInput, match=r"batch 0.*more than 1 value per channel"):
        compress(model, FilterPruning(0.5), VECTORS[:2], VECTORS[:20].split(1))


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HeadPruning, FilterPruning])
def test_modules_are_of_the_same_kinds_as_after_the_cut(kind: type[FilterPruning]) -> None:
    cut, small, plan = refitted(attention(), kind(0.5), TOKENS[:2], TOKENS.split(20))
    assert record_of(plan).result == "refitted"
    assert [type(module) for module in small.modules()] == [type(module) for module in cut.modules()]
    own = [{k: v for k, v in vars(module).items() if isinstance(v, (int, str))} for module in small.modules()]
    assert own == [{k: v for k, v in vars(module).items() if isinstance(v, (int, str))} for module in cut.modules()]


# --- outputs ------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = perceptron(), how

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        if self.how == "masked":
            return y.masked_fill(torch.tensor([False, True, False]), float("-inf"))
        if self.how == "NaN":
            return y / 0 * 0
        if self.how == "numbers and classes":
            return {"loss": y.square().mean(), "logits": (y,), "class": y.argmax(1), "text": "y"}
        return y


@pytest.mark.parametrize("how", ["masked", "numbers and classes"])
def test_outputs_of_all_kinds_are_compared(how: str) -> None:
    model = Outputs(how)
    calibration = Calibration(VECTORS.split(40), model, VECTORS[:2])
    plan = Magnitude(0.6).plan(model, VECTORS[:2])
    cut = Magnitude(0.6).apply(model, plan)
    small, plan = Refitter(model, VECTORS[:2], calibration).refit(cut, plan)
    errors = record_of(plan).errors
    assert 0 < errors["refitted"] < errors["cut"] < 10
    assert error(model.net, small.net, VECTORS) < error(model.net, cut.net, VECTORS)


def test_outputs_that_are_nan_are_bad_input() -> None:
    model, plan = Outputs("NaN"), FilterPruning(0.5).plan(perceptron(), VECTORS[:2])
    plan = Plan.from_dict(json.loads(json.dumps(plan.to_dict()).replace('"name": "', '"name": "net.')))
    cut = FilterPruning(0.5).apply(model, plan)
    with pytest.raises(BadInput, match="outputs of the dense network on the calibration data hold NaN"):
        Refitter(model, VECTORS[:2], Calibration([VECTORS], model, VECTORS[:2])).refit(cut, plan)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_errors_are_relative_to_the_energy_whatever_the_batches(batch: int) -> None:
    model = perceptron()
    cut, _, plan = refitted(model, FilterPruning(0.5), VECTORS[:2], VECTORS.split(batch))
    assert record_of(plan).errors["cut"] == pytest.approx(error(model, cut, VECTORS), rel=0.3)


def test_budgets_refit_too() -> None:
    model = perceptron()
    small = compress_to(model, FilterPruning(), VECTORS[:2], keep_params=0.5, calibration=VECTORS.split(40))
    cut = compress_to(model, FilterPruning(), VECTORS[:2], keep_params=0.5, calibration=VECTORS.split(40), refit=False)
    assert error(model, small, VECTORS) < error(model, cut, VECTORS)


# --- records ------------------------------------------------------------------------------------------------


@functools.cache
def text() -> str:
    model = nn.Sequential(perceptron(), nn.Unflatten(1, (3, 1)), nn.ConvTranspose1d(3, 2, 2)).double()
    _, _, plan = refitted(model, FilterPruning(0.5), VECTORS[:2], [VECTORS])
    assert record_of(plan).unfitted == (("2", "is a transposed convolution"),)
    written = json.dumps(plan.to_dict())
    assert Plan.from_dict(json.loads(written)) == plan
    return written


def stored() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text())
    return data


WRONG: dict[tuple[Any, ...], list[Any]] = {
    (): [3, "x", [1], True],
    ("result",): [3, None, ["cut"], "trained"],
    ("errors",): [3, None, [["cut", 1.0]], {}, {"cut": "small"}, {"cut": None}, {"cut": True}],
    ("samples",): [1.5, -1, None, "7", True],
    ("layers",): [3, None, {}, "x", [3], [None], [{}]],
    ("layers", 0, "name"): [3, None],
    ("layers", 0, "damping"): ["x", True, [], float("nan")],
    ("layers", 0, "error"): ["x", None, True, float("inf")],
    ("layers", 0, "error_before"): ["x", None, float("nan")],
    ("unfitted",): [3, None, "x", [3], ["ab"], [["a"]], [["a", 3]], [[3, "a"]], [["a", "b", "c"]]],
}


@pytest.mark.parametrize("path", WRONG)
def test_damaged_records_name_the_field(path: tuple[Any, ...]) -> None:
    data = stored()
    where = "plan.refit" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    for value in WRONG[path]:
        damaged = json.loads(json.dumps(data))
        holder: Any = damaged
        for part in ("refit", *path)[:-1]:
            holder = holder[part]
        holder[("refit", *path)[-1]] = value
        with pytest.raises(DamagedFile) as raised:
            Plan.from_dict(damaged)
        named = "plan.refit.result" if value == {} and path == ("errors",) else where
        assert named in str(raised.value), f"{value!r}: {raised.value}"
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "path", [("result",), ("errors",), ("samples",), ("layers",), ("unfitted",), ("layers", 0, "error")]
)
def test_missing_and_unknown_fields_are_named(path: tuple[Any, ...]) -> None:
    damaged = stored()
    holder: Any = damaged["refit"]
    for part in path[:-1]:
        holder = holder[part]
    del holder[path[-1]]
    with pytest.raises(DamagedFile, match=rf"plan\.refit.* has no field '{path[-1]}'"):
        Plan.from_dict(damaged)
    damaged = stored()
    damaged["refit"]["colour"] = 3
    with pytest.raises(DamagedFile, match=r"plan\.refit has a field 'colour'"):
        Plan.from_dict(damaged)
