"""Weights as matrices, and the decompositions of them that the baselines use.

A weight is read as ``(blocks, rows, columns)``: one row per output, and one block per group of a grouped convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrices(x: Tensor, row_dim: int, blocks: int) -> Tensor:
    """Return a tensor as matrices (blocks, rows, columns); a view if the memory layout allows it.

    Args:
        x: a weight or its gradient.
        row_dim: the dimension that counts the rows of all blocks.
        blocks: the number of equal parts of the rows.
    """
    return x.movedim(row_dim, 0).reshape(blocks, x.shape[row_dim] // blocks, -1)


def write_matrices(matrices: Tensor, out: Tensor, row_dim: int) -> None:
    """Write matrices (blocks, rows, columns) to ``out``, a tensor of the weight's shape; see :func:`as_matrices`."""
    rows_first = out.movedim(row_dim, 0)
    rows_first.copy_(matrices.reshape(rows_first.shape))


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin decomposition U, σ, Vᵀ of each matrix.

    Args:
        matrices: (blocks, rows, columns).

    Returns:
        (blocks, rows, n), (blocks, n) and (blocks, n, columns), with n = min(rows, columns).

    Raises:
        torch.linalg.LinAlgError: an entry is NaN or infinite.
    """
    if matrices.shape[-2] >= matrices.shape[-1]:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u, s, vh
    v, s, uh = torch.linalg.svd(matrices.mT, full_matrices=False)  # a tall matrix takes half the time of a wide one
    return uh.mT, s, v.mT


def polar_by_svd(matrices: Tensor) -> Tensor:
    """Return UVᵀ over the non-zero singular values: the polar factor, and the smallest sub-gradient of Σσ."""
    u, s, vh = svd(matrices)
    return (u * positive(s)[..., None, :]) @ vh


def positive(s: Tensor) -> Tensor:
    """Return a mask, (blocks, n), of the singular values that are not rounding errors of zero."""
    return s > s[..., :1] * s.shape[-1] * torch.finfo(s.dtype).eps
