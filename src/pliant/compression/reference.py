"""The dense network on calibration data: what the networks that are cut from it are fitted to and compared with."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant import measuring
from pliant.calling import Example, Inputs, as_inputs, copied, tensors_of
from pliant.compression.calibration import Calibration, samples_of
from pliant.compression.moments import LEAST_ROWS, MAX_COLUMNS, ROWS_PER_COLUMN, call_on
from pliant.compression.observing import (
    LinearMap,
    applies_plainly,
    linear_map,
    map_names,
    observing,
    unfused,
)
from pliant.compression.rows import chosen_rows, grid_of, output_rows
from pliant.compression.sites import WIDE
from pliant.errors import BadInput

CHEAP = 1e11  # multiply-accumulates of a pass over the data: a second or so


@dataclass(frozen=True, eq=False)
class Call:
    """What a dense map did in one call.

    Args:
        rows, outputs: rows of the grid of its outputs, and their outputs (rows, filters).
        places, inputs: for a wide convolution, rows of the grid of its inputs, and their channels (rows, channels).
    """

    rows: Tensor
    outputs: Tensor
    places: Tensor | None = None
    inputs: Tensor | None = None


class Reference:
    """What the maps of a dense network do on calibration data, and what the network gives.

    The network is run once, when anything of this is first asked for.

    Args:
        model: the dense network; not changed.
        example_inputs: inputs that it takes.
        calibration: the data.
    """

    def __init__(self, model: nn.Module, example_inputs: Example, calibration: Calibration) -> None:
        self.model, self.example_inputs, self.calibration = model, example_inputs, calibration

    @cached_property
    def work(self) -> int:
        """The multiply-accumulates of a pass over all of the data."""
        return measuring.macs(self.model, self.example_inputs) * self.calibration.samples

    @property
    def most(self) -> int:
        """The number of columns up to which a convolution that has lost channels is fitted in its columns."""
        return WIDE if self.work <= CHEAP else WIDE // 2

    @cached_property
    def share(self) -> float:
        """The share of each piece that is read: as much as gives every map of the dense network enough rows.

        A map has a row for every position of every sample. One with a single position would want all of the data
        whatever the others need, at the cost of the whole network: it gets a row for every two columns. Where all of
        the data costs little, all of it is read.
        """
        if self.work <= CHEAP:
            return 1.0
        maps = maps_of(probe := copied(self.model).eval())
        samples = len(tensors_of(as_inputs(self.example_inputs))[0])
        several: list[float] = []  # the shares that maps of several positions need
        single = [0.0]  # and those of one position

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            positions = math.prod(grid_of(layer, output)) / samples
            weight = maps[name].weight
            columns = weight[0].numel()
            wide = isinstance(layer, _ConvNd) and columns > self.most
            rows = (
                columns / 2
                if positions <= 1
                else _enough(weight.shape[1])
                if wide
                else rows_of(layer, weight, self.most)
            )
            (several if positions > 1 else single).append(rows / (positions * self.calibration.samples))

        with observing(probe, maps, watch):
            call_on(probe, as_inputs(self.example_inputs), 0)
        return min(1.0, max(*several, *single, CHEAP / self.work)) if several else 1.0

    @property
    def samples(self) -> int:
        """The number of samples that are read."""
        return self._seen[2]

    def pieces(self) -> Iterator[tuple[int, Inputs]]:
        """Yield the number and the inputs of each piece."""
        yield from enumerate(self.calibration.inputs(self.share))

    @cached_property
    def _seen(self) -> tuple[dict[tuple[str, int], list[Call]], dict[int, list[Tensor]], int]:
        """What every map did in each piece, sampled; the outputs on pieces held out; and the number of samples."""
        dense = copied(self.model).eval()
        maps = maps_of(dense)
        calls: dict[tuple[str, int], list[Call]] = {}
        outputs: dict[int, list[Tensor]] = {}
        piece, samples = 0, 0

        def chosen(layer: nn.Module, value: Tensor, rows: int, name: str) -> tuple[Tensor, Tensor]:
            some = chosen_rows(grid_of(layer, value), math.ceil(rows / self.calibration.pieces), name, piece)
            return some, output_rows(layer, value, some)

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            if isinstance(layer, _ConvTransposeNd):
                return
            known = calls.setdefault((name, piece), [])
            weight = maps[name].weight
            call = Call(*chosen(layer, output, rows_of(layer, weight, self.most), f"{name} {len(known)}"))
            if isinstance(layer, _ConvNd) and layer.groups == 1 and weight[0].numel() > self.most:
                places, inputs = chosen(layer, value, _enough(weight.shape[1]), f"{name} {len(known)} inputs")
                call = replace(call, places=places, inputs=inputs)
            known.append(call)

        with observing(dense, maps, watch):
            for piece, inputs in self.pieces():
                samples += samples_of(inputs)
                result = call_on(dense, inputs, self.calibration.batch_of[piece])
                if self.calibration.held_out(piece):
                    outputs[piece] = [x for x in result if x.is_floating_point()]
        return calls, outputs, samples

    def call(self, name: str, piece: int, index: int) -> Call | None:
        """Return what a map did in a piece when it was applied for the index-th time; None if it was not so often."""
        known = self._seen[0].get((name, piece), [])
        return known[index] if index < len(known) else None

    def error(self, network: nn.Module) -> float:
        """Return the error of a network's outputs on the held-out pieces, relative to the energy of the dense ones."""
        probe = copied(network).eval()
        missed = 0.0
        with unfused():
            for piece, inputs in self.pieces():
                if not self.calibration.held_out(piece):
                    continue
                got = [x for x in call_on(probe, inputs, self.calibration.batch_of[piece]) if x.is_floating_point()]
                for x, y in zip(got, self._seen[1][piece], strict=True):
                    rest = torch.where(x == y, 0.0, x.double() - y.double())  # both are infinite in masked logits
                    missed += float(rest.square().sum())
        error = missed / self._energy if self._energy else missed
        return error if math.isfinite(error) else sys.float_info.max

    @cached_property
    def _energy(self) -> float:
        """The energy of the dense outputs on the held-out pieces."""
        energy = sum(_energy(outputs) for outputs in zip(*self._seen[1].values(), strict=True))
        if not math.isfinite(energy):
            raise BadInput("the outputs of the dense network on the calibration data hold NaN")
        return energy


