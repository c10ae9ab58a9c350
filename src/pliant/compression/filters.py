"""Filters: whole channels are removed from a network, together with everything that is coupled to them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pliant import measuring
from pliant.calling import Example, as_inputs
from pliant.compression.allocation import nearest
from pliant.compression.base import COSTS, Analysis, Compressor, check_ratio, parameter_shapes
from pliant.compression.calibration import calibration_of
from pliant.compression.choosing import loss_curves
from pliant.compression.costs import applications
from pliant.compression.elimination import Curve
from pliant.compression.plan import LayerPlan, Plan, weight_shape
from pliant.compressor_names import ALLOCATIONS
from pliant.errors import BadInput, check_choice
from pliant.structure import (
    AxisName,
    ChannelGroup,
    Structure,
    axes,
    axis_length,
    complement,
    coupled_channels,
    keep_channels,
    positions,
    weighted_layers,
    zero_channels,
)

IMPORTANCES = ("auto", "loss", "l2", "l1", "bn")
MODES = ("remove", "mask")
AXES: tuple[AxisName, ...] = ("outputs", "inputs")


@dataclass(frozen=True, eq=False)
class Channels(Analysis):
    """The analysis of filter pruning.

    Args:
        groups: the verified groups of coupled channels of the model.
        applied: weight name → how often it is applied in one forward pass of the example.
        curves: for each group, the order in which its channels leave and the losses, measured on calibration data;
            None without data.
    """

    groups: tuple[ChannelGroup, ...]
    applied: Mapping[str, int]
    curves: tuple[Curve, ...] | None = None


@dataclass(frozen=True)
class FilterPruning(Compressor[Channels]):
    """Remove the least important channels of convolution and linear layers, coupled channels together.

    A parameter entry is compressible if removing some channel of a verified group would delete it: filters and their
    biases, scales and shifts of their normalisation, and the columns that read them; a classifier's weight, but not its
    bias. At least one channel of every group stays; a ratio beyond that gives the smallest possible network.

    ``"uniform"`` allocation removes the same share of channels from every group (to within one channel): those whose
    filters in all producers together have the smallest norm. ``"global"`` ranks the channels of all groups by their
    energy per freed cost; the energy of a channel is its filter's share in the squared norms of its layer, summed over
    the producers. (The share is relative to the layer, not to the group: otherwise a residual stream of ten layers
    would count as one, and be cut to a single channel.) Among equals the channel of lower index stays. ``"energy"``
    removes from every group the weakest channels that together hold the same share of the energy.

    Source of the l1 and l2 criteria: Li et al. 2017, "Pruning filters for efficient ConvNets".

    Args:
        ratio: share of the compressible parameters to remove, in [0, 1).
        allocation: "uniform", "global" or "energy".
        importance: the measure of a channel: "loss" is what the layers that read it lose on calibration data once all
            their other inputs make up for it (``elimination``); "l2" and "l1" are norms of its filters, and "bn" the
            l2 norm after scaling by abs(γ)/√(σ² + ε) of the BatchNorm if it alone reads the filter. "auto" is "loss"
            if there is calibration data, else "l2".
        mode: "remove" returns the small network; "mask" keeps the shapes and zeroes the channels instead of removing
            them, which gives a network that computes the same function.
        cost: the cost that the ratio counts and the allocation economises: "params", or "macs", the
            multiply-accumulates in which the compressible entries take part.

    Raises:
        BadInput: the ratio is out of range, or an option is unknown.
    """

    ratio: float = 0.5
    allocation: str = "global"
    importance: str = "auto"
    mode: str = "remove"
    cost: str = "params"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("importance", self.importance, IMPORTANCES)
        check_choice("mode", self.mode, MODES)
        check_choice("cost", self.cost, COSTS)

    def analyse(self, model: nn.Module, example_inputs: Example, calibration: Iterable[Any] | None = None) -> Channels:
        """Find and verify the coupled channels, whatever the weights are; measure their losses if there is data.

        Raises:
            BadInput: the example or the data does not fit, or importance is "loss" and there is no data.
        """
        if self.importance == "loss" and calibration is None:
            raise BadInput('importance="loss" needs calibration data: give batches of images, or use "auto"')
        structure = coupled_channels(model, example_inputs)
        groups, refused = self.choose(model, structure)
        probe = copy.deepcopy(model).eval()
        layers = dict(weighted_layers(probe))
        weights: dict[str, int] = {}
        for name, times in applications(probe, layers, as_inputs(example_inputs)).items():
            attention = isinstance(layers[name], nn.MultiheadAttention)  # reads the weight of its own output layer
            for tensor in ("in_proj_weight", "out_proj.weight") if attention else ("weight",):
                weights.setdefault(f"{name}.{tensor}" if name else tensor, times.whole)
        curves = None
        if calibration is not None and self.importance in ("auto", "loss"):
            curves = loss_curves(model, groups, calibration_of(calibration, model, example_inputs))
        return Channels(parameter_shapes(model), refused, groups, weights, curves)

    def choose(
        self, model: nn.Module, structure: Structure
    ) -> tuple[tuple[ChannelGroup, ...], tuple[tuple[str, str], ...]]:
        """Return the groups that channels are removed from, and (layer, reason) for each other layer."""
        groups = tuple(group for group in structure.groups if group.kind != "heads")
        layers = [name for name, _ in weighted_layers(model)]
        return groups, refusals(structure, groups, layers, "makes attention heads, which HeadPruning removes")

    def plan_with(self, model: nn.Module, analysis: Channels) -> Plan:
        """Rank the removals of single channels, and return the plan with the number of them nearest to the ratio."""
        groups = analysis.groups
        size = _Size(model, groups)
        costs = size if self.cost == "params" else _Size(model, groups, analysis.applied)
        score = _importance if self.allocation == "uniform" else _energy
        scores = [score(model, group, self.importance) for group in groups]
        orders = [_weakest_first(s) for s in scores]
        if self.allocation == "uniform":
            removals = _uniform(groups)
        else:
            removals = _global(costs, scores, orders) if self.allocation == "global" else _by_energy(scores, orders)

        def kept(n: int) -> int:
            return costs.after(Counter(removals[:n]))

        dense = costs.after({})
        compressible = sum(costs.compressible.values())
        n = nearest(kept, len(removals), dense - self.ratio * compressible)
        counts = Counter(removals[:n])
        gone = positions(groups, [order[: counts[g]] for g, order in enumerate(orders)])
        fewer = size.after({}) - size.after(counts)
        return self.assemble(
            model,
            analysis,
            ratio=self.ratio,
            removed=dense - kept(n),
            compressible=costs.compressible,
            layers=_layers(model, groups, gone, real=self.mode == "remove"),
            params_after=measuring.parameters(model) - (fewer if self.mode == "remove" else 0),
        )

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Channels | None) -> nn.Module:
        """Cut the channels out of the layers that hold them, or zero them, in place."""
        for module, axis, keep in _kept(model, plan):
            if self.mode == "remove":
                keep_channels(module, axis, keep)
            else:
                zero_channels(module, axis, complement(module, axis, keep))
        return model


def refusals(
    structure: Structure, groups: Sequence[ChannelGroup], layers: Iterable[str], otherwise: str
) -> tuple[tuple[str, str], ...]:
    """Return (layer, reason) for each of ``layers`` that produces no channels of ``groups``.

    Args:
        structure: the coupled channels of the model.
        groups: the groups that channels are removed from.
        layers: names of layers.
        otherwise: the reason for layers that the structure does not refuse.
    """
    removable = {slot.module for group in groups for slot in group.producers}
    reasons = dict(structure.refused)
    return tuple((name, reasons.get(name, otherwise)) for name in layers if name not in removable)


def masked_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` with its dense shapes that computes the same function as the plan's small network.

    Only the input columns that read removed channels are zero. Zeroing filters would not suffice, because the shift of
    a BatchNorm behind them would still flow.
    """
    plan.check(model)
    twin = copy.deepcopy(model)
    for module, axis, keep in _kept(twin, plan):
        if axis == "inputs":
            zero_channels(module, axis, complement(module, axis, keep))
    return twin


