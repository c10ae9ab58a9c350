"""Trackers: the lines of train.jsonl in TensorBoard, and one line that says what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import BadInput
from pliant.trackers import PACKAGES, tracker_names
from pliant.training import train


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

    from pliant.training import Session

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


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_other_trackers_are_used_or_their_package_is_named(name: str, tmp_path: Path) -> None:
    """In a process of its own without a network, a terminal or settings; a tracker that asks for a login would hang."""
    if importlib.util.find_spec(name) is None:
        with pytest.raises(BadInput, match=f"--tracker {name} needs a package: pip install {PACKAGES[name]}$"):
            quick(tmp_path / "run", tracker=name)
        assert not (tmp_path / "run").exists()
        return
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"HOME": str(tmp_path), "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere}
    program = f"from pliant import train; train(model='lenet5', width=0.5, epochs=1, tracker='{name}', out='run')"
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    assert len(lines(tmp_path / "run")) == 1
    written = [path for path in tmp_path.rglob("*") if path.is_file() and name in str(path.relative_to(tmp_path))]
    written += list(tmp_path.glob("mlruns/**/metrics/loss"))
    assert written


def test_several_trackers_and_their_mistakes(tmp_path: Path) -> None:
    assert tracker_names(None) == []
    assert tracker_names("tensorboard, tensorboard") == ["tensorboard"]
    with pytest.raises(BadInput, match="did you mean 'tensorboard'"):
        quick(tmp_path / "run", tracker="tensorbord")
    with pytest.raises(BadInput, match="unknown tracker ''"):
        quick(tmp_path / "run", tracker="tensorboard,")
    assert not (tmp_path / "run").exists()
