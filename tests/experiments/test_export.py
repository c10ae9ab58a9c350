"""The verb export: run folders and compressed ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import pliant
from pliant.cli import main
from pliant.experiments.compress import compress_run
from pliant.experiments.train import train
from pliant.exporting import graph as tracing
from tests.exporting.test_exporting import manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(model="mlp", epochs=1, batch_size=256, precision="fp32", out=str(tmp_path_factory.mktemp("r") / "run"))


def test_a_run_and_a_compressed_folder_are_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    compress_run(run, "filters", ratio=0.5, calibration=512, out=str(small))
    capsys.readouterr()
    for source, formats in ((run, "pt2,safetensors"), (small, "safetensors, onnx")):
        out = tmp_path / f"{source.name}-out"
        assert main(["export", str(source), "--out", str(out), "--formats", formats]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        network, loaded = pliant.load(source), pliant.load(out)
        torch.testing.assert_close(loaded.state_dict(), network.state_dict(), rtol=0, atol=0)
        assert manifest(out)["model"] == "mlp"
    images = torch.rand(3, 1, 8, 8)
    (logits,) = tracing.onnx_session(out / "model.onnx").run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(images).detach(), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "small-out" / "plan.json").exists()


def test_the_default_folder_lies_beside(run: Path) -> None:
    assert main(["export", str(run), "--formats", "safetensors"]) == 0
    beside = run.with_name("run-export")
    assert manifest(beside)["files"].keys() == {"model.safetensors", "config.yaml", "shape.json"}
    assert main(["export", str(run), "--formats", "safetensors", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "not a run folder"),
        (["nowhere", "--formats", "onx"], "did you mean 'onnx'"),
        (["nowhere", "--formats", ","], "at least one of"),
        (["nowhere", "--format", "onnx"], "did you mean --formats?"),
        ([], "folder"),
    ],
)
def test_bad_commands_get_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["export", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_damaged_run_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-8])
    assert main(["export", str(broken), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.safetensors is damaged" in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
