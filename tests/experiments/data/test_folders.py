"""Folders of images: read into memory, or left in their files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pliant
from pliant.errors import BadInput, DamagedFile
from pliant.experiments.data import Loader, Split, folders, load_data, streaming
from pliant.experiments.data.streaming import ImageFiles
from pliant.experiments.models import build_model
from pliant.experiments.train import train
from tests.pictures import as_bag, one_line, pictures, png, write_images

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
