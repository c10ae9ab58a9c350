"""The last two lines of a step: the step size η, and the move of length η towards the vertex."""

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
    """Move the weights of L balls over J tensors each towards their vertices, in place: θ ← (1 − η)·θ + η·v.

    A zero direction leaves θ unchanged; θ = v takes η = 1, which changes nothing either.

    Args:
        weights: J tensors (L, *shape), changed in place.
        lengths: L2 norm ‖m‖ of the direction of each ball, (L,).
        vertices: J vertices of the unit balls, exact or approximate, of the shapes of the weights.
        memory: J tensors of the shapes of the weights that θ − v is written to, possibly the memory of the vertices;
            None: new ones.
        radius: the radius of the balls.
        diameter: L2 diameter of the balls.
        lr: step size before rescaling.
        rescale: as in :class:`~pliant.SFW`.
        l2_norm: returns, for J tensors (L, *shape), the L2 norm over all of them for each ball, (L,); for pieces, the
            norm of the whole tensors.
    """
    differences = []  # θ − v, J tensors (L, *shape)
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
    if isinstance(lr, Tensor):  # of any shape with one element, on the CPU or the device of the weights
        lr = lr.reshape(())
        lr = lr if lr.device.type == "cpu" else lr.to(lengths.device)
    eta = (lengths * lr / reference).clamp(0, 1)  # (L,)
    for w, d in zip(weights, differences, strict=True):
        step_sizes = along(eta.to(d.dtype), d)  # (L, 1, …, 1)
        if w.dtype == d.dtype:
            w.addcmul_(d, step_sizes, value=-1)
        else:
            w.copy_(torch.addcmul(w.to(d.dtype), d, step_sizes, value=-1))
