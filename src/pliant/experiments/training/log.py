"""The log of a run: a line per epoch in train.jsonl and in the chosen trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pliant.experiments.run_folder import LOG
from pliant.experiments.training.settings import Settings
from pliant.experiments.training.trackers import finish_trackers, start_trackers, tracker_names
from pliant.files import sync, write_text


class Log:
    """The log of a run: train.jsonl, one line per epoch, and the chosen trackers.

    Args:
        folder: the run folder.
        keep: how many lines to keep, one per epoch, when a training is resumed.
        settings: the settings of the run; ``tracker`` names the trackers.
    """

    def __init__(self, folder: Path, *, keep: int, settings: Settings) -> None:
        self.path = folder / LOG
        lines = (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if self.path.exists()
            else []
        )
        write_text(self.path, "".join(line for line in lines[:keep] if line.endswith("\n")))
        self._trackers = start_trackers(tracker_names(settings.tracker), folder, settings.to_config(), done=keep)

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
