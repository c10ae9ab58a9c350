"""The verb ``train``: one network, with SGD, SFW or one of their rivals, as a run folder."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import inspect
import json
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import torch

from pliant.errors import BadInput, Busy, DamagedFile
from pliant.experiments.data.images import ImageData
from pliant.experiments.run_folder import CONFIG, LOG, PLAN, SHAPE, WEIGHTS, Run, versions, write_config, write_shape
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.determinism import deterministic_algorithms
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import check_settings, differ
from pliant.files import is_empty, locked, make_folders, remove_leftovers, write_text

ENVIRONMENT = "env.json"
Arguments = ParamSpec("Arguments")


def _checking_what_is_given(function: Callable[Arguments, Path]) -> Callable[Arguments, Path]:
    """Let ``train`` refuse what contradicts a run to resume, defaults too if they are given and not left out."""

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Path:
        bound = inspect.signature(function).bind(*args, **kwargs)
        given = dict(bound.arguments)
        bound.apply_defaults()
        if bound.arguments["resume"]:
            check_resumable(given, bound.arguments)
        return function(*args, **kwargs)

    return checked


@_checking_what_is_given
def train(
    data: str = "digits",
    data_dir: str | None = None,
    image_size: int | None = None,
    model: str = "resnet8",
    width: float = 1.0,
    method: str = "sgd",
    recipe: str | None = None,
    k: int | float | None = None,
    radius: float | None = None,
    vertices: str | None = None,
    scheme: str | None = None,
    coupled: bool | None = None,
    turnover: float | None = None,
    rescale: str | None = None,
    pattern: str | None = None,
    k_start: int | float | None = None,
    anneal: float | None = None,
    strength: float | None = None,
    every: int | None = None,
    persistence: float | None = None,
    energy: float | None = None,
    factors: int | None = None,
    condition: float | None = None,
    other_lr: float | None = None,
    epochs: int = 30,
    batch_size: int = 128,
    accumulate: int = 1,
    lr: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    augment: bool = True,
    precision: str = "auto",
    channels_last: bool = True,
    seed: int = 0,
    deterministic: bool = False,
    checkpoint_steps: int | None = None,
    tracker: str | None = None,
    out: str | None = None,
    resume: bool = False,
) -> Path:
    """Train one network and return its run folder.

    Args:
        data: digits, fashion-mnist, cifar10, cifar100, image-folder, parquet or hub:OWNER/NAME.
        data_dir: folder of the data files; digits needs none.
        image_size: resize all images to this many pixels a side.
        model: mlp, lenet5, resnet8, resnet20, resnet56, resnet18, resnet50, vgg16, wrn28_10, vit_tiny or
            package.module:callable.
        width: factor on all channel counts.
        method: sgd, sfw-filters, sfw-rank, sfw-weights, sfw-nm, or one to compare with (docs/baselines.md): k-sparse,
            ssl, glt, pat-filters, pat-rank, cram-filters, cram-rank, cram-weights, nuc, cat, trp, lorita, condlr,
            spectral-decay, q3r, muon, numuon, scion. The settings from recipe to other_lr belong to some methods only;
            those not given, and lr, are the method's own, and config.yaml tells them.
        recipe: of the sfw methods: default; gradient for steps as long as SGD's with a constant k; or paper, which is
            that with balls on all parameters.
        k: filters, singular directions or weights per layer that one step may use (condlr: rank of the weights; q3r:
            rank to go to): 3 is a count, 0.1 a share.
        radius: size of the balls, relative to the weights at initialisation (scion: as published).
        vertices: the kind of SFW's balls: support, sparse or (sfw-filters) orthogonal.
        scheme: how the balls of sfw-rank read the weight of a convolution as a matrix, for the layers channel (k×k then
            1×1; also without it) or spatial (k×1 then 1×k); either can be compressed in both ways.
        coupled: one ball for all that leaves with a channel: tied filters, biases, normalisations (sfw-filters).
        turnover: how often the training replaces the weights, instead of lr: the sum of its convex steps (sfw-filters,
            sfw-rank without rescale).
        rescale: what SFW multiplies lr by: gradient, fast-gradient, diameter or none.
        pattern: N:M for sfw-nm.
        k_start: anneal k from here down to k; k is constant without it (numuon: with the value of k).
        anneal: share of the training over which k goes from k_start to k.
        strength: factor of what the method adds to SGD: of its penalty, threshold, decay or perturbation. Of the sfw
            methods: the share of its vertices that a part of a weight must be in to stay; needs rescale none.
        every: steps between two decompositions or thresholds (trp, q3r, sfw).
        persistence: how much the length that a filter has already counts when the vertices choose filters: its power
            (sfw-filters; needs rescale none).
        energy: share of the squared singular values that trp may leave out.
        factors: how many matrices lorita multiplies for a weight.
        condition: largest ratio of the singular values of a weight (condlr).
        other_lr: learning rate of what trains without a ball or direction (sfw, muon, numuon, scion); without it, lr.
        epochs: passes over the training images.
        batch_size: images per step.
        accumulate: compute each batch in this many parts, to save memory.
        lr: largest learning rate.
        schedule: of the learning rate after the warm-up: cosine, linear, step or constant.
        warmup: share of the training during which lr rises linearly.
        momentum: of SGD, SFW and all others.
        weight_decay: of all weights; not of those with a ball, nor of those with a direction (muon, numuon, scion).
        augment: random crops, and flips where the data set allows them.
        precision: fp32, bf16, fp16 (autocast), or auto: bf16 where the hardware has it.
        channels_last: memory format of the network and the images.
        seed: of the initialisation, the order of the images and the augmentation.
        deterministic: refuse operations whose result may differ from run to run on the same machine. Without it, only
            some on a GPU do.
        checkpoint_steps: also write a checkpoint every so many steps within an epoch, for long epochs.
        tracker: where to log besides RUN/train.jsonl: tensorboard, wandb, mlflow, trackio, or several with commas.
        out: run folder; by default runs/DATA-MODEL-METHOD-seedN.
        resume: go on from the last checkpoint of the run folder, with its settings.

    Raises:
        BadInput: a setting is unknown or out of range, or the run folder exists.
        DamagedFile: data files or the checkpoint cannot be read.
        Diverged: the loss or a gradient became NaN or infinite; the last good checkpoint is kept.
        Busy: another process trains in this folder.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "resume")}
    return train_run(*_settings_and_folder(given, out, resume))


