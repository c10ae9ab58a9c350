"""Checkpoints: the state from which a training continues as if it had never stopped."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pliant.errors import DamagedFile
from pliant.experiments.baselines import NuMuon
from pliant.files import make_folders, write_bytes

CHECKPOINT = Path("checkpoint") / "last.pt"
"""The path of the checkpoint in a run folder."""


class Stateful(Protocol):
    """A part of a training with a state: the model, the optimizer, a schedule."""

    def state_dict(self) -> Any:
        """Return the state as tensors and plain data."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Continue from a saved state."""


@dataclass(frozen=True)
class Progress:
    """The progress of a training.

    Args:
        epoch: how many epochs are done.
        batches: how many batches of the current epoch are done.
        sums: sums over these batches: loss, correct answers, images.
    """

    epoch: int = 0
    batches: int = 0
    sums: tuple[float, int, int] = (0.0, 0, 0)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], epochs: int, batches: int) -> Progress:
        """Return the progress in a checkpoint; raise ValueError unless it fits ``epochs`` of ``batches`` each."""
        progress = cls(state["epoch"], state.get("batches", 0))  # old checkpoints were written after whole epochs
        if type(progress.epoch) is not int or not 0 <= progress.epoch <= epochs:
            raise ValueError(f"epoch {progress.epoch!r}")
        if type(progress.batches) is not int or not 0 <= progress.batches < batches:
            raise ValueError(f"batches {progress.batches!r}")
        loss, correct, count = state.get("sums", cls.sums)
        return cls(progress.epoch, progress.batches, (float(loss), int(correct), int(count)))


def save_checkpoint(path: Path, parts: Mapping[str, Stateful | None], progress: Progress) -> None:
    """Write the states of the parts and of the random number generators, and the progress, atomically."""
    state = {
        "epoch": progress.epoch,
        "batches": progress.batches,
        "sums": progress.sums,
        **{name: None if part is None else part.state_dict() for name, part in parts.items()},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    make_folders(path.parent)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: Path, parts: Mapping[str, Stateful | None], *, epochs: int, batches: int) -> Progress:
    """Restore the parts and random number generators that :func:`save_checkpoint` saved, and return the progress.

    Args:
        path: the file.
        parts: those that were saved; one that is None has no state.
        epochs: of the training.
        batches: per epoch.

    Raises:
        DamagedFile: the file cannot be read, or belongs to another training.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"checksum of {name}")
        state = _of_today(torch.load(path, map_location="cpu", weights_only=True), parts)
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return Progress.from_state(state, epochs, batches)
    except Exception as error:  # a damaged file fails in as many ways as it can be damaged
        raise DamagedFile(
            f"{path} is damaged ({type(error).__name__}): restore it, or delete the run folder and train anew"
        ) from error


def _of_today(state: dict[str, Any], parts: Mapping[str, Stateful | None]) -> dict[str, Any]:
    """Return a checkpoint in today's format.

    Those of numuon once held the current k in the groups, and its number of steps in a schedule beside them.
    """
    optimizer = parts["optimizer"]
    if not isinstance(optimizer, NuMuon) or state["k_schedule"] is None:
        return state
    saved, steps = state["optimizer"], state["k_schedule"]["last_step"]
    for group, present in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        if group["row_dim"] is not None:
            group |= {name: present[name] for name in ("k", "k_start", "k_steps")}
            for index in group["params"]:
                saved["state"][index]["step"] = steps
    return {**state, "k_schedule": None}
