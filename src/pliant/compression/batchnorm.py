"""Re-estimation of BatchNorm statistics after compression, which needs neither labels nor gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import update_bn

from pliant.errors import BadInput, first_line


def reestimate_batchnorm(model: nn.Module, loader: Iterable[Any]) -> nn.Module:
    """Return a copy of ``model`` whose BatchNorm running statistics are those of the batches of ``loader``.

    Everything else stays: weights, training flags, momenta and the random number generators.

    Args:
        model: any module; without BatchNorm the loader is not read.
        loader: a finite iterable of (images, labels), or images alone, of the shape that the model takes. They are
            moved to the model's device, and every batch has the same weight.

    Raises:
        BadInput: the loader is empty, or the model cannot be run on a batch in training mode (a BatchNorm over vectors
            needs at least two samples per batch).
    """
    new = copy.deepcopy(model)
    if not any(isinstance(module, _BatchNorm) and module.track_running_stats for module in new.modules()):
        return new
    training = [(module, module.training) for module in new.modules()]
    device = next((p.device for p in new.parameters()), torch.device("cpu"))
    batches = 0

    def counted() -> Iterator[Any]:
        nonlocal batches
        for batch in loader:
            batches += 1
            yield batch

    devices = [device.index or 0] if device.type == "cuda" else []
    # The network will be used without dropout, so its statistics are measured without it; other noise is seeded.
    dropouts = [(module, module.p) for module in new.modules() if isinstance(module, _DropoutNd)]
    for dropout, _ in dropouts:
        dropout.p = 0.0
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            update_bn(counted(), new, device)
    except BadInput:  # of the calibration data
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise BadInput(f"batch {batches} cannot be run in training mode: {first_line(error)}") from error
    if not batches:
        raise BadInput("the loader for the BatchNorm statistics is empty")
    for dropout, share in dropouts:
        dropout.p = share
    for module, flag in training:
        module.training = flag  # update_bn sets one flag for all; a frozen part keeps its own
    return new
