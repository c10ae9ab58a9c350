"""Plain data from files, field by field: every error names the field, what it should be and what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pliant.errors import DamagedFile, shown


class Fields:
    """The fields of a mapping, taken one by one with their types checked."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = dict(data), where
        self.data.pop("format", None)
        self.data.pop("version", None)

    def take(self, name: str) -> Any:
        """Return a field of any type; raise DamagedFile if it is not there."""
        if name not in self.data:
            raise DamagedFile(f"{self.where} has no field {name!r}")
        return self.data.pop(name)

    def end(self) -> None:
        """Raise DamagedFile if a field is left."""
        if self.data:
            unknown = "no plan has" if self.where.startswith("plan") else "is not known"
            raise DamagedFile(f"{self.where} has a field {shown(min(self.data))} that {unknown}")

    def text(self, name: str) -> str:
        """Return a field that is text."""
        return text_of(self.take(name), f"{self.where}.{name}")

    def count(self, name: str) -> int:
        """Return a field that is a whole number of at least 0."""
        return count_of(self.take(name), f"{self.where}.{name}")

    def share(self, name: str) -> float:
        """Return a field that is a number from 0 to 1."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise DamagedFile(f"{self.where}.{name} should be a number from 0 to 1, not {shown(value)}")
        return float(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return a field that is a mapping from text."""
        value = self.take(name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise DamagedFile(f"{self.where}.{name} should be a mapping, not {type(value).__name__}")
        return value

    def number(self, name: str) -> float:
        """Return a field that is a finite number."""
        return number_of(self.take(name), f"{self.where}.{name}")

    def counts(self, name: str) -> list[int]:
        """Return a field that is a list of counts."""
        return [count_of(x, f"{self.where}.{name}") for x in self.items(name)]

    def texts(self, name: str) -> list[str]:
        """Return a field that is a list of texts."""
        return [text_of(x, f"{self.where}.{name}") for x in self.items(name)]

    def optional_text(self, name: str) -> str | None:
        """Return a field that is text, or None without it."""
        # Plans that were written before the field existed do not have it.
        value = self.data.pop(name, None)
        return None if value is None else text_of(value, f"{self.where}.{name}")

    def items(self, name: str, default: tuple[Any, ...] | None = None) -> list[Any]:
        """Return a field that is a list of anything."""
        value = self.take(name) if default is None else self.data.pop(name, default)
        if not isinstance(value, (list, tuple)):
            raise DamagedFile(f"{self.where}.{name} should be a list, not {type(value).__name__}")
        return list(value)

    def positions(self, name: str) -> tuple[int, ...] | None:
        """Return a field that is a list of ascending positions, or None."""
        value = self.take(name)
        if value is None:
            return None
        where = f"{self.where}.{name}"
        if not isinstance(value, (list, tuple)):
            raise DamagedFile(f"{where} should be a list or null, not {type(value).__name__}")
        result = tuple(count_of(x, where) for x in value)
        if not result or any(a >= b for a, b in pairwise(result)):
            raise DamagedFile(f"{where} should hold at least one position, in ascending order")
        return result


def text_of(value: object, where: str) -> str:
    """Return a value that is text; raise DamagedFile otherwise."""
    if not isinstance(value, str):
        raise DamagedFile(f"{where} should be text, not {shown(value)}")
    return value


def count_of(value: object, where: str) -> int:
    """Return a value that is a whole number of at least 0; raise DamagedFile otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DamagedFile(f"{where} should be a count, not {shown(value)}")
    return value


def number_of(value: object, where: str) -> float:
    """Return a value that is a finite number; raise DamagedFile otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DamagedFile(f"{where} should be a number, not {shown(value)}")
    return float(value)


def pair_of(value: object, where: str) -> tuple[str, str]:
    """Return a value that is a pair of texts; raise DamagedFile otherwise."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise DamagedFile(f"{where} should hold (layer, reason) pairs, not {shown(value)}")
    return text_of(value[0], where), text_of(value[1], where)


def fields_of(data: object, where: str) -> Fields:
    """Return the fields of a mapping; raise DamagedFile for anything else."""
    if not isinstance(data, Mapping):
        raise DamagedFile(f"{where} should be a mapping, not {type(data).__name__}")
    return Fields(data, where)
