"""Spectral weight decay: a decoupled decay that lowers all singular values alike.

    W ← W − lr·λ·polar(W)          polar(U diag(σ) Vᵀ) = UVᵀ, the gradient of the nuclear norm

after the step of SGD, with the polar factor from a Newton-Schulz iteration: products of matrices, no decomposition. A
singular value that is too small for the iteration to lift it to 1 decays in proportion to itself, and no singular value
can change its sign. (arXiv 2610.11730.)
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.linalg import polar


class SpectralDecay(MatrixSGD):
    """SGD with decoupled decay of the nuclear norm."""

    options: ClassVar[dict[str, Any]] = {"strength": 0.02}

    def after(self, w: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Step against the polar factor."""
        length: float = group["lr"] * group["strength"]
        return w - length * polar(w)
