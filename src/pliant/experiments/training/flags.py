"""The flags of ``pliant train``: one for each setting, under the title of its group, and flags for the run folder.

The parser accepts the flags of all methods. Its help shows those that every method has, and if a method is given, its
own.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jsonargparse

from pliant.experiments.methods import METHODS, find_method
from pliant.experiments.training.settings import OWN, SETTINGS, Setting
from pliant.extensions import installed

FOLDER = {
    "out": Setting(None, "run folder; by default runs/DATA-MODEL-METHOD-seedN.", str | None),
    "resume": Setting(False, "continue from the last checkpoint of the run folder, with its settings.", bool),
}


def add_flags(parser: jsonargparse.ArgumentParser, given: Mapping[str, Any]) -> None:
    """Add the flags to a parser.

    Args:
        parser: the parser of the verb.
        given: values of flags that are known before the parser has read them.
    """
    name = given.get("method")
    method = find_method(name) if isinstance(name, str) else None
    titles = dict.fromkeys(setting.group for setting in SETTINGS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    groups["method"].description = methods_table()
    own = {} if method is None else method.settings
    for flag, setting in SETTINGS.items():
        if flag not in OWN:
            decided = method.lr if method is not None and flag == "lr" else None
            _add(groups[setting.group], flag, setting, decided)
        elif flag not in own:
            _add(groups["method"], flag, setting).help = argparse.SUPPRESS
    if own:
        group = parser.add_argument_group(f"settings of {name}")
        for flag, setting in own.items():
            _add(group, flag, dataclasses.replace(setting, default=None), setting.default)
    folder = parser.add_argument_group("run folder")
    for flag, setting in FOLDER.items():
        _add(folder, flag, setting)


def methods_table() -> str:
    """Return a line for each method: its name, the compressors that suit its networks, and a summary."""
    rows = [(name, ", ".join(method.cut_by) or "all", method.summary) for name, method in METHODS.items()]
    rows += [(name, "", f"from {entry.value}") for name, entry in installed("method").items() if name not in METHODS]
    return "\n".join(
        f"{name:<16}{cut_by:<15}{summary}" for name, cut_by, summary in [("method", "cut by", "what it is"), *rows]
    )


def _add(group: Any, flag: str, setting: Setting, decided: object = None) -> argparse.Action:
    """Add a flag; if its default is None, the help shows the value that the method sets."""
    action: argparse.Action = group.add_argument(
        f"--{flag}", type=setting.kind, default=setting.default, help=setting.doc
    )
    if decided is not None:
        action.decided = decided  # type: ignore[attr-defined]
    return action
