"""Curves: the measurements of a sweep, sorted into comparable groups. Plain data, computed from records alone.

Records with the same model, data and image size form a *section*. Its *views* compare trainings on equal terms: with as
many epochs as SGD, or with as much time. In a view, runs that differ only in their seed form a *training*; a training
under one compressor and allocation forms a *curve*; curves of one compressor share a *panel*, the figures and the table
that compare them. Along a curve, the records of all runs with the same requested share or pattern form a *size*.

A network that was retrained after compression is a reference "with retraining"; it does not compete with networks that
were not. Neither torch nor numpy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from pliant.compressor_names import COMPRESSORS, TITLE, variant_in_words
from pliant.records import Record
from pliant.reporting.grouping import accuracy_of, flat, grouped, run_of

VIEWS = {"epochs": "same number of epochs", "time": "same training time"}
"""The title of each view, which names the resource that its trainings have equally much of (``equal`` of a cost)."""
ANCHOR = "sgd"
"""The method that all costs are measured against."""
TIME_SLACK = 1.1
"""A training whose steps take at most this many times as long as SGD's also counts as a training of equal time."""
PLACES = frozenset({"data_dir", "tracker", "deterministic", "checkpoint_steps"})
"""Settings that determine where and how a training runs; they do not distinguish trainings."""
OURS = "sfw-"
"""The prefix of the names of this package's own methods; under the paper's recipe they count as the paper's."""


