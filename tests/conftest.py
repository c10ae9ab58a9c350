"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Read at the first convolution. On CPUs without AVX-512, oneDNN (that of torch 2.13) writes beyond its memory in the
# backward pass of 1×1 convolutions with stride and fewer than 8 channels, channels last: small networks of tests.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

# Several test processes share the cores; one thread each also makes sums come in one order.
torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")


@pytest.fixture
def shared() -> Path:
    """The folder with data that is too large for the repository."""
    path = Path(os.environ.get("PLIANT_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data" / "cifar10").is_dir():
        pytest.skip(f"no data in {path}")
    return path
