"""A workaround for a fault of oneDNN, which torch uses for convolutions on CPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

NARROW = 8  # floats in a vector of AVX2


@contextlib.contextmanager
def sound_convolutions(model: nn.Module) -> Iterator[None]:
    """Return a context in which forward and backward passes of ``model`` do not abort the process.

    On CPUs without AVX-512, oneDNN as of torch 2.13 writes beyond its memory in the backward pass of 1×1 convolutions
    with a stride and fewer than 8 input channels, channels last. A network with such a convolution, always a small
    network, is computed without oneDNN.
    """
    before = torch.backends.mkldnn.enabled
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and any(map(_is_narrow, model.modules())):
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # mkldnn.flags() warns of other flags that it sets
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def _is_narrow(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < NARROW
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
    )
