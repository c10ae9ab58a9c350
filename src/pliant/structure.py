"""Coupled channels: what has to leave a network together with a filter, and the proof that it may.

Removing output channel ``c`` of a convolution also removes its bias, the scale, shift and statistics of the
BatchNorm behind it, the same channel of every convolution that a residual connection adds to it (the
*producers*), and the input columns of every layer that reads it (the *consumers*). A :class:`ChannelGroup`
says this for all channels of one such set of layers, as plain data::

    coupled_channels(model, example_inputs) -> Structure(groups, refused)

Which layers are coupled is read off the autograd graph by torch-pruning's dependency graph (Fang et al. 2023,
"DepGraph"). It is a heuristic, so nothing of it is believed: every group is tried on a copy of the model in
float64 with random weights and BatchNorm statistics. Without half of the channels, the small network must equal
its *masked twin*, the network of the old shape in which only the consumers' input columns are zero. (A zeroed
filter is no twin: the BatchNorm shift behind it still flows.) What fails is refused by name with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from pliant.layers import (
    AxisName,
    as_inputs,
    axes,
    axis_length,
    complement,
    count_calls,
    keep_channels,
    largest_sound,
    line,
    named_layers,
    obstacle,
    run,
    tied_parameters,
    zero_channels,
)

_TOLERANCE = 1e-8  # relative; float64 networks of a hundred layers agree to about 1e-13


@dataclass(frozen=True, eq=False)
class Slot:
    """The part of one axis of one layer that belongs to a channel group.

    ``indices`` is an int64 tensor of shape (channels, width): row ``c`` holds the positions on the axis that
    belong to channel ``c``. The width is 1, or H·W where a linear layer reads a flattened image. ``tensors``
    are the (state_dict name, dim) pairs that lie along the axis. ``norm`` names the BatchNorm that alone reads
    this layer's output, if there is one.
    """

    module: str
    axis: AxisName
    tensors: tuple[tuple[str, int], ...]
    indices: Tensor
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """``channels`` channels that can be removed one by one, each from all ``producers`` and ``consumers``."""

    channels: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]

    @property
    def name(self) -> str:
        """The first producer's name."""
        return self.producers[0].module


@dataclass(frozen=True, eq=False)
class Structure:
    """All verified groups of a model, and every other convolution and linear layer with the reason."""

    groups: tuple[ChannelGroup, ...]
    refused: tuple[tuple[str, str], ...]


