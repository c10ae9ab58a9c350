"""The verb ``export``: write a trained or compressed network for other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pliant.experiments.run_folder import CONFIG, RECORD, SHAPE, Run, load, read_shape
from pliant.exporting.folder import check_request, write_export
from pliant.storage import PLAN, WEIGHTS, limit_of, rebuild_sized, save_weights, write_plan


def export_run(
    folder: str | Path,
    formats: str = "safetensors,pt2,onnx",
    keep_params: float | None = None,
    keep_macs: float | None = None,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained or compressed network in formats that other programs read.

    Args:
        folder: run folder, or a folder that pliant compress wrote.
        formats: any of safetensors, pt2 and onnx, separated by commas.
        keep_params: of a folder by pliant compress --elastic, the size with this share of all parameters; without a
            size it is the dense network that is written.
        keep_macs: instead, the size with this share of the multiply-accumulates.
        max_bytes: instead, the largest size whose model.safetensors has at most so many bytes.
        max_latency_ms: instead, the largest size that takes at most so many milliseconds per image on this machine.
        out: folder to make; by default FOLDER-export next to the folder, or FOLDER-keep_params0.3-export.
        overwrite: replace the folder, if it is an export.

    Raises:
        BadInput: a format is unknown or cannot hold the network, the folder exists, or a package is missing.
        DamagedFile: the folder cannot be read.
        Refused: the size is out of reach.
    """
    budget = limit_of(keep_params=keep_params, keep_macs=keep_macs, max_bytes=max_bytes, max_latency_ms=max_latency_ms)
    names = [name.strip() for name in formats.split(",") if name.strip()]
    own = Path(folder).resolve()
    label = "" if budget is None else f"-{str(budget).replace('=', '')}"
    target = Path(out) if out else own.with_name(f"{own.name}{label}-export")
    check_request(target, names, overwrite)
    source = Run.open(folder)
    if budget is None:
        model, plan = load(folder), None
    else:
        model, plan = rebuild_sized(source.build(), source.path, budget)
    _, image_shape = read_shape(source.path)
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))

    def write_weights(room: Path) -> None:
        if plan is not None:
            save_weights(model, room / WEIGHTS)
            write_plan(room / PLAN, plan)
        for name in (CONFIG, SHAPE) if plan is not None else (WEIGHTS, PLAN, CONFIG, SHAPE, RECORD):
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, room / name)

    return write_export(model, target, images, names, overwrite, write_weights, source.config["model"])
