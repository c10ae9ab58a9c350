"""Records made up for the tests of curves, tables and pages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pliant.records import Record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&<!--"
"""A name that tries to leave its place in HTML, JSON and a shell."""

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
# Where a method's accuracy has fallen halfway to chance, as a removed share; and its dense accuracy.
METHODS = {"sgd": (0.45, 0.921), "sfw-rank": (0.93, 0.906), "sfw-filters": (0.85, 0.898)}
EASE = {"rank": 1.0, "rank-whitened": 1.1, "filters": 0.85, "weights": 1.05}
SIZES = {"resnet20": (272_474, 40_813_184), "lenet": (61_706, 416_520)}


def sample(method: str, compressor: str, ratio: float, *, seed: int = 0, pattern: str = "", **changes: Any) -> Record:
    """Return a record as a sweep makes it: SGD falls off early, the constrained trainings late."""
    model = changes.get("model", "resnet20")
    params, macs = SIZES[model]
    half, dense = METHODS[method]
    dense += 0.003 * (seed - 1)
    half *= EASE.get(compressor, 1.0)
    fall = 1 / (1 + math.exp(14 * (ratio - half))) * (1 + math.exp(-14 * half))
    top1 = 0.1 + (dense - 0.1) * min(1.0, fall) + 0.03 * ratio * math.sin(7 * seed + 9 * ratio)
    raw = 0.1 + (top1 - 0.1) * (1 - ratio) ** 0.5
    stays = compressor in ("weights", "nm")
    left = params if stays else round(params * (1 - 0.97 * ratio))
    values: dict[str, Any] = {
        "run": f"{method}-{model}-{seed}",
        "method": method,
        "model": model,
        "data": "cifar10",
        "seed": seed,
        "compressor": compressor,
        "allocation": "" if compressor == "nm" else "global",
        "pattern": pattern,
        "ratio": ratio,
        "ratio_removed": ratio,
        "top1": top1,
        "top1_raw": raw,
        "top1_dense": dense,
        "val_top1": top1,
        "params": left,
        "params_dense": params,
        "nonzero": round(params * (1 - 0.97 * ratio)),
        "nonzero_dense": params,
        "macs": macs if stays else round(macs * (1 - 0.9 * ratio)),
        "macs_dense": macs,
        "bytes": 4 * left + 9_000,
        "bytes_dense": 4 * params + 9_000,
        "latency_s": 0.031 if stays else 0.031 * (1 - 0.6 * ratio),
        "latency_dense_s": 0.031,
        "latency_batch": 64,
        "versions": {"torch": "2.13.0", "numpy": "2.4.6", "pliant": "0.1.0"},
        "weights": f"{sum(map(ord, method)) + seed:064x}",
        "config": {"epochs": 60, "seed": seed, "optimizer": {"lr": 0.1, "momentum": 0.9, "radius": 10}},
        "created": "2026-01-02T03:04:05+00:00",
    }
    if ratio and not stays:
        values["layers"] = [
            {
                "name": f"stage{1 + index // 3}.block{index % 3}.conv1",
                "kind": "filters" if compressor == "filters" else "rank",
                "kept": max(1, round(16 * 2 ** (index // 3) * (1 - ratio) ** (0.4 + 0.15 * index))),
                "total": 16 * 2 ** (index // 3),
                "params": round(2304 * 4 ** (index // 3) * (1 - ratio)),
                "params_dense": 2304 * 4 ** (index // 3),
            }
            for index in range(9)
        ]
        values["refused"] = [["fc", "the classifier's outputs are the classes"]]
    return Record(**(values | changes))


def sweep(methods: tuple[str, ...] = tuple(METHODS), seeds: int = 3, **changes: Any) -> list[Record]:
    """Return the records of a whole benchmark."""
    runs = [(method, seed) for method in methods for seed in range(seeds)]
    records = [
        sample(method, compressor, ratio, seed=seed, **changes)
        for method, seed in runs
        for compressor in EASE
        for ratio in RATIOS
    ]
    patterns = (("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75))
    return records + [
        sample(method, "nm", ratio, seed=seed, pattern=pattern, **changes)
        for method, seed in runs
        for pattern, ratio in patterns
    ]


def write(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record.to_dict()) + "\n" for record in records), encoding="utf-8")
    return path


def point(method: str, seed: int, removed: float, top1: float, **changes: Any) -> Record:
    """Return a record of a network of 1000 parameters in round numbers: a share is removed, half of it of the MACs.

    Raw accuracies are half of the others.
    """
    left = round(1000 * (1 - removed))
    values: dict[str, Any] = {
        "run": f"{method}-{seed}",
        "method": method,
        "model": "small",
        "data": "digits",
        "seed": seed,
        "compressor": "rank",
        "allocation": "global",
        "ratio": removed,
        "top1": top1,
        "top1_raw": top1 / 2,
        "top1_dense": top1,
        "val_top1": top1,
        "params": left,
        "params_dense": 1000,
        "nonzero": left,
        "nonzero_dense": 1000,
        "macs": round(100_000 * (1 - removed / 2)),
        "macs_dense": 100_000,
        "bytes": 4 * left,
        "bytes_dense": 4000,
        "latency_s": 0.01,
        "latency_dense_s": 0.01,
        "versions": {},
        "weights": f"{method}{seed}",
    }
    return Record(**(values | changes))


def line(method: str, seed: int, *heights: float, **changes: Any) -> list[Record]:
    """Return the records of a run: accuracies at equal distances from nothing to 0.9 removed; one is a flat line."""
    tops = heights if len(heights) > 1 else heights * 2
    shares = [0.9 * index / (len(tops) - 1) for index in range(len(tops))]
    return [point(method, seed, share, top, **changes) for share, top in zip(shares, tops, strict=True)]


def cost(equal: str = "epochs", step: float = 1.0, memory: float = 1.0, seconds: float = 10.0) -> dict[str, Any]:
    """Return what a training cost, in units of SGD's step of 2 ms and 1000 bytes."""
    step_s, held = 0.002 * step, round(1000 * memory)
    return {
        "equal": equal,
        "seconds": seconds,
        "step_s": step_s,
        "step_s_sgd": 0.002,
        "memory": held,
        "memory_sgd": 1000,
    }
