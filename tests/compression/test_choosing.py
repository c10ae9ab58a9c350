"""What channels cost on data: known answers on networks, whatever kind of layer reads the channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, HeadPruning, choosing, moments
from pliant.compression.calibration import Calibration
from pliant.compression.choosing import loss_curves
from pliant.compression.elimination import Curve, Reader, elimination_order
from pliant.compression.moments import Moment
from pliant.structure import coupled_channels

pytestmark = pytest.mark.filterwarnings("ignore:few calibration")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curves(model: nn.Module, data: Tensor) -> dict[str, Curve]:
    groups = coupled_channels(model, data[:2]).groups
    found = loss_curves(model, groups, Calibration([data], model, data[:2]))
    return {group.name: curve for group, curve in zip(groups, found, strict=True)}


def mlp(*between: nn.Module, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 5, bias=bias)).double()


def regularised(second: Tensor, mean: Tensor, rows: int, absorbed: bool = True) -> Tensor:
    return Moment(second.unsqueeze(0), mean.unsqueeze(0), rows, False, absorbed).regularised()[0]


def by_hand(weight: Tensor, x: Tensor, width: int = 1, absorbed: bool = True) -> Curve:
    """Return the curve of a matrix that reads rows x, whose channels have ``width`` columns side by side."""
    second = regularised(x.T @ x / len(x), x.mean(0), len(x), absorbed)
    return elimination_order([Reader(weight.detach(), second, torch.arange(x.shape[1]).view(-1, width))])


def assert_same(got: Curve, expected: Curve) -> None:
    assert torch.equal(got.order, expected.order)
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-8, atol=1e-10)


# --- known answers ------------------------------------------------------------------------------------------


@pytest.fixture
def hardly_damped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "RIDGE", 1e-11)
    plain = Moment.regularised

    def regularised(self: Moment) -> Tensor:  # as with many rows: nothing is shrunk
        return plain(Moment(self.second, self.mean, 10**15, self.by_channel, self.absorbed))

    monkeypatch.setattr(Moment, "regularised", regularised)


@pytest.mark.usefixtures("hardly_damped")
@pytest.mark.parametrize("bias", [True, False])
def test_a_duplicate_leaves_for_nothing(bias: bool) -> None:
    model = mlp(nn.ReLU(), bias=bias)
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p[5] = p[2]
    curve = curves(model, drawn(200, 6))["0"]
    assert int(curve.order[0]) in (2, 5)
    assert curve.losses[1] < 1e-9 < 1e-4 < curve.losses[2]


@pytest.mark.usefixtures("hardly_damped")
def test_a_combination_of_others_leaves_for_nothing() -> None:
    model = mlp()  # no activation
    with torch.no_grad():
        model[0].weight[:, 4:] = 0  # eight channels of four inputs
    curve = curves(model, drawn(200, 6))["0"]
    assert (curve.losses[:5] < 1e-9).all()
    assert curve.losses[5] > 1e-3


@pytest.mark.usefixtures("hardly_damped")
@pytest.mark.parametrize(
    ("absorbed_by", "free"), [("bias", True), ("BatchNorm", True), ("nothing", False), ("ReLU, BatchNorm", False)]
)
def test_a_constant_costs_nothing_where_it_is_absorbed(absorbed_by: str, free: bool) -> None:
    model = mlp(nn.ReLU(), bias=absorbed_by == "bias")
    if "ReLU" in absorbed_by:
        model.append(nn.ReLU(inplace=True))
    if "BatchNorm" in absorbed_by:
        model.append(nn.BatchNorm1d(5).double())
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 50
        model[0].bias[0] = 60  # others are not made up of it: they are all but constant
        model[0].weight[0] *= 20
    curve = curves(model, drawn(200, 6))["0"]
    if free:
        assert curve.order[0] == 3
        assert curve.losses[1] < 1e-9
    else:
        assert curve.order[0] != 3


def test_a_dead_channel_leaves_first() -> None:
    model = mlp(nn.ReLU())
    with torch.no_grad():
        model[0].bias[6] = -100
    curve = curves(model, drawn(200, 6))["0"]
    assert curve.order[0] == 6
    assert curve.losses[1] < 0.01  # the ridge, and the shrinkage for 200 rows


# --- readers of every kind ----------------------------------------------------------------------------------


def test_a_linear_layer() -> None:
    model, x = mlp(nn.ReLU()), drawn(200, 6)
    assert_same(curves(model, x)["0"], by_hand(model[2].weight, model[0](x).relu().detach()))
    model = mlp(nn.ReLU(), bias=False)
    assert_same(curves(model, x)["0"], by_hand(model[2].weight, model[0](x).relu().detach(), absorbed=False))


def test_a_linear_layer_that_reads_a_flattened_image() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5)).double()
    x = drawn(90, 3, 4, 4)
    assert_same(curves(model, x)["0"], by_hand(model[3].weight, model[:3](x).detach(), 4))


def patches(x: Tensor, kernel: int) -> Tensor:
    return nn.functional.unfold(x, kernel).transpose(1, 2).flatten(0, 1).detach()


def test_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten()).double()
    x = drawn(30, 3, 5, 5)
    expected = by_hand(model[2].weight.flatten(1), patches(model[:2](x), 3), 9)
    assert_same(curves(model, x)["0"], expected)


def by_channel(model: nn.Module, x: Tensor) -> Curve:
    """Return the curve of a convolution with a weight (outputs, inputs, kernel), by its channels."""
    weight = model[2].weight if isinstance(model[2], nn.Conv2d) else model[2].weight.transpose(0, 1)
    rows = model[:2](x).movedim(1, -1).flatten(0, -2).detach()
    return by_hand(weight.movedim(1, -1).flatten(0, -2), rows)


def test_a_wide_convolution_and_a_transposed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(30, 3, 5, 5)
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), kind(6, 5, 3), nn.Flatten()).double()
        monkeypatch.setitem(moments.MAX_COLUMNS, "convolution", 53)
        assert_same(curves(model, x)["0"], by_channel(model, x))


def test_conv1d_of_transformers() -> None:
    library = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(library.Conv1D(8, 6), nn.ReLU(), library.Conv1D(5, 8)).double()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[2].weight)
    x = drawn(200, 6)
    assert_same(curves(model, x)["0"], by_hand(model[2].weight.T, model[0](x).relu().detach()))


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_attention(batch_first: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.fc = nn.MultiheadAttention(12, 4, batch_first=batch_first), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.core(x, x, x)[0])

    torch.manual_seed(0)
    model, x = Attention().double().eval(), drawn(40, 6, 12)
    found = HeadPruning().analyse(model, x[:2], [x[i : i + 5] for i in range(0, 40, 5)]).curves
    assert found is not None
    parts = x.split(5)
    rows = []
    for part in parts:
        tokens = part if batch_first else part.transpose(0, 1)
        q, k, v = (
            nn.functional.linear(tokens, w, b).unflatten(-1, (4, 3)).transpose(1, 2)
            for w, b in zip(model.core.in_proj_weight.chunk(3), model.core.in_proj_bias.chunk(3), strict=True)
        )
        rows.append(((q @ k.mT / 3**0.5).softmax(-1) @ v).transpose(1, 2).flatten(0, 1).flatten(1))
    assert_same(found[0], by_hand(model.core.out_proj.weight, torch.cat(rows).detach(), 3))


class Forked(nn.Module):
    """Channels that two layers read, one of them twice as loud as the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).relu()
        return self.b(h), 2 * self.c(h)


