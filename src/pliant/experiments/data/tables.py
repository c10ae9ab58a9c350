"""Tables of encoded images: parquet files and the Hugging Face hub.

A column of images holds {bytes, path}, as `datasets` writes it, or plain bytes. The image and the label column are
found by type and name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.errors import BadInput, DamagedFile, first_line
from pliant.experiments.data.base import Raw, Request, Split, extra
from pliant.experiments.data.decoding import decode, matched


def read_parquet(request: Request) -> Raw:
    """Read train*.parquet and test*.parquet of any data set of images."""
    if request.folder is None:
        raise BadInput("parquet needs --data_dir, a folder with train*.parquet and test*.parquet")
    return from_parquet(request.folder, request)


def read_hub(request: Request) -> Raw:
    """Read any data set of images from the Hugging Face hub."""
    repository = request.name.removeprefix("hub:")
    if request.folder is not None:
        raise BadInput(f"{request.name} comes from the hub: leave data_dir out, or load that folder as 'parquet'")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise BadInput(f"a data set of the hub is called hub:OWNER/NAME, not {request.name!r}")
    instead = "pass a folder with train*.parquet and test*.parquet as --data_dir of the data set 'parquet'"
    return from_hub(repository, request, instead)


class _Piece(NamedTuple):
    """The image and label column of one table, and its name for error messages."""

    origin: str
    images: Any  # pyarrow.ChunkedArray
    labels: NDArray[Any]
    names: tuple[str, ...] | None  # of the classes, if the table has them

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield, for each image, its name for error messages, and the image as {bytes, path}."""
        values = chain.from_iterable(chunk.to_pylist() for chunk in self.images.chunks)
        for row, value in enumerate(values):
            yield f"{self.origin}, row {row}", value if isinstance(value, dict) else {"bytes": value, "path": None}


def from_parquet(folder: Path, request: Request) -> Raw:
    """Read train*.parquet and test*.parquet in ``folder``."""
    return _from_pieces(request, [_read_parquet_files(folder, part) for part in ("train", "test")])


def _read_parquet_files(folder: Path, part: str) -> list[_Piece]:
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    files = sorted(folder.glob(f"{part}*.parquet"))
    if not files:
        raise DamagedFile(f"{folder} holds no {part}*.parquet: expected train*.parquet and test*.parquet there")
    pieces = []
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                table = opened.read(columns=list(_columns(str(file), opened.schema_arrow)))
            pieces.append(_piece(str(file), table, follow_paths=False))
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{file} cannot be read as parquet ({first_line(error)}): get it anew") from error
    return pieces


def from_hub(repository: str, request: Request, instead: str) -> Raw:
    """Read ``repository`` from the hub; ``instead`` is the advice in errors."""
    datasets = extra("datasets")
    try:
        splits = datasets.load_dataset(repository)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise BadInput(f"{repository!r} cannot be loaded from the Hugging Face hub ({reason}): {instead}") from error
    if "train" not in splits:
        raise BadInput(f"{repository!r} has no split 'train', only {', '.join(splits)}: {instead}")
    parts = ["train", *[part for part in ("test", "validation") if part in splits][:1]]
    tables = [(f"{repository}, {part}", splits[part].with_format("arrow")[:]) for part in parts]
    return _from_pieces(request, [[_piece(*table, follow_paths=True)] for table in tables])


def _piece(origin: str, table: Any, *, follow_paths: bool) -> _Piece:
    image, label = _columns(origin, table.schema)
    if table[label].null_count:
        raise BadInput(f"{origin}: {table[label].null_count} rows have no label in column {label!r}: drop them")
    names = getattr(extra("datasets").Features.from_arrow_schema(table.schema)[label], "names", None)
    images = table[image]
    if not follow_paths and extra("pyarrow").types.is_struct(images.type):
        # The path names a file on the machine where the table was written.
        images = extra("pyarrow.compute").struct_field(images, "bytes")
    return _Piece(origin, images, table[label].to_numpy(), names and tuple(names))


def _columns(origin: str, schema: Any) -> tuple[str, str]:
    """Find the image column (encoded bytes) and the label column (whole numbers or strings) of a table."""
    datasets = extra("datasets")
    features = datasets.Features.from_arrow_schema(schema)
    kinds = {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    images = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or kinds[name] in ("binary", "large_binary")
    ]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:  # no column is declared to hold classes: choose by name
        labels = [name for name in _LABEL_COLUMNS if kinds.get(name, "").lstrip("u").startswith(("int", "string"))]
    image = _pick(origin, "image", images, ("image", "img"), schema.names)
    return image, _pick(origin, "label", labels, _LABEL_COLUMNS, schema.names)


_LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "target")


def _pick(origin: str, what: str, candidates: list[str], preferred: Sequence[str], columns: list[str]) -> str:
    """Return the only candidate, or the first of the preferred names among several."""
    chosen = candidates if len(candidates) == 1 else [name for name in preferred if name in candidates]
    if not chosen:
        raise BadInput(
            f"{origin} has no clear {what} column among {', '.join(columns)}: "
            f"call it {' or '.join(repr(name) for name in preferred)}"
        )
    return chosen[0]


def _from_pieces(request: Request, parts: list[list[_Piece]]) -> Raw:
    """Decode the pieces of the training and, if there are any, the test images."""
    pieces = [piece for part in parts for piece in part]
    if len({(piece.labels.dtype.kind == "O", piece.names) for piece in pieces}) > 1:
        raise BadInput(f"{request.name}: the classes of {' and '.join(piece.origin for piece in pieces)} differ")
    counts = [sum(len(piece.labels) for piece in part) for part in parts]
    if 0 in counts:
        raise BadInput(f"{parts[counts.index(0)][0].origin} holds no images")
    values = np.concatenate([piece.labels for piece in pieces])
    names = pieces[0].names
    if names is None and request.num_classes is not None:
        names = tuple(str(label) for label in range(request.num_classes))
    if names is None:
        distinct, labels = np.unique(values, return_inverse=True)
        if values.dtype.kind == "i" and distinct[0] < 0:
            raise BadInput(f"{request.name} has the label {distinct[0]}: hidden labels cannot be used, drop these rows")
        names = tuple(str(label) for label in distinct)
    elif values.dtype.kind == "O":
        raise BadInput(f"{request.name}: expected labels from 0 to {len(names) - 1}, found strings as {values[0]!r}")
    else:
        labels = values
    if request.num_classes not in (None, len(names)):
        raise BadInput(f"{request.name} has {request.num_classes} classes, but {pieces[0].origin} has {len(names)}")
    splits = []
    for part, count, numbers in zip(parts, counts, np.split(labels, np.cumsum(counts)[:-1]), strict=True):
        images = decode((row for piece in part for row in piece.rows()), count, request.image_size)
        splits.append(Split(images, torch.from_numpy(numbers.astype(np.int64))))
    return matched(request.name, splits, names)
