"""Readers: every format gives the pixels and labels that were written, and an error names the damaged file."""

from __future__ import annotations

import io
import os
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

from pliant.errors import BadInput, DamagedFile
from pliant.experiments.data import Split, load_data
from tests.pictures import as_bag, one_line, pictures, png

SHARED = Path(os.environ.get("PLIANT_SHARED", Path(__file__).parents[4] / "shared"))

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
