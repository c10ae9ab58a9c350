"""Scion: convex combinations with scaled polar factors, the operator norm's Frank-Wolfe step.

    m ← μ·m + (1 − μ)·g
    W ← (1 − lr)·W − lr·ρ·√(rows/columns)·polar(m)

Pethick et al. 2025, Training deep learning models with norm-constrained LMOs, arXiv 2502.07529, with the
spectral norm. A convolution counts as the matrix of its rows, with c·s² columns for c channels and s×s kernels, so
that its radius is s times that of the authors' program, √(rows/c)/s². Their norms for other tensors (such as sign for
the last layer, root mean square for biases) are left out: as under every method here, those tensors take SGD steps. The
method is SFW with the ball ``Spectral(Lp(inf))`` of radius ρ·√(rows/columns) without rescaling, up to the error of the
Newton-Schulz iteration.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from pliant.experiments.baselines.muon import Directed
from pliant.linalg import polar


class Scion(Directed):
    """Scion for matrices, SGD for the rest; ``radius`` is ρ, ``lr`` the convex weight."""

    options: ClassVar[dict[str, Any]] = {"radius": 50.0}

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the direction, which replaces the gradient."""
        size: float = group["radius"] * math.sqrt(w.shape[-2] / w.shape[-1])
        return w + size * polar(self.average(g, state, group), converging=0)
