"""Controls: how many channels, heads or ranks a layer keeps at least, at most, in multiples, by name and by ratio."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import Chain, FilterPruning, HeadPruning, LowRank, Plan, compress, compress_to, replay
from pliant.compression.budgets import SMALLEST
from pliant.compression.controls import Controlled
from pliant.compressor_names import COMPRESSORS, control_flags, record_name
from pliant.errors import BadInput, Refused
from pliant.experiments.models import build_model

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ALLOCATIONS = ("uniform", "global", "energy")


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build_model("resnet8", num_classes=5, image_shape=(3, 8, 8), width=2.0).eval(), X


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 40)), torch.randn(
        2, 64
    )


def transformer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(64, 16, 96, batch_first=True, dropout=0.0) for _ in range(2)]
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 64)


CASES: dict[str, tuple[type[Controlled[Any]], Any]] = {
    "filters": (FilterPruning, resnet),
    "neurons": (FilterPruning, transformer),
    "heads": (HeadPruning, transformer),
    "rank": (LowRank, resnet),
    "ranks of linear layers": (LowRank, linear),
}
each = pytest.mark.parametrize("case", CASES)
every_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS)


def plans(case: str, allocation: str, ratios: tuple[float, ...], **controls: Any) -> list[Plan]:
    kind, build = CASES[case]
    model, x = build()
    analysis = kind().analyse(model, x)
    made = [
        kind(ratio=ratio, allocation=allocation, **controls).plan(model, x, analysis=analysis)  # type: ignore[call-arg]
        for ratio in ratios
    ]
    small = kind().apply(model, made[-1])
    assert sum(p.numel() for p in small.parameters()) == made[-1].params_after
    with torch.no_grad():
        assert small(x).shape == model(x).shape
    return made


def largest_useful(case: str) -> dict[str, int]:
    """Return layer → the largest rank that makes it smaller, of which shares are taken; nothing for other kinds."""
    kind, build = CASES[case]
    layers = kind().analyse(*build()).layers if kind is LowRank else {}
    return {name: spectrum.max_rank for name, (spectrum,) in layers.items()}


def counts(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return layer → (kept, total)."""
    return {layer.name: (layer.kept, layer.total) for layer in plan.layers}


