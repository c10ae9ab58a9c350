"""Trackers: the lines of train.jsonl in each of them, and one line that says what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import BadInput
from pliant.experiments.train import train
from pliant.experiments.training.trackers import PACKAGES, tracker_names


def quick(out: Path, **options: Any) -> Path:
    return train(**{"model": "lenet5", "width": 0.5, "epochs": 2, "batch_size": 256, "out": str(out)} | options)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def test_tensorboard_shows_what_the_log_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = quick(tmp_path / "run", method="sfw-rank", tracker="tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "train_top1", "val_top1", "gap"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [1, 2]
        assert [value for _, value in shown] == pytest.approx([line[name] for line in lines(run)], rel=1e-6)
    assert "epoch" not in events.Tags()["scalars"]
    (settings,) = (run / "tensorboard").glob("*/hparams.yml")
    assert "method: sfw-rank" in settings.read_text()


def test_a_resumed_run_goes_on_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pliant.experiments.training.session import Session

    save = Session.save

    def save_then_die(self: Session, path: Path) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt  # the second line is written, its checkpoint is not
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path / "run", epochs=3, tracker="tensorboard")
    train(out=str(tmp_path / "run"), resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match=re.escape(f"--tracker {name} needs a package: pip install {PACKAGES[name]}")):
        quick(tmp_path / "run", tracker=name)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_other_trackers_hold_what_the_log_says(name: str, tmp_path: Path) -> None:
    """In a process of its own, so that what their packages leave behind or warn of stays there."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    trained, network = worker("train", name, tmp_path)
    assert not network
    assert "warn" not in trained.stderr.lower()
    assert not trained.stdout  # where `pliant train` tells the run folder
    runs = json.loads(worker("read", name, tmp_path)[0].stdout)
    one, two = lines(tmp_path / "runs" / "one"), lines(tmp_path / "runs" / "two")
    # The second line was written before the interruption and once more after it.
    if name == "wandb":
        expected = [("one", "sfw-rank", one[:2]), ("one", "sfw-rank", one[1:]), ("two", "sgd", two)]
    else:
        expected = [("one", "sfw-rank", [one[0], one[1], one[1], one[2]]), ("two", "sgd", two)]
    assert [(run["name"], run["settings"]["method"], len(run["values"])) for run in runs] == [
        (name, method, len(log)) for name, method, log in expected
    ]
    for run, (_, _, log) in zip(runs, expected, strict=True):
        assert "allow_val_change" not in run["settings"]
        assert float(run["settings"]["width"]) == 0.5
        for (step, values), line in zip(run["values"], log, strict=True):
            line = {key: value for key, value in line.items() if value is not None}
            assert {"epoch": step} | values | {"seconds": 0} == line | {"seconds": 0}  # seconds differ between repeats
            assert values["seconds"] > 0


def worker(action: str, name: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Return how tracker_worker.py ended, without a terminal or settings, and whether something asked for a network."""
    hidden = ("NO_PROXY", "CI", "GITHUB_", "PYTEST_", "WANDB_", "MLFLOW_", "TRACKIO_", "DO_NOT_TRACK")
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for key in ("HTTP_PROXY", "HTTPS_PROXY"):
            environment |= {key: address, key.lower(): address}
        ended = subprocess.run(
            [sys.executable, "-m", "tests.tracker_worker", action, name, str(folder)],
            cwd=Path(__file__).parents[2],
            env=environment | {"HOME": str(folder), "HF_HOME": str(folder / "hf")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        proxy.setblocking(False)
        try:
            proxy.accept()[0].close()
        except BlockingIOError:
            return ended, False
        return ended, True


def test_several_trackers_and_their_mistakes(tmp_path: Path) -> None:
    assert tracker_names(None) == []
    assert tracker_names("tensorboard, tensorboard") == ["tensorboard"]
    with pytest.raises(BadInput, match="did you mean 'tensorboard'"):
        quick(tmp_path / "run", tracker="tensorbord")
    with pytest.raises(BadInput, match="unknown tracker ''"):
        quick(tmp_path / "run", tracker="tensorboard,")
    assert not (tmp_path / "run").exists()
