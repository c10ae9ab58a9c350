"""Q3R: a quadratic in the loss that majorises a smoothed log-determinant, reweighted every few steps.

Every T steps, from W₀ = U diag(σ) Vᵀ, with ε the smallest (k+1)-th singular value so far:

    D = diag(min(1, ε/σ_i))  in the directions U and V, the identity in all others
    L(θ) + λ/2 Σ_layers ⟨W, R(W)⟩,   R(W) = (U D Uᵀ) W (V D Vᵀ)          gradient λ·R(W)

At W₀ it is the gradient of Σ f(σ_i) with f(σ) = ε²·(ln(σ/ε) + ½) above ε and σ²/2 below: the larger a singular value
above ε, the less it is pushed; those below ε decay.

Ghosh, Nguyen, Kümmerle 2025, Q3R: quadratic reweighted rank regularizer for effective low-rank training, NeurIPS, arXiv
2511.04485. Here the gradient of the penalty goes through the momentum, as any penalty in the loss does; their AdamQ3R,
which keeps it out of Adam's moments, has no counterpart for SGD.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.experiments.baselines.matrices import svd


class Q3R(MatrixSGD):
    """SGD on the loss plus the reweighted quadratic; ``k`` is the target rank, T is ``every``."""

    options: ClassVar[dict[str, Any]] = {"k": 1, "every": 5, "strength": 0.01}

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Add the gradient of the penalty."""
        if state.get("steps", 0) % group["every"] == 0:
            u, s, vh = svd(w)
            # If there is no (k+1)-th singular value, there is nothing to push down: ε becomes 0, and so does R.
            last = s[..., group["k"]] if group["k"] < s.shape[-1] else torch.zeros_like(s[..., 0])
            state["epsilon"] = torch.minimum(state["epsilon"], last) if "epsilon" in state else last
            state["left"], state["right"] = u, vh.mT
            state["pull"] = 1 - (state["epsilon"][..., None] / s.clamp_min(torch.finfo(s.dtype).tiny)).clamp_max(1)
        state["steps"] = state.get("steps", 0) + 1
        strength: float = group["strength"]
        return g + strength * reweighted(w, state["left"], state["right"], state["pull"])


def reweighted(w: Tensor, left: Tensor, right: Tensor, pull: Tensor) -> Tensor:
    """Return (I − U P Uᵀ) W (I − V P Vᵀ) with P = diag(pull) = I − D.

    Args:
        w: W, (blocks, rows, columns).
        left: U, (blocks, rows, n).
        right: V, (blocks, columns, n).
        pull: (blocks, n).
    """
    w = w - (left * pull[..., None, :]) @ (left.mT @ w)
    return w - ((w @ right) * pull[..., None, :]) @ right.mT
