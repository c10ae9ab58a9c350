"""Calibration data: unlabelled batches on which a network is looked at, checked once and read several times.

Batches are what loaders give: a tensor, (inputs, labels), a dict of arguments, or ((a, b), labels) and (dict, labels)
for networks with several inputs. Labels are never used. Batches are moved to the model's device, and a large batch is
split, so that a part of the data can be held out: see :meth:`Calibration.held_out`.

What one pass computes is compared with what another one does, so every pass has to give the same data. Data of up to
:data:`MEMORY` bytes is therefore kept from the first pass, whatever a loader that shuffles or augments gives next time.
Larger data is read again; each pass starts from the same random state, and gives an error if its batches are others.
"""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from pliant.calling import Example, Inputs, as_inputs, inputs_of, map_tensors, tensors_of
from pliant.errors import BadInput, PliantError, first_line

MEMORY = 1 << 28  # bytes of data that are kept; larger data is read in every pass
PIECES = 8  # data in fewer batches is split into at least so many pieces, if there are twice as many samples
_EVERY = 4  # one piece of four is held out
_MARKED = 1024  # numbers of a tensor by which it is recognised
_PATIENCE = 3.0  # seconds of silence before a pass over the data shows its progress


class Calibration:
    """Calibration data for one network, in pieces on its device.

    :meth:`inputs` gives the inputs of one piece after the other. Iterating gives each as a batch without labels, so
    that the object can be handed on wherever calibration data is expected.

    Args:
        data: a collection of batches that can be iterated over several times: a list or a loader; a tensor and a dict
            of arguments count as a single batch.
        model: the network; it is not called.
        example_inputs: what it takes. If it is a dict, only the arguments that it names are taken from dict batches,
            so that labels in the same dict are left out.

    Raises:
        BadInput: the data is empty, an iterator, constant, holds NaN or infinity, or is not made of batches; later:
            it changes from pass to pass.
    """

    def __init__(self, data: Iterable[Any], model: nn.Module, example_inputs: Example) -> None:
        if isinstance(data, (Tensor, Mapping)):
            data = [data]
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
            raise BadInput(f"the calibration data must be a list of batches or a loader, not {type(data).__name__}")
        if isinstance(data, Iterator):
            raise BadInput("the calibration data is read more than once: give a list or a loader, not an iterator")
        self.data = data
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        example = as_inputs(example_inputs)
        self.arguments = set(example) if isinstance(example, dict) else None
        self._random = torch.get_rng_state()
        self._kept: list[Inputs] | None = []
        self._marks: list[int] = []
        self.warned = False  # that there are few samples
        self.samples, sizes = self._survey()
        self._cuts = math.ceil(PIECES / len(sizes))
        self.batch_of = [number for number, size in enumerate(sizes) for _ in range(_parts(size, self._cuts))]
        self.pieces = len(self.batch_of)

    def __iter__(self) -> Iterator[tuple[Any]]:
        """Yield each piece as a batch without labels."""
        for inputs in self.inputs():
            yield (inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs,)

    def __len__(self) -> int:
        """Return the number of pieces."""
        return self.pieces

    def inputs(self, share: float = 1.0) -> Iterator[Inputs]:
        """Yield the inputs of each piece, showing the progress if it takes long and a person may be watching.

        Args:
            share: the share of the samples of each piece that is wanted; at least two of them are given.
        """
        began, progress, task = time.monotonic(), None, None
        try:
            for index, piece in enumerate(self._pieces()):
                yield map_tensors(lambda x: x.to(self.device), piece if share == 1.0 else _narrowed(piece, share))
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

    def _survey(self) -> tuple[int, list[int]]:
        """Check all batches, and keep them if they are small; return the number of samples, and how many each has.

        A batch that cannot be split counts as one sample in the list.
        """
        first: list[Tensor] | None = None
        constant, samples, used = True, 0, 0
        sizes: list[int] = []
        lasting = isinstance(self.data, (list, tuple))  # a loader might use the memory of a batch again
        for batch in self._batches():
            tensors = tensors_of(batch)
            for x in tensors:
                if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                    raise BadInput(f"calibration batch {len(sizes)} holds NaN or infinity")
            first = first or [(x[:1] if x.dim() else x).clone() for x in tensors]
            constant = constant and all(_repeats(x, y) for x, y in zip(tensors, first, strict=False))
            samples += samples_of(batch)
            sizes.append(samples_of(batch) if _splits(batch) else 1)
            self._marks.append(_mark(tensors))
            used += sum(x.nbytes for x in tensors)
            if used > MEMORY:
                self._kept = None
            elif self._kept is not None:
                self._kept.append(batch if lasting else map_tensors(Tensor.clone, batch))
        if not samples:
            raise BadInput("the calibration data is empty")
        if constant and samples > 1:
            raise BadInput(f"all {samples} samples of the calibration data are equal: give samples that differ")
        return samples, sizes

    def _pieces(self) -> Iterator[Inputs]:
        for batch in self._batches_again() if self._kept is None else self._kept:
            yield from _split(batch, self._cuts)

    def _batches_again(self) -> Iterator[Inputs]:
        """Yield the batches of a later pass; raise BadInput if they are others than in the first one."""
        number = 0
        for batch in self._batches():
            if number == len(self._marks) or _mark(tensors_of(batch)) != self._marks[number]:
                raise self._changed(number)
            yield batch
            number += 1
        if number < len(self._marks):
            raise self._changed(number)

    def _changed(self, batch: int) -> BadInput:
        return BadInput(
            f"the calibration data changes from pass to pass, at first in batch {batch}: use shuffle=False and no "
            f"augmentation, or at most {MEMORY >> 20} MiB of data, which is kept in memory"
        )

    def _batches(self) -> Iterator[Inputs]:
        """Yield the inputs of each batch as the user's data gives them, from the same random state in every pass."""
        number, random = 0, self._random
        batches: Iterator[Any] | None = None
        while True:
            own = torch.get_rng_state()
            torch.set_rng_state(random)
            try:
                batches = iter(self.data) if batches is None else batches
                batch = next(batches)
            except StopIteration:
                return
            finally:
                random = torch.get_rng_state()
                torch.set_rng_state(own)
            yield self._inputs_of(batch, number)
            number += 1

    def _inputs_of(self, batch: Any, number: int) -> Inputs:
        inputs = inputs_of(batch)
        if self.arguments is not None and isinstance(inputs, Mapping):
            known = {name: value for name, value in inputs.items() if name in self.arguments}
            if not known:
                raise BadInput(
                    f"calibration batch {number} has none of the arguments {', '.join(sorted(self.arguments))}: "
                    f"{', '.join(map(str, inputs))}"
                )
            inputs = known
        try:
            return as_inputs(inputs)
        except PliantError as error:
            text = first_line(error).replace("example_inputs", "the inputs")
            raise BadInput(f"calibration batch {number}: {text}") from None


