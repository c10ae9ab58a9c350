from __future__ import annotations

import gzip
import io
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from pliant.data import DEBIAN_FASHION_MNIST, ImageData, Loader, Split, load_data
from pliant.errors import BadInput, DamagedFile

SHARED = Path(os.environ.get("PLIANT_SHARED", Path(__file__).parents[2] / "shared"))


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


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_images_of_scikit_learn_scaled_to_a_byte() -> None:
    data = load_data("digits")
    source = load_digits()
    expected = Split(
        torch.from_numpy(np.round(source.images * 15.9375).astype(np.uint8))[:, None],
        torch.from_numpy(source.target),
    )
    assert data.image_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert (data.train.images.dtype, data.train.labels.dtype) == (torch.uint8, torch.int64)
    assert int(data.train.images.max()) == 255
    assert (data.flip, data.pad) == (False, 1)
    assert as_bag(data.train, data.val, data.test) == as_bag(expected)


def test_splits_are_stratified_and_never_change() -> None:
    data, again = load_data("digits"), load_data("digits")
    assert [len(s) for s in (data.train, data.val, data.test)] == [1295, 143, 359]
    total = torch.bincount(torch.cat([data.train.labels, data.val.labels, data.test.labels]))
    for split, share in ((data.test, 359 / 1797), (data.val, 143 / 1797)):
        assert (torch.bincount(split.labels) - share * total).abs().max() <= 1.5
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(data, name).images, getattr(again, name).images)
    # Results of different versions can be compared only as long as these stay.
    assert data.test.labels[:12].tolist() == PINNED_TEST
    assert data.val.labels[:12].tolist() == PINNED_VAL


PINNED_TEST = [1, 4, 8, 0, 5, 5, 0, 4, 7, 0, 2, 2]
PINNED_VAL = [5, 3, 6, 7, 9, 5, 8, 4, 1, 6, 5, 8]


def test_mean_and_std_are_those_of_the_training_images() -> None:
    data = load_data("digits")
    pixels = data.train.images.numpy() / 255
    assert data.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert data.std == pytest.approx([pixels.std()], rel=1e-9)


def test_image_size_resizes_an_embedded_set() -> None:
    data = load_data("digits", image_size=16)
    assert data.image_shape == (1, 16, 16)
    assert data.pad == 2
    small = load_data("digits")
    assert data.mean == pytest.approx(small.mean, abs=0.02)
    assert torch.equal(data.test.labels, small.test.labels)


# ---------------------------------------------------------------------------------------------- Fashion-MNIST, IDX


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


# --------------------------------------------------------------------------------------------------------- parquet


def write_parquet(
    file: Path,
    images: Sequence[np.ndarray | bytes],
    labels: Sequence[object],
    *,
    names: list[str] | None = None,
    image: str = "img",
    label: str = "label",
    plain_bytes: bool = False,
) -> None:
    encoded = [pixels if isinstance(pixels, bytes) else png(pixels) for pixels in images]
    cells = encoded if plain_bytes else [{"bytes": data, "path": "elsewhere.png"} for data in encoded]
    table = pa.table({"index": list(range(len(labels))), image: cells, label: list(labels)})
    if names is not None:
        features = datasets.Features.from_arrow_schema(table.schema)
        features[label] = datasets.ClassLabel(names=names)
        features[image] = datasets.Image()
        table = table.cast(features.arrow_schema)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_both(folder: Path, **options) -> np.ndarray:
    """Write 20 training images in two files and 4 test images of 6x10 pixels, 2 classes; return the training images."""
    images = pictures(20, (6, 10, 3))
    labels = options.pop("labels", [0, 1])
    write_parquet(folder / "train-0.parquet", images[:12], labels * 6, **options)
    write_parquet(folder / "train-1.parquet", images[12:], labels * 4, **options)
    write_parquet(folder / "test-0.parquet", pictures(4, (6, 10, 3), seed=1), labels * 2, **options)
    return images


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, ("0", "1")),
        ({"names": ["cat", "dog"]}, ("cat", "dog")),
        ({"labels": ["cat", "dog"]}, ("cat", "dog")),
        ({"labels": [3, 70]}, ("3", "70")),
        ({"plain_bytes": True, "image": "picture", "label": "target"}, ("0", "1")),
    ],
)
def test_parquet_gives_the_pixels_and_labels_that_were_written(tmp_path: Path, options, classes) -> None:
    images = write_both(tmp_path, **options)
    data = load_data("parquet", tmp_path)
    expected = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.arange(20) % 2)
    assert data.classes == classes
    assert data.image_shape == (3, 6, 10)
    assert as_bag(data.train, data.val) == as_bag(expected)
    assert (len(data.val), len(data.test)) == (2, 4)
    pixels = torch.cat([data.train.images]).double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_image_columns_of_other_names_must_be_clear(tmp_path: Path) -> None:
    table = pa.table({"a": [b"1"], "b": [b"2"], "label": [0]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(BadInput, match=r"no clear image column among a, b, label: call it 'image' or 'img'"):
        load_data("parquet", tmp_path)
    pq.write_table(table.drop_columns(["a", "label"]), tmp_path / "train.parquet")
    with pytest.raises(BadInput, match="no clear label column among b"):
        load_data("parquet", tmp_path)


def test_parquet_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"holds no train\*\.parquet"):
        load_data("parquet", tmp_path)
    write_both(tmp_path)
    file = tmp_path / "train-1.parquet"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:200] + bytes(len(whole) - 400) + whole[-200:]):
        file.write_bytes(broken)
        with pytest.raises(DamagedFile) as error:
            load_data("parquet", tmp_path)
        assert str(file) in one_line(error)
    file.write_bytes(whole)
    (tmp_path / "test-0.parquet").unlink()
    with pytest.raises(DamagedFile, match=r"holds no test\*\.parquet"):
        load_data("parquet", tmp_path)


