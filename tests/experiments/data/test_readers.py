"""Readers: every format gives the pixels and labels that were written, and an error names the damaged file."""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pliant
from pliant.errors import BadInput, DamagedFile
from pliant.experiments.data import Loader, Split, folders, load_data, streaming
from pliant.experiments.data.named import DEBIAN_FASHION_MNIST
from pliant.experiments.data.streaming import ImageFiles
from pliant.experiments.models import build_model
from pliant.experiments.train import train
from tests.pictures import as_bag, one_line, pictures, png, write_images

SHARED = Path(os.environ.get("PLIANT_SHARED", Path(__file__).parents[4] / "shared"))

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


def test_image_folder_with_train_and_val_as_imagenet_has_them(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("val", 3)):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, pictures(count, (8, 8), seed=count))
    assert len(load_data("image-folder", tmp_path).test.labels) == 6
    write_images(tmp_path / "test" / "cat", pictures(2, (8, 8), seed=0))
    assert len(load_data("image-folder", tmp_path).test.labels) == 2


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
    write_images(tmp_path / "validation/a", pictures(2, (8, 8)))
    with pytest.raises(DamagedFile, match="holds train/ alone: expected train/ and test/"):
        load_data("image-folder", tmp_path)
    (tmp_path / "validation").rename(tmp_path / "test")
    broken = tmp_path / "train/a/005.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DamagedFile) as error:
        load_data("image-folder", tmp_path)
    assert str(broken) in one_line(error)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(broken)
    with pytest.raises(BadInput, match=r"005\.png: expected 8-bit pixels"):
        load_data("image-folder", tmp_path)


# ------------------------------------------------------------------------------------- images that stay in their files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 3 classes with 20 images of 12x16 for training and 4 for the test each, one of them grey."""
    for part, count in (("train", 20), ("test", 4)):
        for seed, name in enumerate("abc"):
            write_images(tmp_path / part / name, pictures(count, (12, 16, 3), seed=seed))
    (tmp_path / "train/a/003.png").write_bytes(png(pictures(1, (12, 16))[0]))
    return tmp_path


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "IN_MEMORY", 1000)


def test_images_left_in_their_files_give_the_batches_of_those_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = load_data("image-folder", folder, image_size=10)
    monkeypatch.setattr(folders, "IN_MEMORY", 72 * 300 - 1)  # 72 images of 300 numbers: one byte too many
    files = load_data("image-folder", folder, image_size=10)
    assert isinstance(memory.train.images, torch.Tensor)
    assert isinstance(files.train.images, ImageFiles)
    assert files.image_shape == memory.image_shape
    assert (files.mean, files.std, files.classes, files.pad) == (memory.mean, memory.std, memory.classes, memory.pad)
    for split in ("train", "val", "test"):
        for options in ({}, {"shuffle": True, "augment": True, "seed": 3, "limit": 50}):
            one, other = (Loader(data, split, 7, **options) for data in (memory, files))
            for (images, labels), (expected, expected_labels) in zip(other, one, strict=True):
                assert torch.equal(images, expected)
                assert torch.equal(labels, expected_labels)
                assert images.stride() == expected.stride()


def test_images_that_just_fit_stay_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "IN_MEMORY", 72 * 300)
    assert isinstance(load_data("image-folder", folder, image_size=10).train.images, torch.Tensor)


@pytest.mark.usefixtures("little_memory")
def test_grey_images_in_files_are_coloured(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / name, pictures(20, (8, 8)))
    images, _ = next(iter(Loader(load_data("image-folder", tmp_path, image_size=8), "test", 3)))
    assert images.shape == (3, 3, 8, 8)


