"""All sizes of one network as plain data: in which order channels leave, and how many at each size.

A :class:`Path` holds what planning for any size needs, without data and without analysis. Its sizes are numbered by
*steps*: 0 is the dense network, and every further step removes some channels more. So a smaller size keeps a part of
what a larger one keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.compression.base import Analysis, Compressor, parameter_shapes, with_options
from pliant.compression.fields import Fields, fields_of, pair_of
from pliant.compression.filters import Channels, FilterPruning
from pliant.compression.heads import HeadPruning
from pliant.compression.plan import Plan
from pliant.compression.removals import Removals, Shrinking, Size, Step
from pliant.errors import BadInput, DamagedFile, shown
from pliant.structure import ChannelGroup, Slot, axis_length, axis_of, complement, positions, tensors_along

KINDS: dict[str, type[FilterPruning]] = {"FilterPruning": FilterPruning, "HeadPruning": HeadPruning}
COMPRESSORS = (*KINDS, "LowRank")
"""The compressors that have a path, this one or that of ``rank_path``."""
C = TypeVar("C", bound=Compressor[Any])
MOST = 1 - 2**-30  # the ratio of a plan is below 1


@dataclass(frozen=True, eq=False)
class Path:
    """The sizes of one network.

    Args:
        model: a network of the dense architecture, with any weights; not changed.
        compressor: how channels leave.
        refused: (layer, reason) for each layer that is left alone.
        applied: weight name → how often it is applied in a forward pass.
        groups: the groups that lose channels.
        orders: for each group, its channels, the one that leaves first first.
        starts: how many of the steps are the removals that the controls ask for in any case: no size ends among them.
        steps: the removals, in order.
    """

    model: nn.Module
    compressor: FilterPruning
    refused: tuple[tuple[str, str], ...]
    applied: Mapping[str, int]
    groups: tuple[ChannelGroup, ...]
    orders: tuple[Tensor, ...]
    starts: int
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, model: nn.Module, compressor: FilterPruning, analysis: Channels) -> Path:
        """Return the sizes that a compressor can give a network."""
        removals: Removals
        removals, refused = compressor.path(model, analysis)
        starts = [(g, count) for g, count in enumerate(removals.starts) if count]
        measured = {"auto": "l2" if analysis.curves is None else "loss"}
        options = compressor.plan_options()
        options |= {"ratio": 0.0, "importance": measured.get(compressor.importance, compressor.importance)}
        kind = with_options(type(compressor), options)
        steps = (*starts, *removals.steps)
        return cls(model, kind, refused, analysis.applied, removals.groups, removals.orders, len(starts), steps)

    @property
    def counts_macs(self) -> bool:
        """Whether :meth:`macs_removed` counts all that goes: the products of attention are not those of weights."""
        return all(group.kind != "heads" for group in self.groups)

    @cached_property
    def sizes(self) -> list[int]:
        """The numbers of steps at which a size ends, ascending."""
        return ends(self.starts, self.steps)

    @cached_property
    def params(self) -> list[int]:
        """The number of parameters after 0, 1, ... steps."""
        state = Shrinking(Size(self.model, self.groups), {})
        left, removed, total = [], [0] * len(self.groups), state.total
        for g, stop in self.steps:
            left.append(total - state.remove(g, stop - removed[g]))
            removed[g] = stop
        dense = measuring.parameters(self.model)
        return [dense, *(dense - gone for gone in left)]

    @cached_property
    def places(self) -> list[float]:
        """Where the network after 0, 1, ... steps lies between others: how many parameters have gone."""
        return [float(self.params[0] - params) for params in self.params]

    def counts(self, step: int) -> list[int]:
        """Return how many channels each group has lost after so many steps."""
        return latest(self.steps[:step], len(self.groups))

    def macs_removed(self, step: int) -> int:
        """Return how many multiply-accumulates of weights have gone after so many steps, over the whole example."""
        costs = self._macs
        return costs.after({}) - costs.after(dict(enumerate(self.counts(step))))

    @cached_property
    def _macs(self) -> Size:
        return Size(self.model, self.groups, self.applied)

    def plan(self, step: int) -> Plan:
        """Return the plan of the size after so many steps."""
        counts = self.counts(step)
        costs = Size(self.model, self.groups) if self.compressor.cost == "params" else self._macs
        gone = costs.after({}) - costs.after(dict(enumerate(counts)))
        ratio = min(gone / max(1, sum(costs.compressible.values())), MOST)
        known = Analysis(parameter_shapes(self.model), self.refused)
        planner = self.compressor.at(ratio)
        return planner.plan_counts(self.model, known, self.groups, self.orders, counts, costs)

    def kept(self, step: int) -> dict[str, dict[int, Tensor]]:
        """Return tensor name → dim → the positions of it that are kept after so many steps, int64, ascending."""
        if step not in self._kept:
            gone = [order[:count] for order, count in zip(self.orders, self.counts(step), strict=True)]
            kept: dict[str, dict[int, Tensor]] = {}
            for (name, axis), lost in positions(self.groups, gone).items():
                module = self._layers[name]
                if len(lost):
                    stays = complement(module, axis, lost)
                    for tensor, dim in tensors_along(module, name, axis):
                        kept.setdefault(tensor, {})[dim] = stays
            self._kept[step] = kept
        return self._kept[step]

    def balance(self, step: int) -> dict[str, Tensor]:
        """Return tensor name → by how much entries count more than others in a correction; none do."""
        return {}

    @cached_property
    def _kept(self) -> dict[int, dict[str, dict[int, Tensor]]]:
        return {}

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def template(self) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and types of :meth:`base`."""
        return self.base(self.model)

    def base(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that all sizes begin with: those of the dense network ``model``."""
        return dict(model.state_dict())

    def cut(self, model: nn.Module, step: int, base: Mapping[str, Tensor]) -> nn.Module:
        """Return the network of a size without any corrections.

        Args:
            model: the dense network with its weights; not changed.
            step: its number of steps.
            base: the tensors that :meth:`base` returns for it.
        """
        return self.compressor.apply(model, self.plan(step))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the path: none."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return the path as plain data for JSON, without the model."""
        return {
            "compressor": type(self.compressor).__name__,
            "options": self.compressor.plan_options(),
            "parameters": measuring.parameters(self.model),
            "refused": [list(pair) for pair in self.refused],
            "applied": dict(self.applied),
            "groups": [
                {
                    "channels": group.channels,
                    "kind": group.kind,
                    "producers": [_describe(slot) for slot in group.producers],
                    "consumers": [_describe(slot) for slot in group.consumers],
                    **({"others": [_describe(slot) for slot in group.others]} if group.others else {}),
                    "order": order.tolist(),
                }
                for group, order in zip(self.groups, self.orders, strict=True)
            ],
            "starts": self.starts,
            "steps": [list(step) for step in self.steps],
        }

    @classmethod
    def from_fields(cls, fields: Fields, model: nn.Module) -> Path:
        """Return the path that :meth:`to_dict` described.

        Args:
            fields: the fields, of which those of the path are taken.
            model: a network of the dense architecture.

        Raises:
            DamagedFile: a field is not what it should be.
            BadInput: the path is for another model.
        """
        compressor = compressor_from(fields, KINDS, model)
        if compressor.mode != "remove":
            raise DamagedFile(f"{fields.where}.options.mode should be 'remove', not {shown(compressor.mode)}")
        applied = fields.mapping("applied")
        if not all(type(times) is int and times >= 0 for times in applied.values()):
            raise DamagedFile(f"{fields.where}.applied should hold counts")
        refused = tuple(pair_of(x, f"{fields.where}.refused") for x in fields.items("refused"))
        reader = _GroupReader(model)
        read = [reader.read(x, f"{fields.where}.groups[{i}]") for i, x in enumerate(fields.items("groups"))]
        groups, orders = tuple(group for group, _ in read), tuple(order for _, order in read)
        starts, steps = _steps(fields, groups)
        return cls(model, compressor, refused, applied, groups, orders, starts, steps)


def _describe(slot: Slot) -> dict[str, Any]:
    """Return a slot as plain data; positions in a row are described by the first one and the width."""
    channels, width = slot.indices.shape
    first = int(slot.indices[0, 0])
    places = {"module": slot.module, "axis": slot.axis, "width": width}
    if torch.equal(slot.indices.flatten(), torch.arange(first, first + channels * width)):
        return places | {"first": first}
    return places | {"positions": slot.indices.flatten().tolist()}


class _GroupReader:
    """Reads groups of channels, and checks that no position belongs to two of them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.taken: dict[tuple[str, str], set[int]] = {}

    def read(self, data: Any, where: str) -> tuple[ChannelGroup, Tensor]:
        """Return a group and the order in which its channels leave."""
        fields = fields_of(data, where)
        channels, kind = fields.count("channels"), fields.text("kind")
        sides = {
            name: tuple(
                self._slot(x, channels, f"{where}.{name}[{i}]") for i, x in enumerate(fields.items(name, default))
            )
            for name, default in (("producers", None), ("consumers", None), ("others", ()))
        }
        order = fields.counts("order")
        fields.end()
        if channels < 1 or sorted(order) != list(range(channels)):
            raise DamagedFile(f"{where}.order should hold each of {channels} channels once")
        if not sides["producers"]:
            raise DamagedFile(f"{where}.producers should not be empty")
        group = ChannelGroup(channels, sides["producers"], sides["consumers"], kind, others=sides["others"])
        return group, torch.tensor(order)

    def _slot(self, data: Any, channels: int, where: str) -> Slot:
        fields = fields_of(data, where)
        name, axis, width = fields.text("module"), fields.text("axis"), fields.count("width")
        first = fields.count("first") if "first" in fields.data else None
        listed = fields.counts("positions") if first is None else None
        fields.end()
        module = self.modules.get(name)
        if module is None or axis_of(module, axis) is None:
            raise BadInput(f"the file is for another model: it has no layer {shown(name)} with {shown(axis)}")
        length = axis_length(module, axis)
        count = channels * width
        if listed is None:
            assert first is not None
            listed = list(range(first, first + count)) if first + count <= length else []
        places = self.taken.setdefault((name, axis), set())
        if not count or len(listed) != count or max(listed) >= length or len({*listed} - places) != count:
            raise DamagedFile(f"{where} should hold {count} different positions below {length}")
        places.update(listed)
        return Slot(name, axis, tensors_along(module, name, axis), torch.tensor(listed).view(channels, width))


def ends(starts: int, steps: Sequence[Step]) -> list[int]:
    """Return the numbers of steps at which a size ends, ascending: none ends among the starts."""
    return [0, *(n for n in range(1, len(steps) + 1) if n >= starts)]


def latest(steps: Sequence[Step], count: int) -> list[int]:
    """Return the last number that the steps give to each of ``count`` parts, 0 if they give it none."""
    return list({**dict.fromkeys(range(count), 0), **dict(steps)}.values())


def compressor_from(fields: Fields, kinds: Mapping[str, type[C]], model: nn.Module) -> C:
    """Take the compressor of a path, and check that the model has as many parameters as the path's.

    Raises:
        DamagedFile: a field is not what it should be.
        BadInput: the path is for another model.
    """
    name = fields.text("compressor")
    if name not in kinds:
        raise DamagedFile(f"{fields.where}.compressor should be one of {', '.join(COMPRESSORS)}, not {shown(name)}")
    try:
        compressor = with_options(kinds[name], fields.mapping("options"))
    except (BadInput, TypeError) as error:
        raise DamagedFile(f"{fields.where}.options: {error}") from None
    expected, count = fields.count("parameters"), measuring.parameters(model)
    if expected != count:
        raise BadInput(f"the file is for another model: it should have {expected} parameters, not {count}")
    return compressor


def steps_from(fields: Fields, meaning: str) -> tuple[int, list[Step]]:
    """Take how many steps are starts, and all steps; raise DamagedFile unless they are pairs of whole numbers."""
    steps = fields.items("steps")
    for i, step in enumerate(steps):
        if not (isinstance(step, list) and len(step) == 2 and all(type(x) is int for x in step)):
            raise DamagedFile(f"{fields.where}.steps[{i}] should be {meaning}, not {shown(step)}")
    starts = fields.count("starts")
    if starts > len(steps):
        raise DamagedFile(f"{fields.where}.starts should be at most {len(steps)}, not {starts}")
    return starts, [(first, second) for first, second in steps]


def _steps(fields: Fields, groups: tuple[ChannelGroup, ...]) -> tuple[int, tuple[Step, ...]]:
    starts, steps = steps_from(fields, "a group and a count")
    removed = [0] * len(groups)
    for i, (g, stop) in enumerate(steps):
        if not 0 <= g < len(groups) or not removed[g] < stop < groups[g].channels:
            raise DamagedFile(f"{fields.where}.steps[{i}] should remove channels of a group, not {shown([g, stop])}")
        removed[g] = stop
    return starts, tuple(steps)
