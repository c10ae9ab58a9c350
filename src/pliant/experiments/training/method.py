"""What a training method is: how its optimizer is built, and the settings that are its own."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pliant.errors import BadInput, one_line, shown
from pliant.experiments.baselines import MatrixSGD
from pliant.experiments.training.optimizers import Build, matrix_sgd
from pliant.experiments.training.settings import OWN, SETTINGS, Setting

RESERVED = ("out", "resume", "config", "print_config", "help", "others")
"""Names that are no settings, but flags or keywords."""
_FIELDS: dict[str, Any] = {
    "summary": str,
    "build": Callable,
    "own": Mapping,
    "docs": Mapping,
    "passes": int,
    "cut_by": tuple,
    "trials": tuple,
}
_PLAIN = (bool, int, float, str, types.NoneType)  # what a flag can say and config.yaml keeps


@dataclass(frozen=True)
class Method:
    """A method and the settings it takes where none are given.

    Args:
        summary: what it is, in a few words.
        build: from the model, all settings and some images to the optimizer; may parametrise weights of the model.
        lr: learning rate; None where it follows from ``turnover`` and the length of the training.
        own: the settings that not every method has, with this one's defaults; None where it has one but needs none. A
            setting that no other method has needs a default other than None, or a
            :class:`~pliant.experiments.training.settings.Setting` in its place; it is text, a number, true or false.
        docs: what its own settings are, where it is not what all methods understand by that name.
        passes: forward and backward passes per step.
        cut_by: the compressors that its networks are made for; none for all.
        trials: settings to choose from in a comparison whose suite does not name the method.
    """

    summary: str
    build: Build
    lr: float | None = 0.1
    own: Mapping[str, Any] = field(default_factory=dict)
    docs: Mapping[str, str] = field(default_factory=dict)
    passes: int = 1
    cut_by: tuple[str, ...] = ()
    trials: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Its own settings, with its defaults and what they are, in the order of run folders."""
        names = [name for name in SETTINGS if name in self.own] + self.others
        return {name: self._setting(name, self.own[name]) for name in names}

    @property
    def others(self) -> list[str]:
        """The names of those settings that it alone has."""
        return [name for name in self.own if name not in SETTINGS]

    def _setting(self, name: str, value: Any) -> Setting:
        given = value if isinstance(value, Setting) else Setting(value)
        known = SETTINGS.get(name, given)
        doc = self.docs.get(name) or given.doc or known.doc or "a setting of this method."
        kind = type(given.default) if known.kind is None else known.kind
        rule = known.rule if given.rule is None else given.rule
        return dataclasses.replace(known, default=given.default, doc=doc, kind=kind | None, rule=rule)

    def fault(self) -> str | None:
        """Return what is wrong with its fields, None if nothing is."""
        for name, kind in _FIELDS.items():
            if not isinstance(getattr(self, name), kind):
                return f"{name} is a {kind.__name__.lower()}, got {shown(getattr(self, name))}"
        if self.passes not in (1, 2):
            return f"passes is 1 or 2, got {self.passes}"
        if not all(isinstance(trial, Mapping) for trial in self.trials):
            return f"trials are settings by name, got {shown(self.trials)}"
        if self.lr is None and "turnover" not in self.own:
            return "lr is None, and there is no turnover that it follows from"
        for name, value in self.own.items():
            if reason := _fault_of_setting(name, value):
                return reason
        try:
            for name, setting in {"lr": SETTINGS["lr"], **self.settings}.items():
                setting.check(name, self.lr if name == "lr" else setting.default)
        except BadInput as error:
            return f"its default of {error}"
        except Exception as error:  # whatever a rule of others raises
            return f"its settings cannot be checked: {one_line(error)}"
        return None


def _fault_of_setting(name: object, value: object) -> str | None:
    """Return what is wrong with a setting that a method calls its own, None if nothing is."""
    known = isinstance(name, str) and name in SETTINGS
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED or (known and name not in OWN):
        return f"{shown(name)} cannot be a setting of its own"
    setting = value if isinstance(value, Setting) else Setting(value)
    kind = type(setting.default) if setting.kind is None else setting.kind
    if not all(one in _PLAIN for one in typing.get_args(kind) or (kind,)):
        got = shown(setting.kind or setting.default)
        return f"its setting {name} should be text, a number, true or false, got {got}"
    if kind is types.NoneType and not known:
        return f"its setting {name} has neither a default nor a kind"
    return None


def matrix_method(
    summary: str,
    optimizer: type[MatrixSGD],
    *,
    cut_by: tuple[str, ...] = (),
    lr: float = 0.1,
    passes: int = 1,
    own: Mapping[str, Any] | None = None,
    docs: Mapping[str, str] | None = None,
    trials: tuple[Mapping[str, Any], ...] = (),
    **fixed: Any,
) -> Method:
    """Return the method of an optimizer: its options, but the fixed ones, are its own settings.

    Args:
        summary: what it is, in a few words.
        optimizer: a subclass of :class:`~pliant.experiments.baselines.MatrixSGD`.
        cut_by, lr, passes, docs, trials: as of :class:`Method`.
        own: settings beside the options, and other defaults of these.
        fixed: options that are no settings.
    """
    options = {name: value for name, value in optimizer.options.items() if name not in fixed}
    build = matrix_sgd(optimizer, **fixed)
    return Method(summary, build, lr, {**options, **(own or {})}, docs or {}, passes, cut_by, trials)
