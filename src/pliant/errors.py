"""The errors a user can cause, and how they read.

Every message is one line that says what was expected, what was given and what to do. The command line prints it after
``pliant: error:`` and exits with code 2; in Python the same line is the exception's text.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

_SHOWN = 100  # characters of a value in a message


class PliantError(Exception):
    """Base of all errors with a cause outside of pliant: input, files, data, a diverged training."""


class BadInput(PliantError, ValueError):
    """A value is unknown, out of range or contradicts another one."""


class DamagedFile(PliantError):
    """A file is missing, truncated or not what its name says."""


class Diverged(PliantError):
    """Training met a loss or gradient that is NaN or infinite."""


class Busy(PliantError):
    """Another process is working on the same folder or file."""


class Refused(PliantError):
    """Nothing can be removed from a model, or a budget cannot be reached."""


def shown(value: object) -> str:
    """Return the ``repr`` of a value on one line for a message, cut if it is long."""
    try:
        text = " ".join(part.strip() for part in repr(value).splitlines())
    except Exception:  # whatever the code of others raises
        text = f"an object of the class {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def unknown(what: str, name: str, known: Iterable[str]) -> BadInput:
    """Return the error for a ``name`` that is not among the ``known`` names, with the nearest match as a hint."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return BadInput(f"unknown {what} {name!r}: {hint}known are {', '.join(known)}")


def check_choice(what: str, value: str, known: Collection[str]) -> None:
    """Raise BadInput unless ``value`` is one of ``known``."""
    if value not in known:
        raise unknown(what, str(value), known)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return an error's type and text as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
