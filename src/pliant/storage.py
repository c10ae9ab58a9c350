"""A network as files: its weights as safetensors and, if it was compressed, the plan by which.

FOLDER/model.safetensors    parameters and buffers
       plan.json            how the network was compressed, see :class:`~pliant.compression.Plan`

Nothing is pickled. :func:`rebuild` reads a network back: it compresses the result of the network's constructor
according to the plan, and loads the weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from pliant.compression import Plan, skeleton
from pliant.errors import BadInput, DamagedFile, first_line
from pliant.files import write_bytes, write_text
from pliant.measuring import state_tensors

WEIGHTS, PLAN = "model.safetensors", "plan.json"


def rebuild(model: nn.Module, folder: str | Path) -> nn.Module:
    """Return the network that ``pliant.export`` or ``pliant compress`` wrote, in eval mode on the CPU.

    Nothing is unpickled: a copy of ``model`` is compressed according to the folder's plan.json, if there is one, and
    gets the weights of its model.safetensors.

    Args:
        model: a new network by the constructor of the exported network.
        folder: the folder.

    Raises:
        DamagedFile: a file is missing or damaged, or the weights belong to another model.
        BadInput: the plan is for another model.
    """
    folder = Path(folder)
    plan = read_plan(folder / PLAN) if (folder / PLAN).exists() else None
    if not (folder / WEIGHTS).is_file():
        raise DamagedFile(f"{folder} has no {WEIGHTS}: give a folder that pliant export or pliant compress wrote")
    small = copy.deepcopy(model) if plan is None else _compressed(model, plan, folder / PLAN)
    load_weights(small, folder / WEIGHTS)
    return small.cpu().eval()


def _compressed(model: nn.Module, plan: Plan, path: Path) -> nn.Module:
    try:
        return skeleton(model, plan)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except Exception as error:  # numbers that do not fit a layer fail in a way of each compressor's own
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {first_line(error)})") from error


def read_plan(path: Path) -> Plan:
    """Read a compression plan; raise DamagedFile if the file does not hold one."""
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise DamagedFile(f"{path} is damaged: {error}") from None
    except DamagedFile as error:
        raise DamagedFile(f"{path}: {error}") from None


def write_plan(path: Path, plan: Plan) -> None:
    """Write a compression plan for :func:`read_plan`, atomically."""
    write_text(path, json.dumps(plan.to_dict(), indent=1) + "\n")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the parameters and buffers of a model as safetensors, atomically."""
    write_bytes(path, safetensors.torch.save(state_tensors(model)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights that :func:`save_weights` wrote.

    Raises:
        DamagedFile: the file is damaged or belongs to another model.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    expected = state_tensors(model)
    differing = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected
        or name not in tensors
        or expected[name].shape != tensors[name].shape
        or expected[name].is_floating_point() != tensors[name].is_floating_point()
    ]
    if differing:
        shown = ", ".join(sorted(differing)[:3])
        raise DamagedFile(f"{path} belongs to another model: {len(differing)} tensors differ, such as {shown}")
    model.load_state_dict(tensors, strict=False)  # tied tensors are stored once; the names were compared above
