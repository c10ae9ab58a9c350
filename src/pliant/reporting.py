"""Reports: what a sweep measured, as one table in the terminal and one HTML page.

The page is a single file that needs no network: text, figures and plotly.js lie inside. It is made of records
alone, so that it can be rebuilt wherever they are; neither torch nor numpy is loaded.

From records to the page: records with the same model and data make a *section*; in it, runs that differ only in
their seed make a *training*, which has a colour; a training under one compressor and allocation makes a *curve*;
curves whose compressors are of one family share a *panel*, the figures and the table that compare them. Python
decides what is said, in plain data; ``templates/report.js`` draws it.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import jinja2
from plotly.offline import get_plotlyjs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pliant.errors import BadInput
from pliant.files import write_text
from pliant.records import Record, read_records


def report(records: str | Path | Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """Write a page about the records, print :func:`summary_table` and the page's path, and return the path.

    Args:
        records: one or several files of records. Of records with the same :meth:`Record.key` the last counts.
        out: the page, a self-contained HTML file of about 5 MB. An existing one is replaced, whole or not at all.

    Raises:
        BadInput: the files hold no records, or ``out`` is a folder.
        DamagedFile: a file is missing or a line of it is not a record.
        OSError: the page cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise BadInput(f"expected a file name for the report, got the folder {out}; try {out / 'report.html'}")
    paths = [records] if isinstance(records, str | Path) else list(records)
    latest = {record.key(): record for path in paths for record in read_records(path)}
    if not latest:
        where = ", ".join(map(str, paths)) or "an empty list of files"
        raise BadInput(f"expected records to report, got none in {where}; make some with `pliant sweep`")
    found = list(latest.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(found))
    # A pipe or a file has no width to keep to, so that lines stay whole there.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 1000)
    console.print(summary_table(found))
    console.print(f"Report: {out}", soft_wrap=True)
    return out


