"""The compressor: analyse once, plan for a ratio, apply to a copy.

::

    analysis = compressor.analyse(model, x, calibration)   the expensive part, the same for all ratios
    plan = compressor.plan(model, x, analysis=analysis)    plain data, no side effect
    small = compressor.apply(model, plan)                  a new model; the given one is not touched

Each kind of compressor defines ``analyse``, ``plan_with`` and ``carry_out``; the checks around them are done here.
Calibration data is a finite iterable of batches, (images, labels) or images alone; most compressors do not need any.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from pliant import measuring
from pliant.calling import Example, copied, plain
from pliant.compression.plan import LayerPlan, Plan
from pliant.errors import BadInput, Refused, unknown
from pliant.extensions import names_of

COSTS = ("params", "macs")


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that a kind of compressor needs to know about a model before it can plan for any ratio.

    Args:
        shapes: name → shape of all parameters, by which the model is recognised; see ``parameter_shapes``.
        refused: (layer, reason) for each layer that is left alone.
    """

    shapes: Mapping[str, tuple[int, ...]]
    refused: tuple[tuple[str, str], ...]


A = TypeVar("A", bound=Analysis)
C = TypeVar("C", bound="Compressor[Any]")


@dataclass(frozen=True)
class Compressor(abc.ABC, Generic[A]):
    """A way to make a model smaller; its fields are its options.

    To write a compressor, make a frozen dataclass with its options as fields, all with defaults, and three methods:

    * :meth:`analyse` does the expensive part, the same for all ratios, and returns an :class:`Analysis` of its own;
    * :meth:`plan_with` decides what to do, without any side effect, and returns a plan by :meth:`assemble`;
    * :meth:`carry_out` carries out a plan on a copy of the model.

    A compressor that can reach any size has the field ``ratio``, the share to remove, in [0, 1). One that can share the
    ratio out among the layers in several ways has the field ``allocation``, and one whose ratio may count either
    parameters or multiply-accumulates has the field ``cost``. Checks, copies, tables, files, chains, sweeps and budgets
    come from this class and from the plan. Override :meth:`skeleton` if :meth:`carry_out` does work that a network for
    stored weights does not need.

    A compressor of another package is named as package.module:name, or by an entry point of the group
    ``pliant.compressors`` under a name without "+" and "-". It also has the class attributes ``unit``, the unit that
    its plans count in each layer, and ``title``, the title of its figures in reports; in a sweep, ``analyse`` gets
    training images.
    """

    unit: ClassVar[str] = "weights"
    title: ClassVar[str] = ""

    @abc.abstractmethod
    def analyse(
        self,
        model: nn.Module,
        example_inputs: Example,
        calibration: Iterable[Any] | None = None,
    ) -> A:
        """Return the part of the work that does not depend on the ratio.

        Args:
            model: any module; not changed.
            example_inputs: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes.
            calibration: batches of training data, for compressors that look at data; others ignore them.

        Raises:
            BadInput: the model does not take the example or the data.
        """

    @abc.abstractmethod
    def plan_with(self, model: nn.Module, analysis: A) -> Plan:
        """Return the plan for ``model``, given its analysis.

        Args:
            model: a model with finite weights, in any mode; not changed.
            analysis: the analysis of this model.

        Raises:
            Refused: the ratio is not 0, and nothing at all can be removed (:meth:`assemble` raises it).
        """

    @abc.abstractmethod
    def carry_out(self, model: nn.Module, plan: Plan, analysis: A | None) -> nn.Module:
        """Carry out a plan and return the result.

        Args:
            model: a copy that may be changed, which has the layers that the plan names, in their shapes.
            plan: a plan by a compressor of this class with these options, new or read from a file.
            analysis: the analysis that the plan was made with, or None.

        Raises:
            BadInput: the plan does not suit the layers.
        """

    def plan(self, model: nn.Module, example_inputs: Example, *, analysis: A | None = None) -> Plan:
        """Return the plan for ``model``.

        Args:
            model: any module; not changed.
            example_inputs: as in :meth:`analyse`.
            analysis: the result of ``analyse`` on this model with its current weights; None: analyse it now.

        Raises:
            Refused: the ratio is not 0, and nothing at all can be removed.
            BadInput: a weight is not finite, or the analysis is of another model.
        """
        model = plain(model)
        _check_finite(model)
        if analysis is None:
            analysis = self.analyse(model, example_inputs)
        return self.proven(model, self.draft(model, analysis), analysis)

    def draft(self, model: nn.Module, analysis: A) -> Plan:
        """Return the plan for ``model`` without the checks of :meth:`proven`, for a search among many.

        Raises:
            Refused, BadInput: as for :meth:`plan`.
        """
        if analysis.shapes != parameter_shapes(model):
            raise BadInput("the analysis is of another model: names or shapes of the parameters differ")
        return self.plan_with(model, analysis)

    def proven(self, model: nn.Module, plan: Plan, analysis: A) -> Plan:
        """Return a plan if the network that it makes is known to work, else one that keeps more.

        Args:
            model, analysis: as for :meth:`plan_with`.
            plan: a plan of this compressor.
        """
        return plan

    def apply(self, model: nn.Module, plan: Plan, *, analysis: A | None = None) -> nn.Module:
        """Return a new model that is ``model`` compressed as ``plan`` says.

        Args:
            model: the model that the plan is for, with any weights; not changed.
            plan: the plan; its options apply, not those of this compressor.
            analysis: the analysis that the plan was made with, which saves work; None: do without.

        Raises:
            BadInput: the plan is of another kind of compressor or for another model.
        """
        model = plain(model)
        planned = self.checked(model, plan)
        _check_finite(model)
        return planned.carry_out(copied(model), plan, analysis)

    def skeleton(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Return a new model of the architecture that :meth:`apply` returns, with arbitrary weights.

        It serves to load stored weights into, and to count costs on.

        Raises:
            BadInput: as for :meth:`apply`.
        """
        return self.apply(model, plan)

    @property
    def has_ratio(self) -> bool:
        """Whether the compressor has a ratio, so that it can reach any size."""
        return "ratio" in option_names(type(self))

    def at(self, ratio: float) -> Self:
        """Return this compressor with another ratio.

        Raises:
            BadInput: it has no ratio, or the new one is out of range.
        """
        if not self.has_ratio:
            raise BadInput(f"{type(self).__name__} has no ratio: it makes a network of one size")
        return dataclasses.replace(self, ratio=ratio)  # type: ignore[call-arg]

    def counting(self, cost: str) -> Self:
        """Return this compressor with a ratio that counts ``cost``; unchanged if it has no such option."""
        known = "cost" in option_names(type(self))
        return dataclasses.replace(self, cost=cost) if known else self  # type: ignore[call-arg]

    def plan_options(self) -> dict[str, Any]:
        """Return the options by name, as plans hold them: plain data."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    def checked(self, model: nn.Module, plan: Plan) -> Self:
        """Return the compressor with the plan's options.

        Raises:
            BadInput: the plan is of another kind of compressor or for another model.
        """
        if plan.compressor not in plan_names(type(self)):
            raise BadInput(f"the plan is for {plan.compressor}, it cannot be applied by {type(self).__name__}")
        planned = self.with_options_of(plan)
        plan.check(model)
        return planned

    def with_options_of(self, plan: Plan) -> Self:
        """Return a compressor of this kind with the plan's options; raise BadInput if it does not have them."""
        return with_options(type(self), plan.options)

    def assemble(
        self,
        model: nn.Module,
        analysis: Analysis,
        *,
        ratio: float,
        removed: int,
        compressible: Mapping[str, int],
        layers: Iterable[LayerPlan],
        params_after: int,
        floored: Iterable[str] = (),
        limited: Iterable[tuple[str, str]] = (),
    ) -> Plan:
        """Return the plan of this compressor.

        Args:
            model: the model that the plan is for.
            analysis: the analysis of the model.
            ratio: the requested share.
            removed: the removed amount of the cost that the ratio counts: parameters, unless the compressor counts
                another.
            compressible: parameter name → the amount of that cost that could be removed there.
            layers: the plans of single layers.
            params_after: number of parameters of the compressed model.
            floored: names of the layers that keep as little as the options allow.
            limited: (layer, reason) for layers that the network does not let keep just any number of channels.

        Raises:
            Refused: the ratio is not 0, and nothing at all can be removed.
        """
        total = sum(compressible.values())
        if ratio > 0 and not total:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in analysis.refused[:5])
            more = "; ..." if len(analysis.refused) > 5 else ""
            raise Refused(f"{type(self).__name__} finds nothing to remove: {reasons or 'no layers'}{more}")
        return Plan(
            compressor=plan_names(type(self))[0],
            options=self.plan_options(),
            ratio=ratio,
            ratio_removed=removed / total if total else 0.0,
            params_before=measuring.parameters(model),
            params_after=params_after,
            compressible=tuple(compressible),
            layers=tuple(layers),
            refused=analysis.refused,
            floored=tuple(floored),
            limited=tuple(limited),
        )


