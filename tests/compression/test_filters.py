"""Filter pruning: the small network equals its masked twin, the budget is met, the right channels leave."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, compress, masked_twin
from pliant.errors import BadInput, Refused
from pliant.experiments.models import MODELS, build_model
from tests.structure.test_verification import NASTY, LSTMNet

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shipped(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with BatchNorm statistics and shifts that are not those of the start."""
    side = 32 if name == "vgg16" else 8
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_shape=(3, side, side), width=0.125)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for shift in (module.bias, module.running_mean):
                nn.init.normal_(shift, 0, 0.3)
            for scale in (module.weight, module.running_var):
                nn.init.uniform_(scale, 0.5, 1.5)
    return model.eval(), torch.randn(2, 3, side, side)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("name", MODELS)
def test_small_network_equals_masked_twin_and_mask_mode(name: str) -> None:
    model, x = shipped(name)
    analysis = FilterPruning().analyse(model, x)
    for allocation in ("uniform", "global"):
        pruning = FilterPruning(0.4, allocation)
        plan = pruning.plan(model, x, analysis=analysis)
        small = pruning.apply(model, plan)
        mask = FilterPruning(0.4, allocation, mode="mask")
        masked = mask.apply(model, mask.plan(model, x, analysis=analysis))
        expected = output(masked_twin(model, plan), x)
        torch.testing.assert_close(output(small, x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output(masked, x), expected, rtol=1e-5, atol=1e-5)
        assert (expected - output(model, x)).abs().max() > 1e-4
        assert size(small) == plan.params_after < plan.params_before == size(model)
        assert [p.shape for p in masked.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vit_tiny"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_ratio_is_the_nearest_reachable_one(name: str, allocation: str) -> None:
    model, x = shipped(name)
    analysis = FilterPruning().analyse(model, x)
    plans = [FilterPruning(r / 100, allocation).plan(model, x, analysis=analysis) for r in range(0, 100, 5)]
    reachable = sorted({p.ratio_removed for p in plans})
    assert plans[0].ratio_removed == 0
    for plan in plans:
        assert abs(plan.ratio_removed - plan.ratio) <= min(abs(r - plan.ratio) for r in reachable) + 1e-12
    compressible = sum(dict(model.named_parameters())[n].numel() for n in plans[0].compressible)
    largest_channel = max(g.channels and compressible // g.channels for g in analysis.groups)
    within = [p for p in plans if p.ratio < reachable[-1]]
    assert all(abs(p.ratio_removed - p.ratio) <= largest_channel / compressible for p in within)


def test_compressible_is_what_removing_everything_would_delete() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = FilterPruning(0.5).plan(model, torch.randn(2, 3))
    # 12 + 4 for the filters and biases, 8 for the columns that read them; not the two biases of the classifier.
    assert set(plan.compressible) == {"0.weight", "0.bias", "2.weight"}
    assert plan.ratio_removed == 12 / 24
    assert plan.params_after == 14


def test_concatenated_columns_count_only_where_a_group_owns_them() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(3, 4), nn.Linear(3, 3), nn.Linear(7, 2)
            nn.utils.parametrizations.weight_norm(self.b)  # so that its group is refused

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cat([self.b(x), self.a(x)], 1).relu())

    model = Skip()
    x = torch.randn(5, 3)
    plan = FilterPruning(0.5).plan(model, x)
    assert plan.ratio_removed == 0.5
    assert plan.params_before - plan.params_after == (12 + 4 + 8) // 2
    small = FilterPruning().apply(model, plan)
    torch.testing.assert_close(output(small, x), output(masked_twin(model, plan), x))


def test_at_least_one_channel_stays_in_every_group_and_zero_removes_nothing() -> None:
    model, x = shipped("resnet8")
    for allocation in ("uniform", "global"):
        small = compress(model, FilterPruning(0.999, allocation, at_least=1), x)
        assert all(m.out_channels == 1 for m in small.modules() if isinstance(m, nn.Conv2d))
        assert output(small, x).shape == (2, 5)
    same = compress(model, FilterPruning(0.0), x)
    assert torch.equal(output(same, x), output(model, x))


def test_attributes_follow_the_tensors() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(8), nn.Conv2d(8, 4, 1)
    )
    model.append(nn.Flatten()).append(nn.Linear(64, 5))
    model[0].weight.requires_grad_(False)
    small = compress(model.train(), FilterPruning(0.6), IMAGES)
    first, norm, depthwise, prelu, last, _, classifier = small
    channels = first.out_channels
    assert channels < 8
    assert norm.num_features == len(norm.running_var) == prelu.num_parameters == channels
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (channels,) * 3
    assert last.in_channels == channels
    assert classifier.in_features == last.out_channels * 16
    assert not first.weight.requires_grad
    assert first.bias.requires_grad
    assert small.training
    small(IMAGES).sum().backward()


def test_zeroed_filters_are_not_the_twin_because_the_shift_flows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(4 * 36, 5)).eval()
    nn.init.constant_(model[1].bias, 0.5)
    pruning = FilterPruning(0.5)
    plan = pruning.plan(model, IMAGES)
    small = output(pruning.apply(model, plan), IMAGES)
    naive = copy.deepcopy(model)
    gone = [i for i in range(4) if i not in plan.layers[0].outputs]
    with torch.no_grad():
        naive[0].weight[gone] = 0
    assert (output(naive, IMAGES) - small).abs().max() > 0.01
    torch.testing.assert_close(output(masked_twin(model, plan), IMAGES), small)


