"""Folders of image files, one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import BadInput, DamagedFile
from pliant.experiments.data.base import Raw, Request, Split
from pliant.experiments.data.decoding import decode, decoder, encoded, matched
from pliant.experiments.data.streaming import IN_MEMORY, ImageFiles

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image_folder(request: Request) -> Raw:
    """Read the images under ``train/`` and ``test/``, or all images if there are only class folders.

    Without ``test/``, ``val/`` is used instead, as in ImageNet. Images that take more than `IN_MEMORY` bytes stay in
    their files until a batch needs them.
    """
    root = request.folder
    if root is None:
        raise BadInput("image-folder needs --data_dir, a folder with train/ and test/ or with one folder per class")
    root = root.absolute()  # the files may be read after a change of folder
    second = "test" if (root / "test").is_dir() else "val"
    parts = [part for part in ("train", second) if (root / part).is_dir()]
    if len(parts) == 1:
        raise DamagedFile(
            f"{root} holds {parts[0]}/ alone: expected train/ and test/ (or val/), or one folder per class"
        )
    folders = [_class_files(root / part) for part in parts] if parts else [_class_files(root)]
    classes = tuple(sorted({name for files in folders for name, _ in files}))
    number = {name: label for label, name in enumerate(classes)}
    left_at = _size_in_files(root, [file for files in folders for _, file in files], request.image_size)
    splits = []
    for files in folders:
        paths = [file for _, file in files]
        images: Tensor | ImageFiles
        if left_at is None:
            rows = ((file, encoded(file)) for file in paths)
            images = decode(rows, len(paths), request.image_size)
        else:
            images = ImageFiles(paths, left_at)
        splits.append(Split(images, torch.tensor([number[name] for name, _ in files])))
    return matched(request.name, splits, classes)


def _size_in_files(root: Path, files: list[str], size: int | None) -> int | None:
    """Return the image size if the images take too much memory and stay in their files, else None.

    With a size all images count as RGB, because their colours are not known before they are read; without a size they
    count like the first image.
    """
    if size is not None:
        return size if len(files) * 3 * size**2 > IN_MEMORY else None
    first = decoder(None)(files[0], encoded(files[0]))
    needed = len(files) * len(first.getbands()) * first.height * first.width
    if needed > IN_MEMORY:
        raise BadInput(
            f"{root}: {len(files):,} images of {first.height}x{first.width} take {needed / 2**30:.0f} GiB: give an "
            f"image_size, and more than {IN_MEMORY / 2**30:.0f} GiB of images stay in their files"
        )
    return None


def _class_files(folder: Path) -> list[tuple[str, str]]:
    """Return (class, file) for every image file under the class folders of ``folder``; other files are ignored."""
    files = [
        (child.name, file)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
        for file in sorted(_image_files(str(child)), key=lambda file: file.replace(os.sep, "\0"))  # part by part
    ]
    if not files:
        raise DamagedFile(f"{folder} holds no images: expected one folder per class with .png, .jpg or similar files")
    return files


def _image_files(folder: str) -> Iterator[str]:
    # The folders of ImageNet hold a million files: scandir lists their types without a system call for each file.
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _image_files(entry.path)
                elif not entry.name.startswith(".") and entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                    yield entry.path
    except OSError as error:
        raise DamagedFile(f"{folder} cannot be read ({error.strerror})") from error
