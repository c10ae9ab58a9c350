"""Atomic writing of files and folders, by one process at a time, and hashes of files.

A process may be killed at any moment. It then leaves ``.NAME.*.tmp`` or ``.NAME.lock`` next to the file or folder NAME
that it was writing; nothing reads these, and the next process that writes NAME removes them. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pliant.errors import Busy

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` to write to; on success it is renamed to ``path`` atomically.

    The content is on disk before the name changes, so after a crash or on a full disk the former file is still whole.
    The folder must exist. On an error the temporary file is removed and the error propagates.
    """
    path = Path(path)
    with locked(path, wait=True):
        _remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            sync(temporary)
            # mkstemp makes private files; give the result the permissions of an ordinary file of this user.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def making_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to ``path`` to fill; on success it is renamed to ``path``: whole, or not at all.

    Missing parents are made. On an error the temporary folder is removed, a former folder stays and the error
    propagates.

    Args:
        path: the folder.
        replace: remove a former folder of that name once the new one has its name.

    Raises:
        Busy: another process is making the same folder.
        OSError: the folder exists, is not empty and may not be replaced, or it cannot be written.
    """
    path = Path(path)
    make_folders(path.parent)
    with locked(path):
        _remove_leftovers(path)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as room:
            fresh, former = Path(room, "new"), Path(room, "former")
            fresh.mkdir()  # with the permissions of any folder that this user makes; the room around it is private
            yield fresh
            for file in (*fresh.rglob("*"), fresh):
                sync(file)
            if replace and path.exists():
                path.rename(former)
            try:
                fresh.rename(path)
            except OSError:
                if former.exists():
                    former.rename(path)
                raise
            sync(path.parent)


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from working on ``path``: a file or folder, which need not exist; its parent must.

    The lock is the file ``.NAME.lock`` next to it. The system releases it when the process ends, in whatever way. There
    are no such locks on Windows.

    Args:
        path: the file or folder.
        wait: wait for another process that works on it, instead of raising Busy.

    Raises:
        Busy: another process is working on it.
    """
    path = Path(path).resolve()
    lock = path.with_name(f".{path.name}.lock")
    handle = _take(lock, path, wait)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _take(lock: Path, path: Path, wait: bool) -> int:
    """Return an open handle of a lock file that no other process holds."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if sys.platform == "win32":
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_nlink:
                return handle
        except BlockingIOError:
            os.close(handle)
            raise Busy(f"{path} is in use: another process is writing it; wait for that one, or stop it") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its former holder has since removed the file: try again


def remove_leftovers(path: str | Path) -> None:
    """Remove the leftovers of killed processes next to ``path``; raise Busy if another process is working on it."""
    path = Path(path)
    if path.parent.is_dir():
        with locked(path):
            _remove_leftovers(path)


def is_empty(folder: Path) -> bool:
    """Return whether a folder is absent, or holds nothing but leftovers of killed processes."""
    return not folder.exists() or (folder.is_dir() and not any(not _is_leftover(entry) for entry in folder.iterdir()))


def make_folders(path: str | Path) -> None:
    """Make a folder and its missing parents, durably, even after a loss of power; an existing folder is fine."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically.

    A library that writes a file itself reports a full disk by an error of its own; write its bytes here instead, so
    that the error is an OSError.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of entries of a folder, is on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".tmp", ".lock")


def _remove_leftovers(path: Path) -> None:
    """Remove the leftovers of killed processes next to ``path``, which this process has locked."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # as the module tempfile names them
    for left in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
        if not left.is_dir():
            left.unlink(missing_ok=True)
            continue
        if (left / "former").exists() and not path.exists():
            (left / "former").rename(path)  # killed between two renamings: the former folder still counts
        shutil.rmtree(left)
