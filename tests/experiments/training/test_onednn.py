"""Convolutions that oneDNN computes wrongly on some CPUs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pliant.experiments.training.onednn import sound_convolutions


@pytest.mark.parametrize(
    ("capability", "layer", "kept"),
    [
        ("AVX2", nn.Conv2d(4, 8, 1, stride=2), False),
        ("AVX2", nn.Conv2d(8, 16, 1, stride=2), True),
        ("AVX2", nn.Conv2d(4, 8, 1), True),
        ("AVX2", nn.Conv2d(4, 8, 3, stride=2), True),
        ("AVX2", nn.Linear(4, 8), True),
        ("AVX512", nn.Conv2d(4, 8, 1, stride=2), True),
    ],
)
def test_onednn_is_left_out_where_it_fails(
    capability: str, layer: nn.Module, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert torch.backends.mkldnn.enabled
    with sound_convolutions(nn.Sequential(nn.ReLU(), layer)):
        assert torch.backends.mkldnn.enabled == kept
    assert torch.backends.mkldnn.enabled


@pytest.mark.slow
def test_a_narrow_network_trains_on_every_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pliant", "train", "--epochs", "1", "--width", "0.25", "--out", "run"]
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
