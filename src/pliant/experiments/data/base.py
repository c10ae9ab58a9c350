"""What a reader is asked for, what it gives back, and what the readers share."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pliant.errors import BadInput


class Stored(Protocol):
    """Images that do not fit in memory and stay where they are: `ImageFiles`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W), as of a tensor."""

    def part(self, mask: Tensor) -> Self:
        """Return the images of a boolean mask (N,)."""

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) of each tensor of row numbers (B,)."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split: uint8 images (N, C, H, W) in 0..255, int64 labels (N,)."""

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
    """What a reader is asked for: the data set's full name, its folder, the image size (None: as it is)."""

    name: str
    folder: Path | None
    image_size: int | None


class Raw(NamedTuple):
    """What a reader returns: all training images, the test images (None: there is no such split), class names."""

    train: Split
    test: Split | None
    classes: tuple[str, ...]


def extra(module: str) -> Any:
    """Import a module of the extra ``pliant[data]``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"image files need the package {module} ({error}): pip install 'pliant[data]'") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
