"""Annealing of k: vertices have many parts at first, few at the end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from pliant.errors import BadInput
from pliant.norms import NormBall
from pliant.optim.annealing import COURSE, Course, annealed, count_step, new_course
from pliant.optim.balls import as_ball
from pliant.optim.sfw import SFW
from pliant.optim.wrapped import unwrapped


class KSchedule:
    """A schedule that anneals the k of every ball that has one, linearly from ``start`` to ``end`` in ``steps`` steps.

    The L2 diameter of each ball is kept, so the radius follows k; the weights are scaled into the new ball and the
    momentum is kept. The constructor sets the first k but touches no weights: if they have been trained already, the
    next step of the optimizer scales them inside.

    **The optimizer counts.** The schedule is kept in the groups of the optimizer, which advances it at the end of each
    step that it takes. So a step that is skipped (by a ``GradScaler``, while gradients accumulate, by
    ``check_finite``) does not count, a checkpoint of the optimizer alone holds the schedule, and a group that is added
    later joins it. :meth:`step` may be called after each step or not.

    **To resume**, load the optimizer's state, before or after the schedule is made. A schedule that is made after a
    state with a schedule of the same ``start``, ``end`` and ``steps`` was loaded continues it; with other arguments it
    begins anew and warns.

    Args:
        optimizer: an :class:`~pliant.SFW`, or a wrapper of one by Accelerate, Lightning and the like.
        start: k at the first step: a count or a fraction, as in the presets.
        end: k at the last step; None for the k that each group has now.
        steps: number of steps from start to end, at least 1.

    Raises:
        BadInput: there is no :class:`~pliant.SFW`, no group has a ball with a k, or ``steps``, ``start`` or ``end`` is
            out of range for a group.
    """

    def __init__(self, optimizer: SFW, start: float = 1.0, end: float | None = None, *, steps: int) -> None:
        if steps < 1:
            raise BadInput(f"a schedule of k needs steps >= 1, got {steps}")
        self.optimizer = unwrapped(optimizer, "a schedule of k")
        groups = self.optimizer.param_groups
        courses = [new_course(as_ball(group["ball"]), group, start, end, steps) for group in groups]
        if not any(courses):
            raise BadInput("no group of this optimizer has a ball with a k to anneal")
        if self._continues(courses, end):
            return
        for group, course in zip(groups, courses, strict=True):
            self._put(group, course)

    def step(self) -> None:
        """Do nothing: the optimizer counts its steps, and after ``steps`` of them k stays at ``end``.

        Groups with ``capturable`` are the exception. A CUDA graph runs no Python, so this counts for them: call it
        after each replay.
        """
        for group in self.optimizer.param_groups:
            if group["capturable"] and COURSE in group:
                ball = count_step(as_ball(group["ball"]), group)
                if ball is not None:
                    self.optimizer.set_ball(group, ball)

    @property
    def last_step(self) -> int:
        """How many steps of the optimizer are counted."""
        return int(self._running["step"])

    @property
    def steps(self) -> int:
        """The number of steps from start to end."""
        return int(self._running["steps"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data; the optimizer's state holds it too."""
        courses = [group.get(COURSE) for group in self.optimizer.param_groups]
        spans = [None if course is None else [course["first"], course["last"]] for course in courses]
        return {"last_step": self.last_step, "steps": self.steps, "spans": spans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state: every ball gets the k of that step.

        States of optimizers hold their schedule too; this is for states that were saved before they did, and for
        whoever needs the k before the optimizer's state, as torch.distributed.checkpoint does.

        Raises:
            BadInput: the state is of an optimizer with another number of groups, or of groups with another k.
        """
        groups, spans = self.optimizer.param_groups, state["spans"]
        if len(spans) != len(groups):
            raise BadInput(f"a schedule of {len(spans)} groups cannot go on with {len(groups)} groups")
        for index, (group, span) in enumerate(zip(groups, spans, strict=True)):
            ball = as_ball(group["ball"])
            if span and (ball is None or ball.norm.k is None):
                raise BadInput(f"the schedule was one of the k of group {index}, which has no ball with a k now")
        raw = {name: self._running.get(name) for name in ("start", "end")}
        for group, span in zip(groups, spans, strict=True):
            place = {"steps": state["steps"], "step": state["last_step"]}
            self._put(group, {**raw, **place, "first": span[0], "last": span[1]} if span else None)

    @property
    def _running(self) -> Course:
        """The course of the first group that has one: all are at the same step."""
        found = (group[COURSE] for group in self.optimizer.param_groups if COURSE in group)
        return next(found, {"start": 1.0, "end": None, "steps": 1, "step": 0})

    def _put(self, group: dict[str, Any], course: Course | None) -> None:
        """Give a group a course and the k of its step; its next step scales weights inside."""
        if course is None:
            group.pop(COURSE, None)
            return
        group[COURSE] = course
        ball = as_ball(group["ball"])
        assert isinstance(ball, NormBall)  # only groups with a ball have a course
        changed = annealed(ball, group)
        if changed is not None:
            group["ball"] = changed.to_spec()

    def _continues(self, courses: Sequence[Course | None], end: float | None) -> bool:
        """Return whether this is the schedule that a loaded state is in the middle of; warn if it is another one.

        Args:
            courses: those that this schedule would begin with.
            end: as it was asked for; None agrees with any, for k is on its way.
        """
        if not self.optimizer.claim(COURSE):
            return False
        found = [group.get(COURSE) for group in self.optimizer.param_groups]
        names = ("first", "steps") if end is None else ("first", "last", "steps")

        def told(course: Course | None) -> list[Any] | None:
            return None if course is None else [course[name] for name in names]

        if all(told(old) == told(new) for old, new in zip(found, courses, strict=True)):
            return True
        old, new = (next(course for course in each if course is not None) for each in (found, courses))
        there, here = (", ".join(f"{name}={each[name]}" for name in ("start", "end", "steps")) for each in (old, new))
        warnings.warn(
            f"the loaded state is at step {old['step']} of a schedule of k with {there}, but this one has {here} and "
            "begins anew: make it with the arguments of the loaded one to continue that",
            stacklevel=3,
        )
        return False
