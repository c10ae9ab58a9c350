"""What single layers read on calibration data, for compressors that change one layer after the other.

:class:`LayerInputs` measures moments within bounded memory, :class:`Reading` puts a layer's weight and its moment into
the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.compression.calibration import Calibration
from pliant.compression.moments import Moment, by_channel, input_moments, moment_bytes
from pliant.compression.observing import LinearMap, linear_map

MEMORY = 1 << 30  # bytes of moments that are held at a time; the data is read again for more


def matrices(found: LinearMap, tensor: Tensor) -> Tensor:
    """Return a tensor shaped as a layer's weight as float64 (groups, m, n), to match the moment of its inputs.

    Columns run over kernel positions and, within one, over input channels. If the layer has the moment of its input
    channels (``by_channel``), the columns are these, and kernel positions are rows.
    """
    parts = tensor.double().flatten(2) if tensor.dim() > 2 else tensor.double().unsqueeze(2)
    parts = parts.unflatten(0, (_groups(found), -1))  # (groups, filters, channels, kernel)
    if isinstance(found.layer, _ConvTransposeNd):
        parts = parts.transpose(1, 2)
    parts = parts.transpose(2, 3)
    result: Tensor = parts.flatten(1, 2) if by_channel(found.layer, found.weight) else parts.flatten(2)
    return result


def from_matrices(found: LinearMap, matrix: Tensor) -> Tensor:
    """Return (groups, m, n) as a tensor shaped as the layer's weight: the inverse of :func:`matrices`."""
    kernel = found.weight[0, 0].numel()
    channels = by_channel(found.layer, found.weight)
    parts: Tensor = matrix.unflatten(1, (-1, kernel)) if channels else matrix.unflatten(2, (kernel, -1))
    parts = parts.transpose(2, 3)
    if isinstance(found.layer, _ConvTransposeNd):
        parts = parts.transpose(1, 2)
    return parts.reshape(found.weight.shape)


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer and what it reads.

    Args:
        found: the layer.
        weight: its weight as :func:`matrices`.
        moment: the second moment of its inputs x in the order of the columns, regularised, float64 (groups, n, n): the
            covariance if ``mean`` is given.
        mean: E[x], float64 (groups, n), if the layer has a bias that can make up for a change of the mean.
    """

    found: LinearMap
    weight: Tensor
    moment: Tensor
    mean: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, name: str, measured: Moment) -> Reading:
        """Return the reading of a layer of a model with the moment that ``input_moments`` measured there."""
        found = linear_map(model, name)
        assert found is not None  # its moment was measured
        mean = measured.mean if found.bias is not None and not measured.by_channel else None
        second = replace(measured, absorbed=mean is not None).regularised()
        if not measured.by_channel:  # the moment has the order of weight.flatten(1)
            parts = (found.weight.shape[1], -1)
            second = second.unflatten(2, parts).unflatten(1, parts)  # (groups, channels, kernel, channels, kernel)
            second = second.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)
            mean = None if mean is None else mean.unflatten(1, parts).transpose(1, 2).flatten(1)
        return cls(found, matrices(found, found.weight), second, mean)

    def update(self, weight: Tensor) -> None:
        """Make (groups, m, n) the layer's weight, in place."""
        self.correct_bias(weight)  # first: in float64 the matrices share the memory of the weight
        self.found.weight.copy_(from_matrices(self.found, weight))

    def correct_bias(self, weight: Tensor) -> None:
        """Make the bias up for the change of the mean with another weight (groups, m, n), b ← b + (W − W') E[x]."""
        if self.mean is not None and self.found.bias is not None:
            shift = ((self.weight - weight) @ self.mean.unsqueeze(2)).flatten()
            self.found.bias.copy_(self.found.bias.double() + shift)


class LayerInputs:
    """The moments of the inputs of the layers of a network, measured when they are asked for the first time.

    Those that fit into :data:`MEMORY` are held; the data is read again for the others whenever they are asked for.

    Args:
        model: a copy of the network in eval mode.
        names: names of layers.
        calibration: the data.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self._parts = list(_parts(model, names))
        self._held: dict[str, Moment] | None = None

    def moments(self) -> Iterator[tuple[str, Moment]]:
        """Yield (name, moment) of each layer that is applied on the data and not too wide.

        Raises:
            BadInput: the model cannot be called on a batch.
        """
        for i, part in enumerate(self._parts):
            if i or self._held is None:
                found = input_moments(self.model, part, self.calibration)
                if not i:
                    self._held = found
            else:
                found = self._held
            yield from found.items()


def _parts(model: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names in parts whose moments fit into the memory."""
    part: list[str] = []
    size = 0
    for name in names:
        found = linear_map(model, name)
        assert found is not None  # layers have weights
        bytes_ = moment_bytes(found.layer, found.weight)
        if part and size + bytes_ > MEMORY:
            yield part
            part, size = [], 0
        part.append(name)
        size += bytes_
    if part:
        yield part


def _groups(found: LinearMap) -> int:
    return found.layer.groups if isinstance(found.layer, _ConvNd) else 1
