"""The last two lines of a step: how far towards the vertex, and there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.linalg import divide_or_zero
from pliant.optim.checks import Rescale
from pliant.optim.vertices import Vertex, along


def step_towards(
    weights: Sequence[Tensor],
    lengths: Tensor,
    vertices: Sequence[Vertex],
    memory: Sequence[Tensor] | None,
    *,
    radius: float,
    diameter: float,
    lr: float | Tensor,
    rescale: Rescale,
    l2_norm: Callable[[Sequence[Tensor]], Tensor],
) -> None:
    """Move weights towards the vertices of their balls in place: θ ← (1 − η)·θ + η·v.

    L balls of one kind over J tensors each; a zero direction leaves θ unchanged, and θ = v takes η = 1 (it is already
    there).

    Args:
        weights: J tensors (L, *shape), changed in place.
        lengths: L2 norm ‖m‖ of the direction of each ball, (L,).
        vertices: of the unit balls, exact or approximate, shaped as the weights.
        memory: J tensors shaped as the weights to write θ − v to, which may be the vertices' own; None: new ones.
        radius: of the balls.
        diameter: L2 diameter of the balls.
        lr: step size before rescaling.
        rescale: as in :class:`~pliant.SFW`.
        l2_norm: gives the L2 norm of J tensors together for each ball, (L,); where they are pieces, of the whole.
    """
    differences = []
    for index, (w, vertex) in enumerate(zip(weights, vertices, strict=True)):
        start, out = w.to(vertex.carrier.dtype), None if memory is None else memory[index]
        differences.append(torch.addcmul(start, vertex.carrier, radius * vertex.factor, out=out))
    tiny = torch.finfo(lengths.dtype).tiny
    if rescale is None or rescale == "diameter":
        lengths = divide_or_zero(lengths, lengths)  # 1, or 0 for a zero direction, or NaN for NaN
    match rescale:
        case "gradient":
            reference = l2_norm(differences).clamp_min(tiny)
        case "fast-gradient":
            reference = torch.full_like(lengths, diameter / 2)
        case "diameter":
            reference = torch.full_like(lengths, diameter)
        case None:
            reference = torch.ones_like(lengths)
    eta = (lengths * lr / reference).clamp(0, 1)
    for w, d in zip(weights, differences, strict=True):
        eta_of_each = along(eta.to(d.dtype), d)
        if w.dtype == d.dtype:
            w.addcmul_(d, eta_of_each, value=-1)
        else:
            w.copy_(torch.addcmul(w.to(d.dtype), d, eta_of_each, value=-1))
