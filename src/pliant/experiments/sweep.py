"""Sweeping: one trained network at many sizes, without retraining; one record each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pliant.compression.base import check_ratio
from pliant.compression.by_name import check_names
from pliant.compression.controls import AT_LEAST
from pliant.compressor_names import CALIBRATION, check_pattern, names_in_help, takes_pattern
from pliant.errors import BadInput
from pliant.experiments.controls import AUTO, controls_of
from pliant.experiments.run_folder import Run
from pliant.experiments.workbench import Workbench, pattern_compressor
from pliant.files import locked
from pliant.jsonl import check_appendable
from pliant.records import Record, append_record, read_records

RATIOS, PATTERN = "0,0.3,0.5,0.7,0.8,0.9", "2:4"


@names_in_help
def sweep(
    runs: str | Path | Sequence[str | Path],
    compressor: str = "filters",
    ratios: str | Sequence[float] | None = None,
    allocation: str = "global",
    pattern: str | None = None,
    calibration: int = CALIBRATION,
    precision: str = "auto",
    whiten: bool = True,
    scheme: str | None = None,
    multiple_of: int = 1,
    keep: str | Sequence[str] | None = None,
    at_least: int | float = AT_LEAST,
    at_most: int | float = 1.0,
    layer_ratios: str | Mapping[str, float] | None = None,
    refit: bool = True,
    importance: str = AUTO,
    out: str = "records.jsonl",
) -> Path:
    """Compress trained networks at many ratios, measure each, and append the records to a file.

    Measurements with the same settings that the file already has are skipped, so a stopped sweep can be continued.

    Args:
        runs: run folders, as pliant train writes them.
        compressor: {compressors}.
        ratios: shares of the compressible parameters to remove, such as 0,0.5,0.9; 0 is the dense network; by
            default 0,0.3,0.5,0.7,0.8,0.9.
        allocation: remove the same share of every layer (uniform), where it loses least (global), or so that every
            layer keeps the same share of its energy (energy).
        pattern: for nm, instead of ratios: one or more N:M, such as 2:4,1:4; by default 2:4.
        calibration: training images for choosing what goes, for whitening, and for the refit.
        precision: fp32, bf16 or fp16 for the accuracy; auto is the precision of the training.
        whiten: for rank, choose the directions by the layers' outputs on the calibration images, not by the weights.
        scheme: for rank, how convolutions are factorised: k×1 then 1×k (spatial, the default), k×k then 1×1 (channel),
            or for each layer the one that loses less energy (best).
        multiple_of: every layer that is cut keeps a multiple of so many channels, heads or ranks, such as 8.
        keep: layers that do not change, by names or patterns separated by commas, such as fc,layer1.*.
        at_least: what every layer keeps at least of its channels, heads or rank: 0.05 is a share, 1 is one.
        at_most: what every layer keeps at most: 0.5 is a share, 1.0 is all, 1 is one.
        layer_ratios: shares that single layers remove, such as layer1.*=0.5,fc=0; the others share the rest.
        refit: whether the weights that are left are refitted on the calibration images; if not, only the BatchNorm
            statistics are estimated again.
        importance: how compressors choose what goes: by what the rest cannot make up for on the calibration images
            (auto, loss), or by the weights alone: l2 or l1 for filters and heads, bn for filters, magnitude for weights
            and nm.
        out: file of records to append to.

    Raises:
        BadInput: a name is unknown, or a value is out of range.
        DamagedFile: a run folder, its data or the file of records cannot be read.
        Busy: another process is appending to the file.
    """
    check_names(compressor, allocation)
    controls = controls_of(
        compressor,
        multiple_of=multiple_of,
        keep=keep,
        at_least=at_least,
        at_most=at_most,
        layer_ratios=layer_ratios,
    )
    check_pattern(compressor, pattern, ratios=ratios)
    if takes_pattern(compressor):
        points = _patterns(pattern or PATTERN)
    else:
        points = [(ratio, "") for ratio in parse_ratios(RATIOS if ratios is None else ratios)]
    opened = [Run.open(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not opened:
        raise BadInput("expected at least one run folder, got none")
    path = Path(out)
    options: dict[str, Any] = {"allocation": allocation, "calibration": calibration, "precision": precision}
    options |= {"whiten": whiten, "scheme": scheme, "controls": controls, "refit": refit, "importance": importance}
    benches = [Workbench(run, compressor, **options) for run in opened]
    if path.exists():
        read_records(path)  # for its DamagedFile, before anything is measured
    check_appendable(path)
    with locked(path):
        _append_missing(path, benches, points)
    return path


def _append_missing(path: Path, benches: list[Workbench], points: list[tuple[float, str]]) -> None:
    """Measure the points of every workbench that are missing in the file of records, and append them one by one."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    existing = {record.key() for record in read_records(path)} if path.exists() else set()
    for bench in benches:
        missing = [point for point in points if bench.key(*point) not in existing]
        if len(missing) < len(points):
            skipped = f"{len(points) - len(missing)} records exist already, skipped"
            console.print(f"{bench.run.name}  {bench.compressor}: {skipped}")
        for ratio, pattern in missing:
            _, _, record = bench.measure(ratio, pattern)
            append_record(path, record)
            existing.add(record.key())
            console.print(describe(record))


def parse_ratios(ratios: str | Sequence[float]) -> list[float]:
    """Return ratios from a list or from text such as "0,0.5,0.9"; raise BadInput for anything else."""
    parts = ratios.split(",") if isinstance(ratios, str) else list(ratios)
    try:
        parsed = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise BadInput(f"ratios are numbers separated by commas, such as 0,0.5,0.9; got {ratios!r}") from None
    if not parsed:
        raise BadInput("expected at least one of the ratios, got none")
    for ratio in parsed:
        check_ratio(ratio)
    return list(dict.fromkeys(parsed))


def describe(record: Record) -> str:
    """Return a record as a line to print."""
    name = record.pattern or f"ratio {record.ratio:g}"
    size = (
        f"non-zeros {record.nonzero / record.params_dense:.1%}"
        if record.params == record.params_dense and record.ratio
        else f"params {record.params / record.params_dense:.1%}"
    )
    settled = "" if record.refit is None else f"re-estimated {record.top1_reestimated:.1%}, "
    return (
        f"{record.run}  {record.compressor} {name}  top1 {record.top1:.1%} ({settled}raw {record.top1_raw:.1%}, "
        f"dense {record.top1_dense:.1%})  {size}  MACs {record.macs / record.macs_dense:.1%}"
    )


def _patterns(patterns: str) -> list[tuple[float, str]]:
    """Return the (ratio, pattern) pairs to measure: the dense network, then each pattern."""
    for pattern in patterns.split(","):
        pattern_compressor(pattern)  # for its BadInput, before anything is measured
    return [(0.0, ""), *((0.0, pattern) for pattern in dict.fromkeys(patterns.split(",")))]
