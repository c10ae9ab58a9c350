"""The balls of parameter groups: groups hold them as plain data, steps need them as objects."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pliant.norms import NormBall

Group = dict[str, Any]


def as_ball(ball: NormBall | dict[str, Any] | None) -> NormBall | None:
    """Return a ball, given one or its spec; raises ValueError for anything else."""
    if not isinstance(ball, NormBall | dict | None):
        raise ValueError(f"'ball' must be a NormBall, its spec or None, got {ball!r}")
    return NormBall.from_spec(ball) if isinstance(ball, dict) else ball


class ParsedBalls:
    """The balls of groups, parsed once: again only where a group's spec has changed."""

    def __init__(self) -> None:
        self._parsed: dict[int, tuple[dict[str, Any], NormBall]] = {}  # by id of the group

    def of(self, group: Group) -> NormBall | None:
        """Return the ball of a parameter group, None where it has none."""
        spec = group["ball"]
        if spec is None:
            return None
        parsed = self._parsed.get(id(group))
        if parsed is None or parsed[0] != spec:
            # A copy, so that a change of the group's own spec shows.
            parsed = self._parsed[id(group)] = (copy.deepcopy(spec), NormBall.from_spec(spec))
        return parsed[1]


def ball_shapes(group: Group) -> list[torch.Size]:
    """Return the shapes that a ball of a parameter group is over: of all its tensors jointly, or of each, all alike."""
    return [p.shape for p in (group["params"] if group["joint"] else group["params"][:1])]


def balls_over(tensors: list[Tensor], group: Group) -> list[list[Tensor]]:
    """Return the tensors of each ball of a group, given some of its tensors: all where it is joint, else each alone."""
    if group["joint"]:
        return [tensors] if tensors else []
    return [[p] for p in tensors]
