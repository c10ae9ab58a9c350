"""The readers of digits, Fashion-MNIST, CIFAR-10 and CIFAR-100, which know where each is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pliant.errors import BadInput
from pliant.experiments.data.base import Raw, Request, Split
from pliant.experiments.data.idx import idx_split
from pliant.experiments.data.tables import from_hub, from_parquet

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_digits(request: Request) -> Raw:
    """Read the digits of scikit-learn, which have no test split."""
    from sklearn.datasets import load_digits

    if request.folder is not None:
        raise BadInput("digits comes with scikit-learn and reads no files: leave data_dir out")
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0..16 to 0..255
    images = torch.from_numpy(pixels)[:, None]
    return Raw(Split(images, torch.from_numpy(bunch.target.astype(np.int64))), None, tuple("0123456789"))


def read_fashion_mnist(request: Request) -> Raw:
    """Read the four IDX files of the given folder, else of Debian's package, else the copy on the hub."""
    folder = request.folder
    if folder is None and DEBIAN_FASHION_MNIST.is_dir():
        folder = DEBIAN_FASHION_MNIST
    if folder is None:
        needs = "train-images-idx3-ubyte.gz and the three other IDX files"
        return from_hub("zalando-datasets/fashion_mnist", request, f"pass --data_dir, a folder with {needs}")
    return Raw(idx_split(folder, "train"), idx_split(folder, "t10k"), FASHION_CLASSES)


def read_cifar(request: Request) -> Raw:
    """Read CIFAR-10, or CIFAR-100 with its fine labels, from parquet files or the hub."""
    if request.folder is not None:
        return from_parquet(request.folder, request)
    instead = f"pass --data_dir, a folder with train*.parquet and test*.parquet of {request.name}"
    return from_hub(f"uoft-cs/{request.name}", request, instead)
