"""The balls of parameter groups: a group holds its ball as plain data, a step needs it as an object."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pliant.norms import NormBall

Group = dict[str, Any]


def as_ball(ball: NormBall | dict[str, Any] | None) -> NormBall | None:
    """Return a ball, given a ball or its spec; None for None.

    Raises:
        ValueError: the argument is something else, or not the spec of a ball.
    """
    if not isinstance(ball, NormBall | dict | None):
        raise ValueError(f"'ball' must be a NormBall, its spec or None, got {ball!r}")
    return NormBall.from_spec(ball) if isinstance(ball, dict) else ball


class ParsedBalls:
    """The balls of parameter groups, parsed once, and again only after a group's spec has changed."""

    def __init__(self) -> None:
        self._parsed: dict[int, tuple[dict[str, Any], NormBall]] = {}  # by id of the group

    def of(self, group: Group) -> NormBall | None:
        """Return the ball of a parameter group, None if it has none."""
        spec = group["ball"]
        if spec is None:
            return None
        parsed = self._parsed.get(id(group))
        if parsed is None or parsed[0] != spec:
            # Keep a copy: a later change of the group's own spec must make them differ.
            parsed = self._parsed[id(group)] = (copy.deepcopy(spec), NormBall.from_spec(spec))
        return parsed[1]


def ball_shapes(group: Group) -> list[torch.Size]:
    """Return the shapes of the tensors of one ball of a group: of all tensors if joint, else of the first alone."""
    return [p.shape for p in (group["params"] if group["joint"] else group["params"][:1])]


def balls_over(tensors: list[Tensor], group: Group) -> list[list[Tensor]]:
    """Return the tensors of each ball of a group, given some of its tensors: one list if joint, else one per tensor."""
    if group["joint"]:
        return [tensors] if tensors else []
    return [[p] for p in tensors]
