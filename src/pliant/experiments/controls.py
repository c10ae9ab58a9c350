"""The controls of compressors in the shell and in suites: the same keywords for ``sweep``, ``compress`` and measures.

They are the fields of :class:`~pliant.compression.controls.Controlled`, in plain data; ``ratios`` is ``layer_ratios``
there, because a sweep has ratios of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.compression import FilterPruning
from pliant.compression.base import option_names, with_options
from pliant.compression.by_name import class_named
from pliant.compression.controls import AT_LEAST, CONTROLS
from pliant.compressor_names import control_flags
from pliant.errors import BadInput, shown


def controls_of(
    compressor: str,
    *,
    multiple_of: int = 1,
    keep: str | Sequence[str] | None = None,
    at_least: int | float = AT_LEAST,
    at_most: int | float = 1.0,
    layer_ratios: str | Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the controls that differ from their defaults, by option, as plain data.

    Args:
        compressor: its name in the shell; a chain passes them to the links that have them.
        multiple_of, at_least, at_most: as for the compressor.
        keep: patterns, or text such as "head.*,fc".
        layer_ratios: pattern → share, or text such as "layer1.*=0.5,fc=0".

    Raises:
        BadInput: a value is out of range, two contradict each other, or the compressor does not have such an option.
    """
    patterns = [part for part in keep.split(",") if part] if isinstance(keep, str) else keep or ()
    ratios = _parse_ratios(layer_ratios) if isinstance(layer_ratios, str) else layer_ratios or {}
    given: dict[str, Any] = {
        "multiple_of": multiple_of,
        "keep": patterns,
        "at_least": at_least,
        "at_most": at_most,
        "ratios": ratios,
    }
    options = FilterPruning(**given).plan_options()  # checked, and without defaults
    controls = {name: options[name] for name in CONTROLS if name in options}
    links = [class_named(link) for link in compressor.split("+")]
    for (flag, text), name in zip(control_flags(controls).items(), controls, strict=True):
        if not any(name in option_names(kind) for kind in links):
            raise BadInput(f"--{flag} {text} is for filters, heads and rank; {compressor} has no such option")
    for kind in links:
        with_options(kind, options_for(kind, controls))  # for its BadInput
    return controls


def options_for(kind: type[Any], controls: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the controls that a kind of compressor has."""
    return {name: value for name, value in controls.items() if name in option_names(kind)}


def _parse_ratios(text: str) -> dict[str, float]:
    ratios = {}
    for part in filter(None, text.split(",")):
        pattern, _, share = part.rpartition("=")
        try:
            ratios[pattern] = float(share)
        except ValueError:
            pattern = ""
        if not pattern:
            raise BadInput(f"--layer_ratios has entries such as layer1.*=0.5, separated by commas; got {shown(part)}")
    return ratios