@dataclass(frozen=True)
class Curve:
    """The records of one training under one compressor and allocation.

    Args:
        training: name of the training.
        compressor: name of the compressor with its variant.
        allocation: how the ratio is shared out among the layers; may be empty.
        records: the records of all runs.
    """

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
        """Whether parameters leave the network; otherwise they become zeros, which are still stored."""
        compressed = [record for record in self.records if record.ratio > 0]
        if any(record.params < record.params_dense for record in compressed):
            return True
        zeroed = any(nonzero_share(record) < 1 for record in compressed)
        return not zeroed and (self.family not in COMPRESSORS or bool(COMPRESSORS[self.family].removed))

    @property
    def retrained(self) -> bool:
        """Whether its networks were trained again after compression."""
        return retraining_of(self.records[0]) is not None

    @property
    def ours(self) -> bool:
        """Whether the method is one of this package's own, whatever its name in the comparison."""
        config = self.records[0].config
        return str(config.get("method", self.records[0].method)).startswith(OURS) and config.get("recipe") != "paper"

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
    """All measurements with one model on one data set.

    Args:
        model: name of the model.
        data: name of the data set, with the image size if it was set.
        records: all records.
        views: the curves of each of :data:`VIEWS`.
    """

    model: str
    data: str
    records: list[Record]
    views: dict[str, list[Curve]]

    @property
    def curves(self) -> list[Curve]:
        """The curves of all views."""
        return [curve for curves in self.views.values() for curve in curves]

    @property
    def refitted(self) -> bool:
        """Whether the weights of any network were refitted after the cut."""
        return any(record.refit is not None for record in self.records)

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; None if no record has it."""
        return next((record.chance for record in self.records if record.chance is not None), None)


def sections_of(records: Iterable[Record]) -> list[Section]:
    """Return the records by data set and model, sorted by their names, as sections.

    Two folders of images share the name of their reader; their image sizes or numbers of classes distinguish them.
    """
    records = list(records)
    # Older records lack the accuracy of guessing: they belong to the records of the same data and model that have it.
    chances = {(_data(record), record.model): record.chance for record in records if record.chance is not None}

    def setting(record: Record) -> tuple[str, str, float]:
        chance = chances.get((_data(record), record.model)) if record.chance is None else record.chance
        return _data(record), record.model, chance or 0.0

    by_setting = grouped(records, setting)
    return [
        Section(model, data, members, {view: _curves(viewed, view) for view, viewed in _views(members).items()})
        for (data, model, _), members in sorted(by_setting.items())
    ]


def _data(record: Record) -> str:
    size = record.config.get("image_size")
    return record.data if size is None else f"{record.data} at {size}×{size}"


def _views(records: list[Record]) -> dict[str, list[Record]]:
    """Return the records by view: those without a cost in "epochs"; those as fast as SGD (TIME_SLACK) in both views."""
    views = grouped(records, lambda record: record.cost["equal"] if record.cost else "epochs")
    if "time" in views:
        timed = set(map(_contender, views["time"]))
        trainings = grouped(views.get("epochs", []), lambda record: _training(record, _settings(record, _NO_SETTINGS)))
        as_fast = [members for members in trainings.values() if (step_ratio(members) or math.inf) <= TIME_SLACK]
        shared = [record for members in as_fast for record in members if _contender(record) not in timed]
        views["time"] = shared + views["time"]
    return {name: views[name] for name in VIEWS if name in views}


def _contender(record: Record) -> tuple[object, ...]:
    return record.method, retraining_of(record), record.seed, record.compressor, record.allocation


def step_ratio(training: Iterable[Record]) -> float | None:
    """Return the time of a step in units of SGD's, the median over all records of a training.

    It is exactly 1 for SGD itself, even if its two measurements differ, and None if nothing was measured.
    """
    records = list(training)
    if records and records[0].config.get("method", records[0].method) == ANCHOR:
        return 1.0
    ratios = [record.cost["step_s"] / record.cost["step_s_sgd"] for record in records if record.cost is not None]
    return median(ratios) if ratios else None


def _curves(records: list[Record], view: str) -> list[Curve]:
    """Return the curves sorted by compressor and allocation, trainings in the order of the records."""
    # With equal time, a slower machine or seed has fewer epochs, but it is the same training.
    left_out = _NO_SETTINGS | ({"epochs"} if view == "time" else set())
    settings = [(record, _settings(record, left_out)) for record in records]
    names = _training_names(settings)
    by_curve = grouped(settings, lambda pair: (pair[0].compressor, pair[0].allocation, names[_training(*pair)]))
    curves = [
        Curve(name, compressor, allocation, [record for record, _ in pairs])
        for (compressor, allocation, name), pairs in by_curve.items()
    ]
    return sorted(curves, key=lambda curve: (*_place(curve.compressor), curve.allocation))


Settings = frozenset[str]
Training = tuple[str, str | None, Settings]


def _training(record: Record, settings: Settings) -> Training:
    return record.method, retraining_of(record), settings


def _training_names(records: list[tuple[Record, Settings]]) -> dict[Training, str]:
    """Return a name for every training: the method, unless its settings compete under one compressor and allocation.

    In a comparison they do not compete, because settings are chosen for each compressor. If they do, the name includes
    the settings that differ between the method's trainings.
    """
    names = {}
    for pairs in grouped(records, lambda pair: _training(*pair)[:2]).values():
        method, retraining, _ = _training(*pairs[0])
        trainings = grouped(pairs, lambda pair: pair[1])
        shared = frozenset.intersection(*trainings)
        rivals = grouped(pairs, lambda pair: (pair[0].compressor, pair[0].allocation))
        compete = any(len({settings for _, settings in members}) > 1 for members in rivals.values())
        for settings in trainings:
            own = ", ".join(sorted(settings - shared))
            name = f"{method} ({own})" if compete and own else method
            names[method, retraining, settings] = (
                name if retraining is None else f"{name} with retraining, {retraining}"
            )
    return names


def retraining_of(record: Record) -> str | None:
    """Return the schedule of the training after compression and its number of rounds; None if there was none."""
    schedule, rounds = record.config.get("retraining"), record.config.get("retraining_rounds", 1)
    if schedule is None:
        return None
    return str(schedule) if rounds == 1 else f"{schedule}, {rounds} rounds"


# Entries of a run's config that identify the run or the machine, not the training.
_NO_SETTINGS = PLACES | {"seed", "run", "name", "out"}


def _settings(record: Record, left_out: frozenset[str]) -> Settings:
    # A setting that is newer than the record counts as null.
    known = [pair for pair in flat(record.config) if pair[1] != "null"]
    return frozenset(f"{name}={value}" for name, value in known if name.split(".")[-1] not in left_out)


class Axis(NamedTuple):
    """A horizontal axis.

    Args:
        title: its title.
        share: a function from a record to the share of the dense network that it keeps.
    """

    title: str
    share: Callable[[Record], float]


def nonzero_share(record: Record) -> float:
    """Return the share of the dense network's non-zero parameters that a record keeps; of all, if not recorded."""
    return record.nonzero / (record.nonzero_dense or record.params_dense)


