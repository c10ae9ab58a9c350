"""Tensor kernels below the norms: exact top-k, safe scaling, leading singular directions.

Nothing here knows about balls or optimizers, and nothing here waits for a device: every function is a fixed sequence of
tensor operations, whatever the values. Only if reading values is free (:func:`readable`: plain tensors on the CPU) may
a function look at them to take a shorter way to the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

# How many entries a CPU processes at a time, so that temporaries stay in the cache: with one thread (NumPy), with many.
CHUNK, SHARED_CHUNK = 2**16, 2**18
SHORT = 2**10  # up to this many entries, sorting is as fast as searching
ALIGNED = 16  # products are fast if the number of columns is a multiple of this
SHIFT = 0.47  # of a power iteration, as a share of the smallest wanted eigenvalue; 0.5 would keep the eigenvalue 0
_PIECE = 1024  # entries that are summed one after the other
# Coefficients (a, b, c) of iterations X ← aX + (bG + cG²)X, with G = XXᵀ.
# Muon's iteration lifts small singular values fast and leaves all of them between 0.68 and 1.21 (Jordan et al. 2024).
LIFTING = (3.4445, -4.7750, 2.0315)
# From there, this one converges to 1 cubically (Higham 2008, Functions of Matrices).
CONVERGING = (15 / 8, -10 / 8, 3 / 8)
# And this one converges quadratically, from below: its largest value is 1.
BOUNDED = (3 / 2, -1 / 2, 0.0)


def vector_norm(x: Tensor, order: float = 2, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """Return ``torch.linalg.vector_norm``, with its return type declared."""
    result: Tensor = torch.linalg.vector_norm(x, order, dim, keepdim)
    return result


def long_norm(a: Tensor, order: float) -> Tensor:
    """Return the p-norms along the last dimension, of any length, to about the precision of the dtype.

    On a CPU torch adds up one entry after the other: in float32 a norm of a million entries is off by 1e-5 and more.
    The norm of the norms of short pieces is the same norm, with the rounding error of two short sums.

    Args:
        a: (..., n).
        order: p, ``math.inf`` included.

    Returns:
        The norms, (...).
    """
    pieces, rest = divmod(a.shape[-1], _PIECE)
    if pieces < 2:
        return vector_norm(a, order, dim=-1)
    whole = a[..., : pieces * _PIECE].reshape(*a.shape[:-1], pieces, _PIECE)
    parts = [vector_norm(whole, order, dim=-1)]
    if rest:
        parts.append(vector_norm(a[..., pieces * _PIECE :], order, dim=-1, keepdim=True))
    return long_norm(torch.cat(parts, dim=-1), order)


def topk_mask(a: Tensor, k: int) -> Tensor:
    """Return a mask of exactly ``k`` largest entries along the last dimension; among equals the lower index wins.

    ``torch.topk`` leaves the order of ties open; comparing with the k-th value alone would keep all of them.

    Args:
        a: (..., n).
        k: 1 <= k <= n.

    Returns:
        The mask, a boolean tensor (..., n).
    """
    n = a.shape[-1]
    if k == n:
        return torch.ones_like(a, dtype=torch.bool)
    if n <= SHORT:
        places = a.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(a, dtype=torch.bool).scatter(-1, places, torch.ones_like(places, dtype=torch.bool))
    threshold = a.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = a > threshold
    tied = a == threshold
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def power_of_two_scale(tensors: Sequence[Tensor]) -> Tensor:
    """Return the power of two s with s <= max|x| < 2s over all tensors, a scalar tensor; 1 if all entries are 0.

    Dividing by a power of two is exact, so a computation on x/s gives the same digits whatever the scale of x,
    and squares of x/s neither overflow nor vanish, even if squares of x do (gradients of 2^±100).
    """
    return power_of_two_below(torch.stack([_largest(x) for x in tensors]).amax())


def power_of_two_below(largest: Tensor) -> Tensor:
    """Return for each entry a >= 0 the power of two s with s <= a < 2s, and 1 for a = 0."""
    mantissa = torch.frexp(largest).mantissa
    return torch.where(largest == 0, torch.ones_like(largest), largest / (2 * mantissa))


def _largest(x: Tensor) -> Tensor:
    """Return max|x| from both extremes: on a CPU, torch computes the infinity norm many times slower."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all entries of all tensors, a scalar tensor, safe from overflow and underflow.

    Half-precision tensors are summed in float32, and so is the result.
    """
    tensors = [x.to(accumulation_dtype(x)) for x in tensors]
    scale = power_of_two_scale(tensors)
    parts = [vector_norm(x / scale) for x in tensors]
    return scale * (parts[0] if len(parts) == 1 else vector_norm(torch.stack(parts)))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half-precision tensors, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the widest :func:`accumulation_dtype` of the tensors."""
    return reduce(torch.promote_types, [accumulation_dtype(x) for x in tensors])


def divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b for b >= 0, and 0 where both are 0."""
    return a / b.clamp_min(torch.finfo(b.dtype).tiny)


def readable(x: Tensor) -> bool:
    """Return whether reading values of x is free: x is a plain tensor on the CPU, outside of torch.compile."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not isinstance(x, FakeTensor)
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


# --- keeping the largest entries --------------------------------------------------------------------------------------


def keep_largest(tensors: Sequence[Tensor], k: int, outs: Sequence[Tensor]) -> None:
    """Write tensors to ``outs`` with all entries set to 0 except the k of largest magnitude over all tensors.

    The result is that of :func:`topk_mask` on the concatenated magnitudes; on the CPU large tensors are not sorted.

    Args:
        tensors: floating-point tensors of any shapes, together with at least k entries.
        k: how many entries are kept.
        outs: dense tensors of the same shapes and dtypes; may be the tensors themselves.
    """
    # A view of the negative of a tensor has no array in NumPy.
    flats = [_in_order_of_memory(x.detach().resolve_neg(), out).flatten() for x, out in zip(tensors, outs, strict=True)]
    flat_outs = [_in_order_of_memory(out, out).view(-1) for out in outs]
    if not all(readable(x) for x in tensors):
        masks = topk_mask(torch.cat(flats).abs(), k).split([len(x) for x in flats])
        for x, mask, out in zip(flats, masks, flat_outs, strict=True):
            torch.mul(x, mask, out=out)
        return
    threshold, surplus = kth_largest([x.numpy() for x in flats], k)
    # Zero the last of the tied entries, so that exactly k remain. Ties at 0 need no choice: they are 0 either way.
    for x, out in zip(reversed(flats), reversed(flat_outs), strict=True):
        last = np.zeros(0, dtype=np.int64)
        if surplus and threshold > 0:
            tied = np.flatnonzero(np.abs(x.numpy()) == threshold)
            last = tied[max(0, len(tied) - surplus) :]
            surplus -= len(last)
        # hardshrink keeps |x| above its bound: with the next smaller number as bound, it keeps the threshold itself.
        torch.ops.aten.hardshrink.out(x, float(np.nextafter(threshold, threshold.dtype.type(0))), out=out)
        if len(last):
            out[torch.from_numpy(last)] = 0


