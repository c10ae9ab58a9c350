"""Tensor kernels below the norms: exact top-k, safe scaling, leading singular subspaces.

Nothing here knows of balls or optimizers, and nothing here synchronises with the host: every function is a
fixed sequence of tensor operations, whatever the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def vector_norm(x: Tensor, order: float = 2, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """``torch.linalg.vector_norm`` with its return type declared."""
    result: Tensor = torch.linalg.vector_norm(x, order, dim, keepdim)
    return result


def topk_mask(a: Tensor, k: int) -> Tensor:
    """Mark exactly ``k`` largest entries along the last dimension; among equals the lower index wins.

    ``torch.topk`` leaves the order of ties open; comparing with the k-th value alone would keep all of them.

    Shapes: ``a`` (..., n) -> bool (..., n), with ``1 <= k <= n``.
    """
    n = a.shape[-1]
    if k == n:
        return torch.ones_like(a, dtype=torch.bool)
    threshold = a.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = a > threshold
    tied = a == threshold
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def power_of_two_scale(tensors: Sequence[Tensor]) -> Tensor:
    """Return the power of two s with s <= max|x| < 2s over all tensors (1 where everything is zero).

    Dividing by a power of two is exact, so a computation on x/s gives the same digits whatever the scale of x,
    and squares of x/s neither overflow nor vanish where those of x would (gradients of 2^±100).
    """
    largest = torch.stack([_largest(x) for x in tensors]).amax()
    mantissa = torch.frexp(largest).mantissa
    return torch.where(largest == 0, torch.ones_like(largest), largest / (2 * mantissa))


def _largest(x: Tensor) -> Tensor:
    """Return max|x|: as the infinity norm, which torch computes many times slower on a CPU than both extremes."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all entries of all tensors together, safe from overflow and underflow.

    Half-precision tensors are summed and returned in float32.
    """
    tensors = [x.to(accumulation_dtype(x)) for x in tensors]
    scale = power_of_two_scale(tensors)
    parts = [vector_norm(x / scale) for x in tensors]
    return scale * (parts[0] if len(parts) == 1 else vector_norm(torch.stack(parts)))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half-precision tensors, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(b), a / torch.where(b == 0, torch.ones_like(b), b))


def orthonormalise(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the columns (and more columns where they are dependent).

    Shapes: (n, k) -> (n, k), with k <= n.
    """
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def starting_basis(g: Tensor, k: int) -> Tensor:
    """Return an orthonormal start for :func:`leading_subspace`: a Gaussian sketch of the row space of ``g``.

    (Halko, Martinsson, Tropp 2011, algorithm 4.1.)

    Shapes: ``g`` (m, n) -> (n, k).
    """
    return orthonormalise(g.T @ _gaussian(g.shape[0], k, g))


def leading_subspace(g: Tensor, basis: Tensor, iterations: int) -> Tensor:
    """Improve an orthonormal ``basis`` of the leading right singular subspace of ``g``.

    Each iteration is one step of block power iteration (subspace iteration), Q <- qr(Gᵀ(GQ + E)); a basis kept from the
    last, similar ``g`` needs one. Where ``g`` is zero the basis is returned as it is.
    (Golub, Van Loan, Matrix Computations, section 8.2.4.)

    Shapes: ``g`` (m, n), ``basis`` (n, k) -> (n, k), orthonormal columns.
    """
    # Without the small fixed noise E, a basis orthogonal to the rows of g would stay so for ever: GQ = 0.
    noise = _gaussian(g.shape[0], basis.shape[1], g)
    noise = noise * (1e-5 * vector_norm(g) / vector_norm(noise))
    previous = basis
    for _ in range(iterations):
        basis = orthonormalise(g.T @ (g @ basis + noise))
    return torch.where(_largest(g) == 0, previous, basis)


def _gaussian(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return always the same Gaussian matrix of this shape; the global random state is left as it is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype).to(like.device)