def coupled_channels(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Structure:
    """Find and verify the groups of channels that can be removed from ``model``.

    ``example_inputs``: a tensor, or the tuple of tensors, that ``model(*example_inputs)`` accepts in eval mode.
    The model, its gradients and the random number generators are left as they are. A model that cannot be
    traced gives no groups and a reason per layer.

    Raises BadInput if the model cannot be called with the example.
    """
    inputs = as_inputs(example_inputs)
    probe = copy.deepcopy(model).eval()
    calls = count_calls(probe, inputs)
    names = {module: name for name, module in probe.named_modules()}
    reasons = {name: "is not reached through its forward" for name, m in named_layers(probe) if not calls[m]}
    inputs = _first_two(probe, inputs)
    candidates, found = _candidates(probe, inputs, calls, names)
    reasons.update({name: why for name, why in found.items() if name not in reasons})
    accepted: list[ChannelGroup] = []
    if candidates:
        _randomise(probe)
        trial = tuple(_random_like(x) for x in inputs)
        accepted, failed = largest_sound(candidates, lambda groups: _fault(probe, groups, trial))
        for group, why in failed:
            reasons.update({slot.module: why for slot in group.producers})
    removable = {slot.module for group in accepted for slot in group.producers}
    refused = ((name, reasons[name]) for name, _ in named_layers(probe) if name not in removable)
    return Structure(tuple(accepted), tuple(refused))


# --- from torch-pruning's graph to our own data -------------------------------------------------------------


def _candidates(
    model: nn.Module, inputs: tuple[Tensor, ...], calls: Counter[nn.Module], names: Mapping[nn.Module, str]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that torch-pruning proposes and we can read, and a reason for each other layer."""
    layers = list(named_layers(model))
    try:
        graph = _dependency_graph(model, inputs)
    except Exception as error:  # torch-pruning raises whatever its tracing trips over
        return [], {name: f"the model cannot be traced: {line(error)}" for name, _ in layers}
    reader = _Reader(model, graph, calls, names)
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    seen: set[str] = set()
    taken: set[tuple[str, AxisName, int]] = set()
    for name, module in layers:
        if name in seen or module not in graph.module2node:
            continue
        if "inputs" not in axes(module):  # a depthwise convolution belongs to the group of its input
            reasons[name] = "is a grouped convolution: its channels are tied to their places"
            continue
        remove_outputs = graph.get_pruner_of_module(module).prune_out_channels
        try:
            with _quiet():
                members = graph.get_pruning_group(module, remove_outputs, range(axis_length(module, "outputs")))
        except Exception as error:  # see above
            reasons[name] = f"the layers that share its channels are not known: {line(error)}"
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
            groups.append(ChannelGroup(len(producers[0].indices), producers, consumers))
        else:
            reasons.update(dict.fromkeys([name, *(slot.module for slot in producers)], reason))
    for name, module in layers:
        reasons.setdefault(name, obstacle(module, reader.tied) or "is not reached by the gradient of the outputs")
    return groups, reasons


def _dependency_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import torch_pruning  # its import takes a second, and only this function needs it

    model.requires_grad_(True)  # it traces along gradients; frozen layers would be invisible
    with _quiet(), torch.enable_grad(), torch.random.fork_rng([]):
        return torch_pruning.DependencyGraph().build_dependency(model, inputs, verbose=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


class _Reader:
    """Reads one of torch-pruning's groups as our slots."""

    def __init__(self, model: nn.Module, graph: Any, calls: Counter[nn.Module], names: Mapping[nn.Module, str]) -> None:
        self.graph, self.calls, self.names = graph, calls, names
        self.tied = tied_parameters(model)
        self.free = {id(p): name for name, p in model.named_parameters()}

    def read(self, members: Any) -> tuple[list[Slot], str | None]:
        """Return the slots that could be read and, unless they are the whole group, the reason."""
        slots: list[Slot] = []
        reasons: list[str] = []
        for member in members:
            module = member.dep.target.module
            if isinstance(module, nn.Parameter):
                reasons.append(f"the free parameter {self.free.get(id(module))!r} shares its channels")
            elif module in self.names:
                axis: AxisName = "outputs"
                if "inputs" in axes(module) and self.graph.is_in_channel_pruning_fn(member.dep.handler):
                    axis = "inputs"
                slot = self._slot(module, axis, member.root_idxs, member.idxs)
                if isinstance(slot, Slot):
                    slots.append(slot)
                elif slot is not None:
                    reasons.append(slot)
            elif type(module).__name__ == "_OutputOp":
                reasons.append("its channels are outputs of the model")
        if len({len(slot.indices) for slot in slots}) > 1:
            reasons.append("its channels do not map one to one to those of the layers that share them")
        if not any(slot.axis == "inputs" for slot in slots):
            reasons.append("its channels are outputs of the model")
        return slots, reasons[0] if reasons else None

    def _slot(self, module: nn.Module, axis: AxisName, roots: list[int], places: list[int]) -> Slot | str | None:
        name = self.names[module]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return None
        if not axes(module):
            grouped = isinstance(module, _ConvNd)
            kind = "grouped convolution" if grouped else type(module).__name__
            return f"the {kind} {name!r} does not treat its channels one by one"
        problem = obstacle(module, self.tied)
        if problem is None and self.calls[module] != 1:
            problem = f"is called {self.calls[module]} times"
        if problem is not None:
            return f"{name!r} {problem}"
        rows: dict[int, list[int]] = {}
        for root, place in zip(roots, places, strict=True):
            rows.setdefault(root, []).append(place)
        length = axis_length(module, axis)
        if len({len(row) for row in rows.values()}) != 1 or not all(0 <= place < length for place in places):
            return f"its channels do not map one to one to those of {name!r}"
        held = {**module._parameters, **module._buffers}
        prefix = f"{name}." if name else ""
        tensors = tuple((prefix + t, dim) for t, dim in axes(module)[axis].tensors if held.get(t) is not None)
        indices = torch.tensor([sorted(rows[root]) for root in sorted(rows)])
        return Slot(name, axis, tensors, indices, self._norm(module) if axis == "outputs" else None)

    def _norm(self, module: nn.Module) -> str | None:
        readers = {node.module for node in self.graph.module2node[module].outputs}
        norm = readers.pop() if len(readers) == 1 else None
        return self.names.get(norm) if isinstance(norm, _BatchNorm) else None


# --- verification -----------------------------------------------------------------------------------------


def _first_two(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch of two, where the model takes it: two images prove as much as two hundred."""
    if any(x.dim() == 0 or len(x) <= 2 or len(x) != len(inputs[0]) for x in inputs):
        return inputs
    few = tuple(x[:2] for x in inputs)
    try:
        run(model, few)
    except Exception:  # dim 0 is not a batch, or its size is fixed: the whole example is known to run
        return inputs
    return few


def _random_like(x: Tensor) -> Tensor:
    """Return normal float64 noise for a floating-point input; indices and masks stay as they are."""
    if not x.is_floating_point():
        return x
    noise = torch.empty(x.shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1))
    return noise.to(x.device)


def _randomise(model: nn.Module) -> None:
    """Turn ``model`` to float64 and draw its known layers anew, in place.

    Trained weights may be sparse, and a mistake among zeros would not show.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).normal_(0.0, std, generator=generator))

    def positive(t: Tensor) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).uniform_(0.5, 1.5, generator=generator))

    model.double()
    with torch.no_grad():
        for module in model.modules():
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if isinstance(module, (nn.Linear, _ConvNd)):
                if weight is not None:  # None where a parametrisation computes it
                    normal(weight, (2.0 / max(1, weight[0].numel())) ** 0.5)
                if bias is not None:
                    normal(bias, 0.1)
            elif isinstance(module, _NormBase):
                for scale in (weight, module.running_var):
                    if scale is not None:
                        positive(scale)
                for shift in (bias, module.running_mean):
                    if shift is not None:
                        normal(shift, 0.5)


