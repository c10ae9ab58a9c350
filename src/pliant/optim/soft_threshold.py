"""Soft thresholds: parts of the weights that few vertices share shrink to 0 during training."""

from __future__ import annotations

from typing import Any

import torch

from pliant.errors import BadInput
from pliant.optim.balls import as_ball
from pliant.optim.sfw import SFW
from pliant.optim.thresholding import DEBT, Debt, count_step, new_debt
from pliant.optim.wrapped import unwrapped


class SoftThreshold:
    """A soft threshold that shortens all parts of constrained weights a little, every ``every`` optimizer steps.

    Parts are the entries, filters, channels or singular directions that the vertices of a ball consist of. A step adds
    η·u to the parts of its vertex, where u is their length. The threshold shortens *all* parts of the weights by
    strength·η·u, down to 0. So a part survives if more than a share ``strength`` of the vertices contain it. The
    weights end up with fewer parts, and lose less when parts are removed.

    This is the proximal step of the parts' total length (L1 norm, group lasso, nuclear norm), alternating with
    Frank-Wolfe steps. It increases no norm, so the weights stay in their balls. :meth:`pliant.SFW.gap` remains the gap
    of the loss alone. It needs ``rescale=None``, so that η is the same for all tensors. Parameters that no step has
    moved are left unchanged.

    The optimizer counts, as for :class:`~pliant.KSchedule`: what is pending is kept in its groups and in its state, and
    each step that it takes ends with the threshold, before k changes. Skipped steps add nothing, and groups that are
    added later take part. :meth:`step` may be called after each step or not. To resume, load the optimizer's state.
    ``strength`` and ``every`` are those of the constructor, and may be set at any time.

    Args:
        optimizer: an :class:`~pliant.SFW` with ``rescale=None``, or a wrapper of one by Accelerate, Lightning and the
            like; weights in balls without parts, such as L2 balls, are left unchanged.
        strength: from 0, which does nothing, to below 1.
        every: number of optimizer steps between thresholds; each threshold makes up for all of these steps. Under a
            spectral ball it decomposes the weights.

    Raises:
        BadInput: an argument is out of range, there is no :class:`~pliant.SFW`, ``rescale`` is not None, or no group
            has a ball with parts.
    """

    def __init__(self, optimizer: SFW, strength: float, *, every: int = 20) -> None:
        _check(strength, every)
        self.optimizer = unwrapped(optimizer, "a soft threshold")
        groups = self.optimizer.param_groups
        debts = [new_debt(as_ball(group["ball"]), group, strength, every) for group in groups]
        if not any(debts):
            raise BadInput("no group of this optimizer has a ball with parts: entries, filters, directions")
        goes_on = self.optimizer.claim(DEBT)
        for group, debt in zip(groups, debts, strict=True):
            before = group.pop(DEBT, None)
            if debt is not None:
                kept = {name: before[name] for name in ("step", "pending")} if goes_on and before else {}
                group[DEBT] = {**debt, **kept}

    @torch.no_grad()
    def step(self) -> None:
        """Do nothing: the optimizer counts its steps, and shortens the parts every ``every`` of them.

        Groups with ``capturable`` are the exception. A CUDA graph runs no Python, so this counts for them: call it
        after each replay.
        """
        for group in self.optimizer.param_groups:
            if group["capturable"] and DEBT in group:
                count_step(as_ball(group["ball"]), group, self.optimizer.state)

    @property
    def strength(self) -> float:
        """The share of the vertices that a part needs to survive."""
        return float(self._running["strength"])

    @strength.setter
    def strength(self, value: float) -> None:
        _check(value, self.every)
        self._set("strength", value)

    @property
    def every(self) -> int:
        """The number of optimizer steps between thresholds."""
        return int(self._running["every"])

    @every.setter
    def every(self, value: int) -> None:
        _check(self.strength, value)
        self._set("every", value)

    @property
    def last_step(self) -> int:
        """How many steps of the optimizer are counted."""
        return int(self._running["step"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data; the optimizer's state holds it too."""
        pending = [group[DEBT]["pending"] if DEBT in group else 0.0 for group in self.optimizer.param_groups]
        return {"last_step": self.last_step, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; states of optimizers hold it too, unless they were saved before they did.

        Raises:
            BadInput: the state is of an optimizer with another number of groups.
        """
        groups, pending = self.optimizer.param_groups, state["pending"]
        if len(pending) != len(groups):
            raise BadInput(f"thresholds of {len(pending)} groups cannot go on with {len(groups)} groups")
        for group, amount in zip(groups, pending, strict=True):
            if DEBT in group:
                group[DEBT] = {**group[DEBT], "step": state["last_step"], "pending": amount}

    @property
    def _running(self) -> Debt:
        """The debt of the first group that has one: all are at the same step."""
        found = (group[DEBT] for group in self.optimizer.param_groups if DEBT in group)
        return next(found, {"strength": 0.0, "every": 1, "step": 0})

    def _set(self, name: str, value: float) -> None:
        for group in self.optimizer.param_groups:
            if DEBT in group:
                group[DEBT] = {**group[DEBT], name: value}


def _check(strength: float, every: int) -> None:
    if not 0 <= strength < 1:
        raise BadInput(f"a soft threshold needs a strength from 0 to below 1, got {strength}")
    if every < 1:
        raise BadInput(f"a soft threshold needs every >= 1, got {every}")
