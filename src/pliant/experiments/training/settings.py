"""The settings of a training: one schema for ``pliant train``, suites, run folders and the documentation.

:class:`Settings` holds what was asked for; the method decides what is None. :class:`Resolved` holds what a training
runs with: :func:`pliant.experiments.methods.resolved` puts the method's own values in the place of None.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pliant.compressor_names import SCHEMES, parse_pattern
from pliant.constraints import check_k
from pliant.errors import BadInput, unknown
from pliant.experiments.data.data_sets import DATA_SETS
from pliant.experiments.models import MODELS
from pliant.experiments.training.schedules import SCHEDULES
from pliant.experiments.training.trackers import tracker_names
from pliant.extensions import find, names
from pliant.norms import VectorNorm, is_norm
from pliant.optim import RESCALES as RESCALES_OF_SFW

RESCALES = tuple("none" if rescale is None else rescale for rescale in RESCALES_OF_SFW)
VERTICES = ("support", "sparse", "orthogonal")
RECIPES = ("default", "gradient", "paper")

Rule = Callable[[str, Any], None]
"""A function of the name and the value of a setting, not None, that raises BadInput for a value out of range."""


# --- one setting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting: its kind, its range, what it is for.

    Args:
        default: its value if none is given.
        doc: what it is, for the help of its flag.
        kind: its type, such as ``int | None``; None is the type of the default.
        rule: raises BadInput for a value that is out of range.
        group: the title under which it is listed.
    """

    default: Any
    doc: str = ""
    kind: Any = None
    rule: Rule | None = None
    group: str = "method"

    def check(self, name: str, value: Any) -> None:
        """Raise BadInput unless the value is of the right kind and in range."""
        kind = type(self.default) if self.kind is None else self.kind
        kinds = typing.get_args(kind) or (kind,)
        number = float in kinds and isinstance(value, int) and not isinstance(value, bool)
        if type(value) not in kinds and not number:
            names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
            raise BadInput(f"--{name} expects {names}, got {value!r}")
        if self.rule is not None and value is not None:
            self.rule(name, value)


def differ(name: str, one: object, other: object) -> bool:
    """Return whether two values of a setting differ: 1 and 1.0 are different k, a count and a share."""
    return one != other or (name in ("k", "k_start") and type(one) is not type(other))


# --- ranges -----------------------------------------------------------------------------------------------------------


def in_range(text: str, holds: Callable[[Any], bool]) -> Rule:
    """Return the rule that a value must satisfy; ``text`` states it, such as "must be positive"."""

    def rule(name: str, value: Any) -> None:
        if not holds(value):
            raise BadInput(f"--{name} {text}, got {value}")

    return rule


def at_least(least: int) -> Rule:
    """Return the rule of a count with a lower bound."""
    return in_range(f"must be at least {least}", lambda value: value >= least)


def from_number(least: int) -> Rule:
    """Return the rule of a finite number with a lower bound."""
    return in_range(f"must be >= {least} and finite", lambda value: value >= least and math.isfinite(value))


def one_of(known: Collection[str]) -> Rule:
    """Return the rule of a name that must be one of those known."""

    def rule(name: str, value: Any) -> None:
        if value not in known:
            raise unknown(name, value, known)

    return rule


