"""IDX files, packed and plain, and the copy of Fashion-MNIST in Debian."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pliant.errors import BadInput, DamagedFile
from pliant.experiments.data import Split, load_data
from pliant.experiments.data.named import DEBIAN_FASHION_MNIST
from tests.pictures import as_bag, one_line, pictures


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder of 30 training images, packed, and 10 test images, plain."""
    for stem, count, write in (("train", 30, gzip.compress), ("t10k", 10, bytes)):
        suffix = ".gz" if write is gzip.compress else ""
        images, labels = pictures(count, (28, 28), seed=count), np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(write(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(write(idx(labels)))
    return tmp_path


def test_idx_files_are_read_packed_and_plain(fashion: Path) -> None:
    data = load_data("fashion-mnist", fashion)
    labels = torch.arange(30) % 10
    train = Split(torch.from_numpy(pictures(30, (28, 28), seed=30))[:, None], labels)
    test = Split(torch.from_numpy(pictures(10, (28, 28), seed=10))[:, None], labels[:10])
    assert as_bag(data.train, data.val) == as_bag(train)
    assert as_bag(data.test) == as_bag(test)
    assert len(data.val) == 3
    assert (data.flip, data.pad, data.classes[9]) == (True, 2, "Ankle boot")


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("t10k-images-idx3-ubyte", lambda b: b[:-100], ["7856 bytes", "found 7756"]),
        ("t10k-images-idx3-ubyte", lambda b: b + b"x", ["7856 bytes", "found 7857"]),
        ("t10k-images-idx3-ubyte", lambda b: b[:9], ["header of 16 bytes", "in 9 bytes"]),
        ("t10k-images-idx3-ubyte", lambda b: b"", ["found nothing in 0 bytes"]),
        ("t10k-images-idx3-ubyte", lambda b: b"\x89PNG" + b[4:], ["00000803", "89504e47"]),
        ("t10k-images-idx3-ubyte", lambda b: idx(pictures(0, (28, 28))), ["is empty"]),
        ("t10k-labels-idx1-ubyte", lambda b: idx(pictures(10, (1, 1))), ["1-dimensional", "00000803"]),
        ("train-images-idx3-ubyte.gz", lambda b: b[: len(b) // 2], ["23536 bytes after unpacking", "end early"]),
        ("train-images-idx3-ubyte.gz", lambda b: b[:-4], ["end early"]),
        ("train-images-idx3-ubyte.gz", lambda b: b"not packed at all", ["cannot be read"]),
    ],
)
def test_a_damaged_idx_file_is_named(fashion: Path, file: str, damage, words: list[str]) -> None:
    path = fashion / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile) as error:
        load_data("fashion-mnist", fashion)
    message = one_line(error)
    for word in (str(path), *words):
        assert word in message


def test_idx_labels_must_fit(fashion: Path) -> None:
    file = fashion / "t10k-labels-idx1-ubyte"
    file.write_bytes(idx(np.arange(9, dtype=np.uint8)))
    with pytest.raises(DamagedFile, match="10 t10k images but 9 labels"):
        load_data("fashion-mnist", fashion)
    file.write_bytes(idx(np.arange(1, 11, dtype=np.uint8)))
    with pytest.raises(BadInput, match="10 classes, but its labels run from 0 to 10"):
        load_data("fashion-mnist", fashion)
    file.unlink()
    with pytest.raises(DamagedFile, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        load_data("fashion-mnist", fashion)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian() -> None:
    data = load_data("fashion-mnist")
    assert [len(s) for s in (data.train, data.val, data.test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(data.val.labels).tolist() == [500] * 10
    assert data.mean == pytest.approx([0.286], abs=1e-3)  # as published with the data set
    assert data.std == pytest.approx([0.353], abs=1e-3)