@pytest.mark.parametrize(
    "broken", [png(pictures(1, (6, 10, 3))[0])[:120], b"", b"no image"], ids=["cut", "empty", "text"]
)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, broken: bytes) -> None:
    write_both(tmp_path)
    images = [*pictures(3, (6, 10, 3)), broken]
    write_parquet(tmp_path / "train-1.parquet", images, [0, 1, 0, 1])
    with pytest.raises(DamagedFile) as error:
        load_data("parquet", tmp_path)
    assert "train-1.parquet, row 3: cannot be decoded" in one_line(error)


def test_a_path_inside_a_parquet_file_is_not_followed(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "secret.png").write_bytes(png(pictures(1, (6, 10, 3))[0]))
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"img": cells, "label": [0]}), tmp_path / "train-2.parquet")
    with pytest.raises(DamagedFile, match=r"train-2\.parquet, row 0"):
        load_data("parquet", tmp_path)


def test_labels_must_fit_the_classes(tmp_path: Path) -> None:
    write_both(tmp_path, labels=[0, None])
    with pytest.raises(BadInput, match="6 rows have no label in column 'label'"):
        load_data("parquet", tmp_path)
    write_both(tmp_path, labels=[0, -1])
    with pytest.raises(BadInput, match="hidden labels"):
        load_data("parquet", tmp_path)
    write_both(tmp_path, labels=[4, 4])
    with pytest.raises(BadInput, match="at least 2 are needed"):
        load_data("parquet", tmp_path)
    write_both(tmp_path, labels=[0, 10])
    with pytest.raises(BadInput, match="cifar10 has 10 classes, but its labels run from 0 to 10"):
        load_data("cifar10", tmp_path)
    write_both(tmp_path, names=["cat", "dog"])
    with pytest.raises(BadInput, match=r"cifar100 has 100 classes, but .* has 2"):
        load_data("cifar100", tmp_path)
    write_parquet(tmp_path / "test-0.parquet", pictures(2, (6, 10, 3)), ["cat", "dog"])
    with pytest.raises(BadInput, match=r"the classes of .* differ"):
        load_data("parquet", tmp_path)