# --- how many parts a layer may keep ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "controls", "expected"),
    [
        (4, {}, (4, 3, 2, 1)),
        (1, {}, (1,)),
        (40, {}, tuple(range(40, 1, -1))),  # 5 % of 40 are 2
        (41, {}, tuple(range(41, 2, -1))),  # no less than 5 %: 3 of 41
        (40, {"at_least": 1}, tuple(range(40, 0, -1))),
        (40, {"at_least": 1.0}, (40,)),
        (4, {"at_least": 9}, (4,)),
        (30, {"at_least": 0.1, "at_most": 0.2}, (6, 5, 4, 3)),  # 0.1 · 30 > 3 in floating point
        (10, {"at_most": 1}, (1,)),
        (10, {"at_most": 3, "at_least": 2}, (3, 2)),
        (3, {"at_least": 0.5, "at_most": 0.5}, (2,)),  # between 1.5 and 1.5 there is no number: the floor counts
        (10, {"at_least": 0.5, "at_most": 2}, (5,)),
        (20, {"multiple_of": 8}, (20, 16, 8)),
        (16, {"multiple_of": 8}, (16, 8)),
        (5, {"multiple_of": 8}, (5,)),
        (32, {"multiple_of": 8, "at_least": 9}, (32, 24, 16)),
        (32, {"multiple_of": 8, "at_most": 0.8}, (24, 16, 8)),
        (16, {"multiple_of": 8, "at_most": 6, "at_least": 3}, (8,)),
        (5, {"multiple_of": 8, "at_most": 0.5}, (5,)),
    ],
)
def test_the_numbers_that_a_layer_may_keep(total: int, controls: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert FilterPruning(**controls).allowed(total) == expected


@each
@every_allocation
def test_by_default_no_layer_keeps_less_than_a_twentieth(case: str, allocation: str) -> None:
    *_, smallest = plans(case, allocation, (0.5, 0.999))
    useful = largest_useful(case)
    assert all(kept >= 0.05 * useful.get(name, total) for name, (kept, total) in counts(smallest).items())
    assert smallest.floored
    kept = {name: kept for name, (kept, total) in counts(smallest).items() if kept < total}
    assert {name for name in smallest.floored if name in kept}
    assert f"at the floor: {', '.join(smallest.floored)}" in str(smallest)
    (dense,) = plans(case, allocation, (0.0,))
    assert dense.floored == ()
    assert "at the floor" not in str(dense)


@each
@every_allocation
def test_one_gives_the_smallest_network(case: str, allocation: str) -> None:
    (smallest,) = plans(case, allocation, (SMALLEST,), at_least=1)
    cut = {kept for kept, total in counts(smallest).values() if kept < total}
    assert cut == {12 if case == "heads" else 1}  # rows of queries, keys and values, four each


@each
@every_allocation
def test_floors_and_ceilings_hold_at_every_ratio(case: str, allocation: str) -> None:
    made = plans(case, allocation, (0.01, 0.4, 0.95), at_least=0.25, at_most=0.75)
    dense = {name for plan in plans(case, allocation, (SMALLEST,), at_least=1) for name in uncut(plan)}
    for plan in made:
        for name, (kept, total) in counts(plan).items():
            if name not in dense and not case.startswith("rank"):
                assert 0.25 <= kept / total <= 0.75, name
        for name, rank in largest_useful(case).items():
            assert counts(plan)[name][0] >= 0.25 * rank
    assert made[0].ratio_removed <= made[1].ratio_removed <= made[2].ratio_removed
    assert plans(case, allocation, (0.0,), at_most=0.5)[0].ratio_removed == 0


def uncut(plan: Plan) -> list[str]:
    return [name for name, (kept, total) in counts(plan).items() if kept == total]


@each
@every_allocation
@pytest.mark.parametrize("multiple", [4, 8])
def test_cut_layers_keep_a_multiple(case: str, allocation: str, multiple: int) -> None:
    for plan in plans(case, allocation, (0.1, 0.5, 0.9), multiple_of=multiple):
        for kept, total in counts(plan).values():
            assert kept == total or kept % multiple == 0
    assert plan.ratio_removed > 0.2


def test_the_ratio_is_the_nearest_that_the_controls_allow() -> None:
    for case in CASES:
        made = plans(case, "global", tuple(r / 20 for r in range(1, 20)), multiple_of=4, at_most=0.9)
        reachable = sorted({plan.ratio_removed for plan in made})
        for plan in made:
            assert abs(plan.ratio_removed - plan.ratio) <= min(abs(r - plan.ratio) for r in reachable) + 1e-12


# --- names --------------------------------------------------------------------------------------------------


def test_layers_that_are_kept_do_not_change_at_all() -> None:
    model, x = resnet()
    plan = FilterPruning(0.6, "uniform", keep=("layer2.0.conv1",)).plan(model, x)
    small = FilterPruning().apply(model, plan)
    before, after = dict(model.named_parameters()), dict(small.named_parameters())
    assert torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])
    reasons = dict(plan.refused)
    assert reasons["layer2.0.conv1"] == "is kept by name"
    # Its inputs are the stream of the first stage.
    assert reasons["conv1"] == "is coupled with layer2.0.conv1, which is kept by name"
    assert after["conv1.weight"].shape == before["conv1.weight"].shape
    assert counts(plan)["layer1.0.conv1"][0] < counts(plan)["layer1.0.conv1"][1]
    assert plan.ratio_removed == pytest.approx(0.6, abs=0.02)  # of the other layers


@pytest.mark.parametrize("keep", [("fc",), ("f?",), ["fc", "nothing*"]])
def test_a_classifier_can_be_kept_with_its_inputs(keep: Any) -> None:
    model, x = resnet()
    if len(keep) == 2:
        with pytest.raises(BadInput, match=r"keep: 'nothing\*' matches no layer of the model: .* conv1, bn1"):
            FilterPruning(keep=keep).plan(model, x)
        return
    small = compress(model, FilterPruning(0.5, "uniform", keep=keep), x)
    assert torch.equal(small.fc.weight, model.fc.weight)
    assert small.layer2[0].conv1.weight.shape != model.layer2[0].conv1.weight.shape


