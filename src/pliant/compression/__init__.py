"""Compression after training, without retraining: the same code for every network, however it was trained.

A compressor makes a :class:`Plan` (plain data, no side effect) and applies it to a copy::

    small = compress(model, LowRank(ratio=0.7), example_inputs)

``filters`` removes coupled channels, ``rank`` factorises layers, ``weights`` zeroes single entries;
``allocation`` shares a budget out among the layers; ``factored`` builds the thin layers; ``batchnorm`` measures
the statistics of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pliant.compression.base import Analysis, Compressor, compressor_of
from pliant.compression.batchnorm import reestimate_batchnorm
from pliant.compression.filters import FilterPruning, masked_twin
from pliant.compression.plan import LayerPlan, Plan
from pliant.compression.rank import LowRank
from pliant.compression.weights import Magnitude, SemiStructured
from pliant.errors import unknown

__all__ = [
    "COMPRESSORS",
    "Analysis",
    "Compressor",
    "FilterPruning",
    "LayerPlan",
    "LowRank",
    "Magnitude",
    "Plan",
    "SemiStructured",
    "compress",
    "masked_twin",
    "reestimate_batchnorm",
    "replay",
]

COMPRESSORS: dict[str, type[Compressor[Any]]] = {
    kind.__name__: kind for kind in (FilterPruning, LowRank, Magnitude, SemiStructured)
}


def compress(model: nn.Module, compressor: Compressor[Any], example_inputs: Tensor | Sequence[Tensor]) -> nn.Module:
    """Return a compressed copy of ``model``.

    ``example_inputs``: a tensor or tuple of tensors that ``model(*example_inputs)`` takes; a batch of two is
    enough. Raises Refused if nothing can be removed, BadInput if the example does not fit.
    """
    analysis = compressor.analyse(model, example_inputs)
    plan = compressor.plan(model, example_inputs, analysis=analysis)
    return compressor.apply(model, plan, analysis=analysis)


def replay(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` compressed by the compressor that the plan names.

    ``model`` may be freshly built, of the architecture that the plan was made for; no example is needed.
    Raises BadInput if the plan's compressor is unknown or the model is another one.
    """
    if plan.compressor not in COMPRESSORS:
        raise unknown("compressor", plan.compressor, COMPRESSORS)
    return compressor_of(COMPRESSORS[plan.compressor], plan.options).apply(model, plan)
