"""Corrections of weights in a few bits per entry, and the parts of a tensor that they are for.

A correction d of a filter becomes codes c = 0, ..., 2^bits - 1 and a step s per filter: d ≈ (c - (2^bits - 1) / 2) · s.
The step is the one, of a few tried, that loses least. Codes of all tensors follow each other without gaps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

BITS = (4, 3, 2)
_SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2)  # of the step that reaches the largest entry


def quantise(correction: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 of the correction's shape, and the step of each filter, float16 (filters,).

    Args:
        correction: (filters, ...), finite.
        bits: bits per entry.
    """
    rows = correction.double().flatten(1)
    top = 2**bits - 1
    largest = torch.finfo(torch.float16).max
    reach = rows.abs().amax(1, keepdim=True) * 2 / top
    codes = torch.zeros(rows.shape, dtype=torch.uint8)
    steps = torch.zeros(len(rows), 1, dtype=torch.float16)
    least = torch.full((len(rows), 1), float("inf"), dtype=torch.float64)
    for share in _SHARES:
        step = (reach * share).clamp(max=largest).half()
        wide = step.double()
        code = (rows / wide.clamp(min=torch.finfo(torch.float16).tiny / 1024) + top / 2).round().clamp(0, top)
        missed = ((code - top / 2) * wide - rows).square().sum(1, keepdim=True)
        better = missed < least
        codes = torch.where(better, code.to(torch.uint8), codes)
        steps, least = torch.where(better, step, steps), torch.minimum(missed, least)
    return codes.view(correction.shape), steps.flatten()


def restored(codes: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Return the corrections of codes and steps, float32."""
    offset = (2**bits - 1) / 2
    result: Tensor = (codes.float() - offset) * steps.float().view(-1, *[1] * (codes.dim() - 1))
    return result


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes below 2^bits, (n,), as bytes without gaps, uint8 (⌈n · bits / 8⌉,)."""
    spread = numpy.unpackbits(codes.numpy()[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(numpy.packbits(spread.ravel()))


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Return the ``count`` codes that :func:`pack` packed, uint8 (count,)."""
    spread = numpy.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    padded = numpy.zeros((count, 8), dtype=numpy.uint8)
    padded[:, 8 - bits :] = spread
    return torch.from_numpy(numpy.packbits(padded, axis=1).ravel())


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes so many codes take."""
    return -(-count * bits // 8)


def picked(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a tensor with only the positions ``kept`` on each dim that is named."""
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, positions)
    return tensor


def placed(tensor: Tensor, kept: Mapping[int, Tensor], part: Tensor) -> Tensor:
    """Return a copy of a tensor in which ``part`` is what :func:`picked` returns."""
    if not kept:
        return part
    result = tensor.clone()
    places = [kept.get(dim, torch.arange(size)) for dim, size in enumerate(tensor.shape)]
    result[torch.meshgrid(*places, indexing="ij")] = part
    return result
