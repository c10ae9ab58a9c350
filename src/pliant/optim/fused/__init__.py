"""Fused steps on a CPU: C kernels that pass over memory once where PyTorch's operations pass several times.

``SFW(..., fused=True)`` takes them for float32 tensors with a ball of their own of ``Rows``, ``KSparse``, ``KSupport``
or ``Blocks(KSupport(2), 4)``; every other step is the usual one, and :func:`step` hands back what it cannot finish.
The results are those of ``oracles.py`` and ``sfw_update`` up to rounding, which tests assert.

``kernels.c`` is compiled when it is first needed, by the C compiler at hand, and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.linalg import divide_or_zero, kth_largest, readable
from pliant.norms.lifts import Blocks, KSparse, KSupport, Norm, Rows, without_vanished
from pliant.optim.vertices import SAFE

SOURCE = Path(__file__).parent / "kernels.c"
FLAGS = ["-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]}
NARROWEST, WIDEST = 0.002, 0.2  # of the bracket for the k-th largest, around its last value and in units of that


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises RuntimeError, with what the compiler or the system said, where there are none.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = FLAGS + VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    described = [SOURCE.read_text(encoding="utf-8"), *compiler, *flags, platform.machine()]
    name = f"kernels-{hashlib.sha256(' '.join(described).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pliant"
    try:
        kernels = _loaded([*compiler, *flags], folder / name)
    except OSError as error:
        raise RuntimeError(
            f"fused=True keeps compiled kernels in {folder}, which fails: {error}; name one to write to in "
            "the environment variable XDG_CACHE_HOME, or leave fused out"
        ) from error
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for function, arguments in {
        "use_threads": [ctypes.c_int],
        "chunks": [integer],
        "chunks_of_blocks": [integer] * 2,
        "accumulate_rows": [pointer] * 2 + [integer] * 2 + [real] * 2 + [pointer],
        "accumulate_entries": [pointer] * 2 + [integer] + [real] * 4 + [pointer] * 5,
        "squares_from": [pointer, integer, real, pointer],
        "accumulate_2_of_4": [pointer] * 2 + [integer] * 2 + [real] * 2 + [pointer] * 3,
        "distances": [pointer] * 2 + [integer] * 2 + [pointer, real, ctypes.c_int, pointer],
        "update": [pointer] * 2 + [integer] * 2 + [pointer, real, ctypes.c_int, real],
    }.items():
        getattr(kernels, function).argtypes = arguments
        getattr(kernels, function).restype = integer if "chunks" in function or "entries" in function else None
    return kernels


def _loaded(command: list[str], target: Path) -> ctypes.CDLL:
    """Return the library of that name, compiled if it is not there or not whole."""
    if target.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"fused=True needs a C compiler, and {command[0]!r} is not there: install one, name it in the environment "
            "variable CC, or leave fused out"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # another process may be compiling, too
        made = Path(folder) / target.name
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(made), "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = " ".join(done.stderr.split())[:300]
            raise RuntimeError(
                f"fused=True needs a C compiler with OpenMP, but {command[0]!r} failed: {said}; name another one in "
                "the environment variable CC, or leave fused out"
            )
        made.replace(target)
    return ctypes.CDLL(str(target))


def fits(norm: Norm, p: Tensor, momentum: Tensor | None) -> bool:
    """Tell whether :func:`step` takes steps with tensors like these."""
    g = p.grad
    if momentum is None or g is None or any(not _plain(x) for x in (p, momentum, g)):
        return False
    if not (p.stride() == momentum.stride() == g.stride() and _is_dense(p)):
        return False
    match norm:
        case Rows(_, dim=0, orthogonal=False):
            return p.ndim > 1 and p.stride(0) == max(p.stride())
        case KSparse(k) | KSupport(k):
            return k < p.numel()
        case Blocks(KSupport(2), 4):
            return True
    return False


def _plain(x: Tensor) -> bool:
    """Tell whether a float32 tensor's memory says what it holds."""
    return readable(x) and x.dtype == torch.float32 and not x.is_neg()


def _is_dense(p: Tensor) -> bool:
    return p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))


