"""What a child of the nursery does where it is no command. Light, for every child imports it anew."""

import contextlib
import sys
from pathlib import Path

from pliant.cli import main
from pliant.files import making_folder, write_text
from pliant.jsonl import append_line

from .nursery import make_read_only, small_disk


def write_file(content: str) -> None:
    write_text("a.txt", content)


def write_folder(content: str) -> None:
    with making_folder("a", replace=True) as room:
        (room / "x.txt").write_text(content)
        (room / "y.txt").write_text(content)


def append(content: str) -> None:
    append_line("a.jsonl", {"content": content})


def fail_to_replace() -> None:
    with making_folder("a", replace=True):
        raise OSError("disk full")


def on_a_full_disk(size: int, command: list[str], *before: list[str]) -> int:
    """Run a command on a full disk, and again with room; return ten times the first code plus the second."""
    with small_disk(Path("disk"), size):
        for earlier in before:
            if code := main(earlier):
                return code
        files = everything()
        filler = Path("disk/filler")
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        code = main(command)
        filler.unlink()
        if any(not everything().get(path, b"").startswith(content) for path, content in files.items()):
            print("earlier files have changed", file=sys.stderr)
        if left := [path for path in Path("disk").rglob(".*") if path.suffix in (".tmp", ".lock")]:
            print(f"left over: {left}", file=sys.stderr)
        return 10 * code + main([*command, "--resume"] if command[0] == "train" else command)


def on_a_read_only_disk(command: list[str]) -> int:
    """Run a command where nothing can be written."""
    make_read_only(Path())
    return main(command)


def everything() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("disk").rglob("*") if path.is_file()}
