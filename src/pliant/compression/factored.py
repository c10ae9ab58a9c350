"""A linear or convolution layer as two thin ones in a row: plain layers, which every exporter supports.

The ``Conv1D`` of transformers is treated as the linear layer that it is, see
:func:`~pliant.structure.layers.untransposed`.

A weight, read as one matrix of m rows and n columns per convolution group, that equals ``expand @ reduce`` becomes

* linear: n → r without bias, r → m with the bias;
* convolution, scheme ``"channel"``: k×k with r filters per group, which keeps stride, padding, padding mode and
  dilation, then 1×1 with the bias. The stride is in the first layer, so that the second one works on the small
  output grid and parameters and multiplications shrink by the same factor r(m + n) / (mn);
* 2-d convolution, scheme ``"spatial"``: k×1 with r filters per group, then 1×k with the bias, each with the
  stride, padding and dilation of its own direction. The matrix then has a row per filter and kernel column and a
  column per input channel and kernel row.

In either scheme the padding does not change: it acts on each direction separately, and without a bias in the first
layer a padded zero stays zero.

A network may read the stride or the widths of a layer, for example to pad an image. The pair of layers has the same
attributes (:class:`FactoredLinear`, :class:`FactoredConvolution`), but no weight and bias: code that reads those
computes the layer itself.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

Factorable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class FactoredLinear(nn.Sequential):
    """Two thin linear layers, ``reduce`` and ``expand``, with the widths of the layer that they replace."""

    @property
    def in_features(self) -> int:
        """The number of features that go in."""
        return self.reduce.in_features  # type: ignore[union-attr, return-value]

    @property
    def out_features(self) -> int:
        """The number of features that come out."""
        return self.expand.out_features  # type: ignore[union-attr, return-value]


class FactoredConvolution(nn.Sequential):
    """Two thin convolutions, ``reduce`` and ``expand``, with the channels of the convolution that they replace.

    Besides the properties below, the pair has the convolution's ``kernel_size``, ``stride``, ``padding``, ``dilation``,
    ``groups`` and ``padding_mode``, which no compressor changes.
    """

    @property
    def in_channels(self) -> int:
        """The number of channels that go in."""
        return self.reduce.in_channels  # type: ignore[union-attr, return-value]

    @property
    def out_channels(self) -> int:
        """The number of channels that come out."""
        return self.expand.out_channels  # type: ignore[union-attr, return-value]


def matrices(module: Factorable, scheme: str = "channel") -> Tensor:
    """Return the weight as one matrix per convolution group, (groups, m, n), under a scheme of this module."""
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    weight: Tensor = module.weight.detach()
    if scheme == "channel":
        return weight.flatten(1).reshape(groups, weight.shape[0] // groups, -1)
    filters, channels, height, width = weight.shape
    split = weight.reshape(groups, filters // groups, channels, height, width)
    return split.permute(0, 1, 4, 2, 3).reshape(groups, filters // groups * width, channels * height)


def factored(module: Factorable, expand: Tensor, reduce: Tensor, scheme: str = "channel") -> nn.Sequential:
    """Return the two layers whose weight is ``expand @ reduce``, with all other properties of ``module``.

    Args:
        module: the layer to replace, which sets dtype, device, training flag and requires_grad.
        expand: (groups, m, r).
        reduce: (groups, r, n).
        scheme: "channel" or "spatial", as in the docstring of this module.
    """
    groups, rank, _ = reduce.shape
    has_bias = module.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False, device="meta")
        second = nn.Linear(rank, module.out_features, bias=has_bias, device="meta")
    elif scheme == "channel":
        kind = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c))
        first = convolution_like(module, kind, groups * rank, bias=False)
        second = kind(groups * rank, module.out_channels, 1, groups=groups, bias=has_bias, device="meta")
    else:
        assert isinstance(module, nn.Conv2d)
        first = _one_direction(module, 0, module.in_channels, groups * rank, bias=False)
        second = _one_direction(module, 1, groups * rank, module.out_channels, bias=has_bias)
        width = module.kernel_size[1]
        expand = expand.unflatten(1, (-1, width)).transpose(2, 3)  # (groups, filters, r, width)
    _set_weight(first, reduce, module.weight)
    _set_weight(second, expand, module.weight)
    if module.bias is not None:
        second.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    layers = OrderedDict(reduce=first, expand=second)
    if isinstance(module, nn.Linear):
        return FactoredLinear(layers).train(module.training)
    convolution = FactoredConvolution(layers).train(module.training)
    for name in _GEOMETRY:
        setattr(convolution, name, getattr(module, name))
    return convolution


def first_of_spatial(module: nn.Conv2d) -> nn.Conv2d:
    """Return the first layer of scheme ``"spatial"`` at full rank: the matrix itself as a k×1 convolution.

    Its outputs have a channel for each filter and kernel column; the sum over the columns, each shifted to its place,
    is the output of ``module`` without bias.
    """
    weights = matrices(module, "spatial")  # (groups, filters · kernel columns, channels · kernel rows)
    first = _one_direction(module, 0, module.in_channels, weights.shape[0] * weights.shape[1], bias=False)
    _set_weight(first, weights, module.weight)
    return first


def convolution_like(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, kind: type[nn.Module], filters: int, *, bias: bool
) -> nn.Module:
    """Return a convolution of class ``kind`` on the meta device that reads its inputs as ``module`` does."""
    return kind(
        module.in_channels,
        filters,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=bias,
        padding_mode=module.padding_mode,
        device="meta",
    )


def _one_direction(module: nn.Conv2d, axis: int, inputs: int, outputs: int, *, bias: bool) -> nn.Conv2d:
    """Return a convolution that acts like ``module`` along one axis (0: height), and not at all along the other."""

    def only(values: tuple[int, ...], neutral: int) -> tuple[int, int]:
        return (values[0], neutral) if axis == 0 else (neutral, values[1])

    return nn.Conv2d(
        inputs,
        outputs,
        only(module.kernel_size, 1),
        stride=only(module.stride, 1),
        padding=module.padding if isinstance(module.padding, str) else only(module.padding, 0),
        dilation=only(module.dilation, 1),
        groups=module.groups,
        bias=bias,
        padding_mode=module.padding_mode,
        device="meta",
    )


def _set_weight(module: nn.Module, value: Tensor, like: Tensor) -> None:
    # Layers are constructed on the meta device, because drawing weights would advance the user's random generator.
    shape = module.weight.shape
    weight = torch.empty(shape, dtype=like.dtype, device=like.device)  # type: ignore[arg-type]
    weight.copy_(value.flatten(0, 1).reshape(weight.shape))
    module.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
