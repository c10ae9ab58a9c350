"""One trained network under one compressor: compressed to a ratio or a budget, and measured.

Sweeps, comparisons and ``pliant compress`` all use a :class:`Workbench`. The network is analysed only once (dependency
graph, singular value decompositions), for all ratios.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.compression import Chain, Compressor, Magnitude, Plan, SemiStructured, budgets, reestimate_batchnorm
from pliant.compression.base import option_names
from pliant.compression.by_name import allocation_of, check_names, class_named, row_of, unit_of
from pliant.compression.elastic import Elastic
from pliant.compression.ladder import make_elastic
from pliant.compressor_names import (
    CALIBRATION,
    COMPRESSORS,
    SCHEME,
    TITLE,
    factorises,
    parse_pattern,
    record_name,
    resolve_scheme,
    takes_pattern,
)
from pliant.errors import BadInput
from pliant.experiments.controls import options_for
from pliant.experiments.data.loader import Loader
from pliant.experiments.run_folder import Run
from pliant.measuring import versions
from pliant.records import Key, LayerCount, Record, record_key

LATENCY_BATCH = 1

Refine = Callable[[nn.Module, int], nn.Module]


class Workbench:
    """A run and a compressor, ready to be measured at any ratio.

    Args:
        run: a trained network.
        compressor: one of :data:`~pliant.compressor_names.ALONE`, or a chain of
            :data:`~pliant.compressor_names.LINKS` joined by "+".
        allocation: "uniform", "global" or "energy"; ignored by compressors without that choice.
        calibration: number of training images for whitening and the BatchNorm re-estimation; always the same images,
            without augmentation.
        precision: precision of the forward passes that measure accuracy; "auto" is the precision of the training.
        whiten: whether rank looks at the calibration images.
        scheme: how rank factorises convolutions, see :class:`~pliant.LowRank`.
        controls: what every layer keeps, as :func:`~pliant.experiments.controls.controls_of` returns it.

    Raises:
        BadInput: a name is unknown, a value is out of range, or options exclude each other.
    """

    def __init__(
        self,
        run: Run,
        compressor: str,
        *,
        allocation: str = "global",
        calibration: int = CALIBRATION,
        precision: str = "auto",
        whiten: bool = True,
        scheme: str | None = None,
        controls: Mapping[str, Any] | None = None,
    ) -> None:
        check_names(compressor, allocation)
        self.scheme = resolve_scheme(compressor, scheme)
        if calibration < 2:
            raise BadInput(f"--calibration must be at least 2 images, got {calibration}")
        self.run = run
        self.compressor = compressor
        self.whiten = whiten and factorises(compressor)
        self.allocation = allocation_of(compressor, allocation)
        self.calibration = calibration
        self.controls = dict(controls or {})
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = run.config.get("precision", "auto") if precision == "auto" else precision
        self.precision = measuring.resolve_precision(precision, self.device)
        self._analyses: dict[type, Any] = {}

    @property
    def name(self) -> str:
        """The compressor with its variant, as records name it."""
        return record_name(self.compressor, self.whiten, self.scheme, self.controls)

    def key(self, ratio: float, pattern: str = "") -> Key:
        """Return the :meth:`Record.key` of the record of this ratio or pattern, without measuring."""
        return record_key(
            run=self.run.name,
            weights=self.run.weights_hash,
            compressor=self.name,
            allocation=self.allocation,
            ratio=ratio,
            pattern=pattern,
            config=self._settings,
        )

    def measure(
        self, ratio: float, pattern: str = "", refine: Refine | None = None, ratios_before: Sequence[float] = ()
    ) -> tuple[nn.Module, Plan, Record]:
        """Compress to a ratio and measure.

        Args:
            ratio: share to remove.
            pattern: for nm, the pattern; ratio 0 without a pattern is the dense network.
            refine: maps the compressed network, and the number of earlier calls, to the network to measure instead.
            ratios_before: ratios to compress to and refine at first, in order. This is for compressors that zero
                weights, because all their ratios are shares of the dense network.

        Returns:
            The compressed network with re-estimated BatchNorm statistics, in eval mode; the plan; and the record.
        """
        small = self.dense
        for index, share in enumerate((*ratios_before, ratio)):
            small, plan = self._compressed(small, share, pattern)
            if refine is not None:
                small = refine(small, index)
        return self._measured(small, plan, plan.ratio_removed if pattern else ratio, pattern)

    def validate(self, ratio: float, pattern: str = "") -> tuple[float, float]:
        """Compress as :meth:`measure` does; return the removed share of all parameters and the validation accuracy.

        If the compressor zeroes parameters instead of removing them, it is a share of the non-zeros. Test images are
        not used.
        """
        small = self._settled(self._compressed(self.dense, ratio, pattern)[0])
        left = measuring.parameters(small) / measuring.parameters(self.dense)
        if left == 1:
            left = measuring.nonzero(small) / measuring.nonzero(self.dense)
        return 1 - left, self._accuracy(small, "val")

    def _compressed(self, network: nn.Module, ratio: float, pattern: str) -> tuple[nn.Module, Plan]:
        compressor = self._compressor(ratio, pattern)
        analysis = self._analysis(compressor) if network is self.dense else None
        plan = compressor.plan(network, self._images(2), analysis=analysis)
        return compressor.apply(network, plan, analysis=analysis), plan

    def fit(self, budget: budgets.Budget) -> tuple[nn.Module, Plan, Record]:
        """Compress to a budget, counting costs on one image, and measure; return the same as :meth:`measure`.

        Raises:
            Refused: the budget is out of reach.
        """
        compressor = self._compressor(0.5)

        def accuracy(network: nn.Module) -> float:
            return self._accuracy(network if network is self.dense else self._settled(network), "val")

        image = self._images(LATENCY_BATCH)
        plan = budgets.fit(self.dense, compressor, image, budget, self._analysis(compressor), accuracy)
        small = compressor.apply(self.dense, plan, analysis=self._analysis(compressor))
        return self._measured(small, plan, plan.ratio, "", budget=str(budget))

    def elastic(self, ladder: Sequence[float]) -> Elastic:
        """Return what makes every size of the network from its dense weights, refitted on the calibration images."""
        compressor = self._compressor(0.5)
        return make_elastic(self.dense, compressor, self._images(LATENCY_BATCH), self._calibration_images, ladder)

    def _analysis(self, compressor: Compressor[Any]) -> Any:
        kind = type(compressor)
        if kind not in self._analyses:
            images = self._calibration_images if self._looks_at_images else None
            self._analyses[kind] = compressor.analyse(self.dense, self._images(2), images)
        return self._analyses[kind]

    @property
    def _looks_at_images(self) -> bool:
        """Whether the analysis gets the calibration images: for rank, and for compressors of other packages."""
        return self.whiten or any(link not in COMPRESSORS for link in self.compressor.split("+"))

    def _settled(self, network: nn.Module) -> nn.Module:
        return reestimate_batchnorm(network, self._calibration_images)

    def _measured(
        self, raw: nn.Module, plan: Plan, ratio: float, pattern: str, **settings: str
    ) -> tuple[nn.Module, Plan, Record]:
        small = self._settled(raw)
        image = self._images(LATENCY_BATCH)
        latency, latency_dense = measuring.latencies([small, self.dense], image)
        record = Record(
            run=self.run.name,
            method=self.run.config["method"],
            model=self.run.config["model"],
            data=self.run.config["data"],
            seed=self.run.config["seed"],
            compressor=self.name,
            allocation=self.allocation,
            pattern=pattern,
            ratio=ratio,
            ratio_removed=plan.ratio_removed,
            top1=self._accuracy(small, "test"),
            top1_raw=self._accuracy(raw, "test"),
            top1_dense=self._dense_costs["top1"],
            val_top1=self._accuracy(small, "val"),
            val_top1_raw=self._accuracy(raw, "val"),
            params=measuring.parameters(small),
            params_dense=measuring.parameters(self.dense),
            nonzero=measuring.nonzero(small),
            nonzero_dense=self._dense_costs["nonzero"],
            macs=measuring.macs(small, image),
            macs_dense=self._dense_costs["macs"],
            bytes=measuring.file_bytes(small),
            bytes_dense=self._dense_costs["bytes"],
            latency_s=latency,
            latency_dense_s=latency_dense,
            latency_batch=LATENCY_BATCH,
            chance=1 / self.run.data.num_classes,
            layers=_layer_counts(plan),
            refused=[list(pair) for pair in plan.refused],
            weights=self.run.weights_hash,
            config=self.run.config | self._settings | settings,
            versions=versions(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            extra=self._title,
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
            "nonzero": measuring.nonzero(self.dense),
            "macs": measuring.macs(self.dense, self._images(1)),
            "bytes": measuring.file_bytes(self.dense),
        }

    @property
    def _settings(self) -> dict[str, Any]:
        settings = {"calibration": self.calibration, "evaluation_precision": self.precision}
        return settings | ({"controls": self.controls} if self.controls else {})

    @property
    def _title(self) -> dict[str, Any]:
        """The title of a compressor of another package, which a report cannot look up."""
        if "+" in self.compressor or self.compressor in COMPRESSORS:
            return {}
        title = row_of(self.compressor).removed
        return {TITLE: title} if title else {}

    @cached_property
    def _calibration_images(self) -> Loader:
        count = min(self.calibration, len(self.run.data.train))
        batch = math.ceil(count / math.ceil(count / 256))  # batches of nearly equal size: all have one weight
        return Loader(self.run.data, "train", batch, limit=count)

    def _compressor(self, ratio: float, pattern: str = "") -> Compressor[Any]:
        if pattern:
            return pattern_compressor(pattern)
        if takes_pattern(self.compressor):
            return Magnitude(ratio=0.0)  # the dense network of a sweep over patterns
        links = [self._link(name) for name in self.compressor.split("+")]
        return (links[0] if len(links) == 1 else Chain(*links)).at(ratio)

    def _link(self, name: str) -> Compressor[Any]:
        kind = class_named(name)
        options: dict[str, Any] = {}
        if "allocation" in option_names(kind):
            options["allocation"] = self.allocation
        if factorises(name):
            options |= {"whiten": self.whiten, "scheme": self.scheme or SCHEME}
        return kind(**options, **options_for(kind, self.controls))

    def _accuracy(self, model: nn.Module, split: str) -> float:
        return measuring.evaluate(model, Loader(self.run.data, split, 512), self.device, self.precision)

    def _images(self, count: int) -> Tensor:
        return next(iter(Loader(self.run.data, "val", count)))[0].to(self.device).contiguous()


def pattern_compressor(pattern: str) -> SemiStructured:
    """Return the compressor of a pattern such as "2:4"; raise BadInput unless it is N:M with 1 <= N < M."""
    return SemiStructured(*parse_pattern(pattern))


def _layer_counts(plan: Plan) -> list[LayerCount]:
    """Return the kept parts of every layer; in a chain, counted by the last link that cut the layer, in its unit."""
    counts: dict[str, LayerCount] = {}
    for part in plan.links or (plan,):
        unit = unit_of(part)
        for layer in part.layers:
            if len(layer.shape) < 2 or not unit:
                continue
            before = counts.get(layer.name)
            counts[layer.name] = LayerCount(
                name=layer.name,
                kind=unit,
                kept=layer.kept,
                total=layer.total,
                params=layer.params,
                params_dense=layer.params_dense if before is None else before["params_dense"],
            )
    return list(counts.values())
