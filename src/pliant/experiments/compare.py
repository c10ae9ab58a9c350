"""The verb ``compare``: methods × seeds under the same compressors, each with settings chosen on validation images."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

from pliant.errors import BadInput, Diverged, unknown
from pliant.experiments.comparison.comparison import Comparison
from pliant.experiments.comparison.joining import join, joined_before
from pliant.experiments.comparison.performing import data_of
from pliant.experiments.comparison.rehearsal import rehearse
from pliant.experiments.comparison.suite import Suite
from pliant.experiments.comparison.workers import here, on_ray
from pliant.experiments.methods import METHODS, find_method
from pliant.extensions import names
from pliant.files import locked, make_folders
from pliant.reporting.page import write_report


def compare(
    suite: str,
    out: str | None = None,
    data_dir: str | None = None,
    methods: str | None = None,
    tasks: str | None = None,
    ray: str | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Compare methods according to a suite, and write their records and a report.

    Args:
        suite: a YAML file, or a shipped one: tiny, fashion, cifar16, cifar or paper.
        out: folder of the comparison; by default comparisons/NAME. Results that it already holds are kept.
        data_dir: folder of the data files; digits needs none.
        methods: only these of the suite, separated by commas; or other methods, which join it.
        tasks: only these of the suite, separated by commas; needed if tasks have different data folders.
        ray: address of a Ray cluster to train on, or auto; without it, train here, one run after the other.
        dry_run: only a few steps of every method on noise images, to see that everything runs; nothing is kept.

    Returns:
        The report; None after a dry run.

    Raises:
        BadInput: the suite names something unknown, or its runs exist with other settings.
        DamagedFile: the suite, data or earlier results cannot be read.
        Diverged: every training diverged.
    """
    whole = Suite.open(suite)
    folder = Path(out or f"comparisons/{whole.name}")
    labels = None if methods is None else _method_names(whole, methods)
    earlier = [] if dry_run else _still_there(joined_before(folder))
    whole = join(whole, [*earlier, *(labels or [])])
    part = whole if labels is None else _only_methods(whole, labels)
    if tasks is not None:
        part = dataclasses.replace(part, tasks={name: part.tasks[name] for name in _names("task", tasks, part.tasks)})
    if data_dir is not None:
        place = str(Path(data_dir).expanduser().resolve())
        part = dataclasses.replace(part, tasks={name: {**t, "data_dir": place} for name, t in part.tasks.items()})
    if dry_run:
        rehearse(part)
        return None
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out {folder}: it is a file, but the folder of the comparison is expected")
    performer = here if ray is None else on_ray(ray)
    for task in part.tasks:
        data_of(part.task_settings(task))  # for its errors, before anything is written
    make_folders(folder)
    with locked(folder):
        Comparison(part, folder, performer).run()
        return _report(Comparison(whole, folder, performer))


def _report(comparison: Comparison) -> Path:
    """Write the report of all that a comparison has; raises Diverged if that is nothing."""
    folder, records, remarks = comparison.folder, comparison.current(), comparison.diverged()
    if not records:
        raise Diverged(f"{folder}: there is nothing to report. {' '.join(remarks)}")
    page = folder / "report.html"
    write_report(records, page, markdown=folder / "report.md", runs=str(folder / "runs"), remarks=remarks)
    return page


def _method_names(suite: Suite, text: str) -> list[str]:
    """Return the names between the commas; raises BadInput for one that the suite does not have and no method has."""
    labels = [entrant.label for entrant in suite.methods]
    known = {*labels, *names("method", METHODS)}
    return _names("method", text, labels, lambda name: name in known or ":" in name)


def _still_there(methods: list[str]) -> list[str]:
    """Return those of the methods that can be found; warn of the others, whose packages are gone or broken."""
    there = []
    for name in methods:
        try:
            find_method(name)
        except BadInput as error:
            warnings.warn(f"left out of the comparison: {error}", stacklevel=2)
        else:
            there.append(name)
    return there


def _only_methods(suite: Suite, labels: list[str]) -> Suite:
    retraining = suite.retraining if suite.retraining and suite.retraining.method in labels else None
    methods = tuple(entrant for entrant in suite.methods if entrant.label in labels)
    return dataclasses.replace(suite, methods=methods, retraining=retraining)


def _names(what: str, text: str, known: Collection[str], fits: Callable[[str], bool] | None = None) -> list[str]:
    """Return the names between the commas; raises BadInput for one that does not fit, by default if it is not known."""
    parts = text.split(",")
    for name in parts:
        if not (name in known if fits is None else fits(name)):
            raise unknown(f"{what} of this suite", name, known)
    return parts
