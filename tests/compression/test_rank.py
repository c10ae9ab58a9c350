"""Low rank: the factors are the truncated SVD with all properties of the layer, and never a larger network."""

from __future__ import annotations

import copy
import itertools
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pliant.compression import Chain, FilterPruning, LowRank, compress
from pliant.compression.allocation import Options, allocate, energy_order, greedy_order, nearest, uniform_order
from pliant.compression.factored import FactoredConvolution, factored, matrices
from pliant.compression.rank import _decompose, _truncate
from pliant.compression.spectrum import cuts_of
from pliant.errors import BadInput, Refused
from pliant.experiments.models import MODELS, build_model
from pliant.measuring import macs


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride and padding": {"stride": 2, "padding": (2, 1)},
    "same, dilated": {"padding": "same", "dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflected, no bias": {"padding": 2, "padding_mode": "reflect", "bias": False, "stride": 3},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("shape", [(8, 12, (3, 2)), (4, 40, 1), (16, 6, 3)])
def test_factored_convolution_is_the_dense_one_with_a_truncated_weight(shape: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*shape, **options)
    x = torch.randn(2, shape[0], 11, 10)
    full = min(matrices(layer).shape[1:])
    for rank in {1, full // 2, full}:
        thin = _truncate(layer, _decompose(layer), rank)
        u, s, vh = torch.linalg.svd(matrices(layer).double(), full_matrices=False)
        s[:, rank:] = 0
        dense = nn.Conv2d(*shape, **options)
        with torch.no_grad():
            dense.weight.copy_((u * s.unsqueeze(1) @ vh).reshape(dense.weight.shape))
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)
        torch.testing.assert_close(output(thin, x), output(dense, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(_truncate(layer, _decompose(layer), full), x), output(layer, x))


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("shape", [(8, 12, (3, 2)), (4, 40, (2, 5)), (16, 6, 3)])
def test_spatial_factors_are_one_convolution_per_direction(shape: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*shape, **options).double()
    height, width = layer.kernel_size
    x = torch.randn(2, shape[0], 11, 10, dtype=torch.float64)
    full = min(matrices(layer, "spatial").shape[1:])
    errors = []
    for rank in (1, full // 2, full):
        thin: Any = _truncate(layer, _decompose(layer, "spatial"), rank)
        assert (thin.reduce.kernel_size, thin.expand.kernel_size) == ((height, 1), (1, width))
        # W[o, i, a, b] = Σ_r expand[o, r, b] · reduce[r, i, a], in every group
        product = torch.einsum(
            "gorb,gria->goiab",
            *(
                factor.weight.squeeze(dim).unflatten(0, (layer.groups, -1))
                for factor, dim in ((thin.expand, 2), (thin.reduce, 3))
            ),
        ).flatten(0, 1)
        dense = nn.Conv2d(*shape, **options).double()
        with torch.no_grad():
            dense.weight.copy_(product)
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)
        torch.testing.assert_close(output(thin, x), output(dense, x))
        errors.append(float((product - layer.weight).detach().square().sum()))
    # The best approximation of the rank, by Eckart and Young, of the matrix (filter, kernel column) × (input, row).
    split = layer.weight.detach().unflatten(0, (layer.groups, -1))
    singular = torch.linalg.svdvals(torch.einsum("goiab->gobia", split).flatten(1, 2).flatten(2, 3))
    expected = [float(singular[:, rank:].square().sum()) for rank in (1, full // 2, full)]
    assert errors == pytest.approx(expected, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(7, 9), torch.randn(3, 4, 7)),
        (nn.Linear(9, 7, bias=False), torch.randn(3, 9)),
        (nn.Conv1d(6, 8, 5, padding=2, dilation=2), torch.randn(2, 6, 12)),
        (nn.Conv3d(4, 8, 3, stride=2, groups=2), torch.randn(2, 4, 7, 7, 7)),
    ],
    ids=["linear", "linear without bias", "1-d", "3-d"],
)
def test_full_rank_reproduces_the_output(layer: Any, x: Tensor) -> None:
    thin = _truncate(layer, _decompose(layer), min(matrices(layer).shape[1:]))
    torch.testing.assert_close(output(thin, x), output(layer, x), rtol=1e-5, atol=1e-5)


def test_factors_inherit_type_flags_and_gradient_needs() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    thin = factored(layer, torch.zeros(1, 8, 2), torch.zeros(1, 2, 8))
    assert {p.dtype for p in thin.parameters()} == {torch.bfloat16}
    assert not thin.training
    assert not thin.expand.training
    assert [p.requires_grad for p in thin.parameters()] == [False, False, True]
    assert thin.expand.bias is not layer.bias


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_factors_of_a_convolution_answer_as_it_did(options: dict[str, Any], scheme: str) -> None:
    layer = nn.Conv2d(16, 6, (3, 5), **options)
    thin = copy.deepcopy(_truncate(layer, _decompose(layer, scheme), 2))
    asked = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert [getattr(thin, name) for name in asked] == [getattr(layer, name) for name in asked]
    assert not hasattr(thin, "weight")
    assert list(thin.state_dict()) == list(nn.Sequential(OrderedDict(thin.named_children())).state_dict())


def test_factors_that_lose_channels_say_so() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3), nn.Conv2d(16, 5, 1)), torch.randn(2, 3, 8, 8)
    small: Any = compress(model, Chain(LowRank(0.3), FilterPruning(0.3)), x)
    first, second = small[0], small[1]
    assert isinstance(second, FactoredConvolution)
    assert second.in_channels == second.reduce.weight.shape[1] == first.out_channels < 32
    assert second.out_channels == second.expand.weight.shape[0]
    small = compress(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)), LowRank(0.5), torch.randn(2, 64))
    assert (small[0].in_features, small[0].out_features) == (64, 32)


