"""Comparing: methods × seeds under the same compressors, each with settings found on the validation images.

For every task and method of a suite: train all trials, choose for each family the one with the largest area under its
validation curve, train that with every seed, measure. Whatever is complete is kept: a comparison that was stopped, or
whose suite has grown, goes on with the same command.

OUT/suite.yaml      the suite
    trials.jsonl    one line per trial and family: the settings, the validation curve and its area
    records.jsonl   the measurements of the chosen settings, for `pliant report`; records.jsonl.gz where it was packed
    runs/           the trainings
    report.html, report.md
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pliant.errors import BadInput, Diverged, shown, unknown
from pliant.experiments.comparison.job import Job, Line, Outcome, data_of, perform
from pliant.experiments.comparison.rehearsal import rehearse
from pliant.experiments.comparison.suites import Entrant, Suite
from pliant.experiments.run_folder import WEIGHTS
from pliant.experiments.sweep import describe
from pliant.files import locked, make_folders, sha256, write_text
from pliant.jsonl import append_line, read_lines
from pliant.records import Record, append_record, read_records, records_file
from pliant.reporting.curves import TIME_SLACK, step_ratio
from pliant.reporting.grouping import grouped
from pliant.reporting.page import write_report

TRIALS = "trials.jsonl"


def compare(
    suite: str,
    out: str | None = None,
    data_dir: str | None = None,
    methods: str | None = None,
    tasks: str | None = None,
    ray: str | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Compare methods as a suite says, and write their records and a report.

    Args:
        suite: a YAML file, or a shipped one: tiny, fashion, cifar16, cifar or paper.
        out: folder of the comparison; by default comparisons/NAME. What it holds already is not made again.
        data_dir: folder of the data files; digits needs none.
        methods: only these of the suite, separated by commas.
        tasks: only these of the suite, separated by commas; needed where tasks have different data folders.
        ray: address of a Ray cluster to train on, or auto; without it, train here, one run after the other.
        dry_run: only a few steps of every method on images made of noise, to see that everything runs; nothing is kept.

    Raises:
        BadInput: the suite names something unknown, or its runs exist with other settings.
        DamagedFile: the suite, data or earlier results cannot be read.
        Diverged: every training did.
    """
    whole = read = Suite.open(suite)
    if methods is not None:
        read = _only_methods(read, methods)
    if tasks is not None:
        chosen = _chosen("task", tasks, read.tasks)
        read = dataclasses.replace(read, tasks={name: read.tasks[name] for name in chosen})
    if data_dir is not None:
        place = str(Path(data_dir).expanduser().resolve())
        read = dataclasses.replace(read, tasks={name: {**t, "data_dir": place} for name, t in read.tasks.items()})
    if dry_run:
        rehearse(read)
        return None
    folder = Path(out or f"comparisons/{read.name}")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out {folder}: it is a file, but the folder of the comparison is expected")
    each = _here if ray is None else _on_ray(ray)
    for task in read.tasks.values():
        data_of(task)  # for its errors, before anything is written
    make_folders(folder)
    with locked(folder):
        Comparison(read, folder, each).run()
        done = Comparison(whole, folder, each)
        found, remarks, page = done.current(), done.diverged(), folder / "report.html"
        if not found:
            raise Diverged(f"{folder}: there is nothing to report. {' '.join(remarks)}")
        write_report(found, page, markdown=folder / "report.md", runs=str(folder / "runs"), remarks=remarks)
        return page


Performer = Callable[[list[Job], Path], Iterator[tuple[Job, Iterable[Line]]]]


