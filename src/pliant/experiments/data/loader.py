"""The loader: batches of one split of a data set, normalised and optionally augmented."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pliant.errors import BadInput, unknown
from pliant.experiments.data.images import ImageData

Batch = TypeVar("Batch")


class Loader:
    """An iterable of batches (images, labels) of one split, normalised and optionally augmented.

    Images are float32 (B, C, H, W) in ``channels_last``, normalised by the data set's mean and std; labels int64 (B,).
    Order and augmentation depend only on (seed, epoch), on every machine and for every batch size, and neither read nor
    change torch's global random state. Call `set_epoch` before each epoch: without it all epochs are the same.

    The last batch may be smaller, except that under ``shuffle``, that is in training, a last batch of a single image
    joins the one before it: BatchNorm cannot normalise one 1x1 image.

    Args:
        data: the data set.
        split: "train", "val" or "test".
        batch_size: images in a batch.
        shuffle: whether each epoch has an order of its own; otherwise images come in the order of the split.
        augment: whether to shift every image by up to ``data.pad`` pixels (a crop of the image mirrored over its edges)
            and, if ``data.flip`` allows it, to mirror half of them.
        seed: seed of order and augmentation.
        limit: keep at most this many images, a random choice that depends only on ``seed``.

    Raises:
        BadInput: the split is unknown, the batch size or the limit is below 1, or the seed is negative.
    """

    def __init__(
        self,
        data: ImageData,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        splits = {"train": data.train, "val": data.val, "test": data.test}
        if split not in splits:
            raise unknown("split", split, splits)
        if batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, not {batch_size}")
        if limit is not None and limit < 1:
            raise BadInput(f"limit must be at least 1 image, not {limit}; leave it out to take the whole split")
        if seed < 0:
            raise BadInput(f"seed must not be negative, got {seed}")
        self.data = data
        self.split = splits[split]
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._first = 0
        self._chosen = torch.arange(len(self.split))
        if limit is not None:
            self._chosen = torch.randperm(len(self.split), generator=_generator(seed))[:limit]
        count = len(self._chosen)
        self._bounds = [*range(0, count, batch_size), count]
        if shuffle and count > batch_size > 1 and count % batch_size == 1:
            del self._bounds[-2]
        # x/255 − mean, over std, as one product and one sum
        std = torch.tensor(data.std, dtype=torch.float64).view(-1, 1, 1)
        mean = torch.tensor(data.mean, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (1 / (255 * std)).float()
        self._shift = (-mean / std).float()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the order and augmentation of the next iterations.

        Args:
            epoch: number of the epoch, from 0.
            first: number of batches to skip, for a training that is resumed within an epoch. The length of the loader
                remains that of a whole epoch.

        Raises:
            BadInput: the epoch is negative, or has fewer batches than ``first``.
        """
        if epoch < 0:
            raise BadInput(f"epoch must not be negative, got {epoch}")
        if not 0 <= first <= len(self):
            raise BadInput(f"first must be from 0 to {len(self)}, the batches of an epoch, got {first}")
        self.epoch, self._first = epoch, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._batches()
        return batches if isinstance(self.split.images, Tensor) else _ahead(batches)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = _generator(self.seed, self.epoch)
        order = self._chosen
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        # Drawn for the whole epoch at once: what happens to an image does not depend on the batch size.
        shifts = torch.randint(0, 2 * self.data.pad + 1, (2, len(order)), generator=generator)
        mirrored = torch.randint(0, 2, (len(order),), generator=generator).bool() & self.data.flip
        spans = list(pairwise(self._bounds))[self._first :]
        batches = self.split.batches(order[start:stop] for start, stop in spans)
        for (start, stop), images in zip(spans, batches, strict=True):
            if self.augment:
                top, left = shifts[:, start:stop]
                images = _crop(images, self.data.pad, top, left)
                images = torch.where(mirrored[start:stop, None, None, None], images.flip(3), images)
            pixels = images.to(torch.float32, memory_format=torch.channels_last)
            yield pixels.mul_(self._scale).add_(self._shift), self.split.labels[order[start:stop]]


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, while a thread makes the next one."""
    with ThreadPoolExecutor(1, "pliant-batches") as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _crop(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Mirror images (B, C, H, W) over their edges by ``pad`` pixels, then cut out of each the window at (top, left).

    Black edges would be simpler, but BatchNorm would then see other statistics in training than on plain images.
    """
    height, width = images.shape[2:]
    padded = images[:, :, _mirrored(height, pad)][:, :, :, _mirrored(width, pad)]
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2·pad+1, 2·pad+1, H, W)
    return windows.permute(0, 2, 3, 1, 4, 5)[torch.arange(len(images)), top, left]


def _mirrored(size: int, pad: int) -> Tensor:
    """Return the positions 0 … size − 1 and, at either end, ``pad`` < size more, mirrored at the edge pixels."""
    return (size - 1) - (torch.arange(-pad, size + pad).abs() - (size - 1)).abs()


def _generator(seed: int, *stream: int) -> torch.Generator:
    """Return a new generator for (seed, stream); SeedSequence keeps neighbouring seeds and epochs apart."""
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
