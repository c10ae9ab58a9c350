"""The inputs that the optimizer refuses, before anything changes: options, balls and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pliant.dtensors import agreed, gradient_piece, is_sharded
from pliant.linalg import readable
from pliant.norms import Channels, NormBall, Rows
from pliant.optim.balls import Group, ParsedBalls, ball_shapes
from pliant.optim.vertices import decomposes

Rescale = Literal["gradient", "fast-gradient", "diameter"] | None
RESCALES: tuple[Rescale, ...] = ("gradient", "fast-gradient", "diameter", None)


def check_options(group: Group, ball: NormBall | None) -> None:
    """Raise ValueError for an option of a parameter group that is out of range or does not suit its ball."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) or _has_values(lr):
        value = lr.item() if isinstance(lr, Tensor) else lr
        if not 0 <= value < math.inf:
            raise ValueError(f"lr must be >= 0 and finite, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if not 0 <= group["dampening"] < 1:
        raise ValueError(f"dampening must lie in [0, 1), got {group['dampening']}")
    if not decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {decay}")
    if decay and ball is not None:
        raise ValueError(
            f"weight_decay={decay} on a group with a ball: the ball is its regulariser; "
            "set weight_decay in the groups without a ball"
        )
    iterations = group["power_iterations"]
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        raise ValueError(f"power_iterations must be None or an integer >= 1, got {iterations!r}")
    if not isinstance(group["exact"], bool):
        raise ValueError(f"exact must be True or False, got {group['exact']!r}")
    _check_persistence(group, ball)
    if group["rescale"] not in RESCALES:
        raise ValueError(f"rescale must be one of {RESCALES}, got {group['rescale']!r}")


def _check_persistence(group: Group, ball: NormBall | None) -> None:
    if not group["persistence"] >= 0:
        raise ValueError(f"persistence must be >= 0, got {group['persistence']}")
    if group["persistence"] and ball is not None:
        if not isinstance(ball.norm, Rows | Channels):
            raise ValueError(
                f"persistence={group['persistence']} is for balls of rows or channels, got {ball.norm}: "
                "set it in their groups alone"
            )
        if group["rescale"] is not None:
            raise ValueError(f"persistence needs rescale=None, got {group['rescale']!r}")


def check_ball_fits(ball: NormBall | None, tensors: Sequence[Tensor], *, joint: bool) -> None:
    """Raise ValueError if the ball's norm is not defined for the tensors."""
    if ball is None:
        return
    shapes = [p.shape for p in tensors]
    for members in [shapes] if joint else [[shape] for shape in shapes]:
        ball.norm.length(members)


# --- gradients --------------------------------------------------------------------------------------------------------


def check_gradients(groups: Sequence[Group], balls: ParsedBalls) -> None:
    """Refuse gradients and learning rates that no step can use.

    Raises:
        ValueError: a gradient is sparse or complex, or an lr is NaN or infinite.
        FloatingPointError: a gradient is NaN or infinite, in a group with ``check_finite``, or of a tensor with a ball
            where to know it costs no wait: on a CPU, and where the vertex is found by a decomposition, which waits.
        RuntimeError: a gradient exists on some processes only, in a group with ``check_finite``.
    """
    checked: list[tuple[Tensor, Group]] = []
    bad: list[str] = []
    for group in groups:
        if not isinstance(group["lr"], Tensor) and not math.isfinite(group["lr"]):
            raise ValueError(f"lr must be finite, got {group['lr']}; the step was refused, nothing has changed")
        waits = not group["check_finite"] and _waits_anyway(balls.of(group), group)
        for p in group["params"]:
            if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
                kind = f"{p.grad.layout} {p.grad.dtype}"
                raise ValueError(f"SFW needs dense, real gradients, got {kind} in {name_of(p, group)}")
            if group["check_finite"] or (waits and p.grad is not None and _has_values(p) and not readable(p.grad)):
                checked.append((p, group))
            elif _is_free_to_read(p, group) and not _is_finite(gradient_piece(p)):
                bad.append(name_of(p, group))
    bad += _not_finite(checked)
    if bad:
        raise FloatingPointError(
            f"NaN or infinite gradient in {_listed(bad)}; the step was refused, nothing has changed"
        )


def _waits_anyway(ball: NormBall | None, group: Group) -> bool:
    """Return whether a step waits for the device in any case to find the vertices of a group."""
    parameters = group["params"]
    if ball is None or group["capturable"] or is_sharded(parameters) or all(readable(p) for p in parameters):
        return False
    shapes = [ball_shapes(group)] if group["joint"] else [[p.shape] for p in group["params"]]
    return any(decomposes(ball.norm, each, exact=group["exact"]) for each in shapes)


def _is_free_to_read(p: Tensor, group: Group) -> bool:
    """Return whether a gradient of a tensor with a ball can be looked at without a wait."""
    constrained = group["ball"] is not None and not group["capturable"]
    return constrained and p.grad is not None and readable(p) and readable(p.grad)


def _is_finite(gradient: Tensor) -> bool:
    # A sum takes a single pass over memory; it is finite unless an entry is not, or the sum itself overflows.
    return math.isfinite(gradient.sum().item()) or bool(torch.isfinite(gradient).all())


def _not_finite(checked: Sequence[tuple[Tensor, Group]]) -> list[str]:
    """Return the names of the parameters with a gradient that is not finite."""
    # One reduction per tensor, but a single transfer to the host.
    flags = [torch.isfinite(gradient_piece(p)).all() for p, _ in checked if p.grad is not None]
    if is_sharded([p for p, _ in checked]):
        finite = _finite_everywhere(checked, flags)
    else:
        finite = iter(on_one_device(flags).tolist() if flags else [])
    return [name_of(p, group) for p, group in checked if p.grad is not None and not next(finite)]


def _has_values(x: Tensor) -> bool:
    """Return whether a tensor has values that can be read, be it with a wait: it is neither meta, fake nor compiled."""
    return not x.is_meta and not isinstance(x, FakeTensor) and not torch.compiler.is_compiling()


def _finite_everywhere(checked: Sequence[tuple[Tensor, Group]], flags: Sequence[Tensor]) -> Iterator[bool]:
    """Return, for each gradient, whether its pieces are finite on all processes, so that all refuse a step together."""
    present = [p.grad is not None for p, _ in checked]
    finite, differing = agreed(flags, present, [p for p, _ in checked])
    if any(differing):
        names = [name_of(p, group) for (p, group), differs in zip(checked, differing, strict=True) if differs]
        raise RuntimeError(
            f"{_listed(names)} has a gradient on some processes only; the step was refused, nothing has changed: "
            "let every process use the same layers, or none"
        )
    return iter(compress(finite, present))


# --- names ------------------------------------------------------------------------------------------------------------


def name_of(parameter: Tensor, group: Group) -> str:
    """Return the name of a parameter of a group; words that give its shape if it has no name."""
    for name, p in zip(group.get("param_names", []), group["params"], strict=False):
        if p is parameter:
            return str(name)
    return f"an unnamed parameter of shape {tuple(parameter.shape)}"


def on_one_device(values: Sequence[Tensor]) -> Tensor:
    """Return scalars as one tensor (n,) on the device of the first: a model may lie on several devices."""
    return torch.stack([value.to(values[0].device) for value in values])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
