"""Coupled channels as torch-pruning sees them: candidates, none of which is trusted until it is verified.

torch-pruning's dependency graph (Fang et al. 2023, "DepGraph") reads off the autograd graph which layers share
their channels. Its groups are converted to plain data here, or to a reason why that is impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from pliant.calling import Inputs
from pliant.errors import first_line
from pliant.structure.attention import linear_width
from pliant.structure.channel_groups import ChannelGroup, Slot
from pliant.structure.layers import (
    AxisName,
    axes,
    axis_length,
    obstacle_to_cutting,
    tensors_along,
    tied_parameters,
    weighted_layers,
)
from pliant.structure.tracing import Traced, is_opaque


def channel_candidates(
    model: nn.Module, inputs: Inputs, training: Sequence[tuple[Inputs, int]] = ()
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that torch-pruning proposes and that can be converted, and a reason for each other layer.

    Args:
        model: the model in eval mode; not changed.
        inputs: the inputs to call it on.
        training: inputs and draws for training mode, if it calls more than eval mode.
    """
    try:
        traced = Traced(model, inputs, training)
    except Exception as error:  # torch-pruning's tracing raises any kind of error
        return [], {name: f"the model cannot be traced: {first_line(error)}" for name, _ in weighted_layers(model)}
    graph = traced.graph
    reader = _Reader(model, traced)
    attentions = [name for name, module in model.named_modules() if is_opaque(module)]
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    seen: set[str] = set()
    taken: set[tuple[str, AxisName, int]] = set()
    for name, module in traced.layers():
        if name in seen or module not in graph.module2node or isinstance(module, nn.MultiheadAttention):
            continue
        if "inputs" not in axes(module):  # a depthwise convolution belongs to the group of its input
            reasons[name] = "is a grouped convolution: its channels are tied to their places"
            continue
        try:
            members = _members(graph, module)
        except Exception as error:  # see above
            reasons[name] = f"the layers that share its channels are not known: {first_line(error)}"
            continue
        slots, reason = reader.read(members)
        producers = tuple(slot for slot in slots if slot.axis == "outputs")
        seen.update(slot.module for slot in producers)
        places = {(s.module, s.axis, int(i)) for s in slots for i in s.indices.flatten()}
        if reason is None and places & taken:
            reason = "shares only some of its channels with other layers"
        if reason is None and len(producers[0].indices) == 1:
            reason = "has a single channel"
        if reason is None:
            taken |= places
            consumers = tuple(slot for slot in slots if slot.axis == "inputs")
            linear = all(linear_width(model.get_submodule(slot.module)) is not None for slot in producers)
            kind = "neurons" if linear else "channels"
            groups.append(ChannelGroup(len(producers[0].indices), producers, consumers, kind))
        else:
            reasons.update(dict.fromkeys([name, *(slot.module for slot in producers)], reason))
    for name, module in weighted_layers(model):
        inside = any(name.startswith(f"{attention}.") for attention in attentions)
        hidden = "belongs to attention, of which only heads can leave" if inside else ""
        if name not in traced.called:
            hidden = "is not reached through its forward"
        hidden = hidden or "nothing that has a gradient depends on it: call it, and keep its output a tensor"
        reasons.setdefault(name, obstacle_to_cutting(module, reader.tied) or hidden)
    return groups, reasons


class _Place(NamedTuple):
    """Position ``idx`` on an axis belongs to channel ``root_idx`` of the group; torch-pruning reads these names."""

    idx: int
    root_idx: int


@dataclass(eq=False)
class _Member:
    """An axis of one node of the graph, identified by its pruning function; ``channels``: position → channel."""

    node: Any
    handler: Any
    channels: dict[int, int]


def _members(graph: Any, module: nn.Module) -> list[_Member]:
    """Return all axes that share the outputs of ``module``.

    torch-pruning's own walk visits a node again for every new list of positions. If a tensor is split and its parts are
    multiplied, the positions run in circles and off the axis, and the walk does not end. This walk continues only with
    positions that it has not seen before.

    Raises:
        ValueError: positions lie beyond every axis.
    """
    widest = max((axis.length for m in graph.model.modules() for axis in axes(m).values()), default=0)
    root = graph.module2node[module]
    start = [_Place(i, i) for i in range(axis_length(module, "outputs"))]
    members: dict[tuple[Any, Any], _Member] = {}
    stack = [(root, graph.get_pruner_of_module(module).prune_out_channels, start)]
    while stack:
        node, handler, places = stack.pop()
        member = members.setdefault((node, handler), _Member(node, handler, {}))
        new = [place for place in places if place.idx not in member.channels]
        if any(abs(place.idx) > 2 * widest for place in new):  # 2: a concatenation may be wider than its reader
            raise ValueError("it is split into parts that are mixed with each other")
        member.channels.update((place.idx, place.root_idx) for place in new)
        for edge in node.dependencies if new else ():
            if edge.is_triggered_by(handler):
                mapped = new
                for mapping in edge.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                stack.append((edge.target, edge.handler, mapped))
    return [member for member in members.values() if member.channels]


