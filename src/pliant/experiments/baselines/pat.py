"""PAT: proximal maps around an optimizer, from torchao itself.

    θ̂ ← SGD step from θ̂,    θ ← prox(θ̂; λ·Σ lr)          θ: the weights the network computes with

with the proximal map of Σ_f √P·‖W_f‖₂ (group lasso, P weights per filter) or of the nuclear norm; the threshold grows
with the sum of all learning rates so far. ``torchao.prototype.pat.PruneOptimizer``, used as its README does: SGD
inside, ten steps of warm-up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from pliant.errors import BadInput

WARMUP = 10
KINDS = {"filters": ("Dim0Grouper", "ProxGroupLasso"), "rank": ("SVDGrouper", "ProxNuclearNorm")}


def pat_optimizer(
    groups: list[dict[str, Any]], part: str, *, lr: float, momentum: float, weight_decay: float, strength: float
) -> Optimizer:
    """Return torchao's optimizer.

    Args:
        groups: parameter groups; those with ``"row_dim"`` 0 hold weights to be made sparse (torchao supports no other
            layout of rows).
        part: "filters" for the group lasso, "rank" for the nuclear norm.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        strength: λ.

    Raises:
        BadInput: torchao is not installed.
    """
    try:
        from torchao.prototype.pat import PruneOptimizer  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise BadInput("pat-filters and pat-rank need a package: pip install 'pliant[pat]'") from None
    grouper, prox = KINDS[part]
    chosen = [g | {"group_type": grouper, "prox_type": prox} if g.get("row_dim") == 0 else g for g in groups]
    inner = torch.optim.SGD(chosen, lr=lr, momentum=momentum, weight_decay=weight_decay)
    optimizer: Optimizer = PruneOptimizer(inner, warmup_steps=WARMUP, reg_lambda=strength)
    return optimizer