class Comparison:
    """A suite and what is already there of it.

    Args:
        suite: what to compare.
        folder: where.
        each: performs jobs and gives their lines, in any order.
    """

    def __init__(self, suite: Suite, folder: Path, each: Performer) -> None:
        self.suite = suite
        self.folder = folder
        self.each = each
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        trials = folder / TRIALS
        self.trials = read_lines(trials, Outcome.from_dict, "trials") if trials.exists() else []
        self.records_file = records_file(folder)
        self.records = read_records(self.records_file) if self.records_file.exists() else []

    def run(self) -> None:
        """Do what is missing: the search, then the chosen settings with every seed, then what needs these."""
        search = [job for job in self._search() if not self._searched(job)]
        self._missing(self._wanted())  # refuses what was measured otherwise, before anything is written or trained
        write_text(self.folder / "suite.yaml", self.suite.text)
        self._perform("search", search)
        self._perform("seeds", self._missing(job for seed in self.suite.seeds for job in self._chosen(seed)))
        self._perform("retraining", self._missing(self._retrainings()))
        if "time" in self.suite.equal:
            self._perform("equal time", self._missing(self._equal_time()))

    def current(self) -> list[Record]:
        """Return the records of what the suite wants now.

        Where another trial was chosen once, before the suite grew, its records stay in the file; reported beside those
        of the choice of today, test images would decide between them.
        """
        wanted = {job.name for job in self._wanted()}
        latest = {record.key(): record for record in self.records if record.run in wanted}
        return list(latest.values())

    def diverged(self) -> list[str]:
        """Return a sentence that tells what is missing in the records, for it diverged; none if nothing did."""
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

    # --- what is to be done ---

    def _search(self) -> Iterator[Job]:
        for task in self.suite.tasks:
            for entrant in self.suite.methods:
                for trial in entrant.trials:
                    yield self._job(task, entrant, trial, self.suite.seeds[0], entrant.families, search=True)

    def _chosen(self, seed: int) -> Iterator[Job]:
        """Yield the runs of the best trials; one for several families where they agree."""
        for task in self.suite.tasks:
            for entrant in self.suite.methods:
                best = {family: self._best(task, entrant, family) for family in entrant.families}
                for trial in entrant.trials:
                    families = tuple(family for family, chosen in best.items() if chosen == trial)
                    if families:
                        yield self._job(task, entrant, trial, seed, families)

    def _retrainings(self) -> Iterator[Job]:
        """Yield the reference with retraining, under each schedule, at the suite's sizes for it."""
        wanted = self.suite.retraining
        if wanted is None:
            return
        for seed in self.suite.seeds:
            for job in self._chosen(seed):
                if job.label == wanted.method:
                    again = dataclasses.replace(job, retraining_epochs=wanted.epochs)
                    for rounds, schedule in itertools.product(wanted.rounds, wanted.schedules):
                        families = {family: wanted.measures(of, rounds) for family, of in job.families.items()}
                        yield dataclasses.replace(
                            again, families=families, retraining=schedule, retraining_rounds=rounds
                        )

    def _equal_time(self) -> Iterator[Job]:
        """Yield runs of fewer epochs for the methods whose steps take longer than SGD's.

        They have as many as do not take longer than SGD's time and TIME_SLACK; those of an earlier seed, once there
        is one, for the times of steps are never quite the same.
        """
        for seed in self.suite.seeds:
            for job in self._chosen(seed):
                ratio = self._step_ratio(job)
                if ratio is not None and ratio > TIME_SLACK:
                    allowed = max(1, int(TIME_SLACK * job.settings["epochs"] / ratio))
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

    # --- what is there ---

    def _searched(self, job: Job) -> bool:
        found = [outcome for outcome in self.trials if outcome.run == job.training]
        for outcome in found:
            job.check(outcome.config, self.folder / TRIALS)
            if outcome.family in job.families:
                self._check_measure(outcome, job)
        return {outcome.family for outcome in found} >= set(job.families)

    def _check_measure(self, outcome: Outcome, job: Job) -> None:
        """Raise BadInput if the search was by another measure than the first one of the family is now."""
        first = job.families[outcome.family][0]
        # Files from before the name was kept are also from before there was another scheme.
        compressor = outcome.compressor or dataclasses.replace(first, scheme=first.scheme and "channel").name
        told = {"compressor": compressor, **outcome.measure}
        for name, now in {"compressor": first.name, **job.chosen_by(outcome.family)}.items():
            before = told.get(name, now)  # files from before a thing was kept do not tell it
            if before != now:
                raise BadInput(
                    f"{self.folder / TRIALS} has chosen {outcome.label} with {name} {shown(before)}, the first measure "
                    f"of family {outcome.family} has {shown(now)} now: choose another --out, or remove what is there"
                )

    def _missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs with something left to measure, without what is measured already."""
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
        """Return whether the network that the records are of lies here; without it, it is trained again."""
        path = self.folder / "runs" / job.training
        return (path / WEIGHTS).exists() and {record.weights for record in done} <= {sha256(path / WEIGHTS)}

    def _best(self, task: str, entrant: Entrant, family: str) -> dict[str, Any] | None:
        """Return the trial with the largest area under its validation curve; None if all diverged."""
        jobs = {job.training: job for job in self._search() if (job.task, job.label) == (task, entrant.label)}
        areas = {
            outcome.run: outcome.area
            for outcome in self.trials
            if outcome.run in jobs and outcome.family == family and outcome.area is not None
        }
        return jobs[max(areas, key=lambda run: areas[run])].trial if areas else None

    def _step_ratio(self, job: Job) -> float | None:
        """Return how much longer a step takes than SGD's, over all seeds; None if that was not measured."""
        runs = {run.name for run in self._of_all_seeds(job)}
        return step_ratio(record for record in self.records if record.run in runs)

    def _epochs_in_time(self, job: Job) -> int | None:
        """Return how many epochs the runs at equal time have that are there; None without one."""
        lengths = range(1, job.settings["epochs"] + 1)
        names = {_shortened(run, epochs).name: epochs for run in self._of_all_seeds(job) for epochs in lengths}
        return next((names[record.run] for record in self.records if record.run in names), None)

    def _of_all_seeds(self, job: Job) -> list[Job]:
        return [dataclasses.replace(job, settings={**job.settings, "seed": seed}) for seed in self.suite.seeds]

    # --- doing it ---

    def _perform(self, stage: str, jobs: list[Job]) -> None:
        if not jobs:
            return
        self._say(f"{stage}: {len(jobs)} trainings")
        started = time.perf_counter()
        for done, (job, lines) in enumerate(self.each(jobs, self.folder), start=1):
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
        found = line.error if line.area is None else f"area {line.area:.1%} on the validation images"
        self._say(f"{line.run}  {line.family}: {found}")

    def _say(self, text: str) -> None:
        self.console.print(text)


