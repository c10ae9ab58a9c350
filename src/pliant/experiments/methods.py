"""How a network is trained: each ``--method`` as an optimizer over the model's parameters.

A method is about the *matrices*: the weights of all convolutions and linear layers but the classifier. The SFW methods
put one structured ball on each of them, the baselines do theirs to them; biases, normalisations and the classifier
take the steps of SGD under every method, with the same weight decay.

What a :class:`Method` may do, and how it takes part in the training:

* add a penalty, choose another direction, act after each step: inside its optimizer, whose state a checkpoint keeps;
* take a second pass through the network in each step: ``passes=2``, the optimizer's ``step`` calls a closure;
* change the model before the training: in ``build``; :func:`~pliant.experiments.baselines.merged` undoes it at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from pliant.compressor_names import parse_pattern
from pliant.constraints import Preset, constrain, filters, l2, layout_of, rank, resolve_k, semi_structured, weights
from pliant.errors import BadInput, unknown
from pliant.experiments import baselines
from pliant.experiments.baselines import MatrixSGD
from pliant.optim import RESCALES as RESCALES_OF_SFW
from pliant.optim import SFW, KSchedule, SoftThreshold
from pliant.structure.layers import tied_parameters
from pliant.structure.verification import coupled_channels

Settings = dict[str, Any]  # of pliant.experiments.train.train
RESCALES = tuple("none" if rescale is None else rescale for rescale in RESCALES_OF_SFW)
VERTICES = ("support", "sparse", "orthogonal")
RECIPES = ("default", "gradient", "paper")


Build = Callable[[nn.Module, Settings, Tensor | None], Optimizer]


@dataclass(frozen=True)
class Method:
    """A method and the settings it takes where none are given.

    Args:
        summary: what it is.
        build: from the model, all settings and some images to the optimizer; may parametrise weights of the model.
        lr: learning rate; None where it follows from ``turnover`` and the length of the training.
        own: the settings that not every method has, with this one's defaults; None where it has one but needs none.
        passes: forward and backward passes per step.
    """

    summary: str
    build: Build
    lr: float | None = 0.1
    own: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1


def with_defaults(settings: Settings) -> Settings:
    """Return the settings with those of the method where they are None.

    Raises BadInput for an unknown method, or a setting that it does not have.
    """
    if settings["method"] not in METHODS:
        raise unknown("method", settings["method"], METHODS)
    method = METHODS[settings["method"]]
    for name in OWN:
        if settings[name] is not None and name not in method.own:
            own = ", ".join(f"--{other}" for other in method.own) or "none"
            raise BadInput(f"--{name} is not a setting of --method {settings['method']}; its own settings: {own}")
    defaults = {"lr": method.lr, **method.own}
    if settings["recipe"] in ("gradient", "paper"):
        given = {name: value for name, value in GRADIENT.items() if name in defaults}
        if "k" in defaults and defaults["k"] is None:
            del given["k"]  # the pattern tells it
        defaults |= given
    found = settings | {name: value for name, value in defaults.items() if settings[name] is None}
    if "turnover" in method.own and (found["lr"] is not None or found["rescale"] != "none"):
        if settings["turnover"] is not None:
            raise BadInput("--turnover is for --rescale none without --lr, which it decides")
        found |= {"turnover": None, "lr": 0.1 if found["lr"] is None else found["lr"]}
    if found["rescale"] not in (None, "none"):  # only convex steps have a known length
        for name in ("strength", "persistence"):
            if settings[name]:
                raise BadInput(f"--{name} of --method {settings['method']} needs --rescale none")
        found |= {"strength": None, "every": settings["every"], "persistence": None}
    return found


def make_optimizer(model: nn.Module, settings: Settings, images: Tensor | None = None) -> Optimizer:
    """Return the optimizer of a method.

    Args:
        model: some methods parametrise its weights; otherwise it is left as it is.
        settings: all arguments of :func:`pliant.experiments.train.train`, from :func:`with_defaults`.
        images: two or more, to find coupled channels with.

    Raises:
        BadInput: a value out of range, or a model without a weight that the method is about.
    """
    return METHODS[settings["method"]].build(model, settings, images)


def make_k_schedule(optimizer: Optimizer, settings: Settings, steps: int) -> KSchedule | baselines.KAnnealing | None:
    """Return what moves k from ``k_start`` to its final value in a training of ``steps`` steps, None without one."""
    start = settings["k_start"]
    if start is None:
        return None
    steps = max(1, math.floor(settings["anneal"] * steps))
    if isinstance(optimizer, SFW):
        return KSchedule(optimizer, start, steps=steps)
    assert isinstance(optimizer, baselines.NuMuon), f"{settings['method']} has no k to anneal"
    return baselines.KAnnealing(
        optimizer,
        [None if g["row_dim"] is None else _count(start, g) for g in optimizer.param_groups],
        steps=steps,
    )


def make_threshold(optimizer: Optimizer, settings: Settings) -> SoftThreshold | None:
    """Return what takes the parts off the weights that SFW's vertices do not agree on, None without one."""
    if not isinstance(optimizer, SFW) or not settings["strength"]:
        return None
    every = {} if settings["every"] is None else {"every": settings["every"]}
    return SoftThreshold(optimizer, settings["strength"], **every)


