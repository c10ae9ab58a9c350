"""Rehearsing a comparison: every method and measure of a suite once, for a few steps, on images made of noise.

What would fail after hours on a large machine fails here in minutes: a method that does not fit a network, a compressor
that finds nothing to remove. Nothing is kept.
"""

from __future__ import annotations

import dataclasses
import tempfile
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

    Compressors know nothing of how a network was trained: the first method of a family takes its measures, the others
    are trained. Raises whatever error the comparison itself would meet.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    with tempfile.TemporaryDirectory(prefix="pliant-") as folder:
        for task in suite.tasks:
            settings = suite.task_settings(task)
            data = noise(settings.data, settings.image_size)
            seen: set[str] = set()
            for entrant in suite.methods:
                job = _job(suite, task, entrant)
                new = {family: measures for family, measures in job.families.items() if family not in seen}
                seen |= set(new)
                search = dataclasses.replace(job, families=new, search=True)
                for one in (
                    search,
                    *([dataclasses.replace(job, families=new)] if new else []),
                    *_retrainings(suite, job),
                ):
                    lines = _performed(one, Path(folder), data)
                    outcome = f"{len(lines)} measurements" if one.families else "trained"
                    console.print(f"{one.name}: {outcome}" + (", search" if one.search and one.families else ""))
    console.print("Everything runs; nothing is kept.")


def noise(name: str, image_size: int | None) -> ImageData:
    """Return uniform noise with the image shape and the classes of a data set; if unknown, those of CIFAR-10."""
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


def _performed(job: Job, folder: Path, data: ImageData) -> list[Line]:
    """Return what a job yields; raises Diverged, where a comparison would go on without that training."""
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
    wanted = suite.retraining
    if wanted is None or wanted.method != job.label:
        return []
    retrainings = []
    for rounds in wanted.rounds:
        measures = {family: tuple(map(_few, wanted.measures(whole, rounds))) for family, whole in job.families.items()}
        families = {family: few for family, few in measures.items() if few}
        first = dict(list(families.items())[:1])
        retrainings += [
            dataclasses.replace(
                job,
                families=first if index else families,
                retraining=schedule,
                retraining_epochs=1,
                retraining_rounds=rounds,
            )
            for index, schedule in enumerate(wanted.schedules)
            if families
        ]
    return retrainings
