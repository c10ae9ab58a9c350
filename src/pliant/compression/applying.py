"""Apply a compressor or a stored plan to a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

from torch import nn

from pliant.calling import Example
from pliant.compression.base import Compressor
from pliant.compression.by_name import compressor_of
from pliant.compression.plan import Plan


def compress(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Return a compressed copy of ``model``.

    Args:
        model: any module; not changed.
        compressor: how to compress it.
        example_inputs: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes; a batch of two
            is enough.
        calibration: batches of training data, (images, labels) or images alone, for compressors that look at data.

    Raises:
        Refused: nothing can be removed.
        BadInput: the example or the data does not fit.
    """
    analysis = compressor.analyse(model, example_inputs, calibration)
    plan = compressor.plan(model, example_inputs, analysis=analysis)
    return compressor.apply(model, plan, analysis=analysis)


def replay(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` compressed by the compressor that the plan names; no example is needed.

    Args:
        model: of the architecture that the plan was made for, with any weights.
        plan: what to do.

    Raises:
        BadInput: the plan's compressor is unknown, the model is another one, or the plan's factors depend on
            calibration data.
    """
    if plan.links:
        return reduce(replay, plan.links, model)
    return compressor_of(plan).apply(model, plan)


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a network of the architecture that :func:`replay` returns, to load stored weights into.

    This is quick, and possible for every plan, because the weights of the result are arbitrary.

    Raises:
        BadInput: the plan's compressor is unknown, or the model is another one.
    """
    if plan.links:
        return reduce(skeleton, plan.links, model)
    return compressor_of(plan).skeleton(model, plan)
