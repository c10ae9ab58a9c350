"""Soft thresholds as the optimizer keeps them: in its groups, as plain data that is saved and loaded with them.

A group whose parts are shortened has a *debt* under ``"soft_threshold"``: ``strength`` and ``every``, the number of
optimizer steps that are counted (``step``), and by how much the parts are yet to be shortened (``pending``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.dtensors import cut_as, whole
from pliant.errors import BadInput
from pliant.norms import NormBall
from pliant.optim.balls import Group, ball_shapes, balls_over

DEBT = "soft_threshold"
Debt = dict[str, Any]


def new_debt(ball: NormBall | None, group: Group, strength: float, every: int, step: int = 0) -> Debt | None:
    """Return the debt of a group, with nothing pending; None if its ball has no parts.

    Raises:
        BadInput: the step size of the group is not the same for all tensors.
    """
    if ball is not None and group["rescale"] is not None:
        raise BadInput(f"a soft threshold needs an optimizer with rescale=None, got {group['rescale']!r}")
    if length_of_parts(ball, group) is None:
        return None
    return {"strength": strength, "every": every, "step": step, "pending": 0.0}


def debt_of_a_late_group(ball: NormBall | None, group: Group, others: Sequence[Group]) -> Debt | None:
    """Return the debt of a group that joins groups with one, at their step; None if it has none to join.

    Raises:
        BadInput: the step size of the group is not the same for all tensors.
    """
    running = next((other[DEBT] for other in others if DEBT in other), None)
    return None if running is None else new_debt(ball, group, running["strength"], running["every"], running["step"])


def count_step(ball: NormBall | None, group: Group, states: Mapping[Tensor, Any]) -> None:
    """Add the threshold of one optimizer step to the debt of a group; shorten its parts if it is time to.

    Args:
        ball: the ball of the group.
        group: with a debt.
        states: those of the optimizer; a parameter without one has not been moved, and is left unchanged.
    """
    debt = {**group[DEBT], "step": group[DEBT]["step"] + 1}
    length = length_of_parts(ball, group)
    if ball is not None and length is not None:
        debt["pending"] += debt["strength"] * min(1.0, float(group["lr"])) * length
        if debt["step"] % debt["every"] == 0:
            for tensors in balls_over([p for p in group["params"] if p in states], group):
                shorter = _shortened(ball, [whole(p) for p in tensors], debt["pending"])
                for p, values in zip(tensors, shorter, strict=True):
                    p.copy_(cut_as(values, p))
            debt["pending"] = 0.0
    group[DEBT] = debt


def _shortened(ball: NormBall, tensors: list[Tensor], amount: float) -> list[Tensor]:
    try:
        return ball.norm.soft_threshold(tensors, amount)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return tensors  # they are not finite, which the loss and the next step show


def length_of_parts(ball: NormBall | None, group: Group) -> float | None:
    """Return the root mean square L2 length of the parts of a vertex; None for balls without parts."""
    if ball is None:
        return None
    shapes = ball_shapes(group)
    parts = ball.norm.parts_of_vertex(shapes)
    return None if parts is None else ball.diameter(shapes) / 2 / math.sqrt(parts)