@each
def test_everything_can_be_kept(case: str) -> None:
    kind, build = CASES[case]
    model, x = build()
    with pytest.raises(Refused, match="is kept by name"):
        kind(keep=("*",)).plan(model, x)


def test_factorisable_layers_are_kept_and_a_module_stands_for_its_layers() -> None:
    model, x = resnet()
    plan = LowRank(0.5, keep=("layer1", "fc")).plan(model, x)
    assert {name for name, reason in plan.refused if reason == "is kept by name"} == {
        "fc",
        *(f"layer1.0.{name}" for name in ("conv1", "bn1", "conv2", "bn2")),
    }
    assert not any(name.startswith("layer1") for name in counts(plan))
    assert plan.ratio_removed == pytest.approx(0.5, abs=0.03)


def test_a_module_in_a_chain_keeps_its_factors() -> None:
    model, x = resnet()
    chain = Chain(LowRank(0.3), FilterPruning(0.3, keep=("layer3.0.conv1",)))
    small = compress(model, chain, x)
    thin = dict(compress(model, LowRank(0.3), x).named_parameters())
    kept = {name: p for name, p in small.named_parameters() if name.startswith("layer3.0.conv1.")}
    assert kept
    assert all(torch.equal(p, thin[name]) for name, p in kept.items())


@pytest.mark.parametrize("kind", [FilterPruning, LowRank])
@pytest.mark.parametrize("option", [{"keep": ("layer9.*",)}, {"ratios": {"layer9.*": 0.5}}])
def test_unknown_patterns_are_named(kind: Any, option: Mapping[str, Any]) -> None:
    model, x = resnet()
    with pytest.raises(BadInput, match=r"'layer9.\*' matches no layer of the model: .* conv1, bn1, .*, \.\.\.$"):
        kind(**option).plan(model, x)


def test_heads_are_kept() -> None:
    model, x = transformer()
    plan = HeadPruning(0.5, keep=("0.self_attn",)).plan(model, x)
    assert counts(plan)["1.self_attn"][0] < 192
    assert "0.self_attn" not in counts(plan)


# --- ratios of layers ---------------------------------------------------------------------------------------


@every_allocation
def test_filters_of_single_layers_leave_as_asked_and_the_others_share_the_rest(allocation: str) -> None:
    model, x = resnet()
    ratios = {"layer3.0.conv1": 0.75, "layer3.*": 0.0, "layer2.0.conv1": 0.1}
    plan = FilterPruning(0.58, allocation, ratios=ratios).plan(model, x)
    kept = counts(plan)
    assert kept["layer3.0.conv1"] == (32, 128)
    assert kept["layer3.0.conv2"] == (128, 128)
    assert kept["layer2.0.conv1"] == (58, 64)  # 57.6
    assert plan.ratio_removed == pytest.approx(0.58, abs=0.01)
    other = FilterPruning(0.6, allocation, ratios=ratios).plan(model, x)
    assert [counts(other)[name] for name in ("layer3.0.conv1", "layer2.0.conv1")] == [(32, 128), (58, 64)]
    assert other.ratio_removed > plan.ratio_removed


@every_allocation
def test_ranks_of_single_layers_cost_what_is_asked(allocation: str) -> None:
    model, x = resnet()
    plan = LowRank(0.35, allocation, ratios={"layer3.0.conv1": 0.8, "layer3.0.conv2": 0}).plan(model, x)
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["layer3.0.conv1"].params / layers["layer3.0.conv1"].params_dense == pytest.approx(0.2, abs=0.01)
    assert layers["layer3.0.conv2"].params == layers["layer3.0.conv2"].params_dense
    assert plan.ratio_removed == pytest.approx(0.35, abs=0.01)


