"""Measure what a sweep of ten sizes spends its time on, for a network of 23.5 million parameters (ResNet-50).

    python benchmarks/sweep.py --data_dir FOLDER --out benchmarks/results

The network has random weights; CIFAR-10 is averaged to 8×8, which keeps the evaluation as small as possible.
Evaluation measures accuracy and latency. Every size needs its own re-estimation of BatchNorm, which has its own column.
Everything else is the search for the sizes: tracing, decompositions, plans, removal, counting. Seconds are CPU
seconds of one thread, which other programs disturb less than the clock. Writes a dated note.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from notes import processor, table

import pliant
from pliant import measuring
from pliant.experiments import run_folder as runs
from pliant.experiments import workbench
from pliant.experiments.sweep import sweep
from pliant.storage import WEIGHTS, save_weights

RATIOS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
COMPRESSORS = {"filters": pliant.FilterPruning, "rank": pliant.LowRank}
COLUMNS = ("accuracy", "latency", "BatchNorm", "curves of the layers", "plans", "removal", "reading images", "the rest")


def make_run(folder: Path, data_dir: str) -> Path:
    """Write the folder of a run without training it."""
    torch.manual_seed(0)
    shape = (3, 8, 8)
    model = pliant.build_model("resnet50", num_classes=10, image_shape=shape)
    folder.mkdir()
    settings = {"data": "cifar10", "data_dir": data_dir, "image_size": 8, "model": "resnet50", "width": 1.0, "seed": 0}
    usual = {"method": "sgd", "batch_size": 128, "augment": True, "precision": "bf16", "channels_last": True}
    runs.write_config(folder / runs.CONFIG, {**settings, **usual})
    runs.write_shape(folder, 10, shape)
    save_weights(model, folder / WEIGHTS)
    return folder


def shares(run: Path, compressor: str) -> tuple[float, Counter[str]]:
    """Return the CPU seconds of a sweep and of its parts."""
    spent: Counter[str] = Counter()

    def timed(owner: Any, name: str, part: str) -> Any:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                spent[part] += time.process_time() - start

        return patch.object(owner, name, call)

    kind = COMPRESSORS[compressor]
    with (
        timed(measuring, "evaluate", "accuracy"),
        timed(measuring, "latencies", "latency"),
        timed(workbench, "reestimate_batchnorm", "BatchNorm"),
        timed(kind, "analyse", "curves of the layers"),
        timed(kind, "plan", "plans"),
        timed(kind, "apply", "removal"),
        timed(runs, "load_data", "reading images"),
        tempfile.TemporaryDirectory() as folder,
    ):
        start = time.process_time()
        sweep([str(run)], compressor, ratios=RATIOS, out=str(Path(folder) / "records.jsonl"))
        return time.process_time() - start, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", arguments.data_dir)
        for compressor in COMPRESSORS:
            total, spent = shares(run, compressor)
            spent["the rest"] = total - sum(spent.values())
            evaluated = spent["accuracy"] + spent["latency"]
            outside = [1 - (evaluated + spent["BatchNorm"]) / total, 1 - evaluated / total]
            seconds = [f"{spent[column]:.1f}" for column in COLUMNS]
            rows.append([compressor, f"{total:.0f}", *seconds, *(f"{100 * share:.0f} %" for share in outside)])
    text = (
        f"# What a sweep of ten sizes spends its time on, {datetime.date.today()}\n\n"
        f"`python benchmarks/sweep.py --data_dir FOLDER`; torch {torch.__version__}, 1 thread, {processor()}.\n"
        "ResNet-50 (23.5M parameters), CIFAR-10 averaged to 8×8, random weights, the defaults of `pliant sweep` (rank\n"
        "is whitened). CPU seconds.\n\n"
    )
    text += table(["", "all", *COLUMNS, "outside of evaluation", "with BatchNorm"], rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"sweep-{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
