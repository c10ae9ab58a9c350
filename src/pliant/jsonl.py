"""Files of JSON lines that grow while a long command runs: appending and reading, safe against being stopped.

A process may be stopped at any moment: a line is either whole, or it is recognisable as cut, being the last
one and without a newline. Reading ignores a cut line, appending drops it. Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pliant.errors import BadInput, DamagedFile
from pliant.files import make_folders, sync

if sys.platform != "win32":
    import fcntl

Item = TypeVar("Item")


def append_line(path: str | Path, values: Mapping[str, Any]) -> None:
    """Append ``values`` as a line to the JSON Lines file at ``path`` and wait until it is on disk.

    The file and its folder are made if needed. The line goes out in one write under a file lock (except on
    Windows), so several processes may append to one file. A line that an earlier process left cut is dropped.

    Raises:
        DamagedFile: the unfinished last line is no cut line of JSON; what may be another file is not written to.
        OSError: the disk is full or the file cannot be written; it keeps its former lines and length.
    """
    path = Path(path)
    line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    make_folders(path.parent)
    is_new = not path.exists()
    with path.open("ab+", buffering=0) as file:  # unbuffered: write() below is one system call
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)  # released on close
        file.seek(0)
        content = file.readall()
        tail = _last_line(path, content)
        if tail and _is_cut(tail):
            file.truncate(len(content) - len(tail))
        elif tail:
            line = b"\n" + line
        length = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
            if is_new:
                sync(path.parent)
        except OSError:
            file.truncate(length)
            raise


def check_appendable(path: str | Path) -> None:
    """Make the folder of ``path`` if needed and raise OSError if :func:`append_line` could not write to the file."""
    path = Path(path)
    make_folders(path.parent)
    if path.exists():
        path.open("ab").close()
    else:
        tempfile.TemporaryFile(dir=path.parent).close()


def read_lines(path: str | Path, parse: Callable[[dict[str, Any]], Item], kind: str) -> list[Item]:
    """Return what ``parse`` makes of the lines of the JSON Lines file at ``path``, in their order.

    Args:
        path: the file.
        parse: from the values of a line to an item; raises BadInput for values that are none.
        kind: what the items are, for messages: ``"records"``.

    Raises:
        DamagedFile: there is no such file, or a line is no item; the message names file and line. (A cut last line
            is ignored.)
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedFile(f"{path}: expected a file of {kind}, got {error.strerror}") from None
    tail = _last_line(path, content)
    if tail and _is_cut(tail):
        content = content[: -len(tail)]
    items = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(parse(_parse(line)))
        except (ValueError, RecursionError) as error:  # JSON, UTF-8 and BadInput; the other for thousands of brackets
            raise DamagedFile(f"{path}:{number}: {error}; mend or delete this line") from None
    return items


def _last_line(path: Path, content: bytes) -> bytes:
    """Return what follows the last newline: nothing, a record without newline, or the beginning of one."""
    tail = content[content.rfind(b"\n") + 1 :]
    if tail.strip() and not tail.startswith(b"{"):
        raise DamagedFile(f"{path}: expected lines of JSON, got {tail[:20]!r} at the end; is this the right file?")
    return tail


def _is_cut(tail: bytes) -> bool:
    """Tell whether an unterminated line is incomplete: no mere beginning of a JSON object is valid JSON."""
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        return True
    return False


def _parse(line: bytes) -> dict[str, Any]:
    values = json.loads(line.decode(), parse_constant=_no_constant)
    if not isinstance(values, dict):
        raise BadInput(f"expected a JSON object, got {type(values).__name__}")
    return values


def _no_constant(name: str) -> None:
    raise BadInput(f"expected finite numbers, got {name}")
