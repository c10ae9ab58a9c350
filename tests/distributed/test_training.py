"""``pliant train`` under torchrun: the results of one process, and what is left when a process is killed."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.experiments.run_folder import Run
from pliant.experiments.train import train
from pliant.experiments.training.checkpoint import CHECKPOINT

from .launching import ROOT, torchrun
from .training_worker import OPTIONS

WORKER = ("-m", "tests.distributed.training_worker")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on one process."""
    return train(**OPTIONS, out=str(tmp_path_factory.mktemp("alone") / "run"))


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, expected: Path) -> None:
    got, wanted = (Run.open(path).load().state_dict() for path in (run, expected))
    for name, p in wanted.items():
        error = ((got[name] - p).norm() / p.norm()).item()
        assert error < 1e-6, f"{name}: {error}"
    assert len(log(run)) == len(log(expected))
    for a, b in zip(log(run), log(expected), strict=True):
        assert a["val_top1"] == b["val_top1"]
        assert a["train_top1"] == b["train_top1"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert {p.name for p in run.iterdir()} == {p.name for p in expected.iterdir()}


def test_two_processes_leave_the_run_of_one(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = torchrun(2, *WORKER, str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("epoch 3/3") == 1  # the main process alone reports
    assert "Traceback" not in done.stderr
    assert done.stdout.count("left:") == 2
    assert "gloo" not in done.stdout  # a thread that outlives Python's shutdown may abort the process
    assert_same_run(run, alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_three_others_finish_it(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = time.monotonic()
    done = torchrun(2, *WORKER, str(run), "killed", seconds=90)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert time.monotonic() - started < 90  # a minute, and the time to start
    assert not (run / "model.safetensors").exists()
    saved = torch.load(run / CHECKPOINT, weights_only=True)
    assert saved["epoch"] == 1
    done = torchrun(3, *WORKER, str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(run, alone)


@pytest.mark.slow
def test_the_programs_of_the_page_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in programs] == ["train_ddp.py", "train_fsdp.py"]
    for name, code in programs:
        leave = f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tests.distributed.launching import leave\nleave()\n"
        (tmp_path / name).write_text(code + leave, encoding="utf-8")
        done = torchrun(2, name, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
