"""The verb ``train``: train one network with SGD, SFW or another method, and write a run folder."""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch

from pliant.errors import BadInput, Busy, DamagedFile, shown
from pliant.experiments.data.images import ImageData
from pliant.experiments.methods import find_method, settings_from
from pliant.experiments.run_folder import CONFIG, LOG, SHAPE, Run, write_config, write_shape
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.determinism import deterministic_algorithms
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import SETTINGS, Settings, differ, vertices_of
from pliant.files import is_empty, locked, make_folders, remove_leftovers, write_text
from pliant.measuring import versions
from pliant.storage import PLAN, WEIGHTS

ENVIRONMENT = "env.json"


@overload
def train(data: str = ..., /, *more: Any, out: str | None = None, resume: bool = False, **settings: Any) -> Path: ...
@overload
def train(settings: Settings, /, *, out: str | None = None, resume: bool = False) -> Path: ...
def train(*first: Any, out: str | None = None, resume: bool = False, **settings: Any) -> Path:
    """Train one network and return its run folder.

    ``pliant train --help`` and the page on the command line list all settings with their defaults;
    ``pliant train --method NAME --help`` adds those of a method. In Python each setting is a keyword of the same name::

        pliant.train("digits", model="resnet8", method="sfw-rank", k=0.1, epochs=10)

    Args:
        data: the data set, which may be a keyword too; or all settings in the place of keywords, as
            :class:`~pliant.experiments.training.settings.Settings`.
        settings: the others; the method decides what is None. The run folder's config.yaml has what was decided.
        out: run folder; by default runs/DATA-MODEL-METHOD-seedN.
        resume: continue from the last checkpoint of the run folder, with its settings.

    Raises:
        BadInput: a setting is unknown or out of range, or the run folder exists.
        DamagedFile: data files or the checkpoint cannot be read.
        Diverged: the loss or a gradient became NaN or infinite; the last good checkpoint is kept.
        Busy: another process trains in this folder.
    """
    given = _given(first, settings)
    requested = settings_from(given)
    folder = Path(out or _default_folder(requested))
    if is_empty(folder):
        return train_run(requested, folder)
    if not resume:
        raise BadInput(f"--out: {folder} exists: go on with --resume, or choose another one")
    return train_run(resumable(folder, given), folder)


def _signature() -> inspect.Signature:
    """Return the signature of :func:`train` with every setting and its default, for completion and ``help``."""
    own = inspect.signature(train).parameters
    all_settings = inspect.signature(Settings).parameters
    placed = [all_settings[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in SETTINGS]
    return inspect.Signature([*placed, *(own[name] for name in ("out", "resume", "settings"))], return_annotation=Path)


vars(train)["__signature__"] = _signature()


def resumable(folder: Path, given: Mapping[str, Any]) -> Settings:
    """Return the settings of a run to resume.

    Args:
        folder: the run folder.
        given: settings that were asked for; None and "auto" agree with any value.

    Raises:
        BadInput: the folder does not hold a training, or it has other settings.
        DamagedFile: it cannot be read.
    """
    if (folder / PLAN).exists():
        raise BadInput(f"{folder} holds a compressed network, not a run: choose another --out")
    settings = _saved_settings(folder)
    saved = settings.to_config()
    for name, value in given.items():
        if value not in (None, "auto") and differ(name, value, saved.get(name)):
            raise BadInput(
                f"--{name} {value} contradicts {saved.get(name)!r} of {folder}: leave it out, or start another run"
            )
    return settings


def train_run(settings: Settings, folder: Path, data: ImageData | None = None) -> Path:
    """Train in a folder and return it; continue from its checkpoint if there is one, do nothing if it is complete.

    Args:
        settings: of the training; a folder with a checkpoint has the same.
        folder: the run folder; made if needed.
        data: the data set that ``settings`` name, if it is in memory already.
    """
    if (folder / WEIGHTS).exists() and not (folder / CHECKPOINT).exists():
        return folder  # complete, and its checkpoint was deleted
    fresh = is_empty(folder)
    session = Session(settings, data)
    processes = session.accelerator
    processes.wait_for_everyone()  # all have looked at the folder, before the main process writes to it
    main = processes.is_main_process
    make_folders(folder.parent)
    lock = locked(folder) if main else contextlib.nullcontext()
    with lock, deterministic_algorithms(settings.deterministic), warnings.catch_warnings():
        if main:
            if is_empty(folder) != fresh:
                raise Busy(f"{folder} was made or removed by another process meanwhile: choose another --out")
            for name in (CONFIG, ENVIRONMENT, SHAPE, LOG, CHECKPOINT, WEIGHTS):
                remove_leftovers(folder / name)
            if not (folder / SHAPE).exists():
                _start_folder(folder, session)
        processes.wait_for_everyone()
        if (folder / CHECKPOINT).exists():
            session.restore(folder / CHECKPOINT)
        # Nothing is lost when newly initialised weights are scaled into small balls.
        warnings.filterwarnings("ignore", message=".* started outside of their balls")
        session.run(folder)
    processes.wait_for_everyone()  # after this, every process may read the weights
    if processes.num_processes > 1:
        atexit.register(_leave_processes)
    return folder


def _given(first: tuple[Any, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`train`, by name."""
    if first and isinstance(first[0], Settings):
        if settings or len(first) > 1:
            beside = [*(shown(value) for value in first[1:]), *settings]
            raise BadInput(f"expected all settings in one place, got {', '.join(beside)} beside them")
        settings = first[0].to_config()
    else:
        if len(first) > len(SETTINGS):
            raise BadInput(f"expected at most {len(SETTINGS)} settings by position, got {len(first)}")
        placed = dict(zip(SETTINGS, first, strict=False))
        if twice := [name for name in placed if name in settings]:
            raise BadInput(f"expected every setting once, got {', '.join(twice)} by position and by name")
        settings = {**placed, **settings}
    folder = settings.get("data_dir")
    return {**settings, **({"data_dir": str(Path(folder).expanduser().resolve())} if isinstance(folder, str) else {})}


def _default_folder(settings: Settings) -> str:
    name = "-".join([settings.data, settings.model, settings.method, f"seed{settings.seed}"])
    return "runs/" + re.sub("[/:]", "-", name)


def _saved_settings(folder: Path) -> Settings:
    """Return the settings of a run; those that did not exist when it was made have their defaults."""
    config = Run.open(folder).config
    try:
        method = find_method(config["method"])
        if isinstance(config.get("vertices"), str):  # a package that is gone is no damage to the file
            vertices_of(config["vertices"])
    except BadInput as error:
        raise BadInput(f"{folder / CONFIG}: {error}") from None
    try:
        return Settings.from_config(config, method.others)
    except BadInput as error:
        raise DamagedFile(f"{folder / CONFIG} is damaged: {error}") from None


def _start_folder(folder: Path, session: Session) -> None:
    make_folders(folder)
    write_config(folder / CONFIG, session.settings.to_config())  # first: with it alone, the run can be resumed
    write_text(folder / ENVIRONMENT, json.dumps(versions(), indent=2) + "\n")
    write_shape(folder, session.data.num_classes, session.data.image_shape)  # last: with it, the folder is started


def _leave_processes() -> None:
    """End the threads of communication between processes while the interpreter still runs.

    They hold tensors a moment longer than the reductions that use them. If Python shuts down before they release them,
    the process aborts ("terminate called without an active exception"). A process group joins its threads once nothing
    refers to it; the wrapped networks do until they are collected.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
