"""Image data sets of the experiments, as tensors in memory, and the loader that feeds them to a network.

`load_data` reads a data set by name into an `ImageData`: three `Split`s (train, val, test) of uint8 images with
what is needed to normalise and augment them. A `Loader` walks over one split in batches.

The splits are a property of the data set, not of a run: the validation images (5,000, or 10 % where there are
fewer than 50,000 training images) and, where a data set has no test split, the test images (20 %) are chosen once,
stratified by class, and are the same for every training seed. Everything fits in memory: N·C·H·W bytes.

Pillow, pyarrow and `datasets` belong to the extra ``pliant[data]`` and are imported where they are used; `digits`
and `fashion-mnist` from IDX files need none of them.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pliant.errors import BadInput, DamagedFile, unknown

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
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLIT_SEED = 0  # of the held-out images; changing it changes every result


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split: uint8 images (N, C, H, W) in 0..255, int64 labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory.

    ``mean`` and ``std`` hold one number per channel, measured on ``train``, for pixels scaled to [0, 1]. ``flip``
    says whether a mirrored image still belongs to its class, ``pad`` by how many pixels a random crop may shift it.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    pad: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(name: str, data_dir: str | Path | None = None, *, image_size: int | None = None) -> ImageData:
    """Read the data set ``name`` into memory.

    =================  ==========================================  ==========================================
    name               images                                      from
    =================  ==========================================  ==========================================
    ``digits``         1,797 of 1x8x8, 10 classes                  scikit-learn, embedded; 20 % are the test
    ``fashion-mnist``  70,000 of 1x28x28, 10 classes               ``data_dir`` with the four IDX files (.gz
                                                                   or plain), else Debian's package, else hub
    ``cifar10``        60,000 of 3x32x32, 10 classes               ``data_dir`` with train*.parquet and
                                                                   test*.parquet, else hub
    ``cifar100``       60,000 of 3x32x32, 100 (fine) classes       as ``cifar10``
    ``parquet``        any; an image and a label column are found  ``data_dir`` with train*.parquet and
                       by type and name                            test*.parquet
    ``image-folder``   any; one folder of image files per class    ``data_dir`` with train/ and test/, or with
                                                                   the class folders (20 % are the test)
    ``hub:OWNER/X``    any; columns as in ``parquet``              the Hugging Face hub: splits train and test,
                                                                   else validation as test, else 20 % of train
    =================  ==========================================  ==========================================

    ``image_size`` (pixels) resizes every image to a square, bilinearly, without keeping its aspect ratio; it is
    required where the images differ in size. Images become RGB unless all of them are grey.

    Raises `BadInput` for an unknown name, an unsuitable option, labels or columns that do not fit, or too few images
    or classes; `DamagedFile` for a folder or file that is missing or cannot be read. Each names the culprit.
    """
    if image_size is not None and image_size < 1:
        raise BadInput(f"image_size must be at least 1 pixel, not {image_size}")
    kind = "hub:OWNER/NAME" if name.startswith("hub:") else name
    if kind not in _READERS:
        raise unknown("data set", name, _READERS)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise DamagedFile(f"data_dir {folder} is not a folder: pass the folder that holds {name}")
    raw = _READERS[kind](_Request(name, folder, image_size))
    return _assemble(name, raw, image_size)


class Loader:
    """Batches of one split, normalised and, if asked, augmented: an iterable of (images, labels).

    Images are float32 (B, C, H, W) in ``channels_last``, normalised by the data set's mean and std; labels int64 (B,).
    Order and augmentation depend on (seed, epoch) alone, on every machine and for every batch size, and neither reads
    nor moves torch's global random state. Call `set_epoch` before each epoch: without it all epochs are the same.

    ``augment`` shifts every image by up to ``data.pad`` pixels (the crop of a zero-padded image) and, where
    ``data.flip`` allows it, mirrors half of them. ``limit`` keeps at most that many images, a random choice that
    depends on ``seed`` alone. The last batch may be smaller, except that under ``shuffle``, that is in training, a
    last batch of a single image joins the one before it: BatchNorm cannot normalise one 1x1 image.

    Raises `BadInput` for an unknown split, a batch size or limit below 1, a negative seed or epoch.
    """

    def __init__(
        self,
        data: ImageData,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        splits = {"train": data.train, "val": data.val, "test": data.test}
        if split not in splits:
            raise unknown("split", split, splits)
        if batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, not {batch_size}")
        if limit is not None and limit < 1:
            raise BadInput(f"limit must be at least 1 image, not {limit}; leave it out to take the whole split")
        if seed < 0:
            raise BadInput(f"seed must not be negative, got {seed}")
        self.data = data
        self.split = splits[split]
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._chosen = torch.arange(len(self.split))
        if limit is not None:
            self._chosen = torch.randperm(len(self.split), generator=_generator(seed))[:limit]
        count = len(self._chosen)
        self._bounds = [*range(0, count, batch_size), count]
        if shuffle and count > batch_size > 1 and count % batch_size == 1:
            del self._bounds[-2]
        # x/255 − mean, over std, as one product and one sum
        std = torch.tensor(data.std, dtype=torch.float64).view(-1, 1, 1)
        mean = torch.tensor(data.mean, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (1 / (255 * std)).float()
        self._shift = (-mean / std).float()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next iteration; epochs count from 0."""
        if epoch < 0:
            raise BadInput(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = _generator(self.seed, self.epoch)
        order = self._chosen
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        # Drawn for the whole epoch at once: what happens to an image does not depend on the batch size.
        shifts = torch.randint(0, 2 * self.data.pad + 1, (2, len(order)), generator=generator)
        mirrored = torch.randint(0, 2, (len(order),), generator=generator).bool() & self.data.flip
        for start, stop in pairwise(self._bounds):
            index = order[start:stop]
            images = self.split.images[index]
            if self.augment:
                top, left = shifts[:, start:stop]
                images = _crop(images, self.data.pad, top, left)
                images = torch.where(mirrored[start:stop, None, None, None], images.flip(3), images)
            pixels = images.to(torch.float32, memory_format=torch.channels_last)
            yield pixels.mul_(self._scale).add_(self._shift), self.split.labels[index]


def _crop(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad (B, C, H, W) with zeros and cut out of each image the H x W window at its ``top``, ``left`` (B,)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2·pad+1, 2·pad+1, H, W)
    return windows.permute(0, 2, 3, 1, 4, 5)[torch.arange(len(images)), top, left]


def _generator(seed: int, *stream: int) -> torch.Generator:
    """Return a generator of its own for (seed, stream); SeedSequence keeps neighbouring seeds and epochs apart."""
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


class _Request(NamedTuple):
    """What a reader is asked for: the data set's full name, its folder, the image size (None: as it is)."""

    name: str
    folder: Path | None
    image_size: int | None


class _Raw(NamedTuple):
    """What a reader returns: all training images, the test images (None: there is no such split), class names."""

    train: Split
    test: Split | None
    classes: tuple[str, ...]


def _assemble(name: str, raw: _Raw, image_size: int | None) -> ImageData:
    """Check what a reader found, hold out validation (and test) images and measure mean and std."""
    train, test, classes = raw
    if len(classes) < 2:
        raise BadInput(f"{name} has the classes {list(classes)}: at least 2 are needed")
    labels = torch.cat([split.labels for split in (train, test) if split is not None])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise BadInput(f"{name} has {len(classes)} classes, but its labels run from {low} to {high}")
    train = _resized(train, image_size)
    if test is None:
        train, test = _hold_out(train, len(train) // 5)
    else:
        test = _resized(test, image_size)
    if len(train) < 10 or len(test) < 1:
        raise BadInput(
            f"{name} has {len(train)} training and {len(test)} test images: "
            "at least 10 (a tenth is held out for validation) and 1 are needed"
        )
    train, val = _hold_out(train, 5_000 if len(train) >= 50_000 else len(train) // 10)
    mean, std = _statistics(train.images)
    side = min(train.images.shape[2:])
    pad = side // 14 if name == "fashion-mnist" else side // 8
    return ImageData(name, train, val, test, classes, mean, std, flip=name != "digits", pad=pad)


def _resized(split: Split, size: int | None) -> Split:
    if size is None or split.images.shape[2:] == (size, size):
        return split
    return Split(F.interpolate(split.images, (size, size), mode="bilinear", antialias=True), split.labels)


def _hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Divide a split in two, the second of ``count`` images; each class loses its share, give or take one image."""
    labels = split.labels.numpy()
    # RandomState, not default_rng: numpy guarantees its stream for ever, and these images must never change.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    held = np.zeros(len(labels), dtype=bool)
    if count:
        held[by_class[(2 * np.arange(count) + 1) * len(labels) // (2 * count)]] = True  # evenly spaced
    mask = torch.from_numpy(held)
    return Split(split.images[~mask], split.labels[~mask]), Split(split.images[mask], split.labels[mask])


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of pixels in [0, 1]; a constant channel counts as std 1."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in images.split(2048):  # bounds the memory of the float64 copy; the sums are whole numbers, exact
        pixels = part.double()
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std[std == 0] = 255  # nothing to scale, and a division by 0 would make every pixel NaN
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# Readers: one per kind of data set, each _Request -> _Raw.


def _read_digits(request: _Request) -> _Raw:
    from sklearn.datasets import load_digits

    if request.folder is not None:
        raise BadInput("digits comes with scikit-learn and reads no files: leave data_dir out")
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0..16 to 0..255
    images = torch.from_numpy(pixels)[:, None]
    return _Raw(Split(images, torch.from_numpy(bunch.target.astype(np.int64))), None, tuple("0123456789"))


def _read_fashion_mnist(request: _Request) -> _Raw:
    folder = request.folder
    if folder is None and DEBIAN_FASHION_MNIST.is_dir():
        folder = DEBIAN_FASHION_MNIST
    if folder is None:
        needs = "train-images-idx3-ubyte.gz and the three other IDX files"
        return _from_hub("zalando-datasets/fashion_mnist", request, 10, f"pass --data_dir, a folder with {needs}")
    return _Raw(_idx_split(folder, "train"), _idx_split(folder, "t10k"), FASHION_CLASSES)


def _read_cifar10(request: _Request) -> _Raw:
    return _read_cifar(request, 10)


def _read_cifar100(request: _Request) -> _Raw:
    return _read_cifar(request, 100)


def _read_cifar(request: _Request, num_classes: int) -> _Raw:
    if request.folder is not None:
        return _from_parquet(request.folder, request, num_classes)
    instead = f"pass --data_dir, a folder with train*.parquet and test*.parquet of {request.name}"
    return _from_hub(f"uoft-cs/{request.name}", request, num_classes, instead)


def _read_parquet(request: _Request) -> _Raw:
    if request.folder is None:
        raise BadInput("parquet needs --data_dir, a folder with train*.parquet and test*.parquet")
    return _from_parquet(request.folder, request, None)


def _read_hub(request: _Request) -> _Raw:
    repository = request.name.removeprefix("hub:")
    if request.folder is not None:
        raise BadInput(f"{request.name} comes from the hub: leave data_dir out, or load that folder as 'parquet'")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise BadInput(f"a data set of the hub is called hub:OWNER/NAME, not {request.name!r}")
    instead = "pass a folder with train*.parquet and test*.parquet as --data_dir of the data set 'parquet'"
    return _from_hub(repository, request, None, instead)


def _read_image_folder(request: _Request) -> _Raw:
    root = request.folder
    if root is None:
        raise BadInput("image-folder needs --data_dir, a folder with train/ and test/ or with one folder per class")
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    if len(parts) == 1:
        raise DamagedFile(f"{root} holds {parts[0]}/ alone: expected train/ and test/, or one folder per class")
    found = [_class_files(root / part) for part in parts] if parts else [_class_files(root)]
    classes = tuple(sorted({name for files in found for name, _ in files}))
    number = {name: label for label, name in enumerate(classes)}
    splits = []
    for files in found:
        rows = ((str(file), {"bytes": None, "path": str(file)}) for _, file in files)
        images = _decode(rows, len(files), request.image_size)
        splits.append(Split(images, torch.tensor([number[name] for name, _ in files])))
    return _matched(request.name, splits, classes)


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


_READERS: dict[str, Callable[[_Request], _Raw]] = {
    "digits": _read_digits,
    "fashion-mnist": _read_fashion_mnist,
    "cifar10": _read_cifar10,
    "cifar100": _read_cifar100,
    "image-folder": _read_image_folder,
    "parquet": _read_parquet,
    "hub:OWNER/NAME": _read_hub,
}


# IDX, the format of MNIST (http://yann.lecun.com/exdb/mnist/): two zero bytes, the type (8 is uint8), the number of
# dimensions, each dimension as a big-endian uint32, then the values.


def _idx_split(folder: Path, stem: str) -> Split:
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DamagedFile(f"{folder} holds {len(images)} {stem} images but {len(labels)} labels: get both files anew")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def _read_idx(folder: Path, name: str, ndim: int) -> NDArray[np.uint8]:
    """Read the uint8 array of ``ndim`` dimensions in ``folder/name`` or, packed, in ``folder/name.gz``."""
    file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise DamagedFile(f"{folder} holds neither {name} nor {name}.gz: expected the four IDX files there")
    complete = True
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            unpacker = zlib.decompressobj(wbits=31)  # 31: with gzip header and checksum
            data = unpacker.decompress(data)
            complete = unpacker.eof
    except (OSError, zlib.error) as error:
        raise DamagedFile(f"{file} cannot be read ({error}): get it anew") from error
    header = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)) or len(data) < header:
        raise DamagedFile(
            f"{file} is not an IDX file of {ndim}-dimensional uint8: expected a header of {header} bytes that starts "
            f"with 0000080{ndim}, found {data[:4].hex() or 'nothing'} in {len(data)} bytes"
        )
    shape = tuple(np.frombuffer(data, ">u4", ndim, offset=4).tolist())
    if 0 in shape:
        raise DamagedFile(f"{file} is empty: its header announces an array of shape {shape}")
    expected = header + math.prod(shape)
    if len(data) != expected or not complete:
        unpacked = " after unpacking" if file.suffix == ".gz" else ""
        ends = "" if complete else ", and the packed data end early"
        raise DamagedFile(
            f"{file} is damaged: its header announces {expected} bytes{unpacked}, found {len(data)}{ends}: get it anew"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


# Tables of encoded images: parquet files and the hub. A column of images holds {bytes, path}, as `datasets` writes
# it, or plain bytes.


class _Piece(NamedTuple):
    """The image and label column of one table, and what to call it in an error."""

    origin: str
    images: Any  # pyarrow.ChunkedArray
    labels: NDArray[Any]
    names: tuple[str, ...] | None  # of the classes, where the table knows them

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what to call each image in an error and the image as {bytes, path}."""
        values = chain.from_iterable(chunk.to_pylist() for chunk in self.images.chunks)
        for row, value in enumerate(values):
            yield f"{self.origin}, row {row}", value if isinstance(value, dict) else {"bytes": value, "path": None}


def _from_parquet(folder: Path, request: _Request, num_classes: int | None) -> _Raw:
    return _from_pieces(request, [_read_parquet_files(folder, part) for part in ("train", "test")], num_classes)


def _read_parquet_files(folder: Path, part: str) -> list[_Piece]:
    arrow, parquet = _extra("pyarrow"), _extra("pyarrow.parquet")
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
            raise DamagedFile(f"{file} cannot be read as parquet ({_first_line(error)}): get it anew") from error
    return pieces


def _from_hub(repository: str, request: _Request, num_classes: int | None, instead: str) -> _Raw:
    datasets = _extra("datasets")
    try:
        found = datasets.load_dataset(repository)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = _first_line(error)
        raise BadInput(f"{repository!r} cannot be loaded from the Hugging Face hub ({reason}): {instead}") from error
    if "train" not in found:
        raise BadInput(f"{repository!r} has no split 'train', only {', '.join(found)}: {instead}")
    parts = ["train", *[part for part in ("test", "validation") if part in found][:1]]
    tables = [(f"{repository}, {part}", found[part].with_format("arrow")[:]) for part in parts]
    return _from_pieces(request, [[_piece(*table, follow_paths=True)] for table in tables], num_classes)


def _piece(origin: str, table: Any, *, follow_paths: bool) -> _Piece:
    image, label = _columns(origin, table.schema)
    if table[label].null_count:
        raise BadInput(f"{origin}: {table[label].null_count} rows have no label in column {label!r}: drop them")
    names = getattr(_extra("datasets").Features.from_arrow_schema(table.schema)[label], "names", None)
    images = table[image]
    if not follow_paths and _extra("pyarrow").types.is_struct(images.type):
        # The path names a file on the machine of whoever wrote the table.
        images = _extra("pyarrow.compute").struct_field(images, "bytes")
    return _Piece(origin, images, table[label].to_numpy(), names and tuple(names))


def _columns(origin: str, schema: Any) -> tuple[str, str]:
    """Find the image column (encoded bytes) and the label column (whole numbers or strings) of a table."""
    datasets = _extra("datasets")
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
    if not labels:  # no column says that it holds classes: go by the name
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


def _from_pieces(request: _Request, parts: list[list[_Piece]], num_classes: int | None) -> _Raw:
    """Decode the pieces of train and, if there, test; ``num_classes`` is given where the data set's name fixes it."""
    pieces = [piece for part in parts for piece in part]
    if len({(piece.labels.dtype.kind == "O", piece.names) for piece in pieces}) > 1:
        raise BadInput(f"{request.name}: the classes of {' and '.join(piece.origin for piece in pieces)} differ")
    counts = [sum(len(piece.labels) for piece in part) for part in parts]
    if 0 in counts:
        raise BadInput(f"{parts[counts.index(0)][0].origin} holds no images")
    values = np.concatenate([piece.labels for piece in pieces])
    names = pieces[0].names
    if names is None and num_classes is not None:
        names = tuple(str(label) for label in range(num_classes))
    if names is None:
        distinct, labels = np.unique(values, return_inverse=True)
        if values.dtype.kind == "i" and distinct[0] < 0:
            raise BadInput(f"{request.name} has the label {distinct[0]}: hidden labels cannot be used, drop these rows")
        names = tuple(str(label) for label in distinct)
    elif values.dtype.kind == "O":
        raise BadInput(f"{request.name}: expected labels from 0 to {len(names) - 1}, found strings as {values[0]!r}")
    else:
        labels = values
    if num_classes not in (None, len(names)):
        raise BadInput(f"{request.name} has {num_classes} classes, but {pieces[0].origin} has {len(names)}")
    splits = []
    for part, count, numbers in zip(parts, counts, np.split(labels, np.cumsum(counts)[:-1]), strict=True):
        images = _decode((row for piece in part for row in piece.rows()), count, request.image_size)
        splits.append(Split(images, torch.from_numpy(numbers.astype(np.int64))))
    return _matched(request.name, splits, names)


def _decode(rows: Iterable[tuple[str, dict[str, Any]]], count: int, size: int | None) -> Tensor:
    """Decode ``count`` (what to call it, {bytes, path}) into uint8 (count, C, H, W): C is 1 if all are grey, else 3.

    One thread: 60,000 images of 32x32 take some 7 s, and a pool of threads was slower in measurement.
    """
    decode, pillow = _extra("datasets").Image().decode_example, _extra("PIL.Image")
    damaged = (OSError, ValueError, SyntaxError, pillow.DecompressionBombError)  # what Pillow's readers raise
    pixels = np.empty((0, 0, 0, 1), np.uint8)
    for row, (origin, value) in enumerate(rows):
        try:
            image = decode(value)
        except damaged as error:
            raise DamagedFile(f"{origin}: cannot be decoded as an image ({_first_line(error)})") from error
        if image.mode[0] in "IF":
            raise BadInput(f"{origin}: expected 8-bit pixels, found Pillow's mode {image.mode}: convert the image")
        image = image.convert("L" if image.mode in ("1", "L", "La", "LA") else "RGB")
        if size is not None:
            image = image.resize((size, size), pillow.Resampling.BILINEAR)
        if row == 0:
            pixels = np.empty((count, image.height, image.width, len(image.mode)), np.uint8)
        found, expected = (image.height, image.width), pixels.shape[1:3]
        if found != expected:
            raise BadInput(
                f"{origin} is {_shape(found)} pixels, the images before {_shape(expected)}: give an image_size"
            )
        if image.mode == "RGB" and pixels.shape[3] == 1:
            pixels = np.repeat(pixels, 3, axis=3)  # all were grey so far
        pixels[row] = np.asarray(image).reshape(*found, -1)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _matched(name: str, splits: list[Split], classes: tuple[str, ...]) -> _Raw:
    """Bring train and, if there, test to the same number of channels and refuse different sizes."""
    sizes = {tuple(split.images.shape[2:]) for split in splits}
    if len(sizes) > 1:
        raise BadInput(f"{name}: training and test images are {' and '.join(map(_shape, sizes))}: give an image_size")
    channels = max(split.images.shape[1] for split in splits)
    train, *test = [Split(split.images.expand(-1, channels, -1, -1), split.labels) for split in splits]
    return _Raw(train, test[0] if test else None, classes)


def _shape(size: Sequence[int]) -> str:
    return "x".join(str(length) for length in size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _extra(module: str) -> Any:
    """Import a module of the extra ``pliant[data]``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"image files need the package {module} ({error}): pip install 'pliant[data]'") from error
