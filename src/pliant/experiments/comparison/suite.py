"""Suites: what a comparison trains, searches and measures, read from YAML; those shipped are in suites/.

A suite names *tasks* (a data set and a network), *families* of compressors, and *methods*, each with the families it
takes part in and its *trials*: the settings to choose from on the validation images, equally many for every method.

    settings: {epochs: 40}                    # of pliant train, for every run
    tasks:
      digits: {data: digits, model: resnet8}  # settings of one task
    seeds: [0, 1, 2]
    families:
      rank:
        - {compressor: rank, ratios: [0, 0.5, 0.9]}               # the first one is used in the search
        - {compressor: rank, whiten: false, refit: false, ratios: [0, 0.5, 0.9]}
    methods:
      sgd: {families: [rank], trials: [{lr: 0.1}, {lr: 0.05}]}
      ours: {method: sfw-rank, families: [rank], trials: {k: [0.1, 0.2]}}   # a mapping of lists is a grid
    retraining: {method: sgd, schedules: [LLR], epochs: 5, ratios: [0.5, 0.9], rounds: [1]}
    equal: [epochs, time]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pliant.compression.by_name import allocation_of, check_names
from pliant.compressor_names import CALIBRATION, record_name, resolve_scheme, takes_pattern
from pliant.errors import BadInput, DamagedFile, check_choice, shown, unknown
from pliant.experiments.baselines.retraining import SCHEDULES
from pliant.experiments.controls import AUTO, choice_of, controls_of
from pliant.experiments.methods import METHODS, Method, find_method, resolved, settings_from
from pliant.experiments.sweep import parse_ratios
from pliant.experiments.training.settings import SETTINGS, Settings
from pliant.experiments.workbench import pattern_compressor
from pliant.extensions import names

SHIPPED = Path(__file__).parent / "suites"
EQUAL = ("epochs", "time")
# The comparison decides these, so no setting may.
_RESERVED = ("seed", "method")
_CONTROLS = ("multiple_of", "keep", "at_least", "at_most", "layer_ratios")


@dataclass(frozen=True)
class Measure:
    """A compressor and the sizes at which networks are measured under it.

    Args:
        compressor: its name, as in the shell.
        points: pairs (ratio, pattern); the dense network is (0, "").
        allocation, whiten, scheme: options of the compressor.
        controls: what every layer keeps, as :func:`~pliant.experiments.controls.controls_of` returns it.
        refit, importance: whether the weights that are left are refitted, and how the compressor chooses what goes.
    """

    compressor: str
    points: tuple[tuple[float, str], ...]
    allocation: str = "global"
    whiten: bool = True
    scheme: str | None = None
    controls: Mapping[str, Any] = field(default_factory=dict)
    refit: bool = True
    importance: str = AUTO

    @property
    def name(self) -> str:
        """The compressor with its variant, as records name it."""
        choice = choice_of(self.compressor, self.importance)
        return record_name(self.compressor, self.whiten, self.scheme, self.controls, choice=choice, refit=self.refit)

    def key(self, ratio: float, pattern: str) -> tuple[str, str, float, str]:
        """Return the key that identifies the record of a point among the records of a run."""
        return (
            self.name,
            allocation_of(self.compressor, self.allocation),
            0.0 if pattern else round(ratio, 6),
            pattern,
        )


@dataclass(frozen=True)
class Entrant:
    """A method as it takes part in a comparison.

    Args:
        label: its name in the comparison.
        method: its name: one of :data:`~pliant.experiments.methods.METHODS`, or of another package.
        families: names of the suite's families that it is measured in.
        trials: settings to choose from, in addition to those of the suite and the task.
    """

    label: str
    method: str
    families: tuple[str, ...]
    trials: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Retraining:
    """The references that may train again: networks of one method, compressed, then retrained.

    Compression and training take one round; if weights become zeros also several, those of ``rounds``: iterative
    magnitude pruning. What goes is chosen by norms, and the training takes the place of the refit; the records are
    named after the family's first measure all the same, beside which they are shown.
    """

    method: str
    schedules: tuple[str, ...]
    epochs: int
    ratios: tuple[float, ...]
    rounds: tuple[int, ...] = (1,)

    def measures(self, family: tuple[Measure, ...], rounds: int = 1) -> tuple[Measure, ...]:
        """Return the first measure of a family at the ratios of the retraining; none if it takes no such ratios."""
        compressor = family[0].compressor
        if takes_pattern(compressor) or (rounds > 1 and compressor != "weights"):
            return ()
        points = tuple((ratio, "") for ratio in self.ratios)
        return (dataclasses.replace(family[0], points=points),)

    def check(self, epochs: int) -> None:
        """Raise BadInput if a schedule goes back further than a training of ``epochs`` epochs is long."""
        if "LRW" in self.schedules and self.epochs > epochs:
            raise BadInput(
                f"retraining.epochs: LRW goes back at most the {epochs} epochs of the training, got {self.epochs}"
            )


@dataclass(frozen=True)
class Suite:
    """A comparison to make; :meth:`open` reads and checks one."""

    name: str
    text: str
    """The YAML that it was read from."""
    tasks: dict[str, dict[str, Any]]
    """The settings that the suite and a task name, by the name of the task; all but method and seed."""
    seeds: tuple[int, ...]
    families: dict[str, tuple[Measure, ...]]
    methods: tuple[Entrant, ...]
    retraining: Retraining | None = None
    equal: tuple[str, ...] = ("epochs",)
    calibration: int = CALIBRATION
    joined: tuple[str, ...] = ()
    """Labels of the methods that joined the comparison, in addition to those that its suite names."""

    @classmethod
    def open(cls, name: str | Path) -> Suite:
        """Read a suite: a path, or the name of a shipped one.

        Raises:
            DamagedFile: there is no such file, or it is not YAML.
            BadInput: a name in it is unknown, a value is out of range, or its methods have unequal numbers of trials.
        """
        path = Path(name)
        shipped = SHIPPED / f"{name}.yaml"
        if path.suffix not in (".yaml", ".yml"):
            if not shipped.is_file():
                raise unknown("suite", str(name), [file.stem for file in SHIPPED.glob("*.yaml")])
            path = shipped
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DamagedFile(f"{path}: expected a suite, got {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{path} is damaged: {' '.join(str(error).split())}") from None
        try:
            return dataclasses.replace(cls.from_dict(path.stem, content), text=text)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, name: str, content: object) -> Suite:
        """Return the suite that plain data describe; raise BadInput as :meth:`open` does."""
        suite = _mapping("a suite", content, _SUITE)
        common = _settings("settings", suite.get("settings", {}))
        tasks = {
            _name("task", task): {**common, **_settings(f"tasks.{task}", own)}
            for task, own in _mapping("tasks", suite.get("tasks", {"": {}})).items()
        }
        families = {
            _name("family", family): tuple(_measure(f"families.{family}", entry) for entry in _list(family, entries))
            for family, entries in _mapping("families", suite["families"]).items()
        }
        methods = tuple(
            _entrant(label, entry, families) for label, entry in _mapping("methods", suite["methods"]).items()
        )
        result = cls(
            name=name,
            text=yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
            tasks=tasks,
            seeds=tuple(_integers("seeds", suite.get("seeds", [0, 1, 2]))),
            families=families,
            methods=methods,
            retraining=_retraining(suite.get("retraining"), methods),
            equal=tuple(_list("equal", suite.get("equal", ["epochs"]))),
            calibration=suite.get("calibration", CALIBRATION),
            joined=_joined(suite.get("joined", []), methods),
        )
        result._check()
        return result

    def _check(self) -> None:
        counts = {entrant.label: len(entrant.trials) for entrant in self.methods}
        if len(set(counts.values())) != 1:
            numbers = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise BadInput(f"a fair comparison gives every method the same number of trials; here: {numbers}")
        for value in self.equal:
            check_choice("equal", value, EQUAL)
        if self.equal[:1] != ("epochs",):
            raise BadInput("equal starts with epochs: the time of a step is measured in those runs")
        if type(self.calibration) is not int or self.calibration < 2:
            raise BadInput(f"calibration must be at least 2 images, got {shown(self.calibration)}")
        pairs = list(itertools.product(self.tasks, self.methods))
        if len({f"{task}-{entrant.label}".replace(":", "_") for task, entrant in pairs}) < len(pairs):
            raise BadInput("two pairs of a task and a method have the same name, TASK-METHOD: rename a task")
        for task, entrant in pairs:
            for trial in entrant.trials:
                try:
                    settings = resolved(self.settings(task, entrant, trial, self.seeds[0]))
                except BadInput as error:
                    raise BadInput(f"methods.{entrant.label}: {error}") from None
                if self.retraining is not None and self.retraining.method == entrant.label:
                    self.retraining.check(settings.epochs)

    def settings(self, task: str, entrant: Entrant, trial: Mapping[str, Any], seed: int) -> Settings:
        """Return the settings of one training."""
        return settings_from({**self.tasks[task], **trial, "method": entrant.method, "seed": seed})

    def task_settings(self, task: str) -> Settings:
        """Return the settings of a task, which name its data set and its network."""
        return settings_from(self.tasks[task])


_SUITE = {
    "settings": False,
    "tasks": False,
    "seeds": False,
    "families": True,
    "methods": True,
    "retraining": False,
    "equal": False,
    "calibration": False,
    "joined": False,
}


def _entrant(label: str, entry: object, families: Mapping[str, object]) -> Entrant:
    where = f"methods.{label}"
    fields = _mapping(where, entry, {"method": False, "families": True, "trials": False})
    method = str(fields.get("method", label))
    own = _method(where, method).others
    measured_in = tuple(_list(f"{where}.families", fields["families"]))
    for family in measured_in:
        check_choice(f"family of {where}", family, tuple(families))
    trials = fields.get("trials", [{}])
    if isinstance(trials, dict):
        values = [_list(f"{where}.trials.{name}", options) for name, options in trials.items()]
        trials = [dict(zip(trials, combination, strict=True)) for combination in itertools.product(*values)]
    checked = tuple(_settings(f"{where}.trials", trial, own) for trial in _list(f"{where}.trials", trials))
    if any(trial in checked[:i] for i, trial in enumerate(checked)):
        raise BadInput(f"{where}.trials holds the same settings twice")
    return Entrant(_name("method", label, also=":"), method, measured_in, checked)


def _method(where: str, name: str) -> Method:
    """Return a method; raise a BadInput that says where it is named if there is none."""
    if name not in METHODS and ":" not in name and name not in (known := names("method", METHODS)):
        raise unknown(f"method of {where}", name, known)
    try:
        return find_method(name)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _measure(where: str, entry: object) -> Measure:
    optional = ("ratios", "patterns", "allocation", "whiten", "scheme", "refit", "importance", *_CONTROLS)
    fields = _mapping(where, entry, {"compressor": True, **dict.fromkeys(optional, False)})
    compressor = fields["compressor"]
    if not isinstance(compressor, str):
        raise BadInput(f"{where}: a compressor is text, got {shown(compressor)}")
    allocation = fields.get("allocation", "global")
    check_names(compressor, allocation)
    scheme = resolve_scheme(compressor, fields.get("scheme"))
    switches = {name: fields.get(name, True) for name in ("whiten", "refit")}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise BadInput(f"{where}.{name} is true or false, got {shown(value)}")
    importance = fields.get("importance", AUTO)
    if not isinstance(importance, str):
        raise BadInput(f"{where}.importance is text, got {shown(importance)}")
    try:
        choice_of(compressor, importance)
        controls = controls_of(compressor, **{name: fields[name] for name in _CONTROLS if name in fields})
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    patterned = takes_pattern(compressor)
    if patterned == ("ratios" in fields) or patterned != ("patterns" in fields):
        raise BadInput(f"{where}: nm takes patterns, such as ['2:4'], every other compressor ratios")
    if patterned:
        patterns = _list(f"{where}.patterns", fields["patterns"])
        for pattern in patterns:
            pattern_compressor(str(pattern))
        points = [(0.0, ""), *((0.0, str(pattern)) for pattern in patterns)]
    else:
        points = [(ratio, "") for ratio in parse_ratios(_list(f"{where}.ratios", fields["ratios"]))]
        if points[0][0] != 0:
            raise BadInput(f"{where}.ratios starts with 0, the dense network")
    return Measure(
        compressor,
        tuple(points),
        allocation,
        scheme=scheme,
        controls=controls,
        importance=importance,
        **switches,
    )


def _retraining(entry: object, methods: tuple[Entrant, ...]) -> Retraining | None:
    if entry is None:
        return None
    known = {"method": True, "schedules": True, "epochs": True, "ratios": True, "rounds": False}
    fields = _mapping("retraining", entry, known)
    check_choice("method of retraining", fields["method"], tuple(entrant.label for entrant in methods))
    schedules = tuple(_list("retraining.schedules", fields["schedules"]))
    for schedule in schedules:
        check_choice("schedule of retraining", schedule, SCHEDULES)
    epochs = fields["epochs"]
    if type(epochs) is not int or epochs < 1:
        raise BadInput(f"retraining.epochs must be an integer of at least 1, got {shown(epochs)}")
    ratios = tuple(parse_ratios([0, *_list("retraining.ratios", fields["ratios"])]))
    rounds = tuple(_list("retraining.rounds", fields.get("rounds", [1])))
    if any(type(count) is not int or count < 1 for count in rounds):
        raise BadInput(f"retraining.rounds must be integers of at least 1, got {shown(list(rounds))}")
    return Retraining(fields["method"], schedules, epochs, ratios, rounds)


def _joined(labels: object, methods: tuple[Entrant, ...]) -> tuple[str, ...]:
    if not isinstance(labels, list):
        raise BadInput(f"expected a list of methods for joined, got {labels!r:.60}")
    for label in labels:
        check_choice("method in joined", label, tuple(entrant.label for entrant in methods))
    return tuple(labels)


def _settings(where: str, value: object, own: Collection[str] = ()) -> dict[str, Any]:
    """Return settings by name; ``own`` names the settings that only one method has."""
    settings = _mapping(where, value)
    for name in settings:
        if name in _RESERVED:
            raise BadInput(f"{where} may not set {name}: the comparison does")
        if name not in SETTINGS and name not in own:
            raise unknown(f"setting in {where}", str(name), [*SETTINGS, *own])
    return settings


def _mapping(where: str, value: object, known: Mapping[str, bool] | None = None) -> dict[str, Any]:
    """Return a mapping; ``known`` has the names that it may have, and whether it must."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise BadInput(f"expected names and values for {where}, got {value!r:.60}")
    if known is not None:
        for name in value:
            if name not in known:
                raise unknown(f"entry of {where}", name, known)
        if missing := [name for name, required in known.items() if required and name not in value]:
            raise BadInput(f"{where} lacks {', '.join(missing)}")
    return value


def _list(where: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadInput(f"expected a list of at least one entry for {where}, got {value!r:.60}")
    return value


def _integers(where: str, value: object) -> list[int]:
    numbers = _list(where, value)
    if any(type(number) is not int or number < 0 for number in numbers) or len(set(numbers)) < len(numbers):
        raise BadInput(f"{where} are different integers of at least 0, got {value!r:.60}")
    return numbers


def _name(kind: str, name: str, also: str = "") -> str:
    """Return a name that may be part of a folder's name; ``also`` lists characters that are replaced there."""
    if name and not all(letter.isalnum() or letter in f"-_.{also}" for letter in name):
        raise BadInput(f"the name of a {kind} has letters, digits, '-', '_' and '.' only, got {shown(name)}")
    return name
