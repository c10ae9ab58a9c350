"""The refit: exact where nothing is lost, never worse on held-out data, and it leaves all else alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import (
    Chain,
    Compressor,
    FilterPruning,
    HeadPruning,
    Int8,
    LowRank,
    Magnitude,
    Plan,
    SemiStructured,
    compress,
    refit,
    replay,
    skeleton,
)
from pliant.compression.calibration import Calibration
from pliant.compression.refit import Refitter
from pliant.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore:few calibration")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refitted(
    model: nn.Module, compressor: Compressor[Any], example: Any, data: Any
) -> tuple[nn.Module, nn.Module, Plan]:
    """Return the cut network, the refitted one and its plan."""
    calibration = Calibration(data, model, example)
    analysis = compressor.analyse(model, example, calibration)
    plan = compressor.plan(model, example, analysis=analysis)
    cut = compressor.apply(model, plan, analysis=analysis)
    small, plan = Refitter(model, example, calibration).refit(cut, plan)
    assert plan.refit is not None
    return cut, small, plan


def error(model: nn.Module, small: nn.Module, x: Any) -> float:
    with torch.no_grad():
        y, z = copy.deepcopy(model).eval()(x).double(), copy.deepcopy(small).eval()(x).double()
    return float((y - z).square().sum() / (y - y.mean(0)).square().sum())


def normed(model: nn.Module, *data: Tensor) -> nn.Module:
    """Return the model in float64 with BatchNorm statistics of data."""
    model = model.double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(*data)
    return model.eval()


# --- exact answers ------------------------------------------------------------------------------------------


def linear(depth: int, width: int = 12, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=bias) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, width), *layers, nn.Linear(width, 5)).double()


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", [False, True])
def test_a_linear_network_on_data_of_a_subspace_loses_nothing(
    depth: int, bias: bool, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sweep settles a layer where those before it are settled; layer by layer, two sweeps settle all.
    monkeypatch.setattr(refit, "MOST_SWEEPS", 2 if parts else depth + 2)
    if parts:
        monkeypatch.setattr(refit, "MEMORY", 1)
    model = linear(depth, bias=bias)
    x = drawn(600, 4) @ drawn(4, 8, seed=1)
    _, small, plan = refitted(model, FilterPruning(0.5, "uniform"), x[:2], [x[:400]])
    assert small[0].out_features < 12  # type: ignore[index]
    assert error(model, small, x[400:]) < 1e-5
    assert plan.refit is not None
    assert plan.refit.result == "refitted"
    assert plan.refit.errors["refitted"] < 1e-5 < plan.refit.errors["cut"]


def test_duplicate_channels_leave_for_nothing_and_the_refitted_network_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5)).double()
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p[5:] = p[:5]
    x = drawn(4000, 6)
    cut, small, plan = refitted(model, FilterPruning(0.5), x[:2], x.split(500))
    (kept,) = [layer.outputs for layer in plan.layers if layer.name == "0"]
    assert kept is not None
    assert sorted(position % 5 for position in kept) == [0, 1, 2, 3, 4]
    assert error(model, cut, x) > 1e-2
    assert error(model, small, x) < 1e-6


def test_a_constant_channel_leaves_for_nothing_where_a_bias_takes_it_over() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 10
    x = drawn(4000, 6)
    cut, small, plan = refitted(model, FilterPruning(0.1), x[:2], x.split(500))
    assert plan.layers[0].outputs == (0, 1, 2, 4, 5, 6, 7)
    assert error(model, cut, x) > 1
    assert error(model, small, x) < 1e-12


def test_the_same_constant_before_a_batchnorm() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)]
    x = drawn(256, 3, 7, 7)
    model = normed(nn.Sequential(*layers, nn.BatchNorm2d(6), nn.Flatten()), x)
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0, 9
    model = normed(model, x)
    cut, small, plan = refitted(model, FilterPruning(0.1), x[:2], x.split(32))
    assert plan.layers[0].outputs == (0, 1, 3, 4, 5, 6, 7)
    assert error(model, cut, x) > 1
    assert error(model, small, x) < 1e-3  # statistics of batches are not those of all images


# --- masks and removals -------------------------------------------------------------------------------------


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU()),
        *(nn.Conv2d(10, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)),
    )


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def attention() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=i == 1) for i in range(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(60, 3)).double().eval()


IMAGES, VECTORS, TOKENS = drawn(160, 3, 8, 8), drawn(400, 6), drawn(160, 5, 12)
PAIRS: dict[str, tuple[Callable[[], nn.Module], Tensor, type[FilterPruning]]] = {
    "convolutions": (lambda: normed(convolutional(), IMAGES), IMAGES, FilterPruning),
    "linear layers": (perceptron, VECTORS, FilterPruning),
    "heads": (attention, TOKENS, HeadPruning),
    "neurons": (attention, TOKENS, FilterPruning),
}


@pytest.mark.parametrize("name", PAIRS)
def test_masked_and_small_networks_are_refitted_to_the_same(name: str) -> None:
    build, x, kind = PAIRS[name]
    model = build()
    data = x.split(len(x) // 10)
    removed, small, plan = refitted(model, kind(0.4), x[:2], data)
    cut, masked, other = refitted(model, kind(0.4, mode="mask"), x[:2], data)
    assert [layer.outputs for layer in plan.layers] == [layer.outputs for layer in other.layers]
    assert plan.refit is not None
    assert other.refit is not None
    assert plan.refit.result == other.refit.result == "refitted"
    with torch.no_grad():
        torch.testing.assert_close(removed.eval()(x), cut.eval()(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-8, atol=1e-8)
    for layer in other.layers:  # what a mask has zeroed stays zero
        dense, zeroed = model.get_submodule(layer.name), masked.get_submodule(layer.name)
        for key, value in zeroed.named_parameters(recurse=False):
            before = cut.get_submodule(layer.name).get_parameter(key)
            gone = set(range(len(value))) - set(layer.outputs or range(len(value)))
            assert not value[sorted(gone)].any()
            assert not value[before == 0].any() or not dense.get_parameter(key).all()
    for a, b in zip(plan.refit.layers, other.refit.layers, strict=True):
        assert (a.name, a.damping) == (b.name, b.damping)


@pytest.mark.parametrize("compressor", [Magnitude(0.7), SemiStructured(), Chain(FilterPruning(0.3), Magnitude(0.5))])
def test_zeros_stay_zeros(compressor: Compressor[Any]) -> None:
    model = normed(convolutional(), IMAGES)
    cut, small, plan = refitted(model, compressor, IMAGES[:2], IMAGES.split(16))
    assert plan.refit is not None
    assert plan.refit.result == "refitted"
    for before, after in zip(cut.parameters(), small.parameters(), strict=True):
        if before.dim() > 1:
            assert torch.equal(before == 0, after == 0)


CHAINS: dict[str, Compressor[Any]] = {
    "filters, rank": Chain(FilterPruning(0.3), LowRank(0.4)),
    "rank, filters": Chain(LowRank(0.4), FilterPruning(0.3)),
    "filters, rank, filters": Chain(FilterPruning(0.2), LowRank(0.3), FilterPruning(0.2)),
    "filters, filters": Chain(FilterPruning(0.3), FilterPruning(0.3)),
    "mask, filters": Chain(FilterPruning(0.3, mode="mask"), FilterPruning(0.5)),
    "rank, spatial": LowRank(0.5),
    "rank, channel": LowRank(0.5, scheme="channel"),
    "filters, eight bits": Chain(FilterPruning(0.3), Int8()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_and_factorised_layers(name: str) -> None:
    model = normed(convolutional(), IMAGES)
    cut, small, plan = refitted(model, CHAINS[name], IMAGES[:2], IMAGES.split(16))
    record = plan.refit
    assert record is not None
    assert record.errors[record.result] == min(record.errors.values())
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if name == "filters, eight bits":
        assert dict(record.unfitted).keys() | {fit.name for fit in record.layers} == layers
        assert dict(record.unfitted)["12"] == "has no weights that can be fitted"
    else:
        assert record.result == "refitted"
        assert {fit.name.removesuffix(".expand") for fit in record.layers} == layers
        assert record.unfitted == ()
        fresh = drawn(200, 3, 8, 8, seed=5)
        # The last layer has 96 inputs and sees 120 images.
        assert error(model, small, fresh) < 1.1 * error(model, cut, fresh)


# --- named with a reason ------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that cannot be refitted, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.spare = nn.Linear(3, 3)
        self.read = nn.Linear(6, 6)
        self.own = Own(6, 6)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        x = self.other(self.tied(x).relu()) + self.own(x) + self.computed(x)
        return self.up(nn.functional.linear(x, self.read.weight).unsqueeze(2)).flatten(1)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias)


def test_layers_that_are_not_refitted_are_named_with_a_reason() -> None:
    cut, small, plan = refitted(Odd().double(), FilterPruning(0.5), VECTORS[:2], [VECTORS])
    assert plan.refit is not None
    assert [fit.name for fit in plan.refit.layers] == ["a", "b"]
    reasons = dict(plan.refit.unfitted)
    assert reasons["up"] == "is a transposed convolution"
    assert reasons["tied"] == reasons["other"] == "shares a parameter with another layer"
    assert "is not called" in reasons["spare"]
    assert "reads its weight" in reasons["read"]
    assert "forward of its own" in reasons["own"]
    assert reasons["computed"] == "has no weights that can be fitted"
    assert set(reasons) == {"up", "tied", "other", "spare", "read", "own", "computed"}
    for name, tensor in cut.state_dict().items():
        same = torch.equal(tensor, small.state_dict()[name])
        assert same == (name.partition(".")[0] != "b"), name  # what a reads has not changed
    text = str(plan)
    assert "refit on 400 samples: refitted" in text
    assert "not refitted: up: is a transposed convolution" in text


def test_attention_of_other_kinds_is_named() -> None:
    class Net(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.core = nn.MultiheadAttention(12, 4, batch_first=True, **options)
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.core(x, x, x[..., : self.core.vdim])[0]).tanh())

    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"vdim": 11}):
        model = Net(**options).double()
        cut, small, plan = refitted(model, Magnitude(0.5), TOKENS[:2], TOKENS.split(20))
        assert plan.refit is not None
        assert {fit.name for fit in plan.refit.layers} == {"a", "b"}
        assert set(dict(plan.refit.unfitted)) == {"core", "core.out_proj"}
        assert error(model, small, TOKENS) < error(model, cut, TOKENS)


# --- all else stays -----------------------------------------------------------------------------------------


def test_models_modes_hooks_and_the_random_state_do_not_change() -> None:
    model = normed(convolutional(), IMAGES).append(nn.Dropout(0.5)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    called: list[nn.Module] = []
    model[3].register_forward_hook(lambda module, *_: called.append(module))
    plan = FilterPruning(0.5).plan(model, IMAGES[:2])
    cut = FilterPruning(0.5).apply(model, plan)
    states = [copy.deepcopy(net.state_dict()) for net in (model, cut)]
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    calibration = Calibration(IMAGES.split(16), model, IMAGES[:2])
    refitter = Refitter(model, IMAGES[:2], calibration)
    small, _ = refitter.refit(cut, plan)
    assert torch.equal(torch.get_rng_state(), random)
    for net, state in zip((model, cut), states, strict=True):
        torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    for net in (model, cut, small):
        assert [m.training for m in net.modules()] == modes
        assert [len(m._forward_hooks) for m in net.modules()] == [int(i == 4) for i, _ in enumerate(net.modules())]
        assert not any(m._forward_pre_hooks for m in net.modules())
        assert [p.requires_grad for p in net.parameters()] == [i > 0 for i, _ in enumerate(net.parameters())]
        assert all(p.grad is None for p in net.parameters())
    assert small[1].momentum is None
    again, _ = refitter.refit(cut, plan)  # dropout and sampling are no noise
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    small.train()(IMAGES).sum().backward()


def test_nothing_is_done_where_nothing_is_lost() -> None:
    model = perceptron()
    cut, small, plan = refitted(model, FilterPruning(0.0), VECTORS[:2], [VECTORS])
    assert small is cut
    assert plan.refit is not None
    assert (plan.refit.result, plan.refit.layers, plan.refit.errors["cut"]) == ("cut", (), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models_of_all_precisions(dtype: torch.dtype) -> None:
    model = perceptron().to(dtype)
    x = VECTORS.to(dtype)
    cut, small, _ = refitted(model, FilterPruning(0.5), x[:2], x.split(40))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert error(model, small, x) < error(model, cut, x)


# --- plans --------------------------------------------------------------------------------------------------


def test_a_refitted_plan_is_stored_and_not_replayed() -> None:
    model = perceptron()
    _, small, plan = refitted(model, FilterPruning(0.5), VECTORS[:2], [VECTORS])
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert str(again) == str(plan)
    with pytest.raises(BadInput, match="refitted on calibration data, which a plan does not hold") as raised:
        replay(model, again)
    assert "\n" not in str(raised.value)
    network = skeleton(model, again)
    network.load_state_dict(small.state_dict())
    torch.testing.assert_close(network(VECTORS), small(VECTORS))
    assert plan.refit is not None
    cut = dataclasses.replace(plan, refit=dataclasses.replace(plan.refit, result="cut"))
    assert replay(model, cut)(VECTORS).shape == (400, 3)


def test_few_samples_warn_once_and_never_make_held_out_outputs_worse() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 5)).double()
    x = drawn(12, 20)
    with pytest.warns(UserWarning, match="few calibration samples: .* samples in place of 12 would do") as seen:
        _, _, plan = refitted(model, FilterPruning(0.5), x[:2], [x])
    assert len(seen) == 1
    assert plan.refit is not None
    assert plan.refit.errors[plan.refit.result] <= plan.refit.errors["cut"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model, FilterPruning(0.5), x[:2], [drawn(400, 20)])