def train_run(settings: dict[str, Any], folder: Path, data: ImageData | None = None) -> Path:
    """Train in a folder, going on from its checkpoint if there is one; do nothing if the training is complete.

    Args:
        settings: all arguments of :func:`train` but ``out`` and ``resume``; a folder with a checkpoint has the same.
        folder: the run folder; made if needed.
        data: what ``settings`` name, if it is in memory already.
    """
    if (folder / WEIGHTS).exists() and not (folder / CHECKPOINT).exists():
        return folder  # complete, and its checkpoint was deleted
    fresh = is_empty(folder)
    session = Session(settings, data)
    processes = session.accelerator
    processes.wait_for_everyone()  # until now all have looked at the folder, from now on the main process writes to it
    main = processes.is_main_process
    make_folders(folder.parent)
    lock = locked(folder) if main else contextlib.nullcontext()
    with lock, deterministic_algorithms(settings["deterministic"]), warnings.catch_warnings():
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
    processes.wait_for_everyone()  # whoever returns may read the weights
    if processes.num_processes > 1:
        atexit.register(_leave_processes)
    return folder


def _leave_processes() -> None:
    """End the threads through which processes talk, while the interpreter still runs.

    They hold tensors for a moment longer than the sum that they were in. If Python shuts down before they let go, the
    process aborts ("terminate called without an active exception"). A process group joins its threads once nobody
    refers to it; the wrapped networks do until they are collected.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_kinds(settings: dict[str, Any]) -> None:
    """Raise BadInput for a setting of the wrong type, such as null, or text where a number is due."""
    hints = typing.get_type_hints(train)
    for name, value in settings.items():
        allowed = typing.get_args(hints[name]) or (hints[name],)
        number = float in allowed and isinstance(value, int) and not isinstance(value, bool)
        if type(value) not in allowed and not number:
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise BadInput(f"--{name} expects {kinds}, got {value!r}")


def _settings_and_folder(given: dict[str, Any], out: str | None, resume: bool) -> tuple[dict[str, Any], Path]:
    """Return the settings to train with and the run folder; a resumed run brings its own settings."""
    check_kinds(given)
    if given["data_dir"] is not None:
        given["data_dir"] = str(Path(given["data_dir"]).expanduser().resolve())
    folder = _run_folder(given, out)
    if is_empty(folder):
        return given, folder
    if not resume:
        raise BadInput(f"--out: {folder} exists: go on with --resume, or choose another one")
    if (folder / PLAN).exists():
        raise BadInput(f"{folder} holds a compressed network, not a run: choose another --out")
    return _saved_settings(folder), folder


def check_resumable(given: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise BadInput if what was given to :func:`train` beside ``resume`` contradicts the run in the folder.

    Args:
        given: the arguments that were given; None and "auto" contradict nothing.
        arguments: all of them, defaults included.
    """
    check_kinds({name: value for name, value in arguments.items() if name not in ("out", "resume")})
    folder = _run_folder(arguments, arguments["out"])
    if is_empty(folder) or (folder / PLAN).exists():
        return
    saved = _saved_settings(folder)
    for name, value in given.items():
        if name == "data_dir" and value is not None:
            value = str(Path(value).expanduser().resolve())
        if name not in saved or value in (None, "auto"):
            continue
        if differ(name, value, saved[name]):
            raise BadInput(
                f"--{name} {value} contradicts {saved[name]!r} of {folder}: leave it out, or start another run"
            )


def _saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a run; those that came after it was made are as they were by default."""
    saved = Run.open(folder).config
    parameters = inspect.signature(train).parameters.items()
    settings = {name: saved.get(name, p.default) for name, p in parameters if name not in ("out", "resume")}
    try:
        check_kinds(settings)
        check_settings(settings)
    except BadInput as error:
        raise DamagedFile(f"{folder / CONFIG} is damaged: {error}") from None
    return settings


def _run_folder(given: dict[str, Any], out: str | None) -> Path:
    data, model = (given[name].replace("/", "-").replace(":", "-") for name in ("data", "model"))
    return Path(out or f"runs/{data}-{model}-{given['method']}-seed{given['seed']}")


def _start_folder(folder: Path, session: Session) -> None:
    make_folders(folder)
    write_config(folder / CONFIG, session.settings)  # first: with it alone, the run can be resumed
    write_text(folder / ENVIRONMENT, json.dumps(versions(), indent=2) + "\n")
    write_shape(folder, session.data.num_classes, session.data.image_shape)  # last: with it, the folder is started
