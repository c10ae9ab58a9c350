"""Eight-bit weights: the nearest numbers of each filter's grid, in plain layers that others can count and save."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.compression import Int8, compress
from pliant.compression.quantised import quantised
from pliant.errors import Refused
from pliant.experiments.models import build_model

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(9, 7), (4, 9)),
    "linear without bias": (nn.Linear(9, 7, bias=False), (2, 3, 9)),
    "1-d": (nn.Conv1d(4, 6, 5, padding="same", dilation=2), (2, 4, 12)),
    "2-d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"), (2, 4, 9, 9)),
    "3-d": (nn.Conv3d(2, 6, 3, bias=False), (2, 2, 5, 5, 5)),
}


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_computes_with_the_nearest_point_of_each_filters_grid(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    dense: Any = copy.deepcopy(layer).eval()
    small: Any = quantised(dense)
    rows = dense.weight.detach().flatten(1)
    step = rows.abs().amax(1, keepdim=True) / 127
    values = small.weight.float().flatten(1) * small.scale.flatten(1)
    assert small.weight.dtype == torch.int8
    assert int(small.weight.min()) >= -127
    assert ((values - rows).abs() <= step * (0.5 + 1e-4)).all()
    assert (small.weight.flatten(1).abs().amax(1) == 127).all()
    with torch.no_grad():
        dense.weight.copy_(values.view_as(dense.weight))
    x = torch.randn(shape)
    torch.testing.assert_close(output(small, x), output(dense, x))
    assert not small.training
    assert small.bias is None or small.bias is not layer.bias


def test_zero_filters_stay_zero() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    small: Any = quantised(layer)
    assert torch.isfinite(small.scale).all()
    assert not small.weight[1].any()


def test_file_shrinks_to_a_quarter_and_all_else_is_counted_as_before() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5, image_shape=(3, 8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    small = compress(model, Int8(), x)
    assert measuring.parameters(small) == measuring.parameters(model)
    assert measuring.macs(small, x) == measuring.macs(model, x)
    assert measuring.file_bytes(small) < 0.32 * measuring.file_bytes(model)
    torch.testing.assert_close(output(small, x), output(model, x), rtol=0.05, atol=0.02)
    restored = compress(model, Int8(), x)
    restored.load_state_dict(safetensors.torch.load(safetensors.torch.save(measuring.state_tensors(small))))
    assert torch.equal(output(restored, x), output(small, x))
    half = copy.deepcopy(small).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.int8, torch.bfloat16}
    assert torch.isfinite(output(half, x.bfloat16())).all()


def test_result_can_be_traced_for_export() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    small = compress(model, Int8(), x)
    program = torch.export.export(small, (x,))
    assert torch.equal(output(program.module(), x), output(small, x))
    assert {p.dtype for p in program.state_dict.values()} == {torch.int8, torch.float32}


def test_what_cannot_be_replaced_is_refused_by_name() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=8, vdim=4, batch_first=True)  # three projections, not one
    x = torch.randn(2, 3, 8)
    model = nn.Sequential(
        nn.ConvTranspose1d(3, 3, 1), nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    )
    plan = Int8().plan(model, x)
    assert [layer.name for layer in plan.layers] == ["1"]
    reasons = dict(plan.refused)
    assert "transposed" in reasons["0"]
    assert "param" in reasons["2"]
    with pytest.raises(Refused, match="parent reads the weight"):
        Int8().plan(attention, (x, x, x[..., :4]))


def test_linear_weights_are_those_of_torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        torch.manual_seed(0)
        layer = nn.Linear(64, 48)
        theirs: Any = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
        x = torch.randn(8, 64)
        expected = output(theirs, x)
    ours: Any = quantised(layer)
    difference = (ours.weight.int() - theirs[0].weight.qdata.int()).abs()
    torch.testing.assert_close(output(ours, x), expected, rtol=0, atol=0.01)
    assert difference.max() <= 1
