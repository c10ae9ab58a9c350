"""Image data sets of the experiments and the loader that feeds them to a network.

`load_data` reads a data set by name into an `ImageData`: three `Split`s (train, val, test) of uint8 images with
what is needed to normalise and augment them. A `Loader` walks over one split in batches.

The splits are a property of the data set, not of a run: the validation images (5,000, or 10 % where there are
fewer than 50,000 training images) and, where a data set has no test split, the test images (20 %) are chosen once,
stratified by class, and are the same for every training seed. They are N·C·H·W bytes in memory; of a folder with more
than 2 GiB of them the images stay in their files, and all cores decode them batch by batch.

Pillow, pyarrow and `datasets` belong to the extra ``pliant[data]`` and are imported where they are used; `digits`
and `fashion-mnist` from IDX files need none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.errors import BadInput, DamagedFile, unknown
from pliant.experiments.data.readers import IN_MEMORY, READERS, Raw, Request
from pliant.experiments.data.readers import (
    Split as Split,  # belongs to ImageData; defined where the readers reach it too
)

Batch = TypeVar("Batch")
SPLIT_SEED = 0  # of the held-out images; changing it changes every result
SAMPLE = 20_000  # images at most that mean and std are measured on, where each has to be decoded


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set.

    ``mean`` and ``std`` hold one number per channel, measured on ``train`` (on 10,000 to 20,000 of its images where
    each has to be decoded), for pixels scaled to [0, 1]. ``flip`` says whether a mirrored image still belongs to its
    class, ``pad`` by how many pixels a random crop may shift it.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    pad: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(name: str, data_dir: str | Path | None = None, *, image_size: int | None = None) -> ImageData:
    """Read the data set ``name``.

    =================  ==========================================  ==========================================
    name               images                                      from
    =================  ==========================================  ==========================================
    ``digits``         1,797 of 1x8x8, 10 classes                  scikit-learn, embedded; 20 % are the test
    ``fashion-mnist``  70,000 of 1x28x28, 10 classes               ``data_dir`` with the four IDX files (.gz
                                                                   or plain), else Debian's package, else hub
    ``cifar10``        60,000 of 3x32x32, 10 classes               ``data_dir`` with train*.parquet and
                                                                   test*.parquet, else hub
    ``cifar100``       60,000 of 3x32x32, 100 (fine) classes       as ``cifar10``
    ``parquet``        any; an image and a label column are found  ``data_dir`` with train*.parquet and
                       by type and name                            test*.parquet
    ``image-folder``   any; one folder of image files per class    ``data_dir`` with train/ and test/ (or val/), or
                                                                   with the class folders (20 % are the test)
    ``hub:OWNER/X``    any; columns as in ``parquet``              the Hugging Face hub: splits train and test,
                                                                   else validation as test, else 20 % of train
    =================  ==========================================  ==========================================

    ``image_size`` (pixels) resizes every image to a square, bilinearly, without keeping its aspect ratio; it is
    required where the images differ in size. Images become RGB unless all of them are grey.

    Images of an ``image-folder`` that would take more than 2 GiB stay in their files, but for those of the validation
    if these fit; a `Loader` decodes them, on all cores, as it comes to them. They need an ``image_size``, are RGB even
    if all are grey, and a damaged or unsuitable one is found only then.

    Raises `BadInput` for an unknown name, an unsuitable option, labels or columns that do not fit, or too few images
    or classes; `DamagedFile` for a folder or file that is missing or cannot be read. Each names the culprit.
    """
    if image_size is not None and image_size < 1:
        raise BadInput(f"image_size must be at least 1 pixel, not {image_size}")
    kind = "hub:OWNER/NAME" if name.startswith("hub:") else name
    if kind not in READERS:
        raise unknown("data set", name, READERS)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise DamagedFile(f"data_dir {folder} is not a folder: pass the folder that holds {name}")
    raw = READERS[kind](Request(name, folder, image_size))
    return _assemble(name, raw, image_size)


class Loader:
    """Batches of one split, normalised and, if asked, augmented: an iterable of (images, labels).

    Images are float32 (B, C, H, W) in ``channels_last``, normalised by the data set's mean and std; labels int64 (B,).
    Order and augmentation depend on (seed, epoch) alone, on every machine and for every batch size, and neither reads
    nor moves torch's global random state. Call `set_epoch` before each epoch: without it all epochs are the same.

    ``augment`` shifts every image by up to ``data.pad`` pixels (the crop of a zero-padded image) and, where
    ``data.flip`` allows it, mirrors half of them. ``limit`` keeps at most that many images, a random choice that
    depends on ``seed`` alone. The last batch may be smaller, except that under ``shuffle``, that is in training, a
    last batch of a single image joins the one before it: BatchNorm cannot normalise one 1x1 image.

    Raises `BadInput` for an unknown split, a batch size or limit below 1, a negative seed or epoch.
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
        """Choose the order and augmentation of the next iterations; epochs count from 0.

        ``first`` batches of the epoch are left out, by a training that goes on in the middle of it. The length of the
        loader stays that of a whole epoch.
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
    """Yield batches while a thread makes the one after."""
    with ThreadPoolExecutor(1, "pliant-batches") as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _crop(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Mirror (B, C, H, W) ``pad`` pixels over its edges; cut out of each image the H x W window at ``top``, ``left``.

    Black edges would be simpler, but BatchNorm would then see other statistics in training than on plain images.
    """
    height, width = images.shape[2:]
    padded = images[:, :, _mirrored(height, pad)][:, :, :, _mirrored(width, pad)]
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2·pad+1, 2·pad+1, H, W)
    return windows.permute(0, 2, 3, 1, 4, 5)[torch.arange(len(images)), top, left]


