"""Coupled channels as candidates, none of which is trusted until it is verified.

A forward pass tells which channels can only leave together: :mod:`flow`. Such a class may own several positions of a
layer, as gate and value do. Classes that lie in the same places, with as many positions in each, form a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from pliant.calling import Inputs
from pliant.errors import first_line
from pliant.structure.attention import linear_width, projections
from pliant.structure.channel_groups import ChannelGroup, Slot
from pliant.structure.flow import flow
from pliant.structure.labelled import Labelled
from pliant.structure.layers import AxisName, obstacle_to_cutting, tensors_along, tied_parameters, weighted_layers

Place = tuple[str, AxisName]
Kind = frozenset[tuple[Place, int]]
"""(place, number of positions) for all places of a class."""


def channel_candidates(
    model: nn.Module, inputs: Inputs, training: Sequence[tuple[Inputs, int]] = (), split: str = ""
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups of channels that may leave together, and a reason for each other layer.

    Args:
        model: the model in eval mode; not changed.
        inputs: the inputs to call it on.
        training: inputs and draws for training mode, if it calls more than eval mode.
        split: as for :class:`~pliant.structure.labelled.Labelled`.
    """
    layers = dict(weighted_layers(model))
    try:
        known = flow(model, inputs, training, split)
    except Exception as error:  # a user's forward may raise anything
        return [], dict.fromkeys(layers, f"the model cannot be traced: {first_line(error)}")
    made = [name for name in known.made if name in layers]
    classes = _Classes(known)
    while any(_tied(known, classes, name) for name in made):
        classes = _Classes(known)
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    seen: set[int] = set()
    for name in made:
        found = classes.of(name)
        whys = [classes.obstacle(roots, alone=len(known.made[name]) == 1) for roots in found]
        free = [roots for roots, why in zip(found, whys, strict=True) if why is None]
        if not free:
            reasons[name] = next(why for why in whys if why is not None)
            continue
        roots = max(free, key=len)  # the others stay
        if roots[0] in seen:
            continue
        seen.update(roots)
        slots = classes.slots(model, roots)
        producers = [slot for slot in slots if slot.axis == "outputs"]
        first = next(slot for slot in producers if slot.module in layers)
        producers = [first, *(slot for slot in producers if slot is not first)]  # not an embedding, say
        if first.module != name:  # of that layer, another part leaves
            reasons[name] = "shares only some of its channels with other layers"
            continue
        linear = all(linear_width(model.get_submodule(slot.module)) is not None for slot in producers)
        kind = "neurons" if linear else "channels"
        attention = classes.attention(roots)
        if attention:
            kind, producers = "heads", [*_counters(model, attention, len(roots)), *producers]
        consumers = tuple(slot for slot in slots if slot.axis == "inputs")
        groups.append(ChannelGroup(len(roots), tuple(producers), consumers, kind))
    tied = tied_parameters(model)
    for name, module in layers.items():
        hidden = "is used in a way that is not known" if name in known.called else "is not reached through its forward"
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            hidden = "belongs to attention, of which only heads can leave"
        reasons.setdefault(name, obstacle_to_cutting(module, tied) or hidden)
    return groups, reasons


class _Classes:
    """The classes of channels that can only leave together, each by its first channel, the *root*."""

    def __init__(self, known: Labelled) -> None:
        self.known = known
        self.fixed = known.labels.by_root(known.labels.fixed)
        self.causes = known.labels.by_root(known.labels.causes)
        self.places: dict[int, dict[Place, list[int]]] = {}  # root → place → positions
        self.roots: dict[str, list[int]] = {}  # layer → the root of each of its channels
        for axis, labels in (("outputs", known.made), ("inputs", known.read)):
            for name, own in labels.items():
                roots = known.labels.roots(own)
                if axis == "outputs":
                    self.roots[name] = roots
                for position, root in enumerate(roots):
                    if root >= 0:
                        self.places.setdefault(root, {}).setdefault((name, axis), []).append(position)
        self.kinds: dict[int, Kind] = {
            root: frozenset((place, len(positions)) for place, positions in places.items())
            for root, places in self.places.items()
        }

    def of(self, name: str) -> list[list[int]]:
        """Return the roots of a layer's channels, those of one kind together."""
        found: dict[Kind, dict[int, None]] = {}
        for root in self.roots[name]:
            found.setdefault(self.kinds[root], {})[root] = None
        return [list(roots) for roots in found.values()]

    def obstacle(self, roots: Sequence[int], *, alone: bool) -> str | None:
        """Return why the classes of one kind cannot leave, or None.

        Args:
            roots: the classes.
            alone: whether their layer has no other channels.
        """
        why = next((self.fixed[root] for root in roots if root in self.fixed), None)
        if why is None and not any(axis == "inputs" for _, axis in self.places[roots[0]]):
            why = "its outputs are dropped, or only read by argmax or NumPy"
        if why is None and len(roots) == 1:
            why = "has a single channel" if alone else self.causes.get(roots[0], "all its channels leave together")
        return why

    def attention(self, roots: Sequence[int]) -> list[str]:
        """Return the names of the modules whose attention reads some classes."""
        wanted = set(roots)
        found = (module for label, module in self.known.labels.attended if self.known.labels.root(label) in wanted)
        return list(dict.fromkeys(found))

    def slots(self, model: nn.Module, roots: Sequence[int]) -> list[Slot]:
        """Return the slots of a group of classes."""
        return [
            Slot(
                name,
                axis,
                tensors_along(model.get_submodule(name), name, axis),
                torch.tensor([self.places[root][name, axis] for root in roots]),
                self.known.norms.get(name) if axis == "outputs" else None,
            )
            for name, axis in self.places[roots[0]]
        ]


def _counters(model: nn.Module, names: Sequence[str], heads: int) -> list[Slot]:
    """Return slots without tensors of the attention modules that count as many heads.

    They come before the projections, by which such a module is recognised when it is cut.
    """
    found = [name for name in names if (known := projections(model.get_submodule(name))) and known.heads == heads]
    return [Slot(name, "outputs", (), torch.arange(heads).unsqueeze(1)) for name in found]


def _tied(known: Labelled, classes: _Classes, name: str) -> bool:
    """Couple the equal parts of a layer's channels that go different ways; return whether there were any.

    A forward that cuts a tensor in parts finds them by their number, or by the size of the layer that reads them.
    """
    own, kinds = known.made[name], [classes.kinds[root] for root in classes.roots[name]]
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(kinds), 1) if a != b), len(kinds)]
    lengths = {b - a for a, b in pairwise(starts)}
    equal = len(starts) > 2 and len(lengths) == 1 and lengths != {1}
    return equal and known.labels.join(own.view(len(starts) - 1, -1), own[: starts[1]])
