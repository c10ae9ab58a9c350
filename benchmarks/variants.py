"""Every way to cut a network that ``cuts.py`` compares: pliant's, torch-pruning's, and two that are written here.

A variant makes a network from a subject, a cost and the share of it that shall stay. Variants of one family differ in
settings only; the best of a family stands for it. What needs a newer pliant joins by itself once ``compress_to`` has
the argument that it needs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import FAMILIES, Peer, Workshop, peers
from subjects import Subject
from torch import Tensor, nn

import pliant
from pliant.compression import Compressor

KINDS = ("filters", "rank", "weights", "nm")
COSTS = {"filters": ("params", "macs"), "rank": ("params", "macs"), "weights": ("entries",), "nm": ("entries",)}
SHARES = (0.8, 0.7, 0.5, 0.3, 0.2, 0.1)
REFITS = "refit" in inspect.signature(pliant.compress_to).parameters
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

    result.append(ours(f"{OURS}, norms", ("l2", "l1") if subject.heads else ("l2", "l1", "bn")))
    if REFITS:
        result += [
            ours(f"{OURS}, data and refit", ("auto",), refit=True, **data),
            ours(f"{OURS}, data", ("auto",), refit=False, **data),
            ours("norms and refit (ThiNet, CP)", ("l2",), refit=True, **data),
        ]
    return result


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

    data: dict[str, Any] = {"calibration": subject.calibration}
    plain = {**data, "refit": False} if REFITS else data
    result = [family("SVD", whiten=False), family("whitened SVD", whiten=True, **plain)]
    return [*result, family(f"{OURS}, whitened and refit", whiten=True, **data, refit=True)] if REFITS else result


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
    if REFITS:
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
    if REFITS:
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
