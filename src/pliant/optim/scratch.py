"""Memory for vertices that is kept from step to step: new pages of memory cost more than the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.linalg import common_dtype


class Scratch:
    """One stretch of CPU memory for each dtype, as large as the largest request so far."""

    def __init__(self) -> None:
        self._flat: dict[torch.dtype, Tensor] = {}
        self._views: dict[Any, list[Tensor]] = {}

    @property
    def kept(self) -> list[Tensor]:
        """The memory that is kept; its values are meaningless."""
        return list(self._flat.values())

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors of these shapes and strides, in the widest of their dtypes; the next call overwrites them."""
        dtype = common_dtype(tensors)
        key = (dtype, *((x.shape, x.stride()) for x in tensors))
        if key not in self._views:
            sizes = [x.numel() for x in tensors]
            flat = self._flat.get(dtype)
            if flat is None or len(flat) < sum(sizes):
                flat = self._flat[dtype] = torch.empty(sum(sizes), dtype=dtype, device="cpu")
                self._views = {k: views for k, views in self._views.items() if k[0] != dtype}
            parts = flat[: sum(sizes)].split(sizes)
            strides = [torch.empty_like(x, device="meta").stride() for x in tensors]
            views = zip(parts, tensors, strides, strict=True)
            self._views[key] = [part.as_strided(x.shape, stride) for part, x, stride in views]
        return self._views[key]
