"""Student's confidence intervals for the mean over the seeds of a training.

The results of several seeds give an :class:`Estimate`, and so does the difference of two trainings. Plain numbers; the
standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

LEVEL = 0.95
"""Confidence of all intervals."""


class Estimate(NamedTuple):
    """A mean of ``n`` values, and half the width of its confidence interval; None if there are too few values."""

    mean: float
    half: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with Student's confidence interval of :data:`LEVEL`."""
    n = len(values)
    half = student_t(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(fmean(values), half, n)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """Return the mean of ``first`` − ``second`` over pairs of equal seeds.

    Without a common seed the means are compared, without an interval.

    Args:
        first, second: seed → value.

    Returns:
        The estimate; its ``n`` is the number of pairs.
    """
    common = sorted(first.keys() & second.keys())
    if common:
        return estimate([first[seed] - second[seed] for seed in common])
    return Estimate(fmean(first.values()) - fmean(second.values()), None, 0)


def student_t(freedom: int, level: float = LEVEL) -> float:
    """Return t with P(−t ≤ T ≤ t) = ``level`` for Student's T with a whole number of degrees of freedom."""
    low, high = 0.0, 1.0
    while _inside(high, freedom) < level:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if middle in (low, high):  # neighbours among the floats
            return middle
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)


def _inside(t: float, freedom: int) -> float:
    """Return P(−t ≤ T ≤ t), by the finite sums for whole degrees of freedom (Abramowitz, Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for index in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * index / (index + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
