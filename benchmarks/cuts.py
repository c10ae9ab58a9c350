"""Cut trained networks to the same sizes in every way there is, without retraining, and compare what is left of them.

    python benchmarks/cuts.py train --data_dir FOLDER    # trains the networks: an hour on two cores; resumes
    python benchmarks/cuts.py measure                    # appends to build/cuts/rows.jsonl: hours; resumes
    python benchmarks/cuts.py note --out benchmarks/results

Every family of methods (torch-pruning's scores, pliant's norms, its data-aware cuts, …) has several settings. For each
network, cost and share the setting with the best accuracy on validation images stands for the family, after
BatchNorm's statistics were re-estimated on the calibration images; the test images judge that network alone. "Taylor"
and "Hessian" read the labels of the calibration images, the others none. torch-pruning's networks have the share
nearest to the wanted one, ours the nearest below it.

``--only``, ``--kinds``, ``--families``, ``--costs`` and ``--shares`` measure a part. Families that a newer pliant adds
are measured when the command runs again. Networks with weights from packages: see ``subjects.py``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cut_tables import note
from peers import shares
from subjects import ROOT, SHIPPED, TRAININGS, Scores, Subject, missing, seeds, subject
from torch import nn
from variants import COSTS, KINDS, SHARES, Family, Variant, families

import pliant
from pliant.jsonl import append_line, read_lines

Row = dict[str, Any]
Key = tuple[Any, ...]
TOLERANCE = 0.02  # how far the share may be from the wanted one, for the network to count
KEYS = ("network", "seed", "kind", "cost", "share", "family")


# --- training ---------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Train what is not trained yet, one network after the other."""
    for name, training in TRAININGS.items():
        for seed in training.seeds:
            folder = (arguments.runs / training.folder.format(seed=seed)).resolve()
            if not wanted(name, arguments) or (folder / "model.safetensors").exists():
                continue
            data = ["--data_dir", arguments.data_dir] if "cifar" in training.flags else []
            flags = [*training.flags.split(), *data, "--seed", str(seed)]
            flags = ["--resume", "true"] if folder.exists() else flags
            print(f"{name}, seed {seed}: pliant train {' '.join(flags)} --out {folder}", flush=True)
            command = [sys.executable, "-m", "pliant", "train", *flags, "--out", str(folder)]
            subprocess.run(command, cwd=ROOT, check=True)


def wanted(name: str, arguments: argparse.Namespace) -> bool:
    return not arguments.only or name in arguments.only.split(",")


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> None:
    """Append a row for every network, kind of cut, cost, share and family that has none yet."""
    torch.set_num_threads(arguments.threads)
    file = arguments.rows
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {key(row) for row in read_rows(file)}
    print(json.dumps(configuration(arguments)), flush=True)
    for name in [*TRAININGS, *SHIPPED]:
        for seed in seeds(name):
            if not wanted(name, arguments):
                continue
            if reason := missing(name, seed, arguments.runs):
                print(f"{name}, seed {seed}: skipped: {reason}", flush=True)
                continue
            thing = subject(name, seed, arguments.runs, arguments.images)
            for row in new_rows(thing, done, arguments):
                append_line(file, {**row, "config": configuration(arguments)})
                print(line(row), flush=True)


def new_rows(thing: Subject, done: set[Key], arguments: argparse.Namespace) -> Iterable[Row]:
    base = {"network": thing.name, "seed": thing.seed}
    dense = {**base, "kind": "dense", "cost": "", "share": 1.0, "family": "dense"}
    if key(dense) not in done:
        yield {**dense, "val": thing.val(thing.model), "test": thing.test(thing.model)}
    parts = arguments.families.split(",")  # "" is a part of every name
    for family in families(thing):
        if family.kind not in arguments.kinds.split(",") or not any(part in family.name for part in parts):
            continue
        for cost in [cost for cost in COSTS[family.kind] if cost in arguments.costs.split(",")]:
            for share in arguments.shares:
                row = {**base, "kind": family.kind, "cost": cost, "share": share, "family": family.name}
                if key(row) not in done and (family.kind != "nm" or share == 0.5):
                    yield {**row, "labels": family.labels, **best(thing, family, cost, share)}


