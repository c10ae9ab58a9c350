"""One training of a comparison and its measurements, as plain data: here, or on another machine.

:func:`perform` trains what a :class:`Job` describes, unless that is done, and yields a line for each measurement: an
:class:`Outcome` in the search for settings, which sees validation images only, or a :class:`~pliant.records.Record`.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils import benchmark

from pliant.errors import BadInput, Diverged, shown
from pliant.experiments.baselines.retraining import cycles, rates, retrain
from pliant.experiments.comparison.suites import Measure
from pliant.experiments.data.images import ImageData, load_data
from pliant.experiments.data.loader import Loader
from pliant.experiments.methods import OWN, with_defaults
from pliant.experiments.run_folder import Run
from pliant.experiments.train import CHECKPOINT, Session, differ, learning_rate, train_run
from pliant.experiments.training.onednn import sound_convolutions
from pliant.experiments.workbench import Refine, Trial
from pliant.optim.sfw import SFW
from pliant.records import CALIBRATION, Cost, Record
from pliant.reporting.area import area
from pliant.reporting.curves import PLACES

PHASES, ROUNDS = 4, 5
"""In how many parts of the training steps are timed, for k may change, and how many in each."""


@dataclass(frozen=True)
class Job:
    """A training and what is to be measured of it.

    Args:
        task: name of the task.
        label: name of the method in the comparison.
        trial: the settings that tell the method's trials apart.
        settings: all settings of the training.
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
    settings: dict[str, Any]
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
            shown.append(f"epochs={self.settings['epochs']}")
        return ",".join(["-".join(parts), *shown, f"seed={self.settings['seed']}"]).replace("/", "_").replace(":", "_")

    @property
    def name(self) -> str:
        """Name of the run in the records; retraining makes it another one."""
        if not self.retraining:
            return self.training
        rounds = f"x{self.retraining_rounds}" if self.retraining_rounds > 1 else ""
        return f"{self.training}+{self.retraining}{rounds}"

    def check(self, config: dict[str, Any], where: Path) -> None:
        """Raise BadInput if a result of this name was made with other settings."""
        settings = with_defaults(self.settings)
        # A turnover and the length of the training decide lr; a run, other than the search, has that instead.
        decided = settings["lr"] is None and config.get("turnover") is None
        free = {*PLACES, *(("lr", "turnover") if decided else ()), *(("precision",) if _is_auto(settings) else ())}
        settings = {name: value for name, value in settings.items() if name not in free}
        # How it was measured, where the results tell that.
        settings |= {name: value for name, value in self._measured().items() if name in config}
        for name, value in settings.items():
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


def _is_auto(settings: dict[str, Any]) -> bool:
    return bool(settings["precision"] == "auto")  # then a run has what its machine is good at


Line = Record | Outcome


def perform(job: Job, folder: Path, data: ImageData | None = None) -> Iterator[Line]:
    """Train in ``folder``/runs, unless that is done, and yield the measurements one by one.

    A training that diverges yields an :class:`Outcome` that says so, for each family; Diverged is raised where there is
    none. ``data`` replaces the data set that the settings name.
    """
    data = data or data_of(job.settings)
    path = folder / "runs" / job.training
    if (path / "config.yaml").exists():
        job.check(Run.open(path).config, path)
    try:
        train_run(job.settings, path, data)
    except Diverged as error:
        if not job.families:
            raise
        yield from (_outcome(job, family, [], None, str(error)) for family in job.families)
        return
    shutil.rmtree((path / CHECKPOINT).parent, ignore_errors=True)  # complete: nothing goes on from it
    run = Run.open(path, data)
    if job.search:
        for family, measures in job.families.items():
            trial = _trial(run, job, measures[0])
            points = [list(trial.validate(*point)) for point in measures[0].points]
            yield _outcome(job, family, points, area([(s, a) for s, a in points], 1 / data.num_classes))
        return
    cost = step_cost(job, data, run.seconds)
    again = _retraining(job, data, run.config) if job.retraining else None
    extra: dict[str, Any] = {}
    if job.retraining:
        extra |= {"retraining": job.retraining, "retraining_epochs": job.retraining_epochs}
    if job.retraining_rounds > 1:
        extra |= {"retraining_rounds": job.retraining_rounds}
    for measures in job.families.values():
        for measure in measures:
            trial = _trial(run, job, measure)
            for point in measure.points:
                if point == (0.0, ""):
                    _, _, record = trial.measure(*point)
                else:
                    *before, _ = cycles(point[0], job.retraining_rounds)
                    _, _, record = trial.measure(*point, again, before)
                config = {**record.config, **extra}
                yield dataclasses.replace(record, run=job.name, method=job.label, cost=cost, config=config)