def samples_of(inputs: Inputs) -> int:
    """Return the number of samples of a batch: the length of its first tensor."""
    first = tensors_of(inputs)[0]
    return len(first) if first.dim() else 1


def _repeats(x: Tensor, sample: Tensor) -> bool:
    """Return whether every sample of a batch equals ``sample``."""
    return x.shape[1:] == sample.shape[1:] and bool((x == sample.to(x.device)).all())


def _mark(tensors: list[Tensor]) -> int:
    """Return a number that differs, nearly surely, if the tensors do: a checksum of their shapes and some numbers."""
    mark = 0
    for x in tensors:
        some = x.detach().reshape(-1)[:: max(1, x.numel() // _MARKED)].cpu().double()
        mark = zlib.crc32(f"{tuple(x.shape)} {some.tolist()}".encode(), mark)
    return mark


def _splits(inputs: Inputs) -> bool:
    """Return whether all tensors of a batch have the same length, that of the batch."""
    samples = samples_of(inputs)
    return all(x.dim() > 0 and len(x) == samples for x in tensors_of(inputs))


def _parts(samples: int, most: int) -> int:
    """Return in how many pieces to split so many samples: of two at least, which a BatchNorm over vectors needs."""
    return max(1, min(most, max(samples // 2, 2), samples))


def _split(inputs: Inputs, most: int) -> list[Inputs]:
    """Return a batch in at most ``most`` pieces of nearly equal size; in one if its tensors differ in length."""
    samples = samples_of(inputs) if _splits(inputs) else 1
    parts = _parts(samples, most)
    if parts == 1:
        return [inputs]
    bounds = [samples * i // parts for i in range(parts + 1)]
    return [map_tensors(lambda x: x[slice(*bound)], inputs) for bound in pairwise(bounds)]  # noqa: B023 (used at once)


def _narrowed(inputs: Inputs, share: float) -> Inputs:
    """Return the first samples of a piece; the whole of one that cannot be split."""
    if not _splits(inputs):
        return inputs
    count = max(2, math.ceil(samples_of(inputs) * share))
    return map_tensors(lambda x: x[:count], inputs)


def calibration_of(data: Iterable[Any], model: nn.Module, example_inputs: Example) -> Calibration:
    """Return calibration data for a network; data that was checked already is not checked again."""
    return data if isinstance(data, Calibration) else Calibration(data, model, example_inputs)
