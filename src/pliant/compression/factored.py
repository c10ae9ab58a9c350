"""A linear or convolution layer as two thin ones in a row: plain layers, so that every exporter knows them.

A weight, one matrix of m rows and n columns per convolution group, that equals ``expand @ reduce`` becomes

* linear: n → r without bias, r → m with the bias;
* convolution: k×k with r filters per group, which keeps stride, padding, padding mode and dilation, then 1×1
  with the bias. The stride is in the first layer, so that the second one works on the small output grid and
  parameters and multiplications shrink by the same factor r(m + n) / (mn).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def matrices(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Return the weight as one matrix per convolution group, shape (groups, m, n), row = filter."""
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    weight: Tensor = module.weight.detach()
    return weight.flatten(1).reshape(groups, weight.shape[0] // groups, -1)


def factored(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, expand: Tensor, reduce: Tensor) -> nn.Sequential:
    """Return the two layers whose weight is ``expand @ reduce``, with all other properties of ``module``.

    Shapes: ``expand`` (groups, m, r), ``reduce`` (groups, r, n). Type, device, training flag and requires_grad
    are taken from ``module``.
    """
    groups, rank, _ = reduce.shape
    has_bias = module.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False, device="meta")
        second = nn.Linear(rank, module.out_features, bias=has_bias, device="meta")
    else:
        convolution = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c))
        first = convolution(
            module.in_channels,
            groups * rank,
            module.kernel_size,  # type: ignore[arg-type]
            stride=module.stride,  # type: ignore[arg-type]
            padding=module.padding,  # type: ignore[arg-type]
            dilation=module.dilation,  # type: ignore[arg-type]
            groups=groups,
            bias=False,
            padding_mode=module.padding_mode,
            device="meta",
        )
        second = convolution(groups * rank, module.out_channels, 1, groups=groups, bias=has_bias, device="meta")
    _set_weight(first, reduce, module.weight)
    _set_weight(second, expand, module.weight)
    if module.bias is not None:
        second.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    return nn.Sequential(OrderedDict(reduce=first, expand=second)).train(module.training)


def _set_weight(module: nn.Module, value: Tensor, like: Tensor) -> None:
    # The layers are made on the meta device: drawing weights would advance the user's random number generator.
    shape = module.weight.shape
    weight = torch.empty(shape, dtype=like.dtype, device=like.device)  # type: ignore[arg-type]
    weight.copy_(value.flatten(0, 1).reshape(weight.shape))
    module.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
