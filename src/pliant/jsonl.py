"""Files of JSON lines that grow while a long command runs: appending and reading, safe against interruption.

A process may be stopped at any moment: every line is either whole or recognisably cut, because it is the last one and
has no newline. Reading ignores a cut line, appending drops it.

A file may be packed with gzip (``gzip -9n records.jsonl``, a twentieth of the size): it is read and grows as before.
Every appended line is a gzip member of its own, as the format allows, so ``zcat`` prints all lines; packing the file
again makes it smaller. Standard library only.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pliant.errors import BadInput, DamagedFile
from pliant.files import make_folders, sync

if sys.platform != "win32":
    import fcntl

Item = TypeVar("Item")

GZIP = b"\x1f\x8b"  # the first bytes of a gzip member
LARGEST = 256 * 2**20  # limit on the bytes of lines in a packed file: far more than any file has, less than memory
CHUNK = 2**14  # bytes that are unpacked at once: bytes beyond the end of a member are read again


def append_line(path: str | Path, values: Mapping[str, Any]) -> None:
    """Append ``values`` as a line to the JSON Lines file at ``path`` and wait until it is on disk.

    The file and its folder are made if needed; the file is packed if its name ends in ``.gz``. The line is written in
    one call under a file lock (except on Windows), so several processes may append to one file. A cut line that an
    earlier process left is dropped.

    Raises:
        DamagedFile: the file ends neither with a line of JSON nor with a cut one; it may be another kind of file, so
            nothing is written.
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
        lines, length = _whole_lines(path, content)
        if lines and not lines.endswith(b"\n"):
            line = b"\n" + line
        if _is_packed(path, content):
            line = gzip.compress(line, mtime=0)
        if length < len(content):
            file.truncate(length)
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
    """Return the lines of the JSON Lines file at ``path``, parsed, in their order.

    Args:
        path: the file.
        parse: maps the values of a line to an item; raises BadInput for bad values.
        kind: the kind of the items, for messages: ``"records"``.

    Raises:
        DamagedFile: there is no such file, it cannot be unpacked, or a line is not an item; the message names file and
            line. (A cut last line is ignored.)
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedFile(f"{path}: expected a file of {kind}, got {error.strerror}") from None
    lines, _ = _whole_lines(path, content)
    items = []
    for number, line in enumerate(lines.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(parse(_parse(line)))
        except (ValueError, RecursionError) as error:  # of JSON, UTF-8 and BadInput; of thousands of brackets
            raise DamagedFile(f"{path}:{number}: {error}; mend or delete this line") from None
    return items


def _is_packed(path: Path, content: bytes) -> bool:
    return content.startswith(GZIP) or path.suffix == ".gz"


def _whole_lines(path: Path, content: bytes) -> tuple[bytes, int]:
    """Return the whole lines of a file, and the length of the file without a cut line."""
    if _is_packed(path, content):
        lines, length = _unpacked(path, content)
        tail = _last_line(path, lines)
        if tail and _is_cut(tail):
            raise DamagedFile(f"{path}: its last line is cut; unpack the file, delete that line and pack it again")
        return lines, length
    tail = _last_line(path, content)
    length = len(content) - len(tail) if tail and _is_cut(tail) else len(content)
    return content[:length], length


def _unpacked(path: Path, content: bytes) -> tuple[bytes, int]:
    """Return the lines in gzip members, and where the last whole member ends, because the last one may be cut."""
    lines, end = bytearray(), 0
    while end < len(content):
        known = len(lines)
        following = _unpack_member(path, content, end, lines)
        if following is None:
            if b"\n" in lines[known:-1]:  # a process that was killed leaves one line cut, not more
                raise DamagedFile(f"{path}: ends in the middle of the packed lines; get it anew")
            del lines[known:]
            break
        end = following
    return bytes(lines), end


def _unpack_member(path: Path, content: bytes, start: int, lines: bytearray) -> int | None:
    """Append the content of the gzip member at ``start`` to ``lines``; return where it ends, None if it is cut."""
    member, end = zlib.decompressobj(wbits=31), start  # 31: with gzip header and checksum
    while not member.eof and end < len(content):
        chunk = content[end : end + CHUNK]
        try:
            lines += member.decompress(chunk, LARGEST + 1 - len(lines))
        except zlib.error as error:
            raise DamagedFile(f"{path}: expected lines packed with gzip, got {error}; get it anew") from None
        if len(lines) > LARGEST:
            raise DamagedFile(f"{path}: unpacks to more than {LARGEST / 2**20:g} MiB; is this the right file?")
        end += len(chunk) - len(member.unused_data)
    return end if member.eof else None


def _last_line(path: Path, content: bytes) -> bytes:
    """Return the bytes after the last newline: none, a line without its newline, or the beginning of a line."""
    tail = content[content.rfind(b"\n") + 1 :]
    if tail.strip() and not tail.startswith(b"{"):
        raise DamagedFile(f"{path}: expected lines of JSON, got {tail[:20]!r} at the end; is this the right file?")
    return tail


def _is_cut(tail: bytes) -> bool:
    """Return whether a line without its newline is incomplete: the beginning of a JSON object is not valid JSON."""
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
