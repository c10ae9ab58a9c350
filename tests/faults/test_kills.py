"""A process is killed, with SIGKILL, at any moment: what it leaves is whole, or is no more than not there yet.

A moment is the number of file operations that came before it: each of them, for the functions of ``pliant.files``; for
the commands, a choice that is the same every time. ``PLIANT_KILLS`` asks for more of them, and then every second
moment is one in time.
"""

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pliant import load
from pliant.experiments.comparison.job import Outcome
from pliant.jsonl import read_lines
from pliant.measuring import state_tensors
from pliant.records import Record, read_records

from . import acts
from .nursery import Nursery

KILLS = int(os.environ.get("PLIANT_KILLS", "10"))
KILLED = -9


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".lock")]


# --- single files and folders -----------------------------------------------------------------------------------------


def content(folder: Path) -> list[str]:
    if (folder / "a.jsonl").exists():
        return read_lines(folder / "a.jsonl", lambda values: str(values["content"]), "tests")
    files = [folder / "a.txt"] if (folder / "a.txt").exists() else sorted((folder / "a").glob("*"))
    return [file.read_text() for file in files]


@pytest.mark.parametrize(
    ("act", "states"),
    [
        (acts.write_file, [["1"], ["2"], ["3"]]),
        # Between the two renamings of a replacement there is no folder; the next command brings the former one back.
        (acts.write_folder, [["1", "1"], ["2", "2"], ["3", "3"], []]),
        (acts.append, [["1"], ["1", "2"], ["1", "2", "3"], ["1", "3"]]),
    ],
    ids=["file", "folder", "line"],
)
def test_killed_before_any_operation_on_a_file_or_folder(
    act: Callable[[str], None],
    states: list[list[str]],
    nursery: Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        monkeypatch.chdir(folder)
        act("1")
        assert content(folder) == states[0]
        killed = nursery.run(folder, "2", call=f"{acts.__name__}:{act.__name__}", kill_at=moment)
        if killed.code == 0:
            break
        assert killed.code == KILLED
        moments.append(content(folder))
        assert moments[-1] in (states[0], states[1], *states[3:4])
        act("3")
        assert content(folder) in states[2:]
        assert left_over(folder) == []
    assert len(moments) >= 2
    assert states[0] in moments
    assert moments.count([]) <= 1


def test_a_folder_that_was_being_replaced_comes_back(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    acts.write_folder("1")
    for moment in range(100):
        nursery.run(tmp_path, "2", call=f"{acts.__name__}:write_folder", kill_at=moment)
        if not content(tmp_path):
            break
        acts.write_folder("1")
    with pytest.raises(OSError, match="full"):
        acts.fail_to_replace()
    assert content(tmp_path) == ["1", "1"]
    assert left_over(tmp_path) == []


# --- commands ---------------------------------------------------------------------------------------------------------

TRAIN = "train --model mlp --width 0.1 --method sfw-filters --epochs 3 --batch_size 256 --checkpoint_steps 2 --out run"
PLAIN = "--refit false --importance magnitude"  # a kill hits the same files, sooner
SWEEP = f"sweep base --compressor weights --ratios 0,0.5,0.9 --calibration 64 {PLAIN} --out records.jsonl"
COMPRESS = "compress base --compressor filters --ratio 0.5 --calibration 512 --out small"
COMPARE = "compare small.yaml --out compared"
SUITE = """
settings: {model: mlp, width: 0.1, epochs: 2, batch_size: 512}
seeds: [0]
families: {weights: [{compressor: weights, ratios: [0, 0.5], refit: false, importance: magnitude}]}
methods: {sgd: {families: [weights], trials: {lr: [0.1, 0.01]}}}
calibration: 64
"""
EXPORT = "export base --formats safetensors --out exported --overwrite"


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def train_result(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "run/train.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return weights(folder / "run"), log, sorted(path.name for path in (folder / "run").iterdir())


def timeless(path: Path) -> list[Record]:
    untold: dict[str, Any] = {"latency_s": 1.0, "latency_dense_s": 1.0, "created": "", "cost": None}
    records = [dataclasses.replace(record, **untold) for record in read_records(path)]
    return [dataclasses.replace(x, refit=x.refit and {**x.refit, "seconds": None}) for x in records]


def sweep_result(folder: Path) -> Any:
    return timeless(folder / "records.jsonl")


def compare_result(folder: Path) -> Any:
    trials = read_lines(folder / "compared/trials.jsonl", Outcome.from_dict, "trials")
    return timeless(folder / "compared/records.jsonl"), trials


def compress_result(folder: Path) -> Any:
    loaded = state_tensors(load(folder / "small"))
    return weights(folder / "small"), {name: tuple(tensor.shape) for name, tensor in loaded.items()}


def export_result(folder: Path) -> Any:
    manifest = json.loads((folder / "exported/export.json").read_text())
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / "exported" / name).read_bytes()).hexdigest() == entry["sha256"]
    return weights(folder / "exported")


COMMANDS: dict[str, tuple[str, Callable[[Path], Any], int]] = {
    # command, what it leaves in the end, its share of the kills
    "train": (TRAIN, train_result, 4),
    "sweep": (SWEEP, sweep_result, 2),
    "compress": (COMPRESS, compress_result, 2),
    "export": (EXPORT, export_result, 2),
    "compare": (COMPARE, compare_result, 2),
}


@pytest.fixture(scope="module")
def base(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("base")
    command = "train --model mlp --width 0.1 --epochs 1 --batch_size 512 --out base"
    assert nursery.run(folder, *command.split()).code == 0
    return folder


def workplace(base: Path, place: Path) -> Path:
    place.mkdir()
    (place / "base").symlink_to(base / "base")
    (place / "small.yaml").write_text(SUITE, encoding="utf-8")
    return place


def readable_or_refused(nursery: Nursery, folder: Path) -> None:
    """What was left behind is read by other commands as what it is, or refused in one line."""
    if (folder / "run").exists():
        peek = nursery.run(folder, "compress", "run", "--calibration", "8", "--out", "peek")
        assert peek.code == 0 if (folder / "run/model.safetensors").exists() else peek.line
    if (folder / "records.jsonl").exists():
        assert sweep_result(folder) is not None
    for made in ("small", "exported"):
        if (folder / made).exists():
            load(folder / made)


@pytest.mark.slow
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_killed_command_goes_on_as_if_nothing_had_been(
    verb: str, nursery: Nursery, base: Path, tmp_path: Path
) -> None:
    text, result, share = COMMANDS[verb]
    command = text.split()
    again = [*command, "--resume"] if verb == "train" else command
    whole = workplace(base, tmp_path / "whole")
    clean = nursery.run(whole, *command)
    assert clean.code == 0, clean.err
    expected = result(whole)
    choice = random.Random(verb)
    kills = 0
    for attempt in range(KILLS * share // 10):
        folder = workplace(base, tmp_path / f"{attempt}")
        if verb == "export":
            assert nursery.run(folder, *command).code == 0  # it is to replace this one
        harm = {"kill_at": choice.randrange(clean.operations)}
        if attempt % 2 and KILLS > 10:
            harm = {"kill_after": choice.uniform(0, 1.5)}
        killed = nursery.run(folder, *command, **harm)
        kills += killed.code == KILLED
        assert killed.code in (KILLED, 0), killed.err
        readable_or_refused(nursery, folder)
        if not (verb == "compress" and (folder / "small").exists()):
            settled = nursery.run(folder, *again)
            assert settled.code == 0, (harm, settled.err)
        assert result(folder) == expected, harm
        assert left_over(folder) == [], harm
    assert kills >= KILLS * share // 20
