"""Budgets: the largest network that fits, the smallest that is as accurate, or the reason why there is none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.compression import Chain, Compressor, FilterPruning, HeadPruning, Int8, LowRank, Magnitude, SemiStructured
from pliant.compression.budgets import Budget, compress_to, fit, one_budget
from pliant.errors import BadInput, Refused
from pliant.experiments.models import build_model

COMPRESSORS: list[Compressor[Any]] = [
    FilterPruning(),
    FilterPruning(allocation="uniform"),
    LowRank(),
    LowRank(allocation="energy", scheme="best"),
    Chain(FilterPruning(0.3), LowRank(0.5)),
]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8", num_classes=5, image_shape=(3, 8, 8), width=0.5).eval()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_costs_are_met_and_next_to_nothing_more_would_fit(compressor: Compressor[Any]) -> None:
    model = network()
    dense = measuring.parameters(model), measuring.macs(model, X), measuring.file_bytes(model)
    # The largest single step of this network, a channel of the last stage or a rank of its layers, is below 0.06.
    small = compress_to(model, compressor, X, keep_params=0.3)
    assert 0.24 <= measuring.parameters(small) / dense[0] <= 0.3
    small = compress_to(model, compressor, X, keep_macs=0.5)
    assert 0.44 <= measuring.macs(small, X) / dense[1] <= 0.5
    small = compress_to(model, compressor, X, max_bytes=int(0.6 * dense[2]))
    assert 0.54 <= measuring.file_bytes(small) / dense[2] <= 0.6


@pytest.mark.parametrize("compressor", [FilterPruning(allocation="uniform"), LowRank()], ids=str)
def test_no_finer_ratio_gives_a_larger_network_that_fits(compressor: Compressor[Any]) -> None:
    model = network()
    analysis = compressor.analyse(model, X)
    plan = fit(model, compressor, X, Budget("keep_params", 0.4), analysis)
    sizes = {compressor.at(r / 80).plan(model, X, analysis=analysis).params_after for r in range(80)}
    assert plan.params_after >= max(size for size in sizes if size <= 0.4 * plan.params_before)
    assert plan.params_after <= 0.4 * plan.params_before


def test_a_budget_of_multiplications_is_allocated_by_multiplications() -> None:
    model = network()
    x = torch.randn(1, 3, 8, 8)
    for compressor in (LowRank(), FilterPruning()):
        small = compress_to(model, compressor, x, keep_macs=0.5)
        by_params = compressor.at(0.5)
        at_params = compress_to(
            model, compressor, x, keep_params=measuring.parameters(small) / measuring.parameters(model)
        )
        assert measuring.macs(small, x) < measuring.macs(at_params, x)
        assert by_params.counting("macs").cost == "macs"  # type: ignore[attr-defined]


def test_a_loose_budget_leaves_the_network_as_it_is() -> None:
    model = network()
    for budget in ({"keep_params": 1.0}, {"keep_macs": 1}, {"max_bytes": 10**9}, {"max_latency_ms": 1e9}):
        small = compress_to(model, LowRank(), X, **budget)
        assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]
        with torch.no_grad():
            assert torch.equal(small(X), model(X))


@pytest.mark.parametrize(
    ("compressor", "budget", "message"),
    [
        (
            FilterPruning(),
            {"keep_params": 1e-4},
            r"keep_params=0.0001 is out of reach: the least .* is keep_params=0\.0",
        ),
        (
            LowRank(at_least=1),
            {"keep_macs": 0.01},
            r"the least that LowRank can reach is keep_macs=0\.\d+$",
        ),
        (LowRank(), {"max_bytes": 100}, r"max_bytes=100 is out of reach: .* max_bytes=\d{4,}"),
        (LowRank(), {"max_latency_ms": 1e-9}, r"max_latency_ms=1e-09 is out of reach: .* max_latency_ms=\d"),
        (Magnitude(), {"keep_params": 0.5}, r"Magnitude can reach is keep_params=1"),
        (Chain(FilterPruning(), LowRank()), {"keep_params": 1e-4}, "Chain can reach"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_the_minimum_and_the_reasons(
    compressor: Compressor[Any], budget: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        compress_to(network(), compressor, X, **budget)


def test_what_is_in_the_way_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1), nn.utils.parametrizations.weight_norm(nn.Linear(1, 9)))
    with pytest.raises(Refused, match=r"keep_params=0\.\d+; left alone: 1 is too small: .*; 2 is parametrised"):
        compress_to(model, LowRank(), torch.randn(2, 8), keep_params=0.1)


def test_nothing_to_remove_is_a_budget_out_of_reach() -> None:
    with pytest.raises(Refused, match=r"keep_params=0.5 is out of reach: .* outputs of the model"):
        compress_to(nn.Linear(4, 2), FilterPruning(), torch.randn(2, 4), keep_params=0.5)


# --- accuracy -----------------------------------------------------------------------------------------------


class Threshold:
    """An accuracy that falls by 1e-6 with every parameter that is gone."""

    def __init__(self, model: nn.Module) -> None:
        self.dense, self.asked = measuring.parameters(model), 0

    def __call__(self, network: nn.Module) -> float:
        self.asked += 1
        return 0.9 - 1e-6 * (self.dense - measuring.parameters(network))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_drop_gives_the_smallest_network_that_is_as_accurate(compressor: Compressor[Any]) -> None:
    model = network()
    accuracy = Threshold(model)
    gone = [
        accuracy.dense - measuring.parameters(compress_to(model, compressor, X, max_drop=drop, accuracy=accuracy))
        for drop in (0.0, 0.003, 0.008)
    ]
    for removed, drop in zip(gone, (0, 3000, 8000), strict=True):
        # To 1/256 of the ratio and one step of the network.
        assert drop - 0.06 * accuracy.dense <= removed <= drop
    assert gone == sorted(gone)
    assert accuracy.asked < 40


def test_a_drop_that_nothing_reaches_gives_the_smallest_network() -> None:
    model = network()
    small = compress_to(model, LowRank(at_least=1), X, max_drop=0.5, accuracy=lambda network: 0.9)
    assert all(m.reduce.weight.shape[0] == 1 for m in small.modules() if hasattr(m, "reduce"))


def test_accuracy_is_measured_with_settled_statistics_and_the_result_has_them() -> None:
    model = network()
    data = [torch.randn(16, 3, 8, 8) + 5]
    seen: list[Tensor] = []

    def accuracy(network: nn.Module) -> float:
        seen.append(network.bn1.running_mean.clone() if hasattr(network, "bn1") else first_norm(network).clone())
        return 0.9 if len(seen) < 4 else 0.0

    small = compress_to(model, LowRank(), X, max_drop=0.1, accuracy=accuracy, calibration=data, refit=False)
    assert torch.equal(seen[0], first_norm(model))  # the reference is the network as it was trained
    assert not any(torch.equal(mean, seen[0]) for mean in [*seen[1:], first_norm(small)])


def first_norm(network: nn.Module) -> Tensor:
    return next(m.running_mean for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_network_that_falls_by_settling_alone_is_refused() -> None:
    answers = itertools.chain([0.9], itertools.repeat(0.8))
    with pytest.raises(Refused, match=r"max_drop=0.05 .*falls by 0\.1000"):
        compress_to(network(), LowRank(), X, max_drop=0.05, accuracy=lambda network: next(answers))


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one budget of keep_params, .*, got none"),
        ({"keep_params": 0.5, "keep_macs": 0.5}, "got keep_params, keep_macs"),
        ({"keep_params": 0}, "0 < keep_params <= 1"),
        ({"keep_macs": 1.1}, "0 < keep_macs <= 1"),
        ({"keep_macs": float("nan")}, "must be a number"),
        ({"keep_macs": True}, "must be a number"),
        ({"max_bytes": -1}, "must be positive"),
        ({"max_latency_ms": 0}, "must be positive"),
        ({"max_drop": 1}, "0 <= max_drop < 1"),
        ({"max_drop": 0.1}, "max_drop needs accuracy"),
        ({"max_drop": 0.1, "calibration": iter([X])}, "not an iterator"),
        ({"keep_macs": 0.5, "compressor": SemiStructured()}, "SemiStructured has no ratio"),
        ({"keep_macs": 0.5, "compressor": Chain(SemiStructured(), Int8())}, "no ratio"),
    ],
)
def test_bad_budgets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compress_to(network(), options.pop("compressor", LowRank()), X, **options)


def test_public_name_and_one_budget() -> None:
    assert pliant.compress_to is compress_to
    assert one_budget(keep_params=None, max_bytes=5) == Budget("max_bytes", 5)


# --- networks of several inputs -----------------------------------------------------------------------------


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(0, 50, (3, 6))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_macs_of_a_dict_of_tensors_are_those_of_one_sample_by_hand() -> None:
    model, inputs = gpt2()
    block = 32 * 3 * 32 + 32 * 32 + 2 * 32 * 4 * 32  # queries, keys and values; what joins the heads; two of the MLP
    attention = 2 * 6 * 6 * 32
    assert measuring.macs(model, inputs) == 2 * (6 * block + attention) + 6 * 32 * 50
    assert measuring.macs(model, {"input_ids": inputs["input_ids"][:1]}) == measuring.macs(model, inputs)
    assert measuring.macs(model, (inputs["input_ids"],)) == measuring.macs(model, inputs)


@pytest.mark.parametrize("compressor", [FilterPruning(), HeadPruning(), LowRank()], ids=str)
def test_budgets_hold_for_a_network_of_keyword_arguments(compressor: Compressor[Any]) -> None:
    model, inputs = gpt2()
    small = compress_to(model, compressor, inputs, keep_macs=0.9)
    assert 0.85 <= measuring.macs(small, inputs) / measuring.macs(model, inputs) <= 0.9
    with torch.no_grad():
        assert small(**inputs).logits.shape == model(**inputs).logits.shape
    loose = compress_to(model, compressor, inputs, max_latency_ms=1e9)
    assert measuring.parameters(loose) == measuring.parameters(model)
    with pytest.raises(Refused, match="max_latency_ms=1e-09 is out of reach"):
        compress_to(model, compressor, inputs, max_latency_ms=1e-9)


def test_calibration_batches_may_be_dicts_too() -> None:
    model, inputs = gpt2()
    plain = compress_to(model, LowRank(), inputs, keep_macs=0.7)
    whitened = compress_to(model, LowRank(), inputs, keep_macs=0.7, calibration=[inputs])
    assert 0.65 <= measuring.macs(whitened, inputs) / measuring.macs(model, inputs) <= 0.7
    with torch.no_grad():
        error, plain_error = ((n(**inputs).logits - model(**inputs).logits).norm() for n in (whitened, plain))
    assert error < plain_error


class Sum(nn.Module):
    """Two inputs, of which the second is read by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 32), nn.Linear(4, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.left(x) + self.right(y)).relu())


def test_budgets_hold_for_a_network_of_two_tensors() -> None:
    torch.manual_seed(0)
    model, inputs = Sum(), (torch.randn(5, 8), torch.randn(5, 4))
    assert measuring.macs(model, inputs) == 32 * (8 + 4 + 3)
    small = compress_to(model, FilterPruning(), inputs, keep_macs=0.5)
    assert measuring.macs(small, inputs) == 16 * (8 + 4 + 3)
