"""The verb ``compress``: compress one run to one size, into a folder that :func:`pliant.load` reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pliant.compression.base import check_ratio
from pliant.compression.budgets import Budget
from pliant.compression.by_name import check_names
from pliant.compression.controls import AT_LEAST
from pliant.compression.ladder import LADDER, check_ladder
from pliant.compressor_names import (
    CALIBRATION,
    LOSS,
    SCHEME,
    check_pattern,
    control_flags,
    factorises,
    names_in_help,
    takes_pattern,
)
from pliant.errors import BadInput, shown
from pliant.experiments.controls import AUTO, controls_of
from pliant.experiments.run_folder import CONFIG, RECORD, SHAPE, Run, write_config
from pliant.experiments.sweep import PATTERN, describe
from pliant.experiments.workbench import Workbench, pattern_compressor
from pliant.files import making_folder, remove_leftovers, write_text
from pliant.storage import PLAN, WEIGHTS, limit_of, save_weights, write_elastic, write_plan


@names_in_help
def compress_run(
    run: str | Path,
    compressor: str = "filters",
    ratio: float | None = None,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
    max_drop: float | None = None,
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
    elastic: bool = False,
    ladder: str | Sequence[float] | None = None,
    out: str | None = None,
) -> Path:
    """Compress a trained network to one size, without retraining, and write it to a folder.

    The size is a ratio or one budget. A budget gives the largest network that meets it; max_drop gives the smallest.

    With --elastic, one folder holds all sizes instead.

    The folder holds model.safetensors, plan.json (the kept parts), record.json (the measurements), config.yaml and
    shape.json.

    Args:
        run: run folder, as pliant train writes it.
        compressor: {compressors}.
        ratio: share of the compressible parameters to remove; by default 0.5 if there is no budget.
        keep_params: instead of a ratio, share of all parameters that may stay.
        keep_macs: instead of a ratio, share of the multiply-accumulates that may stay.
        max_bytes: instead of a ratio, size of model.safetensors.
        max_latency_ms: instead of a ratio, milliseconds per image, measured on this machine.
        max_drop: instead of a ratio, how much accuracy on the validation images may be lost, such as 0.01.
        allocation: remove the same share of every layer (uniform), where it loses least (global), or so that every
            layer keeps the same share of its energy (energy).
        pattern: N:M for nm, instead of the ratio; by default 2:4.
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
        elastic: write every size into one folder, for filters, heads or rank; pliant.load and pliant export take sizes
            of it.
        ladder: with elastic, the shares of the parameters at which the weights are refitted; by default
            0.7,0.5,0.3,0.2,0.1, of which the last is the smallest size.
        out: folder to make; by default RUN-COMPRESSOR-RATIO next to the run, with unusual options in between, as in
            RUN-rank-channel-uniform-0.5.

    Raises:
        BadInput: a name is unknown, a value is out of range, there are two sizes, or the folder exists.
        Busy: another process is making the folder.
        DamagedFile: the run folder or its data cannot be read.
        Refused: nothing can be removed from this network, or the budget is out of reach.
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
    patterned = takes_pattern(compressor)
    limits = {
        "keep_params": keep_params,
        "keep_macs": keep_macs,
        "max_bytes": max_bytes,
        "max_latency_ms": max_latency_ms,
        "max_drop": max_drop,
    }
    budget = limit_of(**limits)
    shares = _ladder(ladder, elastic)
    if elastic and (ratio is not None or pattern is not None or budget is not None):
        given = budget.kind if budget is not None else "pattern" if ratio is None else "ratio"
        raise BadInput(f"--elastic holds every size: --{given} is for a folder of one size, and for pliant export")
    if budget is not None and (ratio is not None or patterned):
        raise BadInput(f"{'a pattern' if patterned else '--ratio'} and --{budget.kind} exclude each other")
    check_pattern(compressor, pattern, ratio=ratio)
    pattern = pattern or PATTERN
    ratio = 0.5 if ratio is None else ratio
    check_ratio(ratio)
    if patterned:
        pattern_compressor(pattern)  # for its BadInput, before anything is measured
    size: dict[str, Any] = {"ratio": ratio, "pattern": pattern if patterned else ""}
    source = Run.open(run)
    options: dict[str, Any] = {"allocation": allocation, "calibration": calibration, "precision": precision}
    options |= {"whiten": whiten, "scheme": scheme, "controls": controls, "refit": refit, "importance": importance}
    bench = Workbench(source, compressor, **options)
    label = str(budget).replace("=", "") if budget else size["pattern"].replace(":", "of") or f"{ratio:g}"
    if elastic:
        label = "elastic"
    if max_drop is not None and precision != "auto":  # the accuracy is measured in this precision
        label = f"{precision}-{label}"
    folder = Path(out) if out else source.path.resolve().with_name(_name(bench, label))
    remove_leftovers(folder)
    if folder.exists():
        raise BadInput(f"--out: {folder} exists: choose another --out, or remove it")
    if (source.path / PLAN).exists():
        raise BadInput(f"{run} is compressed already: give the run folder it was made from")
    if elastic:
        _write_elastic(folder, bench, shares)
    else:
        _write(folder, bench, size, budget)
    return folder


