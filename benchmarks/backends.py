"""Time a forward pass in torch, compiled, and in ONNX Runtime: several networks in turns, on the CPU.

Use it for your own networks, in this folder or with a copy of this file. It needs only pliant::

    from backends import backend_latencies

    for row in backend_latencies({"dense": model, "small": small}, example):
        print(row.model, row.backend, row.threads, row.skipped or row.quartiles())
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pliant.calling import Example, as_inputs, tensors_of
from pliant.errors import BadInput, check_choice
from pliant.exporting.graph import Portable, onnx_session, reason
from pliant.measuring import bound_call, take_turns

BACKENDS = ("eager", "compile", "onnx")


@dataclass(frozen=True)
class Latency:
    """How long a forward pass of one model takes in one backend.

    All rows of one call of :func:`backend_latencies` with the same number of threads were measured in turns, so entry i
    of one may be compared with entry i of another.

    Args:
        model: its name.
        backend: one of :data:`BACKENDS`.
        threads: of one operation.
        batch: number of samples.
        seconds: a median for each round.
        skipped: the reason where nothing was measured, else empty.
    """

    model: str
    backend: str
    threads: int
    batch: int
    seconds: tuple[float, ...] = ()
    skipped: str = ""

    def quartiles(self) -> tuple[float, float, float]:
        """Return lower quartile, median and upper quartile of the seconds."""
        return _quartiles(self.seconds)

    def speedup(self, over: Latency) -> tuple[float, float, float]:
        """Return the quartiles of (seconds of the other / own seconds), round by round."""
        return _quartiles([theirs / own for theirs, own in zip(over.seconds, self.seconds, strict=True)])


def backend_latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Example,
    *,
    backends: Sequence[str] = BACKENDS,
    threads: Sequence[int] = (1, 2),
    seconds: float = 0.05,
    rounds: int = 10,
) -> list[Latency]:
    """Return how long a forward pass takes: each model in each backend with each number of threads, on the CPU.

    Models and backends take turns, round after round, so that the ratios hold while a shared machine gets slower or
    faster. A backend that this machine does not have, or that cannot take a model, gives rows with the reason; so does
    an ONNX graph whose outputs are not those of the model. With "compile", what torch.compile has made in this process
    is forgotten, and made again when it is next used.

    Args:
        models: networks by name; they are copied.
        example_inputs: one batch: a tensor, a tuple of tensors or a dict of keyword arguments.
        backends: "eager" (plain torch), "compile" (torch.compile) and "onnx" (ONNX Runtime).
        threads: numbers of threads that one operation uses.
        seconds: least time per measurement.
        rounds: measurements per model, at least 2.
    """
    for backend in backends:
        check_choice("backend", backend, BACKENDS)
    if rounds < 2:
        raise BadInput(f"rounds must be at least 2 to show a spread, got {rounds}")
    batch = len(tensors_of(as_inputs(example_inputs))[0])
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        portables = {name: Portable(model, example_inputs) for name, model in models.items()}
        files = {name: Path(folder, f"{index}.onnx") for index, name in enumerate(models)}
        for count in threads:
            if "compile" in backends:
                torch.compiler.reset()  # Dynamo keeps few versions of one forward, then silently runs eagerly
            calls: dict[tuple[str, str], Callable[[], object]] = {}
            skipped: dict[tuple[str, str], str] = {}
            with _threads(count):
                for name, backend in itertools.product(models, backends):
                    try:
                        calls[name, backend] = _ready(portables[name], backend, files[name], count)
                    except Exception as error:  # compilers and runtimes raise any kind of error
                        skipped[name, backend] = reason(error)
                times = take_turns(list(calls.values()), seconds=seconds, rounds=rounds, threads=count)
            measured = dict(zip(calls, times, strict=True))
            rows += [
                Latency(*key, count, batch, tuple(measured.get(key, ())), skipped.get(key, ""))
                for key in itertools.product(models, backends)
            ]
    return rows


def _ready(portable: Portable, backend: str, file: Path, threads: int) -> Callable[[], object]:
    """Return a call of the model on its example in a backend, compiled and warm."""
    arguments = portable.arguments(portable.given_batch)
    model: Any = portable.model
    if backend == "onnx":
        if not file.exists():
            portable.save_onnx(file)  # which compares it with torch: how fast a wrong graph is does not matter
        session, feed = onnx_session(file, threads), portable.feed(arguments)
        session.run(None, feed)
        return functools.partial(session.run, None, feed)
    # The compiler warns about torch's own use of deprecated functions.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        if backend == "compile":
            model = torch.compile(model, dynamic=False)
        ready = bound_call(model, arguments)
        ready()
    return ready


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
