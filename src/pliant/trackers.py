"""Trackers: the lines of train.jsonl, sent to TensorBoard, Weights & Biases, MLflow or Trackio through Accelerate.

None of them is asked for more than it does on one machine without a network: Weights & Biases writes below the run
folder unless WANDB_MODE says otherwise; MLflow and Trackio write where their own settings say.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from pliant.errors import BadInput, unknown

PACKAGES = {  # what to install
    "tensorboard": "'pliant[tensorboard]'",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


def tracker_names(setting: str | None) -> list[str]:
    """Return the trackers of a setting such as "tensorboard,wandb".

    Raises BadInput for one that is unknown or whose package is not installed.
    """
    names = [] if setting is None else [name.strip() for name in setting.split(",")]
    for name in names:
        if name not in PACKAGES:
            raise unknown("tracker", name, PACKAGES)
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"--tracker {name} needs a package: pip install {PACKAGES[name]}")
    return list(dict.fromkeys(names))


def start_trackers(names: list[str], folder: Path, settings: dict[str, Any], *, done: int) -> list[Any]:
    """Return Accelerate's trackers, started, with the settings of the run.

    Args:
        names: from :func:`tracker_names`.
        folder: the run folder; its name is that of the run, in the project "pliant".
        settings: those of the run.
        done: epochs that a resumed run has behind it.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    arguments: dict[str, dict[str, Any]] = {
        # Lines that were written after the checkpoint are written again.
        "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": done + 1},
        "wandb": {
            "run_name": "pliant",
            "name": folder.name,
            "dir": str(folder),
            "mode": os.environ.get("WANDB_MODE", "offline"),  # "online" would ask for a login
        },
        "mlflow": {"experiment_name": "pliant", "run_name": folder.name},
        "trackio": {"run_name": "pliant", "name": folder.name},
    }
    trackers = []
    for name in names:
        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
        tracker.start()
        tracker.store_init_configuration({key: value for key, value in settings.items() if value is not None})
        trackers.append(tracker)
    return trackers
