"""Single weights: zero the smallest entries anywhere (Magnitude), or all but n of every m (SemiStructured).

The shapes stay; the number of non-zeros shrinks, for hardware and formats that benefit from zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pliant import measuring
from pliant.calling import Example, as_inputs, count_calls
from pliant.compression.base import Analysis, Compressor, check_ratio, parameter_shapes
from pliant.compression.plan import LayerPlan, Plan, weight_shape
from pliant.compressor_names import ALLOCATIONS
from pliant.errors import BadInput, check_choice
from pliant.structure import (
    named_layers,
    obstacle,
    other_matrices,
    tied_parameters,
    untransposed,
)


@dataclass(frozen=True, eq=False)
class Weights(Analysis):
    """The analysis of compressors that act on single weights.

    Args:
        layers: names of the layers whose weights may be changed.
    """

    layers: tuple[str, ...]


class Zeroing(Compressor[Weights]):
    """A compressor that sets entries of weights to zero, in all layers for which :meth:`unfit` returns None."""

    def analyse(
        self,
        model: nn.Module,
        example_inputs: Example,
        calibration: Iterable[Any] | None = None,
    ) -> Weights:
        """List the layers whose weight may be changed and that the compressor can act on."""
        inputs = as_inputs(example_inputs)
        count_calls(copy.deepcopy(model).eval(), inputs)  # for its BadInput, which other compressors raise as well
        tied = tied_parameters(model)
        layers: list[str] = []
        refused: list[tuple[str, str]] = []
        for name, module in named_layers(model):
            reason = obstacle(module, tied) or self.unfit(module)
            if reason is None:
                layers.append(name)
            else:
                refused.append((name, reason))
        return Weights(parameter_shapes(model), (*refused, *other_matrices(model)), tuple(layers))

    def unfit(self, module: nn.Module) -> str | None:
        """Return why a layer cannot be acted on, or None."""
        return None


@dataclass(frozen=True)
class Magnitude(Zeroing):
    """Zero the entries of smallest magnitude in the weights of linear and convolution layers.

    Exactly round(ratio·n) of n entries become zero; among equals those of lower index stay. Biases and normalisation
    layers do not change.

    Args:
        ratio: share of these entries to zero, in [0, 1).
        allocation: "uniform" zeroes the same share in every layer, "global" compares the magnitudes of all layers,
            "energy" zeroes in every layer the smallest entries that together hold the same share of its Σw².

    Raises:
        BadInput: the ratio is out of range, or the allocation is unknown.
    """

    ratio: float = 0.5
    allocation: str = "global"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("allocation", self.allocation, ALLOCATIONS)

    def plan_with(self, model: nn.Module, analysis: Weights) -> Plan:
        """Return the plan: how many entries of each layer stay."""
        weights = [_weight(model, name) for name in analysis.layers]
        sizes = [w.numel() for w in weights]
        if self.allocation == "uniform" or not weights:
            kept = [size - round(self.ratio * size) for size in sizes]
        else:
            score = _lost_share if self.allocation == "energy" else torch.abs
            scores = torch.cat([score(w).flatten() for w in weights])
            stays = largest(scores, len(scores) - round(self.ratio * len(scores)))
            kept = [int(part.sum()) for part in stays.split(sizes)]
        return weight_plan(self, model, analysis, self.ratio, kept)

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Weights | None) -> nn.Module:
        """Zero all but the largest entries of each layer, in place."""
        for layer in plan.layers:
            weight = _weight(model, layer.name)
            if not layer.kept <= layer.total == weight.numel():
                raise BadInput(f"the plan is for another model: {layer.name!r} has {weight.numel()} weights")
            stays = largest(weight.abs().flatten(), layer.kept)
            weight.masked_fill_(~stays.view_as(weight), 0.0)
        return model


@dataclass(frozen=True)
class SemiStructured(Zeroing):
    """Keep the ``n`` largest magnitudes of every ``m`` consecutive input channels, the pattern of sparse kernels.

    Blocks run along dim 1 of the weight (dim 0 of a ``Conv1D``), for each filter and each kernel position; among
    equals the lower index is kept. Layers whose number of input channels per group is not a multiple of ``m``, and
    transposed convolutions, are left alone; the plan names them with the reason.

    Source: Mishra et al. 2021, "Accelerating sparse deep neural networks" (2:4).

    Args:
        n: how many entries of a block are kept.
        m: the number of entries in a block.

    Raises:
        BadInput: n and m are not integers with 1 <= n < m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.n, self.m))
        if not whole or not 1 <= self.n < self.m:
            raise BadInput(f"n:m keeps n of every m weights: expected whole 1 <= n < m, got {self.n!r}:{self.m!r}")

    def unfit(self, module: nn.Module) -> str | None:
        """Return why blocks of ``m`` input channels cannot be formed in a layer, or None."""
        if isinstance(module, _ConvTransposeNd):
            return "is a transposed convolution"
        channels = weight_shape(untransposed(module))[1]
        return f"has {channels} input channels, which {self.m} does not divide" if channels % self.m else None

    def plan_with(self, model: nn.Module, analysis: Weights) -> Plan:
        """Return the plan: n of every m entries of each layer stay."""
        kept = [_weight(model, name).numel() // self.m * self.n for name in analysis.layers]
        return weight_plan(self, model, analysis, 1 - self.n / self.m, kept)

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Weights | None) -> nn.Module:
        """Zero all but the ``n`` largest entries of each block, in place."""
        for layer in plan.layers:
            weight = _weight(model, layer.name, by_rows=True)
            blocks = weight.abs().unflatten(1, (-1, self.m)).movedim(2, -1)  # (filters, inputs/m, ..., m)
            stays = largest(blocks, self.n).movedim(-1, 2).flatten(1, 2)
            weight.masked_fill_(~stays, 0.0)
        return model


