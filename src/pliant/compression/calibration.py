"""Calibration data: unlabelled batches on which a network is looked at, checked once and read several times.

Batches are what loaders give: a tensor, (inputs, labels), a dict of arguments, or ((a, b), labels) and (dict, labels)
for networks with several inputs. Labels are never used. Batches are moved to the model's device, and a large batch is
split, so that a part of the data can be held out: see :meth:`Calibration.held_out`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from pliant.calling import Example, Inputs, as_inputs, inputs_of, map_tensors, tensors_of
from pliant.errors import BadInput, PliantError, first_line

PIECES = 8  # data in fewer batches is split into at least so many pieces, if there are so many samples
_EVERY = 4  # one piece of four is held out
_PATIENCE = 3.0  # seconds of silence before a pass over the data shows its progress


class Calibration:
    """Calibration data for one network, in pieces on its device.

    :meth:`inputs` gives the inputs of one piece after the other. Iterating gives each as a batch without labels, so
    that the object can be handed on wherever calibration data is expected.

    Args:
        data: a collection of batches that can be iterated over several times: a list or a loader; a tensor counts as
            a single batch.
        model: the network; it is not called.
        example_inputs: what it takes. If it is a dict, only the arguments that it names are taken from dict batches,
            so that labels in the same dict are left out.

    Raises:
        BadInput: the data is empty, an iterator, constant, holds NaN or infinity, or is not made of batches.
    """

    def __init__(self, data: Iterable[Any], model: nn.Module, example_inputs: Example) -> None:
        if isinstance(data, Tensor):
            data = [data]
        if not isinstance(data, Iterable):
            raise BadInput(f"the calibration data must be a list of batches or a loader, not {type(data).__name__}")
        if isinstance(data, Iterator):
            raise BadInput("the calibration data is read more than once: give a list or a loader, not an iterator")
        self.data = data
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        example = as_inputs(example_inputs)
        self.arguments = set(example) if isinstance(example, dict) else None
        self._cuts = 1
        self.samples, self.pieces = self._survey()

    def __iter__(self) -> Iterator[tuple[Any]]:
        """Yield each piece as a batch without labels."""
        for inputs in self.inputs():
            yield (inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs,)

    def __len__(self) -> int:
        """Return the number of pieces."""
        return self.pieces

    def inputs(self) -> Iterator[Inputs]:
        """Yield the inputs of each piece, showing the progress if it takes long and a person may be watching."""
        began, progress, task = time.monotonic(), None, None
        try:
            for index, piece in enumerate(self._pieces()):
                yield map_tensors(lambda x: x.to(self.device), piece)
                if progress is None and time.monotonic() - began > _PATIENCE and sys.stderr.isatty():
                    progress = Progress(console=Console(stderr=True), transient=True)
                    task = progress.add_task("calibration", total=self.pieces)
                    progress.start()
                if progress is not None and task is not None:
                    progress.update(task, completed=index + 1)
        finally:
            if progress is not None:
                progress.stop()

    def held_out(self, piece: int) -> bool:
        """Return whether a piece is for comparing fits, not for fitting. Never all or, of two or more, none of them."""
        return piece % min(_EVERY, self.pieces) == min(_EVERY, self.pieces) - 1 if self.pieces > 1 else False

    def _survey(self) -> tuple[int, int]:
        """Check all batches, and return the numbers of samples and pieces."""
        first: list[Tensor] | None = None
        constant, samples, batches = True, 0, 0
        for batch in self._batches():
            tensors = tensors_of(batch)
            for x in tensors:
                if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                    raise BadInput(f"calibration batch {batches} holds NaN or infinity")
            first = first or [x[:1] if x.dim() else x for x in tensors]
            constant = constant and all(_repeats(x, y) for x, y in zip(tensors, first, strict=False))
            samples += _samples(batch)
            batches += 1
        if not batches or not samples:
            raise BadInput("the calibration data is empty")
        if constant and samples > 1:
            raise BadInput(f"all {samples} samples of the calibration data are equal: give samples that differ")
        self._cuts = math.ceil(PIECES / batches)
        return samples, sum(1 for _ in self._pieces()) if self._cuts > 1 else batches

    def _pieces(self) -> Iterator[Inputs]:
        for batch in self._batches():
            yield from _split(batch, self._cuts)

    def _batches(self) -> Iterator[Inputs]:
        number = 0
        try:
            for batch in self.data:
                inputs = inputs_of(batch)
                if self.arguments is not None and isinstance(inputs, dict):
                    inputs = {name: value for name, value in inputs.items() if name in self.arguments}
                yield as_inputs(inputs)
                number += 1
        except PliantError as error:
            raise BadInput(f"calibration batch {number}: {first_line(error)}") from None


def _samples(inputs: Inputs) -> int:
    """Return the number of samples of a batch: the length of its first tensor."""
    first = tensors_of(inputs)[0]
    return len(first) if first.dim() else 1


def _repeats(x: Tensor, sample: Tensor) -> bool:
    """Return whether every sample of a batch equals ``sample``."""
    return x.shape[1:] == sample.shape[1:] and bool((x == sample.to(x.device)).all())


def _split(inputs: Inputs, parts: int) -> list[Inputs]:
    """Return a batch in at most ``parts`` pieces of nearly equal size; in one if its tensors differ in length."""
    tensors = tensors_of(inputs)
    samples = _samples(inputs)
    if parts == 1 or samples < 2 or any(x.dim() == 0 or len(x) != samples for x in tensors):
        return [inputs]
    bounds = [samples * i // min(parts, samples) for i in range(min(parts, samples) + 1)]
    return [map_tensors(lambda x: x[slice(*bound)], inputs) for bound in pairwise(bounds)]  # noqa: B023 (used at once)


def calibration_of(data: Iterable[Any], model: nn.Module, example_inputs: Example) -> Calibration:
    """Return calibration data for a network; data that was checked already is not checked again."""
    return data if isinstance(data, Calibration) else Calibration(data, model, example_inputs)
