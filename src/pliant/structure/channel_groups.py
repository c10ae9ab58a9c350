"""Groups of channels that leave a network together, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pliant.structure.layers import AxisName
from pliant.structure.proof import Proof


@dataclass(frozen=True, eq=False)
class Slot:
    """The part of one axis of one layer that belongs to a channel group.

    Args:
        module: name of the layer.
        axis: which of its axes.
        tensors: the (state_dict name, dim) pairs that lie along the axis; none for an attention module that only counts
            its heads.
        indices: int64 (channels, width); row ``c`` holds the positions on the axis that belong to channel ``c``. The
            width is 1, or H·W if a linear layer reads a flattened image, or the size of an attention head.
        norm: name of the BatchNorm that is the only reader of this layer's output; None without one.
    """

    module: str
    axis: AxisName
    tensors: tuple[tuple[str, int], ...]
    indices: Tensor
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can be removed one by one, each from all producers and consumers.

    Args:
        channels: the number of channels.
        producers: the places where they are produced.
        consumers: the places where they are read.
        kind: ``"channels"`` of convolutions, ``"neurons"`` of linear layers only, or ``"heads"`` of attention, each
            channel of the group being a head.
        counts: how many channels may stay if not all do; None for any number.
        limit: why no other number of channels may stay; None if all may.
        others: tensors along the channels that belong to no known layer, such as scales and frozen statistics.
    """

    channels: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    kind: str = "channels"
    counts: tuple[int, ...] | None = None
    limit: str | None = None
    others: tuple[Slot, ...] = ()

    @property
    def name(self) -> str:
        """The first producer's name."""
        return self.producers[0].module

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All producers, consumers and others."""
        return (*self.producers, *self.consumers, *self.others)


@dataclass(frozen=True, eq=False)
class Structure:
    """The coupled channels of a model.

    Args:
        groups: all verified groups.
        refused: (layer, reason) for every other convolution, linear and attention layer.
        proof: what the groups were verified by, to verify other removals; None if it is not known.
    """

    groups: tuple[ChannelGroup, ...]
    refused: tuple[tuple[str, str], ...]
    proof: Proof | None = field(default=None, repr=False)
