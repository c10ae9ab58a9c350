"""Files of every format that pliant reads, damaged in every way: a reader gives what the file says, or names the file.

Nothing else comes out of a reader than a ``PliantError`` of one line. The examples are the same in every run;
``PLIANT_FUZZ=50`` tries fifty times as many, and others.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pliant.errors import PliantError
from pliant.experiments.compress import compress_run
from pliant.experiments.data.images import load_data
from pliant.experiments.run_folder import LOG, Run, load
from pliant.experiments.train import resumable, train
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.log import Log
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import Settings
from pliant.files import write_bytes
from pliant.records import Record, append_record, read_records
from tests.pictures import pictures, png
from tests.test_records import FULL

from .mutations import DEEP, Content, altered, altered_json, damaged

MORE = int(os.environ.get("PLIANT_FUZZ", "1"))
TRIED = {"inputs": 0, "refused": 0}


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=examples * MORE,
        derandomize=MORE == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def read(reader: Callable[[], Any], *culprits: Path) -> Any:
    """Return what a reader gives, None if it refuses: then in one line that names one of the culprits."""
    TRIED["inputs"] += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of readers of images, of what they skip
            return reader()
    except PliantError as error:
        TRIED["refused"] += 1
        message = str(error)
        assert "\n" not in message
        assert len(message) < 2000
        assert any(str(culprit) in message for culprit in culprits), message
        return None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    return train(model="lenet5", width=0.3, method="sfw-filters", epochs=1, batch_size=512, out=str(folder))


@pytest.fixture(scope="module")
def small(run: Path) -> Path:
    return compress_run(run, "filters+rank", ratio=0.5, calibration=512, out=str(run.with_name("small")))


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    yield
    print(f"\nfuzz: {TRIED['inputs']} inputs, {TRIED['refused']} of them refused")


def restored(file: Path) -> Iterator[bytes]:
    """Give a file's content, and put it back afterwards."""
    content = file.read_bytes()
    yield content
    write_bytes(file, content)


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


def test_records(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    text = json.dumps(FULL.to_dict())

    @fuzz(300)
    @given(altered_json(text), st.sampled_from([b"", b"\n"]))
    def attempt(line: bytes, end: bytes) -> None:
        file.write_bytes(text.encode() + b"\n" + line + end)
        found = read(lambda: read_records(file), file)
        assert found is None or all(isinstance(record, Record) for record in found)
        if found is not None:
            assert found[0] == FULL

    attempt()


def test_packed_records(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl.gz"
    text = json.dumps(FULL.to_dict()).encode() + b"\n"
    content = gzip.compress(text * 3, mtime=0) + gzip.compress(text, mtime=0)

    @fuzz(300)
    @given(damaged(content))
    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        found = read(lambda: read_records(file), file)
        assert found is None or all(isinstance(record, Record) for record in found)
        read(lambda: append_record(file, FULL), file)
        if found is not None:
            assert read_records(file) == [*found, FULL]

    attempt()


def test_config(run: Path) -> None:
    file = run / "config.yaml"
    for content in restored(file):
        values = yaml.safe_load(content)
        as_yaml = altered(values).map(lambda value: Content(yaml.safe_dump(value).encode("utf-8", "surrogatepass")))

        @fuzz(300)
        @given(st.one_of(as_yaml, damaged(content), st.sampled_from([Content(b"[" * 5000), Content(b"{a: " * 5000)])))
        def attempt(data: bytes) -> None:
            file.write_bytes(data)
            read(lambda: load(run), run)
            read(lambda: resumable(run, {}), file, run)

        attempt()


@pytest.mark.parametrize("name", ["plan.json", "shape.json"])
def test_plan_and_shape(name: str, small: Path) -> None:
    file = small / name
    for content in restored(file):

        @fuzz(300)
        @given(altered_json(content.decode()))
        def attempt(data: bytes) -> None:
            file.write_bytes(data)
            read(lambda: load(small), small)

        attempt()


@pytest.fixture(scope="module", params=["filters", "rank"])
def every(run: Path, request: pytest.FixtureRequest) -> Path:
    images = 1200  # fewer give a warning
    options = {"elastic": True, "ladder": (0.6, 0.4), "calibration": images, "compressor": request.param}
    return compress_run(run, **options, out=str(run.with_name(f"every-{request.param}")))


def test_a_network_of_every_size(every: Path) -> None:
    file = every / "elastic.json"
    for content in restored(file):

        @fuzz(300)
        @given(altered_json(content.decode()))
        def attempt(data: bytes) -> None:
            file.write_bytes(data)
            read(lambda: load(every, keep_params=0.5), every)

        attempt()


@pytest.mark.parametrize("name", ["elastic.safetensors", "model.safetensors"])
def test_tensors_of_every_size(name: str, every: Path) -> None:
    file = every / name
    for content in restored(file):

        @fuzz(30)
        @given(damaged(content))
        def attempt(data: bytes) -> None:
            file.write_bytes(data)
            read(lambda: load(every, keep_params=0.5), every)

        attempt()


def test_log_of_a_training(run: Path) -> None:
    file = run / LOG
    for content in restored(file):

        @fuzz(50)
        @given(st.one_of(damaged(content * 3), st.sampled_from(DEEP)), st.integers(0, 3))
        def attempt(data: bytes, keep: int) -> None:
            file.write_bytes(data)
            with Log(run, keep=keep, settings=Settings.from_config(Run.open(run).config)) as log:
                log.write({"epoch": keep + 1})
            assert json.loads(file.read_text(errors="replace").rstrip("\n").rpartition("\n")[2]) == {"epoch": keep + 1}

        attempt()


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_weights(run: Path) -> None:
    file = run / "model.safetensors"
    for content in restored(file):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])

        def with_header(values: Any, body: bytes = content[8 + length :]) -> bytes:
            text = json.dumps(values).encode()
            return Content(struct.pack("<Q", len(text)) + text + body)

        @fuzz(300)
        @given(st.one_of(damaged(content), damaged(content[: 8 + length]), altered(header).map(with_header)))
        def attempt(data: bytes) -> None:
            file.write_bytes(data)
            read(lambda: load(run), file)

        attempt()


