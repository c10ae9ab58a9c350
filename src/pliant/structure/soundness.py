"""The largest part of a list that is sound together, found by bisection in few checks if most items are sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def largest_sound(
    items: Sequence[Item], fault: Callable[[list[Item]], str | None]
) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Split ``items`` into a list that is sound as a whole and the rest, each with its fault.

    If all items are sound together, ``fault`` is called once; a single bad item among n costs about 2·log2(n) calls.

    Args:
        items: the items, in order of preference.
        fault: returns the reason why a list of items is not sound together, None if it is.
    """
    failed: list[tuple[Item, str]] = []

    def extend(sound: list[Item], candidates: Sequence[Item]) -> list[Item]:
        if not candidates:
            return sound
        reason = fault([*sound, *candidates])
        if reason is None:
            return [*sound, *candidates]
        if len(candidates) == 1:
            failed.append((candidates[0], reason))
            return sound
        half = len(candidates) // 2
        return extend(extend(sound, candidates[:half]), candidates[half:])

    return extend([], items), failed
