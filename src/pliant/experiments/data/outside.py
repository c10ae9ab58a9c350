"""Data sets of other packages: a reader, or a row with one, whose results are checked.

A package offers ``spirals = "my_package.sets:spirals"`` under ``[project.entry-points."pliant.data"]``. A data set of a
package that is not installed is named ``my_package.sets:spirals``. The object is a `DataSet`, or a reader: a callable
that takes a `Request` and returns a `Raw`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pliant.errors import BadInput, shown
from pliant.experiments.data.base import DataSet, Raw, Request, Split
from pliant.experiments.data.streaming import ImageFiles
from pliant.extensions import described, foreign_code


def fault(thing: object) -> str | None:
    """Return what is wrong with an object that should be a data set; None if it is one."""
    if isinstance(thing, DataSet) or callable(thing):
        return None
    return f"expected a DataSet, or a callable that takes a Request and returns a Raw, got {shown(thing)}"


def guarded(name: str, thing: Any) -> DataSet:
    """Return the row of an object without :func:`fault`; the results of its reader are checked."""
    row = thing if isinstance(thing, DataSet) else DataSet(name, thing)
    origin = described("data set", name)

    def read(request: Request) -> Raw:
        with foreign_code(f"{origin}: its reader"):
            raw = row.read(request)
        if reason := _fault_of_raw(raw, row, request):
            raise BadInput(f"{origin}: {reason}")
        return raw

    return dataclasses.replace(row, name=name, read=read)


def _fault_of_raw(raw: object, row: DataSet, request: Request) -> str | None:
    """Return what is wrong with the result of a reader; None if nothing is."""
    if not isinstance(raw, Raw):
        return f"its reader should return a Raw (train, test, classes), got {shown(raw)}"
    if not isinstance(raw.classes, tuple) or not all(isinstance(name, str) for name in raw.classes):
        return f"its classes should be a tuple of names, got {shown(raw.classes)}"
    if row.num_classes not in (None, len(raw.classes)):
        return f"its classes should be the {row.num_classes} that its row states, got {len(raw.classes)}"
    splits = {"training": raw.train} if raw.test is None else {"training": raw.train, "test": raw.test}
    for kind, split in splits.items():
        if reason := _fault_of_split(split, len(raw.classes)):
            return f"its {kind} {reason}"
    end = 4 if request.image_size is None else 2  # with a size all images are resized, and only the channels count
    shapes = {tuple(split.images.shape)[1:end] for split in splits.values()}
    if len(shapes) > 1:
        return f"its training and test images should have one shape, got {_listed(shapes)}"
    if row.shape is not None and shapes != {tuple(row.shape)[: end - 1]}:
        return f"its images should have the shape {row.shape} that its row states, got {_listed(shapes)}"
    return None


def _fault_of_split(split: object, classes: int) -> str | None:
    """Return what is wrong with a split, as the rest of a sentence after "its training"; None if nothing is."""
    if not isinstance(split, Split):
        return f"images should be a Split, got {shown(split)}"
    images, labels = split.images, split.labels
    if not isinstance(images, ImageFiles) and _kind(images) != (torch.uint8, 4, "cpu"):
        return f"images should be ImageFiles or a uint8 tensor (N, C, H, W) on the CPU, got {_brief(images)}"
    if 0 in images.shape:
        return f"images should be at least one, got the shape {tuple(images.shape)}"
    if _kind(labels) != (torch.int64, 1, "cpu"):
        return f"labels should be an int64 tensor (N,) on the CPU, got {_brief(labels)}"
    if len(labels) != images.shape[0]:
        return f"labels should be as many as its images, {images.shape[0]}, got {len(labels)}"
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        return f"labels should lie from 0 to {classes - 1} (there are {classes} classes), got {low} to {high}"
    return None


def _kind(value: object) -> tuple[torch.dtype, int, str] | None:
    return (value.dtype, value.ndim, value.device.type) if isinstance(value, Tensor) else None


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {tuple(value.shape)} on {value.device}"
    return shown(value)


def _listed(shapes: set[tuple[int, ...]]) -> str:
    return " and ".join(map(str, sorted(shapes)))
