"""Learning rates over a training: a linear warm-up, then a schedule; and the learning rate that gives a turnover."""

from __future__ import annotations

import math
from collections.abc import Callable

LARGEST_STEP = 0.1  # lr of a training that is too short to replace its weights as often as ``turnover`` says
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "constant": lambda t: 1.0,
}


def learning_rate(schedule: str, warmup: float, steps: int) -> Callable[[int], float]:
    """Return the factor of lr at each step: a linear warm-up, then the schedule over what remains.

    Args:
        schedule: a name in :data:`SCHEDULES`.
        warmup: share of the steps during which lr rises.
        steps: number of steps of the whole training.
    """
    warm = int(warmup * steps + 0.5)
    shape = SCHEDULES[schedule]

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return shape((step - warm) / max(1, steps - warm))

    return factor


def turnover_lr(turnover: float, factor: Callable[[int], float], steps: int) -> float:
    """Return the peak lr, at most :data:`LARGEST_STEP`, with which the step sizes of a training sum to ``turnover``.

    It is rounded to three significant digits, as one would choose it by hand.
    """
    lr = turnover / sum(factor(step) for step in range(steps))
    return min(LARGEST_STEP, float(f"{lr:.3g}"))
