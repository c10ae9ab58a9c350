"""Muon: steps along the polar factor of the momentum.

    m ← μ·m + (1 − μ)·g
    d = polar((1 − μ)·g + μ·m)                          Nesterov's look ahead; five Newton-Schulz steps
    W ← (1 − lr·λ)·W − lr·0.2·√max(rows, columns)·d

Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks; the factor, which gives a step the size of
Adam's: Liu et al. 2025, Muon is scalable for LLM training, arXiv 2502.16982. It is ``torch.optim.Muon`` with
``adjust_lr_fn="match_rms_adamw"``, also for convolutions, and in the precision of the weights instead of bfloat16.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.linalg import polar


class Directed(MatrixSGD):
    """Base of the methods that move matrices along a direction of their own, without the momentum of the SGD step.

    Their ``momentum`` averages gradients; a group of matrices holds it as ``"beta"``.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; for matrices the SGD step becomes W ← W − lr·direction."""
        if param_group.get("row_dim") is not None:
            beta = param_group.get("momentum", self.defaults["momentum"])
            param_group = {"beta": beta, **param_group, "momentum": 0.0, "weight_decay": 0.0}
        super().add_param_group(param_group)

    def average(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Fold a gradient into the moving average and return it, the state's own tensor."""
        if "average" not in state:
            state["average"] = torch.zeros_like(g)
        mean: Tensor = state["average"]
        return mean.lerp_(g, 1 - group["beta"])


class Muon(Directed):
    """Muon for matrices, SGD for the rest; ``strength`` is the decoupled decay λ of the matrices."""

    options: ClassVar[dict[str, Any]] = {"strength": 0.1}

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the direction, which replaces the gradient."""
        ahead = g.lerp(self.average(g, state, group), group["beta"])
        decay: float = group["strength"]
        return adam_size(w) * polar(ahead, converging=0) + decay * w


def adam_size(w: Tensor) -> float:
    """Return the factor that gives an orthogonal matrix of this shape the root mean square 0.2."""
    return 0.2 * math.sqrt(max(w.shape[-2:]))
