"""The page's table of all measurements: a column is a title and a function from a record to its cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pliant.records import Record
from pliant.reporting.curves import nonzero_share
from pliant.reporting.formats import human, percent
from pliant.reporting.grouping import accuracy_of, size_of


class Cell(NamedTuple):
    """A cell of the table.

    Args:
        text: its text.
        note: a remark next to the text.
        order: the value that it is sorted by.
    """

    text: str
    note: str
    order: str | float


def _accuracy(name: str) -> Callable[[Record], Cell]:
    return lambda record: Cell(percent(accuracy_of(record, name)), "", accuracy_of(record, name))


def _size(name: str, unit: str = "") -> Callable[[Record], Cell]:
    def cell(record: Record) -> Cell:
        size = getattr(record, name)
        share = size / getattr(record, f"{name}_dense")
        return Cell(human(size, unit), f"{percent(share)}%", size)

    return cell


def _nonzero(record: Record) -> Cell:
    return Cell(human(record.nonzero), f"{percent(nonzero_share(record))}%", record.nonzero)


def _latency(record: Record) -> Cell:
    speed = record.latency_dense_s / record.latency_s
    return Cell(f"{_milliseconds(record)} ms", f"{speed:.2f}×", record.latency_s)


def _removed(record: Record) -> Cell:
    real = record.ratio_removed
    return Cell(size_of(record), "" if real is None else f"{percent(real)}%", record.ratio)


COLUMNS: tuple[tuple[str, Callable[[Record], Cell]], ...] = (
    ("Run", lambda r: Cell(r.run, "", r.run)),
    ("Compressor", lambda r: Cell(r.compressor, r.allocation, f"{r.compressor} {r.allocation}")),
    ("Removed", _removed),
    ("Accuracy", _accuracy("top1")),
    ("Re-estimated", _accuracy("top1_reestimated")),
    ("Raw", _accuracy("top1_raw")),
    ("Dense", _accuracy("top1_dense")),
    ("Validation", _accuracy("val_top1")),
    ("Parameters", _size("params")),
    ("Non-zero", _nonzero),
    ("MACs", _size("macs")),
    ("File", _size("bytes", "B")),
    ("Latency", _latency),
)


def _milliseconds(record: Record) -> str:
    return f"{1e3 * record.latency_s:.2f}"
