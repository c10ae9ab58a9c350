"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
