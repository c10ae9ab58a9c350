"""The area under a curve of accuracy against the removed share: one number for "good at every size".

    area = 1/0.9 · ∫ accuracy ds from 0 to 0.9, by the trapezoid rule on s = 0, 0.1, …, 0.9

where s is the share of *all* parameters (or MACs, or non-zeros) that is gone. Between two measured sizes the accuracy
is interpolated; beyond the smallest measured size a method reaches nothing, and nothing counts as guessing.

Areas of several seeds become an :class:`Estimate`: their mean with Student's confidence interval. Plain numbers; the
standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

from pliant.errors import BadInput

GRID = tuple(step / 10 for step in range(10))
SLACK = 5e-3
"""A size missed by this share counts as reached: whole channels and ranks cannot be cut to any share."""


def area(points: Iterable[tuple[float, float]], chance: float) -> float:
    """Return the area under a curve.

    Args:
        points: pairs (removed share, accuracy); the first is the dense network, removed share 0.
        chance: accuracy of guessing.

    Raises:
        BadInput: there is no dense network among the points.
    """
    known = curve_of(points)
    if not known or known[0][0] != 0:
        raise BadInput("the area under a curve needs the dense network, a point with removed share 0")
    heights = [accuracy_at(known, share, chance) for share in GRID]
    return sum((a + b) / 2 for a, b in pairwise(heights)) / (len(GRID) - 1)


def curve_of(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points in the order of their shares; of two networks of one size the better one counts."""
    best: dict[float, float] = {}
    for share, accuracy in points:
        best[share] = max(accuracy, best.get(share, accuracy))
    return sorted(best.items())


def accuracy_at(points: Iterable[tuple[float, float]], share: float, chance: float) -> float:
    """Return the accuracy at a removed share, interpolated between the measured ones; chance beyond the last."""
    known = curve_of(points)
    for (left, low), (right, high) in pairwise(known):
        if left <= share <= right:
            return low + (high - low) * (share - left) / (right - left)
    last, accuracy = known[-1]
    return accuracy if 0 <= share - last <= SLACK else chance


def is_reached(points: Iterable[tuple[float, float]], share: float) -> bool:
    """Tell whether a removed share lies within the measured ones."""
    return share - max(known for known, _ in points) <= SLACK


class Estimate(NamedTuple):
    """A mean of ``n`` values, and half the width of its confidence interval; None if there are too few values."""

    mean: float
    half: float | None
    n: int


LEVEL = 0.95
"""Confidence of all intervals."""


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with Student's confidence interval of :data:`LEVEL`."""
    n = len(values)
    half = student_t(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(fmean(values), half, n)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """Return the mean of ``first`` − ``second``, values by seed: of the pairs with equal seeds, where there are any.

    Without a common seed there is no pair and no interval; ``n`` is the number of pairs.
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
    for step in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * step / (step + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
