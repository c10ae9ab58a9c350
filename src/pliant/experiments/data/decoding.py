"""From encoded images (PNG, JPEG and all other formats of Pillow) to one uint8 tensor per split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.errors import BadInput, DamagedFile, first_line
from pliant.experiments.data.base import Raw, Split, extra


def decode(rows: Iterable[tuple[str, dict[str, Any]]], count: int, size: int | None) -> Tensor:
    """Decode images into one uint8 tensor (count, C, H, W): C is 1 if all are grey, else 3.

    One thread: 60,000 images of 32x32 take about 7 s, and a pool of threads was slower in measurement.

    Args:
        rows: for each image, its name for error messages, and the image as {bytes, path}.
        count: number of rows.
        size: side of the square images; None leaves them unchanged.

    Raises:
        BadInput: the images differ in size, or an image does not have 8 bits.
        DamagedFile: an image cannot be decoded.
    """
    picture = decoder(size)
    pixels = np.empty((0, 0, 0, 1), np.uint8)
    for row, (origin, value) in enumerate(rows):
        image = picture(origin, value)
        if row == 0:
            pixels = np.empty((count, image.height, image.width, len(image.mode)), np.uint8)
        shape, expected = (image.height, image.width), pixels.shape[1:3]
        if shape != expected:
            raise BadInput(
                f"{origin} is {_times(shape)} pixels, the images before {_times(expected)}: give an image_size"
            )
        if image.mode == "RGB" and pixels.shape[3] == 1:
            pixels = np.repeat(pixels, 3, axis=3)  # all were grey so far
        pixels[row] = np.asarray(image).reshape(*shape, -1)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def decoder(size: int | None) -> Callable[[str, dict[str, Any]], Any]:
    """Return a function that decodes {bytes, path} to a Pillow image, grey ("L") or "RGB".

    Its arguments are a name of the image for error messages, and the image. Several threads may use it.

    Args:
        size: side of the square that images are resized to; None leaves them unchanged.
    """
    decode_example, pillow = extra("datasets").Image().decode_example, extra("PIL.Image")
    pillow.init()  # load all formats now: Pillow would do so at the first image, perhaps in two threads
    damaged = (OSError, ValueError, SyntaxError, pillow.DecompressionBombError)  # what Pillow's readers raise

    def picture(origin: str, value: dict[str, Any]) -> Any:
        try:
            image = decode_example(value)
        except damaged as error:
            raise DamagedFile(f"{origin}: cannot be decoded as an image ({first_line(error)})") from error
        if image.mode[0] in "IF":
            raise BadInput(f"{origin}: expected 8-bit pixels, found Pillow's mode {image.mode}: convert the image")
        image = image.convert("L" if image.mode in ("1", "L", "La", "LA") else "RGB")
        return image if size is None else image.resize((size, size), pillow.Resampling.BILINEAR)

    return picture


def encoded(file: str) -> dict[str, Any]:
    """Return a file as {bytes, path}, read here, because an image that cannot be decoded would leave its file open."""
    try:
        return {"bytes": Path(file).read_bytes(), "path": None}
    except OSError as error:
        raise DamagedFile(f"{file} cannot be read ({error.strerror})") from error


def matched(name: str, splits: list[Split], classes: tuple[str, ...]) -> Raw:
    """Bring the training and, if there are any, the test images to one number of channels; refuse different sizes."""
    sizes = {tuple(split.images.shape[2:]) for split in splits}
    if len(sizes) > 1:
        raise BadInput(f"{name}: training and test images are {' and '.join(map(_times, sizes))}: give an image_size")
    channels = max(split.images.shape[1] for split in splits)
    train, *test = [_coloured(split, channels) for split in splits]
    return Raw(train, test[0] if test else None, classes)


def _coloured(split: Split, channels: int) -> Split:
    if split.images.shape[1] == channels or not isinstance(split.images, Tensor):
        return split
    return Split(split.images.expand(-1, channels, -1, -1), split.labels)


def _times(size: Sequence[int]) -> str:
    return "x".join(str(length) for length in size)
