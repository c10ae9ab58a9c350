"""Which values the settings of a training may have."""

from __future__ import annotations

import math
from typing import Any

from pliant.constraints.parameter_groups import check_k
from pliant.errors import BadInput, unknown
from pliant.experiments.methods import RECIPES, RESCALES, VERTICES, parse_pattern
from pliant.experiments.training.schedules import SCHEDULES
from pliant.experiments.training.trackers import tracker_names
from pliant.structure.layers import SCHEMES


def check_settings(settings: dict[str, Any]) -> None:
    """Raise BadInput for a setting that is unknown or out of range."""
    choices = {"recipe": RECIPES, "rescale": RESCALES, "vertices": VERTICES, "scheme": SCHEMES, "schedule": SCHEDULES}
    for name, known in choices.items():
        if settings[name] is not None and settings[name] not in known:
            raise unknown(name, settings[name], known)
    if settings["pattern"] is not None:
        parse_pattern(settings["pattern"])
    tracker_names(settings["tracker"])
    for name in ("k", "k_start"):
        if settings[name] is not None:
            try:
                check_k(settings[name])
            except BadInput as error:
                raise BadInput(f"--{name}: {error}") from None
    counts = {"epochs": 1, "batch_size": 1, "accumulate": 1, "every": 1, "factors": 2, "checkpoint_steps": 1}
    for name, least in counts.items():
        if settings[name] is not None and settings[name] < least:
            raise BadInput(f"--{name} must be at least {least}, got {settings[name]}")
    if not 0 <= settings["seed"] < 2**63:
        raise BadInput(f"--seed must be an integer from 0 to 2^63 - 1, got {settings['seed']}")
    if settings["anneal"] is not None and not 0 < settings["anneal"] <= 1:
        raise BadInput(f"--anneal must lie in (0, 1], got {settings['anneal']}")
    for name in ("lr", "other_lr", "radius", "turnover", "width"):
        if settings[name] is not None and not (settings[name] > 0 and math.isfinite(settings[name])):
            raise BadInput(f"--{name} must be positive and finite, got {settings[name]}")
    for name in ("momentum", "warmup", "energy"):
        if settings[name] is not None and not 0 <= settings[name] < 1:
            raise BadInput(f"--{name} must lie in [0, 1), got {settings[name]}")
    for name, smallest in (("weight_decay", 0), ("strength", 0), ("persistence", 0), ("condition", 1)):
        if settings[name] is not None and not (settings[name] >= smallest and math.isfinite(settings[name])):
            raise BadInput(f"--{name} must be >= {smallest} and finite, got {settings[name]}")


def differ(name: str, one: object, other: object) -> bool:
    """Return whether two values of a setting are different: an integer k is a count and a float a share."""
    return one != other or (name in ("k", "k_start") and type(one) is not type(other))
