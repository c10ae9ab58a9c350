"""Optimizers over a model's parameters, for the methods of :mod:`pliant.experiments.methods`.

A method is about the *matrices*: the weights of all convolutions and linear layers except the classifier. The SFW
methods put one structured ball on each of them, the baselines act on them; biases, normalisations and the classifier
take the steps of SGD under every method, with the same weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from pliant.compressor_names import parse_pattern
from pliant.constraints import Preset, constrain, l2, layout_of, resolve_k, semi_structured
from pliant.errors import BadInput
from pliant.experiments import baselines
from pliant.experiments.baselines import MatrixSGD
from pliant.experiments.training.settings import Resolved, vertices_of
from pliant.optim import SFW, KSchedule, SoftThreshold
from pliant.structure.layers import tied_parameters
from pliant.structure.verification import coupled_channels

Build = Callable[[nn.Module, Resolved, Tensor | None], Optimizer]
"""A function of the model, the settings and some images that returns the optimizer."""


# --- schedules --------------------------------------------------------------------------------------------------------


def make_k_schedule(optimizer: Optimizer, settings: Resolved, steps: int) -> KSchedule | None:
    """Let k fall from ``k_start`` to its final value.

    Args:
        optimizer: of the method.
        settings: of the training.
        steps: of the whole training.

    Returns:
        The schedule, which SFW advances; None if k is constant, or the optimizer anneals it by itself.
    """
    start = settings.k_start
    if start is None:
        return None
    steps = max(1, math.floor(settings.anneal * steps))
    if isinstance(optimizer, SFW):
        return KSchedule(optimizer, start, steps=steps)
    if isinstance(optimizer, baselines.NuMuon):
        for group in optimizer.param_groups:
            if group["row_dim"] is not None:
                group |= {"k_start": _count(start, group), "k_steps": steps}
    return None


def make_threshold(optimizer: Optimizer, settings: Resolved) -> SoftThreshold | None:
    """Return the soft threshold of a training with SFW; None if it has none."""
    if not isinstance(optimizer, SFW) or not settings.strength:
        return None
    every = {} if settings.every is None else {"every": settings.every}
    return SoftThreshold(optimizer, settings.strength, **every)


# --- the matrices -----------------------------------------------------------------------------------------------------


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers, by name, whose weights a method is about: convolutions and linear layers but the last one."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    if linear:
        layers.pop(linear[-1])
    return {name: module for name, module in layers.items() if f"{name}.weight" in trainable}


def _matrix_groups(model: nn.Module, settings: Resolved) -> list[dict[str, Any]]:
    """Return a parameter group for each matrix, with its layout and its k as a count, and one for the rest."""
    groups: list[dict[str, Any]] = []
    for name, module in matrix_layers(model).items():
        row_dim, blocks = _row_dim_and_blocks(module)
        group = {"params": [(f"{name}.weight", module.weight)], "row_dim": row_dim, "blocks": blocks}
        if settings.k is not None:
            group["k"] = _count(settings.k, group)
        groups.append(group)
    if not groups:
        raise _nothing_to_do(settings)
    return [*groups, *_rest(model, settings, {id(group["params"][0][1]) for group in groups})]


def _row_dim_and_blocks(module: nn.Module) -> tuple[int, int]:
    """Return the dimension that counts the rows of a convolution's or linear layer's weight, and its groups."""
    assert isinstance(module.weight, Tensor)
    layout = layout_of(module, module.weight)
    assert isinstance(layout.dim, int)  # only weights that hold several matrices have more dimensions of rows
    return layout.dim, layout.groups


def _rest(model: nn.Module, settings: Resolved, matrices: set[int]) -> list[dict[str, Any]]:
    """Return the group of all trainable parameters but those with these ids; no group if there are none."""
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in matrices]
    lr = {} if settings.other_lr is None else {"lr": settings.other_lr}
    return [{"params": rest, **lr}] if rest else []


def _count(k: float, group: dict[str, Any]) -> int:
    """Return k as a number of singular directions of the only matrix of a group."""
    first = group["params"][0]
    name, p = first if isinstance(first, tuple) else (group["param_names"][0], first)
    rows, columns = p.shape[group["row_dim"]] // group["blocks"], p.numel() // p.shape[group["row_dim"]]
    try:
        return resolve_k(k, min(rows, columns))
    except BadInput as error:
        raise BadInput(f"{name} of shape {tuple(p.shape)}: {error}") from None


def _nothing_to_do(settings: Resolved) -> BadInput:
    method = settings.method
    return BadInput(f"{method} finds no weight to act on in this model; train it with --method sgd")


def _common(settings: Resolved) -> dict[str, Any]:
    return {name: settings[name] for name in ("lr", "momentum", "weight_decay")}


# --- building ---------------------------------------------------------------------------------------------------------


def sgd(model: nn.Module, settings: Resolved, _: Tensor | None) -> Optimizer:
    """Build SGD over all parameters."""
    return torch.optim.SGD(model.parameters(), **_common(settings))


def sfw(preset: Callable[[Resolved], Preset]) -> Build:
    """Return the function that builds SFW with the balls of a preset on the matrices."""

    def build(model: nn.Module, settings: Resolved, images: Tensor | None) -> Optimizer:
        rest = l2(settings.radius) if settings.recipe == "paper" else None
        rules = [(_constrained(model, settings), preset(settings))]
        coupled = coupled_channels(model, images).groups if settings.coupled and images is not None else ()
        groups = constrain(model, rules, default=rest, coupled=coupled)
        for group in groups:
            if group["ball"] is None and settings.other_lr is not None:
                group["lr"] = settings.other_lr
            if group["ball"] is not None:
                group["persistence"] = settings.persistence or 0.0
        rescale = None if settings.rescale == "none" else settings.rescale
        return SFW(groups, rescale=rescale, check_finite=True, **_common(settings))

    return build


def _constrained(model: nn.Module, settings: Resolved) -> Callable[[str, Tensor], bool]:
    """Return the predicate that is true of the weights with a ball."""
    # The dimension of the input channels of every matrix.
    inputs = {f"{name}.weight": 1 - _row_dim_and_blocks(module)[0] for name, module in matrix_layers(model).items()}
    m = 1 if settings.pattern is None else parse_pattern(settings.pattern)[1]

    def constrained(name: str, parameter: Tensor) -> bool:
        # N:M patterns need whole blocks of input channels; the 1 or 3 channels of the first layer do not fill one.
        return name in inputs and parameter.shape[inputs[name]] % m == 0

    if not any(constrained(name, p) for name, p in model.named_parameters()):
        raise _nothing_to_do(settings)
    return constrained


def nm_preset(settings: Resolved) -> Preset:
    """Return the preset of N:M patterns; k is N unless it is given."""
    n, m = parse_pattern(settings.pattern)
    k = n if settings.k is None else resolve_k(settings.k, m)
    return semi_structured(k, m, settings.radius, vertices=vertices_of(settings.vertices))


def matrix_sgd(method: type[MatrixSGD], **fixed: Any) -> Build:
    """Return the function that builds a subclass of MatrixSGD; its options are settings, except the fixed ones."""

    def build(model: nn.Module, settings: Resolved, _: Tensor | None) -> Optimizer:
        # k is a count for each matrix, so it is in its group.
        options = {name: settings[name] for name in method.options if name not in {"k", *fixed}}
        return method(_matrix_groups(model, settings), **_common(settings), **options, **fixed)

    return build


def pat(part: str) -> Build:
    """Return the function that builds torchao's proximal optimizer, for "filters" or for "rank"."""

    def build(model: nn.Module, settings: Resolved, _: Tensor | None) -> Optimizer:
        groups = _matrix_groups(model, settings)
        return baselines.pat_optimizer(groups, part, strength=settings.strength, **_common(settings))

    return build


