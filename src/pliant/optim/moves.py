"""What a step does to the tensors of a group: with a ball and without; and how tensors are scaled into their balls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.dtensors import is_sharded, local_piece
from pliant.linalg import accumulation_dtype
from pliant.norms import Channels, NormBall, Rows, Spectral
from pliant.optim.balls import Group
from pliant.optim.checks import name_of
from pliant.optim.kept_directions import keeps_directions, vertices_from_last_step
from pliant.optim.local import Local
from pliant.optim.momentum import accumulate, direction
from pliant.optim.oracle import Oracle
from pliant.optim.scratch import Scratch
from pliant.optim.update import step_towards

# Tensors of up to this many entries are stacked. A larger one keeps a device busy alone, and a stack would need memory;
# on a CPU large tensors are faster one by one, in the cache, unless the number of operations dominates (Spectral).
BATCHED, BATCHED_ON_CPU, BATCHED_SPECTRAL = 2**20, 2**15, 2**18


def oracle_over(members: Sequence[Tensor], group: Group) -> Oracle:
    """Return the oracle over the tensors of a ball, whole or sharded."""
    if not is_sharded(members):
        return Local([p.shape for p in members])
    from pliant.optim.sharded import Sharded  # imported here: whole tensors need no torch.distributed

    return Sharded(members, [name_of(p, group) for p in members])


def scale_inside(members: Sequence[Tensor], ball: NormBall, group: Group, *, slack: bool = False) -> Tensor:
    """Scale the tensors of one ball into it; return the factor that they were divided by, a scalar tensor.

    Args:
        members: the tensors, changed in place.
        ball: their ball.
        group: their group.
        slack: leave tensors alone that are outside by no more than the rounding errors of many steps; so a training
            that was saved and loaded goes on with the same bits.
    """
    pieces = [local_piece(p) for p in members]
    try:
        shrinkage = oracle_over(members, group).shrinkage(ball, pieces)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        names = ", ".join(name_of(p, group) for p in members)
        raise FloatingPointError(f"NaN or infinite entries in the weights of {names}: {error}") from error
    if slack:
        rounding = max(torch.finfo(p.dtype).eps for p in members) ** 0.5
        shrinkage = torch.where(shrinkage > 1 + rounding, shrinkage, torch.ones_like(shrinkage))
    for piece in pieces:
        piece.div_(shrinkage.to(piece.dtype))
    return shrinkage


def sgd_step(parameters: list[Tensor], group: Group, states: Mapping[Tensor, Any]) -> None:
    """Take the step of SGD with tensors without a ball."""
    lr = group["lr"]
    for batch in [parameters] if group["foreach"] is not False else [[p] for p in parameters]:
        if not batch:
            return
        directions = accumulate(batch, [states[p] for p in batch], group, weight_decay=group["weight_decay"])
        pieces = [local_piece(p) for p in batch]
        if isinstance(lr, Tensor):
            rate = lr.reshape(())
            torch._foreach_sub_(pieces, [m * rate.to(m.device, m.dtype) for m in directions])
        else:
            torch._foreach_add_(pieces, directions, alpha=-lr)


def constrained_step(
    sets: list[list[Tensor]], ball: NormBall, group: Group, states: Mapping[Tensor, Any], scratch: Scratch
) -> None:
    """Move the tensors of equal balls.

    Args:
        sets: L lists of J tensors, where L or J is 1, of equal shapes if L > 1.
        ball: the ball of each list.
        group: their group.
        states: those of the optimizer.
        scratch: memory for vertices.

    Raises:
        FloatingPointError: a decomposition met NaN or infinite values.
    """
    norm, oracle = ball.norm, oracle_over(sets[0], group)
    own = [[states[p] for p in members] for members in sets]
    momenta = [accumulate(members, each, group) for members, each in zip(sets, own, strict=True)]
    # Both are J stacks (L, *shape).
    directions, weights = oracle.stacks(momenta), oracle.stacks([[local_piece(p) for p in ps] for ps in sets])
    if group["persistence"] and isinstance(norm, Rows | Channels):
        directions = oracle.persistent(norm, directions, weights, group["persistence"])
    memory = scratch.like(directions) if oracle.takes_memory(directions) else None
    try:
        if isinstance(norm, Spectral) and not group["exact"] and keeps_directions(norm, oracle.shapes):
            lengths, directions = oracle.well_scaled(directions)
            vertices = vertices_from_last_step(oracle, norm, directions, own, group, memory)
        else:
            lengths, vertices = oracle.vertices(norm, directions, memory, exact=group["exact"])
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        names = ", ".join(name_of(p, group) for members in sets for p in members)
        raise FloatingPointError(
            f"NaN or infinite momentum of {names}: {error}. The step has stopped there; under check_finite=True such "
            "gradients are refused before anything changes"
        ) from error
    step_towards(
        weights,
        lengths,
        vertices,
        memory,
        radius=ball.radius,
        diameter=ball.diameter(oracle.shapes),
        lr=group["lr"],
        rescale=group["rescale"],
        l2_norm=oracle.length,
    )
    if len(sets) > 1:
        torch._foreach_copy_([p for (p,) in sets], list(weights[0].unbind(0)))


def gap_of(members: Sequence[Tensor], ball: NormBall, group: Group, states: Mapping[Tensor, Any]) -> Tensor:
    """Return the gap of the tensors of one ball, in the scale of a gradient; NaN where a momentum is not finite."""
    momentum = group["momentum"]
    factor = (1 - momentum) / (1 - group["dampening"]) if momentum else 1.0
    directions = [direction(p, states[p], group) for p in members]
    pieces = [local_piece(p) for p in members]
    try:
        return factor * oracle_over(members, group).gap(ball, pieces, directions)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return torch.full((), math.nan, device=pieces[0].device)


def settle(sets: Sequence[list[Tensor]], ball: NormBall, group: Group) -> None:
    """Scale weights in half precision inside after a step: with a small η large entries freeze, but small ones grow."""
    for members in sets:
        if any(p.dtype != accumulation_dtype(p) for p in members):
            scale_inside(members, ball, group)


# --- which tensors ----------------------------------------------------------------------------------------------------


def sets_with_gradient(group: Group) -> list[list[Tensor]]:
    """Return the tensors that move together: single ones with a gradient, or all of a joint ball.

    If only some tensors of a joint ball have gradients, all of them move, with missing gradients counting as 0: moving
    only some would not be a convex combination.
    """
    parameters: list[Tensor] = group["params"]
    if group["ball"] is not None and group["joint"]:
        return [parameters] if any(p.grad is not None for p in parameters) else []
    return [[p] for p in parameters if p.grad is not None]


def side_by_side(
    sets: Sequence[list[Tensor]], ball: NormBall, group: Group, states: Mapping[Tensor, Any]
) -> list[list[list[Tensor]]]:
    """Return the sets in batches: one batch for all sets that a step can handle side by side, in one stack."""
    batches: dict[Any, list[list[Tensor]]] = {}
    on_cpu = BATCHED_SPECTRAL if isinstance(ball.norm, Spectral) else BATCHED_ON_CPU
    for index, members in enumerate(sets):
        p = members[0]
        most = on_cpu if p.device.type == "cpu" else BATCHED
        alone = group["joint"] or group["foreach"] is False or p.numel() > most or is_sharded(members)
        state = states.get(p, {})
        width = state["basis"].shape[-1] if "basis" in state else None
        pace = (width, state.get("iterations"), state.get("steps"))
        key = index if alone else (p.shape, p.stride(), p.dtype, p.device, *pace)
        batches.setdefault(key, []).append(members)
    return list(batches.values())
