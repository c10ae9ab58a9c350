"""The examples run as they are, and stay short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_have_less_than_80_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.slow
def test_five_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sys, "argv", ["five_devices.py", "--epochs", "2", "--out", str(tmp_path / "devices")])
    runpy.run_path(str(EXAMPLES / "five_devices.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    sizes = [int(line.split()[1].replace(",", "")) for line in lines]
    assert sizes == sorted(sizes, reverse=True)
    for device in ("server", "laptop", "tablet", "phone", "watch"):
        assert (tmp_path / "devices" / device / "model.onnx").exists()
