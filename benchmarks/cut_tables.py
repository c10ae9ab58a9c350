"""The note of ``cuts.py``: rows of measurements as tables in Markdown, and who is best at each size."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from notes import processor, table
from subjects import TRAININGS
from variants import OURS

from pliant.reporting.intervals import difference, estimate

Row = dict[str, Any]
TITLES = {
    ("filters", "params"): "Channels removed, by the share of parameters left",
    ("filters", "macs"): "Channels removed, by the share of multiply-accumulates left",
    ("rank", "params"): "Factors of low rank, by the share of parameters left",
    ("rank", "macs"): "Factors of low rank, by the share of multiply-accumulates left",
    ("weights", "entries"): "Single weights zeroed, by the share of the weights left",
    ("nm", "entries"): "Two of four consecutive input channels zeroed",
}
LEGEND = """\
Test accuracy in %, the mean over the seeds. Each cell is the best setting of a method, chosen on validation images for
this network, cost and share. Methods marked with * read the labels of the calibration images. A dash: no setting came
within two points of the share, or nothing was measured. Statistics: "as cut" is the same network with the old
statistics of BatchNorm; "by itself": the method looks at the calibration images, without labels, and sets them. Seconds
are those of making one network of the best setting, the search for the size included, on a machine with other users.

"magnitude" (Li 2017), "BN scale" (Liu 2017), "LAMP" (Lee 2021), "FPGM" (He 2019), "Taylor" (Molchanov 2019), "Hessian"
and "random" are torch-pruning's. "norms and refit" is reconstruction alone; "output energies" ranks channels once, by
their own part in the outputs of their readers, as ThiNet and channel pruning (He 2017) do, and refits or not. Both
refits are pliant's. "pliant, norms" looks at no data, "pliant, data" is block elimination without a refit.
"""
STATES = {"raw": "as cut", "test": "BatchNorm re-estimated", "settled": "by itself"}


def note(rows: list[Row]) -> str:
    """Return the whole note."""
    if not rows:
        return "no rows yet: cuts.py measure\n"
    networks = list(dict.fromkeys(row["network"] for row in rows))
    parts = [head(rows)]
    parts += [section(name, [row for row in rows if row["network"] == name]) for name in networks]
    return "\n".join([*parts, summary(rows)])


def head(rows: list[Row]) -> str:
    """Return title, versions and the trainings."""
    configs = {str({k: v for k, v in sorted(row["config"].items()) if k != "date"}): row["config"] for row in rows}
    versions = "\n".join(
        f"* {c['images']} calibration images, {c['threads']} threads, pliant {c['pliant']}, torch {c['torch']}, "
        f"torch-pruning {c['torch-pruning']}, transformers {c['transformers']}"
        for c in configs.values()
    )
    used = {row["network"] for row in rows}
    trainings = "\n".join(f"* {name}: `{t.flags}`" for name, t in TRAININGS.items() if name in used)
    return (
        f"# Cuts without retraining, {datetime.date.today()}\n\n"
        f"`python benchmarks/cuts.py`, {processor()}. Rows were measured with:\n\n{versions}\n\n"
        f"Trainings, by `pliant train`:\n\n{trainings}\n\n{LEGEND}"
    )


def section(name: str, rows: list[Row]) -> str:
    """Return the tables of one network."""
    dense = [first(row["test"]) for row in rows if row["kind"] == "dense"]
    measure = next(iter(rows[0]["test"])) if "test" in rows[0] else ""
    text = f"## {name}\n\nUncut: {measure} {shown(dense)} (seeds: {len(dense)}).\n"
    for (kind, cost), title in TITLES.items():
        part = [row for row in rows if (row["kind"], row["cost"]) == (kind, cost)]
        if part:
            text += f"\n### {name}: {title}\n\n{results(part)}"
    return text


def results(rows: list[Row]) -> str:
    """Return one table: methods and states of BatchNorm × shares."""
    shares = sorted({row["share"] for row in rows}, reverse=True)
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        name = family + (" *" if own[0].get("labels") else "")
        states = ("test",) if any(row.get("settled") for row in own) else ("raw", "test")
        spent = [row["seconds"] for row in own if "seconds" in row]
        for state in states:
            title = STATES["settled" if len(states) == 1 else state]
            cells = [shown(values(own, share, state).values()) for share in shares]
            lines.append([name, title, *cells, f"{fmean(spent):.1f}" if spent and state == "test" else ""])
    return table(["method", "statistics", *(f"{share:.0%}" for share in shares), "seconds"], lines)


def values(rows: Iterable[Row], share: float, state: str = "test") -> dict[int, float]:
    """Return seed → score at a share."""
    return {row["seed"]: first(row[state]) for row in rows if row["share"] == share and state in row}


def first(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


def shown(scores: Iterable[float]) -> str:
    """Return a mean in percent, with its 95 % interval if there are several values."""
    found = list(scores)
    if not found:
        return "–"
    mean, half, _ = estimate(found)
    return f"{100 * mean:.1f}" if half is None else f"{100 * mean:.1f} ± {100 * half:.1f}"


# --- who is best ------------------------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> str:
    """Return, for each network and cost, the best of the others at each share beside ours.

    The best of the others has the best mean on validation data over the seeds that all of its rows share.
    """
    lines = []
    shares = sorted({row["share"] for row in rows if row["kind"] != "dense"}, reverse=True)
    for network in dict.fromkeys(row["network"] for row in rows):
        for kind, cost in TITLES:
            part = [row for row in rows if (row["network"], row["kind"], row["cost"]) == (network, kind, cost)]
            own = dict.fromkeys(row["family"] for row in part if row["family"].startswith(OURS))
            mine = next((name for name in own if name.endswith("refit")), next(iter(own), None))
            if part:
                cells = [versus(part, share, mine) for share in shares]
                lines.append([network, f"{kind}, {cost}", mine or "–", *cells])
    return (
        "## The best of the others against ours\n\n"
        "Test scores: the best other method (best on validation data), ours, and ours minus theirs in points. Some of\n"
        'the others use pliant\'s refit: "norms and refit" and "output energies and refit".\n\n'
        + table(["network", "cut", "ours", *(f"{share:.0%}" for share in shares)], lines)
    )


def versus(rows: list[Row], share: float, mine: str | None) -> str:
    """Return one cell of the summary."""
    here = [row for row in rows if row["share"] == share and "test" in row]
    others: dict[str, list[Row]] = {}
    for row in here:
        if not row["family"].startswith(OURS):
            others.setdefault(row["family"], []).append(row)
    best = max(others, key=lambda name: fmean(first(row["val"]) for row in others[name]), default=None)
    cell = "–" if best is None else f"{best} {shown(values(others[best], share).values())}"
    own = values([row for row in here if row["family"] == mine], share)
    if not own:
        return cell
    cell = f"{cell}; {shown(own.values())}"
    if best is None:
        return cell
    mean, half, _ = difference(own, values(others[best], share))
    return f"{cell}; {100 * mean:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
