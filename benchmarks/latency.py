"""Measure what compression gains at run time: parameters, MACs, bytes, and latency in torch and ONNX Runtime.

    python benchmarks/latency.py --out benchmarks/results

Networks have random weights: their accuracy means nothing, but they cost the same as trained networks. Each is
compressed to half of its MACs. Machines are shared and noisy, so dense and compressed networks in all backends take
turns, round after round. A speed-up is the median over rounds of (dense / compressed in the same round), with its
quartiles. Writes a dated note.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from backends import Latency, backend_latencies
from notes import processor, spread, table
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.compression import Compressor

CASES: dict[str, tuple[str, tuple[int, int, int], int]] = {  # network, image, batch
    "resnet18, 32×32": ("resnet18", (3, 32, 32), 8),
    "resnet18, 224×224": ("resnet18", (3, 224, 224), 1),
    "vgg16, 32×32": ("vgg16", (3, 32, 32), 8),
    "vit_tiny, 32×32": ("vit_tiny", (3, 32, 32), 8),
}
COMPRESSORS: dict[str, Compressor[Any]] = {
    "filters": pliant.FilterPruning(allocation="uniform"),
    "rank": pliant.LowRank(allocation="uniform"),
}
KEPT = 0.5  # of the MACs


def measure(case: str, backends: list[str], threads: list[int], rounds: int) -> str:
    name, image, batch = CASES[case]
    torch.manual_seed(0)
    model = pliant.build_model(name, num_classes=10, image_shape=image).eval()
    x = torch.randn(batch, *image)
    models: dict[str, nn.Module] = {"dense": model}
    for kind, compressor in COMPRESSORS.items():
        try:
            models[kind] = pliant.compress_to(model, compressor, x, keep_macs=KEPT)
        except pliant.Refused as refusal:
            print(f"{case}, {kind}: {refusal}")
    rows = backend_latencies(models, x, backends=backends, threads=threads, rounds=rounds)
    return (
        f"## {case}, batch {batch}\n\n"
        + costs(models, x, "onnx" in backends)
        + "\n"
        + latencies(rows, {kind: measuring.macs(small, x) for kind, small in models.items()})
    )


def costs(models: dict[str, nn.Module], x: Tensor, graphs: bool) -> str:
    dense = models["dense"]
    rows = []
    for kind, small in models.items():
        row = [
            kind,
            share(measuring.parameters(small), measuring.parameters(dense), 1e6, "M"),
            share(measuring.macs(small, x), measuring.macs(dense, x), 1e6, "M"),
            share(measuring.file_bytes(small), measuring.file_bytes(dense), 2**20, "MiB"),
        ]
        if graphs:
            with tempfile.TemporaryDirectory() as folder:
                pliant.export(small, Path(folder, "out"), x[:2], ["pt2", "onnx"])
                files = json.loads(Path(folder, "out", "export.json").read_text(encoding="utf-8"))["files"]
            row += [f"{files[file]['max_difference']:.0e}" for file in ("model.pt2", "model.onnx")]
        rows.append(row)
    differences = ["difference, pt2", "difference, ONNX"] if graphs else []
    return table(["", "parameters", "MACs", "bytes", *differences], rows)


def share(value: float, dense: float, unit: float, name: str) -> str:
    return f"{value / unit:,.2f} {name} ({100 * value / dense:.0f} %)"


def latencies(rows: list[Latency], macs: dict[str, int]) -> str:
    """Return the table of milliseconds and speed-ups; "of ideal" is the speed-up divided by the ratio of MACs."""
    dense = {(row.backend, row.threads): row for row in rows if row.model == "dense"}
    lines = []
    for row in sorted(rows, key=lambda row: (row.threads, row.backend)):
        reference = dense[row.backend, row.threads]
        line = [row.backend, str(row.threads), row.model]
        if row.skipped or reference.skipped:
            lines.append([*line, f"skipped: {row.skipped or reference.skipped}", "", ""])
            continue
        speedup = row.speedup(over=reference)
        ideal = macs["dense"] / macs[row.model]
        speedups = [spread(speedup), f"{speedup[1] / ideal:.2f}"] if row is not reference else ["", ""]
        lines.append([*line, spread([1e3 * t for t in row.quartiles()]), *speedups])
    return table(["backend", "threads", "network", "ms", "speed-up", "of ideal"], lines)


def planning(rounds: int) -> str:
    """Time the removal of half of ResNet-18's channels, from the trained network to the small one."""
    model = pliant.build_model("resnet18", num_classes=10, image_shape=(3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    lines = []
    for compressor in (pliant.FilterPruning(0.75, "uniform"), pliant.LowRank(0.5)):
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            small = pliant.compress(model, compressor, x)
            seconds.append(time.perf_counter() - start)
        removed = share(measuring.parameters(small), measuring.parameters(model), 1e6, "M")
        lines.append(
            [f"{compressor}", removed, f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"]
        )
    return (
        "## From the trained network to the small one, ResNet-18, 32×32\n\n"
        "Analysis, plan, removal and verification. A share of 75 % of the parameters is half of the channels.\n\n"
        + table(["compressor", "parameters left", "seconds, median (range)"], lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backends", default="eager,compile,onnx")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="", help="part of a case's name, or planning")
    arguments = parser.parse_args()
    backends = arguments.backends.split(",")
    threads = [int(count) for count in arguments.threads.split(",")]
    text = (
        f"# What compression gains at run time, {datetime.date.today()}\n\n"
        f"`python benchmarks/latency.py --rounds {arguments.rounds} --backends {arguments.backends} "
        f"--threads {arguments.threads}`; torch {torch.__version__}, {processor()}. Random weights, compressed to "
        f"{KEPT:.0%} of the MACs, float32. Milliseconds and speed-ups are medians over rounds that all rows of a table "
        "took in turn, with quartiles; the ideal speed-up is the ratio of the MACs.\n"
    )
    parts = {case: lambda case=case: measure(case, backends, threads, arguments.rounds) for case in CASES}
    for part, run in {"planning": lambda: planning(3), **parts}.items():
        if arguments.only in part:
            text += "\n" + run()
            print(text.rpartition("\n## ")[2], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"latency-{datetime.date.today()}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