def kth_largest(arrays: list[np.ndarray], k: int) -> tuple[np.floating, int]:
    """Return the k-th largest magnitude, and how many entries beyond k are at least as large (the surplus of ties).

    A sample brackets the answer, one pass counts the entries above the bracket and collects those inside, and the few
    collected entries are searched. (Floyd, Rivest 1975, Expected time bounds for selection.) If the bracket misses the
    answer, all entries are searched, so the result is always exact.

    Args:
        arrays: 1-d arrays, together with at least k entries.
        k: at least 1.
    """
    n = sum(len(a) for a in arrays)
    low, high = _bracket(arrays, n, k)
    above, inside = 0, []
    for a in arrays:
        for start in range(0, len(a) if low is not None else 0, CHUNK):
            magnitudes = np.abs(a[start : start + CHUNK])
            over = magnitudes > high
            above += int(np.count_nonzero(over))
            inside.append(magnitudes[(magnitudes >= low) ^ over])
    candidates = np.concatenate(inside) if inside else np.zeros(0)
    if not above < k <= above + len(candidates):
        above, candidates = 0, np.concatenate([np.abs(a) for a in arrays])
    wanted = k - above
    threshold = torch.from_numpy(candidates).kthvalue(len(candidates) + 1 - wanted).values.numpy().flat[0]
    return threshold, int(np.count_nonzero(candidates >= threshold)) - wanted


def _bracket(arrays: list[np.ndarray], n: int, k: int) -> tuple[np.floating | None, np.floating | None]:
    """Return two values that the k-th largest of n magnitudes very likely lies between; None if n is small."""
    # With a sample of n^(2/3) entries, the bracket collects at most a few times as many entries as the sample has.
    stride = n // round(n ** (2 / 3))
    if stride < 8:
        return None, None
    stride |= 1  # an even stride would sample the same channels over and over again
    sample = np.concatenate([np.abs(a[::stride]) for a in arrays])
    share = 1 - k / n
    deviation = 3 * math.sqrt(share * (1 - share) / len(sample))
    last = len(sample) - 1
    low, high = (min(last, max(0, round((share + d) * last))) for d in (-deviation, deviation))
    sample.partition([low, high])
    return sample[low], sample[high]


def keep_n_of_m(x: Tensor, n: int, m: int, dim: int, out: Tensor) -> None:
    """Write x to ``out`` with 0 for all but the n largest magnitudes of every m consecutive entries along ``dim``.

    Among equals the lower index wins. Magnitudes that differ only in their last ⌈log₂ m⌉ bits count as equal.

    Args:
        x: a float32 or float64 tensor; m divides its size along ``dim``.
        n: how many entries of a block are kept, 1 <= n <= m.
        m: the number of entries in a block.
        dim: the dimension along which the entries of a block are consecutive.
        out: a dense tensor of the same shape and dtype; not x itself.
    """
    if n == m:
        out.copy_(x)
        return
    inside = _order_of_memory(out).index(dim) + 1
    inner = math.prod(_in_order_of_memory(out, out).shape[inside:])
    blocks = _in_order_of_memory(x, out).reshape(-1, m, inner)
    kept = _in_order_of_memory(out, out).view(-1, m, inner)
    integers = torch.int32 if x.dtype == torch.float32 else torch.int64
    last_bits = (1 << (m - 1).bit_length()) - 1
    magnitude_bits = torch.iinfo(integers).max ^ last_bits  # all but the sign and the last bits
    slots = torch.arange(m - 1, -1, -1, dtype=integers, device=x.device)[:, None, None]
    step = max(1, SHARED_CHUNK // (m * inner)) if readable(x) else len(blocks)
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step]
        # Magnitudes have the same order as their bits read as integers; the slot in the last bits makes the keys of a
        # block distinct.
        keys = torch.empty((m, len(chunk), inner), dtype=integers, device=x.device)
        torch.bitwise_and(chunk.view(integers).transpose(0, 1), magnitude_bits, out=keys)
        ordered = keys.add_(slots).view(x.dtype)
        torch.ge(ordered, _nth_largest(ordered, n), out=ordered)
        torch.mul(chunk, ordered.transpose(0, 1), out=kept[start : start + step])


def _nth_largest(keys: Tensor, n: int) -> Tensor:
    """Return the n-th largest of keys (m, ...) along dim 0, (...), by elementwise insertion into a sorted list."""
    leaders: list[Tensor] = []
    for key in keys:
        candidate = key
        for place, leader in enumerate(leaders):
            leaders[place] = torch.maximum(leader, candidate)
            if place < n - 1:
                candidate = torch.minimum(leader, candidate)
        if len(leaders) < n:
            leaders.append(candidate)
    return leaders[-1]


