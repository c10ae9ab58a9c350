"""Folders of image files, one folder per class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import BadInput, DamagedFile
from pliant.readers.base import Raw, Request, Split
from pliant.readers.decoding import content, decode, matched, picture
from pliant.readers.streaming import ImageFiles

IN_MEMORY = 4 * 2**30  # bytes of decoded images; more of them stay in their files
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_image_folder(request: Request) -> Raw:
    """Read the images under ``train/`` and ``test/``, or all of them where there are only class folders.

    Where there is no ``test/``, ``val/`` counts as such, as ImageNet has it. Images that take more than `IN_MEMORY`
    bytes stay in their files until a batch asks for them.
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
    left_at = _size_in_files(root, [file for files in found for _, file in files], request.image_size)
    splits = []
    for files in found:
        paths = [file for _, file in files]
        images: Tensor | ImageFiles
        if left_at is None:
            rows = ((str(file), {"bytes": content(file), "path": None}) for file in paths)
            images = decode(rows, len(paths), request.image_size)
        else:
            images = ImageFiles(paths, left_at)
        splits.append(Split(images, torch.tensor([number[name] for name, _ in files])))
    return matched(request.name, splits, classes)


def _size_in_files(root: Path, files: list[Path], size: int | None) -> int | None:
    """Return the image size if the images take too much memory and stay in their files, else None."""
    if size is not None:
        return size if len(files) * 3 * size**2 > IN_MEMORY else None
    first = picture(str(files[0]), {"bytes": content(files[0]), "path": None}, None)
    needed = len(files) * 3 * first.height * first.width
    if needed > IN_MEMORY:
        raise BadInput(
            f"{root}: {len(files):,} images of {first.height}x{first.width} take {needed / 2**30:.0f} GiB: give an "
            f"image_size, and more than {IN_MEMORY / 2**30:.0f} GiB of images stay in their files"
        )
    return None


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
