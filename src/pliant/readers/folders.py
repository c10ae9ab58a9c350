"""Folders of image files, one folder per class."""

from __future__ import annotations

from pathlib import Path

import torch

from pliant.errors import BadInput, DamagedFile
from pliant.readers.base import Raw, Request, Split
from pliant.readers.decoding import decode, matched

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_image_folder(request: Request) -> Raw:
    """Read the images under ``train/`` and ``test/``, or all of them where there are only class folders.

    Where there is no ``test/``, ``val/`` counts as such, as ImageNet has it.
    """
    root = request.folder
    if root is None:
        raise BadInput("image-folder needs --data_dir, a folder with train/ and test/ or with one folder per class")
    second = "test" if (root / "test").is_dir() else "val"
    parts = [part for part in ("train", second) if (root / part).is_dir()]
    if len(parts) == 1:
        raise DamagedFile(
            f"{root} holds {parts[0]}/ alone: expected train/ and test/ (or val/), or one folder per class"
        )
    found = [_class_files(root / part) for part in parts] if parts else [_class_files(root)]
    classes = tuple(sorted({name for files in found for name, _ in files}))
    number = {name: label for label, name in enumerate(classes)}
    splits = []
    for files in found:
        rows = ((str(file), {"bytes": _content(file), "path": None}) for _, file in files)
        images = decode(rows, len(files), request.image_size)
        splits.append(Split(images, torch.tensor([number[name] for name, _ in files])))
    return matched(request.name, splits, classes)


def _content(file: Path) -> bytes:
    # Read here: an image that cannot be decoded would leave its file open.
    try:
        return file.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{file} cannot be read ({error.strerror})") from error


def _class_files(folder: Path) -> list[tuple[str, Path]]:
    """Return (class, file) for every image file under the class folders of ``folder``; other files do not count."""
    files = [
        (child.name, file)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
        for file in sorted(child.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise DamagedFile(f"{folder} holds no images: expected one folder per class with .png, .jpg or similar files")
    return files
