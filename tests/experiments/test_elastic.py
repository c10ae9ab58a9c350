"""Every size of a run from the command line: compress --elastic, load and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pliant
from pliant import measuring
from pliant.cli import main
from pliant.experiments.compress import compress_run
from pliant.experiments.train import train
from pliant.storage import CORRECTIONS, ELASTIC, WEIGHTS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(model="mlp", epochs=1, batch_size=256, precision="fp32", out=str(tmp_path_factory.mktemp("r") / "run"))


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return compress_run(run, elastic=True, ladder="0.5,0.2", calibration=1200, out=str(run.with_name("all")))


def test_a_folder_of_all_sizes(folder: Path, run: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {WEIGHTS, ELASTIC, CORRECTIONS, "config.yaml", "shape.json"}
    assert (folder / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    dense = pliant.load(run)
    torch.testing.assert_close(pliant.load(folder).state_dict(), dense.state_dict(), rtol=0, atol=0)
    for share in (0.7, 0.5, 0.25):
        small = pliant.load(folder, keep_params=share)
        assert share - 0.05 < measuring.parameters(small) / measuring.parameters(dense) <= share
        assert small(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_shell_says_what_was_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", str(run), "--elastic", "--ladder", "0.5", "--calibration", "1200"]
    assert main([*arguments, "--out", str(tmp_path / "all")]) == 0
    text = capsys.readouterr().out
    data = json.loads((tmp_path / "all" / ELASTIC).read_text())
    assert f"{data['points'][-1]['errors']['refitted']:.2%}" in text
    assert f"{data['points'][-1]['errors']['elastic']:.2%}" in text
    assert "times those of the dense network" in text


def test_a_size_is_exported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    arguments = ["export", str(folder), "--formats", "safetensors,pt2", "--keep_params", "0.3", "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(out)
    again, direct = pliant.load(out), pliant.load(folder, keep_params=0.3)
    torch.testing.assert_close(again.state_dict(), direct.state_dict(), rtol=0, atol=0)
    images = torch.rand(3, 1, 8, 8)
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(images), direct(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(pliant.BadInput, match="holds a network of one size"):
        pliant.load(out, keep_params=0.2)


def test_ranks_from_one_folder(run: Path, tmp_path: Path) -> None:
    out, small = tmp_path / "all", tmp_path / "small"
    arguments = ["--elastic", "--compressor", "rank", "--ladder", "0.6,0.4", "--calibration", "1200"]
    assert main(["compress", str(run), *arguments, "--out", str(out)]) == 0
    dense = pliant.load(run)
    torch.testing.assert_close(pliant.load(out).state_dict(), dense.state_dict(), rtol=0, atol=0)
    assert main(["export", str(out), "--formats", "safetensors", "--keep_params", "0.5", "--out", str(small)]) == 0
    again, direct = pliant.load(small), pliant.load(out, keep_params=0.5)
    torch.testing.assert_close(again.state_dict(), direct.state_dict(), rtol=0, atol=0)
    assert 0.4 < measuring.parameters(again) / measuring.parameters(dense) <= 0.5


def test_without_a_size_the_dense_network_is_exported(folder: Path, run: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder), "--formats", "safetensors", "--out", str(tmp_path / "dense")]) == 0
    assert (tmp_path / "dense" / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    assert not (tmp_path / "dense" / ELASTIC).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "RUN", "--elastic", "--ratio", "0.5"], "--elastic holds every size: --ratio"),
        (["compress", "RUN", "--elastic", "--keep_macs", "0.5"], "--elastic holds every size: --keep_macs"),
        (["compress", "RUN", "--elastic", "--compressor", "filters+int8"], "not for Chain"),
        (["compress", "RUN", "--elastic", "--compressor", "nm"], "elastic files are for"),
        (["compress", "RUN", "--elastic", "--ladder", "0.5,x"], "--ladder has shares"),
        (["compress", "RUN", "--elastic", "--ladder", "0.2,0.5"], "ladder holds falling shares"),
        (["compress", "RUN", "--ladder", "0.5"], "--ladder is for --elastic"),
        (["export", "RUN", "--keep_params", "0.5"], "holds a network of one size"),
        (["export", "ALL", "--keep_params", "0.01"], "keep_params=0.01 is out of reach: the smallest size in the file"),
        (["export", "ALL", "--keep_params", "0.5", "--keep_macs", "0.5"], "expected one budget"),
    ],
)
def test_bad_commands_get_one_line(
    arguments: list[str],
    message: str,
    run: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": str(run), "ALL": str(folder)}
    code = main([*(places.get(argument, argument) for argument in arguments), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert message in line
    assert not list(tmp_path.iterdir())
