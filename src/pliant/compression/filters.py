"""Filters: whole channels are removed from a network, together with everything that is coupled to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.calling import Example, as_inputs, copied, plain
from pliant.compression.base import COSTS, Analysis, check_ratio, parameter_shapes
from pliant.compression.calibration import calibration_of
from pliant.compression.choosing import loss_curves
from pliant.compression.controls import KEPT, Controlled, layer_names, with_reasons
from pliant.compression.costs import applications
from pliant.compression.elimination import Curve
from pliant.compression.plan import LayerPlan, Plan, weight_shape
from pliant.compression.ranking import energies, importances, weakest_first
from pliant.compression.removals import (
    Removals,
    Size,
    Stops,
    curve_steps,
    greedy_steps,
    share_steps,
    smaller_removals,
    uniform_steps,
)
from pliant.compressor_names import ALLOCATIONS
from pliant.errors import BadInput, check_choice
from pliant.structure import (
    AxisName,
    ChannelGroup,
    Proof,
    Structure,
    axes,
    axis_length,
    axis_of,
    complement,
    coupled_channels,
    keep_channels,
    positions,
    tensors_along,
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
        curves: for each group, in which order its channels leave and what that loses on data; None to go by weights.
        proof: what the groups were verified by, and plans are; None leaves plans unverified.
    """

    groups: tuple[ChannelGroup, ...]
    applied: Mapping[str, int]
    curves: tuple[Curve, ...] | None = None
    proof: Proof | None = field(default=None, repr=False)
    _removals: dict[Any, Removals] = field(default_factory=dict, init=False, repr=False)

    def removals(self, key: Any, make: Callable[[], Removals]) -> Removals:
        """Return the removals that are known under a key, or those that ``make`` returns, for all ratios."""
        if key not in self._removals:
            self._removals[key] = make()
        return self._removals[key]


