"""Numbers as text, the same on the page, in the terminal and in documents."""

from __future__ import annotations

from pliant.reporting.intervals import Estimate


def percent(fraction: float) -> str:
    """Return a fraction in %, with one decimal."""
    return f"{100 * fraction:.1f}"


def spread(value: Estimate, sign: str = "") -> str:
    """Return an estimate in % with its confidence interval, if it has one."""
    half = "" if value.half is None else f" ± {100 * value.half:.1f}"
    return f"{100 * value.mean:{sign}.1f}{half}"


def human(number: int, unit: str = "") -> str:
    """Return a number with a decimal prefix: 272474 is "272.5 k"."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()