@pytest.mark.usefixtures("little_memory")
def test_too_many_images_of_their_own_size_ask_for_one(folder: Path) -> None:
    with pytest.raises(BadInput, match="72 images of 12x16 take 0 GiB: give an image_size"):
        load_data("image-folder", folder)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the files that were decoded one by one, which grows."""
    files: list[str] = []
    decoder = streaming.decoder

    def counting(size: int) -> Callable[..., Any]:
        picture = decoder(size)
        return lambda file, value: [files.append(file), picture(file, value)][1]

    monkeypatch.setattr(streaming, "decoder", counting)
    return files


def test_mean_and_std_of_images_in_files_come_from_a_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    whole = load_data("image-folder", folder, image_size=10)
    monkeypatch.setattr(folders, "IN_MEMORY", 1000)
    monkeypatch.setattr("pliant.experiments.data.images.SAMPLE", 20)
    monkeypatch.setattr("pliant.experiments.data.images.IN_MEMORY", 1000)  # or the validation images would be read
    part = load_data("image-folder", folder, image_size=10)
    assert len(decoded) == 18  # every third of 54
    assert {Path(file).parent.name for file in decoded} == {"a", "b", "c"}
    assert part.mean != whole.mean
    assert np.allclose(part.mean, whole.mean, atol=0.05)
    assert np.allclose(part.std, whole.std, atol=0.05)


@pytest.mark.usefixtures("little_memory")
def test_validation_images_that_fit_are_decoded_once(folder: Path) -> None:
    data = load_data("image-folder", folder, image_size=10)
    assert isinstance(data.val.images, torch.Tensor)
    assert isinstance(data.test.images, ImageFiles)


@pytest.mark.usefixtures("little_memory")
def test_an_epoch_goes_on_without_decoding_what_is_done(folder: Path, decoded: list[str]) -> None:
    loader = Loader(load_data("image-folder", folder, image_size=10), "train", 6, shuffle=True, augment=True)
    loader.set_epoch(2)
    whole = list(loader)
    decoded.clear()
    loader.set_epoch(2, 7)
    rest = list(loader)
    assert (len(loader), len(rest), len(decoded)) == (9, 2, 12)
    for (images, labels), (expected, expected_labels) in zip(rest, whole[7:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


@pytest.mark.usefixtures("little_memory")
def test_images_are_found_after_a_change_of_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    data = load_data("image-folder", folder.name, image_size=10)
    monkeypatch.chdir("/")
    assert len(list(Loader(data, "test", 5))) == 3


def test_files_of_class_folders_come_in_the_order_of_their_parts(tmp_path: Path) -> None:
    for number, name in enumerate(["b/1.png", "b/a/2.png", "b/a-b/3.PNG", "b/a.png", "a/9.jpg", "a/10.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(number))
    (tmp_path / "b/a/.hidden.png").touch()
    (tmp_path / "b/a/notes.txt").touch()
    (tmp_path / "b/lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b/again").symlink_to(tmp_path / "a")
    found = folders._class_files(tmp_path)
    expected = sorted(path for path in tmp_path.rglob("*") if path.name[-4:] in (".png", ".PNG", ".jpg"))
    expected = [path for path in expected if path.name != ".hidden.png" and path.is_file()]
    assert [file for _, file in found] == list(map(str, expected))


def test_grey_images_count_as_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_images(tmp_path / name, pictures(20, (8, 8)))
    monkeypatch.setattr(folders, "IN_MEMORY", 40 * 64)
    assert load_data("image-folder", tmp_path).image_shape == (1, 8, 8)


def whitened(model: torch.nn.Module, loader: Loader) -> None:
    pliant.compress(model, pliant.LowRank(0.5), torch.zeros(1, 3, 10, 10), calibration=loader)


def reestimated(model: torch.nn.Module, loader: Loader) -> None:
    pliant.reestimate_batchnorm(model, loader)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda file: file.write_bytes(file.read_bytes()[:40]), "cannot be decoded"), (Path.unlink, "cannot be read")],
    ids=["short", "gone"],
)
def test_a_damaged_image_is_named_when_its_turn_comes(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    data = load_data("image-folder", folder, image_size=10)
    file = folder / "test/b/002.png"
    damage(file)
    batches = iter(Loader(data, "test", 3))
    assert len(next(batches)[1]) == len(next(batches)[1]) == 3
    with pytest.raises(DamagedFile, match=words) as error:
        list(batches)
    assert str(file) in one_line(error)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("calibrate", [whitened, reestimated])
def test_an_unsuitable_image_of_the_calibration_is_named(folder: Path, calibrate: Callable[..., None]) -> None:
    data = load_data("image-folder", folder, image_size=10)
    for file in (folder / "test/b").iterdir():
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file)
    with pytest.raises(BadInput, match=r"^\S*\.png: expected 8-bit pixels"):
        calibrate(build_model("resnet8", num_classes=3, image_shape=(3, 10, 10)), Loader(data, "test", 3))


@pytest.mark.usefixtures("little_memory")
def test_threads_end_with_the_last_batch_that_is_asked_for(folder: Path) -> None:
    loader = Loader(load_data("image-folder", folder, image_size=10), "train", 2)
    before = threading.active_count()
    for _ in loader:
        break
    assert threading.active_count() == before
    list(loader)
    assert threading.active_count() == before


@pytest.mark.usefixtures("little_memory")
def test_a_network_is_trained_on_images_in_files(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data="image-folder", data_dir=str(folder), image_size=8, epochs=1, batch_size=16, out=str(run))
    assert (run / "model.safetensors").exists()


# -------------------------------------------------------------------------------------------------------------- the hub


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
    monkeypatch.setattr("pliant.experiments.data.named.DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(BadInput, match=advice) as error:
        load_data(name)
    assert "cannot be loaded from the Hugging Face hub" in one_line(error)


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_both(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'pliant\[data\]'"):
        load_data("parquet", tmp_path)
    load_data("digits")
