"""Chains: several compressors, one after the other, as one compressor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log1p, prod
from typing import Any

from torch import nn

from pliant import measuring
from pliant.calling import Example
from pliant.compression.base import Analysis, Compressor, check_ratio, parameter_shapes, plan_names
from pliant.compression.plan import Plan
from pliant.errors import BadInput, Refused


@dataclass(frozen=True, eq=False)
class Linked(Analysis):
    """The analysis of a chain.

    The analysis of the first link serves every ratio. The other links look at the network that the links before them
    return, so the analysis of each is kept with the plans that precede it, and is reused as long as those have the
    same effect.

    Args:
        example_inputs, calibration: the arguments of ``analyse``.
        first: the analysis of the first link.
        later: index of each other link → the plans before it, and its analysis.
    """

    example_inputs: Example
    calibration: Iterable[Any] | None
    first: Analysis
    later: dict[int, tuple[tuple[Plan, ...], Analysis]] = field(default_factory=dict)

    def known(self, link: int, before: tuple[Plan, ...]) -> Analysis | None:
        """Return the analysis of a link after the plans ``before``; None if there is none yet."""
        if link == 0:
            return self.first
        plans, analysis = self.later.get(link, ((), None))
        return analysis if [_effect(plan) for plan in plans] == [_effect(plan) for plan in before] else None


@dataclass(frozen=True, init=False)
class Chain(Compressor[Linked]):
    """Several compressors, each applied to the result of the one before: ``Chain(FilterPruning(0.3), LowRank(0.3))``.

    Its plan holds the plans of the links. Its ratio is 1 − Π(1 − ratio of a link), the share removed if each link
    removes its share of the rest; ``at(ratio)`` keeps the proportions of the links, that is, the share of each in
    log(1 − ratio). Links without a ratio, such as SemiStructured, do the same at every size. A link that finds nothing
    to remove does nothing.

    Raises:
        BadInput: there is no link, or a link is not a compressor.
    """

    links: tuple[Compressor[Any], ...]

    def __init__(self, *links: Compressor[Any]) -> None:
        for link in links:
            if not isinstance(link, Compressor):
                raise BadInput(f"a chain is made of compressors, got {link!r}")
        if not links:
            raise BadInput("a chain needs at least one compressor, got none")
        object.__setattr__(self, "links", links)  # the dataclass is frozen

    @property
    def has_ratio(self) -> bool:
        """Whether some link has one."""
        return any(link.has_ratio for link in self.links)

    @property
    def ratio(self) -> float:
        """The share that all links together are asked to remove."""
        return 1 - prod(1 - _ratio(link) for link in self.links)

    def at(self, ratio: float) -> Chain:
        """Return this chain with another ratio, shared out among the links in their current proportions."""
        check_ratio(ratio)
        if not self.has_ratio:
            raise BadInput("no link of the chain has a ratio: it makes a network of one size")
        logs = [log1p(-_ratio(link)) if link.has_ratio else 0.0 for link in self.links]
        if not any(logs):  # nothing is removed now: equal parts
            logs = [-1.0 if link.has_ratio else 0.0 for link in self.links]
        kept = [(1 - ratio) ** (part / sum(logs)) for part in logs]
        return Chain(
            *(link.at(1 - keep) if link.has_ratio else link for link, keep in zip(self.links, kept, strict=True))
        )

    def counting(self, cost: str) -> Chain:
        """Return this chain with links whose ratio counts ``cost``; links without that option do not change."""
        return Chain(*(link.counting(cost) for link in self.links))

    def analyse(self, model: nn.Module, example_inputs: Example, calibration: Iterable[Any] | None = None) -> Linked:
        """Analyse the model for the first link; later links are analysed once the plans before them exist.

        Raises:
            BadInput: the calibration data is an iterator, but every link that looks at data iterates over it.
        """
        if calibration is not None and iter(calibration) is calibration:
            raise BadInput(
                "a chain reads the calibration data more than once: give a list or a loader, not an iterator"
            )
        first = self.links[0].analyse(model, example_inputs, calibration)
        return Linked(parameter_shapes(model), first.refused, example_inputs, calibration, first)

    def plan_with(self, model: nn.Module, analysis: Linked) -> Plan:
        """Return the plans of the links, each for the network that the links before it return."""
        plans: list[Plan] = []
        refusals: list[Refused] = []
        network = model
        for i, link in enumerate(self.links):
            known = self._analysis(i, network, plans, analysis)
            try:
                plan = link.plan(network, analysis.example_inputs, analysis=known)
            except Refused as error:
                if not link.has_ratio:
                    raise
                refusals.append(error)
                plan = link.at(0.0).plan(network, analysis.example_inputs, analysis=known)
            plans.append(plan)
            if i + 1 < len(self.links):
                network = link.apply(network, plan, analysis=known)
        if len(refusals) == sum(link.has_ratio for link in self.links) > 0:
            raise refusals[0]
        return Plan(
            compressor=type(self).__name__,
            options={},
            ratio=1 - prod(1 - plan.ratio for plan in plans),
            ratio_removed=1 - prod(1 - plan.ratio_removed for plan in plans),
            params_before=measuring.parameters(model),
            params_after=plans[-1].params_after,
            compressible=plans[0].compressible,
            layers=(),
            refused=tuple(dict.fromkeys(pair for plan in plans for pair in plan.refused)),
            links=tuple(plans),
            floored=tuple(dict.fromkeys(name for plan in plans for name in plan.floored)),
            limited=tuple(dict.fromkeys(pair for plan in plans for pair in plan.limited)),
        )

    def _analysis(self, i: int, network: nn.Module, before: Sequence[Plan], analysis: Linked) -> Analysis:
        known = analysis.known(i, tuple(before))
        if known is None:
            known = self.links[i].analyse(network, analysis.example_inputs, analysis.calibration)
            analysis.later[i] = (tuple(before), known)
        return known

    def with_options_of(self, plan: Plan) -> Chain:
        """Return this chain if its links are of the plan's kinds; their options are those of their own plans."""
        own, planned = [plan_names(type(link)) for link in self.links], [part.compressor for part in plan.links]
        if len(own) != len(planned) or any(name not in names for name, names in zip(planned, own, strict=True)):
            raise BadInput(f"the plan is for {planned}, this is a chain of {[names[0] for names in own]}")
        return self  # the options are those of the links' plans

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Linked | None) -> nn.Module:
        """Carry out the plans of the links in order."""
        for i, (link, part) in enumerate(zip(self.links, plan.links, strict=True)):
            known = None if analysis is None else analysis.known(i, plan.links[:i])
            if known is None and analysis is not None and analysis.calibration is not None:
                known = self._analysis(i, model, plan.links[:i], analysis)  # another size was planned since
            model = link.apply(model, part, analysis=known)
        return model

    def skeleton(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Return a new model of the architecture that ``apply`` returns, with arbitrary weights."""
        self.checked(model, plan)
        for link, part in zip(self.links, plan.links, strict=True):
            model = link.skeleton(model, part)
        return model


def _effect(plan: Plan) -> Any:
    """Return the parts of a plan that determine its effect, without the requested ratio."""
    options = {name: value for name, value in plan.options.items() if name != "ratio"}
    return plan.compressor, options, plan.layers, [_effect(link) for link in plan.links]


def _ratio(link: Compressor[Any]) -> float:
    return float(link.ratio) if link.has_ratio else 0.0  # type: ignore[attr-defined]
