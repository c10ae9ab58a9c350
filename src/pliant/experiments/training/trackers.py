"""Trackers: the lines of train.jsonl, sent to TensorBoard, Weights & Biases, MLflow or Trackio through Accelerate.

All of them work on one machine without a network: Weights & Biases writes below the run folder unless WANDB_MODE says
otherwise; MLflow and Trackio write where their own settings say. None writes to stdout, from which programs read the
run folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from pliant.errors import BadInput, unknown

PACKAGES = {  # what to install
    "tensorboard": "'pliant[tensorboard]'",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
FOLDER_TAG = "folder"  # of a run in MLflow: a resumed run finds its own by this tag


def tracker_names(setting: str | None) -> list[str]:
    """Return the trackers of a setting such as "tensorboard,wandb".

    Raises:
        BadInput: a tracker is unknown, or its package is not installed.
    """
    names = [] if setting is None else [name.strip() for name in setting.split(",")]
    for name in names:
        if name not in PACKAGES:
            raise unknown("tracker", name, PACKAGES)
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"--tracker {name} needs a package: pip install {PACKAGES[name]}")
    return list(dict.fromkeys(names))


def start_trackers(names: list[str], folder: Path, settings: dict[str, Any], *, done: int) -> list[Any]:
    """Start Accelerate's trackers with the settings of the run, and return them.

    Args:
        names: the result of :func:`tracker_names`.
        folder: the run folder, which gives its name to the run, in the project "pliant".
        settings: the settings of the run.
        done: how many epochs of a resumed run are done.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    configuration = {key: value for key, value in settings.items() if value is not None}
    wandb_mode = os.environ.get("WANDB_MODE", "offline")  # "online" would ask for a login
    if wandb_mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would look for a network
        os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    arguments: dict[str, dict[str, Any]] = {
        # Lines that were written after the checkpoint are written again.
        "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": done + 1},
        "wandb": {"run_name": "pliant", "name": folder.name, "dir": str(folder), "mode": wandb_mode},
        "mlflow": {"experiment_name": "pliant", "run_name": folder.name},
        "trackio": {
            "run_name": "pliant",
            "name": folder.name,
            "resume": "allow" if done else "never",
            "config": configuration,
        },
    }
    if done and "mlflow" in names:
        arguments["mlflow"]["run_id"] = _mlflow_run(folder)
    trackers = []
    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
            tracker.start()
            if name != "trackio":  # it has them already; Accelerate would add a setting "allow_val_change"
                tracker.store_init_configuration(configuration)
            if name == "mlflow":
                import mlflow

                mlflow.set_tag(FOLDER_TAG, folder.resolve().as_uri())
            trackers.append(tracker)
    return trackers


def finish_trackers(trackers: list[Any]) -> None:
    """Let trackers write their remaining data."""
    with contextlib.redirect_stdout(sys.stderr):
        for tracker in trackers:
            if tracker.name == "trackio":
                import trackio

                trackio.finish()  # Accelerate's finish() leaves a run that is finished again at exit
            else:
                tracker.finish()


def _mlflow_run(folder: Path) -> str | None:
    """Return the last run that was logged from this folder; None if the store has no such run."""
    import mlflow

    tag = f"tags.{FOLDER_TAG} = '{folder.resolve().as_uri()}'"  # a URI has no quotation marks
    runs = mlflow.search_runs(search_all_experiments=True, filter_string=tag, max_results=1, output_format="list")
    return runs[0].info.run_id if runs else None
