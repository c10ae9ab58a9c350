"""The momentum m ← μ·m + (1 − dampening)·g of parameters, whole or in pieces; as in SGD, the first step takes m = g."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.dtensors import gradient_piece, local_piece, placed_as
from pliant.optim.oracle import State


def accumulate(
    parameters: Sequence[Tensor], states: Sequence[State], options: Mapping[str, Any], weight_decay: float = 0.0
) -> list[Tensor]:
    """Fold the gradients into the momenta and return the directions of this step.

    Args:
        parameters: the parameters; a missing gradient counts as 0.
        states: their states; ``momentum_buffer`` lies on processes as the parameter does.
        options: ``momentum``, ``dampening`` and ``maximize`` of the group.
        weight_decay: L2 penalty, added to the gradients.

    Returns:
        This process's piece of each direction, of the shape of its piece of the parameter.
    """
    gradients = [gradient_piece(p) for p in parameters]
    sign = -1 if options["maximize"] else 1
    if weight_decay:
        pieces = [local_piece(p) for p in parameters]
        gradients = list(torch._foreach_add(gradients, pieces, alpha=sign * weight_decay))
    momentum, weight = options["momentum"], sign * (1 - options["dampening"])
    if not momentum:
        return gradients if sign == 1 else list(torch._foreach_neg(gradients))
    old = [i for i, state in enumerate(states) if state.get("momentum_buffer") is not None]
    buffers, new = [local_piece(states[i]["momentum_buffer"]) for i in old], [gradients[i] for i in old]
    if len(old) == 1 and weight == 1 and buffers[0].dtype == new[0].dtype:
        torch.add(new[0], buffers[0], alpha=momentum, out=buffers[0])  # saves a pass over memory
    elif old:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, new, alpha=weight)
    for p, gradient, state in zip(parameters, gradients, states, strict=True):
        if state.get("momentum_buffer") is None:
            first = gradient.clone(memory_format=torch.preserve_format)
            state["momentum_buffer"] = placed_as(first if sign == 1 else first.neg_(), p)
    return [local_piece(state["momentum_buffer"]) for state in states]


def direction(p: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
    """Return this process's piece of the momentum, or of the gradient if there is no momentum; NaN without either."""
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        return local_piece(buffer)
    if p.grad is None:
        return torch.full_like(local_piece(p), math.nan)
    return -gradient_piece(p) if options["maximize"] else gradient_piece(p)
