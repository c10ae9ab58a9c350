"""Compression after training, without retraining: the same code for every network, however it was trained.

A compressor makes a :class:`Plan` (plain data, no side effect) and applies it to a copy::

    small = compress(model, LowRank(ratio=0.7), example_inputs)

``filters`` removes coupled channels, ``heads`` attention heads, ``rank`` factorises layers, ``weights`` zeroes
single entries, ``quantised`` stores weights in eight bits, ``chain`` does several of these in a row. ``allocation``
shares a budget out among the layers, ``costs`` counts what a layer does, ``whitening`` looks at its outputs on data;
``factored`` builds the thin layers, ``rewiring`` puts them in place; ``batchnorm`` measures the statistics of the
result.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

from torch import nn

from pliant.calling import Example
from pliant.compression.base import Analysis, Compressor, compressor_of
from pliant.compression.batchnorm import reestimate_batchnorm
from pliant.compression.chain import Chain
from pliant.compression.entries import Magnitude, SemiStructured
from pliant.compression.filters import FilterPruning, masked_twin
from pliant.compression.heads import HeadPruning
from pliant.compression.plan import LayerPlan, Plan
from pliant.compression.quantised import Int8
from pliant.compression.rank import LowRank
from pliant.errors import unknown

__all__ = [
    "COMPRESSORS",
    "Analysis",
    "Chain",
    "Compressor",
    "FilterPruning",
    "HeadPruning",
    "Int8",
    "LayerPlan",
    "LowRank",
    "Magnitude",
    "Plan",
    "SemiStructured",
    "compress",
    "masked_twin",
    "reestimate_batchnorm",
    "replay",
    "skeleton",
]

COMPRESSORS: dict[str, type[Compressor[Any]]] = {
    kind.__name__: kind for kind in (FilterPruning, HeadPruning, Int8, LowRank, Magnitude, SemiStructured)
}


def compress(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Return a compressed copy of ``model``.

    ``example_inputs``: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes; a batch
    of two is enough. ``calibration``: batches of training data, (images, labels) or images alone, for compressors
    that look at data. Raises Refused if nothing can be removed, BadInput if the example or the data does not fit.
    """
    analysis = compressor.analyse(model, example_inputs, calibration)
    plan = compressor.plan(model, example_inputs, analysis=analysis)
    return compressor.apply(model, plan, analysis=analysis)


def replay(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` compressed by the compressor that the plan names.

    ``model`` may be freshly built, of the architecture that the plan was made for; no example is needed.
    Raises BadInput if the plan's compressor is unknown, the model is another one, or the plan's factors depend on
    calibration data.
    """
    if plan.links:
        return reduce(replay, plan.links, model)
    return _compressor_of(plan).apply(model, plan)


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a network of the architecture that :func:`replay` gives, to load stored weights into.

    Quick, and possible for every plan, since the weights that it holds are of no account.
    Raises BadInput if the plan's compressor is unknown or the model is another one.
    """
    if plan.links:
        return reduce(skeleton, plan.links, model)
    return _compressor_of(plan).skeleton(model, plan)


def _compressor_of(plan: Plan) -> Compressor[Any]:
    if plan.compressor not in COMPRESSORS:
        raise unknown("compressor", plan.compressor, COMPRESSORS)
    return compressor_of(COMPRESSORS[plan.compressor], plan.options)
