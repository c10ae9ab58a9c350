"""The compressor: analyse once, plan for a ratio, apply to a copy.

::

    analysis = compressor.analyse(model, x, calibration)   the expensive part, the same for all ratios
    plan = compressor.plan(model, x, analysis=analysis)    plain data, no side effect
    small = compressor.apply(model, plan)                  a new model; the given one is not touched

A kind of compressor fills in ``analyse``, ``_plan`` and ``_apply``; the checks around them are made here.
Calibration data is a finite iterable of batches, (images, labels) or images alone; most compressors need none.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn

from pliant import measuring
from pliant.calling import Example
from pliant.compression.plan import LayerPlan, Plan
from pliant.errors import BadInput, Refused, unknown

ALLOCATIONS = ("uniform", "global", "energy")
COSTS = ("params", "macs")


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a kind of compressor needs to know of a model before it can plan for any ratio.

    ``shapes``: those of all parameters by name, by which the model is known again. ``refused``: (layer, reason)
    for each layer that is left alone.
    """

    shapes: Mapping[str, tuple[int, ...]]
    refused: tuple[tuple[str, str], ...]


A = TypeVar("A", bound=Analysis)
C = TypeVar("C", bound="Compressor[Any]")


@dataclass(frozen=True)
class Compressor(abc.ABC, Generic[A]):
    """A way to make a model smaller; its fields are its options."""

    @abc.abstractmethod
    def analyse(
        self,
        model: nn.Module,
        example_inputs: Example,
        calibration: Iterable[Any] | None = None,
    ) -> A:
        """Return the part of the work that does not depend on the ratio.

        ``example_inputs``: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes.
        ``calibration``: batches of training data, for compressors that look at data; the others do not read them.
        Raises BadInput if the model does not take them.
        """

    def plan(self, model: nn.Module, example_inputs: Example, *, analysis: A | None = None) -> Plan:
        """Return what would be done to ``model``.

        ``analysis``: the result of ``analyse`` on this model with the weights that it has now.
        Raises Refused if something is asked for and nothing at all can be removed, BadInput if a weight is not
        finite or the analysis is of another model.
        """
        _check_finite(model)
        if analysis is None:
            analysis = self.analyse(model, example_inputs)
        elif analysis.shapes != parameter_shapes(model):
            raise BadInput("the analysis is of another model: names or shapes of the parameters differ")
        return self._plan(model, analysis)

    def apply(self, model: nn.Module, plan: Plan, *, analysis: A | None = None) -> nn.Module:
        """Return a new model that is ``model`` compressed as ``plan`` says.

        The plan's options hold, not those of this compressor. ``analysis`` saves work where it is at hand.
        Raises BadInput if the plan is of another kind of compressor or for another model.
        """
        planned = self._check(model, plan)
        _check_finite(model)
        return planned._apply(copy.deepcopy(model), plan, analysis)

    def skeleton(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Return a new model of the architecture that ``apply`` gives; its weights are of no account.

        It is what stored weights are loaded into, and what costs are counted on. Raises BadInput as ``apply``.
        """
        return self.apply(model, plan)

    @property
    def has_ratio(self) -> bool:
        """Whether the compressor can be asked for any size."""
        return any(field.name == "ratio" for field in dataclasses.fields(self))

    def at(self, ratio: float) -> Self:
        """Return this compressor with another ratio. Raises BadInput if it has none, or for one out of range."""
        if not self.has_ratio:
            raise BadInput(f"{type(self).__name__} has no ratio: it makes a network of one size")
        return dataclasses.replace(self, ratio=ratio)  # type: ignore[call-arg]

    def counting(self, cost: str) -> Self:
        """Return this compressor with a ratio that counts ``cost``, or as it is if it knows one cost only."""
        known = any(field.name == "cost" for field in dataclasses.fields(self))
        return dataclasses.replace(self, cost=cost) if known else self  # type: ignore[call-arg]

    def _check(self, model: nn.Module, plan: Plan) -> Self:
        """Return the compressor with the plan's options; BadInput if it is of another kind or for another model."""
        if plan.compressor != type(self).__name__:
            raise BadInput(f"the plan is for {plan.compressor}, it cannot be applied by {type(self).__name__}")
        planned = self._planned(plan)
        plan.check(model)
        return planned

    def _planned(self, plan: Plan) -> Self:
        return compressor_of(type(self), plan.options)

    @abc.abstractmethod
    def _plan(self, model: nn.Module, analysis: A) -> Plan: ...

    @abc.abstractmethod
    def _apply(self, model: nn.Module, plan: Plan, analysis: A | None) -> nn.Module:
        """Carry out a checked plan on ``model``, a copy that may be changed, and return the result."""

    def _make_plan(
        self,
        model: nn.Module,
        analysis: Analysis,
        *,
        ratio: float,
        removed: int,
        compressible: Mapping[str, int],
        layers: Iterable[LayerPlan],
        params_after: int,
    ) -> Plan:
        """Assemble the plan.

        ``compressible``: parameter name → how much of the cost that the ratio counts (parameters, unless the
        compressor says otherwise) could be removed there; ``removed``: how much is.
        """
        total = sum(compressible.values())
        if ratio > 0 and not total:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in analysis.refused[:5])
            more = "; ..." if len(analysis.refused) > 5 else ""
            raise Refused(f"{type(self).__name__} finds nothing to remove: {reasons or 'no layers'}{more}")
        return Plan(
            compressor=type(self).__name__,
            options={field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            ratio=ratio,
            ratio_removed=removed / total if total else 0.0,
            params_before=measuring.parameters(model),
            params_after=params_after,
            compressible=tuple(compressible),
            layers=tuple(layers),
            refused=analysis.refused,
        )


def compressor_of(kind: type[C], options: Mapping[str, Any]) -> C:
    """Return ``kind(**options)``; options that it does not have, or not with these values, are a BadInput."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            raise unknown(f"option of {kind.__name__}", name, known)
    return kind(**options)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name → shape of all parameters."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        # The terms of a finite sum are finite, and a sum takes a tenth of the time; else it may have overflowed.
        if not torch.isfinite(p.detach().sum()) and not torch.isfinite(p).all():
            raise BadInput(f"parameter {name!r} holds NaN or infinity: compress a model that has not diverged")


def check_ratio(ratio: Any) -> None:
    """Raise BadInput unless 0 <= ratio < 1."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not math.isfinite(ratio) or not 0 <= ratio < 1:
        raise BadInput(f"ratio is the share to remove: expected 0 <= ratio < 1, got {ratio!r}")