def best(thing: Subject, family: Family, cost: str, share: float) -> Row:
    """Measure all settings of a family on validation data, and the best one on test data."""
    trials: list[Row] = []
    winner: tuple[float, Variant, nn.Module, nn.Module, Row] | None = None
    for variant in family.variants:
        trial: Row = {"setting": variant.setting}
        trials.append(trial)
        start = time.perf_counter()
        try:
            network = variant.make(cost, share)
        except pliant.Refused as refusal:
            trial["refused"] = str(refusal)[:200]
            continue
        except Exception as error:  # other packages' code; one setting that fails does not end a run of hours
            trial["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{thing.name}, {family.name}, {variant.setting}: {trial['failed']}", flush=True)
            continue
        trial["seconds"] = round(time.perf_counter() - start, 3)
        params, macs = shares(thing, network)
        trial |= {"params": round(params, 5), "macs": round(macs, 5), "zeros": round(zeros(network), 5)}
        settled = network if variant.settled else pliant.reestimate_batchnorm(network, thing.calibration)
        trial["val"] = rounded(thing.val(settled))
        reached = {"params": params, "macs": macs, "entries": share}[cost]
        trial["reached"] = abs(reached - share) <= TOLERANCE
        score = next(iter(trial["val"].values()))
        if trial["reached"] and (winner is None or score > winner[0]):
            winner = score, variant, network, settled, trial
    result: Row = {"trials": trials}
    if winner is not None:
        _, variant, network, settled, trial = winner
        result |= {"setting": variant.setting, "settled": variant.settled, "params": trial["params"]}
        result |= {"macs": trial["macs"], "seconds": trial["seconds"], "val": trial["val"]}
        result["test"] = rounded(thing.test(settled))
        if not variant.settled:
            result["raw"] = rounded(thing.test(network))
    return result


def zeros(network: nn.Module) -> float:
    """Return the share of the parameters that are zero."""
    counts = [(int((p == 0).sum()), p.numel()) for p in network.parameters()]
    return sum(zero for zero, _ in counts) / sum(count for _, count in counts)


def rounded(scores: Scores) -> Scores:
    return {name: round(value, 5) for name, value in scores.items()}


def key(row: Row) -> Key:
    return tuple(row[name] for name in KEYS)


def read_rows(file: Path) -> list[Row]:
    return read_lines(file, dict, "rows") if file.exists() else []


def line(row: Row) -> str:
    """Return a row as a line of the log."""
    name = f"{row['network']}-{row['seed']} {row['kind']} {row['cost']} {row['share']:.0%} {row['family']}"
    if "test" not in row:
        return f"{name}: out of reach"
    spent = sum(trial.get("seconds", 0) for trial in row.get("trials", []))
    return (
        f"{name}: {row.get('setting', '')} val {row['val']} raw {row.get('raw', '')} test {row['test']} {spent:.1f} s"
    )


def configuration(arguments: argparse.Namespace) -> Row:
    """Return what a measurement depends on."""
    packages = ("torch", "torch-pruning", "transformers")
    return {
        "images": arguments.images,
        "threads": arguments.threads,
        "date": str(datetime.date.today()),
        "pliant": commit(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def commit() -> str:
    """Return the commit of this checkout, or the version of pliant."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or importlib.metadata.version("pliant")


# --- the command ------------------------------------------------------------------------------------------------------


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("train", "measure", "note"))
    parser.add_argument("--data_dir", default=None, help="folder of CIFAR-10's parquet files, for training")
    parser.add_argument("--runs", type=Path, default=Path("build/cuts/runs"), help="the trained networks")
    parser.add_argument("--rows", type=Path, default=Path("build/cuts/rows.jsonl"))
    parser.add_argument("--only", default="", help="networks, with commas")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--families", default="", help="parts of names of families, with commas")
    parser.add_argument("--costs", default="params,macs,entries")
    parser.add_argument("--shares", type=lambda text: [float(s) for s in text.split(",")], default=list(SHARES))
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=None, help="folder for the dated note; without it, it is printed")
    arguments = parser.parse_args(given)
    if arguments.verb == "train":
        train(arguments)
    elif arguments.verb == "measure":
        measure(arguments)
    else:
        text = note(read_rows(arguments.rows))
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"cuts-{datetime.date.today()}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
