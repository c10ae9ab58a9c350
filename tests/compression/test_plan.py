"""Plans, and what all compressors owe: replay from JSON, an untouched model, one-line errors."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import (
    Chain,
    Compressor,
    FilterPruning,
    Int8,
    LowRank,
    Magnitude,
    Plan,
    SemiStructured,
    compress,
    replay,
    skeleton,
)
from pliant.compressor_names import COMPRESSORS
from pliant.errors import BadInput, DamagedFile
from pliant.experiments.models import build_model
from pliant.experiments.training.onednn import sound_convolutions

EVERY: list[Compressor[Any]] = [
    FilterPruning(0.5),
    FilterPruning(0.4, "global", importance="bn", mode="mask"),
    LowRank(0.5),
    FilterPruning(0.4, "energy", cost="macs"),
    LowRank(0.4, "uniform"),
    LowRank(0.4, "energy", cost="macs"),
    LowRank(0.5, scheme="spatial"),
    LowRank(0.5, scheme="best"),
    Magnitude(0.8),
    Magnitude(0.8, "energy"),
    SemiStructured(),
    Int8(),
    Chain(FilterPruning(0.3), LowRank(0.5)),
    Chain(LowRank(0.5), Magnitude(0.5), Int8()),
]
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet8", num_classes=5, image_shape=(4, 8, 8), width=0.5)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model.eval()(X)


each = pytest.mark.parametrize("compressor", EVERY, ids=str)


def test_every_public_compressor_is_in_the_table() -> None:
    # This network has no heads; those are tested with the transformers. The links of a chain are in the table.
    assert {type(compressor).__name__ for compressor in EVERY} == {row.class_name for row in COMPRESSORS.values()} - {
        "HeadPruning"
    } | {"Chain"}


@each
def test_json_round_trip_replays_on_a_freshly_built_model(compressor: Compressor[Any]) -> None:
    model = build()
    plan = compressor.plan(model, X)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    fresh = build(seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(replay(fresh, again)), output(compressor.apply(model, plan)))


@each
def test_analysis_serves_other_ratios_and_changes_nothing(compressor: Compressor[Any]) -> None:
    model = build()
    analysis = compressor.analyse(model, X)
    others = [
        c
        for c in EVERY
        if type(c) is type(compressor) and getattr(c, "scheme", "") == getattr(compressor, "scheme", "")
    ]
    for other in [compressor] if isinstance(compressor, Chain) else others:
        plan = other.plan(model, X, analysis=analysis)
        assert plan == other.plan(model, X)
        with_analysis, without = other.apply(model, plan, analysis=analysis), other.apply(model, plan)
        assert torch.equal(output(with_analysis), output(without))


@each
def test_the_input_model_and_the_random_state_are_untouched(
    compressor: Compressor[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = build().train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    frozen.weight.requires_grad_(False)
    model(X).sum().backward()
    state = copy.deepcopy(model.state_dict())
    tensors = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags, random = [m.training for m in model.modules()], torch.get_rng_state()
    small = compress(model, compressor, X)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == tensors
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert small.training
    assert capsys.readouterr() == ("", "")


@each
def test_small_models_train(compressor: Compressor[Any]) -> None:
    small = compress(build(), compressor, X)
    with sound_convolutions(small):
        small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.is_floating_point())


@each
def test_skeleton_has_the_shapes_to_load_the_weights_into(compressor: Compressor[Any]) -> None:
    model = build()
    plan = compressor.plan(model, X)
    small, empty = compressor.apply(model, plan), skeleton(build(seed=1), plan)
    empty.load_state_dict(small.state_dict())
    assert torch.equal(output(empty), output(small))
    assert [type(m) for m in empty.modules()] == [type(m) for m in small.modules()]
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in small.named_parameters()
    }


@each
def test_plan_reads_as_a_table(compressor: Compressor[Any]) -> None:
    plan = compressor.plan(build(), X)
    text = str(plan)
    assert type(compressor).__name__ in text.splitlines()[0]
    assert f"{plan.params_before:,} → {plan.params_after:,}" in text
    assert all(layer.name in text for step in plan.links or [plan] for layer in step.layers)
    assert all(f"left alone: {name}: {reason}" in text for name, reason in plan.refused)


# --- a plan for another model -------------------------------------------------------------------------------


def other_width() -> nn.Module:
    return build_model("resnet8", num_classes=5, image_shape=(4, 8, 8), width=0.25)


def other_network() -> nn.Module:
    return build_model("mlp", num_classes=5, image_shape=(4, 8, 8), width=0.25)


def compressed() -> nn.Module:
    return compress(build(), LowRank(0.5), X)


@each
@pytest.mark.parametrize("other", [other_width, other_network, compressed])
def test_plan_for_another_model_is_bad_input(compressor: Compressor[Any], other: Callable[[], nn.Module]) -> None:
    plan = compressor.plan(build(), X)
    with pytest.raises(BadInput, match="another model"):
        compressor.apply(other(), plan)
    analysis = compressor.analyse(build(), X)
    with pytest.raises(BadInput, match="another model"):
        compressor.plan(other(), X, analysis=analysis)


def test_plan_of_another_compressor_is_bad_input() -> None:
    plan = LowRank(0.5).plan(build(), X)
    with pytest.raises(BadInput, match=r"LowRank.*Magnitude"):
        Magnitude(0.5).apply(build(), plan)
    with pytest.raises(BadInput, match="did you mean 'LowRank'"):
        replay(build(), dataclasses.replace(plan, compressor="LowRanc"))
    with pytest.raises(BadInput, match="did you mean 'ratio'"):
        replay(build(), dataclasses.replace(plan, options={"ratoi": 0.5}))


def test_the_options_of_the_plan_hold_at_apply() -> None:
    model = build()
    mask = FilterPruning(0.5, mode="mask").plan(model, X)
    applied = FilterPruning(0.1, mode="remove").apply(model, mask)
    assert [p.shape for p in applied.parameters()] == [p.shape for p in model.parameters()]


def test_rank_beyond_what_the_layer_has_is_bad_input() -> None:
    plan = LowRank(0.5).plan(build(), X)
    i, layer = next((i, x) for i, x in enumerate(plan.layers) if x.params < x.params_dense)
    layers = (*plan.layers[:i], dataclasses.replace(layer, kept=layer.total), *plan.layers[i + 1 :])
    with pytest.raises(BadInput, match=r"at most \d"):
        LowRank().apply(build(), dataclasses.replace(plan, layers=layers))


# --- damaged plans ------------------------------------------------------------------------------------------


def plan_data() -> dict[str, Any]:
    return json.loads(json.dumps(FilterPruning(0.5).plan(build(), X).to_dict()))  # type: ignore[no-any-return]


def put(data: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Set the field at ``path`` (layer fields begin with 0.), or delete it where the value is ``...``."""
    target = data["layers"][0] if path.startswith("0.") else data
    name = path.removeprefix("0.")
    if value is ...:
        del target[name]
    else:
        target[name] = value
    return data


