"""Parts that all notes of the benchmarks share: tables in Markdown, spreads, and the name of the machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(quartiles: Sequence[float]) -> str:
    """Return lower quartile, median and upper quartile as a person reads them."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()
