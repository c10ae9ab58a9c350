"""Single weights: zero entries anywhere (Magnitude), or all but n of every m (SemiStructured).

The shapes stay; the number of non-zeros shrinks, for hardware and formats that benefit from zeros. With calibration
data, entries go that the others of their filter can make up for, and these do so at once: see
:mod:`pliant.compression.compensation`. Without, the smallest go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pliant import measuring
from pliant.calling import Example, as_inputs, copied, count_calls, plain
from pliant.compression.base import Analysis, Compressor, check_ratio, parameter_shapes
from pliant.compression.calibration import calibration_of
from pliant.compression.compensation import GONE, largest, loss_curve, prune, prune_blocks
from pliant.compression.inputs import LayerInputs, Reading
from pliant.compression.plan import LayerPlan, Plan, weight_shape
from pliant.compressor_names import ALLOCATIONS
from pliant.errors import BadInput, check_choice
from pliant.structure import (
    advised,
    obstacle,
    other_matrices,
    packed_obstacle,
    tied_parameters,
    untransposed,
    weighted_layers,
)

IMPORTANCES = ("auto", "loss", "magnitude")


@dataclass(frozen=True, eq=False)
class Weights(Analysis):
    """The analysis of compressors that act on single weights.

    Args:
        layers: names of the layers whose weights may be changed.
        inputs: what these layers read on calibration data; None to go by weights.
    """

    layers: tuple[str, ...]
    inputs: LayerInputs | None = None
    _curves: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def curves(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the ``loss_curve`` of each layer with known inputs; they are worked out once, for all ratios."""
        if self.inputs is not None and not self._curves:
            for name, moment in self.inputs.moments():
                reading = Reading.of(model, name, moment)
                self._curves[name] = loss_curve(reading.weight, reading.moment)
        return self._curves


