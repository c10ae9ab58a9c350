"""One trained network under one compressor: what is left at a ratio, and what it cost.

Sweeping and compressing a run both ask a :class:`Trial`. The analysis of the network (dependency graph, singular value
decompositions) is made once and serves every ratio.
"""

from __future__ import annotations

import datetime
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.compression import (
    Compressor,
    FilterPruning,
    LayerPlan,
    LowRank,
    Magnitude,
    Plan,
    SemiStructured,
    reestimate_batchnorm,
)
from pliant.compression.base import ALLOCATIONS, check_choice
from pliant.data import Loader
from pliant.errors import BadInput
from pliant.methods import parse_pattern
from pliant.records import LayerCount, Record
from pliant.runs import Run, versions

UNITS = {"filters": "channels", "rank": "rank", "weights": "weights", "nm": "weights"}
COMPRESSORS = tuple(UNITS)
LATENCY_BATCH = 1


class Trial:
    """A run and a compressor, ready to be measured at any ratio.

    Args:
        run: a trained network.
        compressor: one of :data:`COMPRESSORS`.
        allocation: "uniform" or "global"; without meaning for nm.
        calibration: number of training images for the BatchNorm re-estimation, a fixed choice, not augmented.
        precision: of the accuracy's forward passes, as in training; "auto" is the run's own.
    """

    def __init__(
        self, run: Run, compressor: str, *, allocation: str = "global", calibration: int = 2048, precision: str = "auto"
    ) -> None:
        check_names(compressor, allocation)
        if calibration < 2:
            raise BadInput(f"--calibration must be at least 2 images, got {calibration}")
        self.run = run
        self.compressor = compressor
        self.allocation = "" if compressor == "nm" else allocation
        self.calibration = calibration
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        wanted = run.config.get("precision", "auto") if precision == "auto" else precision
        self.precision = measuring.resolve_precision(wanted, self.device)
        self._analyses: dict[type, Any] = {}

    def key(self, ratio: float, pattern: str = "") -> tuple[str, str, str, str, str | float]:
        """Return the :meth:`Record.key` that the record of this ratio or pattern has, without measuring."""
        return self.run.name, self.run.weights_hash, self.compressor, self.allocation, pattern or round(ratio, 6)

    def measure(self, ratio: float, pattern: str = "") -> tuple[nn.Module, Plan, Record]:
        """Compress to a ratio (nm: a pattern, or ratio 0 for none) and measure.

        Returns the compressed network with re-estimated BatchNorm statistics, in eval mode, the plan and the record.
        """
        compressor = self._compressor(ratio, pattern)
        kind = type(compressor)
        if kind not in self._analyses:
            self._analyses[kind] = compressor.analyse(self.dense, self._images(2))
        plan = compressor.plan(self.dense, self._images(2), analysis=self._analyses[kind])
        raw = compressor.apply(self.dense, plan, analysis=self._analyses[kind])
        count = min(self.calibration, len(self.run.data.train))
        batch = math.ceil(count / math.ceil(count / 256))  # batches as equal as can be: each has the same weight
        images = Loader(self.run.data, "train", batch, limit=count)
        small = reestimate_batchnorm(raw, ((x.to(self.device), y) for x, y in images))
        one = self._images(LATENCY_BATCH)
        latency, latency_dense = measuring.latencies([small, self.dense], one)
        record = Record(
            run=self.run.name,
            method=self.run.config["method"],
            model=self.run.config["model"],
            data=self.run.config["data"],
            seed=self.run.config["seed"],
            compressor=self.compressor,
            allocation=self.allocation,
            pattern=pattern,
            ratio=plan.ratio_removed if pattern else ratio,
            ratio_removed=plan.ratio_removed,
            top1=self._accuracy(small, "test"),
            top1_raw=self._accuracy(raw, "test"),
            top1_dense=self._dense_costs["top1"],
            val_top1=self._accuracy(small, "val"),
            val_top1_raw=self._accuracy(raw, "val"),
            params=measuring.parameters(small),
            params_dense=measuring.parameters(self.dense),
            nonzero=measuring.nonzero(small),
            nonzero_dense=measuring.nonzero(self.dense),
            macs=measuring.macs(small, one),
            macs_dense=self._dense_costs["macs"],
            bytes=measuring.file_bytes(small),
            bytes_dense=self._dense_costs["bytes"],
            latency_s=latency,
            latency_dense_s=latency_dense,
            latency_batch=LATENCY_BATCH,
            layers=[self._layer_count(layer) for layer in plan.layers if len(layer.shape) > 1],
            refused=[list(pair) for pair in plan.refused],
            weights=self.run.weights_hash,
            config=self.run.config | {"calibration": self.calibration, "evaluation_precision": self.precision},
            versions=versions(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        return small, plan, record

    @cached_property
    def dense(self) -> nn.Module:
        """The trained network."""
        return self.run.load().to(self.device)

    @cached_property
    def _dense_costs(self) -> dict[str, Any]:
        return {
            "top1": self._accuracy(self.dense, "test"),
            "macs": measuring.macs(self.dense, self._images(1)),
            "bytes": measuring.file_bytes(self.dense),
        }

    def _compressor(self, ratio: float, pattern: str) -> Compressor[Any]:
        match self.compressor:
            case "filters":
                return FilterPruning(ratio=ratio, allocation=self.allocation)
            case "rank":
                return LowRank(ratio=ratio, allocation=self.allocation)
            case "weights":
                return Magnitude(ratio=ratio, allocation=self.allocation)
        if not pattern:
            return Magnitude(ratio=0.0)  # the dense network of a sweep over patterns
        n, m = parse_pattern(pattern)
        return SemiStructured(n=n, m=m)

    def _layer_count(self, layer: LayerPlan) -> LayerCount:
        return LayerCount(
            name=layer.name,
            kind=UNITS[self.compressor],
            kept=layer.kept,
            total=layer.total,
            params=layer.params,
            params_dense=layer.params_dense,
        )

    def _accuracy(self, model: nn.Module, split: str) -> float:
        return measuring.evaluate(model, Loader(self.run.data, split, 512), self.device, self.precision)

    def _images(self, count: int) -> Tensor:
        return next(iter(Loader(self.run.data, "val", count)))[0].to(self.device).contiguous()


def check_names(compressor: str, allocation: str) -> None:
    """Raise BadInput for an unknown compressor or allocation."""
    check_choice("compressor", compressor, COMPRESSORS)
    check_choice("allocation", allocation, ALLOCATIONS)