POSITIVE = in_range("must be positive and finite", lambda value: value > 0 and math.isfinite(value))
SHARE = in_range("must lie in [0, 1)", lambda value: 0 <= value < 1)
SEED = in_range("must be an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)


def _check_k(name: str, value: Any) -> None:
    try:
        check_k(value)
    except BadInput as error:
        raise BadInput(f"--{name}: {error}") from None


def _check_pattern(_: str, value: Any) -> None:
    parse_pattern(value)


def vertices_of(name: str) -> Any:
    """Return the argument ``vertices`` of presets: one of :data:`VERTICES`, or a norm class of another package.

    Raises:
        BadInput: the name is neither.
    """
    if name in VERTICES:
        return name
    if ":" not in name and name not in (known := names("norm", dict.fromkeys(VERTICES))):
        raise unknown("vertices", name, known)
    try:
        return find("norm", name, {}, _norm_fault)
    except BadInput as error:
        raise BadInput(f"--vertices: {error}") from None


def has_k(vertices: str) -> bool:
    """Return whether the norm of vertices of this kind has a k."""
    return vertices in VERTICES or "k" in inspect.signature(vertices_of(vertices)).parameters


def _norm_fault(thing: Any) -> str | None:
    if fault := is_norm(thing):
        return fault
    if not issubclass(thing, VectorNorm):
        return f"expected a norm of vectors, a subclass of VectorNorm, got {thing.__name__}"
    needed = [name for name, p in inspect.signature(thing).parameters.items() if p.default is p.empty and name != "k"]
    return f"{thing.__name__} can be made with k alone, but needs {', '.join(needed)}" if needed else None


def _check_vertices(_: str, value: Any) -> None:
    vertices_of(value)


def _check_tracker(_: str, value: Any) -> None:
    tracker_names(value)


# --- the schema -------------------------------------------------------------------------------------------------------


def _in(group: str) -> Callable[..., Any]:
    """Return a function that makes the fields of a group."""

    def make(default: Any, doc: str, rule: Rule | None = None) -> Any:
        return field(default=default, metadata={"doc": doc, "rule": rule, "group": group})

    return make


_data, _network, _method, _schedule, _machine = map(_in, ("data", "network", "method", "schedule", "machine"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a training, checked: ``SETTINGS`` in the same module says what each of them is.

    Those of the group "method" belong to some methods only. None in one of them, and in ``lr``, is the method's own
    value.

    Args:
        others: settings that only this method has, by name.

    Raises:
        BadInput: a value is of the wrong kind or out of range.
    """

    data: str = _data("digits", f"{', '.join(DATA_SETS)} or package.module:name.")
    data_dir: str | None = _data(None, "folder of the data files; digits needs none.")
    image_size: int | None = _data(None, "resize all images to this many pixels a side.")
    model: str = _network("resnet8", f"{', '.join(MODELS)} or package.module:callable.")
    width: float = _network(1.0, "factor on all channel counts.", POSITIVE)
    method: str = _method(
        "sgd",
        "how the network is trained: one of those listed; if given, this help also lists the method's own settings.",
    )
    recipe: str | None = _method(
        None,
        "default; gradient for steps as long as SGD's with a constant k; or paper, the same with balls on all "
        "parameters.",
        one_of(RECIPES),
    )
    k: int | float | None = _method(
        None,
        "filters, singular directions or weights per layer that one step may use: 3 is a count, 0.1 a share.",
        _check_k,
    )
    radius: float | None = _method(None, "size of the balls, relative to the weights at initialisation.", POSITIVE)
    vertices: str | None = _method(
        None,
        "the kind of the balls: support, sparse, orthogonal (sfw-filters), or a norm of vectors as "
        "package.module:Class.",
        _check_vertices,
    )
    scheme: str | None = _method(
        None,
        "how the balls read the weight of a convolution as a matrix, for the layers channel (k×k then 1×1; also "
        "without it) or spatial (k×1 then 1×k); either can be compressed in both ways.",
        one_of(SCHEMES),
    )
    coupled: bool | None = _method(
        None, "one ball for everything that leaves with a channel: tied filters, biases, normalisations."
    )
    turnover: float | None = _method(
        None,
        "how many times the training replaces the weights, instead of lr: the sum of its step sizes; needs rescale "
        "none.",
        POSITIVE,
    )
    rescale: str | None = _method(
        None, "what multiplies lr: gradient, fast-gradient, diameter or none.", one_of(RESCALES)
    )
    pattern: str | None = _method(None, "N:M, such as 2:4.", _check_pattern)
    k_start: int | float | None = _method(None, "anneal k from here down to k; without it, k is constant.", _check_k)
    anneal: float | None = _method(
        None,
        "share of the training over which k goes from k_start to k.",
        in_range("must lie in (0, 1]", lambda value: 0 < value <= 1),
    )
    strength: float | None = _method(
        None, "factor of the penalty, threshold, decay or perturbation that the method adds to SGD.", from_number(0)
    )
    every: int | None = _method(None, "steps between two decompositions or thresholds.", at_least(1))
    persistence: float | None = _method(
        None,
        "power of a filter's own length in the choice of the filters of a vertex: how much the filters that are there "
        "count; needs rescale none.",
        from_number(0),
    )
    energy: float | None = _method(None, "share of the sum of squared singular values that may be left out.", SHARE)
    factors: int | None = _method(None, "how many matrices are multiplied for a weight.", at_least(2))
    condition: float | None = _method(None, "largest ratio of the singular values of a weight.", from_number(1))
    other_lr: float | None = _method(
        None, "learning rate of the parameters that have no ball or direction of their own; without it, lr.", POSITIVE
    )
    epochs: int = _schedule(30, "passes over the training images.", at_least(1))
    batch_size: int = _schedule(128, "images per step.", at_least(1))
    accumulate: int = _machine(1, "compute each batch in this many parts, to save memory.", at_least(1))
    lr: float | None = _schedule(None, "largest learning rate; without it, the method's own.", POSITIVE)
    schedule: str = _schedule(
        "cosine", "how the learning rate falls after the warm-up: cosine, linear, step or constant.", one_of(SCHEDULES)
    )
    warmup: float = _schedule(0.05, "share of the training during which lr rises linearly.", SHARE)
    momentum: float = _schedule(0.9, "momentum of all methods.", SHARE)
    weight_decay: float = _schedule(
        5e-4,
        "decay of all weights, except those with a ball and those that move along a direction of their own.",
        from_number(0),
    )
    augment: bool = _data(True, "random crops, and flips where the data set allows them.")
    precision: str = _machine("auto", "fp32, bf16, fp16 (autocast), or auto: bf16 where the hardware has it.")
    channels_last: bool = _machine(True, "memory format of the network and the images.")
    seed: int = _schedule(0, "seed of the initialisation, the order of the images and the augmentation.", SEED)
    deterministic: bool = _machine(
        False,
        "refuse operations whose result may differ from run to run on the same machine; without it, some on a GPU do.",
    )
    checkpoint_steps: int | None = _machine(
        None, "also write a checkpoint after this many steps within an epoch, for long epochs.", at_least(1)
    )
    tracker: str | None = _machine(
        None,
        "where to log besides RUN/train.jsonl: tensorboard, wandb, mlflow, trackio, or several with commas.",
        _check_tracker,
    )
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            setting.check(name, getattr(self, name))

    def __getitem__(self, name: str) -> Any:
        """Return the value of any setting, by name."""
        return getattr(self, name) if name in SETTINGS else self.others[name]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], others: Collection[str] = ()) -> Settings:
        """Return the settings of a run; those that did not exist when it was made have their defaults.

        Args:
            config: what :meth:`to_config` returned, or an earlier version.
            others: names of the settings that only the run's method has.

        Raises:
            BadInput: a value is of the wrong kind or out of range.
        """
        known = {name: config[name] for name in SETTINGS if name in config}
        return cls(**known, others={name: config[name] for name in others if name in config})

    def by(self, method: str) -> Settings:
        """Return the settings of the same training by another method, with that method's own settings."""
        unset: dict[str, Any] = dict.fromkeys(OWN)
        return dataclasses.replace(self, method=method, lr=None, others={}, **unset)

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data, in the order of run folders."""
        return {**{name: getattr(self, name) for name in SETTINGS}, **self.others}


def _settings() -> dict[str, Setting]:
    kinds = typing.get_type_hints(Settings)
    return {
        f.name: Setting(f.default, kind=kinds[f.name], **f.metadata)
        for f in dataclasses.fields(Settings)
        if f.name != "others"
    }


SETTINGS = _settings()
"""Every setting, by name, in the order of run folders."""
OWN = tuple(name for name, setting in SETTINGS.items() if setting.group == "method" and name != "method")
"""The settings that only some methods have."""


class Resolved(Settings):
    """Settings with the method's own values in the place of None.

    The annotations below hold for settings that the method has. ``lr`` stays None if it follows from ``turnover`` and
    the length of the training.
    """

    k: Any  # None if the pattern N:M decides it
    radius: float
    turnover: float  # if lr is None
    vertices: Any
    rescale: Any
    pattern: str
    anneal: float
    strength: Any  # None for no soft threshold
    factors: int
    condition: float
