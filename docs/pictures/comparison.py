"""Draw the comparisons and write their table into the README: ``python docs/pictures/comparison.py [IMAGE [PAGE]]``.

Both are made of the records of the comparisons alone, in seconds, and come out the same every time. For each
way of cutting there are our method, the best of the others and SGD; ``report.md`` beside the records has all methods.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pliant.records import read_records, records_file
from pliant.reporting.area import SLACK, accuracy_at
from pliant.reporting.curves import ANCHOR, Panel, panels_of, points_of, sections_of
from pliant.reporting.formats import percent, spread
from pliant.reporting.ranking import KEPT, Standing, standings

ROOT = Path(__file__).parents[2]
COMPARISONS = ROOT / "comparisons"
IMAGE = ROOT / "docs" / "images" / "comparison.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by `make pictures`: -->\n", "<!-- until here -->\n"


class Shown(NamedTuple):
    """A row of the table and a picture: the networks of a suite, cut by a compressor."""

    suite: str
    compressor: str
    data: str
    cut_by: str


SHOWN = (
    Shown("fashion", "filters", "Fashion-MNIST", "filters"),
    Shown("cifar", "filters", "CIFAR-10", "filters"),
    Shown("fashion", "rank-whitened-spatial", "Fashion-MNIST", "rank"),
    Shown("cifar", "rank-whitened-spatial", "CIFAR-10", "rank"),
)
OURS, RIVAL, PLAIN = "#1f6fb2", "#d1495b", "#5c6670"


Compared = dict[Shown, tuple[Panel, list[Standing]]]


def compared(shown: Shown) -> tuple[Panel, list[Standing]]:
    """Return the panel, and the standings of our method, the best of the others and SGD, the best first."""
    (section,) = sections_of(read_records(records_file(COMPARISONS / shown.suite)))
    panel = next(panel for panel in panels_of(section) if panel.compressor == shown.compressor)
    ranked = standings(panel, "epochs", section.chance)
    return panel, [s for s in ranked if s.curve.ours or s.is_baseline or s.curve.training == ANCHOR]


# --- the figure -------------------------------------------------------------------------------------------------------


def figure(comparisons: Compared) -> Figure:
    """Return accuracy against the parameters that are left, a picture for each comparison, in pairs."""
    drawn, axes = plt.subplots(len(comparisons) // 2, 2, figsize=(9.6, 7.4), dpi=96, layout="constrained")
    for ax, (shown, (panel, members)) in zip(axes.flat, comparisons.items(), strict=True):
        for standing in reversed(members):
            draw(ax, panel, standing)
        ax.set_title(f"{shown.data}, cut by {shown.cut_by}, never retrained", fontsize=11)
        ax.set_xlabel("parameters left (%)")
        ax.set_xlim(100, 8)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], frameon=False, loc="lower left")
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy (%)")
    return drawn


def draw(ax: Axes, panel: Panel, standing: Standing) -> None:
    """Draw the mean over the runs, and a band from the lowest to the highest."""
    curve = standing.curve
    colour = OURS if curve.ours else RIVAL if standing.is_baseline else PLAIN
    runs = [points_of(run, panel.axes[0], "top1") for run in curve.runs.values()]
    end = min(max(share for share, _ in run) for run in runs) + SLACK
    removed = [share / 100 for share in range(101) if share / 100 <= end]
    heights = [[100 * accuracy_at(run, share, 0.0) for run in runs] for share in removed]
    left = [100 * (1 - share) for share in removed]
    name = f"{curve.training}{'' if curve.ours or curve.training == ANCHOR else ', the best of the others'}"
    ax.plot(left, [fmean(h) for h in heights], color=colour, linewidth=2.2 if curve.ours else 1.6, label=name)
    ax.fill_between(left, [min(h) for h in heights], [max(h) for h in heights], color=colour, alpha=0.18, linewidth=0)


# --- the table --------------------------------------------------------------------------------------------------------


def table(comparisons: Compared) -> str:
    """Return the table of the README: the areas and accuracies in %, mean over the seeds."""
    sizes = [f"{100 * share:.0f} %" for share in KEPT]
    lines = [
        f"| data | cut by | trained by | mean over all sizes | dense | {' | '.join(sizes)} |",
        "|---|---|---|---|---|" + "---|" * len(KEPT),
    ]
    for shown, (_, members) in comparisons.items():
        for standing in members:
            area, curve = standing.areas[0], standing.curve
            name = f"**{curve.training}**" if curve.ours else curve.training
            kept = ["-" if accuracy is None else percent(accuracy) for accuracy in standing.kept]
            cells = [shown.data, shown.cut_by, name, spread(area), percent(curve.dense), *kept]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, rows: str) -> str:
    """Return the text of a page with this table between its marks."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"the page has no place for the table: {BEGIN.strip()} … {END.strip()}")
    return f"{before}{mark}\n{rows}\n{end}{after}"


def main(image: Path = IMAGE, page: Path = README) -> None:
    """Write the figure, and the table into the page."""
    comparisons = {shown: compared(shown) for shown in SHOWN}
    figure(comparisons).savefig(image, metadata={"Software": None})
    page.write_text(with_table(page.read_text(encoding="utf-8"), table(comparisons)), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
