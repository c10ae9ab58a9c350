"""The errors a user can cause, and how they read.

Every message is one line that says what was expected, what came and what to do. The command line prints it
after ``pliant: error:`` and exits with code 2; in Python the same line is the exception's text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 100  # characters of a value in a message


class PliantError(Exception):
    """Base of all errors whose cause lies outside of pliant: input, files, data, a diverged training."""


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
    """Return what came, for a message: its ``repr`` on one line, cut where there is a document in place of a number."""
    text = " ".join(part.strip() for part in repr(value).splitlines())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def unknown(what: str, name: str, known: Iterable[str]) -> BadInput:
    """Return the error for a ``name`` that is not among the ``known`` ones, with the nearest match first."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return BadInput(f"unknown {what} {name!r}: {hint}known are {', '.join(known)}")
