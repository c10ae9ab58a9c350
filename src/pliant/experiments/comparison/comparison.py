"""A comparison: a suite, and a folder with its results so far.

For every task and method of the suite: train all trials, choose for each family the one with the largest area under its
validation curve, train that with every seed, measure. Complete results are kept: a comparison that was stopped, or
whose suite has grown, goes on.

FOLDER/suite.yaml    the suite
       trials.jsonl  one line per trial and family: the settings, the validation curve and its area
       records.jsonl the measurements of the chosen settings, for `pliant report`; records.jsonl.gz if packed
       runs/         the trainings
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pliant.compressor_names import record_name
from pliant.errors import BadInput, shown
from pliant.experiments.comparison.job import Job, Line, Outcome
from pliant.experiments.comparison.joining import SUITE
from pliant.experiments.comparison.suite import Entrant, Suite
from pliant.experiments.comparison.workers import Performer
from pliant.experiments.sweep import describe
from pliant.files import sha256, write_text
from pliant.jsonl import append_line, read_lines
from pliant.records import Record, append_record, read_records, records_file
from pliant.reporting.curves import TIME_SLACK, step_ratio
from pliant.reporting.grouping import grouped
from pliant.storage import WEIGHTS

TRIALS = "trials.jsonl"


class Comparison:
    """A suite and its results so far.

    Args:
        suite: what to compare.
        folder: of the comparison.
        performer: performs jobs and gives their lines, in any order.
    """

    def __init__(self, suite: Suite, folder: Path, performer: Performer) -> None:
        self.suite = suite
        self.folder = folder
        self.performer = performer
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        trials = folder / TRIALS
        self.trials = read_lines(trials, Outcome.from_dict, "trials") if trials.exists() else []
        self.records_file = records_file(folder)
        self.records = read_records(self.records_file) if self.records_file.exists() else []

    def run(self) -> None:
        """Do what is missing: the search, then the chosen trials with every seed, then what depends on them."""
        search = [job for job in self._search() if not self._searched(job)]
        self._missing(self._wanted())  # raises for other measurements, before anything is written or trained
        write_text(self.folder / SUITE, self.suite.text)
        self._perform("search", search)
        self._perform("seeds", self._missing(job for seed in self.suite.seeds for job in self._chosen(seed)))
        self._perform("retraining", self._missing(self._retrainings()))
        if "time" in self.suite.equal:
            self._perform("equal time", self._missing(self._equal_time()))

    def current(self) -> list[Record]:
        """Return the records that the suite asks for now.

        If another trial was chosen before the suite grew, its records stay in the file. In a report beside those of the
        present choice, test images would decide between the two.
        """
        wanted = {job.name for job in self._wanted()}
        latest = {record.key(): record for record in self.records if record.run in wanted}
        return list(latest.values())

    def diverged(self) -> list[str]:
        """Return sentences that name what the records lack because it diverged; none if nothing did."""
        runs = dict.fromkeys(outcome.run for outcome in self.trials if outcome.area is None)
        wanted = {job.training for job in self._wanted()}
        lost = [run for run in runs if run in wanted]
        tried = [run for run in runs if run not in wanted]
        sentences = []
        if lost:
            sentences.append(f"Diverged, so that the means are of the other seeds: {'; '.join(lost)}.")
        if tried:
            sentences.append(f"Diverged in the search: {'; '.join(tried)}.")
        return sentences

    def _wanted(self) -> Iterator[Job]:
        for seed in self.suite.seeds:
            yield from self._chosen(seed)
        yield from self._retrainings()
        if "time" in self.suite.equal:
            yield from self._equal_time()

    # --- jobs ---

    def _search(self) -> Iterator[Job]:
        for task, entrant in itertools.product(self.suite.tasks, self.suite.methods):
            yield from self._trials_of(task, entrant)

    def _trials_of(self, task: str, entrant: Entrant) -> Iterator[Job]:
        for trial in entrant.trials:
            yield self._job(task, entrant, trial, self.suite.seeds[0], entrant.families, search=True)

    def _chosen(self, seed: int) -> Iterator[Job]:
        """Yield the runs of the best trials; a single run for all families with the same best trial."""
        for task in self.suite.tasks:
            for entrant in self.suite.methods:
                best = {family: self._best(task, entrant, family) for family in entrant.families}
                for trial in entrant.trials:
                    families = tuple(family for family, chosen in best.items() if chosen == trial)
                    if families:
                        yield self._job(task, entrant, trial, seed, families)

    def _retrainings(self) -> Iterator[Job]:
        """Yield the jobs of the reference with retraining, under each schedule, at the sizes that the suite names."""
        plan = self.suite.retraining
        if plan is None:
            return
        for job in (job for seed in self.suite.seeds for job in self._chosen(seed) if job.label == plan.method):
            for rounds, schedule in itertools.product(plan.rounds, plan.schedules):
                families = {name: plan.measures(family, rounds) for name, family in job.families.items()}
                yield dataclasses.replace(
                    job,
                    families=families,
                    retraining=schedule,
                    retraining_epochs=plan.epochs,
                    retraining_rounds=rounds,
                )

    def _equal_time(self) -> Iterator[Job]:
        """Yield runs of fewer epochs for the methods whose steps take longer than SGD's.

        They have as many epochs as fit into SGD's time and TIME_SLACK. Once a seed has been measured, the others take
        its number of epochs, because the times of steps are never quite the same.
        """
        for seed in self.suite.seeds:
            for job in self._chosen(seed):
                ratio = self._step_ratio(job)
                if ratio is not None and ratio > TIME_SLACK:
                    allowed = max(1, int(TIME_SLACK * job.settings.epochs / ratio))
                    yield _shortened(job, self._epochs_in_time(job) or allowed)

    def _job(
        self,
        task: str,
        entrant: Entrant,
        trial: dict[str, Any],
        seed: int,
        families: tuple[str, ...],
        search: bool = False,
    ) -> Job:
        return Job(
            task=task,
            label=entrant.label,
            trial=trial,
            settings=self.suite.settings(task, entrant, trial, seed),
            families={family: self.suite.families[family] for family in families},
            calibration=self.suite.calibration,
            search=search,
        )

    # --- results so far ---

    def _searched(self, job: Job) -> bool:
        """Return whether all families of a trial have their outcome."""
        outcomes = [outcome for outcome in self.trials if outcome.run == job.training]
        for outcome in outcomes:
            job.check(outcome.config, self.folder / TRIALS)
            if outcome.family in job.families:
                self._check_measure(outcome, job)
        return {outcome.family for outcome in outcomes} >= set(job.families)

    def _check_measure(self, outcome: Outcome, job: Job) -> None:
        """Raise BadInput if the search used another measure than the one that is now the first of the family."""
        first = job.families[outcome.family][0]
        # Files without the name are from before there was another scheme, a choice by data or a refit.
        oldest = record_name(first.compressor, first.whiten, first.scheme and "channel", first.controls)
        compressor = outcome.compressor or oldest
        measure = {"compressor": compressor, **outcome.measure}
        for name, now in {"compressor": first.name, **job.chosen_by(outcome.family)}.items():
            before = measure.get(name, now)  # files of earlier versions do not have everything
            if before != now:
                raise BadInput(
                    f"{self.folder / TRIALS} has chosen {outcome.label} with {name} {shown(before)}, the first measure "
                    f"of family {outcome.family} has {shown(now)} now: choose another --out, or remove what is there"
                )

    def _missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs with missing measurements, without those that exist."""
        diverged = {outcome.run for outcome in self.trials if outcome.area is None}
        measured = grouped(self.records, lambda record: record.run)
        missing = []
        for job in jobs:
            done = measured.get(job.name, [])
            for record in done:
                job.check(record.config, self.records_file)
            keys = {(r.compressor, r.allocation, 0.0 if r.pattern else round(r.ratio, 6), r.pattern) for r in done}
            rest = job.without(keys)
            if rest.families and job.training not in diverged:
                missing.append(rest if self._is_here(job, done) else job.without(keys, anew=True))
        return missing

    def _is_here(self, job: Job, done: list[Record]) -> bool:
        """Return whether the network of the records is in the folder; if not, it is trained again."""
        path = self.folder / "runs" / job.training
        return (path / WEIGHTS).exists() and {record.weights for record in done} <= {sha256(path / WEIGHTS)}

    def _best(self, task: str, entrant: Entrant, family: str) -> dict[str, Any] | None:
        """Return the trial with the largest area under its validation curve; None if all diverged."""
        jobs = {job.training: job for job in self._trials_of(task, entrant)}
        areas = {
            outcome.run: outcome.area
            for outcome in self.trials
            if outcome.run in jobs and outcome.family == family and outcome.area is not None
        }
        return jobs[max(areas, key=lambda run: areas[run])].trial if areas else None

    def _step_ratio(self, job: Job) -> float | None:
        """Return the time of a step relative to SGD's, over all seeds; None if it was not measured."""
        runs = {run.name for run in self._of_all_seeds(job)}
        return step_ratio(record for record in self.records if record.run in runs)

    def _epochs_in_time(self, job: Job) -> int | None:
        """Return how many epochs the runs at equal time have that were measured; None if there are none."""
        lengths = range(1, job.settings.epochs + 1)
        names = {_shortened(run, epochs).name: epochs for run in self._of_all_seeds(job) for epochs in lengths}
        return next((names[record.run] for record in self.records if record.run in names), None)

    def _of_all_seeds(self, job: Job) -> list[Job]:
        return [
            dataclasses.replace(job, settings=dataclasses.replace(job.settings, seed=seed)) for seed in self.suite.seeds
        ]

    # --- performing ---

    def _perform(self, stage: str, jobs: list[Job]) -> None:
        if not jobs:
            return
        self._say(f"{stage}: {len(jobs)} trainings")
        started = time.perf_counter()
        for done, (job, lines) in enumerate(self.performer(jobs, self.folder), start=1):
            for line in lines:
                self._keep(line)
            seconds = time.perf_counter() - started
            left = seconds / done * (len(jobs) - done) / 60
            self._say(f"{stage} {done}/{len(jobs)}  {job.name}  {seconds / 60:.1f} min, about {left:.0f} min left")

    def _keep(self, line: Line) -> None:
        if isinstance(line, Record):
            append_record(self.records_file, line)
            self.records.append(line)
            self._say(describe(line))
            return
        append_line(self.folder / TRIALS, line.to_dict())
        self.trials.append(line)
        result = line.error if line.area is None else f"area {line.area:.1%} on the validation images"
        self._say(f"{line.run}  {line.family}: {result}")

    def _say(self, text: str) -> None:
        self.console.print(text)


def _shortened(job: Job, epochs: int) -> Job:
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, epochs=epochs), equal="time")