# --- the matrices -----------------------------------------------------------------------------------------------------


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers, by name, whose weights a method is about: all convolutions and linear ones but the last."""
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


def _matrix_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return a parameter group for each matrix, with its layout and its k as a count, and one for the rest."""
    groups: list[dict[str, Any]] = []
    for name, module in matrix_layers(model).items():
        layout = layout_of(module)
        group = {"params": [(f"{name}.weight", module.weight)], "row_dim": layout.dim, "blocks": layout.groups}
        if settings["k"] is not None:
            group["k"] = _count(settings["k"], group)
        groups.append(group)
    if not groups:
        raise _nothing_to_do(settings)
    return [*groups, *_rest(model, settings, {id(group["params"][0][1]) for group in groups})]


def _rest(model: nn.Module, settings: Settings, taken: set[int]) -> list[dict[str, Any]]:
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    lr = {} if settings["other_lr"] is None else {"lr": settings["other_lr"]}
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


def _nothing_to_do(settings: Settings) -> BadInput:
    method = settings["method"]
    return BadInput(f"{method} finds no weight to act on in this model; train it with --method sgd")


def _common(settings: Settings) -> dict[str, Any]:
    return {name: settings[name] for name in ("lr", "momentum", "weight_decay")}


# --- building ---------------------------------------------------------------------------------------------------------


def _sgd(model: nn.Module, settings: Settings, _: Tensor | None) -> Optimizer:
    return torch.optim.SGD(model.parameters(), **_common(settings))


def _sfw(preset: Callable[[Settings], Preset]) -> Build:
    def build(model: nn.Module, settings: Settings, images: Tensor | None) -> Optimizer:
        rest = l2(settings["radius"]) if settings["recipe"] == "paper" else None
        rules = [(_constrained(model, settings), preset(settings))]
        coupled = coupled_channels(model, images).groups if settings["coupled"] and images is not None else ()
        groups = constrain(model, rules, default=rest, coupled=coupled)
        for group in groups:
            if group["ball"] is None and settings["other_lr"] is not None:
                group["lr"] = settings["other_lr"]
            if group["ball"] is not None:
                group["persistence"] = settings["persistence"] or 0.0
        rescale = None if settings["rescale"] == "none" else settings["rescale"]
        return SFW(groups, rescale=rescale, check_finite=True, **_common(settings))

    return build


def _constrained(model: nn.Module, settings: Settings) -> Callable[[str, Tensor], bool]:
    """Return the predicate that tells the weights with a ball."""
    # The dimension of the input channels of every matrix.
    inputs = {f"{name}.weight": 1 - layout_of(module).dim for name, module in matrix_layers(model).items()}
    m = 1 if settings["pattern"] is None else parse_pattern(settings["pattern"])[1]

    def constrained(name: str, parameter: Tensor) -> bool:
        # Hardware reads N:M along whole blocks of input channels; the first layer's 1 or 3 do not fill one.
        return name in inputs and parameter.shape[inputs[name]] % m == 0

    if not any(constrained(name, p) for name, p in model.named_parameters()):
        raise _nothing_to_do(settings)
    return constrained


