"""Reports: the measurements of a sweep or a comparison, as tables and one HTML page.

The page is a single file that needs no network: text, figures and plotly.js are inside. It is built from records alone,
so that it can be rebuilt wherever they are; neither torch nor numpy is loaded.

Here the page is put together: ``figures`` has what the scripts in ``templates`` draw, ``cells`` the table of all
measurements. On the page a training keeps its colour.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs
from rich.console import Console

from pliant.errors import BadInput
from pliant.files import write_text
from pliant.records import Record, read_records
from pliant.reporting.area import SLACK
from pliant.reporting.cells import COLUMNS
from pliant.reporting.curves import TIME_SLACK, VIEWS, panels_of, sections_of
from pliant.reporting.figures import section_data
from pliant.reporting.grouping import flat, grouped, run_of
from pliant.reporting.intervals import LEVEL
from pliant.reporting.ranking import KEPT
from pliant.reporting.tables import comparison_markdown, comparison_table, summary_table


def report(
    records: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    markdown: str | Path | None = None,
    runs: str | None = None,
) -> Path:
    """Write a page about the records, print a table and the page's path, and return the path.

    The table compares the methods if the records have the costs of the trainings, else it lists the accuracies.

    Args:
        records: one or several files of records. Of several records of one measurement the last counts.
        out: the page, a self-contained HTML file of about 5 MB. An existing one is replaced, whole or not at all.
        markdown: file for the comparison as Markdown tables, replaced likewise; without it none is written.
        runs: folder of the run folders, for the commands on the page; by default runs/ next to the first records.

    Raises:
        BadInput: the files hold no records, or ``out`` or ``markdown`` is a folder.
        DamagedFile: a file is missing, or something in it is not a record.
        OSError: the page cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise BadInput(f"expected a file name for the report, got the folder {out}; try {out / 'report.html'}")
    if markdown is not None and Path(markdown).is_dir():
        raise BadInput(f"expected a file name for --markdown, got the folder {markdown}")
    paths = [Path(path) for path in ([records] if isinstance(records, str | Path) else records)]
    latest = {record.key(): record for path in paths for record in read_records(path)}
    if not latest:
        where = ", ".join(map(str, paths)) or "an empty list of files"
        raise BadInput(f"expected records to report, got none in {where}; make some with `pliant sweep`")
    write_report(
        list(latest.values()), out, markdown=markdown, runs=str(paths[0].parent / "runs") if runs is None else runs
    )
    return out


def write_report(
    records: Sequence[Record],
    out: Path,
    *,
    markdown: str | Path | None = None,
    runs: str = "runs",
    remarks: Sequence[str] = (),
) -> None:
    """Write a page about these records, as :func:`report` does.

    Args:
        records: at least one.
        out: the page.
        markdown: file for the comparison as Markdown tables.
        runs: folder of the run folders, for the commands on the page.
        remarks: sentences to add, about facts that are not in the records.
    """
    pages = {out: render(records, runs, remarks)}
    if markdown is not None:
        pages[Path(markdown)] = comparison_markdown(records, remarks)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    # A pipe or a file has no width, so the rows of a table stay whole there.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 1000)
    costly = any(record.cost is not None for record in records)
    console.print(comparison_table(records) if costly else summary_table(records))
    for remark in remarks:
        console.print(remark, soft_wrap=True)
    console.print(f"Report: {out}", soft_wrap=True)


def render(records: Sequence[Record], runs: str = "runs", remarks: Sequence[str] = ()) -> str:
    """Return the page about ``records`` (at least one) as HTML; the arguments are those of :func:`write_report`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pliant.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = sections_of(records)
    trainings = {curve.training: curve for section in sections for curve in section.curves}
    refitted = any(section.refitted for section in sections)
    versions = Counter(tuple(sorted(record.versions.items())) for record in records)
    return environment.get_template("report.html.j2").render(
        remarks=remarks,
        runs=len(grouped(records, run_of)),
        trainings=trainings,
        refitted=refitted,
        retrained=any(curve.retrained for curve in trainings.values()),
        views={name: title for name, title in VIEWS.items() if any(name in section.views for section in sections)},
        level=LEVEL,
        time_slack=TIME_SLACK,
        measurements=len(records),
        sections=[
            {
                "section": section,
                "names": {curve.training for curve in section.curves},
                "guessing": section.chance is not None,
                "repeated": any(panel.repeated for panel in panels_of(section)),
                "panels": panels_of(section),
                # The panels that the choice of a size may be restricted to, by their index.
                "families": [(index, panel.chip) for index, panel in enumerate(panels_of(section))],
                "batches": sorted({record.latency_batch for record in section.records}),
                "layered": any(record.layers for record in section.records),
                "rows": [[cell(record) for _, cell in COLUMNS] for record in section.records],
                "refused": Counter((r.compressor, *pair) for r in section.records for pair in r.refused),
                "runs": [(run[0], flat(run[0].config)) for run in grouped(section.records, run_of).values()],
            }
            for section in sections
        ],
        columns=[title for title, _ in COLUMNS],
        versions=versions,
        created=sorted(record.created[:10] for record in records if record.created),
        data={
            # A training keeps its place in this list, and so its colour, on the whole page.
            "trainings": [
                {"name": name, "ours": curve.ours, "retrained": curve.retrained} for name, curve in trainings.items()
            ],
            "slack": SLACK,
            "kept": KEPT,
            "refitted": refitted,
            "sections": [section_data(section, runs, refitted) for section in sections],
        },
        plotlyjs=get_plotlyjs(),
    )
