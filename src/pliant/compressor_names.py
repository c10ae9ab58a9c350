"""The names of compressors in the shell, suites, records and reports: a row for each, and related words.

A compressor is named by its row (``filters``), a chain by several names joined by a plus (``filters+rank``), and in
records a variant follows after a dash (``rank-whitened-spatial``). ``pliant.compression.by_name`` finds the classes,
including those of other packages. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
"""How many training images are used for calibration by default."""


@dataclass(frozen=True)
class CompressorRow:
    """The names and properties of a compressor outside of code.

    Args:
        name: name in the shell, in suites and in records.
        home: its class, as package.module:name.
        unit: unit of the kept parts of a layer, ``kind`` of a :class:`~pliant.records.LayerCount`; empty if it keeps
            everything.
        removed: title of its figures if parameters leave the network; empty if they never do.
        zeroed: title of its figures if parameters become zeros; empty if they never do.
        takes: the option that sets how much to remove, "ratio" or "pattern"; empty for a compressor with a single size,
            which is used in chains only.
        in_chains: where it may stand in a chain, "anywhere" or "last"; empty for nowhere.
        norm: the importance by which it chooses without looking at data; empty if it has no such option.
    """

    name: str
    home: str
    unit: str = ""
    removed: str = ""
    zeroed: str = ""
    takes: str = "ratio"
    in_chains: str = "anywhere"
    norm: str = ""

    @property
    def class_name(self) -> str:
        """Its name in plans."""
        return self.home.rpartition(":")[2]


_ROWS = (
    CompressorRow(
        "filters", "pliant.compression:FilterPruning", "channels", "Filters removed", "Filters zeroed", norm="l2"
    ),
    CompressorRow("heads", "pliant.compression:HeadPruning", "heads", "Heads removed", "Heads zeroed", norm="l2"),
    CompressorRow("rank", "pliant.compression:LowRank", "rank", "Layers factorised to low rank"),
    CompressorRow(
        "weights", "pliant.compression:Magnitude", "weights", zeroed="Single weights zeroed", norm="magnitude"
    ),
    CompressorRow(
        "nm",
        "pliant.compression:SemiStructured",
        "weights",
        zeroed="N:M patterns",
        takes="pattern",
        in_chains="",
        norm="magnitude",
    ),
    CompressorRow("int8", "pliant.compression:Int8", takes="", in_chains="last"),
)
COMPRESSORS = {row.name: row for row in _ROWS}
"""All rows by name, in the order of reports."""
ALONE = tuple(row.name for row in _ROWS if row.takes)
"""The names of compressors that can be used alone."""
LINKS = tuple(row.name for row in _ROWS if row.in_chains)
"""The names of compressors that may stand in a chain such as filters+rank+int8."""

TITLE = "compressor_title"
"""The field in records by a compressor of another package with its title, so that reports do not need the package."""

_IN_WORDS = (
    f"{', '.join(ALONE[:-1])} or {ALONE[-1]}, the name of one that another package offers, package.module:name, or a "
    "chain such as filters+rank or rank+int8"
)

Function = TypeVar("Function", bound=Callable[..., Any])


def names_in_help(function: Function) -> Function:
    """Replace ``{compressors}`` in a docstring, which --help shows, by the names of the compressors."""
    function.__doc__ = (function.__doc__ or "").replace("{compressors}", _IN_WORDS)
    return function


def takes_pattern(compressor: str) -> bool:
    """Return whether a compressor takes a pattern such as 2:4 instead of a ratio."""
    return compressor in COMPRESSORS and COMPRESSORS[compressor].takes == "pattern"


def check_pattern(compressor: str, pattern: str | None, **ratio: object) -> None:
    """Raise BadInput if a compressor that takes a ratio gets a pattern, or one that takes a pattern gets a ratio."""
    ((name, value),) = ratio.items()
    patterned = " or ".join(filter(takes_pattern, COMPRESSORS))
    if pattern is not None and not takes_pattern(compressor):
        raise BadInput(f"--pattern {pattern} is for the compressor {patterned}; {compressor} takes --{name}")
    if value is not None and takes_pattern(compressor):
        raise BadInput(f"--{name} {value} is not for the compressor {compressor}: it takes a --pattern such as 2:4")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) of a pattern such as "2:4"; raise BadInput for anything else."""
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m)):
        raise BadInput(f"a pattern is N:M with 1 <= N <= M, such as 2:4; got {pattern!r}")
    return int(n), int(m)


