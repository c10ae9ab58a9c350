"""NUC: the nuclear norm in the loss.

    L(θ) + λ Σ_layers Σ_i σ_i(W)          sub-gradient of the inner sum: UVᵀ over the non-zero σ_i

Its use for networks that are factorised afterwards: Tai et al. 2016, Convolutional neural networks with low-rank
regularization, arXiv 1511.06067, and the comparison of Zimmer, Spiegel, Pokutta 2022, arXiv 2205.11921.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.matrices import polar_by_svd


class NUC(MatrixSGD):
    """SGD on the loss plus ``strength`` times the sum of the nuclear norms; one full SVD per weight and step."""

    options: ClassVar[dict[str, Any]] = {"strength": 2e-3}

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Add the sub-gradient of the penalty."""
        strength: float = group["strength"]
        return g + strength * polar_by_svd(w)
