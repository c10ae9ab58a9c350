"""The inputs that the optimizer refuses, before anything changes: options, balls, states and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.dtensors import agreed, gradient_piece, is_sharded
from pliant.norms import Channels, NormBall, Rows
from pliant.optim.balls import Group, as_ball

Rescale = Literal["gradient", "fast-gradient", "diameter"] | None
RESCALES: tuple[Rescale, ...] = ("gradient", "fast-gradient", "diameter", None)


def check_options(group: Group, ball: NormBall | None) -> None:
    """Raise ValueError for an option of a parameter group that is out of range or does not suit its ball."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr must be >= 0, got {lr}")
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


# --- states -----------------------------------------------------------------------------------------------------------


def check_state(groups: Sequence[Group], state_dict: dict[str, Any]) -> None:
    """Raise ValueError for a state of other tensors, of another kind of ball, or of another number of processes."""
    sizes = [[len(g["params"]) for g in side] for side in (groups, state_dict["param_groups"])]
    if sizes[0] != sizes[1]:
        return  # torch refuses these itself
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        kinds = [_kind(as_ball(g.get("ball"))) for g in (group, saved)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the state is one of {kinds[1]}, but the group of {name_of(group['params'][0], group)} has "
                f"{kinds[0]}: make the optimizer with the balls that it was saved with"
            )
        for index, p in zip(saved["params"], group["params"], strict=False):
            buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
            if buffer is not None:
                _check_buffer(buffer, p, name_of(p, group))


def _kind(ball: NormBall | None) -> str:
    """Return the part of a ball that a schedule of k does not change: the names of its norms, without k and radius."""
    if ball is None:
        return "no ball"
    lift, inner = type(ball.norm).__name__, getattr(ball.norm, "inner", None)
    lift = f"spatial {lift}" if getattr(ball.norm, "spatial", False) else lift
    return f"a {lift} ball" if inner is None else f"a {lift}({type(inner).__name__}) ball"


def _check_buffer(buffer: Tensor, p: Tensor, name: str) -> None:
    sharded, module = (is_sharded([buffer]), is_sharded([p])), "torch.distributed.checkpoint.state_dict"
    if sharded == (True, False):
        raise ValueError(
            f"the state of {name} lies on many processes, the parameter does not: save it with {module}."
            "get_optimizer_state_dict and the option full_state_dict=True"
        )
    if buffer.shape != p.shape:
        hint = f", as a state of another number of processes is: save and load with {module}" if any(sharded) else ""
        raise ValueError(f"the state of {name} has shape {tuple(buffer.shape)}, not {tuple(p.shape)}{hint}")
    if sharded == (False, True):
        raise ValueError(
            f"the state of {name} is whole, the parameter lies on many processes: load it with {module}."
            "set_optimizer_state_dict and the option full_state_dict=True"
        )
    if sharded == (True, True) and buffer.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(f"the state of {name} lies on other processes than the parameter: save and load with {module}")


# --- gradients --------------------------------------------------------------------------------------------------------


def check_gradients(groups: Sequence[Group]) -> None:
    """Refuse gradients that no step can use.

    Raises:
        ValueError: a gradient is sparse or complex.
        FloatingPointError: a gradient is NaN or infinite, in a group with ``check_finite``.
        RuntimeError: a gradient exists on some processes only, in a group with ``check_finite``.
    """
    checked: list[tuple[Tensor, Group]] = []
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
                kind = f"{p.grad.layout} {p.grad.dtype}"
                raise ValueError(f"SFW needs dense, real gradients, got {kind} in {name_of(p, group)}")
            if group["check_finite"]:
                checked.append((p, group))
    # One reduction per tensor, but a single transfer to the host.
    flags = [torch.isfinite(gradient_piece(p)).all() for p, _ in checked if p.grad is not None]
    if is_sharded([p for p, _ in checked]):
        finite = _finite_everywhere(checked, flags)
    elif flags:
        finite = iter(on_one_device(flags).tolist())
    else:
        return
    bad = [name_of(p, group) for p, group in checked if p.grad is not None and not next(finite)]
    if bad:
        raise FloatingPointError(
            f"NaN or infinite gradient in {_listed(bad)}; the step was refused, nothing has changed"
        )


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
