"""Coupled channels as torch-pruning sees them: candidates, none of which is trusted until it is verified.

torch-pruning's dependency graph (Fang et al. 2023, "DepGraph") reads off the autograd graph which layers share
their channels. Its groups are converted to plain data here, or to a reason why that is impossible.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pliant.calling import Inputs, call, map_tensors, quiet, tensors_of
from pliant.errors import first_line
from pliant.structure.attention import is_conv1d, linear_width, projections
from pliant.structure.channel_groups import ChannelGroup, Slot
from pliant.structure.layers import (
    AxisName,
    axes,
    axis_length,
    obstacle,
    tensors_along,
    tied_parameters,
    weighted_layers,
)


def channel_candidates(
    model: nn.Module, inputs: Inputs, calls: Counter[nn.Module]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that torch-pruning proposes and that can be converted, and a reason for each other layer.

    Args:
        model: a copy; all its parameters are set to require a gradient.
        inputs: the inputs to call it on.
        calls: the result of :func:`~pliant.calling.count_calls` on this model.
    """
    model.requires_grad_(True)  # torch-pruning traces along gradients; frozen layers would be invisible
    readable = _readable(model)
    try:
        graph = _dependency_graph(readable, inputs)
    except Exception as error:  # torch-pruning's tracing raises any kind of error
        return [], {name: f"the model cannot be traced: {first_line(error)}" for name, _ in weighted_layers(model)}
    reader = _Reader(model, readable, graph, calls)
    layers = list(weighted_layers(readable))
    attentions = [name for name, module in readable.named_modules() if _is_opaque(module)]
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    seen: set[str] = set()
    taken: set[tuple[str, AxisName, int]] = set()
    for name, module in layers:
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
        hidden = hidden or "is not reached by the gradient of the outputs"
        reasons.setdefault(name, obstacle(module, reader.tied) or hidden)
    return groups, reasons


def _readable(model: nn.Module) -> nn.Module:
    """Return ``model``, or a copy in which layers that torch-pruning does not know are linear ones."""
    if not any(is_conv1d(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    linear: dict[nn.Module, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_conv1d(module):
            rows, columns = (axis_length(module, axis) for axis in ("outputs", "inputs"))
            if module not in linear:
                linear[module] = nn.Linear(columns, rows).to(module.weight)
            model.set_submodule(name, linear[module])
    return model


def _dependency_graph(model: nn.Module, inputs: Inputs) -> Any:
    import torch_pruning  # its import takes a second, and only this function needs it

    def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
        return [x for x in call(model, inputs) if x.requires_grad]

    handles = [m.register_forward_hook(_hide, with_kwargs=True) for m in model.modules() if _is_opaque(m)]
    try:
        with quiet(), torch.enable_grad(), torch.random.fork_rng([]):
            return torch_pruning.DependencyGraph().build_dependency(model, inputs, outputs, verbose=False)
    finally:
        for handle in handles:
            handle.remove()


def _is_opaque(module: nn.Module) -> bool:
    """Return whether the graph should not look inside: torch-pruning misreads the many reshapes of attention.

    Only heads can leave attention, and those are found without the graph. The graph does look into a module that holds
    more layers than the projections and the output, such as a whole block.
    """
    attention = projections(module)
    if attention is None or isinstance(module, nn.MultiheadAttention):
        return False
    return sum(1 for _ in weighted_layers(module)) <= len({attention.query, attention.key, attention.value}) + 1


class _Opaque(torch.autograd.Function):
    """A function that shows the graph which tensors a result depends on, but not how."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()


def _hide(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
    opaque: Any = _Opaque.apply
    sources = [x for x in tensors_of((args, kwargs)) if x.requires_grad]
    return map_tensors(lambda x: opaque(x.detach(), *sources), result)


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

    def __init__(self, model: nn.Module, readable: nn.Module, graph: Any, calls: Counter[nn.Module]) -> None:
        self.graph, self.calls = graph, calls
        self.names = {module: name for name, module in readable.named_modules()}
        self.modules = dict(model.named_modules())
        self.tied = tied_parameters(model)
        self.free = {id(p): name for name, p in readable.named_parameters()}

    def read(self, members: list[_Member]) -> tuple[list[Slot], str | None]:
        """Return the slots that can be converted and, unless they are the whole group, the reason."""
        slots: list[Slot] = []
        reasons: list[str] = []
        at_end = False
        for member in members:
            module = member.node.module
            if isinstance(module, nn.Parameter):
                reasons.append(f"the free parameter {self.free.get(id(module))!r} shares its channels")
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
        if at_end:  # the last reason to give: torch-pruning takes a convolution by a free parameter for one that
            # hands on its channels
            reasons.append("its channels are outputs of the model")
        if len({len(slot.indices) for slot in slots}) > 1:
            reasons.append("its channels do not map one to one to those of the layers that share them")
        if not any(slot.axis == "inputs" for slot in slots):
            reasons.append("its channels are outputs of the model")
        return slots, reasons[0] if reasons else None

    def _slot(self, module: nn.Module, axis: AxisName, channels: dict[int, int]) -> Slot | str | None:
        node, name = module, self.names[module]
        module = self.modules[name]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return None
        if axis not in axes(module) or isinstance(module, nn.MultiheadAttention):
            grouped = isinstance(module, _ConvNd)
            kind = "grouped convolution" if grouped else type(module).__name__
            return f"the {kind} {name!r} does not treat its channels one by one"
        problem = obstacle(module, self.tied)
        if problem is None and self.calls[module] != 1:
            problem = f"is called {self.calls[module]} times"
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