# --- ranking ----------------------------------------------------------------------------------------------------------


def _importance(model: nn.Module, group: ChannelGroup, importance: str) -> Tensor:
    """Return the norm of each channel over the filters of all producers, float64 of shape (channels,)."""
    norms = torch.stack(_norms(model, group, importance))
    return norms.sum(0) if importance == "l1" else norms.square().sum(0).sqrt()


def _energy(model: nn.Module, group: ChannelGroup, importance: str) -> Tensor:
    """Return each channel's share of its layer's squared norms, summed over the producers, shape (channels,)."""
    squares = torch.stack(_norms(model, group, importance)).square()
    tiny = torch.finfo(squares.dtype).tiny  # a layer of zeros gives shares of 0
    return (squares / squares.sum(1, keepdim=True).clamp(min=tiny)).sum(0)


def _norms(model: nn.Module, group: ChannelGroup, importance: str) -> list[Tensor]:
    """Return the norms of the filters of each producer, float64 of shape (channels,)."""
    norms = []
    for slot in group.producers:
        module = model.get_submodule(slot.module)
        if not slot.tensors or isinstance(module, (_NormBase, nn.PReLU)):
            continue
        weight, dim = axes(module)["outputs"].tensors[0]
        filters = getattr(module, weight).detach().movedim(dim, 0).flatten(1).double().cpu()  # (filters, entries)
        if importance == "bn" and slot.norm is not None:
            filters = filters * _scale(model.get_submodule(slot.norm)).unsqueeze(1)
        rows = filters[slot.indices].flatten(1)  # (channels, width · entries)
        norms.append(rows.abs().sum(1) if importance == "l1" else rows.square().sum(1).sqrt())
    return norms


