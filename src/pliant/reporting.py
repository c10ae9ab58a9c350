"""Reports: what a sweep measured, as one table in the terminal and one HTML page.

The page is a single file that needs no network: text, figures and plotly.js lie inside. It is made of records
alone, so that it can be rebuilt wherever they are; neither torch nor numpy is loaded.

``pliant.curves`` decides what is compared: sections, panels and curves. Here they become text and numbers; on the
page a training has a colour, and ``templates/report.js`` draws the figures from plain data.
"""

from __future__ import annotations

import html
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
from plotly.offline import get_plotlyjs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pliant.curves import (
    Axis,
    Curve,
    Section,
    flat,
    grouped,
    nonzero_share,
    panels_of,
    run_of,
    sections_of,
    step_of,
    steps_of,
)
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
    sections = sections_of(records)
    steps = steps_of(record for section in sections for record in section.records if record.ratio > 0)
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
        for variant, curves in grouped(section.curves, lambda curve: curve.variant).items():
            table.add_row(Text(f"  {variant}", style="italic"))
            for curve in curves:
                at = steps_of(curve.records)
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
    sections = sections_of(records)
    trainings = list(dict.fromkeys(curve.training for section in sections for curve in section.curves))
    versions = Counter(tuple(sorted(record.versions.items())) for record in records)
    return environment.get_template("report.html.j2").render(
        runs=len(grouped(records, run_of)),
        trainings=trainings,
        measurements=len(records),
        sections=[
            {
                "section": section,
                "names": {curve.training for curve in section.curves},
                "panels": panels_of(section),
                "batches": sorted({record.latency_batch for record in section.records}),
                "layered": any(record.layers for record in section.records),
                "rows": [[cell(record) for _, cell in _COLUMNS] for record in section.records],
                "refused": Counter((r.compressor, *pair) for r in section.records for pair in r.refused),
                "runs": [(found[0], flat(found[0].config)) for found in grouped(section.records, run_of).values()],
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


# -------------------------------------------------------------------------------------- the data of the figures


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
                "steps": list(steps_of(record for curve in panel.curves for record in curve.records)),
                "curves": [_curve_data(curve, panel.axes) for curve in panel.curves],
            }
            for panel in panels_of(section)
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
            for step, records in steps_of(curve.records).items()
        ],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def _tip(curve: Curve, record: Record) -> str:
    """Return the text beside a point, in the subset of HTML that plotly.js knows."""
    speed = record.latency_dense_s / record.latency_s
    lines = [
        f"<b>{html.escape(curve.training)}</b> · {html.escape(record.run)}",
        f"{html.escape(curve.variant)} · {html.escape(step_of(record))}",
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
                    "steps": [step_of(record) for record in steps],
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
    return Cell(_human(record.nonzero), f"{_percent(nonzero_share(record))}%", record.nonzero)


def _latency(record: Record) -> Cell:
    speed = record.latency_dense_s / record.latency_s
    return Cell(f"{_milliseconds(record)} ms", f"{speed:.2f}×", record.latency_s)


def _removed(record: Record) -> Cell:
    real = record.ratio_removed
    return Cell(step_of(record), "" if real is None else f"{_percent(real)}%", record.ratio)


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
