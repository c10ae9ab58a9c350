"""Training: one readable loop on Accelerate.

:func:`train` checks every setting, makes the run folder and goes through the epochs; a :class:`Session` holds what a
checkpoint saves. The order of the images depends on (seed, epoch) alone, so a resumed training meets the same batches.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import math
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pliant.baselines import merged
from pliant.constraints import check_k
from pliant.data import ImageData, Loader, load_data
from pliant.display import Display
from pliant.errors import BadInput, DamagedFile, Diverged, unknown
from pliant.files import write_bytes, write_text
from pliant.measuring import eval_mode, evaluate, resolve_precision
from pliant.methods import METHODS, RESCALES, VERTICES, make_k_schedule, make_optimizer, parse_pattern, with_defaults
from pliant.models import build_model
from pliant.runs import CONFIG, PLAN, SHAPE, WEIGHTS, Run, save_weights, versions, write_config, write_shape
from pliant.sfw import SFW

CHECKPOINT = Path("checkpoint") / "last.pt"
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "constant": lambda t: 1.0,
}


def train(
    data: str = "digits",
    data_dir: str | None = None,
    image_size: int | None = None,
    model: str = "resnet8",
    width: float = 1.0,
    method: str = "sgd",
    k: int | float | None = None,
    radius: float | None = None,
    vertices: str | None = None,
    rescale: str | None = None,
    pattern: str | None = None,
    k_start: int | float | None = None,
    strength: float | None = None,
    every: int | None = None,
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
    tensorboard: bool = False,
    out: str | None = None,
    resume: bool = False,
) -> Path:
    """Train one network and return its run folder.

    Args:
        data: digits, fashion-mnist, cifar10, cifar100, image-folder, parquet or hub:OWNER/NAME.
        data_dir: folder of the data files; digits needs none.
        image_size: resize all images to this many pixels a side.
        model: mlp, lenet5, resnet8, resnet20, resnet56, resnet18, vgg16, wrn28_10, vit_tiny or package.module:callable.
        width: factor on all channel counts.
        method: sgd, sfw-filters, sfw-rank, sfw-weights, sfw-nm, or one to compare with (docs/baselines.md): k-sparse,
            ssl, glt, pat-filters, pat-rank, cram-filters, cram-rank, cram-weights, nuc, cat, trp, lorita, condlr,
            spectral-decay, q3r, muon, numuon, scion. The settings from k to other_lr belong to some methods only;
            those not given, and lr, are the method's own, and config.yaml tells them.
        k: filters, singular directions or weights per layer that one step may use (condlr: rank of the weights; q3r:
            rank to go to): 3 is a count, 0.1 a share.
        radius: size of the balls, relative to the weights at initialisation (scion: as published).
        vertices: the kind of SFW's balls: support or sparse.
        rescale: what SFW multiplies lr by: gradient, fast-gradient, diameter or none.
        pattern: N:M for sfw-nm.
        k_start: anneal k from here to k over the first half of the training; without it (numuon: if it is k) k is
            constant.
        strength: factor of what the method adds to SGD: of its penalty, threshold, decay or perturbation.
        every: steps between two decompositions (trp, q3r).
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
        tensorboard: also log to RUN/tensorboard.
        out: run folder; by default runs/DATA-MODEL-METHOD-seedN.
        resume: go on from the last checkpoint of the run folder, with its settings.

    Raises:
        BadInput: a setting is unknown or out of range, or the run folder exists.
        DamagedFile: data files or the checkpoint cannot be read.
        Diverged: the loss or a gradient became NaN or infinite; the last good checkpoint is kept.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "resume")}
    settings, folder = _settings_and_folder(given, out, resume)
    if (folder / WEIGHTS).exists() and not (folder / CHECKPOINT).exists():
        return folder  # complete, and its checkpoint was deleted
    session = Session(settings)
    if not (folder / SHAPE).exists():
        _start_folder(folder, session)
    elif (folder / CHECKPOINT).exists():
        session.restore(folder / CHECKPOINT)
    with warnings.catch_warnings():
        # Nothing is lost when newly initialised weights are scaled into small balls.
        warnings.filterwarnings("ignore", message=".* started outside of their balls")
        session.run(folder)
    return folder


