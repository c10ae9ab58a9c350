"""The progress that a person sees while a network trains: a progress bar on a terminal, some lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Progress of one training, as a context manager.

    Args:
        title: name of the run.
        steps: steps of the whole training.
        done: steps done before.
        quiet: show nothing; of several processes only one shows their progress.
    """

    def __init__(self, title: str, steps: int, *, done: int = 0, quiet: bool = False) -> None:
        self.title = title
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, figures="")
        self._validation = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, loss: float, accuracy: float) -> None:
        """Show the means of the epoch so far."""
        self._progress.update(self._task, advance=1, figures=f"loss {loss:.3f}  train {accuracy:.1%}{self._validation}")

    def note(self, text: str) -> None:
        """Show a line about the training as a whole."""
        self._print(f"{self.title}  {text}")

    def epoch(self, entry: dict[str, Any], epochs: int) -> None:
        """Show an epoch's entry of the log."""
        gap = "" if entry["gap"] is None else f"  gap {entry['gap']:.3g}"
        self._validation = f"  val {entry['val_top1']:.1%}{gap}"
        # Without a bar: the first and the last epoch, and about ten between.
        tenth = entry["epoch"] * 10 // epochs > (entry["epoch"] - 1) * 10 // epochs
        if entry["epoch"] == epochs or (not self._console.is_terminal and (tenth or entry["epoch"] == 1)):
            self._print(
                f"{self.title}  epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.3f}  "
                f"train {entry['train_top1']:.1%}{self._validation}  {entry['seconds']:.1f} s"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)
