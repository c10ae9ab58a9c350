"""Every way to cut a network that ``cuts.py`` compares: pliant's, torch-pruning's, and two that are written here.

A variant makes a network from a subject, a cost and the share of it that shall stay. Variants of one family differ in
settings only; the best of a family stands for it. The refit of single weights joins by itself once ``Magnitude`` has
the argument that it needs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import FAMILIES, Peer, Workshop, peers
from subjects import Subject
from torch import Tensor, nn

import pliant
from pliant.compression import Compressor
from pliant.compression.budgets import Budget, fit
from pliant.compression.calibration import calibration_of
from pliant.compression.elimination import Curve
from pliant.compression.moments import input_moments
from pliant.compression.refit import Refitter
from pliant.structure import ChannelGroup

KINDS = ("filters", "rank", "weights", "nm")
COSTS = {"filters": ("params", "macs"), "rank": ("params", "macs"), "weights": ("entries",), "nm": ("entries",)}
SHARES = (0.8, 0.7, 0.5, 0.3, 0.2, 0.1)
REFITS_ENTRIES = "importance" in inspect.signature(pliant.Magnitude).parameters  # newer than the refit of channels
OURS = "pliant"  # how the names of our families begin

Make = Callable[[str, float], nn.Module]  # cost, share → network


@dataclass(frozen=True)
class Variant:
    """One setting of one family.

    Args:
        setting: what tells it apart from the others of its family.
        make: makes the network; raises Refused if the share is out of reach.
        settled: whether it looks at the calibration data and sets the statistics of BatchNorm itself.
    """

    setting: str
    make: Make
    settled: bool = False


@dataclass(frozen=True)
class Family:
    """A row of the results.

    Args:
        kind: one of KINDS.
        name: its name.
        variants: its settings.
        labels: whether it reads the labels of the calibration data.
    """

    kind: str
    name: str
    variants: tuple[Variant, ...]
    labels: bool = False


def families(subject: Subject) -> list[Family]:
    """Return all families that suit a network."""
    return [*_filters(subject), *_rank(subject), *_weights(subject), *_nm(subject)]


# --- channels ---------------------------------------------------------------------------------------------------------


def _filters(subject: Subject) -> list[Family]:
    shop, data = Workshop(subject), {"calibration": subject.calibration}
    result = [
        Family("filters", name, tuple(_peer(shop, s, p) for s, p in peers(name, bool(subject.heads)).items()), labels)
        for name, (_, gradients) in FAMILIES.items()
        if not (labels := bool(gradients)) or subject.loss is not None
    ]

    def ours(name: str, importances: tuple[str, ...], **options: Any) -> Family:
        return Family(
            "filters",
            name,
            tuple(
                _fitted(subject, f"{importance} {allocation}", _channels(subject, importance, allocation), **options)
                for importance in importances
                for allocation in ("global", "uniform", "energy")
            ),
        )

    norms = ("l2", "l1") if subject.heads else ("l2", "l1", "bn")
    result += [
        ours(f"{OURS}, norms", norms),
        ours(f"{OURS}, data and refit", ("loss",), refit=True, **data),
        ours(f"{OURS}, data", ("loss",), refit=False, **data),
        ours("norms and refit", norms, refit=True, **data),
    ]
    return result if subject.heads else [*result, *_one_shot(subject)]


def _one_shot(subject: Subject) -> list[Family]:
    """Return choices by what each channel adds to the outputs of its readers, each by itself (as in ThiNet and CP)."""

    @functools.cache
    def analysis() -> Any:
        norms = pliant.FilterPruning(importance="l2").analyse(subject.model, subject.x)
        return dataclasses.replace(norms, curves=output_energies(subject, norms.groups))

    def variant(allocation: str, refit: bool) -> Variant:
        compressor = pliant.FilterPruning(importance="loss", allocation=allocation)

        def make(cost: str, share: float) -> nn.Module:
            budget = Budget(f"keep_{cost}", share)
            plan = fit(subject.model, compressor, subject.x, budget, analysis())
            small = compressor.apply(subject.model, plan, analysis=analysis())
            if not refit:
                return small
            data = calibration_of(subject.calibration, subject.model, subject.x)
            return Refitter(subject.model, subject.x, data).refit(small, plan)[0]

        return Variant(allocation, make, settled=refit)

    return [
        Family("filters", name, tuple(variant(a, refit) for a in ("global", "uniform", "energy")))
        for name, refit in (("output energies", False), ("output energies and refit", True))
    ]


def output_energies(subject: Subject, groups: Sequence[ChannelGroup]) -> tuple[Curve, ...]:
    """Return curves of E‖W_c x_c‖² over E‖W x‖², summed over the readers of a channel, as if channels were independent.

    Their sums over channels lost ignore both what channels share and that others could make up for them.
    """
    names = dict.fromkeys(slot.module for group in groups for slot in group.consumers)
    data = calibration_of(subject.calibration, subject.model, subject.x)
    moments = input_moments(copy.deepcopy(subject.model), names, data)
    curves = []
    for group in groups:
        losses = torch.zeros(group.channels, dtype=torch.float64)
        for slot in group.consumers:
            weight = subject.model.get_submodule(slot.module).weight.detach().double()
            kernel, weight = weight[0, 0].numel(), weight.flatten(1)
            (second,) = moments[slot.module].regularised()
            columns = (slot.indices.unsqueeze(2) * kernel + torch.arange(kernel)).flatten(1)  # (channels, width)
            blocks = second[columns.unsqueeze(2), columns.unsqueeze(1)]
            parts = weight[:, columns]  # (filters, channels, width)
            losses += torch.einsum("fcv,cvw,fcw->c", parts, blocks, parts) / ((weight @ second) * weight).sum()
        order = losses.argsort()
        curves.append(Curve(order, torch.cat([losses.new_zeros(1), losses[order].cumsum(0)])))
    return tuple(curves)


def _channels(subject: Subject, importance: str, allocation: str) -> Compressor[Any]:
    filters = pliant.FilterPruning(importance=importance, allocation=allocation)
    if not subject.heads:
        return filters
    return pliant.Chain(pliant.HeadPruning(importance=importance, allocation=allocation), filters)


def _peer(shop: Workshop, setting: str, peer: Peer) -> Variant:
    return Variant(setting, functools.partial(shop.make, peer))


def _fitted(subject: Subject, setting: str, compressor: Compressor[Any], **data: Any) -> Variant:
    """Return a variant that fits a compressor to the share; ``data``: the calibration data and what goes with it."""

    def make(cost: str, share: float) -> nn.Module:
        budget = {f"keep_{cost}": share}
        return pliant.compress_to(subject.model, compressor, subject.x, **budget, **data)

    return Variant(setting, make, settled=bool(data))


# --- rank -------------------------------------------------------------------------------------------------------------


def _rank(subject: Subject) -> list[Family]:
    def family(name: str, whiten: bool, **options: Any) -> Family:
        return Family(
            "rank",
            name,
            tuple(
                _fitted(
                    subject,
                    f"{scheme} {allocation}",
                    pliant.LowRank(scheme=scheme, allocation=allocation, whiten=whiten),
                    **options,
                )
                for scheme in ("spatial", "channel")
                for allocation in ("global", "uniform", "energy")
            ),
        )

    data = {"calibration": subject.calibration}
    return [
        family("SVD", whiten=False),
        family("whitened SVD", whiten=True, **data, refit=False),
        family(f"{OURS}, whitened and refit", whiten=True, **data, refit=True),
    ]


# --- single weights ---------------------------------------------------------------------------------------------------


def _weights(subject: Subject) -> list[Family]:
    allocations = ("global", "uniform", "energy")

    def magnitude(setting: str, options: dict[str, Any], **data: Any) -> Variant:
        def make(cost: str, share: float) -> nn.Module:
            return pliant.compress(subject.model, pliant.Magnitude(1 - share, **options), subject.x, **data)

        return Variant(setting, make, settled=bool(data))

    def wanda(scope: str) -> Variant:
        return Variant(scope, lambda cost, share: wanda_like(subject, share, scope))

    plain = [magnitude(a, {"allocation": a}) for a in allocations]
    result = [
        Family("weights", "magnitude", tuple(plain)),
        Family("weights", "Wanda", tuple(wanda(scope) for scope in ("rows", "layer", "global"))),
    ]
    if REFITS_ENTRIES:
        data = {"calibration": subject.calibration, "refit": True}
        result.append(
            Family("weights", f"{OURS}, refit", tuple(magnitude(a, {"allocation": a}, **data) for a in allocations))
        )
    return result


def _nm(subject: Subject) -> list[Family]:
    def pattern(**data: Any) -> Variant:
        def make(cost: str, share: float) -> nn.Module:
            if share != 0.5:
                raise pliant.Refused("2:4 keeps half of the weights")
            return pliant.compress(subject.model, pliant.SemiStructured(2, 4), subject.x, **data)

        return Variant("2:4", make, settled=bool(data))

    def wanda(cost: str, share: float) -> nn.Module:
        if share != 0.5:
            raise pliant.Refused("2:4 keeps half of the weights")
        return wanda_like(subject, share, "2:4")

    result = [Family("nm", "magnitude", (pattern(),)), Family("nm", "Wanda", (Variant("2:4", wanda),))]
    if REFITS_ENTRIES:
        result.append(Family("nm", f"{OURS}, refit", (pattern(calibration=subject.calibration, refit=True),)))
    return result


def wanda_like(subject: Subject, share: float, scope: str) -> nn.Module:
    """Zero the weights of the smallest \\|w\\|·‖x‖, x being what the weight multiplies (Sun et al. 2023).

    Args:
        subject: the network, in all of whose linear and convolution layers weights become zero.
        share: the share of the weights that stays.
        scope: which weights are compared: those of a filter ("rows", as in the paper), of a layer, of all layers
            ("global", each score divided by its layer's root mean square), or of four input channels ("2:4").
    """
    network = copy.deepcopy(subject.model)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    norms = input_norms(network, layers, subject)
    scores = {n: m.weight.detach().abs() * norms[n] for n, m in layers.items()}
    if scope == "global":
        scores = {n: s / s.square().mean().sqrt() for n, s in scores.items()}
        threshold = _quantile(torch.cat([s.flatten() for s in scores.values()]), 1 - share)
    for name, layer in layers.items():
        score = scores[name]
        if scope == "rows":
            flat = score.flatten(1)
            threshold = flat.sort(1).values[:, round((1 - share) * flat.shape[1]) :][:, :1]
            threshold = threshold.view(-1, *[1] * (score.dim() - 1))
        elif scope == "layer":
            threshold = _quantile(score.flatten(), 1 - share)
        elif score.shape[1] % 4 == 0 and scope == "2:4":
            threshold = score.unflatten(1, (-1, 4)).sort(2).values[:, :, 2:3].expand(-1, -1, 4, *score.shape[2:])
            threshold = threshold.flatten(1, 2)
        elif scope == "2:4":
            continue  # left alone, as by pliant
        layer.weight.data.masked_fill_(score < threshold, 0.0)
    return network


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.sort().values[min(round(share * len(values)), len(values) - 1)]


def input_norms(network: nn.Module, layers: dict[str, Any], subject: Subject) -> dict[str, Tensor]:
    """Return √Σx² of the inputs that each weight of a layer multiplies, in a shape that broadcasts to the weight's."""
    sums: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares, weight = args[0].detach().square(), torch.zeros_like(layer.weight, requires_grad=True)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):  # Σ(w ∗ x²) has the gradient Σx² with respect to w
            convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
            with torch.enable_grad():
                everything = convolve(
                    squares, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
                ).sum()
                (total,) = torch.autograd.grad(everything, weight)
        else:
            total = squares.flatten(0, -2).sum(0)
        sums[name] = sums[name] + total if name in sums else total

    hooks = [layer.register_forward_pre_hook(functools.partial(add, name)) for name, layer in layers.items()]
    with torch.no_grad():
        for inputs, _ in subject.calibration:
            network(inputs)
    for hook in hooks:
        hook.remove()
    return {name: total.sqrt() for name, total in sums.items()}
