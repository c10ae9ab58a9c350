"""Soft thresholds: parts of the weights that few vertices share shrink to 0 during training."""

from __future__ import annotations

import math
from typing import Any

import torch

from pliant.dtensors import cut_as, whole
from pliant.errors import BadInput
from pliant.norms import NormBall
from pliant.optim.balls import Group, ParsedBalls, ball_shapes, balls_over
from pliant.optim.sfw import SFW


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

    Call :meth:`step` after each step of the optimizer, before the scheduler's. To resume, load the optimizer's state
    and this one's.

    Args:
        optimizer: an :class:`~pliant.SFW` with ``rescale=None``; weights in balls without parts, such as L2 balls, are
            left unchanged.
        strength: from 0, which does nothing, to below 1.
        every: number of optimizer steps between thresholds; each threshold makes up for all of these steps. Under a
            spectral ball it decomposes the weights.

    Raises:
        BadInput: an argument is out of range, ``rescale`` is not None, or no group has a ball with parts.
    """

    def __init__(self, optimizer: SFW, strength: float, *, every: int = 20) -> None:
        if not 0 <= strength < 1:
            raise BadInput(f"a soft threshold needs a strength from 0 to below 1, got {strength}")
        if every < 1:
            raise BadInput(f"a soft threshold needs every >= 1, got {every}")
        for group in optimizer.param_groups:
            if group["ball"] is not None and group["rescale"] is not None:
                raise BadInput(f"a soft threshold needs an optimizer with rescale=None, got {group['rescale']!r}")
        self._balls = ParsedBalls()
        if all(_length_of_parts(self._balls.of(group), group) is None for group in optimizer.param_groups):
            raise BadInput("no group of this optimizer has a ball with parts: entries, filters, directions")
        self.optimizer = optimizer
        self.strength = strength
        self.every = every
        self.last_step = 0
        self._pending = [0.0] * len(optimizer.param_groups)

    @torch.no_grad()
    def step(self) -> None:
        """Add the threshold of one optimizer step to the pending amount; apply it every ``every`` steps."""
        self.last_step += 1
        for index, group in enumerate(self.optimizer.param_groups):
            length = _length_of_parts(self._balls.of(group), group)
            if length is None:
                continue
            self._pending[index] += self.strength * min(1.0, float(group["lr"])) * length
            if self.last_step % self.every == 0:
                self._apply(group, self._pending[index])
                self._pending[index] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"last_step": self.last_step, "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            BadInput: the state is of an optimizer with another number of groups.
        """
        if len(state["pending"]) != len(self._pending):
            raise BadInput(
                f"thresholds of {len(state['pending'])} groups cannot go on with {len(self._pending)} groups"
            )
        self.last_step, self._pending = state["last_step"], list(state["pending"])

    def _apply(self, group: Group, amount: float) -> None:
        ball = self._balls.of(group)
        assert ball is not None  # step() calls this only for balls with parts
        moved = [p for p in group["params"] if self.optimizer.state.get(p)]
        for tensors in balls_over(moved, group):
            shorter = ball.norm.soft_threshold([whole(p) for p in tensors], amount)
            for p, values in zip(tensors, shorter, strict=True):
                p.copy_(cut_as(values, p))


def _length_of_parts(ball: NormBall | None, group: Group) -> float | None:
    """Return the root mean square L2 length of the parts of a vertex; None for balls without parts."""
    if ball is None:
        return None
    shapes = ball_shapes(group)
    parts = ball.norm.parts_of_vertex(shapes)
    return None if parts is None else ball.diameter(shapes) / 2 / math.sqrt(parts)
