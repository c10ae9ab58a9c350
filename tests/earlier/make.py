"""Make the data of an earlier version, with that version: run folders, records, plans, artefacts, a comparison.

    git worktree add /tmp/earlier COMMIT
    PYTHONPATH=/tmp/earlier/src .venv/bin/python tests/earlier/make.py FOLDER

Tests read what commit c6beaf1 made: files that users have must stay readable.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from pliant.training import Session
from torch import nn

import pliant
from pliant.cli import main

SETTINGS = ["--data", "digits", "--model", "resnet8", "--width", "0.25", "--batch_size", "256", "--precision", "fp32"]
SIZES = {
    "filters": ["--compressor", "filters", "--ratio", "0.5"],
    "rank": ["--compressor", "rank", "--ratio", "0.5"],
    "rank-channel": ["--compressor", "rank", "--ratio", "0.4", "--scheme", "channel", "--allocation", "uniform"],
    "weights": ["--compressor", "weights", "--ratio", "0.5"],
    "nm": ["--compressor", "nm", "--pattern", "2:4"],
    "chain": ["--compressor", "filters+rank+int8", "--keep_params", "0.5"],
}
SUITE = """\
settings: {data: digits, model: resnet8, width: 0.25, epochs: 2, batch_size: 256, precision: fp32}
seeds: [0, 1]
families:
  filters:
    - {compressor: filters, ratios: [0, 0.5, 0.9]}
  rank:
    - {compressor: rank, ratios: [0, 0.5]}
    - {compressor: rank, whiten: false, ratios: [0, 0.5]}
methods:
  sgd: {families: [filters, rank], trials: [{lr: 0.1}, {lr: 0.05}]}
  sfw-filters: {families: [filters], trials: {turnover: [3, 6]}}
"""


class Net(nn.Module):
    """A network of its own: one layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores (B, 3) of tokens (B, T, 16)."""
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Stopped(Exception):
    """In the place of a power cut."""


def made(folder: Path) -> None:
    """Make everything below ``folder``."""
    runs = folder / "runs"
    pliant_(["train", *SETTINGS, "--method", "sfw-filters", "--epochs", "2", "--seed", "3", "--out", runs / "filters"])
    pliant_(["train", *SETTINGS, "--method", "lorita", "--epochs", "1", "--out", runs / "lorita"])
    shutil.rmtree(runs / "filters" / "checkpoint")
    shutil.rmtree(runs / "lorita" / "checkpoint")
    unfinished(runs / "unfinished", "sfw-rank")
    unfinished(runs / "unfinished-numuon", "numuon", epochs=4)
    records = folder / "records.jsonl"
    for compressor in ("filters", "rank", "weights", "nm", "filters+rank+int8"):
        ratios = [] if compressor == "nm" else ["--ratios", "0,0.5,0.9"]
        pliant_(["sweep", runs / "filters", "--compressor", compressor, *ratios, "--out", records])
    for name, flags in SIZES.items():
        pliant_(["compress", runs / "filters", *flags, "--out", folder / "small" / name])
    pliant_(["report", records, "--out", folder / "report.html", "--markdown", folder / "report.md"])
    (folder / "report.html").unlink()
    (folder / "suite.yaml").write_text(SUITE)
    pliant_(["compare", folder / "suite.yaml", "--out", folder / "comparison"])
    shutil.rmtree(folder / "comparison" / "runs")
    (folder / "comparison" / "report.html").unlink()
    torch.manual_seed(0)
    model, x = Net().eval(), torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)
    plan = pliant.HeadPruning(0.5).plan(model, x)
    small = pliant.HeadPruning(0.5).apply(model, plan)
    pliant.export(small, folder / "heads", x, ["safetensors"], plan=plan)
    groups = pliant.constrain(model, [("*.weight", pliant.rank(k=2, radius=3))], default=None)
    optimizer = pliant.SFW(groups, lr=0.1)
    schedule = pliant.KSchedule(optimizer, 3, steps=5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, folder / "optimizer.pt")
    outputs = {"heads": pliant.rebuild(Net(), folder / "heads")(x).tolist()}
    images = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
    for path in [runs / "filters", runs / "lorita", *(folder / "small" / name for name in SIZES)]:
        outputs[str(path.relative_to(folder))] = pliant.load(path)(images).tolist()
    for suffix in ("", "-numuon"):
        finished = folder / f"finished{suffix}"
        shutil.copytree(runs / f"unfinished{suffix}", finished)
        pliant_(["train", "--out", finished, "--resume"])
        outputs[finished.name] = pliant.load(finished)(images).tolist()
        shutil.rmtree(finished)
    (folder / "outputs.json").write_text(json.dumps(outputs, indent=1) + "\n")


def unfinished(path: Path, method: str, epochs: int = 2) -> None:
    """Train for the first epoch only."""
    save = Session.save

    def stopping(self: Session, target: Path) -> None:
        save(self, target)
        raise Stopped

    Session.save = stopping
    try:
        pliant.train(
            "digits",
            model="resnet8",
            width=0.25,
            batch_size=256,
            precision="fp32",
            method=method,
            epochs=epochs,
            out=str(path),
        )
    except Stopped:
        pass
    finally:
        Session.save = save


def pliant_(arguments: list) -> None:
    """Run a verb."""
    assert main([str(a) for a in arguments]) == 0, arguments


if __name__ == "__main__":
    torch.set_num_threads(1)
    made(Path(sys.argv[1]))
