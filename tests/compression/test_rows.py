"""Rows of layers: every x that comes out gives its y, and is what a kernel of a single one would read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression.rows import channel_rows, chosen_rows, grid_of, input_rows, output_rows


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def conv(dims: int, *args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(nn, f"Conv{dims}d")(*args, **options).double()


def linear(*args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(*args, **options).double()


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
IMAGE = (5, 4, 9, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "vectors": (lambda: linear(5, 3), drawn(7, 5)),
    "one vector": (lambda: linear(5, 3), drawn(5)),
    "sequences": (lambda: linear(5, 3, bias=False), drawn(4, 6, 5)),
    "grids": (lambda: linear(5, 3), drawn(2, 3, 4, 5)),
    "transposed sequences": (lambda: linear(5, 3), drawn(4, 5, 6).mT),
    "image": (lambda: conv(2, 4, 6, 3), drawn(*IMAGE)),
    "point by point": (lambda: conv(2, 4, 6, 1), drawn(*IMAGE)),
    "oblong": (lambda: conv(2, 4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), drawn(*IMAGE)),
    "stride": (lambda: conv(2, 4, 6, 3, stride=2, padding=1, bias=False), drawn(*IMAGE)),
    "stride above kernel": (lambda: conv(2, 4, 6, 2, stride=3), drawn(*IMAGE)),
    "dilation": (lambda: conv(2, 4, 6, 3, dilation=3, padding=2), drawn(*IMAGE)),
    "same": (lambda: conv(2, 4, 6, 3, padding="same"), drawn(*IMAGE)),
    "same, even kernel": (lambda: conv(2, 4, 6, (4, 2), padding="same", dilation=(1, 3)), drawn(*IMAGE)),
    "valid": (lambda: conv(2, 4, 6, 3, padding="valid"), drawn(*IMAGE)),
    "reflect": (lambda: conv(2, 4, 6, 3, padding=(2, 1), padding_mode="reflect"), drawn(*IMAGE)),
    "replicate": (lambda: conv(2, 4, 6, 3, padding=(2, 1), padding_mode="replicate"), drawn(*IMAGE)),
    "circular": (lambda: conv(2, 4, 6, (4, 3), padding="same", padding_mode="circular"), drawn(*IMAGE)),
    "circular without padding": (lambda: conv(2, 4, 6, 3, padding_mode="circular"), drawn(*IMAGE)),
    "groups": (lambda: conv(2, 4, 6, 3, groups=2, padding=1), drawn(*IMAGE)),
    "depthwise": (lambda: conv(2, 4, 4, 3, groups=4, padding=1), drawn(*IMAGE)),
    "depthwise times two": (lambda: conv(2, 4, 8, 3, groups=4, stride=2), drawn(*IMAGE)),
    "one image": (lambda: conv(2, 4, 6, 3, padding=1), drawn(4, 9, 8)),
    "channels last": (
        lambda: conv(2, 4, 6, 3, padding=1, stride=2),
        drawn(*IMAGE).contiguous(memory_format=torch.channels_last),
    ),
    "channels last, no padding": (
        lambda: conv(2, 4, 6, 3, groups=2),
        drawn(*IMAGE).contiguous(memory_format=torch.channels_last),
    ),
    "part of a larger tensor": (lambda: conv(2, 4, 6, 3), drawn(6, 6, 12, 11)[1:, 2:, 3:, 2:10]),
    "broadcast": (lambda: conv(2, 4, 6, 3), drawn(1, 4, 1, 8).expand(5, 4, 9, 8)),
    "signal": (lambda: conv(1, 4, 6, 5, stride=2, padding=3), drawn(3, 4, 17)),
    "one signal": (lambda: conv(1, 4, 6, 5, padding="same", padding_mode="reflect"), drawn(4, 17)),
    "causal signal": (lambda: conv(1, 4, 4, 3, dilation=2, padding=4, groups=4), drawn(3, 4, 11)),
    "volume": (lambda: conv(3, 4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), drawn(2, 4, 3, 7, 6)),
    "one volume": (lambda: conv(3, 4, 6, 2, groups=2, padding=1, padding_mode="replicate"), drawn(4, 3, 5, 4)),
}


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what each entry of the weight reads, (groups, columns, all rows): outputs of kernels of a single one."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T.unsqueeze(0)
    n = layer.weight[0].numel()
    probe = copy.deepcopy(layer)
    probe.out_channels = layer.groups * n
    one = torch.eye(n, dtype=torch.float64).view(n, *layer.weight.shape[1:]).repeat(layer.groups, *[1] * x.dim())
    probe.weight, probe.bias = nn.Parameter(one.view(-1, *layer.weight.shape[1:])), None
    with torch.no_grad():
        y = probe(x)
    y = y if y.dim() == layer.weight.dim() else y.unsqueeze(0)
    return y.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, n))


@pytest.mark.parametrize("case", CASES)
def test_all_rows_are_what_kernels_of_a_single_one_read(case: str) -> None:
    build, value = CASES[case]
    layer = build()
    output = layer(value)
    grid = grid_of(layer, output)
    rows = chosen_rows(grid, 10**6, "name", 0)
    assert len(rows) == output.numel() // len(layer.weight)
    x = input_rows(layer, value, rows, grid)
    assert not x.requires_grad
    torch.testing.assert_close(x.mT, columns(layer, value), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_some_rows_give_their_outputs(case: str) -> None:
    build, value = CASES[case]
    layer = build()
    output = layer(value)
    grid = grid_of(layer, output)
    rows = chosen_rows(grid, 11, "name", 0)
    assert len(rows) == min(11, output.numel() // len(layer.weight))
    x, y = input_rows(layer, value, rows, grid), output_rows(layer, output, rows)
    assert y.shape == (len(rows), len(layer.weight))
    weight = layer.weight.detach().flatten(1).unflatten(0, (len(x), -1))
    expected = (x @ weight.mT).transpose(0, 1).flatten(1)
    expected += 0 if layer.bias is None else layer.bias.detach()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_rows_are_the_same_in_every_pass_and_others_elsewhere() -> None:
    state = torch.get_rng_state()
    first = chosen_rows((9, 10, 10), 50, "conv", 3)
    assert torch.equal(first, chosen_rows((9, 10, 10), 50, "conv", 3))
    assert not torch.equal(first, chosen_rows((9, 10, 10), 50, "conv", 4))
    assert not torch.equal(first, chosen_rows((9, 10, 10), 50, "fc", 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.min() >= 0) & (first.max() < 900) & (first.dtype == torch.int64)
    counts = torch.bincount(chosen_rows((4, 5), 19, "x", 0), minlength=20)
    assert len(counts) == 20
    assert torch.equal(chosen_rows((4, 5), 20, "x", 0), torch.arange(20))


def test_rows_fall_evenly_on_all_positions() -> None:
    counts = sum(torch.bincount(chosen_rows((4, 5), 19, "x", turn), minlength=20) for turn in range(500))
    assert (counts - 475).abs().max() < 5 * 475**0.5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (4, 5, 6)])
def test_channels_of_inputs_at_all_positions(groups: int, shape: tuple[int, ...]) -> None:
    value = drawn(*shape)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups).double()
    rows = channel_rows(layer, value, 10**6, "name", 0)
    expected = value.movedim(-3, -1).reshape(-1, 4)
    assert torch.equal(rows, expected.unsqueeze(0))
    few = channel_rows(layer, value, 7, "name", 0)
    assert few.shape == (1, 7, 4)
    assert all((expected == row).all(1).any() for row in few[0])
