"""The coverage of parameter groups: every trainable parameter is named once, with its ball or why it has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import pliant
from pliant.constraints import Coverage
from pliant.errors import BadInput
from pliant.optim import SFW

STRUCTURED = [("*.weight", pliant.rank(0.25))]


def covered(model: nn.Module, rules: Any = STRUCTURED) -> Coverage:
    return pliant.coverage(model, pliant.constrain(model, rules, default=None))


def masked() -> nn.Module:
    layer = nn.Linear(6, 5)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(6, 5))


# What "*.weight" passes over, the weights without a ball, and what is said of the first.
PASSED_OVER: dict[str, tuple[Any, set[str], str]] = {
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight"}, "packs queries, keys and values"),
    "attention with other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        {"q_proj_weight", "k_proj_weight", "v_proj_weight"},
        "projects",
    ),
    "LSTM": (lambda: nn.LSTM(4, 6), {"weight_ih_l0", "weight_hh_l0"}, "is recurrent"),
    "GRU, both ways": (
        lambda: nn.GRU(4, 6, bidirectional=True),
        {"weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"},
        "is recurrent",
    ),
    "cell": (lambda: nn.LSTMCell(4, 6), {"weight_ih", "weight_hh"}, "is recurrent"),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
        {"parametrizations.weight.original1"},
        "is what the weight of a ParametrizedLinear is computed from",
    ),
    "older weight norm": (old_weight_norm, {"weight_v"}, "is computed from"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        {"parametrizations.weight.original"},
        "is computed from",
    ),
    "mask": (masked, {"weight_orig"}, "is computed from"),
    "embedding": (lambda: nn.Embedding(9, 4), {"weight"}, "is a table of embeddings"),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_a_pattern_passes_over_is_named_with_its_reason(name: str) -> None:
    build, expected, reason = PASSED_OVER[name]
    model = nn.ModuleDict({"part": build(), "read": nn.Linear(8, 4)})
    found = covered(model)
    assert {weight.name for weight in found.without} == {f"part.{leaf}" for leaf in expected}
    assert all(reason in weight.reason for weight in found.without)
    assert f"no ball: {found.without[0].name} {found.without[0].reason}" in str(found)
    named = [*found.vectors, *(w.name for w in found.without), *(n for kind in found.balls for n in kind.names)]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", [name for name in PASSED_OVER if name != "embedding"])
def test_the_advice_gives_the_weight_a_ball(name: str) -> None:
    model = nn.ModuleDict({"part": PASSED_OVER[name][0]()})
    rules = [
        (weight.name, pliant.rank(0.5)) for weight in pliant.coverage(model, [{"params": model.parameters()}]).without
    ]
    assert not covered(model, rules).without


def test_shares_are_of_the_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2, bias=False))
    found = covered(model, [("0.weight", pliant.filters(2)), ("1.weight", pliant.weights(3))])
    assert [(kind.norm, kind.names, kind.k) for kind in found.balls] == [
        ("Rows(KSupport)", ("0.weight",), (2, 2)),
        ("KSupport", ("1.weight",), (3, 3)),
    ]
    assert [kind.share for kind in found.balls] == pytest.approx([24 / 36, 8 / 36])
    assert found.share == pytest.approx(32 / 36)
    assert found.vectors == ("0.bias",)
    assert found.summary == (
        "88.9% of the trainable parameters have a ball: Rows(KSupport), k = 2 on 1 tensor; "
        "KSupport, k = 3 on 1 tensor; none: 1 vector"
    )
    assert str(found).splitlines() == [
        "88.9% of the trainable parameters have a ball",
        "   66.7%  Rows(KSupport), k = 2: 0.weight",
        "   22.2%  KSupport, k = 3: 1.weight",
        "          no ball: 1 vector: 0.bias",
    ]


def test_groups_of_an_optimizer_and_tied_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "frozen": nn.Linear(3, 3)})
    model["head"].weight = model["table"].weight
    model["frozen"].requires_grad_(False)
    optimizer = SFW(pliant.constrain(model, [("head.weight", pliant.rank(1))], default=None))
    found = pliant.coverage(model, optimizer.param_groups)
    assert [kind.names for kind in found.balls] == [("table.weight",)]
    assert found.vectors == ("head.bias",)
    assert found.share == pytest.approx(20 / 25)


def test_parameters_in_no_group_are_missing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    found = pliant.coverage(model, pliant.constrain(model[0], [("weight", pliant.rank(1))], default=None))
    assert found.missing == ("1.weight", "1.bias")
    assert "in no group, so that no step changes them: 1.weight, 1.bias" in str(found)


def test_long_lists_are_cut() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    assert "5.weight and 3 more" in str(covered(model))


def test_parameters_of_another_model_are_refused() -> None:
    groups = pliant.constrain(nn.Linear(3, 2), [("weight", pliant.rank(1))], default=None)
    with pytest.raises(BadInput, match=r"parameter of shape \(2, 3\) that the model does not have"):
        pliant.coverage(nn.Linear(3, 2), groups)


def test_coverage_leaves_everything_alone() -> None:
    model = nn.Linear(3, 2)
    groups = pliant.constrain(model, [("weight", pliant.rank(1))], default=None)
    before = repr(groups), torch.get_rng_state()
    pliant.coverage(model, groups)
    assert repr(groups) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
