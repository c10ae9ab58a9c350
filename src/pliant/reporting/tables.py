"""Tables: records as text, for the terminal and as Markdown.

:func:`summary_table` lists the measured accuracies. :func:`comparison_table` and :func:`comparison_markdown` list the
standings of a comparison (``ranking``): the same rows, once for the terminal, once for documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pliant.records import Record
from pliant.reporting.curves import TIME_SLACK, VIEWS, panels_of, sections_of
from pliant.reporting.formats import percent, spread
from pliant.reporting.grouping import grouped, sizes_of
from pliant.reporting.ranking import KEPT, Standing, standings

NOTE = (
    "Area: mean test accuracy (%) while 0 to 90 % of all parameters are removed (zeroed, where they stay); a size that "
    "is not reached counts as guessing. N:M: mean over the patterns. ±: 95 % confidence interval over the seeds "
    "(Student's t); none with one seed. Vs best baseline: difference of areas, by pairs of equal seeds. Dense: the "
    "network as it was trained, with the BatchNorm statistics of its training. 50 to 10 %: accuracy with that share of "
    "the parameters kept, interpolated; - is not reached. Raw: BatchNorm statistics not re-estimated. MACs: share of "
    "the multiply-accumulates removed. Step, memory: times SGD's. Ours: the methods of this package."
)
TIME_NOTE = (
    f"With the same training time, methods whose step takes more than {TIME_SLACK:g} times as long as SGD's were "
    "trained for fewer epochs; the others are the same as with the same number of epochs."
)

REFIT_NOTE = (
    "Refitted: the weights that are left make up for what has gone, by least squares on calibration images without "
    "labels, where that brings the outputs nearer to those of the dense network on images that were held out. Raw: the "
    "network as it was cut."
)


def summary_table(records: Iterable[Record]) -> Table:
    """Return the test accuracy of every curve at every ratio: in %, of what is delivered, mean over the runs.

    Rows are grouped by model and data set, then by compressor and allocation. The columns are the number of runs,
    the dense accuracy, then one per removed share or N:M pattern. Ten of these fit into 100 characters.
    """
    sections = sections_of(records)
    sizes = sizes_of(record for section in sections for record in section.records if record.ratio > 0)
    refits = any(section.refitted for section in sections)
    caption = (
        "Refitted, where the name says so, else BatchNorm re-estimated; " if refits else "BatchNorm re-estimated; "
    )
    table = _table("Test accuracy (%) by removed share", f"{caption}mean over the runs.")
    table.add_column("training", overflow="fold")
    for header in ("runs", "dense", *sizes):
        table.add_column(header, justify="right", no_wrap=True)
    for section in sections:
        for view, viewed in section.views.items():
            table.add_section()
            table.add_row(Text(_title(section.model, section.data, view, section.views), style="bold"))
            for variant, curves in grouped(viewed, lambda curve: curve.variant).items():
                table.add_row(Text(f"  {variant}", style="italic"))
                for curve in curves:
                    at = sizes_of(curve.records)
                    means = [percent(fmean(r.top1 for r in at[size])) if size in at else "-" for size in sizes]
                    cells = [f"    {curve.training}", str(len(curve.runs)), percent(curve.dense), *means]
                    table.add_row(*map(Text, cells))
    return table


def comparison_table(records: Sequence[Record]) -> Group:
    """Return the standings of every panel, the best first, about 140 characters wide, and a note on the columns."""
    parts: list[RenderableType] = []
    for panel in _panels(records):
        table = _table(panel.title)
        table.add_column("training", overflow="fold")
        for name in _COLUMNS:
            table.add_column(name, justify="right")
        for row in panel.rows:
            style = "bold" if row.is_best else ""
            table.add_row(*(Text(cell, style=style) for cell in (row.name, *row.cells)))
        parts.append(table)
    return Group(*parts, *map(Text, _notes(records)))


def comparison_markdown(records: Sequence[Record], remarks: Sequence[str] = ()) -> str:
    """Return the standings as Markdown: for every panel a title and a table, the best first and bold, and notes."""
    parts = []
    for panel in _panels(records):
        lines = [
            f"**{_escaped(panel.title)}**",
            "",
            f"| trained by | {' | '.join(_COLUMNS)} |",
            f"|---|{'---:|' * len(_COLUMNS)}",
        ]
        for row in panel.rows:
            name = f"**{_escaped(row.name)}**" if row.is_best else _escaped(row.name)
            lines.append(f"| {name} | {' | '.join(row.cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *map(_escaped, remarks), *_notes(records)]) + "\n"


def _notes(records: Sequence[Record]) -> list[str]:
    sections = sections_of(records)
    notes = [NOTE]
    notes += [REFIT_NOTE] * any(section.refitted for section in sections)
    return notes + [TIME_NOTE] * any(len(section.views) > 1 for section in sections)


class _Row(NamedTuple):
    name: str
    cells: list[str]
    is_best: bool


class _Rows(NamedTuple):
    title: str
    rows: list[_Row]


_COLUMNS = (
    *("seeds", "area", "vs best baseline", "dense"),
    *(f"{100 * share:.0f} %" for share in KEPT),
    *("raw area", "MACs area", "step", "memory", "seconds"),
)


def _panels(records: Iterable[Record]) -> list[_Rows]:
    """Return the standings of every panel of every view of every section, as text."""
    panels = []
    for section in sections_of(records):
        for view in section.views:
            for panel in panels_of(section):
                if view not in panel.views:
                    continue
                title = f"{_title(section.model, section.data, view, section.views)}: {panel.title}"
                variants = len({curve.variant for curve in panel.views[view]})
                rows = [
                    _Row(named(standing, variants > 1), _cells(standing), standing.is_best)
                    for standing in standings(panel, view, section.chance)
                ]
                panels.append(_Rows(title, rows))
    return panels


def named(standing: Standing, with_variant: bool) -> str:
    """Return the name of a standing: its training, the allocation if there are several, and whether it is ours."""
    curve = standing.curve
    return f"{curve.training}{f', {curve.allocation}' if with_variant else ''}{' (ours)' if curve.ours else ''}"


def _cells(standing: Standing) -> list[str]:
    first, *others = standing.areas
    cost = standing.cost
    return [
        str(first.n),
        spread(first),
        "best baseline" if standing.is_baseline else "-" if standing.versus is None else spread(standing.versus, "+"),
        percent(standing.curve.dense),
        *("-" if accuracy is None else percent(accuracy) for accuracy in standing.kept),
        spread(standing.other),
        spread(others[0]) if others else "-",
        *(["-"] * 3 if cost is None else [f"{cost.step:.2f}", f"{cost.memory:.2f}", f"{cost.seconds:.0f}"]),
    ]


def _title(model: str, data: str, view: str, views: Iterable[str]) -> str:
    return f"{model} on {data}{f', {VIEWS[view]}' if len(list(views)) > 1 else ''}"


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _escaped(text: str) -> str:
    """Return text escaped so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))