_AXES_REMOVED = (
    Axis("parameters left (%)", lambda record: record.params / record.params_dense),
    Axis("MACs left (%)", lambda record: record.macs / record.macs_dense),
)
_AXES_ZEROED = (Axis("non-zero parameters left (%)", nonzero_share),)


class Panel(NamedTuple):
    """Curves of one compressor, which are compared with each other within a view.

    Args:
        compressor: name of the compressor with its variant.
        removes: whether parameters leave the network.
        views: the curves of each view.
    """

    compressor: str
    removes: bool
    views: dict[str, list[Curve]]

    @property
    def curves(self) -> list[Curve]:
        """The curves of all views."""
        return [curve for curves in self.views.values() for curve in curves]

    @property
    def title(self) -> str:
        """What the compressor does, in words."""
        family = self.compressor.partition("-")[0]
        row = COMPRESSORS.get(family)
        title = self._recorded_title if row is None else row.removed if self.removes else row.zeroed
        title = title or (family if self.removes else f"{family}, zeroed")
        return ", ".join([title, *variant_in_words(self.compressor)])

    @property
    def _recorded_title(self) -> str:
        """The title that the records of a compressor of another package carry; empty without one."""
        titles = (record.extra.get(TITLE) for curve in self.curves for record in curve.records)
        return next((title for title in titles if isinstance(title, str)), "")

    @property
    def chip(self) -> str:
        """The compressor in a word or two."""
        return self.compressor if self.removes else f"{self.compressor} (zeros)"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The quantities that accuracy is plotted against; sizes are chosen by the first."""
        return _AXES_REMOVED if self.removes else _AXES_ZEROED

    @property
    def variants(self) -> list[str]:
        """The compressors and allocations of the curves."""
        return list(dict.fromkeys(curve.variant for curve in self.curves))

    @property
    def patterned(self) -> bool:
        """Whether the sizes are N:M patterns, which cannot be interpolated."""
        return any(record.pattern for curve in self.curves for record in curve.records)

    @property
    def repeated(self) -> bool:
        """Whether any curve is the mean of several runs."""
        return any(len(curve.runs) > 1 for curve in self.curves)


def panels_of(section: Section) -> list[Panel]:
    """Return the curves of a section as panels: by compressor and whether parameters leave."""
    placed = [(name, curve) for name, curves in section.views.items() for curve in curves]
    by_compressor = grouped(placed, lambda item: (item[1].compressor, item[1].removes))
    panels = [
        Panel(
            compressor,
            removes,
            {view: [curve for _, curve in pairs] for view, pairs in grouped(members, lambda item: item[0]).items()},
        )
        for (compressor, removes), members in by_compressor.items()
    ]
    return sorted(panels, key=lambda panel: (*_place(panel.compressor), not panel.removes))


def _place(compressor: str) -> tuple[int, str]:
    """Return the sort key of a compressor: known families first, in the order of their rows."""
    families = list(COMPRESSORS)
    family = compressor.partition("-")[0]
    return families.index(family) if family in families else len(families), compressor


def points_of(records: Iterable[Record], axis: Axis, accuracy: str) -> list[tuple[float, float]]:
    """Return pairs (removed share, accuracy) of a run, including the dense network.

    Args:
        records: the records of one run.
        axis: the quantity that shares refer to.
        accuracy: ``"top1"``, ``"top1_reestimated"`` or ``"top1_raw"``.
    """
    points = [(max(0.0, 1 - axis.share(record)), accuracy_of(record, accuracy)) for record in records]
    return points if any(share == 0 for share, _ in points) else [(0.0, next(iter(records)).top1_dense), *points]
