"""A process whose children run commands and come to harm, each in its own way.

Importing torch takes seconds, a fork milliseconds: :class:`Nursery` starts this file once, and the process forks a
child for every call. A child may be killed before its n-th file operation, or after some time; its disk may be full.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = "pliant.cli:main"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "fcntl.flock")


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, negative for a signal; what it wrote; how many file operations it made."""

    code: int
    out: str
    err: str
    operations: int

    @property
    def line(self) -> str:
        """The one line of a user's error."""
        assert self.code == 2, self
        (line,) = [line for line in self.err.splitlines() if line.startswith("pliant: error: ")]
        assert "Traceback" not in self.err
        return line


class Nursery:
    """A process that forks children; a context manager."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, folder: Path, *arguments: Any, call: str = COMMAND, **harm: Any) -> None:
        """Start a child that calls a function in a folder; the next :meth:`wait` is for the first one started.

        Args:
            folder: to work in.
            arguments: for the function; for a command, its words.
            call: "module:function".
            harm: ``kill_at``: number of the file operation before which it is killed; ``kill_after``: seconds after
                which it is; ``longest_file``: bytes beyond which a file cannot grow.
        """
        values = [list(map(str, arguments))] if call == COMMAND else list(arguments)
        request = {"folder": str(folder), "call": call, "arguments": values, **harm}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def wait(self) -> Outcome:
        """Return how the first child that was not waited for yet ended."""
        assert self._process.stdout
        return Outcome(**json.loads(self._process.stdout.readline()))

    def run(self, folder: Path, *arguments: Any, call: str = COMMAND, **harm: Any) -> Outcome:
        """Start a child and wait for it."""
        self.start(folder, *arguments, call=call, **harm)
        return self.wait()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Put a disk of so many bytes on a folder, for this process alone; PermissionError where that is not allowed."""
    _private_mounts()
    _mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode())
    yield


def make_read_only(folder: Path) -> None:
    """Let nothing be written below a folder, for this process alone, and go there; PermissionError as above."""
    bind, remount, read_only = 4096, 32, 1
    place = bytes(folder.resolve())
    _private_mounts()
    _mount(place, place, b"none", bind)
    _mount(b"none", place, b"none", bind | remount | read_only)
    os.chdir(place)


def _private_mounts() -> None:
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 16384
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        raise PermissionError("no mounts of one's own")
    _mount(b"none", b"/", b"none", private | recursive)


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes | None = None) -> None:
    if ctypes.CDLL(None, use_errno=True).mount(source, target, kind, flags, data):
        raise PermissionError(os.strerror(ctypes.get_errno()))


# --- the process itself -----------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a child for every line of stdin at once; answer in the order of the lines."""
    _import_all()
    waiting: list[tuple[int, dict[str, Any], Path, float]] = []
    os.set_blocking(0, False)
    lines, closed = b"", False
    while not (closed and not waiting):
        with contextlib.suppress(BlockingIOError):
            read = os.read(0, 1 << 16)
            closed, lines = not read, lines + read
        *requests, lines = lines.split(b"\n")
        for request in map(json.loads, requests):
            waiting.append(_fork(request))
        if waiting and (outcome := _ended(*waiting[0])):
            waiting.pop(0)
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)
        time.sleep(0.002)


def _import_all() -> None:
    """Import whatever a command imports, so that the children need not; compute no gradient, for forks cannot then."""
    import torch

    for module in ("cli", "experiments.sweep", "experiments.compress", "experiments.export", "reporting.page"):
        importlib.import_module(f"pliant.{module}")
    from pliant import measuring
    from pliant.compression import FilterPruning, compress
    from pliant.experiments.training.session import Session
    from pliant.experiments.training.settings import Settings

    torch.set_num_threads(1)
    session = Session(Settings(model="mlp"))
    compress(session.model, FilterPruning(), torch.zeros(1, 1, 8, 8))
    measuring.latencies = functools.partial(measuring.latencies, seconds=0.001, rounds=1)  # type: ignore[assignment]


def _fork(request: dict[str, Any]) -> tuple[int, dict[str, Any], Path, float]:
    room = Path(tempfile.mkdtemp(prefix="nursery"))
    child = os.fork()
    if not child:
        _live(request, room)
    return child, request, room, time.monotonic()


def _ended(child: int, request: dict[str, Any], room: Path, since: float) -> Outcome | None:
    if time.monotonic() - since > request.get("kill_after", float("inf")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        return None
    texts = [(room / name).read_text(errors="replace") if (room / name).exists() else "" for name in "oec"]
    for file in room.iterdir():
        file.unlink()
    room.rmdir()
    return Outcome(os.waitstatus_to_exitcode(status), texts[0], texts[1], len(texts[2]))


def _live(request: dict[str, Any], room: Path) -> None:
    """Be the child: never returns."""
    code = 70
    try:
        for descriptor, name in ((1, "o"), (2, "e")):
            os.dup2(os.open(room / name, os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(request["folder"])
        _count_operations(room / "c", request["folder"], request.get("kill_at"))
        if limit := request.get("longest_file"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing past the limit is an error
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        module, _, function = request["call"].partition(":")
        try:
            code = getattr(importlib.import_module(module), function)(*request["arguments"]) or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operations(counter: Path, folder: str, kill_at: int | None) -> None:
    """Add a letter to a file for every operation that changes a file; be killed before a given one."""
    handle, done = os.open(counter, os.O_WRONLY | os.O_CREAT), 0
    folder = os.path.realpath(folder)

    def below(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, _, flags = arguments
            counts = isinstance(flags, int) and bool(flags & WRITING) and below(path)
        else:
            counts = event in OPERATIONS and (event == "fcntl.flock" or below(arguments[0]))
        if counts:
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            os.write(handle, b".")

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