def option_names(kind: type[Compressor[Any]]) -> list[str]:
    """Return the names of a compressor's options."""
    return [field.name for field in dataclasses.fields(kind)]


def plan_names(kind: type[Compressor[Any]]) -> list[str]:
    """Return the names that plans may use for a kind of compressor; write the first one.

    The name of a compressor of this package is its class name. A compressor of another package may have a name by an
    entry point, and always has the name package.module:name.
    """
    if kind.__module__.partition(".")[0] == "pliant":
        return [kind.__name__]
    return [*names_of("compressor", kind), f"{kind.__module__}:{kind.__qualname__}"]


def with_options(kind: type[C], options: Mapping[str, Any]) -> C:
    """Return ``kind(**options)``; raise BadInput for unknown options and bad values."""
    known = option_names(kind)
    for name in options:
        if name not in known:
            raise unknown(f"option of {kind.__name__}", name, known)
    return kind(**options)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name → shape of all parameters."""
    return {name: tuple(p.shape) for name, p in plain(model).named_parameters()}


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        # A finite sum has finite terms, and takes a tenth of the time. An infinite sum may also be an overflow.
        if not torch.isfinite(p.detach().sum()) and not torch.isfinite(p).all():
            raise BadInput(f"parameter {name!r} holds NaN or infinity: compress a model that has not diverged")


def check_ratio(ratio: Any) -> None:
    """Raise BadInput unless 0 <= ratio < 1."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not math.isfinite(ratio) or not 0 <= ratio < 1:
        raise BadInput(f"ratio is the share to remove: expected 0 <= ratio < 1, got {ratio!r}")