def test_a_class_without_training_images_is_allowed(tmp_path: Path) -> None:
    write_both(tmp_path, names=["cat", "dog", "unicorn"])
    assert load_data("parquet", tmp_path).num_classes == 3


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 4)):
        cells = [{"bytes": png(pixels), "path": None} for pixels in pictures(count, (32, 32, 3))]
        columns = {"img": cells, "coarse_label": [0] * count, "fine_label": list(range(count))}
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    data = load_data("cifar100", tmp_path)
    assert data.num_classes == 100
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert (data.flip, data.pad) == (True, 4)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data/cifar10").is_dir(), reason="needs the parquet files of CIFAR-10")
def test_cifar10() -> None:
    folder = SHARED / "data/cifar10"
    data = load_data("cifar10", folder)
    assert [len(s) for s in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    assert data.classes[:2] == ("airplane", "automobile")
    assert torch.bincount(data.val.labels).tolist() == [500] * 10
    # Krizhevsky's images have 0.4914, 0.4822, 0.4465 over all 50,000.
    assert data.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    first = pq.read_table(next(folder.glob("test*.parquet"))).slice(0, 50).to_pylist()
    for row, image, label in zip(first, data.test.images, data.test.labels, strict=False):
        pixels = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
        assert int(label) == row["label"]


# ---------------------------------------------------------------------------------------------------- image folders


def write_images(folder: Path, images: Sequence[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        (folder / f"{number:03}.png").write_bytes(png(pixels))


def test_image_folder_with_train_and_test(tmp_path: Path) -> None:
    cats, dogs = pictures(8, (16, 24, 3), seed=1), pictures(6, (16, 24, 3), seed=2)
    write_images(tmp_path / "train/dog", dogs)
    write_images(tmp_path / "train/cat", cats)
    write_images(tmp_path / "test/dog", pictures(2, (16, 24, 3), seed=3))
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    data = load_data("image-folder", str(tmp_path))
    expected = Split(
        torch.from_numpy(np.concatenate([cats, dogs])).permute(0, 3, 1, 2), torch.tensor([0] * 8 + [1] * 6)
    )
    assert data.classes == ("cat", "dog")
    assert as_bag(data.train, data.val) == as_bag(expected)
    assert data.test.labels.tolist() == [1, 1]
    assert (data.flip, data.pad) == (True, 2)


def test_image_folder_of_classes_gives_a_fifth_to_the_test(tmp_path: Path) -> None:
    images = {name: pictures(20, (8, 8), seed=seed) for seed, name in enumerate("ab")}
    for name in images:
        write_images(tmp_path / "odd [name]*" / name, images[name])
    data = load_data("image-folder", tmp_path / "odd [name]*")
    assert data.image_shape == (1, 8, 8)
    assert torch.bincount(data.test.labels).tolist() == [4, 4]
    everything = Split(
        torch.from_numpy(np.concatenate(list(images.values())))[:, None], torch.arange(2).repeat_interleave(20)
    )
    assert as_bag(data.train, data.val, data.test) == as_bag(everything)


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    write_images(tmp_path / "a", pictures(15, (8, 8)))
    write_images(tmp_path / "b", [np.full((12, 20, 3), (200, 100, 50), np.uint8)] * 15)
    with pytest.raises(BadInput, match="is 12x20 pixels, the images before 8x8: give an image_size"):
        load_data("image-folder", tmp_path)
    data = load_data("image-folder", tmp_path, image_size=10)
    assert data.image_shape == (3, 10, 10)
    grey, colour = (data.train.images[data.train.labels == label] for label in (0, 1))
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert torch.equal(colour[0, :, 4, 4], torch.tensor([200, 100, 50], dtype=torch.uint8))


def test_train_and_test_of_different_kinds_are_brought_together(tmp_path: Path) -> None:
    write_images(tmp_path / "train/a", pictures(10, (8, 8)))
    write_images(tmp_path / "train/b", pictures(10, (8, 8)))
    write_images(tmp_path / "test/a", pictures(2, (8, 8, 3)))
    assert load_data("image-folder", tmp_path).image_shape == (3, 8, 8)
    write_images(tmp_path / "test/b", pictures(1, (9, 9, 3)))
    (tmp_path / "test/a/000.png").unlink()
    (tmp_path / "test/a/001.png").unlink()
    with pytest.raises(BadInput, match="give an image_size"):
        load_data("image-folder", tmp_path)


def test_image_folder_errors_name_the_culprit(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="image-folder needs --data_dir"):
        load_data("image-folder")
    with pytest.raises(DamagedFile, match="holds no images"):
        load_data("image-folder", tmp_path)
    write_images(tmp_path / "train/a", pictures(12, (8, 8)))
    write_images(tmp_path / "val/a", pictures(2, (8, 8)))
    with pytest.raises(DamagedFile, match="holds train/ alone: expected train/ and test/"):
        load_data("image-folder", tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    broken = tmp_path / "train/a/005.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DamagedFile) as error:
        load_data("image-folder", tmp_path)
    assert str(broken) in one_line(error)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(broken)
    with pytest.raises(BadInput, match=r"005\.png: expected 8-bit pixels"):
        load_data("image-folder", tmp_path)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "a", pictures(5, (8, 8)))
    write_images(tmp_path / "b", pictures(6, (8, 8)))
    with pytest.raises(BadInput, match="has 9 training and 2 test images: at least 10"):
        load_data("image-folder", tmp_path)


# ------------------------------------------------------------------------------------------- the hub and the options


def test_hub_data_set_is_loaded_by_owner_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` takes a local folder OWNER/NAME for the repository, through the code that reads a downloaded one.
    write_both(tmp_path / "owner/name", names=["cat", "dog"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub, local = load_data("hub:owner/name"), load_data("parquet", tmp_path / "owner/name")
    assert hub.classes == ("cat", "dog")
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(hub, split).images, getattr(local, split).images)


def test_hub_data_set_without_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner/name"
    write_both(folder, names=["cat", "dog"])
    (folder / "test-0.parquet").rename(folder / "validation-0.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(load_data("hub:owner/name").test) == 4
    (folder / "validation-0.parquet").unlink()
    data = load_data("hub:owner/name")
    assert [len(s) for s in (data.train, data.val, data.test)] == [15, 1, 4]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cifar10", r"pass --data_dir, a folder with train\*\.parquet and test\*\.parquet of cifar10"),
        ("fashion-mnist", "pass --data_dir, a folder with train-images-idx3-ubyte.gz and the three other IDX files"),
        ("hub:owner/name", "as --data_dir of the data set 'parquet'"),
    ],
)
def test_a_hub_out_of_reach_says_what_to_do(
    name: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("pliant.data.DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(BadInput, match=advice) as error:
        load_data(name)
    assert "cannot be loaded from the Hugging Face hub" in one_line(error)


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_both(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'pliant\[data\]'"):
        load_data("parquet", tmp_path)
    load_data("digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar-10"}, "unknown data set 'cifar-10': did you mean 'cifar10'"),
        ({"name": "hub:name"}, "hub:OWNER/NAME, not 'hub:name'"),
        ({"name": "hub:owner/name", "data_dir": "."}, "leave data_dir out"),
        ({"name": "digits", "data_dir": "."}, "leave data_dir out"),
        ({"name": "parquet"}, "parquet needs --data_dir"),
        ({"name": "digits", "image_size": 0}, "image_size must be at least 1 pixel, not 0"),
    ],
)
def test_unsuitable_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        load_data(**arguments)
    one_line(error)


def test_data_dir_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="is not a folder: pass the folder that holds cifar10"):
        load_data("cifar10", tmp_path / "absent")


# ---------------------------------------------------------------------------------------------------------- Loader


def make_data(count: int, *, shape: tuple[int, int, int] = (3, 6, 8), flip: bool = True, pad: int = 2) -> ImageData:
    images = torch.from_numpy(pictures(count, shape))
    split = Split(images, torch.arange(count))
    channels = shape[0]
    classes = tuple(map(str, range(count)))
    return ImageData("made", split, split, split, classes, (0.4,) * channels, (0.2,) * channels, flip, pad)


def epoch(loader: Loader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_evaluation_gives_the_split_in_order_normalised() -> None:
    data = load_data("digits")
    loader = Loader(data, "test", 100)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 59]
    assert len(loader) == 4
    images, labels = epoch(loader)
    assert images.dtype == torch.float32
    assert torch.equal(labels, data.test.labels)
    expected = (data.test.images.double() / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)


def test_training_images_have_mean_0_and_std_1() -> None:
    images, _ = epoch(Loader(load_data("digits"), "train", 64))
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_a_constant_channel_stays_finite(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / name, pictures(10, (8, 8, 3)) * np.array([1, 1, 0], np.uint8))
    images, _ = epoch(Loader(load_data("image-folder", tmp_path), "train", 8))
    assert torch.isfinite(images).all()
    assert not images[:, 2].any()


def test_batches_are_channels_last() -> None:
    for augment in (False, True):
        for images, _ in Loader(make_data(10), "train", 4, augment=augment):
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_shuffled_epoch_has_every_image_once() -> None:
    loader = Loader(make_data(103), "train", 10, shuffle=True)
    images, labels = epoch(loader)
    assert labels.tolist() != list(range(103))
    assert sorted(labels.tolist()) == list(range(103))
    in_order, _ = epoch(Loader(make_data(103), "train", 10))
    assert torch.equal(images, in_order[labels])


def test_augmented_images_are_all_shifts_and_mirrors_of_their_own() -> None:
    data = make_data(2, shape=(3, 4, 6), pad=1)
    padded = torch.nn.functional.pad(data.train.images, (1, 1, 1, 1))
    loader = Loader(data, "train", 2, shuffle=True, augment=True)
    seen = set()
    for number in range(200):
        loader.set_epoch(number)
        images, labels = epoch(loader)
        pixels = ((images * 0.2 + 0.4) * 255).round().to(torch.uint8)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            ways = [
                (label, top, left, mirrored)
                for top in range(3)
                for left in range(3)
                for mirrored in (False, True)
                for window in [padded[label, :, top : top + 4, left : left + 6]]
                if torch.equal(image, window.flip(2) if mirrored else window)
            ]
            assert len(ways) == 1
            seen.update(ways)
    assert len(seen) == 2 * 3 * 3 * 2


def test_no_mirror_where_the_data_set_forbids_it_and_no_shift_without_pad() -> None:
    data = make_data(40, flip=False, pad=0)
    plain, _ = epoch(Loader(data, "train", 8))
    augmented, _ = epoch(Loader(data, "train", 8, augment=True))
    assert torch.equal(plain, augmented)


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    data = make_data(50)

    def run(seed: int, number: int, batch_size: int = 10) -> Tensor:
        loader = Loader(data, "train", batch_size, shuffle=True, augment=True, seed=seed)
        loader.set_epoch(number)
        return epoch(loader)[0]

    state = torch.random.get_rng_state()
    first = run(3, 4)
    torch.manual_seed(99)
    assert torch.equal(first, run(3, 4))
    assert torch.equal(first, run(3, 4, batch_size=7))
    torch.random.set_rng_state(state)
    run(3, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    runs = [run(seed, number) for seed in range(4) for number in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(runs) for b in runs[:i])


def test_order_of_a_seed_is_pinned() -> None:
    loader = Loader(make_data(8), "train", 8, shuffle=True, seed=1)
    loader.set_epoch(2)
    assert epoch(loader)[1].tolist() == PINNED_ORDER


PINNED_ORDER = [2, 1, 6, 4, 3, 7, 5, 0]  # should torch change its randperm, this tells why results moved


@pytest.mark.parametrize(
    ("count", "batch_size", "shuffle", "sizes"),
    [
        (9, 4, True, [4, 5]),
        (9, 4, False, [4, 4, 1]),
        (10, 4, True, [4, 4, 2]),
        (3, 100, True, [3]),
        (1, 4, True, [1]),
        (3, 1, True, [1, 1, 1]),
    ],
)
def test_the_last_batch(count: int, batch_size: int, shuffle: bool, sizes: list[int]) -> None:
    loader = Loader(make_data(count), "train", batch_size, shuffle=shuffle)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_limit_takes_a_fixed_random_choice() -> None:
    data = make_data(60)

    def chosen(limit: int, **options) -> list[int]:
        return epoch(Loader(data, "train", 8, limit=limit, **options))[1].tolist()

    assert len(set(chosen(20))) == 20
    assert chosen(20) == chosen(20)
    assert chosen(20) != list(range(20))
    assert chosen(20)[:10] == chosen(10)
    assert set(chosen(20)) != set(chosen(20, seed=1))
    assert sorted(chosen(20, shuffle=True)) == sorted(chosen(20))
    assert sorted(chosen(1000)) == list(range(60))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "unknown split 'trian': did you mean 'train'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"limit": 0}, "limit must be at least 1 image"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_loader_refuses_bad_values(arguments: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Loader(make_data(4), **{"split": "train", "batch_size": 2, **arguments})
    with pytest.raises(BadInput, match="epoch must not be negative"):
        Loader(make_data(4), "train", 2).set_epoch(-1)