def _shortened(job: Job, epochs: int) -> Job:
    return dataclasses.replace(job, settings={**job.settings, "epochs": epochs}, equal="time")


def _here(jobs: list[Job], folder: Path) -> Iterator[tuple[Job, Iterable[Line]]]:
    for job in jobs:
        yield job, perform(job, folder)


def _on_ray(address: str) -> Performer:
    """Return what performs jobs on a Ray cluster, whose machines train in folders of their own."""
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs a package: pip install 'pliant[ray]'") from None
    if ":" in address:
        _check_reachable(address)
    try:
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        raise BadInput(f"--ray {address}: {' '.join(str(error).split())}") from None

    def performed(job: Job, folder: Path) -> list[Line]:
        return list(perform(job, folder))

    gpus = 1 if ray.cluster_resources().get("GPU") else 0  # one for each training, where there are any
    remote = ray.remote(max_retries=3, num_gpus=gpus)(performed)

    def each(jobs: list[Job], folder: Path) -> Iterator[tuple[Job, Iterable[Line]]]:
        # Jobs of the same training take turns: only one of them can train it.
        queues = grouped(jobs, lambda job: job.training)
        waiting: dict[Any, Job] = {}

        def start(queue: list[Job]) -> None:
            job = queue.pop(0)
            waiting[remote.remote(job, folder.resolve())] = job

        for queue in queues.values():
            start(queue)
        errors = []
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            if queues[job.training]:
                start(queues[job.training])
            try:
                lines = ray.get(done)
            except Exception as error:  # what the others measure is kept first
                errors.append(error)
            else:
                yield job, lines
        if errors:
            raise errors[0]

    return each


def _check_reachable(address: str) -> None:
    """Raise BadInput if nothing answers at HOST:PORT: Ray itself goes on trying for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BadInput(f"--ray {address} cannot be reached ({error}): start Ray there, or give its HOST:PORT") from None


def _only_methods(suite: Suite, names: str) -> Suite:
    labels = _chosen("method", names, [entrant.label for entrant in suite.methods])
    retraining = suite.retraining if suite.retraining and suite.retraining.method in labels else None
    methods = tuple(entrant for entrant in suite.methods if entrant.label in labels)
    return dataclasses.replace(suite, methods=methods, retraining=retraining)


def _chosen(what: str, names: str, known: Collection[str]) -> list[str]:
    """Return the names between the commas; raise BadInput if the suite lacks one of them."""
    chosen = names.split(",")
    for name in chosen:
        if name not in known:
            raise unknown(f"{what} of this suite", name, known)
    return chosen