def _nm_preset(settings: Settings) -> Preset:
    n, m = parse_pattern(settings["pattern"])
    k = n if settings["k"] is None else resolve_k(settings["k"], m)
    return semi_structured(k, m, settings["radius"], vertices=settings["vertices"])


def _matrix_sgd(method: type[MatrixSGD], **fixed: Any) -> Build:
    def build(model: nn.Module, settings: Settings, _: Tensor | None) -> Optimizer:
        # k is a count for each matrix, so it is in its group.
        options = {name: settings[name] for name in method.options if name not in {"k", *fixed}}
        return method(_matrix_groups(model, settings), **_common(settings), **options, **fixed)

    return build


def _pat(part: str) -> Build:
    def build(model: nn.Module, settings: Settings, _: Tensor | None) -> Optimizer:
        groups = _matrix_groups(model, settings)
        return baselines.pat_optimizer(groups, part, strength=settings["strength"], **_common(settings))

    return build


def _untied(model: nn.Module, settings: Settings) -> list[tuple[str, nn.Module]]:
    """Return the layers whose weight is theirs alone: a factor must not change two of them."""
    tied = tied_parameters(model)
    layers = [
        (name, module)
        for name, module in matrix_layers(model).items()
        if id(module.weight) not in tied and not parametrize.is_parametrized(module)
    ]
    if not layers:
        raise _nothing_to_do(settings)
    return layers


def _lorita(model: nn.Module, settings: Settings, images: Tensor | None) -> Optimizer:
    for _, module in _untied(model, settings):
        layout = layout_of(module)
        assert isinstance(module.weight, Tensor)
        product = baselines.Composition(module.weight.shape, layout.dim, layout.groups, count=settings["factors"])
        baselines.factorise(module, product)
    return _sgd(model, settings, images)


