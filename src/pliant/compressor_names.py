"""What the shell, suites, records and reports call the compressors: a row for each, and the words beside it.

A compressor is named by its row (``filters``), several in a chain by a plus between them (``filters+rank``), and in
records with its variant after a dash (``rank-whitened-spatial``). ``pliant.compression.by_name`` finds the classes,
those of other packages too. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pliant.errors import BadInput, check_choice

ALLOCATIONS = ("uniform", "global", "energy")
"""How a ratio is shared out among the layers."""
SCHEMES = ("channel", "spatial")
"""The two ways to read a convolution's weight as a matrix."""
SCHEME = "spatial"
"""How convolutions are factorised by default."""
CALIBRATION = 2048
"""How many training images a compression looks at by default."""


@dataclass(frozen=True)
class CompressorRow:
    """A compressor as all that is not code knows it.

    Args:
        name: in the shell, in suites and in records.
        home: its class, as package.module:name.
        unit: of what a layer keeps, ``kind`` of a :class:`~pliant.records.LayerCount`; empty where it keeps everything.
        removed: title of its figures where parameters leave the network; empty where they never do.
        zeroed: title of its figures where parameters become zeros; empty where they never do.
        takes: what says how much to remove, "ratio" or "pattern"; empty for a compressor that knows one size only, and
            is used in chains only.
        in_chains: where it may stand in a chain, "anywhere" or "last"; empty for nowhere.
    """

    name: str
    home: str
    unit: str = ""
    removed: str = ""
    zeroed: str = ""
    takes: str = "ratio"
    in_chains: str = "anywhere"

    @property
    def class_name(self) -> str:
        """What plans call it."""
        return self.home.rpartition(":")[2]


_ROWS = (
    CompressorRow("filters", "pliant.compression:FilterPruning", "channels", "Filters removed", "Filters zeroed"),
    CompressorRow("heads", "pliant.compression:HeadPruning", "heads", "Heads removed", "Heads zeroed"),
    CompressorRow("rank", "pliant.compression:LowRank", "rank", "Layers factorised to low rank"),
    CompressorRow("weights", "pliant.compression:Magnitude", "weights", zeroed="Single weights zeroed"),
    CompressorRow(
        "nm", "pliant.compression:SemiStructured", "weights", zeroed="N:M patterns", takes="pattern", in_chains=""
    ),
    CompressorRow("int8", "pliant.compression:Int8", takes="", in_chains="last"),
)
COMPRESSORS = {row.name: row for row in _ROWS}
"""All rows by name, in the order of reports."""
ALONE = tuple(row.name for row in _ROWS if row.takes)
"""What a network can be compressed by."""
LINKS = tuple(row.name for row in _ROWS if row.in_chains)
"""What may stand in a chain such as filters+rank+int8."""

TITLE = "compressor_title"
"""Beside a record by a compressor of another package: its title, so that a report does not need the package."""

_IN_WORDS = (
    f"{', '.join(ALONE[:-1])} or {ALONE[-1]}, the name of one that another package offers, package.module:name, or a "
    "chain such as filters+rank or rank+int8"
)

Function = TypeVar("Function", bound=Callable[..., Any])


def names_in_help(function: Function) -> Function:
    """Put the names of the compressors into a docstring, from which --help is made, in place of ``{compressors}``."""
    function.__doc__ = (function.__doc__ or "").replace("{compressors}", _IN_WORDS)
    return function


def takes_pattern(compressor: str) -> bool:
    """Return whether a compressor takes a pattern such as 2:4 in place of a ratio."""
    return compressor in COMPRESSORS and COMPRESSORS[compressor].takes == "pattern"


def check_pattern(compressor: str, pattern: str | None, **ratio: object) -> None:
    """Raise BadInput if a pattern is given to a compressor that takes a ratio, or a ratio to one of patterns."""
    ((name, value),) = ratio.items()
    patterned = " or ".join(filter(takes_pattern, COMPRESSORS))
    if pattern is not None and not takes_pattern(compressor):
        raise BadInput(f"--pattern {pattern} is for the compressor {patterned}; {compressor} takes --{name}")
    if value is not None and takes_pattern(compressor):
        raise BadInput(f"--{name} {value} is not for the compressor {compressor}: it takes a --pattern such as 2:4")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) of a pattern such as "2:4"; raises BadInput for anything else."""
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m)):
        raise BadInput(f"a pattern is N:M with 1 <= N <= M, such as 2:4; got {pattern!r}")
    return int(n), int(m)


def factorises(compressor: str) -> bool:
    """Return whether a compressor or a link of it is rank."""
    return "rank" in compressor.split("+")


def resolve_scheme(compressor: str, scheme: str | None) -> str | None:
    """Return the scheme of a compressor, :data:`SCHEME` for None; None if the compressor does not factorise.

    Raises BadInput for an unknown scheme, or one given to a compressor that has no use for it.
    """
    if scheme is None:
        return SCHEME if factorises(compressor) else None
    check_choice("scheme", scheme, (*SCHEMES, "best"))
    if not factorises(compressor):
        raise BadInput(f"--scheme {scheme} is for the compressor rank; {compressor} has no such choice")
    return scheme


def record_name(compressor: str, whiten: bool, scheme: str | None = None) -> str:
    """Return the name that records give a compressor: with its variant. ``scheme``: None for the default."""
    scheme = resolve_scheme(compressor, scheme)
    words = [compressor]
    if whiten and factorises(compressor):
        words.append("whitened")
    if scheme is not None and scheme != "channel":  # the only one when the first records were made
        words.append(scheme)
    return "-".join(words)
