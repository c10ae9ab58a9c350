"""Which tensors are in their balls: convex steps keep them there, but only from inside, and only in the same ball."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.dtensors import local_piece
from pliant.norms import NormBall
from pliant.optim.balls import Group, ParsedBalls, balls_over
from pliant.optim.checks import name_of, on_one_device
from pliant.optim.moves import oracle_over, scale_inside, sets_with_gradient

FAR_OUTSIDE = 2.0  # shrinking a parameter by more than this factor warns


class Scaled:
    """The ball that each tensor was last scaled into.

    It is kept here and not in the state, so that nothing is believed of weights and balls that have been loaded.
    """

    def __init__(self) -> None:
        self._ball: dict[Tensor, tuple[NormBall, bool]] = {}

    def into(self, members: Sequence[Tensor], ball: NormBall, group: Group) -> bool:
        """Return whether all these tensors were scaled into this ball."""
        return all(self._ball.get(p) == (ball, group["joint"]) for p in members)

    def note(self, members: Sequence[Tensor], ball: NormBall, group: Group) -> None:
        """Remember that these tensors are in this ball."""
        self._ball.update(dict.fromkeys(members, (ball, bool(group["joint"]))))


def bring_moving_tensors_inside(
    groups: Sequence[Group], balls: ParsedBalls, states: Mapping[Tensor, Any], scaled: Scaled
) -> None:
    """Scale tensors that the coming step moves into their balls unless they were; warn once about those far outside."""
    names, shrinkages = [], []
    for group in groups:
        ball = balls.of(group)
        if ball is None:
            continue
        for members in sets_with_gradient(group):
            if not scaled.into(members, ball, group):
                slack = all(p in states for p in members)
                names.append(name_of(members[0], group))
                shrinkages.append(scale_inside(members, ball, group, slack=slack))
                scaled.note(members, ball, group)
    if not shrinkages or shrinkages[0].is_meta or any(group["capturable"] for group in groups):
        return
    # Past step() and the wrappers that torch puts around it.
    warn_if_far(dict(zip(names, on_one_device(shrinkages).tolist(), strict=True)), stacklevel=6)


def bring_all_inside(groups: Sequence[Group], balls: ParsedBalls, scaled: Scaled) -> dict[str, float]:
    """Scale all tensors into their balls; return the factor by which each tensor was shrunk, by name, if it was."""
    names, shrinkages = [], []
    for members, labels, ball, group in _all_balls(groups, balls):
        names.append(labels)
        shrinkages.append(scale_inside(members, ball, group))
        scaled.note(members, ball, group)
    factors = on_one_device(shrinkages).tolist() if shrinkages else []
    return {name: factor for labels, factor in zip(names, factors, strict=True) for name in labels if factor != 1}


def which_are_inside(groups: Sequence[Group], balls: ParsedBalls) -> dict[str, bool]:
    """Return for each tensor with a ball, by name, whether it is inside; one with NaN or infinite entries is not."""
    names, answers = [], []
    for members, labels, ball, group in _all_balls(groups, balls):
        pieces = [local_piece(p) for p in members]
        try:
            length = oracle_over(members, group).norm(ball.norm, pieces)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            length = torch.full((), torch.nan, device=pieces[0].device)
        names.append(labels)
        answers.append(ball.reaches(length, pieces))
    inside = on_one_device(answers).tolist() if answers else []
    return {name: answer for labels, answer in zip(names, inside, strict=True) for name in labels}


def warn_if_far(factors: Mapping[str, float], stacklevel: int) -> None:
    """Warn about parameters that were shrunk by more than :data:`FAR_OUTSIDE`."""
    far = {name: factor for name, factor in factors.items() if factor > FAR_OUTSIDE}
    if far:
        name = max(far, key=far.__getitem__)
        warnings.warn(
            f"{len(far)} constrained parameters started outside of their balls and were shrunk, {name} by a factor "
            f"of {far[name]:.3g}; if they were trained before, a larger radius keeps what they learned",
            stacklevel=stacklevel,
        )


def _all_balls(
    groups: Sequence[Group], balls: ParsedBalls
) -> Iterator[tuple[list[Tensor], list[str], NormBall, Group]]:
    """Yield the tensors of each ball, their names, the ball and the group."""
    for index, group in enumerate(groups):
        ball = balls.of(group)
        if ball is None:
            continue
        named = group.get("param_names")
        labels = {
            p: str(named[j]) if named else f"parameter {j} of group {index}" for j, p in enumerate(group["params"])
        }
        for members in balls_over(group["params"], group):
            yield members, [labels[p] for p in members], ball, group
