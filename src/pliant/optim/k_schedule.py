"""Annealing of k: vertices have many parts at first, few at the end."""

from __future__ import annotations

import math
from typing import Any

from pliant.constraints import resolve_k
from pliant.errors import BadInput
from pliant.norms import NormBall
from pliant.optim.balls import Group, ParsedBalls, ball_shapes
from pliant.optim.sfw import SFW


class KSchedule:
    """A schedule that anneals the k of every ball that has one, linearly from ``start`` to ``end`` in ``steps`` steps.

    The L2 diameter of each ball is kept, so the radius follows k; the weights are scaled into the new ball and the
    momentum is kept. The constructor sets the first k but touches no weights; call :meth:`step` after each optimizer
    step. To resume, load the optimizer's state and the schedule's, in any order.

    Args:
        optimizer: an :class:`~pliant.SFW`.
        start: k at the first step: a count or a fraction, as in the presets.
        end: k at the last step; None for the k that each group has now.
        steps: number of steps from start to end, at least 1.

    Raises:
        BadInput: no group has a ball with a k, or ``steps``, ``start`` or ``end`` is out of range for a group.
    """

    def __init__(self, optimizer: SFW, start: float = 1.0, end: float | None = None, *, steps: int) -> None:
        if steps < 1:
            raise BadInput(f"a schedule of k needs steps >= 1, got {steps}")
        self.optimizer = optimizer
        self.steps = steps
        self.last_step = 0
        self._balls = ParsedBalls()
        self._spans: list[tuple[int, int] | None] = []
        for group in optimizer.param_groups:
            ball = self._balls.of(group)
            current = None if ball is None else ball.norm.k
            if ball is None or current is None:
                self._spans.append(None)
                continue
            n = _places(ball, group)
            try:
                self._spans.append((resolve_k(start, n), current if end is None else resolve_k(end, n)))
            except BadInput as error:
                names = ", ".join(group.get("param_names", ["a group without names"]))
                raise BadInput(f"{names}: {error}") from None
        if not any(self._spans):
            raise BadInput("no group of this optimizer has a ball with a k to anneal")
        self._apply(started=False)

    def step(self) -> None:
        """Advance by one step; after ``steps`` steps k stays at ``end``."""
        self.last_step += 1
        if self.last_step <= self.steps:
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "last_step": self.last_step,
            "steps": self.steps,
            "spans": [list(s) if s else None for s in self._spans],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state: every ball gets the k of that step.

        Raises:
            BadInput: the state is of an optimizer with another number of groups.
        """
        if len(state["spans"]) != len(self._spans):
            raise BadInput(f"a schedule of {len(state['spans'])} groups cannot go on with {len(self._spans)} groups")
        self.last_step, self.steps = state["last_step"], state["steps"]
        self._spans = [tuple(s) if s else None for s in state["spans"]]
        self._apply()

    def _apply(self, *, started: bool = True) -> None:
        progress = min(1.0, self.last_step / self.steps)
        for group, span in zip(self.optimizer.param_groups, self._spans, strict=True):
            if span is None:
                continue
            ball = self._balls.of(group)
            assert ball is not None  # only groups with a ball have a span
            k = math.floor(span[0] + (span[1] - span[0]) * progress + 0.5)
            if k != ball.norm.k:
                shapes = ball_shapes(group)
                norm = ball.norm.with_k(k)
                ball = NormBall(norm, ball.diameter(shapes) / norm.diameter(shapes))
                if started:
                    self.optimizer.set_ball(group, ball)
                else:
                    group["ball"] = ball.to_spec()


def _places(ball: NormBall, group: Group) -> int:
    """Return how many entries, filters, channels or directions k is out of; raise BadInput if tensors differ in it."""
    norm = ball.norm.with_k(1)
    if group["joint"]:
        return norm.length(ball_shapes(group))
    lengths = {norm.length(p.shape) for p in group["params"]}
    if len(lengths) > 1:
        raise BadInput(f"a group with one ball has tensors with {sorted(lengths)} places for k: split the group")
    return lengths.pop()
