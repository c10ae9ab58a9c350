"""Compressors by their names in the shell, in suites and in plans.

Those of this package have rows in :mod:`pliant.compressor_names`. Those of other packages are classes that an entry
point or ``package.module:name`` names, see :class:`~pliant.compression.Compressor`; their rows follow from the classes.
"""

from __future__ import annotations

import importlib
from typing import Any

from pliant.compression.base import Compressor, option_names, with_options
from pliant.compression.plan import Plan
from pliant.compressor_names import ALLOCATIONS, ALONE, COMPRESSORS, LINKS, CompressorRow
from pliant.errors import BadInput, check_choice, one_line, shown, unknown
from pliant.extensions import already_imported, find, installed

_OF_PLANS = {row.class_name: row for row in COMPRESSORS.values()}


def class_named(name: str) -> type[Compressor[Any]]:
    """Return the class of a compressor, by its name in the shell, in suites and in records.

    Raises:
        BadInput: nothing has this name, or the object that another package offers is not a compressor; the message
            names the package and the reason.
    """
    ours = {row.name: _imported(row) for row in COMPRESSORS.values()}
    return find("compressor", name, ours, _fault)


def row_of(name: str) -> CompressorRow:
    """Return the row of a compressor, of this or another package; raise BadInput as :func:`class_named` does."""
    if name in COMPRESSORS:
        return COMPRESSORS[name]
    kind = class_named(name)
    takes = "ratio" if "ratio" in option_names(kind) else ""
    return CompressorRow(name, f"{kind.__module__}:{kind.__qualname__}", kind.unit, kind.title, kind.title, takes)


def check_names(compressor: str, allocation: str) -> None:
    """Raise BadInput for an unknown compressor or allocation, or an impossible chain."""
    links = compressor.split("+")
    what, known = ("compressor", ALONE) if len(links) == 1 else ("compressor in a chain", LINKS)
    for link in links:
        if link in known:  # what is installed is looked for only where it matters, for that takes a while
            continue
        others = installed("compressor")
        if link in COMPRESSORS or (link not in others and ":" not in link):
            check_choice(what, link, [*known, *others])
        if "-" in link:
            raise BadInput(f"compressor {link!r} of another package: its name must not contain '-'")
    rows = [row_of(link) for link in links]
    if len(rows) == 1 and not rows[0].takes:
        raise BadInput(f"{compressor} has no ratio: it can only be a link of a chain, such as filters+{compressor}")
    for row in rows[:-1]:
        if row.in_chains == "last":
            raise BadInput(
                f"{row.name} is the last compressor of a chain: nothing compresses its result; got {compressor!r}"
            )
    check_choice("allocation", allocation, ALLOCATIONS)


def allocation_of(compressor: str, allocation: str) -> str:
    """Return the allocation as records name it: "" if the compressor has no such option."""
    has_choice = any("allocation" in option_names(class_named(link)) for link in compressor.split("+"))
    return allocation if has_choice else ""


def compressor_of(plan: Plan) -> Compressor[Any]:
    """Return the compressor that a plan names, with the plan's options.

    A plan never causes an arbitrary import: a class of another package is found only if the installed package offers it
    by an entry point, or if the class is already imported.

    Raises:
        BadInput: the compressor is unknown or not installed, or does not have the plan's options.
    """
    return with_options(_class_of(plan), plan.options)


def unit_of(plan: Plan) -> str:
    """Return the unit in which a plan counts the kept parts of its layers; empty if they keep everything."""
    name = plan.compressor
    return _OF_PLANS[name].unit if name in _OF_PLANS else _class_of(plan).unit


def _class_of(plan: Plan) -> type[Compressor[Any]]:
    name = plan.compressor
    if name in _OF_PLANS:
        return _imported(_OF_PLANS[name])
    offers = installed("compressor")
    if name in offers:
        return class_named(name)
    if ":" not in name:
        known = unknown("compressor", name, [*_OF_PLANS, *offers])
        raise BadInput(f"{known}; one of another package needs that package to be installed")
    kind: type[Compressor[Any]] | None = already_imported(name)
    if kind is None:
        kind = next((class_named(offer) for offer, entry in offers.items() if entry.value == name), None)
    if kind is None or _fault(kind):
        module = shown(name.partition(":")[0])
        raise BadInput(
            f"the plan needs the compressor {shown(name)} of another package: install the package, with an entry point "
            f"for it in the group pliant.compressors, or in Python import {module} first"
        )
    return kind


def _imported(row: CompressorRow) -> type[Compressor[Any]]:
    """Return the class of a compressor of this package."""
    module, _, name = row.home.partition(":")
    kind: type[Compressor[Any]] = getattr(importlib.import_module(module), name)
    return kind


def _fault(thing: Any) -> str | None:
    """Return why an object of another package is not a compressor, or None."""
    if not (isinstance(thing, type) and issubclass(thing, Compressor)):
        got = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
        return f"expected a subclass of pliant.compression.Compressor, got {got}"
    if "__dataclass_fields__" not in vars(thing):
        return "expected a dataclass, whose fields are the options: decorate it with @dataclass(frozen=True)"
    for attribute in ("unit", "title"):
        if not isinstance(getattr(thing, attribute), str):
            return f"its {attribute} is expected to be text, got {getattr(thing, attribute)!r}"
    try:
        thing()
    except Exception as error:  # other packages may raise anything
        return f"it cannot be made with its defaults: {one_line(error)}"
    return None