# --- which channels -----------------------------------------------------------------------------------------


def scaled(rows: list[float], columns: int) -> Tensor:
    """Return a weight whose rows have the given l2 norms."""
    return torch.tensor(rows).unsqueeze(1) * torch.ones(len(rows), columns) / columns**0.5


def kept(model: nn.Module, pruning: FilterPruning, x: Tensor) -> dict[str, Any]:
    return {layer.name: layer.outputs for layer in pruning.plan(model, x).layers}


def two_layers(first: list[float], second: list[float]) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(scaled(first, 4))
        model[2].weight.copy_(scaled(second, 4))
    return model


def test_uniform_takes_the_smallest_of_every_group() -> None:
    model = two_layers([4, 1, 3, 2], [10, 40, 30, 20])
    assert kept(model, FilterPruning(0.55), torch.randn(2, 4)) == {"0": (0, 2), "2": (1, 2), "4": None}


def test_global_compares_energy_relative_to_the_layer() -> None:
    # Shares of energy: layer 0 has .25 each, layer 2 has one weak half; its absolute size does not matter.
    model = two_layers([1, 1, 1, 1], [100, 100, 1, 1])
    assert kept(model, FilterPruning(0.3, "global"), torch.randn(2, 4)) == {"0": None, "2": (0, 1), "4": None}


def test_global_ranks_by_parameters_freed() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 60))
    with torch.no_grad():  # equal shares everywhere: a channel of layer 2 frees 65 parameters, one of layer 0 only 7
        model[0].weight.copy_(scaled([1, 1, 1, 1], 2))
        model[2].weight.copy_(scaled([1, 1, 1, 1], 4))
    assert kept(model, FilterPruning(0.2, "global"), torch.randn(2, 2))["2"] == (0, 1, 2)
    assert kept(model, FilterPruning(0.2, "global"), torch.randn(2, 2))["0"] is None


def test_coupled_filters_count_together() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.a(x) + self.b(x)).relu())

    model = Residual()
    with torch.no_grad():  # b decides: norms² are 1 + 16, 4 + 1, 9 + 0
        model.a.weight.copy_(scaled([1, 2, 3], 4))
        model.b.weight.copy_(scaled([4, 1, 0], 4))
    plan = kept(model, FilterPruning(0.33), torch.randn(2, 4))
    assert plan["a"] == plan["b"] == (0, 2)


def test_importances_differ_where_they_should() -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)).eval()
    filters = torch.tensor([[3.0, 0, 0, 0], [1.0, 1, 1, 1], [2.5, 0.1, 0, 0]])  # l2: 3, 2, 2.5; l1: 3, 4, 2.6
    with torch.no_grad():
        model[0].weight.copy_(filters[:, :, None, None])
        model[1].weight.copy_(torch.tensor([0.1, 1, 1]))
        model[1].running_var.copy_(torch.tensor([1.0, 0.01, 1]))
    x = torch.randn(2, 4, 1, 1)
    for importance, expected in {"l2": (0, 2), "l1": (0, 1), "bn": (1, 2)}.items():
        assert kept(model, FilterPruning(0.33, importance=importance), x)["0"] == expected
        assert kept(model, FilterPruning(0.33, "global", importance=importance), x)["0"] == expected


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_ties_keep_the_lower_index(allocation: str) -> None:
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    assert kept(model, FilterPruning(0.5, allocation), torch.randn(2, 2))["0"] == (0, 1, 2)
    with torch.no_grad():
        model[0].weight.zero_()
    assert kept(model, FilterPruning(0.5, allocation), torch.randn(2, 2))["0"] == (0, 1, 2)


