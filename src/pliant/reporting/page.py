"""Reports: what a sweep or a comparison measured, as tables and one HTML page.

The page is a single file that needs no network: text, figures and plotly.js lie inside. It is made of records
alone, so that it can be rebuilt wherever they are; neither torch nor numpy is loaded.

``pliant.curves`` decides what is compared, ``pliant.standings`` how it compares, ``pliant.tables`` has the tables for
the terminal and for documents. Here all becomes plain data; on the page a training has a colour, and
``templates/report.js`` draws the figures and finds the command that makes a network of some size.
"""

from __future__ import annotations

import html
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
from plotly.offline import get_plotlyjs
from rich.console import Console

from pliant.errors import BadInput
from pliant.files import write_text
from pliant.records import CALIBRATION, LayerCount, Record, factorises, read_records
from pliant.reporting.area import LEVEL, SLACK, Estimate
from pliant.reporting.curves import (
    TIME_SLACK,
    VIEWS,
    Axis,
    Curve,
    Panel,
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
from pliant.reporting.ranking import ACCURACIES, KEPT, Standing, standings
from pliant.reporting.tables import comparison_markdown, comparison_table, percent, summary_table

__all__ = ["comparison_markdown", "comparison_table", "render", "report", "summary_table"]


def report(
    records: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    markdown: str | Path | None = None,
    runs: str | None = None,
) -> Path:
    """Write a page about the records, print a table and the page's path, and return the path.

    The table compares the methods if the records tell what the trainings cost, else it lists the accuracies.

    Args:
        records: one or several files of records. Of several records of one measurement the last counts.
        out: the page, a self-contained HTML file of about 5 MB. An existing one is replaced, whole or not at all.
        markdown: file for the comparison as Markdown tables, replaced alike; none is written without it.
        runs: folder of the run folders, for the commands on the page; by default runs beside the first records.

    Raises:
        BadInput: the files hold no records, or ``out`` or ``markdown`` is a folder.
        DamagedFile: a file is missing or a line of it is not a record.
        OSError: the page cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise BadInput(f"expected a file name for the report, got the folder {out}; try {out / 'report.html'}")
    if markdown is not None and Path(markdown).is_dir():
        raise BadInput(f"expected a file name for --markdown, got the folder {markdown}")
    paths = [Path(path) for path in ([records] if isinstance(records, str | Path) else records)]
    latest = {record.key(): record for path in paths for record in read_records(path)}
    if not latest:
        where = ", ".join(map(str, paths)) or "an empty list of files"
        raise BadInput(f"expected records to report, got none in {where}; make some with `pliant sweep`")
    write_report(
        list(latest.values()), out, markdown=markdown, runs=str(paths[0].parent / "runs") if runs is None else runs
    )
    return out


def write_report(
    records: Sequence[Record],
    out: Path,
    *,
    markdown: str | Path | None = None,
    runs: str = "runs",
    remarks: Sequence[str] = (),
) -> None:
    """Write a page about these records, as :func:`report` does.

    Args:
        records: at least one.
        out: the page.
        markdown: file for the comparison as Markdown tables.
        runs: folder of the run folders, for the commands on the page.
        remarks: sentences about what the records do not tell.
    """
    pages = {out: render(records, runs, remarks)}
    if markdown is not None:
        pages[Path(markdown)] = comparison_markdown(records, remarks)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    # A pipe or a file has no width to keep to, so that lines stay whole there.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 1000)
    costly = any(record.cost is not None for record in records)
    console.print(comparison_table(records) if costly else summary_table(records))
    for remark in remarks:
        console.print(remark, soft_wrap=True)
    console.print(f"Report: {out}", soft_wrap=True)


def render(records: Sequence[Record], runs: str = "runs", remarks: Sequence[str] = ()) -> str:
    """Return the page about ``records`` (at least one) as HTML; the arguments are those of :func:`write_report`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pliant.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = sections_of(records)
    trainings = {curve.training: curve for section in sections for curve in section.curves}
    versions = Counter(tuple(sorted(record.versions.items())) for record in records)
    return environment.get_template("report.html.j2").render(
        remarks=remarks,
        runs=len(grouped(records, run_of)),
        trainings=trainings,
        retrained=any(curve.retrained for curve in trainings.values()),
        views={name: title for name, title in VIEWS.items() if any(name in section.views for section in sections)},
        level=LEVEL,
        time_slack=TIME_SLACK,
        measurements=len(records),
        sections=[
            {
                "section": section,
                "names": {curve.training for curve in section.curves},
                "guessing": section.chance is not None,
                "repeated": any(panel.repeated for panel in panels_of(section)),
                "panels": panels_of(section),
                # What the choice of a size may be restricted to: a panel, by its place.
                "families": [(index, panel.chip) for index, panel in enumerate(panels_of(section))],
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
            "trainings": [
                {"name": name, "ours": curve.ours, "retrained": curve.retrained} for name, curve in trainings.items()
            ],
            "slack": SLACK,
            "kept": KEPT,
            "sections": [_section_data(section, runs) for section in sections],
        },
        plotlyjs=get_plotlyjs(),
    )


# -------------------------------------------------------------------------------------- the data of the figures


def _section_data(section: Section, runs: str) -> dict[str, Any]:
    """Return what the page draws in a section; the script's first lines describe the same structure."""
    best = max(max(record.top1, record.top1_raw, record.top1_dense) for record in section.records)
    return {
        # All figures of a section share the accuracy axis, which ends at the next 10 % above the best.
        "top": min(100, 10 * math.ceil(10 * best)),
        "panels": [
            {
                "compressor": panel.compressor,
                "title": panel.title,
                "removes": panel.removes,
                "patterned": panel.patterned,
                "axes": [axis.title for axis in panel.axes],
                "variants": panel.variants,
                "steps": list(steps_of(record for curve in panel.curves for record in curve.records)),
                "views": {name: _view_data(panel, name, section.chance, runs) for name in panel.views},
            }
            for panel in panels_of(section)
        ],
        # A run that is in both views is shown once.
        "layers": list({view["title"]: view for curve in section.curves for view in _layer_views(curve)}.values()),
    }


def _view_data(panel: Panel, view: str, chance: float | None, runs: str) -> dict[str, Any]:
    curves = panel.views[view]
    return {
        "curves": [_curve_data(curve, panel, runs) for curve in curves],
        "standings": {
            accuracy: [_standing_data(s, curves.index(s.curve)) for s in standings(panel, view, chance, accuracy)]
            for accuracy in ACCURACIES
        },
    }


def _standing_data(standing: Standing, curve: int) -> dict[str, Any]:
    return {
        "curve": curve,
        "areas": [_estimate_data(area) for area in standing.areas],
        "other": _estimate_data(standing.other),
        "versus": None if standing.versus is None else _estimate_data(standing.versus),
        "is_baseline": standing.is_baseline,
        "is_best": standing.is_best,
        "kept": standing.kept,
        "cost": None if standing.cost is None else standing.cost._asdict(),
    }


def _estimate_data(value: Estimate) -> dict[str, Any]:
    return value._asdict()


def _curve_data(curve: Curve, panel: Panel, runs: str) -> dict[str, Any]:
    return {
        "training": curve.training,
        "variant": curve.variant,
        "runs": len(curve.runs),
        "dense": curve.dense,
        "steps": [
            {
                "label": step,
                "pattern": records[0].pattern,
                "shares": [fmean(map(axis.share, records)) for axis in panel.axes],
                "top1": _spread([record.top1 for record in records]),
                "top1_raw": _spread([record.top1_raw for record in records]),
                "tip": _tip(curve, step, records),
            }
            for step, records in steps_of(curve.records).items()
        ],
        "networks": [
            {
                "run": records[0].run,
                "command": _command(records[0], runs),
                "points": _points(records, panel.axes[0]),
            }
            for records in curve.runs.values()
        ],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def _points(records: list[Record], axis: Axis) -> list[dict[str, Any]]:
    """Return the sizes of a run: the share removed, both accuracies, validation, and what was asked for."""
    points = [
        {
            "removed": max(0.0, 1 - axis.share(record)),
            "top1": record.top1,
            "top1_raw": record.top1_raw,
            "val": record.val_top1,
            "ratio": record.ratio,
            "pattern": record.pattern,
        }
        for record in records
    ]
    if not any(point["removed"] == 0 for point in points):
        dense = records[0].top1_dense
        points.append({"removed": 0.0, "top1": dense, "top1_raw": dense, "val": None, "ratio": 0.0, "pattern": ""})
    return points


def _command(record: Record, runs: str) -> list[str] | None:
    """Return the words of the command that compresses a run as a record tells, but the size; None if none does."""
    compressor, *variants = record.compressor.split("-")
    schemes = [variant for variant in variants if variant != "whitened"]
    if "retraining" in record.config or len(schemes) > factorises(compressor):  # only rank has a scheme, and one
        return None
    words = ["pliant", "compress", f"{runs}/{record.run}", "--compressor", compressor]
    if factorises(compressor) and "whitened" not in variants:
        words += ["--whiten", "false"]
    if factorises(compressor):
        words += ["--scheme", *(schemes or ["channel"])]
    if record.allocation not in ("", "global"):
        words += ["--allocation", record.allocation]
    if (calibration := record.config.get("calibration", CALIBRATION)) != CALIBRATION:
        words += ["--calibration", str(calibration)]
    return words


def _tip(curve: Curve, step: str, records: list[Record]) -> str:
    """Return the text beside a point, in the subset of HTML that plotly.js knows."""
    tops = [record.top1 for record in records]
    several = len(records) > 1
    spread = f" ({percent(min(tops))} to {percent(max(tops))}, {len(records)} runs)" if several else ""

    def mean(name: str) -> float:
        return fmean(getattr(record, name) for record in records)

    def size(name: str, unit: str = "") -> str:
        return f"{_human(round(mean(name)), unit)} ({percent(mean(name) / mean(f'{name}_dense'))} %)"

    lines = [
        f"<b>{html.escape(curve.training)}</b>{'' if several else f' · {html.escape(records[0].run)}'}",
        f"{html.escape(curve.variant)} · {html.escape(step)}",
        f"accuracy {percent(mean('top1'))} %{spread}",
        f"raw {percent(mean('top1_raw'))} % · dense {percent(mean('top1_dense'))} %",
        f"parameters {size('params')}, non-zero {_human(round(mean('nonzero')))}",
        f"MACs {size('macs')} · file {size('bytes', 'B')}",
        f"latency {1e3 * mean('latency_s'):.2f} ms, batch {records[0].latency_batch}"
        f" ({mean('latency_dense_s') / mean('latency_s'):.2f}× as fast)",
    ]
    return "<br>".join(lines)


def _layer_views(curve: Curve) -> list[dict[str, Any]]:
    """Return a table per run of the curve: what every layer kept at every step."""
    views = []
    for records in curve.runs.values():
        steps = sorted((record for record in records if record.layers), key=lambda record: record.ratio)
        names = dict.fromkeys((layer["name"], layer["kind"]) for record in steps for layer in record.layers)
        if names:
            views.append(
                {
                    "title": f"{records[0].run} · {curve.variant}",
                    "steps": [step_of(record) for record in steps],
                    "layers": [
                        {
                            "name": name,
                            "kind": kind,
                            # A layer may be missing at a step, where the plan left it alone.
                            "cells": [
                                next((_counts(layer) for layer in record.layers if layer["name"] == name), None)
                                for record in steps
                            ],
                        }
                        for name, kind in names
                    ],
                }
            )
    return views


def _counts(layer: LayerCount) -> list[int]:
    return [layer["kept"], layer["total"], layer["params"], layer["params_dense"]]


# ---------------------------------------------------------------------------------------- the table of numbers


class Cell(NamedTuple):
    """A cell of the table: its text, a remark beside it and the value that it is sorted by."""

    text: str
    note: str
    order: str | float


def _accuracy(name: str) -> Callable[[Record], Cell]:
    return lambda record: Cell(percent(getattr(record, name)), "", getattr(record, name))


def _size(name: str, unit: str = "") -> Callable[[Record], Cell]:
    def cell(record: Record) -> Cell:
        size = getattr(record, name)
        share = size / getattr(record, f"{name}_dense")
        return Cell(_human(size, unit), f"{percent(share)}%", size)

    return cell


def _nonzero(record: Record) -> Cell:
    return Cell(_human(record.nonzero), f"{percent(nonzero_share(record))}%", record.nonzero)


def _latency(record: Record) -> Cell:
    speed = record.latency_dense_s / record.latency_s
    return Cell(f"{_milliseconds(record)} ms", f"{speed:.2f}×", record.latency_s)


def _removed(record: Record) -> Cell:
    real = record.ratio_removed
    return Cell(step_of(record), "" if real is None else f"{percent(real)}%", record.ratio)


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


def _milliseconds(record: Record) -> str:
    return f"{1e3 * record.latency_s:.2f}"


def _human(number: int, unit: str = "") -> str:
    """Return a number with a decimal prefix: 272474 is "272.5 k"."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()
