"""Compressing one run to one size, as a folder that :func:`pliant.load` reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from pliant.compression.base import check_ratio
from pliant.errors import BadInput
from pliant.files import write_text
from pliant.runs import CONFIG, PLAN, SHAPE, WEIGHTS, Run, save_weights, write_config
from pliant.sweeping import describe
from pliant.trials import Trial, check_names


def compress_run(
    run: str | Path,
    compressor: str = "filters",
    ratio: float = 0.5,
    allocation: str = "global",
    pattern: str = "2:4",
    calibration: int = 2048,
    precision: str = "auto",
    out: str | None = None,
) -> Path:
    """Compress a trained network to one size, without retraining, and write it to a folder.

    The folder holds model.safetensors, plan.json (what was kept), record.json (what it achieves), config.yaml and
    shape.json.

    Args:
        run: run folder, as pliant train makes it.
        compressor: filters, rank, weights or nm.
        ratio: share of the compressible parameters to remove.
        allocation: the same share in every layer (uniform), or where it costs least (global).
        pattern: N:M for nm, instead of the ratio.
        calibration: training images for the BatchNorm re-estimation.
        precision: fp32, bf16 or fp16 for the accuracy; auto is the precision of the training.
        out: folder to make; by default RUN-COMPRESSOR-RATIO beside the run.

    Raises:
        BadInput: an unknown name, a value out of range, or the folder exists.
        DamagedFile: the run folder or its data cannot be read.
        Refused: nothing can be removed from this network.
    """
    check_names(compressor, allocation)
    check_ratio(ratio)
    source = Run.open(run)
    size = pattern.replace(":", "of") if compressor == "nm" else f"{ratio:g}"
    folder = Path(out) if out else source.path.resolve().with_name(f"{source.name}-{compressor}-{size}")
    if folder.exists():
        raise BadInput(f"{folder} exists: choose another --out, or remove it")
    if (source.path / PLAN).exists():
        raise BadInput(f"{run} is compressed already: give the run folder it was made from")
    trial = Trial(source, compressor, allocation=allocation, calibration=calibration, precision=precision)
    network, plan, record = trial.measure(ratio, pattern if compressor == "nm" else "")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written beside, then the whole folder takes its name: it is complete or absent.
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        save_weights(network, temporary / WEIGHTS)
        write_text(temporary / PLAN, json.dumps(plan.to_dict(), indent=1) + "\n")
        write_config(temporary / CONFIG, source.config)
        shutil.copyfile(source.path / SHAPE, temporary / SHAPE)
        write_text(temporary / "record.json", json.dumps(record.to_dict(), indent=1) + "\n")
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(plan), markup=False)
    console.print(describe(record), markup=False)
    console.print(f"{folder}  {record.bytes_dense:,} -> {record.bytes:,} bytes", markup=False)
    return folder