def summary_table(records: Iterable[Record]) -> Table:
    """Return the test accuracy of every curve at every ratio: in %, BatchNorm re-estimated, mean over the runs.

    Rows are grouped by model and data set, then by compressor and allocation. The columns are the number of runs,
    the dense accuracy, then one per removed share or N:M pattern. Ten of these fit into 100 characters.
    """
    sections = _sections(records)
    steps = _steps(record for section in sections for record in section.records if record.ratio > 0)
    table = Table(
        title="Test accuracy (%) by removed share",
        caption="BatchNorm re-estimated; mean over the runs.",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("training", overflow="fold")
    for header in ("runs", "dense", *steps):
        table.add_column(header, justify="right", no_wrap=True)
    for section in sections:
        table.add_section()
        table.add_row(Text(f"{section.model} on {section.data}", style="bold"))
        for variant, curves in _grouped(section.curves, lambda curve: curve.variant).items():
            table.add_row(Text(f"  {variant}", style="italic"))
            for curve in curves:
                at = _steps(curve.records)
                means = [_percent(fmean(r.top1 for r in at[step])) if step in at else "-" for step in steps]
                cells = [f"    {curve.training}", str(len(curve.runs)), _percent(curve.dense), *means]
                table.add_row(*map(Text, cells))
    return table


def render(records: Sequence[Record]) -> str:
    """Return the page about ``records`` (at least one) as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pliant", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = _sections(records)
    trainings = list(dict.fromkeys(curve.training for section in sections for curve in section.curves))
    versions = Counter(tuple(sorted(record.versions.items())) for record in records)
    return environment.get_template("report.html.j2").render(
        runs=len(_grouped(records, _run)),
        trainings=trainings,
        measurements=len(records),
        sections=[
            {
                "section": section,
                "names": {curve.training for curve in section.curves},
                "panels": _panels(section),
                "batches": sorted({record.latency_batch for record in section.records}),
                "layered": any(record.layers for record in section.records),
                "rows": [[cell(record) for _, cell in _COLUMNS] for record in section.records],
                "refused": Counter((r.compressor, *pair) for r in section.records for pair in r.refused),
                "runs": [(found[0], _flat(found[0].config)) for found in _grouped(section.records, _run).values()],
            }
            for section in sections
        ],
        columns=[title for title, _ in _COLUMNS],
        versions=versions,
        created=sorted(record.created[:10] for record in records if record.created),
        data={
            # A training keeps its colour, its place in this list, through the whole page.
            "trainings": trainings,
            "sections": [_section_data(section) for section in sections],
        },
        plotlyjs=get_plotlyjs(),
    )


# --------------------------------------------------------------------------------------- sections and curves


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
        zeroed = any(_nonzero_share(record) < 1 for record in compressed)
        return not zeroed and self.family not in ("weights", "nm")

    @property
    def runs(self) -> dict[tuple[str, str], list[Record]]:
        """The records of every run."""
        return _grouped(self.records, _run)

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


def _sections(records: Iterable[Record]) -> list[Section]:
    by_setting = _grouped(records, lambda record: (record.data, record.model))
    return [Section(model, data, found, _curves(found)) for (data, model), found in sorted(by_setting.items())]


def _curves(records: list[Record]) -> list[Curve]:
    """Return the curves sorted by compressor and allocation, trainings in the order of the records."""
    names = _training_names(records)
    by_curve = _grouped(records, lambda r: (r.compressor, r.allocation, names[r.method, _settings(r)]))
    curves = [Curve(name, compressor, how, found) for (compressor, how, name), found in by_curve.items()]
    known = {family: place for place, (family, _) in enumerate(_PANEL_TITLES)}
    return sorted(curves, key=lambda c: (known.get(c.family, len(known)), c.compressor, c.allocation))


def _training_names(records: list[Record]) -> dict[tuple[str, frozenset[str]], str]:
    """Name every (method, settings) after the method and those settings that differ between its trainings."""
    names = {}
    for method, found in _grouped(records, lambda record: record.method).items():
        trainings = _grouped(found, _settings)
        shared = frozenset.intersection(*trainings)
        for settings in trainings:
            own = ", ".join(sorted(settings - shared))
            names[method, settings] = f"{method} ({own})" if own else method
    return names


# Entries of a run's config that say which run it is or where it ran, not how it was trained.
_NO_SETTINGS = frozenset({"seed", "run", "name", "out", "data_dir", "tensorboard"})


def _settings(record: Record) -> frozenset[str]:
    return frozenset(
        f"{name}={value}" for name, value in _flat(record.config) if name.split(".")[-1] not in _NO_SETTINGS
    )


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the entries of a nested dictionary as pairs (dotted name, value)."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return found


Item = TypeVar("Item")
Key = TypeVar("Key")


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by key, in the order in which they came."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _run(record: Record) -> tuple[str, str]:
    return record.run, record.weights


def _nonzero_share(record: Record) -> float:
    return record.nonzero / (record.nonzero_dense or record.params_dense)


def _steps(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records by what was asked of the compressor, "50%" or "2:4", from the dense end on."""
    by_ratio = sorted(records, key=lambda record: record.ratio)
    return _grouped(by_ratio, _step)


def _step(record: Record) -> str:
    return record.pattern or f"{100 * record.ratio:.6g}%"


# -------------------------------------------------------------------------------------- the data of the figures


class Axis(NamedTuple):
    """A horizontal axis: its title and the share of the dense network that a record keeps."""

    title: str
    share: Callable[[Record], float]


_AXES_REMOVED = (
    Axis("parameters left (%)", lambda record: record.params / record.params_dense),
    Axis("MACs left (%)", lambda record: record.macs / record.macs_dense),
)
_AXES_ZEROED = (Axis("non-zero parameters left (%)", _nonzero_share),)

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


def _panels(section: Section) -> list[Panel]:
    by_family = _grouped(section.curves, lambda curve: (curve.family, curve.removes))
    return [
        Panel(
            _PANEL_TITLES.get((family, removes), family if removes else f"{family}, zeroed"),
            removes,
            _AXES_REMOVED if removes else _AXES_ZEROED,
            curves,
        )
        for (family, removes), curves in by_family.items()
    ]


def _section_data(section: Section) -> dict[str, Any]:
    """Return what the page draws in a section; the script's first lines describe the same structure."""
    best = max(max(record.top1, record.top1_raw, record.top1_dense) for record in section.records)
    return {
        # All figures of a section share the accuracy axis, which ends at the next 10 % above the best.
        "top": min(100, 10 * math.ceil(10 * best)),
        "panels": [
            {
                "axes": [axis.title for axis in panel.axes],
                "variants": panel.variants,
                "steps": list(_steps(record for curve in panel.curves for record in curve.records)),
                "curves": [_curve_data(curve, panel.axes) for curve in panel.curves],
            }
            for panel in _panels(section)
        ],
        "layers": [view for curve in section.curves for view in _layer_views(curve)],
    }


def _curve_data(curve: Curve, axes: Sequence[Axis]) -> dict[str, Any]:
    return {
        "training": curve.training,
        "variant": curve.variant,
        "runs": len(curve.runs),
        "dense": curve.dense,
        "steps": [
            {
                "label": step,
                "pattern": records[0].pattern,
                "shares": [fmean(map(axis.share, records)) for axis in axes],
                "top1": _spread([record.top1 for record in records]),
                "top1_raw": _spread([record.top1_raw for record in records]),
                "records": [
                    {
                        "shares": [axis.share(record) for axis in axes],
                        "top1": record.top1,
                        "top1_raw": record.top1_raw,
                        "tip": _tip(curve, record),
                    }
                    for record in records
                ],
            }
            for step, records in _steps(curve.records).items()
        ],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def _tip(curve: Curve, record: Record) -> str:
    """Return the text beside a point, in the subset of HTML that plotly.js knows."""
    speed = record.latency_dense_s / record.latency_s
    lines = [
        f"<b>{html.escape(curve.training)}</b> · {html.escape(record.run)}",
        f"{html.escape(curve.variant)} · {html.escape(_step(record))}",
        f"accuracy {_percent(record.top1)} % · raw {_percent(record.top1_raw)} %"
        f" · dense {_percent(record.top1_dense)} %",
        f"parameters {_human(record.params)} ({_percent(record.params / record.params_dense)} %),"
        f" non-zero {_human(record.nonzero)}",
        f"MACs {_human(record.macs)} ({_percent(record.macs / record.macs_dense)} %)",
        f"file {_human(record.bytes, 'B')} ({_percent(record.bytes / record.bytes_dense)} %)",
        f"latency {_milliseconds(record)} ms, batch {record.latency_batch} ({speed:.2f}× as fast)",
    ]
    return "<br>".join(lines)


def _layer_views(curve: Curve) -> list[dict[str, Any]]:
    """Return a table per run of the curve: what every layer kept at every step."""
    views = []
    for (run, _), records in curve.runs.items():
        steps = sorted((record for record in records if record.layers), key=lambda record: record.ratio)
        names = dict.fromkeys((layer["name"], layer["kind"]) for record in steps for layer in record.layers)
        if names:
            views.append(
                {
                    "title": f"{run} · {curve.variant}",
                    "steps": [_step(record) for record in steps],
                    "layers": [
                        {
                            "name": name,
                            "kind": kind,
                            # A layer may be missing at a step, where the plan left it alone.
                            "cells": [
                                next((layer for layer in record.layers if layer["name"] == name), None)
                                for record in steps
                            ],
                        }
                        for name, kind in names
                    ],
                }
            )
    return views


# ---------------------------------------------------------------------------------------- the table of numbers


class Cell(NamedTuple):
    """A cell of the table: its text, a remark beside it and the value that it is sorted by."""

    text: str
    note: str
    order: str | float


def _accuracy(name: str) -> Callable[[Record], Cell]:
    return lambda record: Cell(_percent(getattr(record, name)), "", getattr(record, name))


def _size(name: str, unit: str = "") -> Callable[[Record], Cell]:
    def cell(record: Record) -> Cell:
        size = getattr(record, name)
        share = size / getattr(record, f"{name}_dense")
        return Cell(_human(size, unit), f"{_percent(share)}%", size)

    return cell


def _nonzero(record: Record) -> Cell:
    return Cell(_human(record.nonzero), f"{_percent(_nonzero_share(record))}%", record.nonzero)


def _latency(record: Record) -> Cell:
    speed = record.latency_dense_s / record.latency_s
    return Cell(f"{_milliseconds(record)} ms", f"{speed:.2f}×", record.latency_s)


def _removed(record: Record) -> Cell:
    real = record.ratio_removed
    return Cell(_step(record), "" if real is None else f"{_percent(real)}%", record.ratio)


_COLUMNS: tuple[tuple[str, Callable[[Record], Cell]], ...] = (
    ("Run", lambda r: Cell(r.run, "", r.run)),
    ("Compressor", lambda r: Cell(r.compressor, r.allocation, f"{r.compressor} {r.allocation}")),
    ("Removed", _removed),
    ("Accuracy", _accuracy("top1")),
    ("Raw", _accuracy("top1_raw")),
    ("Dense", _accuracy("top1_dense")),
    ("Validation", _accuracy("val_top1")),
    ("Parameters", _size("params")),
    ("Non-zero", _nonzero),
    ("MACs", _size("macs")),
    ("File", _size("bytes", "B")),
    ("Latency", _latency),
)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _milliseconds(record: Record) -> str:
    return f"{1e3 * record.latency_s:.2f}"


def _human(number: int, unit: str = "") -> str:
    """Return a number with a decimal prefix: 272474 is "272.5 k"."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()
