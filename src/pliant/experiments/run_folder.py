"""Run folders: the result of a training, and how later steps read it.

runs/NAME/config.yaml        the settings; `pliant train --config` takes it
          shape.json         the network's classes and image shape, so that loading it needs no data
          env.json           versions and machine
          train.jsonl        one line per epoch
          checkpoint/        the state to continue from with --resume
          model.safetensors  the trained weights, once training is complete
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pliant.errors import BadInput, DamagedFile, shown
from pliant.experiments.data.images import ImageData, load_data
from pliant.experiments.models import build_model
from pliant.files import sha256, write_text
from pliant.jsonl import read_lines
from pliant.storage import PLAN, WEIGHTS, limit_of, load_weights, rebuild, rebuild_sized

CONFIG, SHAPE, LOG, RECORD = "config.yaml", "shape.json", "train.jsonl", "record.json"
_REQUIRED = ("data", "model", "method", "seed")
_KINDS: dict[str, Any] = {
    "data": str,
    "data_dir": str | None,
    "image_size": int | None,
    "model": str,
    "width": int | float,
    "method": str,
    "seed": int,
    "precision": str,
}


@dataclass(frozen=True)
class Run:
    """A folder with a trained network.

    Args:
        path: the folder.
        config: the settings of the training, as in config.yaml.
        loaded: the data set that the settings name, if it is in memory already.
    """

    path: Path
    config: dict[str, Any]
    loaded: ImageData | None = None

    @classmethod
    def open(cls, path: str | Path, loaded: ImageData | None = None) -> Run:
        """Read the settings of a run folder; raise DamagedFile if it is not a run folder."""
        path = Path(path)
        file = path / CONFIG
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedFile(f"{path} is not a run folder: it has no {CONFIG}; make one with pliant train") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
            raise DamagedFile(f"{file} is damaged: {' '.join(str(error).split())}") from None
        missing = [key for key in _REQUIRED if not isinstance(config, dict) or key not in config]
        if missing:
            raise DamagedFile(f"{file} is damaged: it lacks {', '.join(missing)}")
        for key, kinds in _KINDS.items():
            if key in config and not isinstance(config[key], kinds):
                raise DamagedFile(f"{file} is damaged: {key} is {shown(config[key])}")
        return cls(path, config, loaded)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @cached_property
    def data(self) -> ImageData:
        """The data set the network was trained on."""
        if self.loaded is not None:
            return self.loaded
        return load_data(self.config["data"], self.config.get("data_dir"), image_size=self.config.get("image_size"))

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the trained weights, hexadecimal."""
        return sha256(self._weights())

    @property
    def seconds(self) -> float:
        """The time of all epochs, validation included; reading it raises DamagedFile if the log is damaged."""
        return sum(read_lines(self.path / LOG, _seconds, "epochs"))

    def build(self) -> nn.Module:
        """Return the network, newly initialised; the global random state does not change."""
        num_classes, image_shape = read_shape(self.path)
        with torch.random.fork_rng(devices=[]):
            try:
                return build_model(
                    self.config["model"],
                    num_classes=num_classes,
                    image_shape=image_shape,
                    width=self.config.get("width", 1.0),
                )
            except BadInput as error:
                raise BadInput(f"{self.path}: {error}") from error

    def load(self) -> nn.Module:
        """Return the trained network in eval mode, on the CPU; raise DamagedFile for weights that do not fit."""
        model = self.build()
        load_weights(model, self._weights())
        return model.eval()

    def _weights(self) -> Path:
        path = self.path / WEIGHTS
        if not path.is_file():
            raise DamagedFile(f"{path} is missing: training is not complete; finish it with pliant train --resume")
        return path


def _seconds(entry: dict[str, Any]) -> float:
    seconds = entry.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        raise BadInput(f"an epoch needs its seconds, got {shown(seconds)}")
    return float(seconds)


def load(
    path: str | Path,
    *,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
) -> nn.Module:
    """Return the network of a run folder, or of a folder that ``pliant compress`` wrote, in eval mode on the CPU.

    Nothing is unpickled: the network is rebuilt, compressed according to its plan, and gets the stored weights. A
    folder by ``pliant compress --elastic`` holds every size, see :func:`pliant.rebuild`; without a limit the network is
    the dense one.

    Args:
        path: the folder.
        keep_params, keep_macs, max_bytes, max_latency_ms: at most one limit, for a folder that holds every size; the
            result is the largest network that meets it.

    Raises:
        DamagedFile: the folder is none of these, or is damaged.
        BadInput: the plan's compressor belongs to a package that is not installed, there is more than one limit, or
            there is one and the folder holds a single size.
        Refused: the limit is out of reach.
    """
    path = Path(path)
    run = Run.open(path)
    budget = limit_of(keep_params=keep_params, keep_macs=keep_macs, max_bytes=max_bytes, max_latency_ms=max_latency_ms)
    if budget is not None:
        return rebuild_sized(run.build(), path, budget)[0]
    return rebuild(run.build(), path) if (path / PLAN).exists() else run.load()


def read_shape(folder: Path) -> tuple[int, tuple[int, int, int]]:
    """Return the number of classes and (channels, height, width) of an image, as :func:`write_shape` wrote them."""
    try:
        shape = json.loads((folder / SHAPE).read_text(encoding="utf-8"))
        num_classes, (channels, height, width) = int(shape["num_classes"]), map(int, shape["image_shape"])
    except FileNotFoundError:
        raise DamagedFile(f"{folder / SHAPE} is missing: restore it, or train anew") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{folder / SHAPE} is damaged: {error}") from None
    return num_classes, (channels, height, width)


def write_shape(folder: Path, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Write the number of classes and the image shape, which building a network needs besides its settings."""
    write_text(folder / SHAPE, json.dumps({"num_classes": num_classes, "image_shape": image_shape}) + "\n")


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write settings as YAML, atomically."""
    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
