"""Who performs the jobs of a comparison: this process, one after the other, or the machines of a Ray cluster."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pliant.errors import BadInput
from pliant.experiments.comparison.job import Job, Line
from pliant.experiments.comparison.performing import perform
from pliant.reporting.grouping import grouped

Performer = Callable[[list[Job], Path], Iterator[tuple[Job, Iterable[Line]]]]
"""Performs jobs in the folder of a comparison and gives the lines of each, in any order."""


def here(jobs: list[Job], folder: Path) -> Iterator[tuple[Job, Iterable[Line]]]:
    """Perform jobs in this process, one after the other."""
    for job in jobs:
        yield job, perform(job, folder)


def on_ray(address: str) -> Performer:
    """Return what performs jobs on a Ray cluster, whose machines train in folders of their own."""
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs a package: pip install 'pliant[ray]'") from None
    if ":" in address:
        _check_reachable(address)
    try:
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        raise BadInput(f"--ray {address}: {' '.join(str(error).split())}") from None

    def performed(job: Job, folder: Path) -> list[Line]:
        return list(perform(job, folder))

    gpus = 1 if ray.cluster_resources().get("GPU") else 0  # one for each training, where there are any
    remote = ray.remote(max_retries=3, num_gpus=gpus)(performed)

    def on_cluster(jobs: list[Job], folder: Path) -> Iterator[tuple[Job, Iterable[Line]]]:
        # Jobs of the same training take turns: only one of them can train it.
        queues = grouped(jobs, lambda job: job.training)
        waiting: dict[Any, Job] = {}

        def start(queue: list[Job]) -> None:
            job = queue.pop(0)
            waiting[remote.remote(job, folder.resolve())] = job

        for queue in queues.values():
            start(queue)
        errors = []
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            if queues[job.training]:
                start(queues[job.training])
            try:
                lines = ray.get(done)
            except Exception as error:  # what the others measure is kept first
                errors.append(error)
            else:
                yield job, lines
        if errors:
            raise errors[0]

    return on_cluster


def _check_reachable(address: str) -> None:
    """Raise BadInput if nothing answers at HOST:PORT: Ray itself goes on trying for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BadInput(f"--ray {address} cannot be reached ({error}): start Ray there, or give its HOST:PORT") from None
