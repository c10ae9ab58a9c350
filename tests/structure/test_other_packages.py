"""Networks of timm, with layers that normalise and activate, pad, shuffle and gate in forwards of their own."""

from __future__ import annotations

import pytest
import torch

from pliant.compression import FilterPruning
from tests.structure.cutting import cut, package, removable

WHOLE = {"mobilenetv3_small_050": {"classifier"}, "resnet10t": {"fc"}, "regnetx_002": {"head.fc"}}


@pytest.mark.parametrize("name", WHOLE)
def test_everything_but_the_classifier_loses_channels(name: str) -> None:
    torch.manual_seed(0)
    model = package("timm").create_model(name, num_classes=5).eval()
    _, plan = cut(model, torch.randn(2, 3, 32, 32), FilterPruning(0.5, allocation="uniform"))
    assert {layer for layer, _ in plan.refused} == WHOLE[name]
    assert len(removable(plan)) > 10