class Padded(nn.Module):
    """A convolution whose padding depends on its stride and on the image."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        value: Any = getattr(self.conv, self.read)
        return self.conv(nn.functional.pad(x, (0, value[0] - 1, 0, value[1] - 1)) if self.read == "stride" else x)


def test_a_block_that_asks_for_the_stride_is_factorised_and_one_that_reads_the_weight_is_not() -> None:
    x = torch.randn(2, 8, 8, 8)
    assert not refused(Padded("stride"), x)
    assert "has no attribute 'weight'" in refused(Padded("weight"), x)["conv"]


@pytest.mark.parametrize("name", MODELS)
def test_shipped_networks_shrink_to_the_ratio_and_never_grow(name: str) -> None:
    side = 32 if name == "vgg16" else 8
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_shape=(3, side, side), width=0.25).eval()
    x = torch.randn(2, 3, side, side)
    analysis = LowRank().analyse(model, x)
    for allocation, ratio in itertools.product(("uniform", "global"), (0.0, 0.02, 0.3, 0.7, 0.99)):
        low = LowRank(ratio, allocation)
        plan = low.plan(model, x, analysis=analysis)
        small = low.apply(model, plan, analysis=analysis)
        assert size(small) == plan.params_after <= plan.params_before == size(model)
        assert all(layer.params <= layer.params_dense for layer in plan.layers)
        if ratio < 0.9:
            step = max(s.cost(1, "params") for (s,) in analysis.layers.values())
            total = sum(s.dense("params") for (s,) in analysis.layers.values())
            assert abs(plan.ratio_removed - ratio) <= step / total
        assert torch.isfinite(output(small, x)).all()
        if ratio == 0:
            assert torch.equal(output(small, x), output(model, x))


def test_multiplications_shrink_with_the_parameters_under_stride() -> None:
    model = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
    x = torch.randn(1, 16, 16, 16)
    small = compress(model, LowRank(0.5, scheme="channel"), x)
    flops = []
    for network in (model, small):
        with FlopCounterMode(display=False) as counter:
            network(x)
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(size(small) / size(model))
    assert size(small) < size(model)


@pytest.mark.parametrize("scheme", ["channel", "spatial", "best"])
@pytest.mark.parametrize("cost", ["params", "macs"])
def test_no_scheme_adds_parameters_or_multiplications_to_any_layer(scheme: str, cost: str) -> None:
    torch.manual_seed(0)
    for layer in (nn.Conv2d(6, 40, 3, stride=2), nn.Conv2d(40, 6, (2, 5), stride=(1, 4)), nn.Conv2d(9, 9, 3, stride=3)):
        x = torch.randn(1, layer.in_channels, 13, 13)
        low = LowRank(0.0, scheme=scheme, cost=cost)
        analysis = low.analyse(layer, x)
        for ratio in [r / 20 for r in range(20)] if analysis.layers else []:
            plan = low.at(ratio).plan(layer, x, analysis=analysis)
            small = low.apply(layer, plan, analysis=analysis)
            changed = plan.params_after < plan.params_before
            assert (macs(small, x) < macs(layer, x)) == changed
            assert size(small) == plan.params_after
            assert output(small, x).shape == output(layer, x).shape


def test_best_scheme_loses_no_more_than_either_at_any_size() -> None:
    torch.manual_seed(0)
    mixed = nn.Conv2d(16, 16, 3, bias=False)
    with torch.no_grad():  # of rank 2 in the spatial sense, of full rank in the other
        mixed.weight.copy_(torch.einsum("orb,ria->oiab", torch.randn(16, 2, 3), torch.randn(2, 16, 3)))
    model = nn.Sequential(mixed, nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1))
    x = torch.randn(1, 16, 9, 9)
    spectra = {scheme: LowRank(scheme=scheme).analyse(model, x).layers for scheme in ("channel", "spatial", "best")}
    for name, cost in itertools.product("012", ("params", "macs")):
        curves = {scheme: cuts_of(layers[name], cost) for scheme, layers in spectra.items()}
        best = curves.pop("best")
        assert [cut.cost for cut in best] == sorted({cut.cost for cut in best}, reverse=True)
        assert [cut.loss for cut in best] == sorted(cut.loss for cut in best)
        for other in itertools.chain(*curves.values()):
            assert any(cut.cost <= other.cost and cut.loss <= other.loss for cut in best)
    plan = LowRank(0.5, scheme="best").plan(model, x)
    assert plan.layers[0].scheme == "spatial"
    assert plan.layers[2].scheme != "spatial"  # a 1×1 kernel has one direction
    small = compress(model, LowRank(0.5, scheme="best"), x)
    torch.testing.assert_close(output(small[0], x), output(mixed, x), rtol=1e-4, atol=1e-4)


def test_a_ratio_of_multiplications_is_met_in_multiplications() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5, image_shape=(3, 16, 16), width=0.5).eval()
    x = torch.randn(2, 3, 16, 16)
    low = LowRank(cost="macs")
    analysis = low.analyse(model, x)
    factorable = sum(s.dense("macs") for (s,) in analysis.layers.values()) // len(x)
    for ratio in (0.2, 0.5, 0.8):
        by_macs, by_params = (
            LowRank(ratio, cost=cost).plan(model, x, analysis=analysis) for cost in ("macs", "params")
        )
        small = low.apply(model, by_macs, analysis=analysis)
        assert 1 - by_macs.ratio_removed == pytest.approx(1 - (macs(model, x) - macs(small, x)) / factorable)
        assert by_macs.ratio_removed == pytest.approx(ratio, abs=0.005)
        assert "multiply-accumulates" in str(by_macs)
        # Early layers are applied to many positions: they lose more where multiplications count.
        early = [
            next(x for x in plan.layers if "layer1" in x.name or "stage1" in x.name or x is plan.layers[1])
            for plan in (by_macs, by_params)
        ]
        assert early[0].params <= early[1].params


def test_ten_ratios_cost_one_decomposition_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=5, image_shape=(3, 8, 8), width=0.5).eval()
    x = torch.randn(2, 3, 8, 8)
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: calls.append(a.shape) or eigh(a))
    analysis = LowRank().analyse(model, x, [torch.randn(8, 3, 8, 8)])
    for ratio in range(10):
        low = LowRank(ratio / 10)
        low.apply(model, low.plan(model, x, analysis=analysis), analysis=analysis)
    assert len(calls) == len(analysis.layers) > 5


# --- which ranks --------------------------------------------------------------------------------------------


def with_spectrum(singular_values: list[float]) -> nn.Linear:
    n = len(singular_values)
    layer = nn.Linear(n, n, bias=False)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
    with torch.no_grad():
        layer.weight.copy_(u * torch.tensor(singular_values) @ v.T)
    return layer


def ranks(model: nn.Module, low: LowRank, x: Tensor) -> dict[str, int]:
    return {layer.name: layer.kept for layer in low.plan(model, x).layers}


def test_global_keeps_directions_by_relative_energy_and_uniform_does_not() -> None:
    torch.manual_seed(0)
    steep = [100.0, 100, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]  # two directions are all of it, at any scale
    flat = [1.0] * 8
    model = nn.Sequential(with_spectrum(steep), with_spectrum(flat))
    x = torch.randn(2, 8)
    # 128 weights; rank r costs 16 r. Down to 96: the flat layer stays dense, the steep one keeps its two.
    assert ranks(model, LowRank(0.25, "global"), x) == {"0": 2, "1": 8}
    assert ranks(model, LowRank(0.25, "uniform"), x) == {"0": 3, "1": 3}


def test_energy_keeps_the_same_share_of_every_layer() -> None:
    torch.manual_seed(0)
    spectra = [[4.0, 3, 2, 1, 1, 1, 1, 1], [9.0, 1, 1, 1, 1, 1, 1, 1], [1.0] * 8]
    model = nn.Sequential(*(with_spectrum(s) for s in spectra))
    x = torch.randn(2, 8)
    # Shares of Σσ² lost at rank 3, 2, 1: 5/34, 9/34, 18/34; 5/88, 6/88, 7/88; 5/8, 6/8, 7/8 (rank 4 saves nothing).
    for ratio, expected in (
        (0.25, [8, 1, 8]),
        (1 / 3, [3, 1, 8]),
        (5 / 12, [2, 1, 8]),
        (0.5, [1, 1, 8]),
        (7 / 12, [1, 1, 3]),
    ):
        assert list(ranks(model, LowRank(ratio, "energy"), x).values()) == expected


def test_zero_layer_is_cut_first_and_costs_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(with_spectrum([0.0] * 8), with_spectrum([1.0] * 8))
    x = torch.randn(2, 8)
    assert ranks(model, LowRank(0.375, "global"), x) == {"0": 1, "1": 8}
    assert torch.equal(output(compress(model, LowRank(0.375, "global"), x), x), output(model, x))


def test_groups_share_a_rank_and_decompose_apart() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, groups=2)
    small = compress(layer, LowRank(0.4), torch.randn(1, 8, 5, 5))
    assert small.reduce.groups == small.expand.groups == 2
    assert small.reduce.out_channels == small.expand.in_channels
    assert small.reduce.out_channels % 2 == 0


CURVES = [
    Options((10, 6, 4, 2), (0.0, 0.1, 0.5, 0.9)),
    Options((20, 9, 6, 3), (0.0, 0.05, 0.06, 0.8)),
    Options((8, 5), (0.0, 0.3)),
]


def cost_and_loss(chosen: Any) -> tuple[int, float]:
    pairs = [(curve.costs[i], curve.losses[i]) for curve, i in zip(CURVES, chosen, strict=True)]
    return sum(c for c, _ in pairs), sum(loss for _, loss in pairs)


def test_greedy_is_optimal_at_every_budget_it_meets_by_whole_steps() -> None:
    every = [cost_and_loss(c) for c in itertools.product(*(range(len(curve.costs)) for curve in CURVES))]
    steps = greedy_order(CURVES)
    chosen = [0] * len(CURVES)
    for step in steps:
        chosen[step.layer] = step.option
        cost, loss = cost_and_loss(allocate(CURVES, steps, cost_and_loss(chosen)[0]))
        assert (cost, loss) == cost_and_loss(chosen)
        assert loss <= min(other for c, other in every if c <= cost) + 1e-12
    assert chosen == [len(curve.costs) - 1 for curve in CURVES]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_loses_at_most_one_step_against_a_search_through_all(seed: int) -> None:
    drawn = random.Random(seed)
    curves = []
    for _ in range(4):
        count = drawn.randint(2, 6)
        costs = sorted(drawn.sample(range(1, 200), count), reverse=True)
        losses = [0.0, *sorted(drawn.random() for _ in range(count - 1))]
        curves.append(Options(tuple(costs), tuple(losses)))

    def total(chosen: Any) -> tuple[int, float]:
        pairs = [(curve.costs[i], curve.losses[i]) for curve, i in zip(curves, chosen, strict=True)]
        return sum(c for c, _ in pairs), sum(loss for _, loss in pairs)

    every = [total(c) for c in itertools.product(*(range(len(curve.costs)) for curve in curves))]
    steps = greedy_order(curves)
    largest = max(max(curve.losses) for curve in curves)
    for target in range(sum(c.costs[-1] for c in curves), sum(c.costs[0] for c in curves), 7):
        cost, loss = total(allocate(curves, steps, target))
        assert loss <= min(other for c, other in every if c <= cost) + largest


@pytest.mark.parametrize("order", [greedy_order, uniform_order, energy_order])
def test_allocation_takes_what_is_nearest_on_its_way(order: Any) -> None:
    steps = order(CURVES)
    reachable = sorted({cost_and_loss(allocate(CURVES, steps, t))[0] for t in range(45)})
    assert reachable[0] == 10
    assert reachable[-1] == 38
    for target in range(45):
        got = cost_and_loss(allocate(CURVES, steps, target))[0]
        assert abs(got - target) == min(abs(c - target) for c in reachable)


def test_uniform_removes_the_same_share() -> None:
    curves = [Options(tuple(range(n, 0, -1)), (0.0,) * n) for n in (10, 100, 1000)]
    chosen = allocate(curves, uniform_order(curves), 0.4 * 1110)
    assert [curve.costs[i] for curve, i in zip(curves, chosen, strict=True)] == [4, 40, 400]


def test_nearest_agrees_with_a_search_through_all() -> None:
    costs = [50, 41, 40, 22, 21, 3]
    for target in range(60):
        expected = min(range(6), key=lambda n: (abs(costs[n] - target), n))
        assert nearest(costs.__getitem__, 5, target) == expected


# --- what is left alone -------------------------------------------------------------------------------------


class Hooked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def refused(model: nn.Module, x: Tensor) -> dict[str, str]:
    return dict(LowRank(0.0).plan(model, x).refused)


def test_layers_that_cannot_be_replaced_are_refused_by_name() -> None:
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda m, args, out: out + 1)
    model = nn.Sequential(Hooked(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), *tied, hooked)
    model.append(nn.Linear(8, 1)).append(nn.Linear(1, 1))
    reasons = refused(model, torch.randn(2, 8))
    for name, part in {"0": "own", "1": "param", "2": "shares", "3": "shares", "4": "hooks", "5": "small"}.items():
        assert part in reasons[name]
    with pytest.raises(Refused, match="nothing to remove: 0: "):
        LowRank(0.5).plan(model, torch.randn(2, 8))


def test_depthwise_and_transposed_convolutions_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8), nn.ConvTranspose2d(16, 8, 3))
    reasons = refused(model, torch.randn(1, 8, 9, 9))
    assert "depthwise" in reasons["0"]
    assert "depthwise" in reasons["1"]
    assert "transposed" in reasons["2"]


def test_weights_that_the_parent_reads_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)  # three projections, not one
    assert "parent reads" in refused_attention(attention, torch.randn(2, 3, 8), torch.randn(2, 3, 6))["out_proj"]


def refused_attention(model: nn.Module, x: Tensor, memory: Tensor) -> dict[str, str]:
    return dict(LowRank(0.0).plan(model, (x, memory, memory)).refused)


def test_module_under_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    model = Twice()
    x = torch.randn(2, 8)
    small = compress(model, LowRank(0.5), x)
    assert small.a is small.b
    assert isinstance(small.a, nn.Sequential)
    assert size(small) < size(model)
    assert output(small, x).shape == (2, 8)


def test_analysis_of_other_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    analysis = LowRank().analyse(model, x)
    with torch.no_grad():
        model[0].weight.add_(1e-3)
    with pytest.raises(BadInput, match="'0' has changed"):
        LowRank().plan(model, x, analysis=analysis)


@pytest.mark.parametrize("options", [{"ratio": 1}, {"ratio": True}, {"allocation": "layer"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        LowRank(**options)
