"""Writing files so that nobody ever sees half of one, and telling them apart. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; on success it takes the name ``path`` in one step.

    The content is on disk before the name changes, so after a crash or on a full disk the former file is still whole.
    The folder must exist. On an error the temporary file is removed and the error goes on.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes private files; a result is as readable as any file this user makes.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def making_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill; on success it takes the name ``path``: whole, or not at all.

    Missing parents are made. A folder of that name is an OSError, unless it is empty or ``replace`` is True: then the
    former one is removed once the new one has its name. On an error the temporary folder is removed, the former one
    stays and the error goes on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as room:
        fresh, former = Path(room, "new"), Path(room, "former")
        fresh.mkdir()  # with the permissions of any folder that this user makes; the room around it is private
        yield fresh
        for file in fresh.rglob("*"):
            _sync(file)
        if replace and path.exists():
            path.rename(former)
        try:
            fresh.rename(path)
        except OSError:
            if former.exists():
                former.rename(path)
            raise
        _sync(path.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file in one step.

    Libraries that write files themselves report a full disk in errors of their own; let them make bytes, and write
    those here, so that it is an OSError.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    write_bytes(path, text.encode("utf-8"))


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