def _untied(model: nn.Module, settings: Resolved) -> list[tuple[str, nn.Module]]:
    """Return the layers that share their weight with no other one: a factor must not change two of them."""
    tied = tied_parameters(model)
    layers = [
        (name, module)
        for name, module in matrix_layers(model).items()
        if id(module.weight) not in tied and not parametrize.is_parametrized(module)
    ]
    if not layers:
        raise _nothing_to_do(settings)
    return layers


def lorita(model: nn.Module, settings: Resolved, images: Tensor | None) -> Optimizer:
    """Replace weights by products of matrices, and build SGD over their factors."""
    for _, module in _untied(model, settings):
        row_dim, blocks = _row_dim_and_blocks(module)
        assert isinstance(module.weight, Tensor)
        product = baselines.Composition(module.weight.shape, row_dim, blocks, count=settings.factors)
        baselines.factorise(module, product)
    return sgd(model, settings, images)


def condlr(model: nn.Module, settings: Resolved, _: Tensor | None) -> Optimizer:
    """Replace weights by well-conditioned products, and build the optimizer that keeps them well-conditioned."""
    groups: list[dict[str, Any]] = []
    condition = settings.condition
    for name, module in _untied(model, settings):
        row_dim, blocks = _row_dim_and_blocks(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        whole = {"params": [(f"{name}.weight", weight)], "row_dim": row_dim, "blocks": blocks}
        k = _count(settings.k, whole)
        product = baselines.Conditioned(weight.shape, row_dim, blocks, k=k, condition=condition)
        factors = [(f"{name}.{factor}", p) for factor, p in baselines.factorise(module, product)]
        groups.append({"params": factors, "condition": condition})
    in_groups = {id(p) for group in groups for _, p in group["params"]}
    return baselines.CondLR([*groups, *_rest(model, settings, in_groups)], **_common(settings))
