"""What the tests of structures share: networks that are cut, and their masked twins."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.packages import timm
from torch import Tensor, nn

from pliant.calling import as_inputs, map_tensors, results_of, run
from pliant.compression import FilterPruning, Plan, masked_twin
from pliant.compression.applying import skeleton
from pliant.structure import ChannelGroup, Proof, kept_fault
from pliant.structure.draws import in_double

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def package(name: str) -> Any:
    """Return a package, or skip a test without it."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install --no-deps {name}")
    return timm() if name == "timm" else importlib.import_module(name)


def half_fault(proof: Proof, groups: Sequence[ChannelGroup]) -> str | None:
    """Return why groups cannot lose half of their channels."""
    return kept_fault(proof, {group: group.channels - group.channels // 2 for group in groups})


def conv(columns: int, rows: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(columns, rows, 3, padding=1, **options)


def pooled(x: Tensor) -> Tensor:
    return F.relu(x).mean((2, 3))


class Body(nn.Module):
    """Two convolutions with a BatchNorm between, a classifier, and a second one for the forwards of subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = conv(3, 8), nn.BatchNorm2d(8), conv(8, 12)
        self.head, self.side = nn.Linear(12, 5), nn.Linear(12, 5)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.n(self.a(x)))

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.b(self.middle(x)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


def cut(model: nn.Module, example: Any = IMAGES, compressor: FilterPruning | None = None) -> tuple[nn.Module, Plan]:
    """Cut a network, and check that it equals its masked twin, trains for a step, and is read back."""
    chosen = compressor or FilterPruning(0.5, allocation="uniform")
    before = copy.deepcopy(model.state_dict())
    plan = chosen.plan(model, example)
    small = chosen.apply(model, plan)
    assert plan.params_after < plan.params_before
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    twin = masked_twin(model, plan)
    with in_double(everything=True):
        wide = map_tensors(lambda x: x.double() if x.is_floating_point() else x, as_inputs(example))
        got, expected = (run(copy.deepcopy(m).double().eval(), wide) for m in (small, twin))
        for x, y in zip(got, expected, strict=True):
            assert not y.is_floating_point() or y.isfinite().all()
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    train_step(copy.deepcopy(small), example)
    again = skeleton(model, plan)
    again.load_state_dict(small.state_dict())
    for x, y in zip(run(again.eval(), as_inputs(example)), run(small.eval(), as_inputs(example)), strict=True):
        assert torch.equal(x, y)
    return small, plan


def train_step(model: nn.Module, example: Any) -> None:
    """Train for one step on a made-up loss."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = as_inputs(example)
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    losses = [x.square().mean() for x in results_of(output) if x.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
        optimizer.step()


def removable(plan: Plan) -> set[str]:
    """Return the convolutions and linear layers that lose outputs by a plan."""
    return {layer.name for layer in plan.layers if layer.kept < layer.total and len(layer.shape) > 1}
