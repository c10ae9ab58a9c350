"""The description of a data set, the request to its reader and the reader's result; helpers of all readers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pliant.errors import BadInput, shown


class Stored(Protocol):
    """Images that do not fit in memory and stay where they are: `ImageFiles`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, C, H, W), like that of a tensor."""

    def part(self, mask: Tensor) -> Self:
        """Return the images of a boolean mask (N,)."""

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) of each tensor of row numbers (B,)."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split.

    Args:
        images: uint8 (N, C, H, W), from 0 to 255.
        labels: int64 (N,).
    """

    images: Tensor | Stored
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, mask: Tensor) -> Split:
        """Return the images and labels of a boolean mask (N,)."""
        images = self.images[mask] if isinstance(self.images, Tensor) else self.images.part(mask)
        return Split(images, self.labels[mask])

    def in_memory(self) -> Split:
        """Return this split with all images decoded."""
        if isinstance(self.images, Tensor):
            return self
        return Split(torch.cat(list(self.images.batches(torch.arange(len(self)).split(256)))), self.labels)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) of each tensor of row numbers (B,)."""
        if isinstance(self.images, Tensor):
            yield from (self.images[batch] for batch in rows)
        else:
            yield from self.images.batches(rows)


class Request(NamedTuple):
    """The request to a reader."""

    name: str
    """The data set's full name."""
    folder: Path | None
    """The folder of its files; None if the user gave none."""
    image_size: int | None
    """Side of the square images; None leaves them unchanged. Images that a reader does not resize are resized later."""
    num_classes: int | None = None
    """How many classes a data set of this name has; None if its files decide."""


class Raw(NamedTuple):
    """The result of a reader."""

    train: Split
    """All training images; validation images are held out from them afterwards."""
    test: Split | None
    """The test images; if None, a fifth of the training images is held out for the test."""
    classes: tuple[str, ...]
    """The names of the classes, in the order of the labels."""


@dataclass(frozen=True)
class DataSet:
    """A data set with a name: its reader and the properties of its images.

    Raises:
        BadInput: a field is of the wrong kind or out of range.
    """

    name: str
    """Its name for ``--data``."""
    read: Callable[[Request], Raw]
    """Its reader."""
    num_classes: int | None = None
    """Number of classes; None if its files decide."""
    shape: tuple[int, int, int] | None = None
    """Shape (C, H, W) of an image; None if its files decide."""
    flip: bool = True
    """Whether a mirrored image still belongs to its class."""
    pad: float = 1 / 8
    """The largest shift of a random crop, as a share of the image's shorter side, less than 1."""

    def __post_init__(self) -> None:
        if not callable(self.read):
            raise BadInput(f"read must be a callable that takes a Request and returns a Raw, got {shown(self.read)}")
        if self.num_classes is not None and not _is_count(self.num_classes, 2):
            raise BadInput(f"num_classes must be an integer of at least 2, got {shown(self.num_classes)}")
        if self.shape is not None and not _is_shape(self.shape):
            raise BadInput(f"shape must be (channels, height, width), each at least 1, got {shown(self.shape)}")
        if not isinstance(self.flip, bool):
            raise BadInput(f"flip must be True or False, got {shown(self.flip)}")
        if not isinstance(self.pad, float | int) or not 0 <= self.pad < 1:
            raise BadInput(f"pad must be a share of the shorter side, from 0 to below 1, got {shown(self.pad)}")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least  # not isinstance: True is no count


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_count(length, 1) for length in value)


def extra(module: str) -> Any:
    """Import a module of the extra ``pliant[data]``; raise BadInput if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"image files need the package {module} ({error}): pip install 'pliant[data]'") from error
