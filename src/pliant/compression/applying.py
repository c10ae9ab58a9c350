"""Apply a compressor or a stored plan to a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

from torch import nn

from pliant.calling import Example, plain
from pliant.compression.base import Compressor
from pliant.compression.by_name import compressor_of
from pliant.compression.calibration import calibration_of
from pliant.compression.plan import Plan
from pliant.compression.refit import Refitter
from pliant.errors import BadInput


def compress(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    calibration: Iterable[Any] | None = None,
    *,
    refit: bool = True,
) -> nn.Module:
    """Return a compressed copy of ``model``.

    With calibration data, what can go is chosen by what the rest cannot make up for, and the weights that are left are
    refitted to make up for it (``elimination``, ``compensation`` and ``refit`` in ``pliant.compression``). Nothing is
    trained, and no labels are used.

    Args:
        model: any module; not changed.
        compressor: how to compress it.
        example_inputs: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes; a batch of two
            is enough.
        calibration: batches of data like that of training, without augmentation, that can be iterated over several
            times: inputs alone, (inputs, labels), ((a, b), labels), a dict or (dict, labels). A thousand images are
            plenty for convolutions; linear layers profit from more.
        refit: whether the weights are refitted; False leaves them as they are cut. Without calibration data they are
            never refitted.

    Raises:
        Refused: nothing can be removed.
        BadInput: the example or the data does not fit.
    """
    model = plain(model)
    data = None if calibration is None else calibration_of(calibration, model, example_inputs)
    refitter = Refitter(model, example_inputs, data) if data is not None and refit else None
    analysis = compressor.analyse(model, example_inputs, data)
    plan = compressor.plan(model, example_inputs, analysis=analysis)
    if refitter is None:
        return compressor.apply(model, plan, analysis=analysis)
    return refitter.apply(compressor, plan, analysis)[0]


def replay(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` compressed by the compressor that the plan names; no example is needed.

    Args:
        model: of the architecture that the plan was made for, with any weights.
        plan: what to do.

    Raises:
        BadInput: the plan's compressor is unknown, the model is another one, or the plan's factors or weights
            depend on calibration data.
    """
    if plan.refit is not None and plan.refit.result != "cut":
        raise BadInput(
            "the plan's network was refitted on calibration data, which a plan does not hold: pliant.rebuild(model, "
            "folder) reads it with its weights"
        )
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