def test_losses_of_all_readers_count_alike() -> None:
    model, x = Forked().double(), drawn(200, 6)
    h = model.a(x).relu().detach()
    second = regularised(h.T @ h / len(h), h.mean(0), len(h))
    blocks = torch.arange(8).view(8, 1)
    readers = [Reader(layer.weight.detach(), second, blocks) for layer in (model.b, model.c)]
    assert_same(curves(model, x)["a"], elimination_order(readers))


# --- the pass over the data ---------------------------------------------------------------------------------


def deep() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for i in range(4) for m in (nn.Linear(6 + i, 7 + i), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(10, 3)).double()


def test_moments_that_do_not_fit_into_the_memory_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep(), drawn(200, 6)
    expected = curves(model, x)
    passes: list[int] = []
    plain = Calibration.inputs
    monkeypatch.setattr(Calibration, "inputs", lambda self: passes.append(1) or plain(self))
    for memory, count in ((0, 4), (8 * (49 + 64), 3), (8 * (49 + 64 + 81 + 100), 1)):
        passes.clear()
        monkeypatch.setattr(choosing, "MEMORY", memory)
        for name, curve in curves(model, x).items():
            assert_same(curve, expected[name])
        assert len(passes) == count


@pytest.mark.parametrize("build", [deep, lambda: nn.Sequential(mlp(nn.BatchNorm1d(8), nn.Dropout()))])
def test_the_model_and_the_random_state_do_not_change(build: Callable[[], nn.Module]) -> None:
    model, x = build().double().train(), drawn(50, 6)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = curves(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert len(model._forward_hooks) == 1
    for name, curve in curves(model, x).items():  # dropout is off: the same again
        assert_same(curve, first[name])


def test_the_plan_says_which_importance_was_used() -> None:
    model, x = deep(), drawn(50, 6)
    with_data = FilterPruning(0.5).analyse(model, x[:2], [x])
    assert FilterPruning(0.5).plan(model, x[:2], analysis=with_data).options["importance"] == "loss"
    assert FilterPruning(0.5).plan(model, x[:2]).options["importance"] == "l2"
    assert FilterPruning(0.5, importance="l1").analyse(model, x[:2], [x]).curves is None