def test_other_controls_hold_for_ratios_of_layers_too() -> None:
    model, x = resnet()
    plan = FilterPruning(0.5, ratios={"layer2.0.conv1": 0.99}, at_least=0.25, multiple_of=8).plan(model, x)
    assert counts(plan)["layer2.0.conv1"] == (16, 64)
    assert "layer2.0.conv1" in plan.floored
    assert FilterPruning(0.0, ratios={"fc": 0.5, "conv1": 0.5}).plan(model, x).ratio_removed == 0


# --- low rank -----------------------------------------------------------------------------------------------


def test_a_floor_that_would_save_nothing_leaves_the_layer_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(2, 64)
    (first, second) = LowRank(0.9, at_least=32).plan(model, x).layers  # rank 31 is the largest that saves
    assert (first.kept, second.kept) == (64, 64)
    plan = LowRank(0.9, at_least=0.25).plan(model, x)
    assert [layer.kept for layer in plan.layers] == [8, 8]  # a quarter of 31
    assert plan.floored == ("0", "1")
    (layer, _) = LowRank(0.01, at_most=0.9).plan(model, x).layers  # no layer may stay dense
    assert layer.kept == 31


@pytest.mark.parametrize("scheme", ["channel", "spatial", "best"])
def test_every_scheme_keeps_to_the_controls(scheme: str) -> None:
    model, x = resnet()
    plan = LowRank(0.6, scheme=scheme, multiple_of=4, at_least=8).plan(model, x)
    for kept, total in counts(plan).values():
        assert kept == total or (kept % 4 == 0 and kept >= 8)


# --- budgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", [FilterPruning(), LowRank(), Chain(FilterPruning(), LowRank())], ids=repr)
def test_a_budget_out_of_reach_names_the_floors(compressor: Any) -> None:
    model, x = resnet()
    with pytest.raises(Refused, match=r"at their floor: .*: at_least=1 goes lower"):
        compress_to(model, compressor, x, keep_params=1e-5)


def test_a_budget_without_floors_does_not() -> None:
    model, x = resnet()
    for compressor in (FilterPruning(at_least=1), LowRank(at_least=1)):
        with pytest.raises(Refused) as caught:
            compress_to(model, compressor, x, keep_params=1e-5)
        assert "floor" not in str(caught.value)


def test_a_floor_of_one_head_is_not_in_the_way_of_a_budget() -> None:
    model, x = transformer()
    with pytest.raises(Refused) as caught:
        compress_to(model, HeadPruning(), x, keep_params=1e-5)
    assert "floor" not in str(caught.value)


def test_the_first_ratio_of_a_pattern_counts() -> None:
    assert FilterPruning(ratios=(("a", 0.5), ("b", 0), ("a", 0.1))).ratios == (("a", 0.5), ("b", 0.0))


def test_budgets_are_met_with_controls() -> None:
    model, x = resnet()
    for compressor in (FilterPruning(multiple_of=8), LowRank(multiple_of=4), FilterPruning(keep=("fc",))):
        small = compress_to(model, compressor, x, keep_params=0.4)
        share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        assert 0.25 < share <= 0.4


# --- plans --------------------------------------------------------------------------------------------------

CONTROLS: dict[str, Any] = {
    "multiple_of": 2,
    "keep": ("layer1.0.conv1",),
    "at_least": 1,
    "at_most": 0.9,
    "ratios": {"layer2.0.conv1": 0.5},
}


@pytest.mark.parametrize("kind", [FilterPruning, LowRank])
def test_a_plan_keeps_its_controls_through_json(kind: Any) -> None:
    model, x = resnet()
    compressor = kind(0.5, **CONTROLS)
    assert kind(0.5, **CONTROLS) == compressor
    assert hash(compressor) == hash(dataclasses.replace(compressor))
    plan = compressor.plan(model, x)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert dataclasses.replace(compressor.with_options_of(again), **automatic(compressor)) == compressor
    assert "keep=['layer1.0.conv1']" in str(plan)
    torch.testing.assert_close(replay(model, again)(x), compressor.apply(model, plan)(x))


def automatic(compressor: Any) -> dict[str, Any]:
    """Return the options whose plans say what "auto" stood for."""
    return {"whiten": "auto"} if isinstance(compressor, LowRank) else {"importance": compressor.importance}


