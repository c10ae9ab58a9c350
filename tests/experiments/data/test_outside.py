"""Data sets and networks of other packages: found by name, used as ours are, and checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pliant
from pliant.cli import main
from pliant.errors import BadInput, DamagedFile
from pliant.experiments.compare import compare
from pliant.experiments.comparison.rehearsal import noise
from pliant.experiments.data import DataSet, load_data
from pliant.experiments.data.data_sets import DATA_SETS
from pliant.experiments.models import build_model
from pliant.records import read_records
from tests.pictures import one_line
from tests.test_extensions import install

SETS = '''
import torch
from pliant.errors import DamagedFile
from pliant.experiments.data import DataSet, Raw, Request, Split

asked = []

def squares(request):
    """60 training images of 1x8x8: black on the left or on the right."""
    import beside_sets  # late, and only found in the current directory
    asked.append(request)
    labels = torch.arange(60) % 2
    images = torch.randint(100, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[labels == 0, :, :, :4] = 0
    images[labels == 1, :, :, 4:] = 0
    return Raw(Split(images, labels), None, beside_sets.NAMES)

row = DataSet("squares", squares, 2, (1, 8, 8), flip=False, pad=0.25)

def damaged(request):
    raise DamagedFile(f"{request.folder} holds no squares")

def raising(request):
    raise ValueError("two\\nlines")

def leaving(request):
    raise SystemExit(3)

def no_request():
    pass

number = 3
'''


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module ``own_sets`` in the current directory, forgotten afterwards."""
    (tmp_path / "own_sets.py").write_text(SETS, encoding="utf-8")
    (tmp_path / "beside_sets.py").write_text("NAMES = ('left', 'right')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in ("own_sets", "beside_sets"):
        sys.modules.pop(module, None)


# ---------------------------------------------------------------------------------------------------------- data sets


def test_a_reader_is_a_data_set(sets: Path) -> None:
    before = list(sys.path)
    data = load_data("own_sets:squares", sets, image_size=16)
    (request,) = sys.modules["own_sets"].asked
    assert request == ("own_sets:squares", sets, 16, None)
    assert (data.name, data.classes, data.image_shape) == ("own_sets:squares", ("left", "right"), (1, 16, 16))
    assert (data.flip, data.pad) == (True, 2)
    assert [len(split) for split in (data.train, data.val, data.test)] == [44, 4, 12]
    assert sys.path == before


def test_a_row_says_what_holds_for_the_images(sets: Path) -> None:
    data = load_data("own_sets:row")
    assert (data.name, data.flip, data.pad, data.image_shape) == ("own_sets:row", False, 2, (1, 8, 8))
    assert sys.modules["own_sets"].asked == [("own_sets:row", None, None, 2)]


def test_an_installed_package_gives_it_a_name(
    sets: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "squares_package", {"squares": "squares_package:row"}, SETS, group="pliant.data")
    monkeypatch.syspath_prepend(folder)
    assert load_data("squares").name == "squares"
    with pytest.raises(BadInput, match="unknown data set 'square': did you mean 'squares'"):
        load_data("square")


@pytest.mark.usefixtures("sets")
def test_a_run_on_it_is_trained_swept_and_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--data", "own_sets:squares", "--model", "mlp", "--epochs", "1", "--batch_size", "16"]
    assert main([*train, "--out", "run"]) == 0
    sweep = ["sweep", "run", "--compressor", "weights", "--ratios", "0,0.5", "--refit", "false"]
    sweep += ["--importance", "magnitude"]
    assert main([*sweep, "--out", "records.jsonl"]) == 0
    assert {record.data for record in read_records("records.jsonl")} == {"own_sets:squares"}
    assert pliant.load("run")(torch.zeros(3, 1, 8, 8)).shape == (3, 2)
    capsys.readouterr()


def test_a_suite_takes_it(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"refit": False, "importance": "magnitude"}
    suite: dict[str, Any] = {
        "settings": {"data": "own_sets:row", "model": "mlp", "epochs": 1, "batch_size": 16, "precision": "fp32"},
        "seeds": [0],
        "families": {"weights": [{"compressor": "weights", "ratios": [0, 0.5], **plain}]},
        "methods": {"sgd": {"families": ["weights"], "trials": [{"lr": 0.1}]}},
        "calibration": 16,
    }
    (sets / "own.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    compare("own.yaml", dry_run=True)
    compare("own.yaml", out="out")
    assert {record.data for record in read_records("out/records.jsonl")} == {"own_sets:row"}
    assert (sets / "out/report.html").exists()
    capsys.readouterr()


@pytest.mark.usefixtures("sets")
def test_a_rehearsal_knows_the_shape_of_a_row() -> None:
    assert (noise("own_sets:row", None).image_shape, noise("own_sets:row", None).num_classes) == ((1, 8, 8), 2)
    assert noise("own_sets:row", 4).image_shape == (1, 4, 4)
    assert (noise("own_sets:squares", None).image_shape, noise("digits", None).image_shape) == ((3, 32, 32), (1, 8, 8))


@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_sets:number", "expected a DataSet, or a callable that takes a Request and returns a Raw, got 3"),
        ("own_sets:nothing", "module own_sets has no object named 'nothing'"),
        ("own_set:squares", "import failed with ModuleNotFoundError: No module named 'own_set'"),
        ("own_sets/squares:x", "expected package.module:object, such as my_package.module:name"),
        ("own_sets:raising", "its reader raised ValueError: two lines"),
        ("own_sets:leaving", "its reader raised SystemExit: 3"),
        (
            "own_sets:no_request",
            "its reader raised TypeError: no_request() takes 0 positional arguments",
        ),
    ],
)
def test_a_fault_is_one_line(name: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_data(name)
    assert one_line(caught).startswith(f"data set {name!r}: {message}")


@pytest.mark.usefixtures("sets")
def test_an_error_of_pliant_goes_through() -> None:
    with pytest.raises(DamagedFile, match=r"^None holds no squares$"):
        load_data("own_sets:damaged")


GOOD = "Split(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2), None, ('a', 'b')"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (f"({GOOD})", "its reader should return a Raw (train, test, classes), got (Split("),
        ("None", "its reader should return a Raw (train, test, classes), got None"),
        (f"Raw({GOOD})._replace(classes=['a', 'b'])", "its classes should be a tuple of names, got ['a', 'b']"),
        (f"Raw({GOOD})._replace(classes=(1, 2))", "its classes should be a tuple of names, got (1, 2)"),
        (f"Raw({GOOD})._replace(train=None)", "its training images should be a Split, got None"),
        (f"Raw({GOOD})._replace(test=3)", "its test images should be a Split, got 3"),
        (
            f"Raw({GOOD})._replace(train=Split(torch.zeros(20, 1, 8, 8), torch.zeros(20).long()))",
            "its training images should be ImageFiles or a uint8 tensor (N, C, H, W) on the CPU, got a float32 tensor "
            "of shape (20, 1, 8, 8) on cpu",
        ),
        (
            f"Raw({GOOD})._replace(test=Split(torch.zeros(20, 64, dtype=torch.uint8), torch.zeros(20).long()))",
            "its test images should be ImageFiles or a uint8 tensor (N, C, H, W) on the CPU, got a uint8 tensor "
            "of shape (20, 64) on cpu",
        ),
        (
            f"Raw({GOOD})._replace(train=Split([[1, 2]], torch.zeros(20).long()))",
            "its training images should be ImageFiles or a uint8 tensor (N, C, H, W) on the CPU, got [[1, 2]]",
        ),
        (
            f"Raw({GOOD})._replace(train=Split(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0).long()))",
            "its training images should be at least one, got the shape (0, 1, 8, 8)",
        ),
        (
            f"Raw({GOOD})._replace(train=Split(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20)))",
            "its training labels should be an int64 tensor (N,) on the CPU, got a float32 tensor of shape (20,) on cpu",
        ),
        (
            f"Raw({GOOD})._replace(train=Split(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(19).long()))",
            "its training labels should be as many as its images, 20, got 19",
        ),
        (
            f"Raw({GOOD})._replace(classes=('a', 'b', 'c'), train=Split(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), "
            "torch.arange(20) - 1))",
            "its training labels should lie from 0 to 2 (there are 3 classes), got -1 to 18",
        ),
        (
            f"Raw({GOOD})._replace(test=Split(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2).long()))",
            "its training and test images should have one shape, got (1, 8, 8) and (3, 8, 8)",
        ),
    ],
)
def test_what_a_reader_returns_is_checked(
    result: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import torch\nfrom pliant.experiments.data import Raw, Split\n\ndef read(request):\n    return {result}\n"
    install(tmp_path, "odd_sets", {"odd": "odd_sets:read"}, code, group="pliant.data")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_sets", raising=False)
    with pytest.raises(BadInput) as caught:
        load_data("odd")
    assert one_line(caught).startswith(f"data set 'odd' of the package odd_sets (odd_sets:read): {message}")


@pytest.mark.parametrize(
    ("row", "image_size", "message"),
    [
        ("num_classes=3", None, "its classes should be the 3 that its row states, got 2"),
        ("shape=(1, 9, 8)", None, "its images should have the shape (1, 9, 8) that its row states, got (1, 8, 8)"),
        ("shape=(3, 9, 9)", 4, "its images should have the shape (3, 9, 9) that its row states, got (1,)"),
    ],
)
def test_a_row_must_fit_what_its_reader_returns(
    row: str, image_size: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import torch\nfrom pliant.experiments.data import DataSet, Raw, Split\n"
        f"row = DataSet('r', lambda request: Raw({GOOD}), {row})\n"
    )
    (tmp_path / "odd_rows.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_rows", raising=False)
    with pytest.raises(BadInput) as caught:
        load_data("odd_rows:row", image_size=image_size)
    assert one_line(caught) == f"data set 'odd_rows:row': {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": "a file"}, "read must be a callable"),
        ({"num_classes": 1}, "num_classes must be an integer of at least 2, got 1"),
        ({"num_classes": 2.0}, "num_classes must be an integer"),
        ({"shape": (8, 8)}, r"shape must be \(channels, height, width\), each at least 1, got \(8, 8\)"),
        ({"shape": (0, 8, 8)}, "shape must be"),
        ({"flip": 1}, "flip must be True or False, got 1"),
        ({"pad": 1.0}, "pad must be a share of the shorter side, from 0 to below 1, got 1.0"),
        ({"pad": "4"}, "pad must be"),
    ],
)
def test_a_row_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        DataSet(**{"name": "x", "read": print, **change})