def data_of(settings: dict[str, Any]) -> ImageData:
    """Return the data set that the settings of a training name; the last one is kept in memory."""
    return _data(*(settings[name] for name in ("data", "data_dir", "image_size")))


@functools.lru_cache(maxsize=1)
def _data(name: str, data_dir: str | None, image_size: int | None) -> ImageData:
    return load_data(name, data_dir, image_size=image_size)


def _trial(run: Run, job: Job, measure: Measure) -> Trial:
    options: dict[str, Any] = {name: getattr(measure, name) for name in ("allocation", "whiten", "scheme")}
    return Trial(run, measure.compressor, calibration=job.calibration, **options)


def _outcome(job: Job, family: str, points: list[list[float]], found: float | None, error: str = "") -> Outcome:
    return Outcome(
        task=job.task,
        label=job.label,
        family=family,
        run=job.training,
        trial=job.trial,
        config=with_defaults(job.settings),
        points=points,
        area=found,
        error=error,
        compressor=job.families[family][0].name,
        measure=job.chosen_by(family),
    )


# --- what a training costs --------------------------------------------------------------------------------------------


def step_cost(job: Job, data: ImageData, seconds: float) -> Cost:
    """Time steps of a method and of SGD in turns, and count what they keep in memory.

    Args:
        job: the training of the method.
        data: its data.
        seconds: what the training took.
    """
    plain = {**job.settings, **dict.fromkeys(OWN), "method": "sgd", "lr": None}
    sessions = [Session(job.settings, data), Session(plain, data)]
    steppers = [_stepper(session) for session in sessions]
    times: list[list[float]] = [[], []]
    for phase in range(PHASES):
        if sessions[0].k_schedule is not None and phase:
            for _ in range(sessions[0].steps // PHASES):
                sessions[0].k_schedule.step()
        for round_ in range(job.rounds + 1):
            for step, taken in zip(steppers, times, strict=True):
                started = benchmark.timer()  # waits for a GPU
                step()
                if round_:  # the first one allocates, and k may have changed
                    taken.append(benchmark.timer() - started)
    (step_s, step_s_sgd), (memory, memory_sgd) = map(median, times), map(_memory, sessions)
    return {
        "equal": job.equal,
        "seconds": seconds,
        "step_s": step_s,
        "step_s_sgd": step_s_sgd,
        "memory": memory,
        "memory_sgd": memory_sgd,
    }


def _stepper(session: Session) -> Callable[[], object]:
    """Return a function that takes a training step on the next images."""
    network, optimizer = session.accelerator.prepare(session.model, session.optimizer)
    network.train()
    images, labels = next(iter(session.loader))
    return lambda: session.step(network, optimizer, images, labels)


def _memory(session: Session) -> int:
    """Return the bytes of the weights, their gradients and what the optimizer keeps."""
    state = [value for entry in session.optimizer.state.values() for value in entry.values()]
    if isinstance(session.optimizer, SFW):
        state += session.optimizer.scratch
    kept = [*session.model.parameters(), *session.model.buffers(), *state]
    gradients = [p.grad for p in session.model.parameters() if p.grad is not None]
    return sum(t.nbytes for t in [*kept, *gradients] if isinstance(t, torch.Tensor))


# --- the reference that trains again ----------------------------------------------------------------------------------


def _retraining(job: Job, data: ImageData, settings: dict[str, Any]) -> Refine:
    """Return what trains a compressed network again, with the batches and the settings of its training."""

    def again(model: nn.Module, rounds_before: int) -> nn.Module:
        loader = Loader(
            data, "train", settings["batch_size"], shuffle=True, augment=settings["augment"], seed=settings["seed"]
        )
        factor = learning_rate(settings, len(loader) * settings["epochs"])
        original = [settings["lr"] * factor(step) for step in range(len(loader) * settings["epochs"])]
        lrs = rates(job.retraining, original, len(loader) * job.retraining_epochs)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            first = settings["epochs"] + rounds_before * job.retraining_epochs
            for epoch in range(first, first + job.retraining_epochs):
                loader.set_epoch(epoch)  # images shuffled as never before
                for images, labels in loader:
                    yield images.to(device), labels.to(device)

        device = next(model.parameters()).device
        # Autocast would keep the weights that it cast first until the end, and each step would see those of the first.
        half = torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16", cache_enabled=False)
        with half, sound_convolutions(model):
            retrain(model, batches(), lrs, momentum=settings["momentum"], weight_decay=settings["weight_decay"])
        return model

    return again
