"""Readers: one per kind of data set, from files or the hub to images and labels.

A reader takes a :class:`Request` and returns a :class:`Raw`: the training images, the test images where there is such
a split, and the names of the classes. It raises `DamagedFile` for a file that is missing or cannot be read, `BadInput`
for an unsuitable option, column or image. What follows is the same for every data set and happens in ``pliant.data``:
the check of the labels, held-out images, mean and std.

``named`` knows where digits, Fashion-MNIST and CIFAR are found; ``idx``, ``tables`` (parquet and the hub) and
``folders`` read the formats; ``decoding`` turns encoded images into tensors, ``streaming`` batch by batch; ``base``
holds what they share.
"""

from __future__ import annotations

from collections.abc import Callable

from pliant.experiments.data.base import Raw, Request
from pliant.experiments.data.folders import read_image_folder
from pliant.experiments.data.named import read_cifar10, read_cifar100, read_digits, read_fashion_mnist
from pliant.experiments.data.tables import read_hub, read_parquet

READERS: dict[str, Callable[[Request], Raw]] = {
    "digits": read_digits,
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "image-folder": read_image_folder,
    "parquet": read_parquet,
    "hub:OWNER/NAME": read_hub,
}