def _energy(outputs: Sequence[Tensor]) -> float:
    """Return Σ (y − ȳ)² over one output in several pieces, Σ y² if that is zero; infinite numbers do not count."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}  # sequences may differ in length
    for y in outputs:
        groups.setdefault(tuple(y.shape[1:]), []).append(y.double().masked_fill(y.isinf(), 0.0).flatten(0, 0))
    joined = [torch.cat(pieces) for pieces in groups.values()]
    centred = sum(float((y - y.mean(0)).square().sum()) for y in joined if len(y))
    return centred or sum(float(y.square().sum()) for y in joined)


def maps_of(model: nn.Module) -> dict[str, LinearMap]:
    """Return all maps of a network by name, but those of layers that do more than apply them."""
    found = {name: linear_map(model, name) for name in map_names(model)}
    return {name: known for name, known in found.items() if known is not None and applies_plainly(known.layer)}


def rows_of(layer: nn.Module, weight: Tensor, most: int) -> int:
    """Return how many rows the fit of a map of the dense network needs.

    Args:
        layer, weight: the map.
        most: the number of columns up to which a convolution is fitted in its columns.
    """
    return _enough(min(weight[0].numel(), most if isinstance(layer, _ConvNd) else MAX_COLUMNS["linear"]))


def _enough(columns: int) -> int:
    """Return the number of rows for so many columns: half of a moment's, for fits are damped towards the cut."""
    return max(LEAST_ROWS, ROWS_PER_COLUMN // 2 * columns)
