"""Disks that are full or read-only, and folders that another process is working on."""

from pathlib import Path

import pytest

from pliant.errors import Busy
from pliant.files import locked, write_text

from . import acts
from .nursery import Nursery, Outcome

TRAIN = ["train", "--model", "mlp", "--width", "0.1", "--epochs", "1", "--batch_size", "512", "--out"]
SWEEP = ["sweep", "base", "--compressor", "weights", "--calibration", "8", "--out"]
ACTS = f"{acts.__name__}:"


def one_line(outcome: Outcome) -> str:
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("pliant: error: ")]
    assert "Traceback" not in outcome.err
    return line


def allowed(outcome: Outcome) -> Outcome:
    if "PermissionError" in outcome.err:
        pytest.skip("no mounts are allowed here")
    return outcome


@pytest.fixture
def folder(nursery: Nursery, tmp_path: Path) -> Path:
    """A folder with a finished run and an empty folder for the disk."""
    assert nursery.run(tmp_path, *TRAIN, "base").code == 0
    (tmp_path / "disk").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        [*TRAIN, "disk/run"],
        [*SWEEP, "disk/r.jsonl", "--ratios", "0,0.1,0.2,0.3,0.4"],
        ["compress", "base", "--calibration", "8", "--out", "disk/small"],
        ["export", "base", "--formats", "safetensors", "--out", "disk/exported", "--overwrite"],
    ],
    ids=lambda command: str(command[0]),
)
def test_a_full_disk_is_one_line_and_earlier_files_stay(command: list[str], nursery: Nursery, folder: Path) -> None:
    # Training and exporting find earlier files of theirs on the disk.
    before = {"export": [command], "sweep": [[*command[:-1], "0.9"]]}.get(command[0], [])
    outcome = allowed(nursery.run(folder, 600_000, command, *before, call=f"{ACTS}on_a_full_disk"))
    assert outcome.code == 20, outcome  # 2, then 0
    assert "No space left" in one_line(outcome)
    assert "earlier files have changed" not in outcome.err
    assert "left over" not in outcome.err


@pytest.mark.parametrize("limit", [500, 3_000, 8_000, 15_000])
def test_a_training_whose_files_cannot_grow_goes_on_later(limit: int, nursery: Nursery, tmp_path: Path) -> None:
    failed = nursery.run(tmp_path, *TRAIN, "run", longest_file=limit)
    assert failed.code == 2, failed
    assert "too large" in failed.line
    assert not (tmp_path / "run/model.safetensors").exists()
    assert nursery.run(tmp_path, *TRAIN, "run", "--resume").code == 0


@pytest.mark.parametrize(
    "command",
    [
        [*TRAIN, "run"],
        [*TRAIN, "base", "--resume"],
        [*SWEEP, "r.jsonl"],
        ["compress", "base", "--calibration", "8", "--out", "small"],
        ["export", "base", "--formats", "safetensors", "--out", "exported"],
    ],
    ids=" ".join,
)
def test_a_read_only_folder_is_one_line(command: list[str], nursery: Nursery, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    outcome = allowed(nursery.run(folder, command, call=f"{ACTS}on_a_read_only_disk"))
    assert outcome.code == 2, outcome
    assert "Read-only" in one_line(outcome)
    assert sorted(folder.rglob("*")) == before


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "command"),
    [
        ("run", [*TRAIN, "run"]),
        ("base", [*TRAIN, "base", "--resume"]),
        ("r.jsonl", [*SWEEP, "r.jsonl", "--ratios", "0.5"]),
        ("small", ["compress", "base", "--calibration", "8", "--out", "small"]),
        ("exported", ["export", "base", "--formats", "safetensors", "--out", "exported"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_second_process_refuses(held: str, command: list[str], nursery: Nursery, folder: Path) -> None:
    with locked(folder / held):
        before = sorted(folder.rglob("*"))
        second = nursery.run(folder, *command)
        assert f"{held} is in use: another process" in second.line
        assert sorted(folder.rglob("*")) == before
    assert nursery.run(folder, *command).code == 0


def test_two_trainings_at_once_leave_one_run(nursery: Nursery, tmp_path: Path) -> None:
    command = [*TRAIN, "run"]
    for _ in range(2):
        nursery.start(tmp_path, *command)
    outcomes = [nursery.wait() for _ in range(2)]
    assert sorted(outcome.code for outcome in outcomes) == [0, 2]
    assert "run" in max(outcomes, key=lambda outcome: outcome.code).line


def test_a_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "a"):
        with pytest.raises(Busy, match="a is in use"), locked(tmp_path / "a"):
            pass
        with locked(tmp_path / "b"):
            write_text(tmp_path / "c", "c")
    with locked(tmp_path / "a"):
        pass