def factorises(compressor: str) -> bool:
    """Return whether a compressor, or a link of a chain, is rank."""
    return "rank" in compressor.split("+")


def resolve_scheme(compressor: str, scheme: str | None) -> str | None:
    """Return the scheme of a compressor, :data:`SCHEME` for None; None if the compressor does not factorise.

    Raises:
        BadInput: the scheme is unknown, or the compressor does not factorise.
    """
    if scheme is None:
        return SCHEME if factorises(compressor) else None
    check_choice("scheme", scheme, (*SCHEMES, "best"))
    if not factorises(compressor):
        raise BadInput(f"--scheme {scheme} is for the compressor rank; {compressor} has no such choice")
    return scheme


def control_flags(controls: Mapping[str, Any]) -> dict[str, str]:
    """Return flag → text, as the shell takes them, for controls as records hold them: option → plain data."""
    texts = {}
    for name, value in controls.items():
        if isinstance(value, Mapping):
            value = [f"{pattern}={share}" for pattern, share in value.items()]
        flag = "layer_ratios" if name == "ratios" else name  # a sweep has ratios of its own
        texts[flag] = ",".join(value) if isinstance(value, list) else str(value)
    return texts


LOSS, WHITENED, REFIT = "loss", "whitened", "refit"
"""Words in the names of records, for what looks at the calibration images: the choice, the directions, the refit."""
_CHOICES = {"l1": "chosen by l1 norms", "bn": "chosen by norms and BatchNorm scales"}
_WORDS = {
    LOSS: "chosen by calibration images",
    **_CHOICES,
    WHITENED: "whitened",
    REFIT: "refitted",
}


def record_name(
    compressor: str,
    whiten: bool,
    scheme: str | None = None,
    controls: Mapping[str, Any] | None = None,
    *,
    choice: str = "",
    refit: bool = False,
) -> str:
    """Return the name of a compressor in records, with its variant.

    Args:
        compressor: its name in the shell.
        whiten: whether rank looks at data.
        scheme: how rank factorises convolutions; None for the default.
        controls: the controls that differ from their defaults, as plain data.
        choice: by what its links choose: :data:`LOSS`, or another importance; empty for their norms, as in records that
            are older than the choice.
        refit: whether the weights that are left are refitted.
    """
    scheme = resolve_scheme(compressor, scheme)
    words = [compressor]
    if choice:
        words.append(choice.replace("-", "_"))
    if whiten and factorises(compressor):
        words.append(WHITENED)
    if scheme is not None and scheme != "channel":  # records without a scheme are from when "channel" was the only one
        words.append(scheme)
    # Dashes stand between the words; "=" tells controls from other words.
    words += [f"{flag}={text.replace('-', '_')}" for flag, text in control_flags(controls or {}).items()]
    if refit:
        words.append(REFIT)
    return "-".join(words)


def variant_in_words(name: str) -> list[str]:
    """Return the words of a record's compressor after its family, as titles show them."""
    _, *words = name.split("-")
    return [_WORDS.get(word, word) for word in words if word]


def norm_of(compressor: str) -> str:
    """Return the importance by weights alone of the first link that has one; empty if none has."""
    rows = [COMPRESSORS[link] for link in compressor.split("+") if link in COMPRESSORS]
    return next((row.norm for row in rows if row.norm), "")


def shell_flags(name: str) -> list[str] | None:
    """Return the flags with which the shell makes the variant that a record names; None if it cannot.

    The controls are left out: names hold them without dashes.
    """
    compressor, *words = name.split("-")
    rank = factorises(compressor)
    norm = norm_of(compressor)
    choices = [word for word in words if norm and word in (LOSS, *_CHOICES)]
    others = [word for word in words if word not in (*choices, WHITENED, REFIT) and "=" not in word]
    if len(others) > rank or len(choices) > 1 or not set(others) <= {*SCHEMES, "best"}:
        return None
    flags = []
    if norm and choices != [LOSS]:
        flags += ["--importance", *(choices or [norm])]
    if rank and WHITENED not in words:
        flags += ["--whiten", "false"]
    if rank:
        flags += ["--scheme", *(others or ["channel"])]
    if REFIT not in words:
        flags += ["--refit", "false"]
    return flags