def test_checkpoint(run: Path) -> None:
    file = run / CHECKPOINT
    session = Session(Settings.from_config(Run.open(run).config))
    session.restore(file)
    expected = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    for content in restored(file):

        @fuzz(150)
        @given(damaged(content))
        def attempt(data: bytes) -> None:
            file.write_bytes(data)
            with torch.no_grad():
                for tensor in session.model.state_dict().values():
                    tensor.zero_()
            if read(lambda: session.restore(file) or True, file):  # nothing but the truth
                for name, tensor in session.model.state_dict().items():
                    assert torch.equal(tensor, expected[name]), name
                assert (session.epoch, session.batches) == (1, 0)

        attempt()


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_idx(packed: bool, tmp_path: Path) -> None:
    files = {}
    for stem, count in (("train", 20), ("t10k", 10)):
        images = struct.pack(">IIII", 0x803, count, 8, 8) + pictures(count, (8, 8)).tobytes()
        labels = struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count))
        files[f"{stem}-images-idx3-ubyte"], files[f"{stem}-labels-idx1-ubyte"] = images, labels
    for name, content in files.items():
        suffix = ".gz" if packed else ""
        files[name] = gzip.compress(content) if packed else content
        (tmp_path / f"{name}{suffix}").write_bytes(files[name])

    @fuzz(80)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(files)))
        file = tmp_path / f"{name}{suffix}"
        file.write_bytes(data.draw(damaged(files[name])))
        read(lambda: load_data("fashion-mnist", tmp_path), tmp_path, Path("fashion-mnist"))
        file.write_bytes(files[name])

    attempt()


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part, count in (("train", 20), ("test", 6)):
        cells = [{"bytes": png(image), "path": None} for image in pictures(count, (8, 8))]
        table = arrow.table({"image": cells, "label": [i % 3 for i in range(count)]})
        parquet.write_table(table, tmp_path / f"{part}.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")

    @fuzz(120)
    @given(st.one_of(damaged(content), damaged(content[footer:]).map(lambda end: Content(content[:footer] + end))))
    def attempt(data: bytes) -> None:
        (tmp_path / "train.parquet").write_bytes(data)
        read(lambda: load_data("parquet", tmp_path), tmp_path, Path("parquet"))

    attempt()


def test_image_folder(tmp_path: Path) -> None:
    from PIL import Image

    formats = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
    images = pictures(30, (8, 8, 3))
    for i, image in enumerate(images):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    contents = {}
    for name in formats:
        file = tmp_path / "a" / f"x.{name.lower()}"
        Image.fromarray(images[0]).save(file, name)
        contents[file] = file.read_bytes()
        file.unlink()

    @fuzz(250)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(contents)))
        file.write_bytes(data.draw(damaged(contents[file])))
        found = read(lambda: load_data("image-folder", tmp_path), tmp_path, Path("image-folder"))
        file.unlink()
        assert found is None or found.train.images.dtype == torch.uint8

    attempt()


def test_most_inputs_are_refused_and_all_are_counted() -> None:
    if TRIED["inputs"] > 1000:  # not where a test was chosen
        assert TRIED["refused"] > TRIED["inputs"] / 3
