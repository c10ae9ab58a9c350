"""Re-estimation of BatchNorm statistics after compression, which needs neither labels nor gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.calling import as_inputs, batch_fault, copied, inputs_of, map_tensors, run
from pliant.errors import BadInput
from pliant.structure import own_forward


def reestimate_batchnorm(model: nn.Module, loader: Iterable[Any]) -> nn.Module:
    """Return a copy of ``model`` whose BatchNorm running statistics are those of the batches of ``loader``.

    Only the normalisations run in training mode. Everything else stays: weights, modes, momenta and the random number
    generators.

    Args:
        model: any module; without BatchNorm the loader is not read.
        loader: a finite iterable of batches: (images, labels) or images alone, or, for a model of several inputs,
            ((a, b), labels) or a dict of arguments. They are moved to the model's device, and every batch has the same
            weight.

    Raises:
        BadInput: the loader is empty, or the model cannot be run on a batch in training mode (a BatchNorm over vectors
            needs at least two samples per batch).
    """
    new = copied(model)
    if not normalises(new):
        return new
    device = next((p.device for p in new.parameters()), torch.device("cpu"))
    batches = 0
    try:
        with estimating(new):
            for batch in loader:
                run(new, map_tensors(lambda x: x.to(device), as_inputs(inputs_of(batch))))
                batches += 1
    except BadInput:  # of the calibration data
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise BadInput(f"batch {batches} cannot be run in training mode: {batch_fault(error)}") from error
    if not batches:
        raise BadInput("the loader for the BatchNorm statistics is empty")
    return new


def normalises(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm statistics."""
    return any(True for _ in _norms(model))


@contextlib.contextmanager
def estimating(model: nn.Module) -> Iterator[None]:
    """Return a context in which the BatchNorm statistics of ``model`` become the means over the batches it runs on.

    Only the normalisations run in training mode: the network will be used without dropout, so its statistics are
    measured without it. On exit every module returns to its own mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [(norm, norm.momentum) for norm in _norms(model)]
    model.eval()
    for norm, _ in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    handles = [norm.register_forward_pre_hook(_Mean()) for norm, _ in norms if own_forward(norm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in norms:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode


class _Mean:
    """Sets the momentum before every call such that the statistics are the mean: not every forward knows None."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, norm: nn.Module, args: Any) -> None:
        self.calls += 1
        assert isinstance(norm, _BatchNorm)
        norm.momentum = 1 / self.calls


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield module