def _lost_share(weight: Tensor) -> Tensor:
    """Return, for each entry, the share of Σw² that is lost with it and all smaller entries; float64 (entries,)."""
    squares, order = weight.double().square().flatten().sort()
    lost = squares.cumsum(0)
    tiny = torch.finfo(lost.dtype).tiny  # a weight of zeros loses nothing
    return torch.empty_like(lost).scatter_(0, order, lost / lost[-1].clamp(min=tiny))


def largest(x: Tensor, count: int) -> Tensor:
    """Return the mask, shaped as x, of the ``count`` largest entries along the last dim; ties go to the lower index."""
    if count == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    # This takes linear time: a stable sort of a large network's weights takes seconds, and topk leaves open which of
    # equal entries it takes.
    smallest = x.kthvalue(x.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, equal = x > smallest, x == smallest
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def weight_plan(
    compressor: Compressor[Weights], model: nn.Module, analysis: Weights, ratio: float, kept: Sequence[int]
) -> Plan:
    """Return the plan that keeps ``kept[i]`` entries of the weight of layer i, and every shape."""
    modules = [model.get_submodule(name) for name in analysis.layers]
    compressible: Mapping[str, int] = {
        f"{name}.weight" if name else "weight": _weight(model, name).numel() for name in analysis.layers
    }
    layers = [
        LayerPlan(
            name=name,
            kind=type(module).__name__,
            kept=n,
            total=_weight(model, name).numel(),
            params=measuring.parameters(module),
            params_dense=measuring.parameters(module),
            shape=weight_shape(module),
        )
        for name, module, n in zip(analysis.layers, modules, kept, strict=True)
    ]
    return compressor.assemble(
        model,
        analysis,
        ratio=ratio,
        removed=sum(layer.total - layer.kept for layer in layers),
        compressible=compressible,
        layers=layers,
        params_after=measuring.parameters(model),
    )


def _weight(model: nn.Module, name: str, *, by_rows: bool = False) -> Tensor:
    """Return the layer's weight without its gradient history, sharing its memory; ``by_rows``: filters first."""
    module = model.get_submodule(name)
    weight = (untransposed(module) if by_rows else module)._parameters.get("weight")
    if weight is None:
        raise BadInput(f"the plan is for another model: {name!r} has no weight of its own")
    return weight.detach()
