"""Baselines are tested in float64."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
