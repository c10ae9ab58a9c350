"""One trained network under one compressor: compressed to a ratio or a budget, and measured.

Sweeps, comparisons and ``pliant compress`` all use a :class:`Workbench`. The network is analysed only once (dependency
graph, singular value decompositions, what channels lose on the calibration images), and its outputs on these images are
kept for the refits, for all ratios.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant import measuring
from pliant.compression import Chain, Compressor, Magnitude, Plan, SemiStructured, budgets, reestimate_batchnorm
from pliant.compression.base import option_names
from pliant.compression.by_name import allocation_of, check_names, class_named, row_of, unit_of
from pliant.compression.calibration import Calibration
from pliant.compression.elastic import Elastic
from pliant.compression.ladder import make_elastic
from pliant.compression.refit import Refitter
from pliant.compressor_names import (
    CALIBRATION,
    COMPRESSORS,
    LOSS,
    SCHEME,
    TITLE,
    factorises,
    norm_of,
    parse_pattern,
    record_name,
    resolve_scheme,
    takes_pattern,
)
from pliant.errors import BadInput
from pliant.experiments.controls import AUTO, choice_of, importances_of, options_for
from pliant.experiments.data.loader import Loader
from pliant.experiments.run_folder import Run
from pliant.measuring import versions
from pliant.records import Key, LayerCount, Record, record_key

LATENCY_BATCH = 1
COMPENSATE = "compensate"
"""The option of rounding to make up for its errors, which is a part of the refit here."""

Refine = Callable[[nn.Module, int], nn.Module]


class Workbench:
    """A run and a compressor, ready to be measured at any ratio.

    Args:
        run: a trained network.
        compressor: one of :data:`~pliant.compressor_names.ALONE`, or a chain of
            :data:`~pliant.compressor_names.LINKS` joined by "+".
        allocation: "uniform", "global" or "energy"; ignored by compressors without that choice.
        calibration: number of training images for choosing, whitening, the refit and the BatchNorm re-estimation;
            always the same images, without augmentation.
        precision: precision of the forward passes that measure accuracy; "auto" is the precision of the training.
        whiten: whether rank looks at the calibration images.
        scheme: how rank factorises convolutions, see :class:`~pliant.LowRank`.
        controls: what every layer keeps, as :func:`~pliant.experiments.controls.controls_of` returns it.
        refit: whether the weights that are left are refitted on the calibration images; if not, only the BatchNorm
            statistics are estimated again. Rounding to eight bits makes up for its errors if it is True.
        importance: how the links that have the option choose what goes: "auto" and "loss" look at the calibration
            images, others are those of the compressors.

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
        refit: bool = True,
        importance: str = AUTO,
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
        self.refit = refit
        self.importance = importance
        self.choice = choice_of(compressor, importance)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = run.config.get("precision", "auto") if precision == "auto" else precision
        self.precision = measuring.resolve_precision(precision, self.device)
        self._analyses: dict[Any, Any] = {}
        self._seconds = {"choosing": 0.0, "refitting": 0.0}  # of all analyses, of the last refit

    @property
    def name(self) -> str:
        """The compressor with its variant, as records name it."""
        return record_name(
            self.compressor, self.whiten, self.scheme, self.controls, choice=self.choice, refit=self.refit
        )

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
                That takes the place of the refit, and what looks at data only because of ``importance`` goes by norms.
            ratios_before: ratios to compress to and refine at first, in order. This is for compressors that zero
                weights, because all their ratios are shares of the dense network.

        Returns:
            The compressed network, refitted or with re-estimated BatchNorm statistics, in eval mode; the plan, with
            what the refit decided; and the record.
        """
        small = self.dense
        for index, share in enumerate((*ratios_before, ratio)):
            compressor = self._compressor(share, pattern, by_norm=refine is not None)
            small, plan = self._compressed(small, compressor)
            if refine is not None:
                small = refine(small, index)
        made = (self._settled(small), plan) if refine is not None else self._finished(small, plan, compressor)
        return self._measured(small, *made, plan.ratio_removed if pattern else ratio, pattern)

    def validate(self, ratio: float, pattern: str = "") -> tuple[float, float]:
        """Compress as :meth:`measure` does; return the removed share of all parameters and the validation accuracy.

        If the compressor zeroes parameters instead of removing them, it is a share of the non-zeros. Test images are
        not used.
        """
        compressor = self._compressor(ratio, pattern)
        small, _ = self._finished(*self._compressed(self.dense, compressor), compressor)
        left = measuring.parameters(small) / measuring.parameters(self.dense)
        if left == 1:
            left = measuring.nonzero(small) / measuring.nonzero(self.dense)
        return 1 - left, self._accuracy(small, "val")

    def _compressed(self, network: nn.Module, compressor: Compressor[Any]) -> tuple[nn.Module, Plan]:
        image = self._images(2)
        known = network is self.dense
        analysis = self._analysis(compressor) if known else compressor.analyse(network, image, self._seen)
        plan = compressor.plan(network, image, analysis=analysis)
        return compressor.apply(network, plan, analysis=analysis), plan

    def fit(self, budget: budgets.Budget) -> tuple[nn.Module, Plan, Record]:
        """Compress to a budget, counting costs on one image, and measure; return the same as :meth:`measure`.

        Raises:
            Refused: the budget is out of reach.
        """
        compressor = self._compressor(0.5)

        def accuracy(network: nn.Module) -> float:
            return self._accuracy(network, "val")

        def finished(plan: Plan) -> nn.Module:
            raw = compressor.apply(self.dense, plan, analysis=self._analysis(compressor))
            return self._finished(raw, plan, compressor)[0]

        image = self._images(LATENCY_BATCH)
        plan = budgets.fit(self.dense, compressor, image, budget, self._analysis(compressor), accuracy, finished)
        raw = compressor.apply(self.dense, plan, analysis=self._analysis(compressor))
        return self._measured(raw, *self._finished(raw, plan, compressor), plan.ratio, "", budget=str(budget))

    def elastic(self, ladder: Sequence[float]) -> Elastic:
        """Return what makes every size of the network from its dense weights, refitted on the calibration images."""
        compressor = self._compressor(0.5)
        return make_elastic(self.dense, compressor, self._images(LATENCY_BATCH), self._calibration_images, ladder)

    def _analysis(self, compressor: Compressor[Any]) -> Any:
        key = repr(compressor.at(0.5)) if compressor.has_ratio else type(compressor)
        if key not in self._analyses:
            began = time.perf_counter()
            self._analyses[key] = compressor.analyse(self._reference, self._images(2), self._seen)
            self._seconds["choosing"] += time.perf_counter() - began
        return self._analyses[key]

    @property
    def _seen(self) -> Iterable[Any] | None:
        """The calibration images as analyses get them; None if nothing looks at them."""
        if any(link not in COMPRESSORS for link in self.compressor.split("+")):
            return self._calibration_images  # as batches with labels, like those of any loader
        if self.choice == LOSS:
            return self._calibration
        return self._calibration_images if self.whiten else None

    def _finished(self, network: nn.Module, plan: Plan, compressor: Compressor[Any]) -> tuple[nn.Module, Plan]:
        """Return a cut network as it is delivered, and its plan: refitted, or with new BatchNorm statistics."""
        if not self.refit:
            return self._settled(network), plan
        began = time.perf_counter()
        finished = self._refitter.apply(compressor, plan, self._analysis(compressor), network)
        self._seconds["refitting"] = time.perf_counter() - began
        return finished

    def _settled(self, network: nn.Module) -> nn.Module:
        return reestimate_batchnorm(network, self._calibration if self.refit else self._calibration_images)

    def _measured(
        self, raw: nn.Module, small: nn.Module, plan: Plan, ratio: float, pattern: str, **settings: str
    ) -> tuple[nn.Module, Plan, Record]:
        final = self._accuracies(small)
        as_cut = final if small is raw else self._accuracies(raw)
        settled = final
        if plan.refit is not None and plan.refit.result != "reestimated":
            norms = any(isinstance(module, _BatchNorm) for module in raw.modules())
            settled = self._accuracies(self._settled(raw)) if norms else as_cut
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
            top1=final["test"],
            top1_reestimated=settled["test"],
            top1_raw=as_cut["test"],
            top1_dense=self._dense_costs["top1"],
            val_top1=final["val"],
            val_top1_reestimated=settled["val"],
            val_top1_raw=as_cut["val"],
            refit=_decision(plan, self._seconds),
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
            extra=_title(self.compressor),
        )
        return small, plan, record

    @cached_property
    def dense(self) -> nn.Module:
        """The trained network."""
        return self.run.load().to(self.device)

    @cached_property
    def _reference(self) -> nn.Module:
        """The network whose outputs the refit aims at: with the BatchNorm statistics of the calibration images.

        Those of a short training lag behind its weights, and a faithful refit would bring that back.
        """
        return self._settled(self.dense) if self.refit else self.dense

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

    @cached_property
    def _calibration_images(self) -> Loader:
        count = min(self.calibration, len(self.run.data.train))
        batch = math.ceil(count / math.ceil(count / 256))  # batches of nearly equal size: all have one weight
        return Loader(self.run.data, "train", batch, limit=count)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(self._calibration_images, self.dense, self._images(2))

    @cached_property
    def _refitter(self) -> Refitter:
        return Refitter(self._reference, self._images(2), self._calibration)

    def _compressor(self, ratio: float, pattern: str = "", by_norm: bool = False) -> Compressor[Any]:
        importance = norm_of(self.compressor) if by_norm and self.choice == LOSS else self.importance
        chosen = importances_of(self.compressor, importance)
        if takes_pattern(self.compressor):
            options: Mapping[str, Any] = {"importance": chosen[self.compressor]} if chosen else {}
            # Without a pattern it is the dense network.
            return pattern_compressor(pattern, **options) if pattern else Magnitude(ratio=0.0, **options)
        links = [self._link(name, chosen) for name in self.compressor.split("+")]
        return (links[0] if len(links) == 1 else Chain(*links)).at(ratio)

    def _link(self, name: str, chosen: Mapping[str, str]) -> Compressor[Any]:
        kind = class_named(name)
        options: dict[str, Any] = {}
        if name in chosen:
            options["importance"] = chosen[name]
        if "allocation" in option_names(kind):
            options["allocation"] = self.allocation
        if COMPENSATE in option_names(kind):
            options[COMPENSATE] = "auto" if self.refit else False
        if factorises(name):
            options |= {"whiten": self.whiten, "scheme": self.scheme or SCHEME}
        return kind(**options, **options_for(kind, self.controls))

    def _accuracies(self, model: nn.Module) -> dict[str, float]:
        return {split: self._accuracy(model, split) for split in ("test", "val")}

    def _accuracy(self, model: nn.Module, split: str) -> float:
        return measuring.evaluate(model, Loader(self.run.data, split, 512), self.device, self.precision)

    def _images(self, count: int) -> Tensor:
        return next(iter(Loader(self.run.data, "val", count)))[0].to(self.device).contiguous()


def pattern_compressor(pattern: str, **options: Any) -> SemiStructured:
    """Return the compressor of a pattern such as "2:4"; raise BadInput unless it is N:M with 1 <= N < M."""
    return SemiStructured(*parse_pattern(pattern), **options)


def _decision(plan: Plan, seconds: Mapping[str, float]) -> dict[str, Any] | None:
    """Return what a refit decided, as records hold it; None without one."""
    if plan.refit is None:
        return None
    return {
        "result": plan.refit.result,
        "errors": dict(plan.refit.errors),
        "samples": plan.refit.samples,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _title(compressor: str) -> dict[str, Any]:
    """Return the title of a compressor of another package, which a report cannot look up, as an entry of records."""
    if "+" in compressor or compressor in COMPRESSORS:
        return {}
    title = row_of(compressor).removed
    return {TITLE: title} if title else {}


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
