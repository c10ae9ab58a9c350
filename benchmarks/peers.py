"""Removal of channels by torch-pruning (Fang et al. 2023), with its own scores, by its own pruner.

The pruner takes a share of *channels*. The one that leaves the share of parameters or of multiply-accumulates nearest
to the wanted one is found by bisection.

Two things are done for these peers. The best channel of every group always stays: otherwise the pruner skips any layer
of which it would remove everything, and leaves it whole. And Hessian scores get the mean squared gradients of all
samples; torch-pruning 1.6.1's own accumulation keeps the last sample's only.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from subjects import Subject
from torch import Tensor, nn
from torch_pruning.pruner import importance as scores

from pliant import measuring

SCOPES = ("global", "local", "isomorphic")  # which groups are ranked together: all, none, those of the same kind
STEPS = 11  # of the bisection


@dataclass(frozen=True)
class Peer:
    """One way to score and rank.

    Args:
        score: makes a score of torch-pruning.
        scope: one of SCOPES.
        gradients: which gradients the score reads: "", "mean" or "squares".
        whole_heads: remove attention heads too, not only dimensions within heads.
    """

    score: Callable[[], Any]
    scope: str
    gradients: str = ""
    whole_heads: bool = False


FAMILIES: dict[str, tuple[dict[str, Callable[[], Any]], str]] = {  # name → settings, gradients
    "magnitude": (  # "first": of the layer that makes the channels, as Li et al. 2017; "mean": of all coupled layers
        {
            f"p={p} {layers}": functools.partial(scores.GroupMagnitudeImportance, p=p, group_reduction=layers)
            for p, layers in ((1, "mean"), (2, "mean"), (2, "first"))
        },
        "",
    ),
    "BN scale": ({"": scores.BNScaleImportance}, ""),
    "LAMP": ({"": scores.LAMPImportance}, ""),
    "FPGM": ({"": scores.FPGMImportance}, ""),
    "Taylor": (
        {
            "single": scores.GroupTaylorImportance,
            "multi": functools.partial(scores.GroupTaylorImportance, multivariable=True),
        },
        "mean",
    ),
    "Hessian": ({"": scores.GroupHessianImportance}, "squares"),
    "random": ({"": scores.RandomImportance}, ""),
}


def peers(family: str, heads: bool) -> dict[str, Peer]:
    """Return setting → peer."""
    settings, gradients = FAMILIES[family]
    return {
        " ".join(filter(None, [setting, scope, "heads" if whole else ""])): Peer(score, scope, gradients, whole)
        for setting, score in settings.items()
        for scope in SCOPES
        for whole in ((False, True) if heads else (False,))
    }


@dataclass(eq=False)
class Workshop:
    """Everything about one network that all peers share: its gradients, and the sizes of the networks made so far."""

    subject: Subject
    sizes: dict[Peer, dict[float, tuple[float, float]]] = field(default_factory=dict)

    def make(self, peer: Peer, cost: str, share: float) -> nn.Module:
        """Return the network whose share of the cost is nearest."""
        index = ("params", "macs").index(cost)
        known = self.sizes.setdefault(peer, {})
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            if middle not in known:
                network = self.pruned(peer, middle)
                known[middle] = shares(self.subject, network)
            low, high = (middle, high) if known[middle][index] > share else (low, middle)
        return self.pruned(peer, min(known, key=lambda ratio: abs(known[ratio][index] - share)))

    def pruned(self, peer: Peer, ratio: float) -> nn.Module:
        """Return the network without the share ``ratio`` of its channels."""
        subject = self.subject
        model = copy.deepcopy(subject.model)
        parameters = dict(model.named_parameters())
        for name, gradient in self.gradients(peer.gradients).items():
            parameters[name].grad = gradient.clone()
        heads = {model.get_submodule(name): count for name, count in subject.heads.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            pruner = torch_pruning.pruner.BasePruner(
                model,
                subject.x,
                Spared(peer.score()),
                global_pruning=peer.scope != "local",
                isomorphic=peer.scope == "isomorphic",
                pruning_ratio=ratio,
                ignored_layers=[model.get_submodule(name) for name in subject.outputs],
                num_heads=heads,
                prune_num_heads=peer.whole_heads,
                head_pruning_ratio=ratio if peer.whole_heads else 0.0,
                unwrapped_parameters=[(parameters[name], dim) for name, dim in subject.loose.items()],
                in_channel_groups={},  # the defaults are shared by all pruners, and grow
                out_channel_groups={},
            )
            pruner.step()
        for name in subject.heads:
            _tell_heads(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name), pruner.num_heads)
        model.zero_grad(set_to_none=True)
        return model.eval()

    def gradients(self, kind: str) -> dict[str, Tensor]:
        """Return the gradients of the mean loss of the calibration data, or the mean of each sample's squares."""
        return self._gradients[kind]() if kind else {}

    @functools.cached_property
    def _gradients(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        return {"mean": functools.cache(self._mean), "squares": functools.cache(self._squares)}

    def _mean(self) -> dict[str, Tensor]:
        return self._sum(lambda inputs, labels: [self._loss(inputs, labels).sum()], lambda gradient: gradient)

    def _squares(self) -> dict[str, Tensor]:
        def one_by_one(inputs: Tensor, labels: Tensor) -> Any:
            return (self._loss(inputs[i : i + 1], labels[i : i + 1]).sum() for i in range(len(inputs)))

        return self._sum(one_by_one, Tensor.square)

    def _sum(self, losses: Callable[[Tensor, Tensor], Any], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        parameters = dict(self.subject.model.named_parameters())
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for inputs, labels in self.subject.calibration:
            for loss in losses(inputs, labels):
                for name, gradient in zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True):
                    sums[name] += change(gradient)
        count = sum(len(labels) for _, labels in self.subject.calibration)
        return {name: total / count for name, total in sums.items()}

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        assert self.subject.loss is not None  # variants.py leaves these peers out
        return self.subject.loss(self.subject.model(inputs), labels)


def _tell_heads(attention: Any, layer: Any, counts: dict[nn.Module, int]) -> None:
    """Write the number of heads, or their size, into an attention module whose layer was pruned."""
    if hasattr(attention, "num_heads"):  # pliant's
        attention.num_heads = counts[layer]
    if hasattr(attention, "attention_head_size"):  # that of transformers
        attention.attention_head_size = layer.out_features // counts[layer]


class Spared(scores.Importance):
    """A score with which the best channel of a group is worth more than anything."""

    def __init__(self, score: Callable[[Any], Tensor | None]) -> None:
        self.score = score

    def __call__(self, group: Any) -> Tensor | None:
        values = self.score(group)
        if values is not None:
            values = values.nan_to_num()
            values[values.argmax()] = torch.inf
        return values


def shares(subject: Subject, network: nn.Module) -> tuple[float, float]:
    """Return the shares of all parameters and of all multiply-accumulates that a network has left."""
    dense = subject.model
    return (
        measuring.parameters(network) / measuring.parameters(dense),
        measuring.macs(network, subject.x) / measuring.macs(dense, subject.x),
    )