def _in_order_of_memory(x: Tensor, like: Tensor) -> Tensor:
    """Return x with its dimensions permuted to the order that those of ``like`` have in memory, outermost first."""
    return x.permute(_order_of_memory(like))


def _order_of_memory(x: Tensor) -> list[int]:
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: (-strides[d], d))


# --- leading singular directions --------------------------------------------------------------------------------------


def starting_directions(matrices: Sequence[Tensor], size: int) -> list[Tensor]:
    """Return fixed directions to start :func:`leading_directions` from; torch's random state does not change.

    Args:
        matrices: (L, r_i, c_i) each.
        size: the number of directions.

    Returns:
        For each matrix, (L, c_i, size).
    """
    generator = torch.Generator("cpu").manual_seed(0)
    starts = [torch.randn(1, a.shape[2], size, generator=generator, dtype=a.dtype, device="cpu") for a in matrices]
    # All members start alike, so that results do not depend on the batch a matrix is in.
    return [start.to(a.device).expand(len(a), -1, -1) for start, a in zip(starts, matrices, strict=True)]


def leading_directions(
    matrices: Sequence[Tensor], start: Sequence[Tensor], iterations: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Approximate the k leading singular directions of L block-diagonal matrices, without decomposing them.

    This is block power iteration with a shift, with one QR factorisation of a tall matrix per iteration: from right
    directions Z, the left directions are U = qr(AZ), and their images AᵀU are the new right directions. (Halko,
    Martinsson, Tropp 2011, Finding structure with randomness, section 4.5; for the shift see :func:`advanced`.)

    Args:
        matrices: the diagonal blocks of the matrices A, each (L, r_i, c_i); commonly there is one.
        start: right directions of earlier, similar matrices, or :func:`starting_directions`, each (L, c_i, k).
        iterations: at least 1; after a good start 1 is enough.

    Returns:
        Three lists with a tensor for each block: ``left`` (L, r_i, k), all blocks together with orthonormal columns,
        and zero rows where A has zero rows; ``right`` = Aᵀ·left, (L, c_i, k); and the next start, (L, c_i, k). Columns
        are roughly in descending order of singular values.
    """
    rows = [a.shape[1] for a in matrices]
    for _ in range(iterations):
        start = [stirred(z) for z in start]
        images = [times(a, z) for a, z in zip(matrices, start, strict=True)]
        basis, triangle = orthonormalised(images[0] if len(images) == 1 else torch.cat(images, dim=1))
        left = list(basis.split(rows, dim=1))
        right = [times(a.mT, u) for a, u in zip(matrices, left, strict=True)]
        squares = [torch.linalg.vecdot(z, z, dim=1) for z in right]
        start = advanced(right, start, triangle, torch.stack(squares).sum(dim=0))
    return left, right, list(start)


def times(a: Tensor, z: Tensor) -> Tensor:
    """Return a @ z for a z of few columns, padded with zero columns to a width that is fast.

    MKL takes three times as long for 10 columns as for 16, and 15 % longer for 51 than for 64.

    Args:
        a: (L, rows, columns).
        z: (L, columns, k).

    Returns:
        The product, (L, rows, k).
    """
    k = z.shape[-1]
    return a @ z if k % ALIGNED == 0 else (a @ pad(z, (0, -k % ALIGNED)))[..., :k]


def orthonormalised(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the QR factorisation of ``image`` whose R has no negative diagonal entries, which makes it unique.

    Rows of zeros stay zero in Q, even if the image has a lower rank.

    Args:
        image: (L, rows, k) with rows >= k.

    Returns:
        Q, (L, rows, k), and R, (L, k, k).
    """
    basis, triangle = torch.linalg.qr(image)
    signs = torch.where(triangle.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(image.dtype)
    return basis.mul_(signs[:, None, :]).mul_((image != 0).any(dim=2, keepdim=True)), triangle * signs[:, :, None]


def advanced(right: Sequence[Tensor], before: Sequence[Tensor], triangle: Tensor, squares: Tensor) -> list[Tensor]:
    """Return the start of the next iteration, (AᵀA − s)·Z·R⁻¹, which takes no product with A.

    Let s be half of the smallest of the k wanted eigenvalues. The unwanted eigenvalues lie between 0 and the smallest
    wanted one, so they are at most s away from s. An iteration then suppresses those near the smallest wanted one, the
    hard ones, about as well as two iterations without the shift. Directions with eigenvalues near 0 fade more slowly
    than without it, and would not fade at all with exactly half, hence :data:`SHIFT`. (Saad 2011, Numerical Methods for
    Large Eigenvalue Problems, section 4.1.2.)

    Args:
        right: AᵀU = AᵀA·Z·R⁻¹, for each block (L, c_i, k).
        before: Z, for each block (L, c_i, k).
        triangle: R, (L, k, k).
        squares: squared lengths of the columns of AᵀU, (L, k): Rayleigh quotients, which approximate the eigenvalues.
    """
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    # A matrix of lower rank has 0 among its leading eigenvalues: there is nothing to shift by, and R has no inverse.
    full = (diagonal.amin(dim=1) > torch.finfo(diagonal.dtype).eps * diagonal.amax(dim=1))[:, None, None]
    identity = torch.eye(triangle.shape[1], dtype=triangle.dtype, device=triangle.device).expand_as(triangle)
    inverse = torch.linalg.solve_triangular(torch.where(full, triangle, identity), identity, upper=True)
    shift = torch.where(full, -SHIFT * squares.amin(dim=1)[:, None, None] * inverse, 0)
    return [torch.baddbmm(w, z, shift) for w, z in zip(right, before, strict=True)]


def stirred(z: Tensor, first: int = 0, rows: int | None = None, size: Tensor | None = None) -> Tensor:
    """Return z with a small multiple of a fixed vector added to the last column.

    Without it, a start that is orthogonal to all rows of A would remain so for ever.

    Args:
        z: directions, (L, columns, k), or some of their rows.
        first: the row of the whole directions that z begins at.
        rows: the number of rows of the whole directions; None if z is whole.
        size: the L2 norm of the last column of the whole directions, (L,); None if z is whole.
    """
    last = z[:, :, -1]
    angles = torch.arange(first, first + z.shape[1], dtype=z.dtype, device=z.device)
    size = vector_norm(last, dim=1) if size is None else size
    size = torch.where(size == 0, torch.ones_like(size), size)
    little = 1e-5 / math.sqrt(z.shape[1] if rows is None else rows)
    stirred = z.clone()
    stirred[:, :, -1] += little * size[:, None] * torch.cos(angles)
    return stirred


def polar(matrices: Tensor, lifting: int = 5, converging: int = 2, inside: bool = False) -> Tensor:
    """Return the polar factor UVᵀ of each matrix by matrix products alone (Newton-Schulz iteration).

    Singular values above 1/500 of the Frobenius norm become 1 within 0.001; far smaller ones stay proportional to their
    old values. Without the converging steps this is Muon's iteration, with values between 0.68 and 1.21.

    Args:
        matrices: (L, rows, columns).
        lifting: the number of steps that bring all singular values near 1.
        converging: the number of steps that converge to 1.
        inside: replace the last step by one that leaves no singular value above 1; the smallest are then 0.99.

    Returns:
        The polar factors, (L, rows, columns).
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / torch.where(norm == 0, torch.ones_like(norm), norm)
    steps = [LIFTING] * lifting + [CONVERGING] * converging
    for a, b, c in [*steps[:-1], BOUNDED] if inside else steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram if c else b * gram) @ x
    return x if wide else x.mT