def test_plans_from_before_there_were_floors_are_read() -> None:
    model, x = resnet()
    plan = FilterPruning(0.9).plan(model, x)
    assert plan.floored
    old = {name: value for name, value in plan.to_dict().items() if name != "floored"}
    assert set(old["options"]) == {"ratio", "allocation", "importance", "mode", "cost"}
    read = Plan.from_dict(json.loads(json.dumps(old)))
    assert read == dataclasses.replace(plan, floored=())
    assert read.to_dict() == old
    torch.testing.assert_close(replay(model, read)(x), FilterPruning().apply(model, plan)(x))


def test_a_chain_names_the_floors_of_its_links() -> None:
    model, x = resnet()
    plan = Chain(FilterPruning(0.97), LowRank(0.3)).plan(model, x)
    assert plan.floored
    assert set(plan.floored) == {name for link in plan.links for name in link.floored}


def test_an_analysis_serves_all_controls() -> None:
    model, x = resnet()
    for kind in (FilterPruning, LowRank):
        analysis = kind().analyse(model, x)
        options: list[dict[str, Any]] = [
            {},
            {"at_most": 1.0},
            {"at_most": 1, "at_least": 1},
            CONTROLS,
            {"keep": ["fc"]},
        ]
        for controls in [*options, *options]:
            compressor = kind(0.6, **controls)
            assert compressor.plan(model, x, analysis=analysis) == compressor.plan(model, x)


def test_an_analysis_serves_other_weights() -> None:
    model, x = resnet()
    analysis = FilterPruning().analyse(model, x)
    FilterPruning(0.5).plan(model, x, analysis=analysis)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    assert FilterPruning(0.5).plan(model, x, analysis=analysis) == FilterPruning(0.5).plan(model, x)


# --- names in records ---------------------------------------------------------------------------------------


def test_controls_have_flags_and_names() -> None:
    controls = {"multiple_of": 8, "keep": ["fc", "a-b.*"], "at_least": 1, "ratios": {"layer1.*": 0.5}}
    flags = control_flags(controls)
    assert flags == {"multiple_of": "8", "keep": "fc,a-b.*", "at_least": "1", "layer_ratios": "layer1.*=0.5"}
    name = record_name("filters", True, None, controls)
    assert name == "filters-multiple_of=8-keep=fc,a_b.*-at_least=1-layer_ratios=layer1.*=0.5"
    assert name.partition("-")[0] in COMPRESSORS


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FilterPruning, HeadPruning, LowRank])
@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"multiple_of": 0}, "multiple_of must be an int of at least 1, got 0"),
        ({"multiple_of": 8.0}, "multiple_of must be an int"),
        ({"multiple_of": True}, "multiple_of must be an int"),
        ({"at_least": 0}, "at_least as a count must be at least 1, got 0"),
        ({"at_least": 1.5}, r"at_least as a share must lie in \[0, 1\], got 1.5"),
        ({"at_least": float("nan")}, "at_least as a share"),
        ({"at_least": "1"}, "at_least must be an int"),
        ({"at_most": 0.0}, r"at_most as a share must lie in \(0, 1\]"),
        ({"at_most": -3}, "at_most as a count must be at least 1"),
        ({"at_most": True}, "at_most must be an int"),
        ({"at_least": 0.5, "at_most": 0.4}, "at_least=0.5 is more than at_most=0.4"),
        ({"at_least": 8, "at_most": 4}, "at_least=8 is more than at_most=4"),
        ({"keep": "fc"}, "keep is a tuple of patterns"),
        ({"keep": (3,)}, "keep is a tuple of patterns"),
        ({"ratios": {"fc": 1.0}}, "expected 0 <= share < 1"),
        ({"ratios": {"fc": -0.1}}, "expected 0 <= share < 1"),
        ({"ratios": {"fc": "half"}}, "expected 0 <= share < 1"),
        ({"ratios": {3: 0.5}}, "expected 0 <= share < 1"),
        ({"ratios": 0.5}, "ratios maps patterns"),
        ({"ratios": "fc"}, "ratios maps patterns"),
    ],
)
def test_bad_controls_are_one_line(kind: Any, controls: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        kind(**controls)
    assert "\n" not in str(caught.value)
