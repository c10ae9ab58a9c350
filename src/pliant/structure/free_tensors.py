"""Tensors along channels that belong to no known layer, as further slots of a group.

Statistics of a frozen norm, a learnt scale of shape (1, C, 1, 1), a bias per head: any module may hold them, as
parameters or buffers, and no graph shows all. So a network without half of a group's channels is run, on a copy. Where
an operation fails on a tensor that still has all channels, this one is cut along as well, and the module tries again.
The proof has to decide whether what is found that way is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pliant.calling import duplicate
from pliant.structure.channel_groups import ChannelGroup, Slot
from pliant.structure.counts import first_count, positions
from pliant.structure.layers import (
    AxisName,
    complement,
    counting_axes,
    free_axes,
    keep_channels,
    tensors_along,
    tied_parameters,
)
from pliant.structure.proof import Proof

Place = tuple[str, AxisName]
_MOST = 4  # integers to try alone


def with_free_tensors(proof: Proof, group: ChannelGroup) -> ChannelGroup:
    """Return a group with a slot for each further tensor that has to be cut along for the network to run.

    Args:
        proof: the proof; the tensors that are found get other values in its model, as ones and zeros prove little.
        group: the group.
    """
    places = _candidates(proof.model, group)
    if not places or proof.problem is not None:
        return group
    generator = torch.Generator().manual_seed(2)
    gone = torch.randperm(group.channels, generator=generator)[: group.channels - first_count(group)]
    runs, found = _found(proof, group, places, gone)
    if not runs and group.channels - len(gone) == 1:
        _, found = _found(proof, group, places, gone, repeats=group.channels)
    slots = []
    for (name, axis), module in places.items():
        if (name, axis) in found:
            _shake(module, axis)
            indices = torch.arange(group.channels).unsqueeze(1)
            slots.append(Slot(name, axis, tensors_along(module, name, axis), indices))
    return dataclasses.replace(group, others=tuple(slots)) if slots else group


def with_counts_held(model: nn.Module, group: ChannelGroup) -> list[ChannelGroup]:
    """Return a group with integers that may count its channels: all that fit, and each of them alone.

    A forward may take sizes from an attribute of its module, as in ``x.split(self.width, 1)``. These are modules in
    which layers of the group lie.

    Args:
        model: the model.
        group: the group.
    """
    widths = {1, *(slot.indices.shape[1] for slot in group.producers)}
    above = {module for slot in group.slots for module in _ancestors(slot.module)}
    slots = [
        Slot(name, axis, (), torch.arange(found.length).view(group.channels, -1))
        for name in sorted(above)
        for axis, found in counting_axes(model.get_submodule(name)).items()
        if found.length in {group.channels * width for width in widths}
    ]
    chosen = [slots, *([slot] for slot in slots[:_MOST])] if len(slots) > 1 else [slots] if slots else []
    return [dataclasses.replace(group, others=(*group.others, *some)) for some in chosen]


def _ancestors(name: str) -> list[str]:
    """Return the names of all modules around a module, the network's own is empty."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def _found(
    proof: Proof, group: ChannelGroup, places: Mapping[Place, Any], gone: Tensor, repeats: int | None = None
) -> tuple[bool, set[Place]]:
    """Return whether the network runs without some channels, and the places that were cut until it did."""
    small = duplicate(proof.model)
    repair = _Repair(small, places, gone, repeats)
    try:
        for (name, axis), lost in positions([group], [gone]).items():
            module = small.get_submodule(name)
            keep_channels(module, axis, complement(module, axis, lost))
        with repair:
            proof.attempt(small)
    except Exception:  # a user's forward may raise anything; the proof finds the reason
        return False, repair.found
    return True, repair.found


def _candidates(model: nn.Module, group: ChannelGroup) -> dict[Place, nn.Module]:
    """Return the places that may belong to a group, each with its module: as long as it has channels, in one way."""
    tied = tied_parameters(model)
    known = {(slot.module, slot.axis) for slot in group.slots}
    places: dict[Place, nn.Module] = {}
    for name, module in model.named_modules():
        fitting = {axis: found for axis, found in free_axes(module).items() if found.length == group.channels}
        tensors = [tensor for found in fitting.values() for tensor, _ in found.tensors]
        for axis, found in fitting.items():
            ((tensor, _),) = found.tensors
            shared = id(getattr(module, tensor)) in tied
            if tensors.count(tensor) == 1 and not shared and (name, axis) not in known:
                places[name, axis] = module
    return places


