"""CAT: the proximal step of the nuclear norm, after each step of SGD.

    W = U diag(σ) Vᵀ ← U diag(max(0, σ − lr·λ)) Vᵀ

Alvarez, Salzmann 2017, Compression-aware training of deep networks, arXiv 1711.02638, without their optional group
lasso, which is GLT.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.matrices import svd


class CAT(MatrixSGD):
    """SGD with a soft threshold on the singular values; one full SVD per weight and step."""

    options: ClassVar[dict[str, Any]] = {"strength": 0.02}

    def after(self, w: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Lower each singular value by the threshold."""
        u, s, vh = svd(w)  # s: (blocks, n)
        threshold: float = group["lr"] * group["strength"]
        lowered = (s - threshold).clamp_min(0)
        return (u * lowered[..., None, :]) @ vh
