"""The demo: three networks, trained once each on the embedded digits, then cut to many sizes."""

from __future__ import annotations

from pathlib import Path

from pliant.errors import BadInput
from pliant.reporting import report
from pliant.sweeping import sweep
from pliant.training import train

COMPRESSED_BY = {"sgd": ("filters", "rank"), "sfw-filters": ("filters",), "sfw-rank": ("rank",)}


def demo(out: str = "demo", epochs: int = 60, seed: int = 0) -> Path:
    """Train with SGD and with SFW (filters, rank) on the embedded digits, compress each, and write a report.

    Args:
        out: folder to make.
        epochs: passes over the training images, for each network.
        seed: of the trainings.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} exists and is not empty: choose another --out, or remove it")
    records = folder / "records.jsonl"
    for method, compressors in COMPRESSED_BY.items():
        run = train(data="digits", model="resnet8", method=method, epochs=epochs, seed=seed, out=str(folder / method))
        for compressor in compressors:
            sweep([run], compressor, out=str(records))
    return report([records], folder / "report.html")
