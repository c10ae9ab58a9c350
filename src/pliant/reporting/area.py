"""The area under a curve of accuracy against the removed share: one number for "good at every size".

    area = 1/0.9 · ∫ accuracy ds from 0 to 0.9, by the trapezoid rule on s = 0, 0.1, …, 0.9

where s is the removed share of *all* parameters (or MACs, or non-zeros). Between two measured sizes the accuracy is
interpolated; a size beyond the smallest measured one is not reached, and counts as guessing.

Plain numbers; the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from pliant.errors import BadInput

GRID = tuple(tenths / 10 for tenths in range(10))
SLACK = 5e-3
"""A size missed by at most this share counts as reached: whole channels and ranks seldom meet a share exactly."""


def area(points: Iterable[tuple[float, float]], chance: float) -> float:
    """Return the area under a curve.

    Args:
        points: pairs (removed share, accuracy); the first is the dense network, removed share 0.
        chance: accuracy of guessing.

    Raises:
        BadInput: the dense network is not among the points.
    """
    known = curve_of(points)
    if not known or known[0][0] != 0:
        raise BadInput("the area under a curve needs the dense network, a point with removed share 0")
    heights = [accuracy_at(known, share, chance) for share in GRID]
    return sum((a + b) / 2 for a, b in pairwise(heights)) / (len(GRID) - 1)


def curve_of(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points sorted by their shares; of two networks of the same size the better one counts."""
    best: dict[float, float] = {}
    for share, accuracy in points:
        best[share] = max(accuracy, best.get(share, accuracy))
    return sorted(best.items())


def accuracy_at(points: Iterable[tuple[float, float]], share: float, chance: float) -> float:
    """Return the accuracy at a removed share, interpolated between measured shares; beyond the last, ``chance``."""
    known = curve_of(points)
    for (left, low), (right, high) in pairwise(known):
        if left <= share <= right:
            return low + (high - low) * (share - left) / (right - left)
    last, accuracy = known[-1]
    return accuracy if 0 <= share - last <= SLACK else chance


def is_reached(points: Iterable[tuple[float, float]], share: float) -> bool:
    """Return whether a removed share lies within the measured shares."""
    return share - max(known for known, _ in points) <= SLACK