def _mirrored(size: int, pad: int) -> Tensor:
    """Return the positions 0 … size − 1 with ``pad`` < size more at either end, mirrored at the edge pixels."""
    return (size - 1) - (torch.arange(-pad, size + pad).abs() - (size - 1)).abs()


def _generator(seed: int, *stream: int) -> torch.Generator:
    """Return a generator of its own for (seed, stream); SeedSequence keeps neighbouring seeds and epochs apart."""
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _assemble(name: str, raw: Raw, image_size: int | None) -> ImageData:
    """Check what a reader found, hold out validation (and test) images and measure mean and std."""
    train, test, classes = raw
    if len(classes) < 2:
        raise BadInput(f"{name} has the classes {list(classes)}: at least 2 are needed")
    labels = torch.cat([split.labels for split in (train, test) if split is not None])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise BadInput(f"{name} has {len(classes)} classes, but its labels run from {low} to {high}")
    train = _resized(train, image_size)
    if test is None:
        train, test = _hold_out(train, len(train) // 5)
    else:
        test = _resized(test, image_size)
    if len(train) < 10 or len(test) < 1:
        raise BadInput(
            f"{name} has {len(train)} training and {len(test)} test images: "
            "at least 10 (a tenth is held out for validation) and 1 are needed"
        )
    train, val = _hold_out(train, 5_000 if len(train) >= 50_000 else len(train) // 10)
    if prod(val.images.shape) <= IN_MEMORY:
        val = val.in_memory()  # these are looked at after each epoch
    mean, std = _statistics(train)
    side = min(train.images.shape[2:])
    pad = side // 14 if name == "fashion-mnist" else side // 8
    return ImageData(name, train, val, test, classes, mean, std, flip=name != "digits", pad=pad)


def _resized(split: Split, size: int | None) -> Split:
    if size is None or not isinstance(split.images, Tensor) or split.images.shape[2:] == (size, size):
        return split
    return Split(F.interpolate(split.images, (size, size), mode="bilinear", antialias=True), split.labels)


def _hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Divide a split in two, the second of ``count`` images; each class loses its share, give or take one image."""
    labels = split.labels.numpy()
    # RandomState, not default_rng: numpy guarantees its stream for ever, and these images must never change.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    held = np.zeros(len(labels), dtype=bool)
    if count:
        held[by_class[(2 * np.arange(count) + 1) * len(labels) // (2 * count)]] = True  # evenly spaced
    mask = torch.from_numpy(held)
    return split.part(~mask), split.part(mask)


def _statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of pixels in [0, 1]; a constant channel counts as std 1."""
    every = 1 if isinstance(split.images, Tensor) else -(-len(split) // SAMPLE)
    total = squares = torch.zeros(split.images.shape[1], dtype=torch.float64)
    count = 0
    for images in split.batches(torch.arange(0, len(split), every).split(256)):  # bounds the float64 copy
        pixels = images.double()  # the sums are whole numbers, exact
        total = total + pixels.sum((0, 2, 3))
        squares = squares + pixels.square().sum((0, 2, 3))
        count += pixels[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std[std == 0] = 255  # nothing to scale, and a division by 0 would make every pixel NaN
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
