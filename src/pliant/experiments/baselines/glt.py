"""GLT: the proximal step of the group lasso over filters, after each step of SGD.

    W_f ← max(0, 1 − lr·λ·√P / ‖W_f‖₂) · W_f          P: number of weights of the filter

Alvarez, Salzmann 2016, Learning the number of neurons in deep networks, arXiv 1611.06321.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.base import MatrixSGD
from pliant.linalg import divide_or_zero, vector_norm


class GLT(MatrixSGD):
    """SGD with a soft threshold on the norm of each filter."""

    options: ClassVar[dict[str, Any]] = {"strength": 1e-3}

    def after(self, w: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Shorten each filter by the threshold; a filter below it becomes 0."""
        norms = vector_norm(w, dim=-1, keepdim=True)
        threshold = group["lr"] * group["strength"] * math.sqrt(w.shape[-1])
        return w * divide_or_zero((norms - threshold).clamp_min(0), norms)