def step(
    norm: Norm,
    p: Tensor,
    m: Tensor,
    *,
    radius: float,
    diameter: float,
    momentum: float,
    weight: float,
    lr: float,
    rescale: str | None,
    scratch: Tensor,
    brackets: dict[Tensor, tuple[float, float]],
) -> bool:
    """Fold the gradient of p into its momentum m, and move p towards the vertex for that.

    Returns False where only the first is done, since the rest asks for more care: after a zero, infinite or NaN
    momentum, where squares overflow or vanish, at the vertex itself, and with ties at the k-th largest entry.

    Args:
        norm: of the ball, see :func:`fits`.
        p: changed in place.
        m: changed in place.
        radius: of the ball.
        diameter: of the ball.
        momentum: factor of m.
        weight: factor of the gradient.
        lr: step size before rescaling.
        rescale: as in :class:`~pliant.SFW`.
        scratch: (entries of p,), whose values are lost.
        brackets: for each tensor, where its k-th largest entry was and how wide to look around it; changed.
    """
    kernels, g = library(), p.grad
    assert g is not None
    kernels.use_threads(torch.get_num_threads())
    torch.autograd.graph.increment_version([p, m])  # autograd does not see what C does
    n, x, threshold, signs = p.numel(), m, 0.0, False
    start = (m.data_ptr(), g.data_ptr())
    match norm:
        case Rows(inner):
            rows = p.shape[0]
            squares = np.empty(rows)
            kernels.accumulate_rows(*start, rows, n // rows, momentum, weight, _at(squares))
            length = math.sqrt(squares.sum())
            if not _is_safe(length):
                return False
            a = without_vanished(torch.from_numpy(np.sqrt(squares)).float())
            factors = radius * divide_or_zero(inner._align(a), a)
        case KSparse(k) | KSupport(k):
            length, kept, threshold, surplus = _accumulate_entries(p, m, k, momentum, weight, scratch, brackets)
            if surplus or not (_is_safe(length) and threshold > 0):
                return False
            signs = isinstance(norm, KSparse)
            factors = torch.tensor([radius if signs else radius / kept])
        case Blocks():
            x = scratch
            outer, inner_size = _block_layout(p, norm.dim)
            squares, squares_kept = np.empty((2, kernels.chunks_of_blocks(outer, inner_size)))
            kernels.accumulate_2_of_4(
                *start, outer, inner_size, momentum, weight, x.data_ptr(), _at(squares), _at(squares_kept)
            )
            length = math.sqrt(squares.sum())
            if not _is_safe(length):
                return False
            factors = torch.tensor([radius / math.sqrt(squares_kept.sum())])
    vertex = (x.data_ptr(), n, n // len(factors), factors.data_ptr(), threshold, signs)
    match rescale:
        case "gradient":
            squares = np.empty(kernels.chunks(n))
            kernels.distances(p.data_ptr(), *vertex, _at(squares))
            distance = math.sqrt(squares.sum())
            if not _is_safe(distance):
                return False
            factor = length / distance
        case "fast-gradient":
            factor = length / (diameter / 2)
        case "diameter":
            factor = 1 / diameter
        case None:
            factor = 1.0
    kernels.update(p.data_ptr(), *vertex, min(max(lr * factor, 0.0), 1.0))
    return True


def _accumulate_entries(
    p: Tensor,
    m: Tensor,
    k: int,
    momentum: float,
    weight: float,
    scratch: Tensor,
    brackets: dict[Tensor, tuple[float, float]],
) -> tuple[float, float, float, int]:
    """Accumulate, and return ‖m‖, the norm of its k largest entries, the k-th, and how many beyond k are as large.

    The k-th largest changes little from step to step: a bracket around its last value is looked through while m is
    written. A bracket that misses costs a search of everything, never the answer.
    """
    kernels, n, g = library(), m.numel(), p.grad
    assert g is not None
    last, width = brackets.get(p, (0.0, WIDEST))
    low, high = last * (1 - width), last * (1 + width)
    count = kernels.chunks(n)
    (squares, squares_above), (above, inside) = np.empty((2, count)), np.empty((2, count), np.int64)
    found = kernels.accumulate_entries(
        m.data_ptr(), g.data_ptr(), n, momentum, weight, low if last else math.inf, high if last else math.inf,
        _at(squares), _at(squares_above), _at(above), _at(inside), scratch.data_ptr(),
    )  # fmt: skip
    length = math.sqrt(squares.sum())
    wanted = k - int(above.sum())
    if 0 < wanted <= found:
        candidates: NDArray[Any] = scratch[:found].numpy()
        candidates.partition(found - wanted)
        threshold = float(candidates[found - wanted])
        largest = candidates[found - wanted :].astype(np.float64)
        kept = math.sqrt(squares_above.sum() + (largest**2).sum())
        surplus = int(np.count_nonzero(candidates[: found - wanted] == candidates[found - wanted]))
    else:
        flat = m.as_strided((n,), (1,))
        kth, surplus = kth_largest([flat.numpy()], k)
        threshold = float(kth)
        kernels.squares_from(m.data_ptr(), n, threshold, _at(squares))
        kept = math.sqrt(squares.sum())
    # Wide enough for a change four times as large as this one.
    width = 2 * width if not last else 4 * abs(threshold / last - 1) if threshold else WIDEST
    brackets[p] = (threshold, min(max(width, NARROWEST), WIDEST)) if math.isfinite(threshold) else (0.0, WIDEST)
    return length, kept, threshold, surplus


def _is_safe(norm: float) -> bool:
    """Tell whether no square in a norm has overflowed, and none that counts has vanished; False for NaN."""
    return 1 / SAFE < norm < SAFE


def _block_layout(p: Tensor, dim: int) -> tuple[int, int]:
    """Return how many blocks lie one after the other in memory, and how far apart the entries of a block are."""
    inner = p.stride(dim)
    return p.numel() // (4 * inner), inner


def _at(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # array.ctypes takes ten times as long
    return address
