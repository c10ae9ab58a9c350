"""Annealing of k as the optimizer keeps it: in its groups, as plain data that is saved and loaded with them.

A group whose k is annealed has a *course* under ``"k_schedule"``: ``start``, ``end`` and ``steps`` as they were asked
for, the number of optimizer steps that are counted (``step``), and k at both ends as counts (``first``, ``last``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pliant.constraints import resolve_k
from pliant.errors import BadInput
from pliant.norms import NormBall
from pliant.optim.balls import Group, ball_shapes

COURSE = "k_schedule"
Course = dict[str, Any]


def new_course(
    ball: NormBall | None, group: Group, start: float, end: float | None, steps: int, step: int = 0
) -> Course | None:
    """Return the course of a group, at a step; None if its ball has no k.

    Args:
        ball: the ball of the group.
        group: its tensors, and whether they share the ball.
        start: k at step 0, a count or a fraction.
        end: k at the last step; None for the k of the ball.
        steps: the number of steps between them.
        step: how many steps are counted already.

    Raises:
        BadInput: ``start`` or ``end`` is out of range for the tensors.
    """
    if ball is None or ball.norm.k is None:
        return None
    try:
        places = _places(ball, group)
        first, last = resolve_k(start, places), ball.norm.k if end is None else resolve_k(end, places)
    except BadInput as error:
        names = ", ".join(group.get("param_names", ["a group without names"]))
        raise BadInput(f"{names}: {error}") from None
    return {"start": start, "end": end, "steps": steps, "step": step, "first": first, "last": last}


def course_for_a_late_group(ball: NormBall | None, group: Group, others: Sequence[Group]) -> Course | None:
    """Return the course of a group that joins groups whose k is annealed, at their step; None if it has none to join.

    Raises:
        BadInput: their ``start`` or ``end`` is out of range for its tensors.
    """
    running = next((other[COURSE] for other in others if COURSE in other), None)
    if running is None:
        return None
    return new_course(ball, group, running["start"], running["end"], running["steps"], running["step"])


def annealed(ball: NormBall, group: Group) -> NormBall | None:
    """Return the ball of a group with a course as it is at the group's step; None if it is so already."""
    course = group[COURSE]
    progress = min(1.0, course["step"] / course["steps"])
    k = math.floor(course["first"] + (course["last"] - course["first"]) * progress + 0.5)
    if k == ball.norm.k:
        return None
    shapes, norm = ball_shapes(group), ball.norm.with_k(k)
    return NormBall(norm, ball.diameter(shapes) / norm.diameter(shapes))


def count_step(ball: NormBall | None, group: Group) -> NormBall | None:
    """Count a step of a group with a course; return its next ball, None if that is the one it has.

    After the last step the course leaves k alone.
    """
    # A new dict: a state dict that was taken before must not change.
    course = group[COURSE] = {**group[COURSE], "step": group[COURSE]["step"] + 1}
    return annealed(ball, group) if ball is not None and course["step"] <= course["steps"] else None


def suits(group: Group, ball: NormBall | None) -> bool:
    """Return whether the course of a group can go on with another ball: all its k fit the tensors."""
    if ball is None or ball.norm.k is None:
        return False
    try:
        for end in ("first", "last"):
            ball.norm.with_k(group[COURSE][end]).length(ball_shapes(group))
    except ValueError:
        return False
    return True


def _places(ball: NormBall, group: Group) -> int:
    """Return how many entries, filters, channels or directions k is out of; raise BadInput if tensors differ in it."""
    norm = ball.norm.with_k(1)
    if group["joint"]:
        return norm.length(ball_shapes(group))
    lengths = {norm.length(p.shape) for p in group["params"]}
    if len(lengths) > 1:
        raise BadInput(f"a group with one ball has tensors with {sorted(lengths)} places for k: split the group")
    return lengths.pop()
