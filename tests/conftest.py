"""What all tests share."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pliant import measuring

# Several test processes share the cores; one thread each also makes sums come in one order.
torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _short_latencies() -> Iterator[None]:
    """Measure latencies once and for a moment: no test compares them, and half a second for each record adds up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "latencies", functools.partial(measuring.latencies, seconds=0.001, rounds=1))
        yield


@pytest.fixture
def shared() -> Path:
    """The folder with data that is too large for the repository."""
    path = Path(os.environ.get("PLIANT_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data" / "cifar10").is_dir():
        pytest.skip(f"no data in {path}")
    return path