@dataclass(frozen=True, kw_only=True)
class Zeroing(Compressor[Weights]):
    """A compressor that sets entries of weights to zero, in all layers for which :meth:`unfit` returns None.

    Args:
        importance: the measure of an entry: "loss" is what its layer loses on calibration data, "magnitude" its size;
            "auto" is "loss" if there is calibration data, else "magnitude".
    """

    importance: str = "auto"

    def analyse(
        self,
        model: nn.Module,
        example_inputs: Example,
        calibration: Iterable[Any] | None = None,
    ) -> Weights:
        """List the layers whose weight may be changed and that the compressor can act on.

        Raises:
            BadInput: the example or the data does not fit, or importance is "loss" and there is no data.
        """
        if self.importance == "loss" and calibration is None:
            raise BadInput('importance="loss" needs calibration data: give batches of images, or use "auto"')
        inputs = as_inputs(example_inputs)
        model = plain(model)
        probe = copied(model).eval()
        count_calls(probe, inputs)  # for its BadInput, which other compressors raise as well
        tied = tied_parameters(model)
        layers: list[str] = []
        refused: list[tuple[str, str]] = []
        others = dict(other_matrices(model))
        for name, module in weighted_layers(model):
            if isinstance(module, nn.MultiheadAttention):
                if module._parameters.get("in_proj_weight") is None:
                    continue  # one of the others
                del others[name]
                reason = packed_obstacle(module, tied) or self.unfit(module)
            else:
                reason = obstacle(module, tied) or self.unfit(module)
            if reason is None:
                layers.append(name)
            else:
                refused.append((name, advised(reason)))
        seen = None
        if calibration is not None and self.importance != "magnitude":
            seen = LayerInputs(probe, layers, calibration_of(calibration, model, example_inputs))
        return Weights(parameter_shapes(model), (*refused, *others.items()), tuple(layers), seen)

    def measure(self, analysis: Weights) -> str:
        """Return "loss" or "magnitude"; raise BadInput if it is to be the loss and the analysis has seen no data."""
        if self.importance == "loss" and analysis.inputs is None:
            raise BadInput('importance="loss" needs an analysis with calibration data')
        return "magnitude" if self.importance == "magnitude" or analysis.inputs is None else "loss"

    def compensate(
        self,
        model: nn.Module,
        plan: Plan,
        analysis: Weights | None,
        zeroed: Callable[[LayerPlan, Tensor, Tensor], Tensor],
    ) -> set[str]:
        """Zero entries by their loss, in place, in all layers with known inputs; return the names of these layers.

        Args:
            model, plan, analysis: as for ``carry_out``.
            zeroed: maps a layer's plan, weight (groups, m, n) and moment (groups, n, n) to the new weight.

        Raises:
            BadInput: the plan needs the data, and there is no analysis that has seen it.
        """
        layers = {layer.name: layer for layer in plan.layers if layer.kept < layer.total}
        if self.importance != "loss" or not layers:  # "auto" is in plans of versions that went by magnitude only
            return set()
        if analysis is None or analysis.inputs is None:
            raise BadInput(
                "the plan's zeros and weights depend on the calibration data: give the analysis it was made with; to"
                " load stored weights, build its skeleton instead"
            )
        done = set()
        for name, moment in analysis.inputs.moments():
            if name in layers:
                reading = Reading.of(model, name, moment)
                reading.update(zeroed(layers[name], reading.weight, reading.moment))
                done.add(name)
        return done

    def skeleton(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Return a copy of the model: its shapes stay."""
        self.checked(model, plan)
        return copied(model)

    def unfit(self, module: nn.Module) -> str | None:
        """Return why a layer cannot be acted on, or None."""
        return None


@dataclass(frozen=True)
class Magnitude(Zeroing):
    """Zero the least important entries in the weights of linear and convolution layers.

    Exactly round(ratio·n) of n entries become zero; among equals those of lower index stay. By magnitude, biases and
    normalisation layers do not change.

    By loss on calibration data, the plan says how many entries each layer keeps, from an estimate of what its outputs
    lose with each share of zeros. Which ones go is decided when it is carried out, together with the weights of those
    that stay, such that the outputs of the layer change least; the bias makes up for the mean of what has gone. Layers
    that are not applied on the data, or have too many columns (``moments``), go by magnitude.

    Source: Meng et al. 2024, "ALPS: improved optimization for highly sparse one-shot pruning for large language
    models".

    Args:
        ratio: share of these entries to zero, in [0, 1).
        allocation: "uniform" zeroes the same share in every layer, "global" compares the magnitudes of all layers,
            "energy" zeroes in every layer the smallest entries that together hold the same share of its Σw². By loss,
            "global" takes the least loss per entry, relative to the energy of the layer's outputs, and "energy" the
            same relative loss in every layer.
        importance: the measure of an entry: "loss", "magnitude", or "auto": "loss" if there is calibration data, else
            "magnitude".

    Raises:
        BadInput: the ratio is out of range, or an option is unknown.
    """

    ratio: float = 0.5
    allocation: str = "global"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("importance", self.importance, IMPORTANCES)

    def plan_with(self, model: nn.Module, analysis: Weights) -> Plan:
        """Return the plan: how many entries of each layer stay."""
        weights = [_weight(model, name) for name in analysis.layers]
        sizes = [w.numel() for w in weights]
        measure = self.measure(analysis)
        if self.allocation == "uniform" or not weights or not self.ratio:
            kept = [size - round(self.ratio * size) for size in sizes]
        else:
            if measure == "loss":
                scores = _losses(model, analysis, marginal=self.allocation == "global")
            elif self.allocation == "global":
                scores = [w.abs().flatten() for w in weights]
            else:
                scores = [_lost_share(w) for w in weights]
            everything = torch.cat(scores)
            stays = largest(everything, len(everything) - round(self.ratio * len(everything)))
            kept = [int(part.sum()) for part in stays.split(sizes)]
        return weight_plan(replace(self, importance=measure), model, analysis, self.ratio, kept)

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Weights | None) -> nn.Module:
        """Zero all but the most important entries of each layer, in place."""
        for layer in plan.layers:
            weight = _weight(model, layer.name)
            if not layer.kept <= layer.total == weight.numel():
                raise BadInput(f"the plan is for another model: {layer.name!r} has {weight.numel()} weights")
        done = self.compensate(model, plan, analysis, lambda layer, w, moment: prune(w, moment, layer.kept))
        for layer in plan.layers:
            if layer.name not in done:
                weight = _weight(model, layer.name)
                stays = largest(weight.abs().flatten(), layer.kept)
                weight.masked_fill_(~stays.view_as(weight), 0.0)
        return model


@dataclass(frozen=True)
class SemiStructured(Zeroing):
    """Keep the ``n`` most important of every ``m`` consecutive input channels, the pattern of sparse kernels.

    Blocks run along dim 1 of the weight (dim 0 of a ``Conv1D``), for each filter and each kernel position; among
    equals the lower index is kept. Layers whose number of input channels per group is not a multiple of ``m``, and
    transposed convolutions, are left alone; the plan names them with the reason.

    By loss on calibration data, entries and weights are chosen as by :class:`Magnitude`.

    Source: Mishra et al. 2021, "Accelerating sparse deep neural networks" (2:4).

    Args:
        n: how many entries of a block are kept.
        m: the number of entries in a block.
        importance: as for :class:`Magnitude`.

    Raises:
        BadInput: n and m are not integers with 1 <= n < m, or the importance is unknown.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.n, self.m))
        if not whole or not 1 <= self.n < self.m:
            raise BadInput(f"n:m keeps n of every m weights: expected whole 1 <= n < m, got {self.n!r}:{self.m!r}")
        check_choice("importance", self.importance, IMPORTANCES)

    def unfit(self, module: nn.Module) -> str | None:
        """Return why blocks of ``m`` input channels cannot be formed in a layer, or None."""
        if isinstance(module, _ConvTransposeNd):
            return "is a transposed convolution"
        weight = untransposed(module)._parameters[_tensor(module)]
        assert weight is not None  # callers rule this out
        channels = weight.shape[1]
        return f"has {channels} input channels, which {self.m} does not divide" if channels % self.m else None

    def plan_with(self, model: nn.Module, analysis: Weights) -> Plan:
        """Return the plan: n of every m entries of each layer stay."""
        kept = [_weight(model, name).numel() // self.m * self.n for name in analysis.layers]
        measured = replace(self, importance=self.measure(analysis))
        return weight_plan(measured, model, analysis, 1 - self.n / self.m, kept)

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Weights | None) -> nn.Module:
        """Zero all but the ``n`` most important entries of each block, in place."""
        done = self.compensate(model, plan, analysis, lambda _, w, moment: prune_blocks(w, moment, self.n, self.m))
        for layer in plan.layers:
            if layer.name not in done:
                weight = _weight(model, layer.name, by_rows=True)
                blocks = weight.abs().unflatten(1, (-1, self.m)).movedim(2, -1)  # (filters, inputs/m, ..., m)
                stays = largest(blocks, self.n).movedim(-1, 2).flatten(1, 2)
                weight.masked_fill_(~stays, 0.0)
        return model