def _scale(norm: nn.Module) -> Tensor:
    """Return |γ|/√(σ² + ε) of a BatchNorm, float64 of shape (channels,); a missing γ or σ counts as 1."""
    assert isinstance(norm, _NormBase)  # coupled_channels names no other modules
    scale = torch.ones(norm.num_features, dtype=torch.float64)
    if norm.weight is not None:
        scale *= norm.weight.detach().double().cpu().abs()
    if norm.running_var is not None:
        scale /= (norm.running_var.double().cpu() + norm.eps).sqrt()
    return scale


def _weakest_first(scores: Tensor) -> Tensor:
    """Return the channels in the order of removal: ascending score, the higher index first among equals."""
    return len(scores) - 1 - scores.flip(0).argsort(stable=True)


def _uniform(groups: Sequence[ChannelGroup]) -> list[int]:
    """Order the removals, each named by its group, so that every prefix takes about the same share of each group."""
    events = [
        ((2 * taken - 1) / (2 * group.channels), g)
        for g, group in enumerate(groups)
        for taken in range(1, group.channels)
    ]
    return [g for _, g in sorted(events)]


def _global(size: _Size, scores: Sequence[Tensor], orders: Sequence[Tensor]) -> list[int]:
    """Order the removals, each named by its group, by relative energy per cost freed."""
    events = []
    dense = size.after({})
    for g, (energies, order) in enumerate(zip(scores, orders, strict=True)):
        freed = max(1, dense - size.after({g: 1}))  # the difference is 0 if the cost of no layer is known
        events += [(energy / freed, g) for energy in energies[order[:-1]].tolist()]
    return [g for _, g in sorted(events)]


