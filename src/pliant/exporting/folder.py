"""Exporting a network: a folder that other programs read, without pliant and without the code of the network.

DIR/model.safetensors  the weights, and plan.json, if given: a constructor and this plan restore the network
    model.pt2          torch.export: needs torch
    model.onnx         ONNX: needs a runtime such as ONNX Runtime
    export.json        the description: inputs and outputs, files with their SHA-256, versions, and the largest
                       difference between each file's outputs and the network's
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pliant.calling import Example, plain
from pliant.compression import Plan
from pliant.errors import BadInput, check_choice
from pliant.exporting.graph import OPSET, PACKAGES, Portable, require_onnx
from pliant.files import making_folder, remove_leftovers, sha256, write_text
from pliant.measuring import parameters, versions
from pliant.storage import PLAN, WEIGHTS, save_weights, write_plan

FORMATS = ("safetensors", "pt2", "onnx")
MANIFEST = "export.json"


def export(
    model: nn.Module,
    folder: str | Path,
    example_inputs: Example,
    formats: Sequence[str] = FORMATS,
    *,
    plan: Plan | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network to a folder, in formats that are read without pliant.

    The graphs of pt2 and onnx are traced from a copy in eval mode, in float32, on the CPU, for any batch size; each is
    read back and compared with that copy on three batch sizes, one of them 1. The model, its mode and the random
    number generator do not change. The folder is complete or absent.

    Args:
        model: any module, compressed or not.
        folder: the folder to make.
        example_inputs: a tensor, tuple of tensors or dict of keyword arguments that the model takes, batch first.
        formats: any of "safetensors", "pt2" and "onnx".
        plan: the plan by which the model was compressed, written next to the weights for :func:`pliant.rebuild`.
        overwrite: replace the folder, if it is an export.

    Returns:
        The folder.

    Raises:
        BadInput: a format is unknown, the folder exists, the example or the plan does not fit, a package is missing, or
            the model cannot be written in a format; the message names the format and the reason.
    """
    model = plain(model)
    if plan is not None and plan.params_after != parameters(model):
        raise BadInput(
            f"the plan is for another model: it leaves {plan.params_after:,} parameters, not {parameters(model):,}"
        )

    def write_weights(room: Path) -> None:
        save_weights(model, room / WEIGHTS)
        if plan is not None:
            write_plan(room / PLAN, plan)

    return write_export(model, Path(folder), example_inputs, formats, overwrite, write_weights, type(model).__name__)


def write_export(
    model: nn.Module,
    folder: Path,
    example_inputs: Example,
    formats: Sequence[str],
    overwrite: bool,
    write_weights: Callable[[Path], None],
    name: str,
) -> Path:
    """Write a network to a folder as :func:`export` does, with any files next to the graphs.

    Args:
        model, folder, example_inputs, formats, overwrite: as in :func:`export`.
        write_weights: a function that writes the files of the format "safetensors" into a folder.
        name: name of the network, for export.json.

    Returns:
        The folder.

    Raises:
        BadInput: as in :func:`export`.
    """
    model = plain(model)
    check_request(folder, formats, overwrite)
    graph = any(name != "safetensors" for name in formats)
    portable = Portable(model, example_inputs, graph=graph)
    differences: dict[str, float] = {}
    with making_folder(folder, replace=overwrite) as room:
        if "safetensors" in formats:
            write_weights(room)
        if "pt2" in formats:
            differences["model.pt2"] = portable.save_program(room / "model.pt2")
        if "onnx" in formats:
            differences["model.onnx"] = portable.save_onnx(room / "model.onnx")
        manifest = {
            "format": "pliant.export",
            "version": 1,
            "model": name,
            "parameters": parameters(model),
            "inputs": portable.describe_inputs(any_batch=graph),
            "outputs": portable.describe_outputs(any_batch=graph),
            "files": {path.name: _describe(path, differences) for path in sorted(room.iterdir())},
            "versions": _versions("onnx" in formats),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_text(room / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return folder


def check_request(folder: Path, formats: Sequence[str], overwrite: bool) -> None:
    """Raise an error for an export that cannot succeed.

    Raises:
        BadInput: a format is unknown, a package is missing, or the folder exists and may not be replaced.
        Busy: another process is making the folder.
    """
    if isinstance(formats, str):
        raise BadInput(f"formats must be a list such as [{formats!r}], not a string")
    if not formats:
        raise BadInput(f"formats must name at least one of {', '.join(FORMATS)}")
    for name in formats:
        check_choice("format", name, FORMATS)
    if "onnx" in formats:
        require_onnx()
    remove_leftovers(folder)
    if folder.is_dir() and (not any(folder.iterdir()) or (overwrite and (folder / MANIFEST).is_file())):
        return
    if folder.is_dir() and (folder / MANIFEST).is_file():
        raise BadInput(f"{folder} exists: choose another folder, or give overwrite to replace it")
    if folder.exists() or folder.is_symlink():
        raise BadInput(f"{folder} exists and is no export: choose another folder, it will not be replaced")


def _describe(path: Path, differences: dict[str, float]) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.name in differences:
        entry["max_difference"] = differences[path.name]
    if path.name == "model.onnx":
        entry["opset"] = OPSET
    return entry


def _versions(onnx: bool) -> dict[str, str]:
    return versions() | ({name: importlib.metadata.version(name) for name in PACKAGES} if onnx else {})
