"""The cost of a training: the time of a step compared with one of SGD, and the memory in use."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch.utils import benchmark

from pliant.experiments.baselines import NuMuon
from pliant.experiments.comparison.job import Job
from pliant.experiments.data.images import ImageData
from pliant.experiments.training.session import Session
from pliant.optim import SFW
from pliant.records import Cost

PHASES = 4
"""In how many parts of a training steps are timed, because k may change on the way."""


def step_cost(job: Job, data: ImageData, seconds: float) -> Cost:
    """Time steps of a method and of SGD in turns, and count the memory that they use.

    Args:
        job: the training of the method.
        data: its data set.
        seconds: how long the training took.
    """
    sessions = [Session(job.settings, data), Session(job.settings.by("sgd"), data)]
    steppers = [_stepper(session) for session in sessions]
    times: list[list[float]] = [[], []]
    for phase in range(PHASES):
        if phase:
            _skip(sessions[0], sessions[0].steps // PHASES)
        for round_ in range(job.rounds + 1):
            for step, durations in zip(steppers, times, strict=True):
                start = benchmark.timer()  # waits for a GPU
                step()
                if round_:  # the first step allocates, and k may have changed
                    durations.append(benchmark.timer() - start)
    (step_s, step_s_sgd), (memory, memory_sgd) = map(median, times), map(_memory, sessions)
    return {
        "equal": job.equal,
        "seconds": seconds,
        "step_s": step_s,
        "step_s_sgd": step_s_sgd,
        "memory": memory,
        "memory_sgd": memory_sgd,
    }


def _skip(session: Session, steps: int) -> None:
    """Advance the annealing of k by this many steps."""
    if isinstance(session.optimizer, NuMuon):
        session.optimizer.skip(steps)
    elif session.k_schedule is not None:
        for _ in range(steps):
            session.k_schedule.step()


def _stepper(session: Session) -> Callable[[], object]:
    """Return a function that takes a training step on the next images."""
    network, optimizer = session.accelerator.prepare(session.model, session.optimizer)
    network.train()
    images, labels = next(iter(session.loader))
    return lambda: session.step(network, optimizer, images, labels)


def _memory(session: Session) -> int:
    """Return the bytes of the weights, their gradients and the optimizer's state."""
    state = [value for entry in session.optimizer.state.values() for value in entry.values()]
    if isinstance(session.optimizer, SFW):
        state += session.optimizer.scratch
    tensors = [*session.model.parameters(), *session.model.buffers(), *state]
    gradients = [p.grad for p in session.model.parameters() if p.grad is not None]
    return sum(t.nbytes for t in [*tensors, *gradients] if isinstance(t, torch.Tensor))