def test_our_rows_keep_their_augmentation() -> None:
    rows = {name: (row.num_classes, row.shape, row.flip, int(28 * row.pad)) for name, row in DATA_SETS.items()}
    assert rows == {
        "digits": (10, (1, 8, 8), False, 3),
        "fashion-mnist": (10, (1, 28, 28), True, 2),
        "cifar10": (10, (3, 32, 32), True, 3),
        "cifar100": (100, (3, 32, 32), True, 3),
        "image-folder": (None, None, True, 3),
        "parquet": (None, None, True, 3),
        "hub:OWNER/NAME": (None, None, True, 3),
    }


# ----------------------------------------------------------------------------------------------------------- networks

NETS = """
from torch import nn

def small(num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[1] * image_shape[2], num_classes))

def broken():
    raise RuntimeError("two\\nlines")

number = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entries = {"small": "own_nets_package:small", "broken": "own_nets_package:broken", "n": "own_nets_package:number"}
    install(tmp_path, "own_nets_package", entries, NETS, group="pliant.models")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_nets_package", None)


@pytest.mark.usefixtures("nets")
def test_a_network_of_an_installed_package_has_a_name() -> None:
    assert build_model("small", num_classes=5, image_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("broken", {}, "(own_nets_package:broken): broken raised RuntimeError: two lines"),
        ("n", {}, "(own_nets_package:number): expected a callable that returns a torch.nn.Module, got 3"),
        ("small", {"width": 2.0}, "(own_nets_package:small) takes no argument 'width', got width 2.0: leave it at 1"),
    ],
)
def test_a_bad_network_of_an_installed_package_is_named(name: str, changes: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        build_model(name, num_classes=5, image_shape=(1, 8, 8), **changes)
    assert one_line(caught) == f"model {name!r} of the package own_nets_package {message}"


@pytest.mark.usefixtures("nets")
def test_an_unknown_network_lists_those_of_packages() -> None:
    with pytest.raises(BadInput, match=r"^unknown model 'smal': did you mean 'small'\? known are broken, lenet5,"):
        build_model("smal", num_classes=5, image_shape=(1, 8, 8))
