"""The data that the page draws: curves, standings, layers, and the commands that compress a network.

``templates/elements.js`` describes the same structure in its first lines; the scripts beside it draw it.
"""

from __future__ import annotations

import html
import math
from statistics import fmean
from typing import Any

from pliant.compressor_names import control_flags
from pliant.records import CALIBRATION, LayerCount, Record, factorises
from pliant.reporting.curves import Axis, Curve, Panel, Section, panels_of
from pliant.reporting.formats import human, percent
from pliant.reporting.grouping import size_of, sizes_of
from pliant.reporting.intervals import Estimate
from pliant.reporting.ranking import ACCURACIES, Standing, standings


def section_data(section: Section, runs: str) -> dict[str, Any]:
    """Return the data that the page draws in a section."""
    best = max(max(record.top1, record.top1_raw, record.top1_dense) for record in section.records)
    return {
        # All figures of a section share the accuracy axis, which ends at the next 10 % above the best accuracy.
        "top": min(100, 10 * math.ceil(10 * best)),
        "panels": [
            {
                "compressor": panel.compressor,
                "title": panel.title,
                "removes": panel.removes,
                "patterned": panel.patterned,
                "axes": [axis.title for axis in panel.axes],
                "variants": panel.variants,
                "sizes": list(sizes_of(record for curve in panel.curves for record in curve.records)),
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
            accuracy: [
                _standing_data(standing, curves.index(standing.curve))
                for standing in standings(panel, view, chance, accuracy)
            ]
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
        "sizes": [
            {
                "label": size,
                "pattern": records[0].pattern,
                "shares": [fmean(map(axis.share, records)) for axis in panel.axes],
                "top1": _spread([record.top1 for record in records]),
                "top1_raw": _spread([record.top1_raw for record in records]),
                "tip": _tip(curve, size, records),
            }
            for size, records in sizes_of(curve.records).items()
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
    """Return the sizes of a run: the removed share, the accuracies, and the requested ratio or pattern."""
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
    """Return the command that compresses a run like a record, in words, without the size; None if there is none."""
    compressor, *variants = record.compressor.split("-")
    schemes = [variant for variant in variants if variant != "whitened" and "=" not in variant]
    if "retraining" in record.config or len(schemes) > factorises(compressor):  # only rank has a scheme, and only one
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
    for flag, text in control_flags(record.config.get("controls", {})).items():
        words += [f"--{flag}", text]
    return words


def _tip(curve: Curve, size: str, records: list[Record]) -> str:
    """Return the text shown at a point, in the subset of HTML that plotly.js supports."""
    tops = [record.top1 for record in records]
    several = len(records) > 1
    spread = f" ({percent(min(tops))} to {percent(max(tops))}, {len(records)} runs)" if several else ""

    def mean(name: str) -> float:
        return fmean(getattr(record, name) for record in records)

    def amount(name: str, unit: str = "") -> str:
        return f"{human(round(mean(name)), unit)} ({percent(mean(name) / mean(f'{name}_dense'))} %)"

    lines = [
        f"<b>{html.escape(curve.training)}</b>{'' if several else f' · {html.escape(records[0].run)}'}",
        f"{html.escape(curve.variant)} · {html.escape(size)}",
        f"accuracy {percent(mean('top1'))} %{spread}",
        f"raw {percent(mean('top1_raw'))} % · dense {percent(mean('top1_dense'))} %",
        f"parameters {amount('params')}, non-zero {human(round(mean('nonzero')))}",
        f"MACs {amount('macs')} · file {amount('bytes', 'B')}",
        f"latency {1e3 * mean('latency_s'):.2f} ms, batch {records[0].latency_batch}"
        f" ({mean('latency_dense_s') / mean('latency_s'):.2f}× as fast)",
    ]
    return "<br>".join(lines)


def _layer_views(curve: Curve) -> list[dict[str, Any]]:
    """Return a table for each run of the curve: the kept parts of every layer at every size."""
    views = []
    for records in curve.runs.values():
        sizes = sorted((record for record in records if record.layers), key=lambda record: record.ratio)
        names = dict.fromkeys((layer["name"], layer["kind"]) for record in sizes for layer in record.layers)
        if names:
            views.append(
                {
                    "title": f"{records[0].run} · {curve.variant}",
                    "sizes": [size_of(record) for record in sizes],
                    "layers": [
                        {
                            "name": name,
                            "kind": kind,
                            # A layer is missing at sizes at which the plan leaves it alone.
                            "cells": [
                                next((_counts(layer) for layer in record.layers if layer["name"] == name), None)
                                for record in sizes
                            ],
                        }
                        for name, kind in names
                    ],
                }
            )
    return views


def _counts(layer: LayerCount) -> list[int]:
    return [layer["kept"], layer["total"], layer["params"], layer["params_dense"]]
