"""Trainings whose results are bitwise equal from run to run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from pliant.errors import BadInput


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use only deterministic algorithms; as a context manager.

    Raises BadInput with the name of an operation that has none.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads this when it is first used; without it, its products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise BadInput(f"--deterministic: {str(error).partition(',')[0]}; train without it") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
