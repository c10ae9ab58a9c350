"""Training: one readable loop on Accelerate.

:func:`train` checks every setting, makes the run folder and goes through the epochs; a :class:`Session` holds what a
checkpoint saves. The order of the images depends on (seed, epoch) alone, so a resumed training meets the same batches.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import inspect
import io
import json
import math
import os
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec

import torch
import torch.distributed.nn.functional  # early: its default arguments keep the process group of the time of its import
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pliant.constraints.parameter_groups import check_k
from pliant.errors import BadInput, Busy, DamagedFile, Diverged, unknown
from pliant.experiments.baselines import merged
from pliant.experiments.data.images import ImageData, load_data
from pliant.experiments.data.loader import Loader
from pliant.experiments.methods import (
    METHODS,
    RECIPES,
    RESCALES,
    VERTICES,
    make_k_schedule,
    make_optimizer,
    make_threshold,
    parse_pattern,
    with_defaults,
)
from pliant.experiments.models import build_model
from pliant.experiments.run_folder import (
    CONFIG,
    PLAN,
    SHAPE,
    WEIGHTS,
    Run,
    save_weights,
    versions,
    write_config,
    write_shape,
)
from pliant.experiments.training.display import Display
from pliant.experiments.training.onednn import sound_convolutions
from pliant.experiments.training.trackers import finish_trackers, start_trackers, tracker_names
from pliant.files import is_empty, locked, make_folders, remove_leftovers, sync, write_bytes, write_text
from pliant.measuring import eval_mode, evaluate, resolve_precision
from pliant.optim.sfw import SFW
from pliant.structure.layers import SCHEMES

CHECKPOINT = Path("checkpoint") / "last.pt"
LOG, ENVIRONMENT = "train.jsonl", "env.json"
LARGEST_STEP = 0.1  # lr of a training so short that it cannot replace its weights as often as wanted
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "constant": lambda t: 1.0,
}
Arguments = ParamSpec("Arguments")
# What processes wait for each other. They do the same work, and only the main one writes files: who waits that long,
# waits for one that hangs. (One that ends breaks its connections, and torchrun ends the others.)
PATIENCE = timedelta(minutes=1)


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
        data: digits, fashion-mnist, cifar10, cifar100, image-folder, parquet, hub:OWNER/NAME or package.module:name.
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
    with lock, _deterministic(settings["deterministic"]), warnings.catch_warnings():
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


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone for a while, and say which operation has none."""
    if not wanted:
        yield
        return
    # cuBLAS reads this when it is first used; without it, its products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise BadInput(f"--deterministic: {str(error).partition(',')[0]}; train without it") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Session:
    """One training: what is saved in a checkpoint, and the loop over it.

    Args:
        settings: the arguments of :func:`train` but ``out`` and ``resume``.
        data: what they name, if it is in memory already.
    """

    def __init__(self, settings: dict[str, Any], data: ImageData | None = None) -> None:
        check_settings(settings)
        settings = with_defaults(settings)
        self.method = METHODS[settings["method"]]
        accelerator_precision = resolve_precision(settings["precision"], _device())
        if accelerator_precision == "fp16" and _device().type == "cpu":
            raise BadInput("--precision fp16 needs a GPU, this is a CPU: take bf16 or fp32")
        if accelerator_precision == "fp16" and self.method.passes > 1:
            raise BadInput(f"--method {settings['method']} cannot scale its loss for fp16: take bf16 or fp32")
        # Accelerate keeps its state in the process and refuses another precision for a second training.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision="no" if accelerator_precision == "fp32" else accelerator_precision,
            cpu=_device().type == "cpu",
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.settings = {**settings, "precision": accelerator_precision}
        self.data = data or load_data(settings["data"], settings["data_dir"], image_size=settings["image_size"])
        torch.manual_seed(settings["seed"])
        self.model = build_model(
            settings["model"],
            num_classes=self.data.num_classes,
            image_shape=self.data.image_shape,
            width=settings["width"],
        )
        _try_out(self.model, self.data, settings["model"])
        if settings["channels_last"]:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(self.accelerator.device)
        self.loader = Loader(
            self.data,
            "train",
            settings["batch_size"],
            shuffle=True,
            augment=settings["augment"],
            seed=settings["seed"],
        )
        self.steps = len(self.loader) * settings["epochs"]
        if settings["lr"] is None:
            settings |= {"lr": turnover_lr(settings, self.steps), "turnover": None}
            self.settings |= {"lr": settings["lr"], "turnover": None}
        images, _ = next(iter(Loader(self.data, "val", 2)))
        self.optimizer: Optimizer = make_optimizer(self.model, settings, images.to(self.accelerator.device))
        self.scheduler = LambdaLR(self.optimizer, learning_rate(settings, self.steps))
        self.k_schedule = make_k_schedule(self.optimizer, settings, self.steps)
        self.threshold = make_threshold(self.optimizer, settings)
        self.epoch = 0
        self.batches = 0  # of the current epoch that are done
        self.sums = (0.0, 0, 0)  # over these batches: loss, correct answers, images

    def run(self, folder: Path) -> None:
        """Train from the current epoch to the last one; write the log, the checkpoints and at last the weights."""
        settings = self.settings
        network, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        validation = Loader(self.data, "val", 512)
        main = self.accelerator.is_main_process
        log = Log(folder, keep=self.epoch, settings=settings) if main else None
        done = self.epoch * len(self.loader) + self.batches
        with Display(folder.name, self.steps, done=done, quiet=not main) as display, log or contextlib.nullcontext():
            for epoch in range(self.epoch, settings["epochs"]):
                started = time.perf_counter()
                loss, accuracy = self._train_epoch(network, optimizer, epoch, folder, display)
                self._refuse_non_finite_weights(folder)
                self.epoch, self.batches, self.sums = epoch + 1, 0, (0.0, 0, 0)
                entry = {
                    "epoch": self.epoch,
                    "lr": self.scheduler.get_last_lr()[0],
                    "loss": loss,
                    "train_top1": accuracy,
                    "val_top1": self._validate(validation),
                    "gap": self.optimizer.gap().item() if isinstance(self.optimizer, SFW) else None,
                    "seconds": time.perf_counter() - started,
                }
                if log is not None:
                    # Before the checkpoint: resuming drops a line too many, but could not make up for one.
                    log.write(entry)
                self.save(folder / CHECKPOINT)
                display.epoch(entry, settings["epochs"])
            if self.accelerator.is_main_process:
                save_weights(merged(self.model), folder / WEIGHTS)

    def _train_epoch(
        self, network: nn.Module, optimizer: Any, epoch: int, folder: Path, display: Display
    ) -> tuple[float, float]:
        """Go over the training images that are left; return the mean loss and the accuracy over the whole epoch."""
        every = self.settings["checkpoint_steps"]
        network.train()
        self.loader.set_epoch(epoch, self.batches)
        total_loss, total_correct, count = self.sums
        for images, labels in self.loader:
            try:
                loss, correct = self.step(network, optimizer, images, labels)
            except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                raise self._diverged(str(error), folder) from None
            total_loss += loss * len(labels)
            total_correct += correct
            count += len(labels)
            display.step(total_loss / count, total_correct / count)
            self.batches += 1
            self.sums = (total_loss, total_correct, count)
            if every and self.batches % every == 0 and self.batches < len(self.loader):
                self._refuse_non_finite_weights(folder)
                self.save(folder / CHECKPOINT)
        return total_loss / count, total_correct / count

    def step(self, network: nn.Module, optimizer: Any, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Take one step; return the mean loss of the batch and the number of correct answers, both from before it.

        Args:
            network: the model, as Accelerate prepared it.
            optimizer: as Accelerate prepared it.
            images: a batch, (B, C, H, W).
            labels: (B,).

        Raises:
            FloatingPointError: the loss or a gradient is NaN or infinite.
            torch.linalg.LinAlgError: a decomposition met such a value.
        """
        optimizer.zero_grad()  # here, not after the step: the gap of an epoch may need the last gradient
        loss, correct = self._gradients(network, images, labels)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss}")
        if self.method.passes == 1:
            optimizer.step()
        else:
            optimizer.step(functools.partial(self._second_pass, network, optimizer, images, labels))
        if self.threshold is not None:
            self.threshold.step()
        self.scheduler.step()
        if self.k_schedule is not None:
            self.k_schedule.step()
        return loss, correct

    def _gradients(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Add the gradients of a batch to those at hand; return its mean loss and the number of correct answers.

        Each process computes its part of the batch. Gradients are means over processes: a part counts as many times
        its share as there are processes.
        """
        count, processes = len(labels), self.accelerator.num_processes
        images, labels, weight = self._own_part(images, labels)
        loss, correct = 0.0, 0.0
        parts = min(self.settings["accumulate"], max(1, len(labels) // 2))  # BatchNorm needs two images
        for i, (part, target) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
            last = i == parts - 1  # then the processes add up what they have
            with contextlib.nullcontext() if last else self.accelerator.no_sync(network):
                share = weight * processes * len(target) / count
                part_loss, part_correct = self._backward(network, part, target, share)
            loss += part_loss / processes
            correct += weight * part_correct
        loss, correct = self._over_processes(loss, correct)
        return loss, round(correct)

    def _own_part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return this process's part of a batch and whether it counts (1 or 0).

        A batch with less than two images for each process has fewer parts; the others compute the first one, too, so
        that all take part in the sums, but theirs does not count.
        """
        parts = min(self.accelerator.num_processes, max(1, len(labels) // 2))
        index = self.accelerator.process_index
        own = index if index < parts else 0
        return images.tensor_split(parts)[own], labels.tensor_split(parts)[own], float(own == index)

    def _over_processes(self, *numbers: float) -> list[float]:
        """Return the sum of each number over processes."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64).to(self.accelerator.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def _validate(self, batches: Loader) -> float:
        """Return the accuracy of the model, each process classifying its share of the images."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        device, precision = self.accelerator.device, self.settings["precision"]
        if processes == 1:
            return evaluate(self.model, batches, device, precision)
        counts = [0]

        def own() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in batches:
                if len(labels) > index:
                    counts.append(len(labels[index::processes]))
                    yield images[index::processes], labels[index::processes]

        accuracy = evaluate(self.model, own(), device, precision) if len(batches.split) > index else 0.0
        correct, count = self._over_processes(accuracy * sum(counts), sum(counts))
        return round(correct) / count

    def _second_pass(self, network: nn.Module, optimizer: Any, images: Tensor, labels: Tensor) -> float:
        """Compute the gradients anew at other weights; BatchNorm's statistics stay those of the true ones."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        optimizer.zero_grad()
        loss, _ = self._gradients(network, images, labels)
        for buffer, old in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(old)
        return loss

    def _backward(self, network: nn.Module, images: Tensor, labels: Tensor, share: float) -> tuple[float, int]:
        device = self.accelerator.device
        layout = torch.channels_last if self.settings["channels_last"] else torch.contiguous_format
        labels = labels.to(device)
        with sound_convolutions(self.model):
            output = network(images.to(device).contiguous(memory_format=layout))
            loss = functional.cross_entropy(output.float(), labels) * share
            self.accelerator.backward(loss)
        return loss.item(), int((output.argmax(1) == labels).sum())

    # --- checkpoints ---

    def save(self, path: Path) -> None:
        """Write a checkpoint in one step."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "epoch": self.epoch,
            "batches": self.batches,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "k_schedule": None if self.k_schedule is None else self.k_schedule.state_dict(),
            "threshold": None if self.threshold is None else self.threshold.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        make_folders(path.parent)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; raises DamagedFile if it cannot be read."""
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError(f"checksum of {damaged}")
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.k_schedule is not None:
                self.k_schedule.load_state_dict(state["k_schedule"])
            if self.threshold is not None:
                self.threshold.load_state_dict(state["threshold"])
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available() and state["cuda_rng"]:
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            if type(state["epoch"]) is not int or not 0 <= state["epoch"] <= self.settings["epochs"]:
                raise ValueError(f"epoch {state['epoch']!r}")
            batches = state.get("batches", 0)
            if type(batches) is not int or not 0 <= batches < len(self.loader):
                raise ValueError(f"batches {batches!r}")
            total_loss, total_correct, count = state.get("sums", self.sums)
            self.epoch, self.batches = state["epoch"], batches
            self.sums = (float(total_loss), int(total_correct), int(count))
        except Exception as error:  # a damaged file fails in as many ways as it can be damaged
            raise DamagedFile(
                f"{path} is damaged ({type(error).__name__}): restore it, or delete the run folder and train anew"
            ) from error

    def _refuse_non_finite_weights(self, folder: Path) -> None:
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():  # each process has BatchNorm's statistics of its images: take the first
                torch.distributed.broadcast(buffer, 0)
        for name, tensor in self.model.state_dict().items():  # BatchNorm's statistics may overflow before the weights
            if not tensor.isfinite().all():
                raise self._diverged(f"{name} became NaN or infinite", folder)

    def _diverged(self, what: str, folder: Path) -> Diverged:
        kept = f"the checkpoint of epoch {self.epoch} is kept in {folder}" if self.epoch else "no epoch was completed"
        lr = self.scheduler.get_last_lr()[0]
        return Diverged(
            f"{what} in epoch {self.epoch + 1} at lr {lr:.3g}; {kept}; train with a smaller --lr and another --out"
        )


class Log:
    """train.jsonl, one line per epoch, and the trackers that are wanted.

    Args:
        folder: the run folder.
        keep: keep the lines of this many epochs, when a training is resumed.
        settings: of the run; ``tracker`` names the trackers.
    """

    def __init__(self, folder: Path, *, keep: int, settings: dict[str, Any]) -> None:
        self.path = folder / LOG
        lines = (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if self.path.exists()
            else []
        )
        write_text(self.path, "".join(line for line in lines[:keep] if line.endswith("\n")))
        self._trackers = start_trackers(tracker_names(settings["tracker"]), folder, settings, done=keep)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one epoch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        sync(self.path)  # the checkpoint that follows must not be on disk without this line
        values = {name: value for name, value in entry.items() if name != "epoch" and value is not None}
        for tracker in self._trackers:
            tracker.log(values, step=entry["epoch"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        finish_trackers(self._trackers)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise BadInput for a setting that is unknown or out of range."""
    choices = {"recipe": RECIPES, "rescale": RESCALES, "vertices": VERTICES, "scheme": SCHEMES, "schedule": SCHEDULES}
    for name, known in choices.items():
        if settings[name] is not None and settings[name] not in known:
            raise unknown(name, settings[name], known)
    if settings["pattern"] is not None:
        parse_pattern(settings["pattern"])
    tracker_names(settings["tracker"])
    for name in ("k", "k_start"):
        if settings[name] is not None:
            try:
                check_k(settings[name])
            except BadInput as error:
                raise BadInput(f"--{name}: {error}") from None
    counts = {"epochs": 1, "batch_size": 1, "accumulate": 1, "every": 1, "factors": 2, "checkpoint_steps": 1}
    for name, least in counts.items():
        if settings[name] is not None and settings[name] < least:
            raise BadInput(f"--{name} must be at least {least}, got {settings[name]}")
    if not 0 <= settings["seed"] < 2**63:
        raise BadInput(f"--seed must be an integer from 0 to 2^63 - 1, got {settings['seed']}")
    if settings["anneal"] is not None and not 0 < settings["anneal"] <= 1:
        raise BadInput(f"--anneal must lie in (0, 1], got {settings['anneal']}")
    for name in ("lr", "other_lr", "radius", "turnover", "width"):
        if settings[name] is not None and not (settings[name] > 0 and math.isfinite(settings[name])):
            raise BadInput(f"--{name} must be positive and finite, got {settings[name]}")
    for name in ("momentum", "warmup", "energy"):
        if settings[name] is not None and not 0 <= settings[name] < 1:
            raise BadInput(f"--{name} must lie in [0, 1), got {settings[name]}")
    for name, smallest in (("weight_decay", 0), ("strength", 0), ("persistence", 0), ("condition", 1)):
        if settings[name] is not None and not (settings[name] >= smallest and math.isfinite(settings[name])):
            raise BadInput(f"--{name} must be >= {smallest} and finite, got {settings[name]}")


def check_kinds(settings: dict[str, Any]) -> None:
    """Raise BadInput for a setting of the wrong type, such as null, or text where a number is due."""
    hints = typing.get_type_hints(train)
    for name, value in settings.items():
        allowed = typing.get_args(hints[name]) or (hints[name],)
        number = float in allowed and isinstance(value, int) and not isinstance(value, bool)
        if type(value) not in allowed and not number:
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise BadInput(f"--{name} expects {kinds}, got {value!r}")


def _try_out(model: nn.Module, data: ImageData, name: str) -> None:
    """Raise BadInput unless the network gives one score per class for two images."""
    images, _ = next(iter(Loader(data, "val", 2)))
    try:
        with torch.no_grad(), eval_mode(model):
            scores = model(images)
    except Exception as error:  # whatever the user's own code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"model {name!r} cannot be run on images of shape {tuple(images.shape)}: {reason}") from error
    expected = (len(images), data.num_classes)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BadInput(f"model {name!r} must give scores of shape {expected} (images, classes), got {found}")


def learning_rate(settings: dict[str, Any], steps: int) -> Callable[[int], float]:
    """Return the factor of lr at each step: a linear warm-up, then the schedule over what remains."""
    warm = int(settings["warmup"] * steps + 0.5)
    shape = SCHEDULES[settings["schedule"]]

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return shape((step - warm) / max(1, steps - warm))

    return factor


def turnover_lr(settings: dict[str, Any], steps: int) -> float:
    """Return the largest lr of a training whose convex weights sum to ``turnover``; :data:`LARGEST_STEP` at most.

    It has three significant digits, as one would choose it.
    """
    factor = learning_rate(settings, steps)
    lr = float(settings["turnover"]) / sum(factor(step) for step in range(steps))
    return min(LARGEST_STEP, float(f"{lr:.3g}"))


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


def differ(name: str, one: object, other: object) -> bool:
    """Return whether two values of a setting are different: an integer k is a count and a float a share."""
    return one != other or (name in ("k", "k_start") and type(one) is not type(other))


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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