class Session:
    """One training: what is saved in a checkpoint, and the loop over it.

    Args:
        settings: the arguments of :func:`train` but ``out`` and ``resume``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
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
        )
        self.settings = {**settings, "precision": accelerator_precision}
        self.data = load_data(settings["data"], settings["data_dir"], image_size=settings["image_size"])
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
        self.optimizer: Optimizer = make_optimizer(self.model, settings)
        self.scheduler = LambdaLR(self.optimizer, learning_rate(settings, self.steps))
        self.k_schedule = make_k_schedule(self.optimizer, settings, max(1, self.steps // 2))
        self.epoch = 0

    def run(self, folder: Path) -> None:
        """Train from the current epoch to the last one; write the log, the checkpoints and at last the weights."""
        settings = self.settings
        network, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        validation = Loader(self.data, "val", 512)
        log = Log(folder, keep=self.epoch, tensorboard=settings["tensorboard"])
        with Display(f"{folder.name}", self.steps, done=self.epoch * len(self.loader)) as display, log:
            for epoch in range(self.epoch, settings["epochs"]):
                started = time.perf_counter()
                loss, accuracy = self._train_epoch(network, optimizer, epoch, folder, display)
                self._refuse_non_finite_weights(folder)
                self.epoch = epoch + 1
                entry = {
                    "epoch": self.epoch,
                    "lr": self.scheduler.get_last_lr()[0],
                    "loss": loss,
                    "train_top1": accuracy,
                    "val_top1": evaluate(self.model, validation, self.accelerator.device, settings["precision"]),
                    "gap": self.optimizer.gap().item() if isinstance(self.optimizer, SFW) else None,
                    "seconds": time.perf_counter() - started,
                }
                log.write(entry)  # before the checkpoint: resuming drops a line too many, but could not make up for one
                self.save(folder / CHECKPOINT)
                display.epoch(entry, settings["epochs"])
            if self.accelerator.is_main_process:
                save_weights(merged(self.model), folder / WEIGHTS)

    def _train_epoch(
        self, network: nn.Module, optimizer: Any, epoch: int, folder: Path, display: Display
    ) -> tuple[float, float]:
        """Go once over the training images; return the mean loss and the accuracy on the way."""
        network.train()
        self.loader.set_epoch(epoch)
        total_loss, total_correct, count = 0.0, 0, 0
        for images, labels in self.loader:
            optimizer.zero_grad()  # here, not after the step: the gap of an epoch may need the last gradient
            loss, correct = self._gradients(network, images, labels)
            if not math.isfinite(loss):
                raise self._diverged(f"the loss became {loss}", folder)
            try:
                if self.method.passes == 1:
                    optimizer.step()
                else:
                    optimizer.step(functools.partial(self._second_pass, network, optimizer, images, labels))
            except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                raise self._diverged(str(error), folder) from None
            self.scheduler.step()
            if self.k_schedule is not None:
                self.k_schedule.step()
            total_loss += loss * len(labels)
            total_correct += correct
            count += len(labels)
            display.step(total_loss / count, total_correct / count)
        return total_loss / count, total_correct / count

    def _gradients(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Add the gradients of a batch to those at hand; return its mean loss and the number of correct answers."""
        loss, correct = 0.0, 0
        parts = min(self.settings["accumulate"], max(1, len(labels) // 2))  # BatchNorm needs two images
        for part, target in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            part_loss, part_correct = self._backward(network, part, target, share=len(target) / len(labels))
            loss += part_loss
            correct += part_correct
        return loss, correct

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
        output = network(images.to(device).contiguous(memory_format=layout))
        labels = labels.to(device)
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
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "k_schedule": None if self.k_schedule is None else self.k_schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; raises DamagedFile if it cannot be read."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.k_schedule is not None:
                self.k_schedule.load_state_dict(state["k_schedule"])
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available() and state["cuda_rng"]:
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            if type(state["epoch"]) is not int or not 0 <= state["epoch"] <= self.settings["epochs"]:
                raise ValueError(f"epoch {state['epoch']!r}")
            self.epoch = state["epoch"]
        except Exception as error:  # a damaged file fails in as many ways as it can be damaged
            raise DamagedFile(
                f"{path} is damaged ({type(error).__name__}): restore it, or delete the run folder and train anew"
            ) from error

    def _refuse_non_finite_weights(self, folder: Path) -> None:
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(f"{name} became NaN or infinite", folder)

    def _diverged(self, what: str, folder: Path) -> Diverged:
        kept = f"the checkpoint of epoch {self.epoch} is kept in {folder}" if self.epoch else "no epoch was completed"
        lr = self.scheduler.get_last_lr()[0]
        return Diverged(
            f"{what} in epoch {self.epoch + 1} at lr {lr:.3g}; {kept}; train with a smaller --lr and another --out"
        )


class Log:
    """train.jsonl, one line per epoch, and TensorBoard if wanted.

    Args:
        folder: the run folder.
        keep: keep the lines of this many epochs, when a training is resumed.
        tensorboard: also write RUN/tensorboard.
    """

    def __init__(self, folder: Path, *, keep: int, tensorboard: bool) -> None:
        self.path = folder / "train.jsonl"
        self._writer: Any = None
        lines = (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if self.path.exists()
            else []
        )
        write_text(self.path, "".join(lines[:keep]))
        if tensorboard:
            self._writer = _summary_writer(folder / "tensorboard", keep)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one epoch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._writer is not None:
            for name, value in entry.items():
                if name != "epoch" and value is not None:
                    self._writer.add_scalar(name, value, entry["epoch"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def check_settings(settings: dict[str, Any]) -> None:
    """Raise BadInput for a setting that is unknown or out of range."""
    for name, known in (("rescale", RESCALES), ("vertices", VERTICES), ("schedule", SCHEDULES)):
        if settings[name] is not None and settings[name] not in known:
            raise unknown(name, settings[name], known)
    if settings["pattern"] is not None:
        parse_pattern(settings["pattern"])
    for name in ("k", "k_start"):
        if settings[name] is not None:
            check_k(settings[name])
    for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("every", 1), ("factors", 2)):
        if settings[name] is not None and settings[name] < least:
            raise BadInput(f"--{name} must be at least {least}, got {settings[name]}")
    if not 0 <= settings["seed"] < 2**63:
        raise BadInput(f"--seed must be an integer from 0 to 2^63 - 1, got {settings['seed']}")
    for name in ("lr", "other_lr", "radius", "width"):
        if settings[name] is not None and not (settings[name] > 0 and math.isfinite(settings[name])):
            raise BadInput(f"--{name} must be positive and finite, got {settings[name]}")
    for name in ("momentum", "warmup", "energy"):
        if settings[name] is not None and not 0 <= settings[name] < 1:
            raise BadInput(f"--{name} must lie in [0, 1), got {settings[name]}")
    for name, smallest in (("weight_decay", 0), ("strength", 0), ("condition", 1)):
        if settings[name] is not None and not (settings[name] >= smallest and math.isfinite(settings[name])):
            raise BadInput(f"--{name} must be >= {smallest} and finite, got {settings[name]}")


def _check_kinds(settings: dict[str, Any]) -> None:
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


def _settings_and_folder(given: dict[str, Any], out: str | None, resume: bool) -> tuple[dict[str, Any], Path]:
    """Return the settings to train with and the run folder; a resumed run brings its own settings."""
    _check_kinds(given)
    if given["data_dir"] is not None:
        given["data_dir"] = str(Path(given["data_dir"]).expanduser().resolve())
    data, model = (given[name].replace("/", "-").replace(":", "-") for name in ("data", "model"))
    folder = Path(out or f"runs/{data}-{model}-{given['method']}-seed{given['seed']}")
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if occupied and not resume:
        raise BadInput(f"{folder} exists: go on with --resume, or choose another --out")
    if not occupied:
        return given, folder
    if (folder / PLAN).exists():
        raise BadInput(f"{folder} holds a compressed network, not a run: choose another --out")
    saved = Run.open(folder).config
    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    for name, value in given.items():
        if name not in saved:
            raise DamagedFile(f"{folder / CONFIG} is damaged: it lacks {name}")
        if value not in (defaults[name], saved[name]):
            raise BadInput(
                f"--{name} {value} contradicts {saved[name]!r} of {folder}: leave it out, or start another run"
            )
    settings = {name: saved[name] for name in given}
    _check_kinds(settings)
    return settings, folder


def _start_folder(folder: Path, session: Session) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / CONFIG, session.settings)  # first: with it alone, the run can be resumed
    write_shape(folder, session.data.num_classes, session.data.image_shape)
    write_text(folder / "env.json", json.dumps(versions(), indent=2) + "\n")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _summary_writer(path: Path, purge_after: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs a package: pip install 'pliant[tensorboard]'") from None
    return SummaryWriter(str(path), purge_step=purge_after + 1)
