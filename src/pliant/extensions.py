"""Names from other packages: offers of installed packages, and ``package.module:name``.

A norm, a compressor, a training method, a data set or a network can come from another package. An installed package
declares its offers in its pyproject.toml, under names of its own choice::

    [project.entry-points."pliant.methods"]
    l1 = "my_package.methods:l1"

An object of a package that is not installed is named by its module: ``--method my_package.methods:l1``. A package is
imported only when one of its names is used, so a broken package does not affect others. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from pliant.errors import BadInput, PliantError, one_line, unknown

GROUPS = {
    "norm": "pliant.norms",
    "compressor": "pliant.compressors",
    "method": "pliant.methods",
    "data set": "pliant.data",
    "model": "pliant.models",
}
"""The group of entry points for each kind of thing."""

Thing = TypeVar("Thing")


def installed(kind: str) -> dict[str, EntryPoint]:
    """Return name → offer of installed packages for a kind (a key of :data:`GROUPS`); nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUPS[kind]), key=_package)}


def find(
    kind: str,
    name: str,
    own: Mapping[str, Thing],
    fault: Callable[[Any], str | None],
    adapt: Callable[[str, Any], Thing] | None = None,
) -> Thing:
    """Return the object of a name: one of this package, ``package.module:name``, or an installed package's offer.

    Args:
        kind: a key of :data:`GROUPS`.
        name: the name as the user wrote it. Other packages cannot take a name of this package.
        own: the objects of this package, by name.
        fault: returns what is wrong with an object of another package, None if nothing is.
        adapt: maps a name and an object of another package to an entry like those of ``own``; None: use the object.

    Raises:
        BadInput: nothing has this name, or the object cannot be imported or has a fault; the message names the package
            and the reason.
    """
    if name in own:
        return own[name]
    if ":" in name:
        origin, thing = f"{kind} {name!r}", import_named(kind, name)
    else:
        origin, thing = _from_package(kind, name, own)
    if reason := fault(thing):
        raise BadInput(f"{origin}: {reason}")
    return thing if adapt is None else adapt(name, thing)


def names(kind: str, own: Mapping[str, Any]) -> list[str]:
    """Return the names of a kind: those of this package first, then those of installed packages."""
    return list(dict.fromkeys([*own, *installed(kind)]))


def names_of(kind: str, thing: object) -> list[str]:
    """Return the names under which installed packages offer an object of this process; nothing is imported."""
    return [name for name, entry in installed(kind).items() if already_imported(entry.value) is thing]


def already_imported(name: str) -> Any:
    """Return the object that ``package.module:name`` names, if this process has it already, else None."""
    module, attribute = _halves(name)
    thing: Any = sys.modules.get(module)
    for part in attribute.split("."):
        try:
            thing = getattr(thing, part)
        except Exception:  # whatever the code of others raises
            return None
    return thing


def attribute_of(entry: EntryPoint) -> str:
    """Return what an entry point names in its module; empty if it names the module alone."""
    return _halves(entry.value)[1]


def import_named(kind: str, name: str, what: str = "object", example: str = "my_package.module:name") -> Any:
    """Return the object that ``package.module:name`` names; the current directory is searched first.

    Args:
        kind: the expected kind of object, for messages.
        name: a name with a colon.
        what: a word for the attribute of the module, for messages.
        example: an example of such a name, for messages.

    Raises:
        BadInput: the name is not of this form, the import fails, or the module has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if not (module_name and all(part.isidentifier() for part in [*module_name.split("."), attribute])):
        raise BadInput(f"{kind} {name!r}: expected package.module:{what}, such as {example}")
    with current_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # other packages may raise anything
            raise BadInput(f"{kind} {name!r}: import failed with {one_line(error)}") from error
        if not hasattr(module, attribute):
            raise BadInput(f"{kind} {name!r}: module {module_name} has no {what} named {attribute!r}")
        return getattr(module, attribute)


def described(kind: str, name: str) -> str:
    """Return words for an object of another package, for messages; with the package if an installed one offers it."""
    entry = installed(kind).get(name)
    return f"{kind} {name!r}" if entry is None else _described(kind, entry)


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Search the current directory first, as ``python -m`` does; the installed command alone does not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Run code of another package, which may import from the current directory.

    Args:
        what: words for the code, for messages.

    Raises:
        BadInput: the code raised an exception, which is chained; a :class:`PliantError` stays what it is.
    """
    try:
        with current_directory_importable():
            yield
    except PliantError:
        raise
    except (Exception, SystemExit) as error:  # other packages may raise anything
        raise BadInput(f"{what} raised {one_line(error)}") from error


def _halves(reference: str) -> tuple[str, str]:
    """Return module and attribute of ``package.module:name``, in which pip allows spaces and [extras]."""
    module, _, attribute = reference.partition("[")[0].partition(":")
    return module.strip(), attribute.strip()


def _from_package(kind: str, name: str, own: Mapping[str, Any]) -> tuple[str, Any]:
    """Return a description of the offer of a name, for messages, and the object."""
    offers = [entry for entry in entry_points(group=GROUPS[kind]) if entry.name == name]
    if not offers:
        raise unknown(kind, name, names(kind, own))
    if len({(_package(entry), entry.value) for entry in offers}) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in offers))
        raise BadInput(f"{kind} {name!r} is offered by {packages}: uninstall one, or name it as package.module:name")
    entry = offers[0]
    if not attribute_of(entry):
        raise BadInput(f"{_described(kind, entry)}: expected an entry point package.module:name")
    try:
        return _described(kind, entry), entry.load()
    except (Exception, SystemExit) as error:  # other packages may raise anything
        raise BadInput(f"{_described(kind, entry)} cannot be imported: {one_line(error)}") from error


def _described(kind: str, entry: EntryPoint) -> str:
    return f"{kind} {entry.name!r} of the package {_package(entry)} ({entry.value})"


def _package(entry: EntryPoint) -> str:
    return (entry.dist is not None and entry.dist.name) or _halves(entry.value)[0]
