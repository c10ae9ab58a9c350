"""SSL: group lasso over filters, in the loss.

    L(θ) + λ Σ_f ‖W_f‖₂          sub-gradient of the sum: W_f/‖W_f‖₂, and 0 for a zero filter

Wen, Wu, Wang, Chen, Li 2016, Learning structured sparsity in deep neural networks, arXiv 1608.03665. Of their groups
(filters, channels, filter shapes, depth) the filters.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.linalg import divide_or_zero, vector_norm


class SSL(MatrixSGD):
    """SGD on the loss plus ``strength`` times the sum of the L2 norms of the filters."""

    options: ClassVar[dict[str, Any]] = {"strength": 2e-3}

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Add the sub-gradient of the penalty."""
        strength: float = group["strength"]
        return g + strength * divide_or_zero(w, vector_norm(w, dim=-1, keepdim=True))