def _losses(model: nn.Module, analysis: Weights, *, marginal: bool) -> list[Tensor]:
    """Return the losses of each layer as its entries go, float64 (entries,), ascending, in units of its output energy.

    A layer whose inputs are not known counts as if its inputs were all independent and alike.

    Args:
        model: the model.
        analysis: its analysis.
        marginal: whether to return what each entry adds, rather than what is lost with it and all before it.
    """
    curves = analysis.curves(model)
    losses = []
    for name in analysis.layers:
        weight = _weight(model, name)
        if name in curves:
            each = _steps(curves[name], weight.numel()).to(weight.device)
        else:
            each = weight.double().square().flatten().sort().values
            each /= each.sum().clamp(min=torch.finfo(each.dtype).tiny)
        losses.append(each if marginal else each.cumsum(0))
    return losses


def _steps(curve: Tensor, entries: int) -> Tensor:
    """Return what each entry adds to the loss as they go, float64 (entries,), by the convex hull of the curve."""
    segments: list[tuple[float, float]] = []  # width and height, steeper from one to the next
    for width, height in zip(torch.tensor(GONE).double().diff().tolist(), curve.diff().tolist(), strict=True):
        segments.append((width, height))
        while len(segments) > 1 and segments[-2][1] * segments[-1][0] >= segments[-1][1] * segments[-2][0]:
            (w, h), (v, g) = segments.pop(), segments.pop()
            segments.append((v + w, g + h))
    widths, heights = torch.tensor(segments, dtype=torch.float64).T
    places = (torch.arange(entries, dtype=torch.float64) + 0.5) / entries
    segment = torch.searchsorted(widths.cumsum(0), places).clamp(max=len(widths) - 1)
    steps: Tensor = (heights / widths / entries)[segment]
    return steps


def _lost_share(weight: Tensor) -> Tensor:
    """Return, for each entry, the share of Σw² that is lost with it and all smaller entries; float64 (entries,)."""
    squares, order = weight.double().square().flatten().sort()
    lost = squares.cumsum(0)
    tiny = torch.finfo(lost.dtype).tiny  # a weight of zeros loses nothing
    return torch.empty_like(lost).scatter_(0, order, lost / lost[-1].clamp(min=tiny))


def weight_plan(
    compressor: Compressor[Weights], model: nn.Module, analysis: Weights, ratio: float, kept: Sequence[int]
) -> Plan:
    """Return the plan that keeps ``kept[i]`` entries of the weight of layer i, and every shape."""
    modules = [model.get_submodule(name) for name in analysis.layers]
    compressible: Mapping[str, int] = {
        f"{name}.{_tensor(module)}".lstrip("."): _weight(model, name).numel()
        for name, module in zip(analysis.layers, modules, strict=True)
    }
    layers = [
        LayerPlan(
            name=name,
            kind=type(module).__name__,
            kept=n,
            total=_weight(model, name).numel(),
            params=sum(p.numel() for p in module.parameters(recurse=False)),
            params_dense=sum(p.numel() for p in module.parameters(recurse=False)),
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
    weight = (untransposed(module) if by_rows else module)._parameters.get(_tensor(module))
    if weight is None:
        raise BadInput(f"the plan is for another model: {name!r} has no weight of its own")
    return weight.detach()


def _tensor(module: nn.Module) -> str:
    """Return the name of a layer's weight; attention packs the projections of queries, keys and values in one."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
