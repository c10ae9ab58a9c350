"""Learning rates over a training: a linear warm-up, then a schedule; and the one that a turnover asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

LARGEST_STEP = 0.1  # lr of a training so short that it cannot replace its weights as often as wanted
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "constant": lambda t: 1.0,
}


def learning_rate(settings: dict[str, Any], steps: int) -> Callable[[int], float]:
    """Return the factor of lr at each step: a linear warm-up, then the schedule over what remains."""
    warm = int(settings["warmup"] * steps + 0.5)
    shape = SCHEDULES[settings["schedule"]]

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return shape((step - warm) / max(1, steps - warm))

    return factor


def turnover_lr(settings: dict[str, Any], steps: int) -> float:
    """Return the largest lr of a training whose convex weights sum to ``turnover``; :data:`LARGEST_STEP` at most.

    It has three significant digits, as one would choose it.
    """
    factor = learning_rate(settings, steps)
    lr = float(settings["turnover"]) / sum(factor(step) for step in range(steps))
    return min(LARGEST_STEP, float(f"{lr:.3g}"))