def _fault(model: nn.Module, groups: Sequence[ChannelGroup], inputs: tuple[Tensor, ...]) -> str | None:
    """Remove half of the channels of ``groups`` from a copy; None if that equals the masked twin."""
    generator = torch.Generator().manual_seed(2)
    gone: dict[tuple[str, AxisName], list[Tensor]] = {}
    for group in groups:
        half = torch.randperm(group.channels, generator=generator)[: group.channels // 2]
        for slot in (*group.producers, *group.consumers):
            gone.setdefault((slot.module, slot.axis), []).append(slot.indices[half].flatten())
    removed = {place: torch.cat(parts) for place, parts in gone.items()}
    twin = copy.deepcopy(model)
    for (name, axis), positions in removed.items():
        if axis == "inputs":
            zero_channels(twin.get_submodule(name), axis, positions)
    try:
        expected = run(twin, inputs)
    except Exception as error:  # whatever a user's forward may raise
        return f"cannot be verified, the network does not run in float64: {line(error)}"
    try:
        for (name, axis), positions in removed.items():
            module = twin.get_submodule(name)
            keep_channels(module, axis, complement(module, axis, positions))
        got = run(twin, inputs)
    except Exception as error:  # see above
        return f"the network cannot run without some of its channels: {line(error)}"
    return _difference(got, expected)


def _difference(got: list[Tensor], expected: list[Tensor]) -> str | None:
    if [x.shape for x in got] != [x.shape for x in expected]:
        return "its channels are outputs of the model"
    if not any(x.is_floating_point() for x in expected):
        return "the model has no floating-point output to check the removal on"
    for x, y in zip(got, expected, strict=True):
        if x.is_floating_point() and y.numel():
            error, scale = (x - y).abs().max(), y.abs().max()
            if not error <= _TOLERANCE * scale:  # written so that NaN fails
                return f"without it the network differs from its masked twin (by {error / scale:.0e})"
    return None
