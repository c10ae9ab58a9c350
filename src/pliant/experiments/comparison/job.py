"""What a comparison does and what comes of it, as plain data: it travels to other machines and into files.

A :class:`Job` is a training and what is to be measured of it; an :class:`Outcome` is what a trial came to in the search
for settings, which sees validation images only. The other measurements are records, :class:`~pliant.records.Record`.
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
    """A training and what is to be measured of it.

    Args:
        task: name of the task.
        label: name of the method in the comparison.
        trial: the settings that tell the method's trials apart.
        settings: those of the training.
        families: what to measure, by family.
        calibration: images for whitening and the BatchNorm re-estimation.
        search: whether the first measure of each family is taken on the validation images, nothing else.
        equal: what the training is granted as much of as SGD: "epochs" or "time".
        retraining: schedule by which each compressed network is trained again; empty for none.
        retraining_epochs: for how long.
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
        shown = [f"{name}={value}" for name, value in self.trial.items()]
        if self.equal == "time":
            shown.append(f"epochs={self.settings.epochs}")
        return ",".join(["-".join(parts), *shown, f"seed={self.settings.seed}"]).replace("/", "_").replace(":", "_")

    @property
    def name(self) -> str:
        """Name of the run in the records; retraining makes it another one."""
        if not self.retraining:
            return self.training
        rounds = f"x{self.retraining_rounds}" if self.retraining_rounds > 1 else ""
        return f"{self.training}+{self.retraining}{rounds}"

    def check(self, config: dict[str, Any], where: Path) -> None:
        """Raise BadInput if a result of this name was made with other settings."""
        settings = resolved(self.settings)
        free = set(PLACES)
        if settings.lr is None and config.get("turnover") is None:
            # Turnover and the length of the training decide lr: a run has that instead, the search has turnover.
            free |= {"lr", "turnover"}
        if settings.precision == "auto":
            free |= {"precision"}  # a run has what its machine is good at
        expected = {name: value for name, value in settings.to_config().items() if name not in free}
        # How it was measured, where the results tell that.
        expected |= {name: value for name, value in self._measured().items() if name in config}
        for name, value in expected.items():
            found = config.get(name)  # None, too, for a setting that did not exist yet
            if differ(name, found, value):
                raise BadInput(
                    f"{where} holds {self.training} with {name} {shown(found)}, the suite says {value!r}: "
                    "choose another --out, or remove what is there"
                )

    def _measured(self) -> dict[str, Any]:
        return {"calibration": self.calibration, "retraining_epochs": self.retraining_epochs}

    def chosen_by(self, family: str) -> dict[str, Any]:
        """Return what the area of a trial depends on beside its training and compressor, as plain data."""
        first = self.families[family][0]
        points = [list(point) for point in first.points]
        return {"allocation": first.allocation, "points": points, "calibration": self.calibration}

    def without(self, done: set[tuple[str, str, float, str]], anew: bool = False) -> Job:
        """Return the job without what is measured.

        Args:
            done: as (compressor, allocation, ratio, pattern), as records have them.
            anew: a measure of which something is missing is taken at all its points, for it will be of another network.
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
    """A trial of the search in one family: the validation curve of its network.

    Args:
        task, label, family, run: which it is.
        trial: the settings that tell the method's trials apart.
        config: all settings of the training.
        points: pairs (removed share of all parameters or of the non-zeros, validation accuracy).
        area: under that curve; None for a training that diverged.
        error: what diverged.
        compressor: what cut it, as records name it; empty in files from before this was kept.
        measure: what else the area depends on, see :meth:`Job.chosen_by`; empty in files from before this was kept.
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
        """Return the outcome that :meth:`to_dict` made ``values`` of; raises BadInput if they are none."""
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
