"""Weights as matrices, and the decompositions that the baselines take of them.

A weight is read as ``(blocks, rows, columns)``: one row per output, and one block per group of a grouped convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Muon's iteration lifts small singular values fast and leaves all of them between 0.68 and 1.21 (Jordan et al. 2024).
LIFTING = (3.4445, -4.7750, 2.0315)
# This one converges to 1 from there, with the third power of the distance (Higham 2008, Functions of Matrices).
CONVERGING = (15 / 8, -10 / 8, 3 / 8)


def as_matrices(x: Tensor, row_dim: int, blocks: int) -> Tensor:
    """Return a tensor as matrices (blocks, rows, columns); a view where memory allows it.

    Args:
        x: a weight or its gradient.
        row_dim: the dimension that counts the rows of all blocks.
        blocks: how many equal parts the rows are divided in.
    """
    return x.movedim(row_dim, 0).reshape(blocks, x.shape[row_dim] // blocks, -1)


def write_matrices(matrices: Tensor, out: Tensor, row_dim: int) -> None:
    """Write what :func:`as_matrices` read back to ``out``, a tensor of the original shape."""
    rows_first = out.movedim(row_dim, 0)
    rows_first.copy_(matrices.reshape(rows_first.shape))


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ, Vᵀ of each matrix, thin; raises torch.linalg.LinAlgError for NaN or infinite entries."""
    if matrices.shape[-2] >= matrices.shape[-1]:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u, s, vh
    v, s, uh = torch.linalg.svd(matrices.mT, full_matrices=False)  # a tall one takes half the time of a wide one
    return uh.mT, s, v.mT


def polar_by_svd(matrices: Tensor) -> Tensor:
    """Return UVᵀ over the non-zero singular values: the polar factor, and the least sub-gradient of Σσ."""
    u, s, vh = svd(matrices)
    return (u * positive(s)[..., None, :]) @ vh


def positive(s: Tensor) -> Tensor:
    """Mark the singular values that are not rounding errors of zero."""
    return s > s[..., :1] * s.shape[-1] * torch.finfo(s.dtype).eps


def polar(matrices: Tensor, lifting: int = 5, converging: int = 2) -> Tensor:
    """Return the polar factor UVᵀ of each matrix by matrix products alone (Newton-Schulz iteration).

    Singular values above 1/500 of the Frobenius norm come out as 1 within 0.001, far smaller ones in proportion to what
    they were. Without the converging steps this is Muon's, with values between 0.68 and 1.21.

    Args:
        matrices: (blocks, rows, columns).
        lifting: steps that bring all singular values near 1.
        converging: steps that make them 1.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / torch.where(norm == 0, torch.ones_like(norm), norm)
    for a, b, c in [LIFTING] * lifting + [CONVERGING] * converging:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
