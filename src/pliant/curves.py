"""Curves: what a sweep measured, sorted into what can be compared. Plain data, made of records alone.

Records with the same model and data make a *section*; in it, runs that differ only in their seed make a *training*;
a training under one compressor and allocation makes a *curve*; curves whose compressors are of one family share a
*panel*, the figures and the table that compare them. Along a curve, the records of all runs that were asked for the
same size make a *step*. Neither torch nor numpy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from pliant.records import Record


@dataclass(frozen=True)
class Curve:
    """The records of one training under one compressor and allocation."""

    training: str
    compressor: str
    allocation: str
    records: list[Record]

    @property
    def variant(self) -> str:
        """The compressor and how it spreads the ratio over the layers."""
        return f"{self.compressor}, {self.allocation}" if self.allocation else self.compressor

    @property
    def family(self) -> str:
        """The compressor without its variant."""
        return self.compressor.partition("-")[0]

    @property
    def removes(self) -> bool:
        """Whether parameters leave the network; otherwise they become zeros, stored all the same."""
        compressed = [record for record in self.records if record.ratio > 0]
        if any(record.params < record.params_dense for record in compressed):
            return True
        zeroed = any(nonzero_share(record) < 1 for record in compressed)
        return not zeroed and self.family not in ("weights", "nm")

    @property
    def runs(self) -> dict[tuple[str, str], list[Record]]:
        """The records of every run."""
        return grouped(self.records, run_of)

    @property
    def dense(self) -> float:
        """The accuracy before compression, mean over the runs."""
        return fmean(records[0].top1_dense for records in self.runs.values())


@dataclass(frozen=True)
class Section:
    """All that was measured with one model on one data set."""

    model: str
    data: str
    records: list[Record]
    curves: list[Curve]


def sections_of(records: Iterable[Record]) -> list[Section]:
    """Return the records by data set and model, sorted by their names, as sections."""
    by_setting = grouped(records, lambda record: (record.data, record.model))
    return [Section(model, data, found, _curves(found)) for (data, model), found in sorted(by_setting.items())]


def _curves(records: list[Record]) -> list[Curve]:
    """Return the curves sorted by compressor and allocation, trainings in the order of the records."""
    names = _training_names(records)
    by_curve = grouped(records, lambda r: (r.compressor, r.allocation, names[r.method, _settings(r)]))
    curves = [Curve(name, compressor, how, found) for (compressor, how, name), found in by_curve.items()]
    known = {family: place for place, (family, _) in enumerate(_PANEL_TITLES)}
    return sorted(curves, key=lambda c: (known.get(c.family, len(known)), c.compressor, c.allocation))


def _training_names(records: list[Record]) -> dict[tuple[str, frozenset[str]], str]:
    """Name every (method, settings) after the method and those settings that differ between its trainings."""
    names = {}
    for method, found in grouped(records, lambda record: record.method).items():
        trainings = grouped(found, _settings)
        shared = frozenset.intersection(*trainings)
        for settings in trainings:
            own = ", ".join(sorted(settings - shared))
            names[method, settings] = f"{method} ({own})" if own else method
    return names


# Entries of a run's config that say which run it is or where it ran, not how it was trained.
_NO_SETTINGS = frozenset({"seed", "run", "name", "out", "data_dir", "tensorboard"})


def _settings(record: Record) -> frozenset[str]:
    return frozenset(
        f"{name}={value}" for name, value in flat(record.config) if name.split(".")[-1] not in _NO_SETTINGS
    )


class Axis(NamedTuple):
    """A horizontal axis: its title and the share of the dense network that a record keeps."""

    title: str
    share: Callable[[Record], float]


def nonzero_share(record: Record) -> float:
    """Return the share of the dense network's non-zero parameters (unrecorded: of all) that a record keeps."""
    return record.nonzero / (record.nonzero_dense or record.params_dense)


_AXES_REMOVED = (
    Axis("parameters left (%)", lambda record: record.params / record.params_dense),
    Axis("MACs left (%)", lambda record: record.macs / record.macs_dense),
)
_AXES_ZEROED = (Axis("non-zero parameters left (%)", nonzero_share),)

_PANEL_TITLES = {
    ("filters", True): "Filters removed",
    ("filters", False): "Filters zeroed",
    ("rank", True): "Layers factorised to low rank",
    ("weights", False): "Single weights zeroed",
    ("nm", False): "N:M patterns",
}


class Panel(NamedTuple):
    """Curves that are compared with each other."""

    title: str
    removes: bool
    axes: tuple[Axis, ...]
    curves: list[Curve]

    @property
    def variants(self) -> list[str]:
        """The compressors and allocations of the curves."""
        return list(dict.fromkeys(curve.variant for curve in self.curves))

    @property
    def patterned(self) -> bool:
        """Whether the steps are N:M patterns instead of ratios."""
        return any(record.pattern for curve in self.curves for record in curve.records)

    @property
    def repeated(self) -> bool:
        """Whether any curve is the mean of several runs."""
        return any(len(curve.runs) > 1 for curve in self.curves)


def panels_of(section: Section) -> list[Panel]:
    """Return the curves of a section as panels: by the family of the compressor and whether parameters leave."""
    by_family = grouped(section.curves, lambda curve: (curve.family, curve.removes))
    return [
        Panel(
            _PANEL_TITLES.get((family, removes), family if removes else f"{family}, zeroed"),
            removes,
            _AXES_REMOVED if removes else _AXES_ZEROED,
            curves,
        )
        for (family, removes), curves in by_family.items()
    ]


Item = TypeVar("Item")
Key = TypeVar("Key")


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by key, in the order in which they came."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the entries of a nested dictionary as pairs (dotted name, value)."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return found


def run_of(record: Record) -> tuple[str, str]:
    """Return what identifies a record's run: its name and its weights."""
    return record.run, record.weights


def steps_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records by what was asked of the compressor, "50%" or "2:4", from the dense end on."""
    by_ratio = sorted(records, key=lambda record: record.ratio)
    return grouped(by_ratio, step_of)


def step_of(record: Record) -> str:
    """Return what was asked of the compressor: "50%" or "2:4"."""
    return record.pattern or f"{100 * record.ratio:.6g}%"
