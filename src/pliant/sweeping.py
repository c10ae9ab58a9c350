"""Sweeping: one trained network at many sizes, without retraining; one record each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pliant.compression.base import check_ratio
from pliant.errors import BadInput
from pliant.records import Record, append_record, check_appendable, read_records
from pliant.runs import Run
from pliant.trials import Trial, check_names, pattern_compressor


def sweep(
    runs: str | Path | Sequence[str | Path],
    compressor: str = "filters",
    ratios: str | Sequence[float] = "0,0.3,0.5,0.7,0.8,0.9",
    allocation: str = "global",
    pattern: str = "2:4",
    calibration: int = 2048,
    precision: str = "auto",
    whiten: bool = True,
    out: str = "records.jsonl",
) -> Path:
    """Compress trained networks at many ratios, measure each, and append the records to a file.

    Records that the file has already, measured with the same settings, are skipped: a stopped sweep goes on.

    Args:
        runs: run folders, as pliant train makes them.
        compressor: filters, heads, rank, weights or nm, or a chain such as filters+rank or rank+int8.
        ratios: shares of the compressible parameters to remove, such as 0,0.5,0.9; 0 is the dense network.
        allocation: the same share in every layer (uniform), where it costs least (global), or so that every layer
            keeps the same share of its energy (energy).
        pattern: for nm, instead of ratios: one or more N:M, such as 2:4 or 2:4,1:4.
        calibration: training images for whitening and the BatchNorm re-estimation.
        precision: fp32, bf16 or fp16 for the accuracy; auto is the precision of the training.
        whiten: for rank, choose the directions by the layers' outputs on the calibration images, not by the weights.
        out: file of records to append to.

    Raises:
        BadInput: an unknown name, or a value out of range.
        DamagedFile: a run folder, its data or the file of records cannot be read.
    """
    check_names(compressor, allocation)
    points = _patterns(pattern) if compressor == "nm" else [(ratio, "") for ratio in parse_ratios(ratios)]
    opened = [Run.open(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not opened:
        raise BadInput("expected at least one run folder, got none")
    path = Path(out)
    existing = {record.key() for record in read_records(path)} if path.exists() else set()
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    options: dict[str, Any] = {"allocation": allocation, "calibration": calibration, "precision": precision}
    trials = [Trial(run, compressor, whiten=whiten, **options) for run in opened]
    check_appendable(path)
    for run, trial in zip(opened, trials, strict=True):
        missing = [point for point in points if trial.key(*point) not in existing]
        if len(missing) < len(points):
            console.print(f"{run.name}  {compressor}: {len(points) - len(missing)} records exist already, skipped")
        for ratio, pattern_or_none in missing:
            _, _, record = trial.measure(ratio, pattern_or_none)
            append_record(path, record)
            existing.add(record.key())
            console.print(describe(record))
    return path


def parse_ratios(ratios: str | Sequence[float]) -> list[float]:
    """Return ratios from a list or from text such as "0,0.5,0.9"; raises BadInput for anything else."""
    parts = ratios.split(",") if isinstance(ratios, str) else list(ratios)
    try:
        parsed = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise BadInput(f"ratios are numbers separated by commas, such as 0,0.5,0.9; got {ratios!r}") from None
    if not parsed:
        raise BadInput("expected at least one ratio, got none")
    for ratio in parsed:
        check_ratio(ratio)
    return list(dict.fromkeys(parsed))


def describe(record: Record) -> str:
    """Return a record as one line for a person."""
    name = record.pattern or f"ratio {record.ratio:g}"
    size = (
        f"non-zeros {record.nonzero / record.params_dense:.1%}"
        if record.params == record.params_dense and record.ratio
        else f"params {record.params / record.params_dense:.1%}"
    )
    return (
        f"{record.run}  {record.compressor} {name}  top1 {record.top1:.1%} (raw {record.top1_raw:.1%}, "
        f"dense {record.top1_dense:.1%})  {size}  MACs {record.macs / record.macs_dense:.1%}"
    )


def _patterns(patterns: str) -> list[tuple[float, str]]:
    """Return (ratio, pattern) pairs to measure: the dense network, then each pattern."""
    for pattern in patterns.split(","):
        pattern_compressor(pattern)  # for its BadInput, before anything is measured
    return [(0.0, ""), *((0.0, pattern) for pattern in dict.fromkeys(patterns.split(",")))]
