"""A network as files: its weights as safetensors and, if it was compressed, the plan by which.

FOLDER/model.safetensors    parameters and buffers
       plan.json            how the network was compressed, see :class:`~pliant.compression.Plan`
       elastic.json         if the folder holds every size of the network, how channels or directions leave
       elastic.safetensors  and what makes and corrects the weights at each size

Nothing is pickled. :func:`rebuild` reads a network back: it compresses the result of the network's constructor
according to the plan, and loads the weights. :func:`elastic` writes a network from which every size can be made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from pliant.calling import Example, copied, plain
from pliant.compression import Compressor, Plan, skeleton
from pliant.compression.budgets import Budget, one_budget
from pliant.compression.elastic import Elastic
from pliant.compression.ladder import LADDER, make_elastic
from pliant.errors import BadInput, DamagedFile, PliantError, first_line
from pliant.files import making_folder, remove_leftovers, sha256, write_bytes, write_text
from pliant.measuring import state_tensors

WEIGHTS, PLAN = "model.safetensors", "plan.json"
ELASTIC, CORRECTIONS = "elastic.json", "elastic.safetensors"


def rebuild(
    model: nn.Module,
    folder: str | Path,
    *,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
) -> nn.Module:
    """Return the network that ``pliant.export`` or ``pliant compress`` wrote, in eval mode on the CPU.

    Nothing is unpickled: a copy of ``model`` is compressed according to the folder's plan.json, if there is one, and
    gets the weights of its model.safetensors. A folder by :func:`pliant.elastic` holds every size: one of the limits
    gives the largest network that meets it, in milliseconds and without data; without a limit it is the dense network.

    Args:
        model: a new network by the constructor of the exported network, or for an elastic folder of the dense one.
        folder: the folder.
        keep_params: of an elastic folder, the share of all parameters that may stay, in (0, 1].
        keep_macs: the share of the multiply-accumulates that may stay.
        max_bytes: size of the safetensors file.
        max_latency_ms: milliseconds of a forward pass of an example like that of :func:`pliant.elastic`, measured here.

    Raises:
        DamagedFile: a file is missing or damaged, or the weights belong to another model.
        BadInput: the plan is for another model, there is more than one limit, or the folder holds a single size.
        Refused: the limit is out of reach: the smallest size in the folder is larger.
    """
    budget = limit_of(keep_params=keep_params, keep_macs=keep_macs, max_bytes=max_bytes, max_latency_ms=max_latency_ms)
    if budget is not None:
        return rebuild_sized(model, folder, budget)[0]
    folder = Path(folder)
    plan = read_plan(folder / PLAN) if (folder / PLAN).exists() else None
    if not (folder / WEIGHTS).is_file():
        raise DamagedFile(f"{folder} has no {WEIGHTS}: give a folder that pliant export or pliant compress wrote")
    small = copied(model) if plan is None else _compressed(model, plan, folder / PLAN)
    load_weights(small, folder / WEIGHTS)
    return small.cpu().eval()


def limit_of(**limits: float | None) -> Budget | None:
    """Return the only budget whose limit is not None, or None; raise BadInput for several."""
    return None if all(limit is None for limit in limits.values()) else one_budget(**limits)


def rebuild_sized(model: nn.Module, folder: str | Path, budget: Budget) -> tuple[nn.Module, Plan]:
    """Return the largest network of an elastic folder that meets a budget, in eval mode on the CPU, and its plan.

    Args:
        model: a new network by the constructor of the dense one.
        folder: the folder.
        budget: the limit.

    Raises:
        DamagedFile, BadInput, Refused: as for :func:`rebuild`.
    """
    folder = Path(folder)
    if not (folder / ELASTIC).exists():
        raise BadInput(
            f"{budget}: {folder} holds a network of one size; pliant.elastic and compress --elastic write all"
        )
    dense = copied(model).cpu().eval()
    elastic = read_elastic(dense, folder)
    load_weights(dense, folder / WEIGHTS)
    try:
        small, plan = elastic.network(dense, budget)
    except PliantError:
        raise
    except Exception as error:  # numbers that do not fit a layer fail in many ways
        raise DamagedFile(f"{folder / ELASTIC} is damaged ({type(error).__name__}: {first_line(error)})") from error
    return small.eval(), plan


def elastic(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    folder: str | Path,
    calibration: Iterable[Any],
    ladder: Sequence[float] = LADDER,
) -> Path:
    """Write a network from which every size can be made in milliseconds, without data, by :func:`pliant.rebuild`.

    The folder holds the dense weights, the order in which channels leave, and small corrections: at every share of the
    ladder the weights that are left are refitted as by :func:`pliant.compress`, and what differs from the next larger
    one is stored in two to four bits per weight. For :class:`~pliant.LowRank` it holds the directions of every layer in
    the order of their energies, in four to eight bits, up to the largest rank that makes the layer smaller; a size
    takes the first ones, and the factors follow from these and the dense weights. A layer has one scheme for all its
    ranks. By default the folder has at most 1.2 times the bytes of the dense
    network. Sizes between two shares are interpolated; there are none below the last one.

    Its elastic.json has the errors of the outputs at each of these sizes on data that was held out, next to those of a
    refit at that size alone. All sizes lie on one path; ``FilterPruning(cost="macs")`` takes one that economises
    multiply-accumulates, for folders of which ``keep_macs`` or ``max_latency_ms`` will be asked.

    Args:
        model: a trained network; not changed.
        compressor: :class:`~pliant.FilterPruning`, :class:`~pliant.HeadPruning` or :class:`~pliant.LowRank`; its ratio
            is ignored.
        example_inputs: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes. Limits on
            multiply-accumulates and latency count an example of this shape.
        folder: the folder to make.
        calibration: batches of training data without augmentation, as for :func:`pliant.compress`.
        ladder: falling shares of the parameters. More of them are more exact and take more room.

    Returns:
        The folder.

    Raises:
        BadInput: the folder exists, the compressor cannot do this, or the ladder, example or data does not fit.
        Refused: nothing can be removed, or the last share of the ladder is out of reach.
        Busy: another process is making the folder.
    """
    model, folder = plain(model), Path(folder)
    remove_leftovers(folder)
    if folder.exists() or folder.is_symlink():
        raise BadInput(f"{folder} exists: choose another folder, or remove it")
    with making_folder(folder) as fresh:
        write_elastic(model, make_elastic(model, compressor, example_inputs, calibration, ladder), fresh)
    return folder


def write_elastic(model: nn.Module, made: Elastic, folder: Path) -> None:
    """Write the dense weights and everything that makes other sizes of them into a folder."""
    save_weights(model, folder / WEIGHTS)
    write_bytes(folder / CORRECTIONS, safetensors.torch.save(made.tensors()))
    hashes = {name: sha256(folder / name) for name in (WEIGHTS, CORRECTIONS)}
    write_text(folder / ELASTIC, json.dumps({**made.to_dict(), "files": hashes}, separators=(",", ":")) + "\n")


def read_elastic(model: nn.Module, folder: Path) -> Elastic:
    """Read what :func:`write_elastic` wrote, and check that the files of the folder belong together.

    Args:
        model: a network of the dense architecture, with any weights.
        folder: the folder.

    Raises:
        DamagedFile: a file is missing or damaged.
        BadInput: the folder is for another model.
    """
    path = folder / ELASTIC
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    hashes = data.pop("files", None) if isinstance(data, dict) else None
    for name in (WEIGHTS, CORRECTIONS):
        if not (folder / name).is_file():
            raise DamagedFile(f"{folder} has no {name}, which its {ELASTIC} needs")
        if not isinstance(hashes, dict) or hashes.get(name) != sha256(folder / name):
            raise DamagedFile(f"{folder / name} is damaged, or does not belong to the {ELASTIC} beside it")
    try:
        tensors = safetensors.torch.load_file(folder / CORRECTIONS)
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedFile(f"{folder / CORRECTIONS} is damaged: {error}") from None
    try:
        return Elastic.from_dict(data, tensors, model)
    except PliantError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # numbers that do not fit a layer fail in many ways
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {first_line(error)})") from error


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
    write_bytes(path, safetensors.torch.save(state_tensors(plain(model))))


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
