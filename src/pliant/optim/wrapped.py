"""The optimizer inside the wrappers of training libraries."""

from __future__ import annotations

from typing import Any

from pliant.errors import BadInput, shown
from pliant.optim.sfw import SFW

# What wrappers call the optimizer inside: Accelerate, Lightning and Fabric; torch; Opacus; sharpness-aware steps.
NAMES = ("optimizer", "_optimizer", "optim", "original_optimizer", "base_optimizer")


def unwrapped(optimizer: Any, wanted: str) -> SFW:
    """Return the SFW that an optimizer is, or that is inside its wrappers.

    Args:
        optimizer: the optimizer.
        wanted: what needs it, for the message.

    Raises:
        BadInput: there is no SFW.
    """
    inner = optimizer
    for _ in range(10):
        # Ask for an inner one first: Lightning's wrappers claim to be of the class that they wrap.
        held = (getattr(inner, name, None) for name in NAMES)
        deeper = next((x for x in held if x is not None and x is not inner and hasattr(x, "param_groups")), None)
        if deeper is None:
            break
        inner = deeper
    if not isinstance(inner, SFW):
        given = type(optimizer).__name__ if hasattr(optimizer, "param_groups") else shown(optimizer)
        raise BadInput(f"{wanted} needs a pliant.SFW, or one in the wrapper of a training library, got {given}")
    return inner
