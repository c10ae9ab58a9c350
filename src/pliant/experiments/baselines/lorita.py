"""LoRITa: weights trained as products of N square or full factors, under weight decay.

    W = W_1 · … · W_N,    loss + wd/2 Σ_i ‖W_i‖²

The minimum of that penalty over all factors of a given W is wd times its nuclear norm for N = 2, and wd·N/2 times the
sum of σ^(2/N) for larger N: decay of the factors is low-rank regularisation of the product. The inner sizes are
min(rows, columns), which does not limit the rank. After the training the factors are multiplied out.

Zhang, Alkhouri, Wang 2024, Structure-preserving network compression via low-rank induced training through linear layers
composition, arXiv 2405.03089. The additional factors start as random orthogonal matrices, so that the product has the
singular values of the layer's own initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.experiments.baselines.products import Product


class Composition(Product):
    """A weight as the product of ``count`` factors.

    Args:
        shape: shape of the weight.
        row_dim: the dimension that counts the rows.
        blocks: how many matrices the weight holds.
        count: the number of factors.
    """

    def __init__(self, shape: torch.Size, row_dim: int, blocks: int, *, count: int) -> None:
        super().__init__(shape, row_dim, blocks)
        self.count = count

    def factors(self, w: Tensor) -> tuple[Tensor, ...]:
        """Return orthogonal factors on the smaller side, and w itself."""
        n = min(w.shape[-2:])
        squares = [_orthogonal(w, n) for _ in range(self.count - 1)]
        whole = w.detach().clone()
        return (*squares, whole) if w.shape[-2] <= w.shape[-1] else (whole, *squares)


def _orthogonal(like: Tensor, n: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(like.shape[0], n, n, dtype=like.dtype)).Q
    return q.to(like.device)
