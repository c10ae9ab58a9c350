"""Compressing to a budget: a limit on parameters, multiply-accumulates, bytes, milliseconds or lost accuracy.

A compressor at a ratio gives one network; a budget asks for the largest network that meets it (for an accuracy, the
smallest one). Costs fall as the ratio grows, and accuracy is assumed to fall too, so the ratio is found by bisection.
Every candidate network is planned in full, and its cost is counted or measured, not estimated::

    small = compress_to(model, LowRank(), x, keep_macs=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pliant import measuring
from pliant.calling import Example, plain
from pliant.compression.base import Analysis, Compressor
from pliant.compression.batchnorm import reestimate_batchnorm
from pliant.compression.calibration import calibration_of
from pliant.compression.chain import Chain
from pliant.compression.controls import Controlled
from pliant.compression.plan import Plan
from pliant.compression.refit import Refitter
from pliant.errors import BadInput, Refused

SMALLEST = 1 - 2**-30  # gives the smallest network; a ratio of 1 would leave nothing, and is refused

# How finely the ratio is searched for each budget. Parameters follow from a plan alone. Multiply-accumulates and bytes
# need the network; latencies and accuracies have to be measured, and are no more exact than this.
RESOLUTION = {"keep_params": 1e-6, "keep_macs": 1e-5, "max_bytes": 1e-5, "max_latency_ms": 1 / 256, "max_drop": 1 / 256}
CHAIN_RESOLUTION = 1 / 512  # every result of the first link needs a new analysis by the later links
# The cost that the allocation economises for a budget, instead of the compressor's own choice.
_COST = {"keep_macs": "macs", "max_latency_ms": "macs"}


@dataclass(frozen=True)
class Budget:
    """One limit.

    Args:
        kind: a key of :data:`RESOLUTION`.
        limit: the limit, in the unit that the kind names.

    Raises:
        BadInput: the limit is out of range.
    """

    kind: str
    limit: float

    def __post_init__(self) -> None:
        number = isinstance(self.limit, (int, float)) and not isinstance(self.limit, bool)
        if not number or not math.isfinite(self.limit):
            raise BadInput(f"{self.kind} must be a number, got {self.limit!r}")
        if self.kind.startswith("keep") and not 0 < self.limit <= 1:
            raise BadInput(f"{self.kind} is the share to keep: expected 0 < {self.kind} <= 1, got {self.limit}")
        if self.kind in ("max_bytes", "max_latency_ms") and self.limit <= 0:
            raise BadInput(f"{self.kind} must be positive, got {self.limit}")
        if self.kind == "max_drop" and not 0 <= self.limit < 1:
            raise BadInput(f"max_drop is a fraction: expected 0 <= max_drop < 1, got {self.limit}")

    def __str__(self) -> str:
        return f"{self.kind}={self.limit:g}" if self.kind != "max_bytes" else f"{self.kind}={self.limit:.0f}"


def one_budget(**limits: float | None) -> Budget:
    """Return the only budget whose limit is not None; raise BadInput unless there is exactly one."""
    set_limits = {kind: limit for kind, limit in limits.items() if limit is not None}
    if len(set_limits) != 1:
        raise BadInput(f"expected one budget of {', '.join(limits)}, got {', '.join(set_limits) or 'none'}")
    ((kind, limit),) = set_limits.items()
    return Budget(kind, limit)


def compress_to(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    *,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    max_bytes: int | None = None,
    max_latency_ms: float | None = None,
    max_drop: float | None = None,
    calibration: Iterable[Any] | None = None,
    accuracy: Callable[[nn.Module], float] | None = None,
    refit: bool = True,
) -> nn.Module:
    """Return ``model`` compressed as little as one budget allows; for ``max_drop``, as much.

    Args:
        model: a trained network; not changed.
        compressor: how to compress; its ratio is ignored.
        example_inputs: what the model takes: a tensor, a tuple of tensors or a dict of keyword arguments. Costs are
            counted and measured on it.
        keep_params: share of all the model's parameters that may stay, in (0, 1].
        keep_macs: share of the multiply-accumulates that may stay; the allocation then economises these.
        max_bytes: size of the safetensors file.
        max_latency_ms: milliseconds of a forward pass of the example on this machine; the allocation economises
            multiply-accumulates.
        max_drop: how much ``accuracy`` may fall below that of ``model``, a fraction in [0, 1).
        calibration: batches of training data without augmentation, (images, labels) or images alone, that can be
            iterated over several times. With it, compressors look at data, and the weights that are left are refitted
            as in :func:`~pliant.compress`.
        accuracy: a function that returns the accuracy of a network on validation data, a fraction; needed for
            ``max_drop``.
        refit: False only estimates BatchNorm statistics again instead of refitting weights.

    Raises:
        Refused: the budget is out of reach; the message names the reachable minimum and what is left alone.
        BadInput: not exactly one budget, a value out of range, or the example or data does not fit.
    """
    budget = one_budget(
        keep_params=keep_params,
        keep_macs=keep_macs,
        max_bytes=max_bytes,
        max_latency_ms=max_latency_ms,
        max_drop=max_drop,
    )
    model = plain(model)
    data = None if calibration is None else calibration_of(calibration, model, example_inputs)
    refitter = Refitter(model, example_inputs, data) if data is not None and refit else None

    def made(plan: Plan) -> nn.Module:
        if refitter is not None:
            return refitter.apply(compressor, plan, analysis)[0]
        small = compressor.apply(model, plan, analysis=analysis)
        return small if data is None else reestimate_batchnorm(small, data)

    analysis = compressor.analyse(model, example_inputs, data)
    return made(fit(model, compressor, example_inputs, budget, analysis, accuracy, made))


def fit(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    budget: Budget,
    analysis: Analysis,
    accuracy: Callable[[nn.Module], float] | None = None,
    make: Callable[[Plan], nn.Module] | None = None,
) -> Plan:
    """Return the plan that meets a budget.

    Args:
        model, compressor, example_inputs, accuracy: as in :func:`compress_to`.
        budget: the limit.
        analysis: the compressor's analysis of this model.
        make: maps a plan to the network whose accuracy counts; None: the network that the compressor makes.

    Raises:
        Refused: the budget is out of reach.
        BadInput: the compressor has no ratio, or a budget of accuracy has no function to measure it with.
    """
    if not compressor.has_ratio:
        raise BadInput(f"{type(compressor).__name__} has no ratio that could be fitted to {budget}")
    family = compressor.counting(_COST[budget.kind]) if budget.kind in _COST else compressor
    value = _meter(model, family, example_inputs, budget, analysis, accuracy, make)

    # Where a plan alone tells the cost, only the last one is verified, and all are if that one has to keep more.
    drafts = budget.kind in ("keep_params", "max_bytes") and not isinstance(family, Chain)
    plan = _search(model, family, budget, value, example_inputs, analysis, drafts=drafts)
    if not drafts:
        return plan
    proven = family.at(plan.ratio).proven(model, plan, analysis)
    if proven is plan or value(proven) <= budget.limit:
        return proven
    return _search(model, family, budget, value, example_inputs, analysis, drafts=False)


def _search(
    model: nn.Module,
    family: Compressor[Any],
    budget: Budget,
    value: Callable[[Plan], float],
    example_inputs: Example,
    analysis: Analysis,
    *,
    drafts: bool,
) -> Plan:
    """Return the plan that meets a budget, by bisection of the ratio; see :func:`fit`."""

    def plan_at(ratio: float) -> Plan:
        compressor = family.at(ratio)
        if drafts:
            return compressor.draft(model, analysis)
        return compressor.plan(model, example_inputs, analysis=analysis)

    # A budget of cost is met from some ratio on, a budget of accuracy up to some ratio.
    is_cost = budget.kind != "max_drop"
    largest = plan_at(0.0)
    first = value(largest)
    if is_cost and first <= budget.limit:
        return largest
    if not is_cost and first > budget.limit:
        raise Refused(
            f"{budget} is out of reach: with nothing removed, after the calibration, the accuracy falls by {first:.4f}"
        )
    try:
        smallest = plan_at(SMALLEST)
    except Refused as error:
        raise Refused(f"{budget} is out of reach: {error}") from None
    last = value(smallest)
    if is_cost and last > budget.limit:
        lower = _without_floors(family).at(SMALLEST).plan(model, example_inputs, analysis=analysis)
        floored = [name for name in smallest.floored if _kept(lower, name) < _kept(smallest, name)]
        raise Refused(f"{budget} is out of reach: {_reachable(family, budget, last, smallest, floored)}")
    if not is_cost and last <= budget.limit:
        return smallest
    good, bad, best = (1.0, 0.0, smallest) if is_cost else (0.0, 1.0, largest)
    resolution = max(RESOLUTION[budget.kind], CHAIN_RESOLUTION if isinstance(family, Chain) else 0.0)
    while abs(good - bad) > resolution:
        middle = (good + bad) / 2
        plan = plan_at(middle)
        if value(plan) <= budget.limit:
            good, best = middle, plan
        else:
            bad = middle
    return best


def _meter(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    budget: Budget,
    analysis: Analysis,
    accuracy: Callable[[nn.Module], float] | None,
    make: Callable[[Plan], nn.Module] | None,
) -> Callable[[Plan], float]:
    """Return a function from a plan to the cost of its network, in the unit of the budget."""
    if budget.kind == "keep_params":
        return lambda plan: plan.params_after / plan.params_before
    if budget.kind == "max_bytes":
        return lambda plan: measuring.file_bytes(compressor.skeleton(model, plan))
    if budget.kind == "max_drop":
        if accuracy is None:
            raise BadInput("max_drop needs accuracy: a function from a network to its accuracy on validation data")
        dense = accuracy(model)

        def lost(plan: Plan) -> float:
            return dense - accuracy(compressor.apply(model, plan, analysis=analysis) if make is None else make(plan))

        return lost
    if budget.kind == "max_latency_ms":
        return lambda plan: 1e3 * measuring.latencies([compressor.skeleton(model, plan)], example_inputs)[0]
    whole = measuring.macs(model, example_inputs)
    return lambda plan: measuring.macs(compressor.skeleton(model, plan), example_inputs) / whole


def _reachable(
    compressor: Compressor[Any], budget: Budget, least: float, smallest: Plan, floored: Sequence[str]
) -> str:
    """Return, in words, the least that a compressor can reach, and the layers that are in the way.

    Args:
        compressor, budget: what was asked.
        least: the cost of the smallest network.
        smallest: its plan.
        floored: the layers that could be smaller without a floor.
    """
    unit = {"max_bytes": f"{least:.0f}"}.get(budget.kind, f"{least:.4g}")
    reasons = [f"{name} {reason}" for name, reason in smallest.refused[:5]]
    more = "; ..." if len(smallest.refused) > 5 else ""
    left = f"; left alone: {'; '.join(reasons)}{more}" if reasons else ""
    more = ", ..." if len(floored) > 5 else ""
    floors = f"; at their floor: {', '.join(floored[:5])}{more}: at_least=1 goes lower" if floored else ""
    return f"the least that {type(compressor).__name__} can reach is {budget.kind}={unit}{floors}{left}"


def _without_floors(compressor: Compressor[Any]) -> Compressor[Any]:
    if isinstance(compressor, Chain):
        return Chain(*map(_without_floors, compressor.links))
    return replace(compressor, at_least=1) if isinstance(compressor, Controlled) else compressor


def _kept(plan: Plan, name: str) -> list[int]:
    """Return how much of a layer the links of a plan keep."""
    return [layer.kept for part in plan.links or (plan,) for layer in part.layers if layer.name == name]
