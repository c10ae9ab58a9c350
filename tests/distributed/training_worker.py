"""One of several processes that train; with "killed" the last one is killed after the first checkpoint.

By torchrun -m tests.distributed.training_worker FOLDER [killed].
"""

import atexit
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pliant.experiments.train import train
from pliant.experiments.training.session import Session

OPTIONS: dict[str, Any] = {
    "model": "mlp",  # without BatchNorm: each process would normalise its part of a batch by itself
    "width": 0.25,
    "method": "sfw-filters",
    "k": 0.1,
    "k_start": 0.5,
    "strength": 0.1,
    "epochs": 3,
    "batch_size": 120,  # the last batch of 1294 images has 94
    "accumulate": 3,
    "lr": 0.05,
    "precision": "fp32",
}


def tell_threads() -> None:
    """Print the threads that are left when Python shuts down."""
    tasks = Path("/proc/self/task")
    print("left:", *(path.read_text().strip() for path in tasks.glob("*/comm")))


def main(folder: str, killed: bool) -> None:
    save = Session.save

    def save_and_die(self: Session, path: Path) -> None:
        save(self, path)
        processes = self.accelerator
        processes.wait_for_everyone()
        if processes.process_index == processes.num_processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if killed:
        Session.save = save_and_die  # type: ignore[method-assign]
    train(**OPTIONS, out=folder, resume=Path(folder).exists())


if __name__ == "__main__":
    atexit.register(tell_threads)  # first, so that it runs last
    main(sys.argv[1], sys.argv[2:] == ["killed"])