def _shake(module: nn.Module, axis: AxisName) -> None:
    """Multiply a tensor of a float64 model by noise, in place, and add some where it is zero; it keeps its signs."""
    ((tensor, _),) = free_axes(module)[axis].tensors
    held: Tensor = getattr(module, tensor)
    generator = torch.Generator().manual_seed(3)
    noise = torch.empty(held.shape, dtype=torch.float64).uniform_(0.7, 1.3, generator=generator).to(held.device)
    held.data = torch.where(held == 0, noise - 0.5, held.detach() * noise).to(held.dtype)


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    """Return a model, a module in it, and all between."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]


class _Repair(TorchFunctionMode):
    """A context in which modules that fail on tensors of full length get shorter ones, and try again.

    Args:
        model: a network that may be changed.
        places: the places that may be cut.
        gone: int64 (n,), the positions that leave there.
        repeats: the number of positions, if one stays and an operation has to fail that repeats it; else None.

    Attributes:
        found: the places that were cut.
    """

    def __init__(self, model: nn.Module, places: Mapping[Place, Any], gone: Tensor, repeats: int | None) -> None:
        super().__init__()
        self.model, self.gone, self.repeats = model, gone, repeats
        self.places = set(places)
        self.found: set[Place] = set()
        self._sources: dict[
            int, frozenset[Place]
        ] = {}  # id of a tensor → the places that it is computed from and from no other numbers
        self._alive: list[Tensor] = []  # their ids stay theirs
        self._blamed: frozenset[Place] = frozenset()
        for place in places:
            self._note(self._tensor(place), frozenset([place]))
        for module in {part for name, _ in places for part in _path(model, name)}:
            module.forward = partial(self._retried, module.forward)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dtype.is_floating_point]
        known = [self._sources[id(x)] for x in tensors if id(x) in self._sources]
        sources = frozenset[Place]().union(*known)
        try:
            result = func(*args, **(kwargs or {}))
            if self.repeats and sources and self._repeated(tensors):
                raise ValueError("a tensor of all channels is combined with a single one")
        except Exception:
            self._blamed |= sources
            raise
        if known and len(known) == len(tensors):
            for x in pytree.tree_leaves(result):
                if isinstance(x, Tensor):
                    self._note(x, sources)
        return result

    def _repeated(self, tensors: list[Tensor]) -> bool:
        """Return whether a tensor of all channels, of the places alone, meets another one that has only one there."""
        for whole in (x for x in tensors if self._sources.get(id(x))):
            for other in (x for x in tensors if id(x) not in self._sources):
                pairs = zip(reversed(whole.shape), reversed(other.shape), strict=False)
                if any(n == self.repeats and single == 1 for n, single in pairs):
                    return True
        return False

    def _retried(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        while True:
            before = len(self.found)
            try:
                return forward(*args, **kwargs)
            except Exception:  # a user's forward may raise anything
                self._cut()
                if len(self.found) == before:
                    raise

    def _cut(self) -> None:
        """Cut what the last failure is blamed on, and what a module without others in it holds besides."""
        for name, axis in self._blamed - self.found:
            alone = not any(True for _ in self.model.get_submodule(name).children())
            besides = {place for place in self.places - self.found if place[0] == name}
            for place in besides if alone else {(name, axis)} - self.found:
                self.found.add(place)
                module = self.model.get_submodule(place[0])
                keep_channels(module, place[1], complement(module, place[1], self.gone))
                self._note(self._tensor(place), frozenset())
        self._blamed = frozenset()

    def _tensor(self, place: Place) -> Tensor:
        name, axis = place
        tensor: Tensor = getattr(self.model.get_submodule(name), axis.rpartition(".")[0])
        return tensor

    def _note(self, tensor: Tensor, sources: frozenset[Place]) -> None:
        self._sources[id(tensor)] = sources
        self._alive.append(tensor)
