"""Compressors by name: by those of the shell, of suites and of plans."""

from __future__ import annotations

import importlib
from typing import Any

from pliant.compression.base import Compressor, option_names, with_options
from pliant.compression.plan import Plan
from pliant.compressor_names import ALLOCATIONS, ALONE, COMPRESSORS, LINKS, CompressorRow
from pliant.errors import BadInput, check_choice, unknown

_OF_PLANS = {row.class_name: row for row in COMPRESSORS.values()}


def class_named(name: str) -> type[Compressor[Any]]:
    """Return the class of a compressor that the shell knows by this name."""
    return _imported(COMPRESSORS[name])


def compressor_of(plan: Plan) -> Compressor[Any]:
    """Return the compressor that a plan was made by. Raises BadInput if it is unknown."""
    if plan.compressor not in _OF_PLANS:
        raise unknown("compressor", plan.compressor, _OF_PLANS)
    return with_options(_imported(_OF_PLANS[plan.compressor]), plan.options)


def unit_of(plan: Plan) -> str:
    """Return the unit of what a plan's layers keep; empty where they keep everything."""
    return _OF_PLANS[plan.compressor].unit


def check_names(compressor: str, allocation: str) -> None:
    """Raise BadInput for an unknown compressor or allocation, or a chain that cannot be."""
    links = compressor.split("+")
    if len(links) == 1:
        check_choice("compressor", compressor, ALONE)
    for link in links if len(links) > 1 else ():
        check_choice("compressor in a chain", link, LINKS)
    for link in links[:-1]:
        if COMPRESSORS[link].in_chains == "last":
            raise BadInput(
                f"{link} is the last compressor of a chain: nothing compresses its result; got {compressor!r}"
            )
    check_choice("allocation", allocation, ALLOCATIONS)


def allocation_of(compressor: str, allocation: str) -> str:
    """Return an allocation, or "" for a compressor that has no choice of it, as records have it."""
    has_choice = any("allocation" in option_names(class_named(link)) for link in compressor.split("+"))
    return allocation if has_choice else ""


def _imported(row: CompressorRow) -> type[Compressor[Any]]:
    module, _, name = row.home.partition(":")
    kind: type[Compressor[Any]] = getattr(importlib.import_module(module), name)
    return kind
