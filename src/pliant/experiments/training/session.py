"""A training in progress: the network, its optimizer and its progress.

The order of the images depends only on (seed, epoch), so a resumed training sees the same batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # early: its defaults keep the process group of this moment
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pliant.calling import eval_mode
from pliant.constraints import coverage
from pliant.errors import BadInput, Diverged, one_line
from pliant.experiments.baselines import merged
from pliant.experiments.data.images import ImageData, load_data
from pliant.experiments.data.loader import Loader
from pliant.experiments.methods import find_method, make_optimizer, resolved
from pliant.experiments.models import build_model
from pliant.experiments.training.checkpoint import CHECKPOINT, Progress, Stateful, load_checkpoint, save_checkpoint
from pliant.experiments.training.display import Display
from pliant.experiments.training.log import Log
from pliant.experiments.training.onednn import sound_convolutions
from pliant.experiments.training.optimizers import make_k_schedule, make_threshold
from pliant.experiments.training.schedules import learning_rate, turnover_lr
from pliant.experiments.training.settings import Resolved, Settings
from pliant.measuring import evaluate, resolve_precision
from pliant.optim import SFW
from pliant.storage import WEIGHTS, save_weights

# How long a process waits for another one before it assumes that the other one hangs: all do the same work, and only
# the main one writes files. (One that ends breaks its connections, and torchrun ends the others.)
PATIENCE = timedelta(minutes=1)


class Session:
    """One training: the parts that a checkpoint saves, and the loop over epochs.

    Args:
        settings: of the training; the method decides what is None.
        data: the data set that they name, if it is in memory already.
    """

    def __init__(self, settings: Settings, data: ImageData | None = None) -> None:
        settings = resolved(settings)
        self.method = find_method(settings.method)
        precision = _precision(settings, self.method.passes)
        # Accelerate keeps its state in the process and refuses another precision for a second training.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=_device().type == "cpu",
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.data = data or load_data(settings.data, settings.data_dir, image_size=settings.image_size)
        torch.manual_seed(settings.seed)
        self.model = build_model(
            settings.model,
            num_classes=self.data.num_classes,
            image_shape=self.data.image_shape,
            width=settings.width,
        )
        _try_out(self.model, self.data, settings.model)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(self.accelerator.device)
        self.loader = Loader(
            self.data, "train", settings.batch_size, shuffle=True, augment=settings.augment, seed=settings.seed
        )
        self.steps = len(self.loader) * settings.epochs
        factor = learning_rate(settings.schedule, settings.warmup, self.steps)
        if settings.lr is None:
            lr = turnover_lr(settings.turnover, factor, self.steps)
            settings = dataclasses.replace(settings, lr=lr, turnover=None)
        self.settings: Resolved = dataclasses.replace(settings, precision=precision)
        images, _ = next(iter(Loader(self.data, "val", 2)))
        self.optimizer: Optimizer = make_optimizer(self.model, self.settings, images.to(self.accelerator.device))
        self.scheduler = LambdaLR(self.optimizer, factor)
        # The optimizer advances both in its steps.
        self.k_schedule = make_k_schedule(self.optimizer, self.settings, self.steps)
        self.threshold = make_threshold(self.optimizer, self.settings)
        self.epoch = 0
        self.batches = 0  # batches of the current epoch that are done
        self.sums = (0.0, 0, 0)  # sums over these batches: loss, correct answers, images

    def run(self, folder: Path) -> None:
        """Train from the current epoch to the last one; write the log, the checkpoints and finally the weights.

        Raises:
            Diverged: the loss, a gradient or a weight became NaN or infinite.
        """
        settings = self.settings
        network, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        validation = Loader(self.data, "val", 512)
        main = self.accelerator.is_main_process
        log = Log(folder, keep=self.epoch, settings=settings) if main else None
        done = self.epoch * len(self.loader) + self.batches
        with Display(folder.name, self.steps, done=done, quiet=not main) as display, log or contextlib.nullcontext():
            if isinstance(self.optimizer, SFW) and not done:
                display.note(coverage(self.model, self.optimizer.param_groups).summary)
            for epoch in range(self.epoch, settings.epochs):
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
                    # Before the checkpoint: a resumed training drops a line too many, but cannot write a missing one.
                    log.write(entry)
                self.save(folder / CHECKPOINT)
                display.epoch(entry, settings.epochs)
            if self.accelerator.is_main_process:
                save_weights(merged(self.model), folder / WEIGHTS)

    def _train_epoch(
        self, network: nn.Module, optimizer: Any, epoch: int, folder: Path, display: Display
    ) -> tuple[float, float]:
        """Train on the remaining images of an epoch; return the mean loss and the accuracy over the whole epoch."""
        every = self.settings.checkpoint_steps
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
        """Take one step.

        Args:
            network: the model, as Accelerate prepared it.
            optimizer: the optimizer, as Accelerate prepared it.
            images: a batch, (B, C, H, W).
            labels: (B,).

        Returns:
            The mean loss of the batch and the number of correct answers, both before the step.

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
        self.scheduler.step()
        return loss, correct

    def _gradients(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Add the gradients of a batch to the current ones; return its mean loss and the number of correct answers.

        Each process computes its part of the batch. Gradients are means over processes, so the share of a part is
        multiplied by the number of processes.
        """
        count, processes = len(labels), self.accelerator.num_processes
        images, labels, weight = self._own_part(images, labels)
        loss, correct = 0.0, 0.0
        parts = min(self.settings.accumulate, max(1, len(labels) // 2))  # BatchNorm needs two images
        for i, (part, target) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
            last = i == parts - 1  # with the last part, the processes average their gradients
            with contextlib.nullcontext() if last else self.accelerator.no_sync(network):
                share = weight * processes * len(target) / count
                part_loss, part_correct = self._backward(network, part, target, share)
            loss += part_loss / processes
            correct += weight * part_correct
        loss, correct = self._over_processes(loss, correct)
        return loss, round(correct)

    def _own_part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return this process's part of a batch, and its weight, 1 or 0.

        A batch with fewer than two images for each process has fewer parts. The other processes compute the first part
        too, so that all take part in the sums, but it does not count.
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
        """Return the accuracy of the model; each process classifies its share of the images."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        device, precision = self.accelerator.device, self.settings.precision
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
        """Compute the gradients anew at other weights; BatchNorm keeps the statistics of the first pass."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        optimizer.zero_grad()
        loss, _ = self._gradients(network, images, labels)
        for buffer, old in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(old)
        return loss

    def _backward(self, network: nn.Module, images: Tensor, labels: Tensor, share: float) -> tuple[float, int]:
        device = self.accelerator.device
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        labels = labels.to(device)
        with sound_convolutions(self.model):
            output = network(images.to(device).contiguous(memory_format=layout))
            loss = functional.cross_entropy(output.float(), labels) * share
            self.accelerator.backward(loss)
        return loss.item(), int((output.argmax(1) == labels).sum())

    # --- checkpoints ---

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        if self.accelerator.is_main_process:
            save_checkpoint(path, self._parts(), Progress(self.epoch, self.batches, self.sums))

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; raise DamagedFile if it cannot be read."""
        progress = load_checkpoint(path, self._parts(), epochs=self.settings.epochs, batches=len(self.loader))
        self.epoch, self.batches, self.sums = progress.epoch, progress.batches, progress.sums

    def _parts(self) -> dict[str, Stateful | None]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "k_schedule": self.k_schedule,
            "threshold": self.threshold,
        }

    def _refuse_non_finite_weights(self, folder: Path) -> None:
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():  # BatchNorm's statistics differ by process: take the first's
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


def _try_out(model: nn.Module, data: ImageData, name: str) -> None:
    """Raise BadInput unless the network gives one score per class for two images."""
    images, _ = next(iter(Loader(data, "val", 2)))
    try:
        with torch.no_grad(), eval_mode(model):
            scores = model(images)
    except Exception as error:  # the user's code may raise anything
        where = f"model {name!r} cannot be run on images of shape {tuple(images.shape)}"
        raise BadInput(f"{where}: {one_line(error)}") from error
    expected = (len(images), data.num_classes)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        result = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BadInput(f"model {name!r} must give scores of shape {expected} (images, classes), got {result}")


def _precision(settings: Settings, passes: int) -> str:
    """Return the precision to train in; raise BadInput if this machine or the method does not support it."""
    precision = resolve_precision(settings.precision, _device())
    if precision == "fp16" and _device().type == "cpu":
        raise BadInput("--precision fp16 needs a GPU, this is a CPU: take bf16 or fp32")
    if precision == "fp16" and passes > 1:
        raise BadInput(f"--method {settings.method} cannot scale its loss for fp16: take bf16 or fp32")
    return precision


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
