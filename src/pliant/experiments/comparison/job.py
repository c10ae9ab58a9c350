"""What a comparison does, and its results, as plain data that travel to other machines and into files.

A :class:`Job` is a training and what to measure of it. An :class:`Outcome` is the result of a trial in the search for
settings, which sees validation images only. All other results are records, :class:`~pliant.records.Record`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pliant.compressor_names import CALIBRATION
from pliant.errors import BadInput, shown
from pliant.experiments.comparison.suite import Measure
from pliant.experiments.methods import resolved
from pliant.experiments.training.settings import Settings, differ
from pliant.records import Record
from pliant.reporting.curves import PLACES

ROUNDS = 5
"""How many steps are timed in each part of a training."""


@dataclass(frozen=True)
class Job:
    """A training and what to measure of it.

    Args:
        task: name of the task.
        label: name of the method in the comparison.
        trial: the settings that tell the method's trials apart.
        settings: all settings of the training.
        families: what to measure, by family.
        calibration: images for choosing what goes, whitening, the refit and the BatchNorm re-estimation.
        search: whether the first measure of each family is taken on the validation images, nothing else.
        equal: "epochs" or "time": the training has as much of it as SGD.
        retraining: schedule under which each compressed network is trained again; empty if it is not.
        retraining_epochs: how long it is trained again.
        retraining_rounds: how many times, each after a part of the compression.
        rounds: how many steps are timed in each part of the training.
    """

    task: str
    label: str
    trial: dict[str, Any]
    settings: Settings
    families: dict[str, tuple[Measure, ...]]
    calibration: int = CALIBRATION
    search: bool = False
    equal: str = "epochs"
    retraining: str = ""
    retraining_epochs: int = 0
    retraining_rounds: int = 1
    rounds: int = ROUNDS

    @property
    def training(self) -> str:
        """Name of the training's run folder."""
        parts = [part for part in (self.task, self.label) if part]
        values = [f"{name}={value}" for name, value in self.trial.items()]
        if self.equal == "time":
            values.append(f"epochs={self.settings.epochs}")
        return ",".join(["-".join(parts), *values, f"seed={self.settings.seed}"]).replace("/", "_").replace(":", "_")

    @property
    def name(self) -> str:
        """Name of the run in the records, which includes the retraining."""
        if not self.retraining:
            return self.training
        rounds = f"x{self.retraining_rounds}" if self.retraining_rounds > 1 else ""
        return f"{self.training}+{self.retraining}{rounds}"

    def check(self, config: dict[str, Any], where: Path) -> None:
        """Raise BadInput if a result of this name has other settings.

        Args:
            config: the settings of the result.
            where: its file, for the message.
        """
        settings = resolved(self.settings)
        free = set(PLACES)
        if settings.lr is None and config.get("turnover") is None:
            # lr follows from turnover and the length of the training: the config of a run has lr instead of turnover.
            free |= {"lr", "turnover"}
        if settings.precision == "auto":
            free |= {"precision"}  # the config of a run has the precision that its machine chose
        expected = {name: value for name, value in settings.to_config().items() if name not in free}
        # How it was measured, if the results say so.
        expected |= {name: value for name, value in self._measured().items() if name in config}
        for name, value in expected.items():
            before = config.get(name)  # None, too, for a setting that did not exist yet
            if differ(name, before, value):
                raise BadInput(
                    f"{where} holds {self.training} with {name} {shown(before)}, the suite says {value!r}: "
                    "choose another --out, or remove what is there"
                )

    def _measured(self) -> dict[str, Any]:
        return {"calibration": self.calibration, "retraining_epochs": self.retraining_epochs}

    def chosen_by(self, family: str) -> dict[str, Any]:
        """Return, as plain data, what the area of a trial depends on beside its training and its compressor."""
        first = self.families[family][0]
        points = [list(point) for point in first.points]
        return {"allocation": first.allocation, "points": points, "calibration": self.calibration}

    def without(self, done: set[tuple[str, str, float, str]], anew: bool = False) -> Job:
        """Return the job without the points that are measured already.

        Args:
            done: (compressor, allocation, ratio, pattern) of each, as records have them.
            anew: take a measure of which a point is missing at all its points, because it will be of another network.
        """
        families = {}
        for family, measures in self.families.items():
            rest = []
            for measure in measures:
                missing = tuple(point for point in measure.points if measure.key(*point) not in done)
                if missing:
                    rest.append(measure if anew else dataclasses.replace(measure, points=missing))
            families[family] = tuple(rest)
        return dataclasses.replace(self, families={family: rest for family, rest in families.items() if rest})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a trial in one family: the validation curve of its network.

    Args:
        task, label, family: of which task, method and family.
        run: name of the training.
        trial: the settings that tell the method's trials apart.
        config: all settings of the training.
        points: pairs (removed share of all parameters or of the non-zeros, validation accuracy).
        area: under that curve; None for a training that diverged.
        error: of a training that diverged.
        compressor: what cut the network, as records name it; empty in files of earlier versions.
        measure: what else the area depends on, see :meth:`Job.chosen_by`; empty in files of earlier versions.
    """

    task: str
    label: str
    family: str
    run: str
    trial: dict[str, Any]
    config: dict[str, Any]
    points: list[list[float]]
    area: float | None
    error: str = ""
    compressor: str = ""
    measure: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """Return the outcome of the data that :meth:`to_dict` returned; raises BadInput for other data."""
        values = {"compressor": "", "measure": {}, **values}
        kinds: dict[str, Any] = {
            **dict.fromkeys(("task", "label", "family", "run", "error", "compressor"), str),
            **dict.fromkeys(("trial", "config", "measure"), dict),
            "points": list,
            "area": float | int | None,
        }
        for name, kind in kinds.items():
            if name not in values or not isinstance(values[name], kind):
                raise BadInput(f"a trial needs {name}, got {values.get(name)!r:.60}")
        if values["area"] is not None and not 0 <= values["area"] <= 1:
            raise BadInput(f"area must be a fraction between 0 and 1, got {values['area']}")
        return cls(**{name: values[name] for name in kinds})


Line = Record | Outcome
