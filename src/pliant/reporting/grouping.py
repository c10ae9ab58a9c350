"""Grouping of records: by any key, by run, by the requested size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pliant.records import Record

Item = TypeVar("Item")
Key = TypeVar("Key")


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by key, in their original order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the entries of a nested dictionary as pairs (dotted name, value)."""
    entries = []
    for name, value in config.items():
        if isinstance(value, dict):
            entries += flat(value, f"{prefix}{name}.")
        else:
            entries.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return entries


def accuracy_of(record: Record, kind: str) -> float:
    """Return an accuracy of a record by its field; older records, and those without a refit, have ``top1`` for more."""
    value: float | None = getattr(record, kind)
    return record.top1 if value is None else value


def run_of(record: Record) -> tuple[str, str]:
    """Return the name and the weights of a record's run, which identify it."""
    return record.run, record.weights


def sizes_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records by requested size, "50%" or "2:4", starting at the dense network."""
    by_ratio = sorted(records, key=lambda record: record.ratio)
    return grouped(by_ratio, size_of)


def size_of(record: Record) -> str:
    """Return the size that was requested of the compressor: "50%" or "2:4"."""
    return record.pattern or f"{100 * record.ratio:.6g}%"
