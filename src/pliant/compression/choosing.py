"""Loss curves of channel groups on calibration data: what each channel, neuron or head costs, for all sizes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.calling import copied
from pliant.compression.calibration import Calibration
from pliant.compression.elimination import Curve, Reader, elimination_order
from pliant.compression.moments import Moment, by_channel, input_moments, moment_bytes
from pliant.compression.observing import linear_map
from pliant.structure import ChannelGroup, Slot

MEMORY = 1 << 29  # bytes of moments that are held at a time; the data is read again for more


def loss_curves(model: nn.Module, groups: Sequence[ChannelGroup], calibration: Calibration) -> tuple[Curve, ...]:
    """Return, for each group, the order in which its channels leave and the loss after each.

    A layer whose inputs cannot be measured (it is too wide, or is not applied) counts as if its inputs were all
    independent and alike.

    Args:
        model: the network; not changed.
        groups: the groups of coupled channels.
        calibration: the data. It is read once for every :data:`MEMORY` bytes of moments.

    Raises:
        BadInput: the model cannot be called on a batch.
    """
    probe = copied(model).eval()
    curves: list[Curve] = []
    for part in _parts(probe, groups):
        names = dict.fromkeys(slot.module for group in part for slot in group.consumers)
        moments = input_moments(probe, names, calibration)
        curves += [
            elimination_order([_reader(probe, slot, moments.get(slot.module)) for slot in group.consumers])
            for group in part
        ]
    return tuple(curves)


def _parts(model: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """Yield the groups in parts whose moments fit into the memory."""
    part: list[ChannelGroup] = []
    known: dict[str, int] = {}
    for group in groups:
        needed = {slot.module: _moment_bytes(model, slot.module) for slot in group.consumers}
        if part and sum((known | needed).values()) > MEMORY:
            yield part
            part, known = [], {}
        part.append(group)
        known |= needed
    if part:
        yield part


def _moment_bytes(model: nn.Module, name: str) -> int:
    found = linear_map(model, name)
    assert found is not None  # consumers are layers with weights
    return moment_bytes(found.layer, found.weight)


def _reader(model: nn.Module, slot: Slot, moment: Moment | None) -> Reader:
    """Return a consumer of channels for the elimination."""
    weight, kernel = _matrix(model, slot.module)
    blocks = slot.indices.to(weight.device)
    blocks = (blocks.unsqueeze(2) * kernel + torch.arange(kernel, device=blocks.device)).flatten(1)
    if moment is None:
        second = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    else:
        (second,) = moment.regularised()
    return Reader(weight.double(), second, blocks)


def _matrix(model: nn.Module, name: str) -> tuple[Tensor, int]:
    """Return the weight as (outputs, columns) to match its moment, and how many columns a channel has."""
    found = linear_map(model, name)
    assert found is not None  # consumers are layers with weights
    if isinstance(found.layer, _ConvTransposeNd):
        return found.weight.flatten(1).T, 1
    if by_channel(found.layer, found.weight):
        return found.weight.movedim(1, -1).flatten(0, -2), 1
    kernel = found.weight[0, 0].numel() if isinstance(found.layer, _ConvNd) else 1
    return found.weight.flatten(1), kernel
