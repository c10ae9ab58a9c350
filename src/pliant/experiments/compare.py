"""The verb ``compare``: methods × seeds under the same compressors, each with settings found on validation images."""

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
    """Compare methods as a suite says, and write their records and a report.

    Args:
        suite: a YAML file, or a shipped one: tiny, fashion, cifar16, cifar or paper.
        out: folder of the comparison; by default comparisons/NAME. What it holds already is not made again.
        data_dir: folder of the data files; digits needs none.
        methods: only these of the suite, separated by commas; or other methods, which join it.
        tasks: only these of the suite, separated by commas; needed where tasks have different data folders.
        ray: address of a Ray cluster to train on, or auto; without it, train here, one run after the other.
        dry_run: only a few steps of every method on images made of noise, to see that everything runs; nothing is kept.

    Raises:
        BadInput: the suite names something unknown, or its runs exist with other settings.
        DamagedFile: the suite, data or earlier results cannot be read.
        Diverged: every training did.
    """
    whole = Suite.open(suite)
    folder = Path(out or f"comparisons/{whole.name}")
    chosen_methods = None if methods is None else _method_names(whole, methods)
    whole = join(whole, [*([] if dry_run else _still_found(joined_before(folder))), *(chosen_methods or [])])
    part = whole if chosen_methods is None else _only_methods(whole, chosen_methods)
    if tasks is not None:
        chosen = _chosen("task", tasks, part.tasks)
        part = dataclasses.replace(part, tasks={name: part.tasks[name] for name in chosen})
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
        done = Comparison(whole, folder, performer)
        found, remarks, page = done.current(), done.diverged(), folder / "report.html"
        if not found:
            raise Diverged(f"{folder}: there is nothing to report. {' '.join(remarks)}")
        write_report(found, page, markdown=folder / "report.md", runs=str(folder / "runs"), remarks=remarks)
        return page


def _method_names(suite: Suite, text: str) -> list[str]:
    """Return the names between the commas; raise BadInput if one is neither of the suite nor of a method."""
    labels = [entrant.label for entrant in suite.methods]
    known = {*labels, *names("method", METHODS)}
    return _chosen("method", text, labels, lambda name: name in known or ":" in name)


def _still_found(methods: list[str]) -> list[str]:
    """Return the methods that there are; warn of others, which joined when their package was here."""
    found = []
    for name in methods:
        try:
            find_method(name)
        except BadInput as error:
            warnings.warn(f"left out of the comparison: {error}", stacklevel=2)
        else:
            found.append(name)
    return found


def _only_methods(suite: Suite, labels: list[str]) -> Suite:
    retraining = suite.retraining if suite.retraining and suite.retraining.method in labels else None
    methods = tuple(entrant for entrant in suite.methods if entrant.label in labels)
    return dataclasses.replace(suite, methods=methods, retraining=retraining)


def _chosen(what: str, text: str, names: Collection[str], known: Callable[[str], bool] | None = None) -> list[str]:
    """Return the names between the commas; raise BadInput for one that is not known, by default if not in ``names``."""
    chosen = text.split(",")
    for name in chosen:
        if not (name in names if known is None else known(name)):
            raise unknown(f"{what} of this suite", name, names)
    return chosen
