"""Performing a job: train what it describes, unless that is done already, and measure."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pliant.errors import Diverged
from pliant.experiments.baselines.retraining import cycles
from pliant.experiments.comparison.job import Job, Line, Outcome
from pliant.experiments.comparison.retraining import retraining
from pliant.experiments.comparison.step_cost import step_cost
from pliant.experiments.comparison.suite import Measure
from pliant.experiments.data.images import ImageData, load_data
from pliant.experiments.methods import resolved
from pliant.experiments.run_folder import Run
from pliant.experiments.train import train_run
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.settings import Settings
from pliant.experiments.workbench import Workbench
from pliant.records import Record
from pliant.reporting.area import area


def perform(job: Job, folder: Path, data: ImageData | None = None) -> Iterator[Line]:
    """Train in ``folder``/runs, unless that is done already, and yield the measurements one by one.

    A training that diverges yields an :class:`Outcome` without area for each family.

    Args:
        job: what to train and to measure.
        folder: of the comparison.
        data: the data set that the settings name, if it is in memory already, or another one in its place.
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
    shutil.rmtree((path / CHECKPOINT).parent, ignore_errors=True)  # the training is complete: it is not needed
    run = Run.open(path, data)
    yield from _search(job, run) if job.search else _measure(job, run)


def data_of(settings: Settings) -> ImageData:
    """Return the data set that the settings of a training name; the last one is kept in memory."""
    return _data(settings.data, settings.data_dir, settings.image_size)


@functools.lru_cache(maxsize=1)
def _data(name: str, data_dir: str | None, image_size: int | None) -> ImageData:
    return load_data(name, data_dir, image_size=image_size)


def _search(job: Job, run: Run) -> Iterator[Outcome]:
    """Yield the validation curve of a network in each family, by the family's first measure."""
    for family, measures in job.families.items():
        bench = _workbench(run, job, measures[0])
        points = [list(bench.validate(*point)) for point in measures[0].points]
        yield _outcome(job, family, points, area([(s, a) for s, a in points], 1 / run.data.num_classes))


def _measure(job: Job, run: Run) -> Iterator[Record]:
    """Yield the records of a network at every point of every measure, retrained if the job says so."""
    cost = step_cost(job, run.data, run.seconds)
    retrained = retraining(job, run.data, Settings.from_config(run.config)) if job.retraining else None
    extra: dict[str, Any] = {}
    if job.retraining:
        extra |= {"retraining": job.retraining, "retraining_epochs": job.retraining_epochs}
    if job.retraining_rounds > 1:
        extra |= {"retraining_rounds": job.retraining_rounds}
    for measure in (measure for measures in job.families.values() for measure in measures):
        bench = _workbench(run, job, measure)
        for point in measure.points:
            if point == (0.0, ""):
                _, _, record = bench.measure(*point)
            else:
                *before, _ = cycles(point[0], job.retraining_rounds)
                _, _, record = bench.measure(*point, retrained, before)
            config = {**record.config, **extra}
            yield dataclasses.replace(record, run=job.name, method=job.label, cost=cost, config=config)


def _workbench(run: Run, job: Job, measure: Measure) -> Workbench:
    names = ("allocation", "whiten", "scheme", "controls")
    options: dict[str, Any] = {name: getattr(measure, name) for name in names}
    return Workbench(run, measure.compressor, calibration=job.calibration, **options)


def _outcome(job: Job, family: str, points: list[list[float]], area_under: float | None, error: str = "") -> Outcome:
    return Outcome(
        task=job.task,
        label=job.label,
        family=family,
        run=job.training,
        trial=job.trial,
        config=resolved(job.settings).to_config(),
        points=points,
        area=area_under,
        error=error,
        compressor=job.families[family][0].name,
        measure=job.chosen_by(family),
    )