# --- networks made to be nasty ------------------------------------------------------------------------------


def tied_embeddings() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.embed(x)).relu()))

    return Tied()


MADE_NASTY = {name: (build, IMAGES) for name, (build, _) in NASTY.items()} | {
    "lstm": (LSTMNet, torch.randn(2, 3, 4)),
    "frozen": (lambda: NASTY["functional group norm"][0]().requires_grad_(False), IMAGES),
    "tied embeddings": (tied_embeddings, torch.tensor([[1, 2, 3], [4, 5, 8]])),
}


@pytest.mark.parametrize("name", MADE_NASTY)
def test_nasty_networks_are_pruned_where_it_is_safe_and_never_broken(name: str) -> None:
    build, x = MADE_NASTY[name]
    torch.manual_seed(0)
    model = build().eval()
    plan = FilterPruning(0.4).plan(model, x)
    small = FilterPruning().apply(model, plan)
    torch.testing.assert_close(output(small, x), output(masked_twin(model, plan), x), rtol=1e-5, atol=1e-5)
    assert (output(small, x) - output(model, x)).abs().max() > 1e-6
    assert size(small) == plan.params_after < plan.params_before
    trainable = [p for p in small.parameters() if p.requires_grad]
    if trainable:
        small.train()(x).square().sum().backward()
        torch.optim.SGD(trainable, lr=1e-3).step()
    assert output(small.eval(), x[:1]).shape == output(model, x[:1]).shape


def test_the_residual_stream_of_a_resnet_loses_filters() -> None:
    model = build_model("resnet18", num_classes=5, image_shape=(3, 8, 8), width=0.125).eval()
    plan = FilterPruning(0.5, "uniform").plan(model, IMAGES)
    small = FilterPruning().apply(model, plan)
    torch.testing.assert_close(output(small, IMAGES), output(masked_twin(model, plan), IMAGES), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in plan.refused] == ["fc"]
    stream = {layer.name: layer.outputs for layer in plan.layers if layer.name.endswith(("conv2", "downsample.0"))}
    assert all(kept is not None for kept in stream.values())
    blocks = [m for m in small.modules() if type(m).__name__ == "BasicBlock"]
    widths = [block.conv2.out_channels for block in blocks]
    dense = [block.conv2.out_channels for block in model.modules() if type(block).__name__ == "BasicBlock"]
    assert all(width < full for width, full in zip(widths, dense, strict=True))
    assert widths[0::2] == widths[1::2]  # both blocks of a stage add to the same stream
    for before, after in pairwise(blocks):
        assert after.conv1.in_channels == before.conv2.out_channels


# --- refusals and bad options -------------------------------------------------------------------------------


def test_nothing_to_remove_is_refused_unless_nothing_is_asked() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(Refused, match="outputs of the model"):
        FilterPruning(0.5).plan(model, torch.randn(2, 4))
    assert FilterPruning(0.0).plan(model, torch.randn(2, 4)).ratio_removed == 0


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": -0.1}, {"ratio": float("nan")}, {"ratio": "x"}])
def test_ratio_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="0 <= ratio < 1"):
        FilterPruning(**options)


@pytest.mark.parametrize("options", [{"allocation": "unifrom"}, {"importance": "l3"}, {"mode": "masked"}])
def test_unknown_option_names_the_nearest(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="did you mean"):
        FilterPruning(**options)


def test_plan_with_a_position_that_the_layer_does_not_have() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = FilterPruning(0.5).plan(model, torch.randn(2, 3))
    wrong = dataclasses.replace(plan.layers[0], outputs=(0, 9))
    with pytest.raises(BadInput, match="another model"):
        FilterPruning().apply(model, dataclasses.replace(plan, layers=(wrong, *plan.layers[1:])))