def _condlr(model: nn.Module, settings: Settings, _: Tensor | None) -> Optimizer:
    groups: list[dict[str, Any]] = []
    condition = settings["condition"]
    for name, module in _untied(model, settings):
        layout = layout_of(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        whole = {"params": [(f"{name}.weight", weight)], "row_dim": layout.dim, "blocks": layout.groups}
        k = _count(settings["k"], whole)
        product = baselines.Conditioned(weight.shape, layout.dim, layout.groups, k=k, condition=condition)
        factors = [(f"{name}.{factor}", p) for factor, p in baselines.factorise(module, product)]
        groups.append({"params": factors, "condition": condition})
    taken = {id(p) for group in groups for _, p in group["params"]}
    return baselines.CondLR([*groups, *_rest(model, settings, taken)], **_common(settings))


# --- the methods ------------------------------------------------------------------------------------------------------

# Steps as long as SGD's, with balls that train every shipped network.
_SFW = {
    "recipe": "default",
    "radius": 10.0,
    "rescale": "gradient",
    "k_start": None,
    "anneal": 0.7,
    "strength": None,
    "every": None,
    "other_lr": None,
}
# Convex steps towards vertices of equal directions, k annealed from all: the network learns early as fast as with
# Muon's steps, and is made of few parts at the end. What the weights are made of is replaced `turnover` times,
# however long the training is. The soft threshold lets go of what vertices disagree about: with it, fewer turns do
# best. Chosen on validation images of CIFAR-10 at 16×16, of Fashion-MNIST and, the threshold for rank, of digits.
_ANNEALED = {
    **_SFW,
    "rescale": "none",
    "vertices": "sparse",
    "k_start": 1.0,
    "every": 20,
    "other_lr": 0.1,
}


# The other recipes. "gradient": k-support balls, steps as long as those of SGD, a constant k. "paper" is that with L2
# balls on biases, normalisations and the classifier, as Zimmer, Spiegel, Pokutta, arXiv 2205.11921; there filters are
# then pruned and weights truncated by the same share in all layers: --allocation uniform of a sweep.
GRADIENT: Settings = {
    "lr": 0.1,
    "radius": 10.0,
    "vertices": "support",
    "rescale": "gradient",
    "k": 0.1,
    "k_start": None,
    "turnover": None,
    "other_lr": None,
    "coupled": False,
}


def _baseline(
    summary: str,
    optimizer: type[MatrixSGD],
    *,
    lr: float = 0.1,
    passes: int = 1,
    own: Mapping[str, Any] | None = None,
    **fixed: Any,
) -> Method:
    """Return the method of an optimizer: its options, but the fixed ones, are its own settings."""
    options = {name: value for name, value in optimizer.options.items() if name not in fixed}
    return Method(summary, _matrix_sgd(optimizer, **fixed), lr=lr, own={**options, **(own or {})}, passes=passes)


# The strengths of NUC, CAT and spectral decay all take about lr·0.02 off every singular value per step.
METHODS = {
    "sgd": Method("SGD with momentum and weight decay", _sgd),
    "sfw-filters": Method(
        "SFW towards few filters per layer",
        _sfw(lambda s: filters(s["k"], s["radius"], vertices=s["vertices"])),
        lr=None,
        own={
            **_ANNEALED,
            "turnover": 6.0,
            "k": 0.35,
            "strength": 0.03,
            "persistence": 1.0,
            "vertices": "orthogonal",
            "radius": 1.0,
            "coupled": True,
        },
    ),
    "sfw-rank": Method(
        "SFW towards low rank",
        _sfw(lambda s: rank(s["k"], s["radius"], vertices=s["vertices"], spatial=s["scheme"] == "spatial")),
        lr=None,
        own={**_ANNEALED, "turnover": 4.0, "k": 0.5, "strength": 0.06, "scheme": None},
    ),
    "sfw-weights": Method(
        "SFW towards few weights",
        _sfw(lambda s: weights(s["k"], s["radius"], vertices=s["vertices"])),
        own={"k": 0.1, **_SFW, "vertices": "support"},
    ),
    "sfw-nm": Method(
        "SFW towards N of M consecutive input channels",
        _sfw(_nm_preset),
        own={"k": None, "pattern": "2:4", **_SFW, "vertices": "support"},
    ),
    "k-sparse": Method(
        "SFW on k-sparse polytopes of weights",
        _sfw(lambda s: weights(s["k"], s["radius"], vertices="sparse")),
        own={"k": 0.1, **_SFW},
    ),
    "ssl": _baseline("group lasso over filters in the loss", baselines.SSL),
    "glt": _baseline("soft threshold on the norms of filters", baselines.GLT),
    "pat-filters": Method("torchao's proximal optimizer, group lasso", _pat("filters"), own={"strength": 2e-4}),
    "pat-rank": Method("torchao's proximal optimizer, nuclear norm", _pat("rank"), own={"strength": 2e-4}),
    "cram-filters": _baseline("gradients at pruned filters added", baselines.CrAM, passes=2, part="filters"),
    "cram-rank": _baseline("gradients at truncated weights added", baselines.CrAM, passes=2, part="rank"),
    "cram-weights": _baseline("gradients at pruned weights added", baselines.CrAM, passes=2, part="weights"),
    "nuc": _baseline("nuclear norm in the loss", baselines.NUC),
    "cat": _baseline("soft threshold on singular values", baselines.CAT),
    "trp": _baseline("truncated decompositions during the training", baselines.TRP),
    "lorita": Method("products of factors under weight decay", _lorita, own={"factors": 2}),
    "condlr": Method("fixed rank, singular values near each other", _condlr, own={"k": 0.5, "condition": 2.0}),
    "spectral-decay": _baseline("decay of all singular values alike", baselines.SpectralDecay),
    "q3r": _baseline("reweighted quadratic in the loss", baselines.Q3R, own={"k": 0.2}),
    # A step of these has the same length whatever the gradient, so their lr is not that of SGD beside them.
    "muon": _baseline("steps along polar factors", baselines.Muon, lr=0.02, own={"other_lr": 0.1}),
    "numuon": _baseline(
        "steps along leading singular directions",
        baselines.NuMuon,
        lr=0.02,
        own={"k": 0.25, "k_start": 1.0, "anneal": 0.5, "other_lr": 0.1},
    ),
    "scion": _baseline("convex steps along polar factors", baselines.Scion, lr=0.005, own={"other_lr": 0.1}),
}
OWN = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.own))
