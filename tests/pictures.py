"""Random pictures and what the tests of data sets and their readers do with them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pliant.experiments.data import Split


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def pictures(count: int, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def as_bag(*splits: Split) -> list[tuple[bytes, int]]:
    """The (image, label) pairs of some splits, in an order of their own."""
    return sorted(
        (image.contiguous().numpy().tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )


def write_images(folder: Path, images: Sequence[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        (folder / f"{number:03}.png").write_bytes(png(pixels))
