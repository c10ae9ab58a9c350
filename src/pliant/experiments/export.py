"""The verb ``export``: write a trained or compressed network for other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pliant.experiments.run_folder import CONFIG, RECORD, SHAPE, Run, load, read_shape
from pliant.exporting.folder import check_request, write_export
from pliant.storage import PLAN, WEIGHTS


def export_run(
    folder: str | Path, formats: str = "safetensors,pt2,onnx", out: str | None = None, overwrite: bool = False
) -> Path:
    """Write a trained or compressed network in formats that other programs read.

    Args:
        folder: run folder, or a folder that pliant compress wrote.
        formats: any of safetensors, pt2 and onnx, separated by commas.
        out: folder to make; by default FOLDER-export next to the folder.
        overwrite: replace the folder, if it is an export.

    Raises:
        BadInput: a format is unknown or cannot hold the network, the folder exists, or a package is missing.
        DamagedFile: the folder cannot be read.
    """
    names = [name.strip() for name in formats.split(",") if name.strip()]
    target = Path(out) if out else Path(folder).resolve().with_name(f"{Path(folder).resolve().name}-export")
    check_request(target, names, overwrite)
    source = Run.open(folder)
    model = load(folder)
    _, image_shape = read_shape(source.path)
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))

    def write_weights(room: Path) -> None:
        for name in (WEIGHTS, PLAN, CONFIG, SHAPE, RECORD):
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, room / name)

    return write_export(model, target, images, names, overwrite, write_weights, source.config["model"])
