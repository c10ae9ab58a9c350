"""The rows of a layer: pairs of an input x and an output y = W x + b of its linear map, at some of its positions.

A linear layer has a row for each token, a convolution one for each position of each image, where x is the patch under
the kernel. A convolution has thousands of rows per image; a random part of them, the same in every pass, is enough.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def grid_of(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Return the sizes of an output without its channels: samples and positions, (1,) for a single vector."""
    sizes = list(output.shape)
    del sizes[_channel_dim(layer, output)]
    spatial = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
    return tuple(sizes) if len(sizes) > spatial else (1, *sizes)


def chosen_rows(grid: tuple[int, ...], most: int, name: str, turn: int) -> Tensor:
    """Return the indices of at most ``most`` rows of a grid, int64 (rows,), random but the same for name and turn."""
    total = 1
    for size in grid:
        total *= size
    if total <= most:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {turn}".encode()))
    return torch.randint(total, (most,), generator=generator)


def output_rows(layer: nn.Module, output: Tensor, rows: Tensor) -> Tensor:
    """Return y of the given rows, (rows, filters)."""
    return _picked(output.detach().movedim(_channel_dim(layer, output), -1), rows)


def input_rows(layer: nn.Module, value: Tensor, rows: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return x of the given rows, (groups, rows, columns), with columns in the order of ``weight.flatten(1)``.

    Args:
        layer: a linear layer or a convolution that is not transposed.
        value: its input.
        rows: int64 (rows,), indices into the flattened grid of its output.
        grid: the grid of the output.
    """
    value = value.detach()
    if not isinstance(layer, _ConvNd):
        return _picked(value, rows).unsqueeze(0)
    images = value if value.dim() == len(layer.kernel_size) + 2 else value.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = F.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    sample, channel, *along = images.stride()
    windows = images.as_strided(
        (*images.shape[:2], *grid[1:], *layer.kernel_size),
        (
            *(sample, channel),
            *(stride * step for stride, step in zip(along, layer.stride, strict=True)),
            *(stride * step for stride, step in zip(along, layer.dilation, strict=True)),
        ),
    )
    image, *places = torch.unravel_index(rows.to(images.device), grid)
    everything: Any = (image, slice(None), *places)
    patches = windows[everything]  # (rows, channels, *kernel)
    return patches.reshape(len(rows), layer.groups, -1).transpose(0, 1)


def channel_rows(layer: nn.Module, value: Tensor, most: int, name: str, turn: int) -> Tensor:
    """Return the channels of the input at some positions of the input, (1, rows, channels)."""
    rows = chosen_rows(grid_of(layer, value), most, name, turn)
    return _picked(value.detach().movedim(_channel_dim(layer, value), -1), rows).unsqueeze(0)


def _channel_dim(layer: nn.Module, tensor: Tensor) -> int:
    return tensor.dim() - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    """Return the given rows of a tensor whose last dim is the row; without a copy of the whole."""
    if values.dim() == 1:
        values = values.unsqueeze(0)
    return values[torch.unravel_index(rows.to(values.device), values.shape[:-1])]