DAMAGE = [
    ("format", "other"), ("version", 99), ("compressor", ...), ("compressor", 3), ("options", []), ("ratio", "half"),
    ("ratio", 2.0), ("ratio_removed", float("nan")), ("params_before", -1), ("params_after", 1.5), ("layers", {}),
    ("layers", ["conv1"]), ("refused", [["fc"]]), ("refused", [[1, 2]]), ("compressible", [1]), ("surprise", 1),
    ("0.name", None), ("0.kept", True), ("0.kept", 10**9), ("0.outputs", [2, 1]), ("0.outputs", []),
    ("0.outputs", "all"), ("0.inputs", [-1]), ("0.shape", [0.5]), ("0.total", ...), ("0.extra", 0),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), DAMAGE, ids=[f"{p}={v}" for p, v in DAMAGE])
def test_damaged_plan_is_told_in_one_line(path: str, value: object) -> None:
    with pytest.raises(DamagedFile) as caught:
        Plan.from_dict(put(plan_data(), path, value))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("data", [None, [], "plan", {}, {"layers": []}])
def test_anything_else_is_not_a_plan(data: object) -> None:
    with pytest.raises(DamagedFile, match="not a compression plan"):
        Plan.from_dict(data)


# --- examples and weights that do not do --------------------------------------------------------------------


@each
def test_example_that_does_not_fit(compressor: Compressor[Any]) -> None:
    with pytest.raises(BadInput, match=r"\(2, 3, 8, 8\)"):
        compress(build(), compressor, torch.randn(2, 3, 8, 8))
    with pytest.raises(BadInput, match="a tensor, a tuple of tensors"):
        compress(build(), compressor, "x")  # type: ignore[arg-type]


@each
def test_weights_that_are_not_finite_are_named(compressor: Compressor[Any]) -> None:
    model = build()
    plan = compressor.plan(model, X)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"fc\.weight"):
        compressor.plan(model, X)
    with pytest.raises(BadInput, match=r"fc\.weight"):
        compressor.apply(model, plan)


def test_finite_weights_with_a_sum_beyond_float32_are_taken() -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 3e38)
    assert Magnitude(0.5).plan(model, torch.ones(1, 4)).ratio_removed == 0.5


# --- plans of earlier versions ------------------------------------------------------------------------------


def test_plan_from_before_schemes_and_chains_is_read() -> None:
    plan = LowRank(0.5, scheme="channel").plan(build(), X)
    data = json.loads(json.dumps(plan.to_dict()))
    del data["links"]
    for layer in data["layers"]:
        del layer["scheme"]
    data["options"] = {"ratio": 0.5, "allocation": "global"}
    old = Plan.from_dict(data)
    assert torch.equal(output(replay(build(), old)), output(replay(build(), plan)))
