"""The README's promises, kept: its code runs, its commands run, the demo runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import pliant
from pliant.cli import main
from pliant.experiments import demo as demonstrating
from pliant.experiments import sweep as sweeping
from pliant.records import read_records

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_of_the_readme_makes_smaller_networks_that_work() -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
        model, small, data = names["model"], names["small"], names["data"]
        assert sum(p.numel() for p in small.parameters()) < 0.35 * sum(p.numel() for p in model.parameters())
        images, labels = next(iter(pliant.Loader(data, "test", 512)))
        assert (small.eval()(images).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.slow
def test_the_shell_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (session,) = blocks("console")
    commands = [shlex.split(line.removeprefix("$ ")) for line in session.splitlines() if line.startswith("$ ")]
    assert [command[1] for command in commands] == ["train", "sweep", "report", "compress", "export"]
    few = ["--calibration", "64"]
    quick = {"train": ["--epochs", "1"], "sweep": few, "compress": few}
    for command in commands:
        assert main([*command[1:], *quick.get(command[1], [])]) == 0
    assert len(read_records("records.jsonl")) == 6
    assert pliant.load("small")
    assert {"model.pt2", "model.onnx", "model.safetensors"} < {file.name for file in Path("deploy").iterdir()}


@pytest.mark.slow
def test_the_demo_reports_all_networks_at_all_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweeping.RATIOS == "0,0.3,0.5,0.7,0.8,0.9"
    monkeypatch.setattr(sweeping, "RATIOS", "0,0.7,0.9")
    monkeypatch.setattr(demonstrating, "CALIBRATION", 150)
    assert main(["demo", "--epochs", "1"]) == 0
    table = capsys.readouterr().out
    for word in ("sgd", "sfw-filters", "sfw-rank", "dense", "70%", "90%", "demo/report.html"):
        assert word in table
    records = read_records("demo/records.jsonl")
    points = {(r.method, r.compressor) for r in records}
    assert points == {
        ("sgd", "filters-loss-refit"),
        ("sgd", "rank-whitened-spatial-refit"),
        ("sfw-filters", "filters-loss-refit"),
        ("sfw-rank", "rank-whitened-spatial-refit"),
    }
    assert len(records) == 12
    assert "</html>" in Path("demo/report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["demo"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_cifar10_runs_to_the_end(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):  # the first images of each: test_readers reads them all
        (file,) = (shared / "data" / "cifar10").glob(f"{split}-*.parquet")
        parquet.write_table(parquet.read_table(file).slice(0, 4000), file.name)
    data = ["--data", "cifar10", "--data_dir", ".", "--image_size", "16"]
    small = ["--model", "resnet8", "--width", "0.25", "--method", "sfw-rank", "--epochs", "2"]
    assert main(["train", *data, *small, "--out", "run"]) == 0
    assert main(["sweep", "run", "--compressor", "rank", "--ratios", "0,0.5", "--calibration", "64"]) == 0
    assert main(["report", "records.jsonl"]) == 0
    dense, half = read_records("records.jsonl")
    assert dense.top1 > 0.12  # chance is 0.1
    assert half.params < half.params_dense
