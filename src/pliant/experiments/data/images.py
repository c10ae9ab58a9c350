"""Image data sets: three splits of images, and the numbers that normalise and augment them.

`load_data` reads a data set by name into an `ImageData`: the splits train, val and test of uint8 images.

The splits are a property of the data set, not of a run: the validation images (5,000, or 10 % where there are
fewer than 50,000 training images) and, if a data set has no test split, the test images (20 %) are chosen once,
stratified by class, and are the same for every training seed. Images take N·C·H·W bytes of memory; the images of a
folder with more than 2 GiB stay in their files, and all cores decode them batch by batch.

Pillow, pyarrow and `datasets` belong to the extra ``pliant[data]`` and are imported only when used; `digits` and
`fashion-mnist` from IDX files need none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.errors import BadInput, DamagedFile
from pliant.experiments.data.base import DataSet, Raw, Request, Split
from pliant.experiments.data.data_sets import data_set
from pliant.experiments.data.streaming import IN_MEMORY

SPLIT_SEED = 0  # seed of the held-out images; changing it changes every result
SAMPLE = 20_000  # mean and std are measured on at most this many images if each has to be decoded


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in three splits.

    Args:
        name: its name.
        train, val, test: the splits.
        classes: names of the classes, in the order of the labels.
        mean, std: one number per channel for pixels scaled to [0, 1], measured on ``train`` (on 10,000 to 20,000 of its
            images if each has to be decoded).
        flip: whether a mirrored image still belongs to its class.
        pad: largest shift of a random crop, in pixels.
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
    """Read a data set by its name.

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

    Images become RGB unless all of them are grey. Images of an ``image-folder`` that would take more than 2 GiB stay in
    their files, except validation images if these fit; a `Loader` decodes them, on all cores, when it needs them. Such
    images need an ``image_size`` and are RGB even if all are grey, and a damaged or unsuitable image is found only when
    it is decoded.

    Args:
        name: a name in the table; the name under which an installed package offers a data set (entry points
            ``pliant.data``); or ``package.module:name``. The object of another package is a `DataSet`, or a reader: a
            callable that takes a `Request` and returns a `Raw`.
        data_dir: folder of the files.
        image_size: side in pixels; every image is resized to a square of this side, bilinearly, whatever its aspect
            ratio. Required if the images differ in size.

    Returns:
        The three splits, with the numbers that normalise and augment them.

    Raises:
        BadInput: the name is unknown, an option is unsuitable, labels or columns do not fit, there are too few images
            or classes, or a data set of another package fails or returns anything else.
        DamagedFile: a folder or file is missing or cannot be read. Every message names the culprit.
    """
    if image_size is not None and image_size < 1:
        raise BadInput(f"image_size must be at least 1 pixel, not {image_size}")
    row = data_set(name)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise DamagedFile(f"data_dir {folder} is not a folder: pass the folder that holds {name}")
    raw = row.read(Request(name, folder, image_size, row.num_classes))
    return _assemble(name, row, raw, image_size)


def _assemble(name: str, row: DataSet, raw: Raw, image_size: int | None) -> ImageData:
    """Check the result of a reader, hold out validation (and test) images and measure mean and std."""
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
        val = val.in_memory()  # validation images are used after each epoch
    mean, std = _statistics(train)
    pad = int(min(train.images.shape[2:]) * row.pad)
    return ImageData(name, train, val, test, classes, mean, std, flip=row.flip, pad=pad)


def _resized(split: Split, size: int | None) -> Split:
    if size is None or not isinstance(split.images, Tensor) or split.images.shape[2:] == (size, size):
        return split
    return Split(F.interpolate(split.images, (size, size), mode="bilinear", antialias=True), split.labels)


def _hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Divide a split in two, the second with ``count`` images; each class loses its share, to within one image."""
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
