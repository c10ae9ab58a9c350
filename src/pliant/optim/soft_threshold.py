"""Soft thresholds: what the vertices do not agree on leaves the weights while they are trained."""

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
    """Shorten every part of the weights with a ball a little, after every ``every`` steps of the optimizer.

    Parts are the entries, filters, channels or singular directions that the vertices of a ball are made of. A step adds
    η·u to the parts of its vertex, where u is their length. The threshold takes strength·η·u off *all* parts of the
    weights, down to 0. So a part stays if more than a share ``strength`` of the vertices have it. The weights end up
    made of fewer parts, and lose less when parts are removed.

    This is the proximal step of the parts' total length (L1 norm, group lasso, nuclear norm), in turns with the steps
    of Frank-Wolfe. No norm grows by it: the weights stay in their balls. :meth:`pliant.SFW.gap` remains the gap of the
    loss alone. It needs ``rescale=None``: only then is η the same for all tensors. Parameters that no step has moved
    are left alone.

    Args:
        optimizer: an :class:`~pliant.SFW` with ``rescale=None``; balls without parts, such as L2 balls, are left alone.
        strength: from 0, which does nothing, to below 1.
        every: steps from one threshold to the next, which takes off their sum. Each threshold of a spectral ball
            decomposes its weights.

    Call :meth:`step` after each step of the optimizer, before the scheduler's. To resume, load the optimizer's state
    and this one's.
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
        """Note what a step of the optimizer has added, and take it off where it is time."""
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
        """Go on from a saved state."""
        if len(state["pending"]) != len(self._pending):
            raise BadInput(
                f"thresholds of {len(state['pending'])} groups cannot go on with {len(self._pending)} groups"
            )
        self.last_step, self._pending = state["last_step"], list(state["pending"])

    def _apply(self, group: Group, amount: float) -> None:
        ball = self._balls.of(group)
        assert ball is not None  # its vertices have parts
        moved = [p for p in group["params"] if self.optimizer.state.get(p)]
        for tensors in balls_over(moved, group):
            shorter = ball.norm.soft_threshold([whole(p) for p in tensors], amount)
            for p, values in zip(tensors, shorter, strict=True):
                p.copy_(cut_as(values, p))


def _length_of_parts(ball: NormBall | None, group: Group) -> float | None:
    """Return the L2 length of a part of a vertex, the root mean square over its parts; None for balls without parts."""
    if ball is None:
        return None
    shapes = ball_shapes(group)
    parts = ball.norm.parts_of_vertex(shapes)
    return None if parts is None else ball.diameter(shapes) / 2 / math.sqrt(parts)