def _by_energy(scores: Sequence[Tensor], orders: Sequence[Tensor]) -> list[int]:
    """Order the removals, each named by its group, by the share of the group's energy that is lost after them."""
    events = []
    for g, (energies, order) in enumerate(zip(scores, orders, strict=True)):
        total = energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)  # a group of zeros loses nothing
        events += [(lost, g) for lost in (energies[order[:-1]].cumsum(0) / total).tolist()]
    return [g for _, g in sorted(events)]


class _Size:
    """The number of parameters in all tensors that the groups touch, for any number of removed channels.

    With ``applied``, how often each weight is applied, it is the number of multiply-accumulates instead.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], applied: Mapping[str, int] | None = None
    ) -> None:
        self.applied = applied
        parameters = dict(model.named_parameters())
        # tensor → dim → position of the group → positions per channel
        self.touched: dict[str, dict[int, dict[int, int]]] = {}
        for g, group in enumerate(groups):
            for slot in group.slots:
                for name, dim in slot.tensors:
                    if name in parameters and (applied is None or applied.get(name)):
                        self.touched.setdefault(name, {}).setdefault(dim, {})[g] = slot.indices.shape[1]
        self.shapes = {name: tuple(parameters[name].shape) for name in self.touched}
        everything = {g: group.channels for g, group in enumerate(groups)}
        self.compressible = {name: self._entries(name, {}) - self._entries(name, everything) for name in self.touched}

    def after(self, removed: Mapping[int, int]) -> int:
        """Return the remaining number when the group at index g has lost ``removed[g]`` channels."""
        return sum(self._entries(name, removed) for name in self.touched)

    def _entries(self, name: str, removed: Mapping[int, int]) -> int:
        shape = list(self.shapes[name])
        for dim, widths in self.touched[name].items():
            shape[dim] -= sum(removed.get(g, 0) * width for g, width in widths.items())
        return prod(shape) * (1 if self.applied is None else self.applied[name])


# --- between channels and layers --------------------------------------------------------------------------------------


def _layers(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    gone: Mapping[tuple[str, AxisName], Tensor],
    *,
    real: bool,
) -> list[LayerPlan]:
    """Return one entry per layer that a group touches, in the model's order."""
    touched = {slot.module for group in groups for slot in group.slots}
    layers = []
    for name, module in model.named_modules():
        if name not in touched:
            continue
        keeps: dict[AxisName, tuple[int, ...] | None] = {}
        shapes = {t: list(p.shape) for t, p in module._parameters.items() if p is not None}
        dense = sum(prod(shape) for shape in shapes.values())  # without children: an attention module has its layers
        for axis in AXES:
            lost = gone.get((name, axis), torch.empty(0, dtype=torch.int64))
            keeps[axis] = tuple(complement(module, axis, lost).tolist()) if len(lost) else None
            for tensor, dim in axes(module)[axis].tensors if len(lost) else ():
                if tensor in shapes:
                    shapes[tensor][dim] -= len(lost)
        total = axis_length(module, "outputs")
        outputs = keeps["outputs"]
        layers.append(
            LayerPlan(
                name=name,
                kind=type(module).__name__,
                kept=total if outputs is None else len(outputs),
                total=total,
                params=sum(prod(shape) for shape in shapes.values()) if real else dense,
                params_dense=dense,
                shape=weight_shape(module),
                outputs=outputs,
                inputs=keeps["inputs"],
            )
        )
    return layers


def _kept(model: nn.Module, plan: Plan) -> list[tuple[nn.Module, AxisName, Tensor]]:
    """Return (layer, axis, positions that stay) for every axis that the plan shortens."""
    result = []
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        kept_by_axis: dict[AxisName, tuple[int, ...] | None] = {"outputs": layer.outputs, "inputs": layer.inputs}
        for axis, keep in kept_by_axis.items():
            if keep is None:
                continue
            if axis not in axes(module) or keep[-1] >= axis_length(module, axis):
                raise BadInput(f"the plan is for another model: {layer.name!r} has no {axis} up to {keep[-1]}")
            result.append((module, axis, torch.tensor(keep)))
    return result