@dataclass(frozen=True)
class FilterPruning(Controlled[Channels]):
    """Remove the least important channels of convolution and linear layers, coupled channels together.

    A parameter entry is compressible if removing some channel of a verified group would delete it: filters and their
    biases, scales and shifts of their normalisation, and the columns that read them; a classifier's weight, but not its
    bias. At least 5 % of the channels of every group stay, and at least one, unless ``at_least`` says otherwise; a
    ratio beyond that gives the smallest possible network.

    ``"uniform"`` allocation removes the same share of channels from every group (to within one channel): those whose
    filters in all producers together have the smallest norm. ``"global"`` ranks the channels of all groups by their
    energy per freed cost; the energy of a channel is its filter's share in the squared norms of its layer, summed over
    the producers. (The share is relative to the layer, not to the group: otherwise a residual stream of ten layers
    would count as one, and be cut to a single channel.) Among equals the channel of lower index stays. ``"energy"``
    removes from every group the weakest channels that together hold the same share of the energy.

    If the analysis has curves, of what the channels of each group lose on data, channels leave in their order, "global"
    takes the least loss per cost that is freed at the moment, and "energy" the same share of every group's loss.

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
        multiple_of, keep, at_least, at_most, ratios: what every layer keeps, see
            :class:`~pliant.compression.Controlled`; they hold for each group of coupled channels, and ``keep``
            and ``ratios`` for the groups in which a layer is named.

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
        self.check_controls()

    def analyse(self, model: nn.Module, example_inputs: Example, calibration: Iterable[Any] | None = None) -> Channels:
        """Find and verify the coupled channels, whatever the weights are; measure their losses if there is data.

        Raises:
            BadInput: the example or the data does not fit, or importance is "loss" and there is no data.
        """
        if self.importance == "loss" and calibration is None:
            raise BadInput('importance="loss" needs calibration data: give batches of images, or use "auto"')
        model = plain(model)
        structure = coupled_channels(model, example_inputs)
        groups, refused = self.choose(model, structure)
        probe = copied(model).eval()
        layers = dict(weighted_layers(probe))
        weights: dict[str, int] = {}
        for name, times in applications(probe, layers, as_inputs(example_inputs)).items():
            attention = isinstance(layers[name], nn.MultiheadAttention)  # reads the weight of its own output layer
            for tensor in ("in_proj_weight", "out_proj.weight") if attention else ("weight",):
                weights.setdefault(f"{name}.{tensor}" if name else tensor, times.whole)
        curves = None
        if calibration is not None and self.importance in ("auto", "loss"):
            curves = loss_curves(model, groups, calibration_of(calibration, model, example_inputs))
        return Channels(parameter_shapes(model), refused, groups, weights, curves, structure.proof)

    def choose(
        self, model: nn.Module, structure: Structure
    ) -> tuple[tuple[ChannelGroup, ...], tuple[tuple[str, str], ...]]:
        """Return the groups that channels are removed from, and (layer, reason) for each other layer."""
        groups = tuple(group for group in structure.groups if group.kind != "heads")
        layers = [name for name, _ in weighted_layers(model)]
        return groups, refusals(structure, groups, layers, "makes attention heads, which HeadPruning removes")

    def plan_with(self, model: nn.Module, analysis: Channels) -> Plan:
        """Put the removals of channels in order, and return the plan with the number of them nearest to the ratio."""
        removals, refused = self.path(model, analysis)
        return self._plan(model, analysis, removals, refused, self._counts(removals))

    def _counts(self, removals: Removals) -> list[int]:
        """Return how many channels each group loses."""
        if not self.ratio:
            return [0] * len(removals.groups)
        dense, compressible = removals.costs.after({}), sum(removals.costs.compressible.values())
        return removals.counts(dense - self.ratio * compressible)

    def _plan(
        self,
        model: nn.Module,
        analysis: Channels,
        removals: Removals,
        refused: tuple[tuple[str, str], ...],
        counts: Sequence[int],
        limits: Mapping[str, str] | None = None,
    ) -> Plan:
        measure = self.importance
        if measure == "auto":
            measure = "l2" if analysis.curves is None else "loss"
        known = Analysis(analysis.shapes, refused)
        return replace(self, importance=measure).plan_counts(
            model, known, removals.groups, removals.orders, counts, removals.costs, limits
        )

    def fault(self, plan: Plan, analysis: Channels) -> str | None:
        """Return why the network of a plan does not equal its masked twin in float64, None if it does."""
        proof = analysis.proof
        if proof is None or self.mode == "mask":
            return None
        return proof.fault(_removed(proof.model, plan))

    def proven(self, model: nn.Module, plan: Plan, analysis: Channels) -> Plan:
        """Return the plan if its network equals its masked twin in float64, else one by which groups keep more."""
        proof = analysis.proof
        if proof is None or self.fault(plan, analysis) is None:
            return plan
        removals, refused = self.path(model, analysis)
        counts = self._counts(removals)

        def fault(removed: Mapping[int, int]) -> str | None:
            groups = [removals.groups[g] for g in removed]
            return proof.fault(positions(groups, [removals.orders[g][:count] for g, count in removed.items()]))

        counts, limits = smaller_removals(removals.groups, counts, fault)
        return self._plan(model, analysis, removals, refused, counts, limits)

    def path(self, model: nn.Module, analysis: Channels) -> tuple[Removals, tuple[tuple[str, str], ...]]:
        """Return the order in which channels leave, for all ratios; and (layer, reason) for layers left alone.

        Raises:
            BadInput: a pattern of the controls matches no layer, or losses are asked for and not known.
        """
        if self.importance == "loss" and analysis.curves is None:
            raise BadInput('importance="loss" needs an analysis with calibration data')
        names = layer_names(model, (slot.module for group in analysis.groups for slot in group.slots))
        left, own = self.named(names)
        removals, reasons = self._removals(model, analysis, left, own)
        return removals, with_reasons(analysis.refused, reasons)

    def plan_counts(
        self,
        model: nn.Module,
        known: Analysis,
        groups: tuple[ChannelGroup, ...],
        orders: Sequence[Tensor],
        counts: Sequence[int],
        costs: Size,
        limits: Mapping[str, str] | None = None,
    ) -> Plan:
        """Return the plan by which each group loses the first channels of its order.

        Args:
            model: the model.
            known: shapes of its parameters, and layers that are left alone.
            groups: the groups.
            orders: for each group, its channels, the one that leaves first first.
            counts: for each group, how many leave.
            costs: the cost that the ratio counts.
            limits: layer → why it keeps more than the ratio asks for.
        """
        known_limits = {slot.module: group.limit for group in groups if group.limit for slot in group.producers}
        limited = {**known_limits, **(limits or {})}
        gone = positions(groups, [order[:count] for order, count in zip(orders, counts, strict=True)])
        removed = dict(enumerate(counts))
        size = costs if self.cost == "params" else Size(model, groups)
        fewer = size.after({}) - size.after(removed)
        return self.assemble(
            model,
            known,
            ratio=self.ratio,
            removed=costs.after({}) - costs.after(removed),
            compressible=costs.compressible,
            layers=_layers(model, groups, gone, real=self.mode == "remove"),
            params_after=measuring.parameters(model) - (fewer if self.mode == "remove" else 0),
            floored=self._floored(model, groups, counts),
            limited=[(name, limited[name]) for name, _ in weighted_layers(model) if name in limited],
        )

    def _removals(
        self, model: nn.Module, analysis: Channels, left: Collection[str], own: Mapping[str, float]
    ) -> tuple[Removals, dict[str, str]]:
        """Return the removals of the groups that no layer to keep is in; and layer → reason for the other groups."""
        chosen = [g for g, group in enumerate(analysis.groups) if not any(slot.module in left for slot in group.slots)]
        groups = tuple(analysis.groups[g] for g in chosen)
        known = analysis.curves if self.importance in ("auto", "loss") else None
        curves = None if known is None else [known[g] for g in chosen]
        stops = [self._stops(group, own) for group in groups]
        applied = None if self.cost == "params" else analysis.applied
        if curves is None:
            score = importances if self.allocation == "uniform" else energies
            scores = [score(model, group, self.importance) for group in groups]
            key = (self.options_key(), *(tuple(values.tolist()) for values in scores))  # the weights may have changed
            removals = analysis.removals(
                key, lambda: self._by_weights(Size(model, groups, applied), groups, scores, stops)
            )
        else:
            removals = analysis.removals(
                self.options_key(), lambda: self._by_curves(Size(model, groups, applied), groups, curves, stops)
            )
        return removals, _reasons(model, analysis, groups, left)

    def _stops(self, group: ChannelGroup, own: Mapping[str, float]) -> list[int]:
        """Return how many channels a group may lose, ascending."""
        allowed = self._allowed(group)
        producers = {slot.module for slot in group.producers}
        ratio = next((share for name, share in own.items() if name in producers), None)
        if ratio is not None:
            asked = (1 - ratio) * group.channels
            allowed = (min(allowed, key=lambda kept: abs(kept - asked)),)  # the larger number of two that are as near
        return [group.channels - kept for kept in allowed]

    def _allowed(self, group: ChannelGroup) -> tuple[int, ...]:
        """Return how many channels a group may keep by the controls and by what the network runs with, falling."""
        allowed = self.allowed(group.channels)
        if group.counts is None:
            return allowed
        runs = {*group.counts, group.channels}
        return tuple(count for count in allowed if count in runs) or (min(n for n in runs if n >= allowed[-1]),)

    def _by_weights(
        self, costs: Size, groups: tuple[ChannelGroup, ...], scores: Sequence[Tensor], stops: Stops
    ) -> Removals:
        """Return the removals by importances for uniform allocation, else by energies."""
        orders = [weakest_first(values) for values in scores]
        ordered = [values[order] for values, order in zip(scores, orders, strict=True)]
        if self.allocation == "uniform":
            steps = uniform_steps([group.channels for group in groups], stops)
        elif self.allocation == "global":
            steps = greedy_steps(costs, [values.tolist() for values in ordered], stops)
        else:
            losses = [[0.0, *values[:-1].cumsum(0).tolist(), float(values.sum())] for values in ordered]
            steps = share_steps(losses, stops)
        return Removals.of(groups, costs, orders, stops, steps)

    def _by_curves(
        self, costs: Size, groups: tuple[ChannelGroup, ...], curves: Sequence[Curve], stops: Stops
    ) -> Removals:
        """Return the removals by the losses on data."""
        losses = [curve.losses.tolist() for curve in curves]
        if self.allocation == "uniform":
            steps = uniform_steps([group.channels for group in groups], stops)
        else:
            steps = curve_steps(costs, losses, stops) if self.allocation == "global" else share_steps(losses, stops)
        return Removals.of(groups, costs, [curve.order.cpu() for curve in curves], stops, steps)

    def _floored(self, model: nn.Module, groups: Sequence[ChannelGroup], counts: Sequence[int]) -> list[str]:
        """Return the layers whose channels are as few as the controls allow."""
        if not self.ratio:
            return []
        low = {
            slot.module
            for group, count in zip(groups, counts, strict=True)
            if group.channels - count == self._allowed(group)[-1] and group.channels > 1
            for slot in group.producers
        }
        return [name for name, _ in weighted_layers(model) if name in low]

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


def _reasons(
    model: nn.Module, analysis: Channels, groups: Sequence[ChannelGroup], left: Collection[str]
) -> dict[str, str]:
    """Return layer → reason for the layers to keep, and for those that cannot change because of them.

    Args:
        model: the model.
        analysis: its analysis.
        groups: the groups that channels are removed from.
        left: the layers to keep.
    """
    known = {slot.module for group in analysis.groups for slot in group.slots} | {name for name, _ in analysis.refused}
    reasons = {name: KEPT for name in layer_names(model, known) if name in left and name in known}
    free = {slot.module for group in groups for slot in group.producers}
    weighted = [name for name, _ in weighted_layers(model)]
    for group in analysis.groups:
        cause = next((slot.module for slot in group.slots if slot.module in left), None)
        producers = {slot.module for slot in group.producers} - free if cause is not None else set()
        for name in weighted:
            if name in producers:
                reasons.setdefault(name, f"is coupled with {cause}, which {KEPT}")
    return reasons


def masked_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` with its dense shapes that computes the same function as the plan's small network.

    Only the input columns that read removed channels are zero. Zeroing filters would not suffice, because the shift of
    a BatchNorm behind them would still flow.
    """
    plan.check(model)
    twin = copied(model)
    for module, axis, keep in _kept(twin, plan):
        if axis == "inputs":
            zero_channels(module, axis, complement(module, axis, keep))
    return twin


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
        others = [axis for layer, axis in gone if layer == name and axis not in AXES]
        for axis in (*AXES, *others):
            lost = gone.get((name, axis), torch.empty(0, dtype=torch.int64))
            keeps[axis] = tuple(complement(module, axis, lost).tolist()) if len(lost) else None
            for tensor, dim in tensors_along(module, "", axis) if len(lost) else ():
                if tensor in shapes:
                    shapes[tensor][dim] -= len(lost)
        main: AxisName = "outputs" if "outputs" in axes(module) else others[0]
        total, outputs = axis_length(module, main), keeps[main]
        layers.append(
            LayerPlan(
                name=name,
                kind=type(module).__name__,
                kept=total if outputs is None else len(outputs),
                total=total,
                params=sum(prod(shape) for shape in shapes.values()) if real else dense,
                params_dense=dense,
                shape=weight_shape(module),
                outputs=keeps["outputs"],
                inputs=keeps["inputs"],
                others=tuple((axis, kept) for axis in others if (kept := keeps[axis]) is not None),
            )
        )
    return layers


def _removed(model: nn.Module, plan: Plan) -> dict[tuple[str, AxisName], Tensor]:
    """Return (layer, axis) → positions that leave."""
    names = {module: name for name, module in model.named_modules()}
    return {(names[module], axis): complement(module, axis, keep) for module, axis, keep in _kept(model, plan)}


def _kept(model: nn.Module, plan: Plan) -> list[tuple[nn.Module, AxisName, Tensor]]:
    """Return (layer, axis, positions that stay) for every axis that the plan shortens."""
    result = []
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        for axis, keep in (("outputs", layer.outputs), ("inputs", layer.inputs), *layer.others):
            if keep is None:
                continue
            known = axis_of(module, axis)
            if known is None or keep[-1] >= known.length:
                raise BadInput(f"the plan is for another model: {layer.name!r} has no {axis} up to {keep[-1]}")
            result.append((module, axis, torch.tensor(keep)))
    return result
