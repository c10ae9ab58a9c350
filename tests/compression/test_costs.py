"""Costs that a ratio can count: how often each weight is applied, and filters chosen by what their removal saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning
from pliant.compression.costs import Applied, applications
from pliant.errors import BadInput
from pliant.experiments.models import build_model
from pliant.measuring import macs


def test_times_applied_are_positions_calls_and_images() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, (3, 5), stride=2, padding=1, groups=1)
            self.back = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.line = nn.Conv1d(4, 4, 3, groups=2)
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)  # 11 × 14 → 6 × 6
            z = self.line(self.back(y).flatten(2))  # 144 → 142
            return self.fc(self.fc(z[..., :8]))

    counts = applications(Net(), ["conv", "back", "line", "fc"], (torch.randn(3, 3, 11, 14),))
    assert counts == {
        "conv": Applied(3 * 6 * 6, 3 * 6 * 14),
        "back": Applied(3 * 6 * 6, 3 * 6 * 6),
        "line": Applied(3 * 142, 3 * 142),
        "fc": Applied(2 * 3 * 4, 2 * 3 * 4),
    }


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "mlp"])
def test_times_applied_give_the_multiply_accumulates_of_the_network(name: str) -> None:
    model = build_model(name, num_classes=5, image_shape=(3, 16, 16), width=0.5).eval()
    x = torch.randn(2, 3, 16, 16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    applied = applications(model, layers, (x,))
    assert sum(applied[n].whole * m.weight.numel() for n, m in layers.items()) == len(x) * macs(model, x)


@pytest.mark.parametrize("allocation", ["uniform", "global", "energy"])
def test_filters_are_removed_to_a_ratio_of_multiplications(allocation: str) -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5, image_shape=(3, 16, 16), width=0.5).eval()
    x = torch.randn(2, 3, 16, 16)
    analysis = FilterPruning().analyse(model, x)
    dense = macs(model, x)
    for ratio in (0.2, 0.5, 0.8):
        pruning = FilterPruning(ratio, allocation, cost="macs")
        plan = pruning.plan(model, x, analysis=analysis)
        small = pruning.apply(model, plan)
        # All of the first layer's inputs and the classifier's outputs stay: a little less is compressible.
        assert plan.ratio_removed == pytest.approx(ratio, abs=0.03)
        assert (dense - macs(small, x)) / dense == pytest.approx(plan.ratio_removed, abs=0.01)
        assert plan.params_after == sum(p.numel() for p in small.parameters())


def test_costs_decide_what_is_removed_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(  # equal filters; the first group is applied at 64 positions, the second has more weights
        nn.Conv2d(4, 8, 1), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 64)
    )
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.fill_(1.0)
    x = torch.randn(1, 4, 8, 8)
    kept = {
        cost: {x.name: x.kept for x in FilterPruning(0.2, cost=cost).plan(model, x).layers}
        for cost in ("params", "macs")
    }
    assert kept["params"]["0"] == 8
    assert kept["macs"]["0"] < 8
    assert kept["macs"]["3"] > kept["params"]["3"]


def test_energy_removes_the_same_share_of_every_group() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2], [3], [4]]))  # shares gone: 1/30, 5/30, 14/30
        model[2].weight.copy_(torch.full((4, 4), 7.0))  # 1/4, 2/4, 3/4
    x = torch.randn(2, 1)
    seen = []
    for percent in range(0, 100, 2):
        layers = FilterPruning(percent / 100, "energy").plan(model, x).layers
        seen.append((layers[0].kept, layers[1].kept))
    assert list(dict.fromkeys(seen)) == [(4, 4), (3, 4), (2, 4), (2, 3), (1, 3), (1, 2), (1, 1)]


@pytest.mark.parametrize("options", [{"cost": "flops"}, {"allocation": "energies"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="unknown"):
        FilterPruning(**options)