def _ladder(ladder: str | Sequence[float] | None, elastic: bool) -> tuple[float, ...]:
    """Return the shares of a ladder, which the shell gives as text."""
    if ladder is None:
        return LADDER
    if not elastic:
        raise BadInput("--ladder is for --elastic")
    try:
        shares = [float(part) for part in ladder.split(",")] if isinstance(ladder, str) else ladder
    except ValueError:
        raise BadInput(f"--ladder has shares such as 0.5,0.2, separated by commas; got {shown(ladder)}") from None
    return check_ladder(shares)


def _write_elastic(folder: Path, bench: Workbench, ladder: Sequence[float]) -> None:
    """Make the folder that holds every size, and say what it holds."""
    source = bench.run
    with making_folder(folder) as fresh:
        made = bench.elastic(ladder)
        write_elastic(source.load(), made, fresh)
        write_config(fresh / CONFIG, source.config)
        shutil.copyfile(source.path / SHAPE, fresh / SHAPE)
        size = sum(file.stat().st_size for file in fresh.iterdir())
        dense = (fresh / WEIGHTS).stat().st_size
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(made), markup=False)
    console.print(f"{folder}  {size:,} bytes, {size / dense:.2f} times those of the dense network", markup=False)


def _write(folder: Path, bench: Workbench, size: dict[str, Any], budget: Budget | None) -> None:
    """Make the folder of the compressed network, and say what it holds."""
    source = bench.run
    with making_folder(folder) as fresh:  # first, so that a place that cannot be written to is noticed soon
        network, plan, record = bench.measure(**size) if budget is None else bench.fit(budget)
        save_weights(network, fresh / WEIGHTS)
        write_plan(fresh / PLAN, plan)
        write_config(fresh / CONFIG, source.config)
        shutil.copyfile(source.path / SHAPE, fresh / SHAPE)
        write_text(fresh / RECORD, json.dumps(record.to_dict(), indent=1) + "\n")
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(plan), markup=False)
    console.print(describe(record), markup=False)
    console.print(f"{folder}  {record.bytes_dense:,} -> {record.bytes:,} bytes", markup=False)


def _name(bench: Workbench, label: str) -> str:
    """Return the name of a folder whose name nobody has chosen; ``label`` says the size."""
    return "-".join([bench.run.name, bench.compressor.replace(":", "."), *_unusual(bench), label])


def _unusual(bench: Workbench) -> list[str]:
    """Return a word for each option whose value gives another network than its default."""
    words = []
    if bench.choice not in ("", LOSS) or (bench.importance != AUTO and not bench.choice):
        words.append(bench.importance)
    if factorises(bench.compressor) and not bench.whiten:
        words.append("plain")
    if bench.scheme not in (None, SCHEME):
        words.append(bench.scheme)
    if bench.allocation not in ("", "global"):  # nm has none
        words.append(bench.allocation)
    if bench.calibration != CALIBRATION:
        words.append(f"calibration{bench.calibration}")
    if not bench.refit:
        words.append("cut")
    # A pattern may hold what no name of a folder can.
    words += [re.sub(r"[^\w.,=]", "_", f"{flag}={text}") for flag, text in control_flags(bench.controls).items()]
    return words