class _Reader:
    """The conversion of torch-pruning's groups to slots."""

    def __init__(self, model: nn.Module, traced: Traced) -> None:
        self.graph, self.names = traced.graph, traced.names
        self.dropped, self.mixing = traced.dropped, traced.mixing
        self.modules = dict(model.named_modules())
        self.tied = tied_parameters(model)
        self.free = {id(p): name for name, p in traced.model.named_parameters()}

    def read(self, members: list[_Member]) -> tuple[list[Slot], str | None]:
        """Return the slots that can be converted and, unless they are the whole group, the reason."""
        slots: list[Slot] = []
        reasons: list[str] = []
        at_end = False
        for member in members:
            module = member.node.module
            if member.node.grad_fn in self.mixing:
                kind, name = self.mixing[member.node.grad_fn]
                reasons.append(f"the {kind} {name!r} does not treat its channels one by one")
            if isinstance(module, nn.Parameter):
                if not self._one_way(name := self.free.get(id(module), "")):
                    reasons.append(f"the free parameter {name!r} shares its channels")
            elif module in self.names:
                axis: AxisName = "outputs"
                if "inputs" in axes(module) and self.graph.is_in_channel_pruning_fn(member.handler):
                    axis = "inputs"
                slot = self._slot(module, axis, member.channels)
                if isinstance(slot, Slot):
                    slots.append(slot)
                elif slot is not None:
                    reasons.append(slot)
            elif type(module).__name__ == "_OutputOp":
                at_end = True
        ends = "its channels are outputs of the model"
        if any(member.node.grad_fn in self.dropped for member in members):
            ends = "its outputs are dropped, or only read where no gradient follows, as by argmax or NumPy"
        if at_end:  # the last reason to give: torch-pruning takes a convolution by a free parameter for one that
            # hands on its channels
            reasons.append(ends)
        if len({len(slot.indices) for slot in slots}) > 1:
            reasons.append("its channels do not map one to one to those of the layers that share them")
        if not any(slot.axis == "inputs" for slot in slots):
            reasons.append(ends)
        return slots, reasons[0] if reasons else None

    def _one_way(self, parameter: str) -> bool:
        """Return whether a free parameter can only lie along channels in one way: :mod:`free_tensors` tries that."""
        owner, _, name = parameter.rpartition(".")
        held = self.modules[owner]._parameters.get(name) if owner in self.modules else None
        usual = held is not None and id(held) not in self.tied and sum(length > 1 for length in held.shape) == 1
        return usual and not isinstance(self.modules[owner], parametrize.ParametrizationList)

    def _slot(self, module: nn.Module, axis: AxisName, channels: dict[int, int]) -> Slot | str | None:
        node, name = module, self.names[module]
        module = self.modules[name]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return None
        if axis not in axes(module) or isinstance(module, nn.MultiheadAttention):
            grouped = isinstance(module, _ConvNd)
            kind = "grouped convolution" if grouped else type(module).__name__
            return f"the {kind} {name!r} does not treat its channels one by one"
        problem = obstacle_to_cutting(module, self.tied)
        if problem is not None:
            return f"{name!r} {problem}"
        rows: dict[int, list[int]] = {}
        for place, root in channels.items():
            rows.setdefault(root, []).append(place)
        length = axis_length(module, axis)
        if len({len(row) for row in rows.values()}) != 1 or not all(0 <= place < length for place in channels):
            return f"its channels do not map one to one to those of {name!r}"
        tensors = tensors_along(module, name, axis)
        indices = torch.tensor([sorted(rows[root]) for root in sorted(rows)])
        return Slot(name, axis, tensors, indices, self._norm(node) if axis == "outputs" else None)

    def _norm(self, module: nn.Module) -> str | None:
        readers = {node.module for node in self.graph.module2node[module].outputs}
        norm = readers.pop() if len(readers) == 1 else None
        return self.names.get(norm) if isinstance(norm, _BatchNorm) else None
