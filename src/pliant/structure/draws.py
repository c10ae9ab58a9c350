"""Two networks of different widths, run under the same conditions.

In training mode a network draws random numbers, and a smaller network draws fewer of them. Under :class:`SameDraws`
every draw has a seed of its own, the number of the draw: what does not depend on the removed channels is then the
same in both networks, such as which samples skip a block or which tokens are masked. Where the shapes of a draw differ,
it is made constant along the dimensions that differ, so that dropout and noise hit the channels that are left alike.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_SEED = 20_000
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_GROUPED = (torch.nn.functional.grouped_mm, torch._grouped_mm)
_TO_NARROW = (Tensor.float, Tensor.half, Tensor.bfloat16)


class SameDraws(TorchDispatchMode):
    """Seeds every random draw by its number.

    Args:
        seed: what all seeds depend on.
        constant: number of a draw → the dimensions along which it is constant.

    Attributes:
        shapes: the shape of every draw so far.
    """

    def __init__(self, seed: int, constant: Mapping[int, Sequence[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.constant = seed, constant
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **(kwargs or {}))
        with self:  # in inference mode, dropout comes as one step: its draw comes back here
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        aten = torch.ops.aten
        if func is aten.rrelu_with_noise.default or func is aten.rrelu_with_noise_.default:
            kwargs = {}  # its noise is as wide as the input: take the mean slope, as eval mode does
            args = (*args[:4], False)
        number = len(self.shapes)
        if func is aten.native_dropout.default:  # one step on some devices; a draw and a product on others
            x, p, train = args
            mask = self._draw(number, aten.rand_like.default, (x,), {}) >= (p if train else 0.0)
            return (x * mask / (1 - p) if train and p < 1 else x * mask), mask
        return self._draw(number, func, args, kwargs or {})

    def _draw(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seed = _SEED + 1_000 * self.seed + number
        _seed(seed, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            self.shapes.append(())
            return result
        shape = tuple(result.shape)
        self.shapes.append(shape)
        dims = self.constant.get(number)
        if dims:  # draw less: the first numbers of a longer draw are other ones
            less = [1 if dim in dims else length for dim, length in enumerate(shape)]

            def shorter(value: Any) -> Any:
                if isinstance(value, Tensor) and tuple(value.shape) == shape:
                    return value[tuple(slice(length) for length in less)].clone()
                return less if isinstance(value, (list, tuple)) and tuple(value) == shape else value

            _seed(seed, args, kwargs)
            few = func(*map(shorter, args), **{name: shorter(value) for name, value in kwargs.items()})
            result.copy_(few.expand(shape))
        return result


def _seed(seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Seed PyTorch's generators of the CPU and of the devices of the arguments, and no others."""
    torch.default_generator.manual_seed(seed)
    leaves = [*pytree.tree_leaves((args, kwargs)), kwargs.get("device")]
    devices = {x.device if isinstance(x, Tensor) else x for x in leaves if isinstance(x, (Tensor, torch.device))}
    for device in devices:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)


def differing(a: Sequence[tuple[int, ...]], b: Sequence[tuple[int, ...]]) -> dict[int, list[int]] | None:
    """Return number of a draw → the dimensions that differ between two lists of shapes; None if they do not match."""
    if len(a) != len(b) or any(len(x) != len(y) for x, y in zip(a, b, strict=True)):
        return None
    dims = {i: [d for d in range(len(x)) if x[d] != y[d]] for i, (x, y) in enumerate(zip(a, b, strict=True))}
    return {i: own for i, own in dims.items() if own}


class AllDouble(TorchFunctionMode):
    """Turns float32 that a forward makes by name, or keeps outside of buffers, into float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        if func in _TO_NARROW:
            return args[0].double()
        if func in _GROUPED:  # known in single precision only
            return _grouped_product(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        changes = name.endswith("_") and not name.endswith("__")  # the first tensor is changed in place
        first = args[:1] if changes else ()
        rest, named = pytree.tree_map(_wide, (args[len(first) :], kwargs or {}))
        return func(*first, *rest, **named)


def _grouped_product(a: Tensor, b: Tensor, *, offs: Tensor, **others: Any) -> Tensor:
    """Multiply each part of the rows of ``a`` (rows, n), ending at ``offs``, by its matrix in ``b`` (parts, n, m)."""
    ends = [0, *offs.tolist()]
    parts = [a[start:end] @ matrix for (start, end), matrix in zip(pairwise(ends), b, strict=True)]
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value in _NARROW:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype in _NARROW else value


@contextlib.contextmanager
def in_double(*, everything: bool) -> Iterator[None]:
    """Return a context in which states that a forward makes have type float64.

    Args:
        everything: whether float32 that is asked for by name is float64, too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with AllDouble() if everything else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Return a context with known states of the generators of Python and NumPy, which are restored afterwards."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")  # if it is not loaded, no forward uses it
    state = None if numpy is None else numpy.random.get_state()
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)
