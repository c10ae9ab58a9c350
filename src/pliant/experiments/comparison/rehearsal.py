"""The rehearsal of a comparison: every method and measure of a suite once, for a few steps, on noise images.

It takes minutes to find what would fail after hours on a large machine: a method that does not fit a network, a
compressor that finds nothing to remove. Nothing is kept.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console

from pliant.errors import Diverged
from pliant.experiments.comparison.job import Job, Line, Outcome
from pliant.experiments.comparison.performing import perform
from pliant.experiments.comparison.suite import Entrant, Measure, Suite
from pliant.experiments.data.base import Split
from pliant.experiments.data.data_sets import data_set
from pliant.experiments.data.images import ImageData

IMAGES, BATCH = 12, 4


def rehearse(suite: Suite) -> None:
    """Train each method of each task for three steps on noise, and take each measure at one size.

    Compressors do not depend on how a network was trained: of each family only the first method is measured, the others
    are trained. Raises the errors that the comparison itself would raise.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    with tempfile.TemporaryDirectory(prefix="pliant-") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "few calibration samples")
        for task in suite.tasks:
            settings = suite.task_settings(task)
            data = noise(settings.data, settings.image_size)
            families: set[str] = set()  # of which a method was measured
            for entrant in suite.methods:
                job = _job(suite, task, entrant)
                new = {family: measures for family, measures in job.families.items() if family not in families}
                families |= set(new)
                search = dataclasses.replace(job, families=new, search=True)
                measured = [dataclasses.replace(job, families=new)] if new else []
                for part in (search, *measured, *_retrainings(suite, job)):
                    lines = _perform(part, Path(folder), data)
                    result = f"{len(lines)} measurements" if part.families else "trained"
                    console.print(f"{part.name}: {result}" + (", search" if part.search and part.families else ""))
    console.print("Everything runs; nothing is kept.")


def noise(name: str, image_size: int | None) -> ImageData:
    """Return uniform noise with the image shape and the classes of a data set; of CIFAR-10, if these are unknown."""
    row = data_set(name)
    classes, shape = row.num_classes or 10, row.shape or (3, 32, 32)
    if image_size is not None:
        shape = (shape[0], image_size, image_size)
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(count) % classes)

    names = tuple(map(str, range(classes)))
    mean = std = (0.5,) * shape[0]
    return ImageData(name, split(IMAGES), split(BATCH), split(BATCH), names, mean, std, flip=True, pad=1)


def _job(suite: Suite, task: str, entrant: Entrant) -> Job:
    settings = suite.settings(task, entrant, entrant.trials[0], suite.seeds[0])
    return Job(
        task=task,
        label=entrant.label,
        trial=entrant.trials[0],
        settings=dataclasses.replace(settings, epochs=1, batch_size=BATCH),
        families={family: tuple(map(_few, suite.families[family])) for family in entrant.families},
        calibration=BATCH,
        rounds=1,
    )


def _perform(job: Job, folder: Path, data: ImageData) -> list[Line]:
    """Return the lines of a job; raises Diverged, where a comparison would go on without that training."""
    try:
        lines = list(perform(job, folder, data))
    except Diverged as error:
        raise Diverged(f"{job.name}: {error}") from None
    for line in lines:
        if isinstance(line, Outcome) and line.area is None:
            raise Diverged(f"{job.name}: {line.error}")
    return lines


def _few(measure: Measure) -> Measure:
    return dataclasses.replace(measure, points=measure.points[:1] + measure.points[-1:])


def _retrainings(suite: Suite, job: Job) -> list[Job]:
    """Return the jobs that train again: the first schedule after each compressor, the others after one."""
    plan = suite.retraining
    if plan is None or plan.method != job.label:
        return []
    jobs = []
    for rounds in plan.rounds:
        measures = {name: tuple(map(_few, plan.measures(family, rounds))) for name, family in job.families.items()}
        families = {family: few for family, few in measures.items() if few}
        first = dict(list(families.items())[:1])
        jobs += [
            dataclasses.replace(
                job,
                families=first if index else families,
                retraining=schedule,
                retraining_epochs=1,
                retraining_rounds=rounds,
            )
            for index, schedule in enumerate(plan.schedules)
            if families
        ]
    return jobs
