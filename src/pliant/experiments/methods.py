"""The training methods: each ``--method NAME`` is a row of :data:`METHODS`, with its own settings.

A method can take part in a training in three ways:

* add a penalty, choose another direction, act after each step: in its optimizer, whose state a checkpoint keeps;
* take a second pass through the network in each step: with ``passes=2``, the optimizer's ``step`` calls a closure;
* change the model before the training: in ``build``; :func:`~pliant.experiments.baselines.merged` undoes it at the end.

A method of another package is a :class:`Method` or a subclass of ``MatrixSGD``, named ``package.module:name`` or by an
entry point of the group ``pliant.methods``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pliant.constraints import filters, rank, weights
from pliant.errors import BadInput, shown, unknown
from pliant.experiments import baselines
from pliant.experiments.baselines import MatrixSGD
from pliant.experiments.training.method import Method as Method
from pliant.experiments.training.method import matrix_method as matrix_method
from pliant.experiments.training.optimizers import condlr, lorita, nm_preset, pat, sfw, sgd
from pliant.experiments.training.settings import OWN, SETTINGS, Resolved, Settings, has_k, vertices_of
from pliant.extensions import described, find, foreign_code


def find_method(name: str) -> Method:
    """Return the method of this name, from this package, an installed package, or ``package.module:name``.

    Raises BadInput if nothing has this name, or it is not a method.
    """
    return find("method", name, METHODS, _fault, lambda _, thing: _as_method(thing))


def _fault(thing: Any) -> str | None:
    if not isinstance(thing, Method) and not (isinstance(thing, type) and issubclass(thing, MatrixSGD)):
        return f"expected a Method or a subclass of MatrixSGD, got {shown(thing)}"
    options: object = {} if isinstance(thing, Method) else thing.options
    if not isinstance(options, Mapping):
        return f"its options should be its settings with their defaults, got {shown(options)}"
    return _as_method(thing).fault()


def _as_method(thing: Any) -> Method:
    if isinstance(thing, Method):
        return thing
    summary = (inspect.getdoc(thing) or thing.__name__).partition("\n")[0]
    return matrix_method(summary.removesuffix("."), thing)


def settings_from(given: Mapping[str, Any]) -> Settings:
    """Return settings from names and values; raises BadInput for an unknown name or a wrong value."""
    settings = Settings(**{name: value for name, value in given.items() if name in SETTINGS})
    rest = {name: value for name, value in given.items() if name not in SETTINGS}
    own = find_method(settings.method).settings if rest else {}
    for name in rest:
        if name not in own:
            raise unknown("setting", name, [*SETTINGS, *own])
    return dataclasses.replace(settings, others={name: value for name, value in rest.items() if value is not None})


def resolved(settings: Settings) -> Resolved:
    """Return the settings that a training runs with: the method's own values in the place of None.

    Raises:
        BadInput: the method is unknown, or a setting is not one of its own.
    """
    method = find_method(settings.method)
    for name in (*OWN, *settings.others):
        if settings[name] is not None and name not in method.own:
            own = ", ".join(f"--{other}" for other in method.own) or "none"
            raise BadInput(f"--{name} is not a setting of --method {settings.method}; its own settings: {own}")
    for name in method.others:
        method.settings[name].check(name, settings.others.get(name))
    defaults = {"lr": method.lr, **{name: setting.default for name, setting in method.settings.items()}}
    if settings.recipe in ("gradient", "paper"):
        defaults |= _gradient_recipe(defaults)
    given = settings.to_config()
    values = {name: default if given.get(name) is None else given[name] for name, default in defaults.items()}
    if "turnover" in method.own:
        values |= _turnover(settings, values)
    if values.get("rescale", "none") != "none":
        values |= _not_convex(settings)
    if values.get("vertices") is not None and not has_k(values["vertices"]):
        values |= _without_k(settings)
    values = given | values
    return Resolved(**{name: values[name] for name in SETTINGS}, others={name: values[name] for name in method.others})


def _gradient_recipe(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that the recipe "gradient" decides."""
    values = {name: value for name, value in GRADIENT.items() if name in defaults}
    if "k" in defaults and defaults["k"] is None:
        del values["k"]  # the pattern decides it
    return values


def _turnover(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return turnover and lr: one of them decides the steps."""
    if values["lr"] is None and values.get("rescale", "none") == "none":
        return {}
    if settings.turnover is not None:
        raise BadInput("--turnover is for --rescale none without --lr, which it decides")
    return {"turnover": None, "lr": 0.1 if values["lr"] is None else values["lr"]}


def _not_convex(settings: Settings) -> dict[str, Any]:
    """Return what the settings of convex steps are for steps of another length, which is not known before."""
    for name in ("strength", "persistence"):
        if settings[name]:
            raise BadInput(f"--{name} of --method {settings.method} needs --rescale none")
    return {"strength": None, "every": settings.every, "persistence": None}


def _without_k(settings: Settings) -> dict[str, Any]:
    """Return what the settings of a norm with a k are for one without."""
    for name in ("k", "k_start"):
        if settings[name] is not None:
            raise BadInput(f"--{name} is for norms that have a k, unlike --vertices {settings.vertices}")
    return {"k": None, "k_start": None, "strength": settings.strength}


def make_optimizer(model: nn.Module, settings: Resolved, images: Tensor | None = None) -> Optimizer:
    """Return the optimizer of a method.

    Args:
        model: some methods parametrise its weights; otherwise it is left as it is.
        settings: of the training.
        images: two or more, from which coupled channels are found.

    Raises:
        BadInput: a value is out of range, the model has no weight that the method acts on, or the method of another
            package builds no optimizer (its exception is chained).
    """
    method = find_method(settings.method)
    if settings.method in METHODS:
        return method.build(model, settings, images)
    origin = described("method", settings.method)
    with foreign_code(f"{origin}: its build"):
        optimizer: object = method.build(model, settings, images)
    if not isinstance(optimizer, Optimizer):
        raise BadInput(f"{origin}: expected a torch.optim.Optimizer from its build, got {shown(optimizer)}")
    return optimizer


# --- the methods ------------------------------------------------------------------------------------------------------

# Steps as long as SGD's, with balls in which every shipped network trains well.
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
# Convex steps towards vertices whose directions have equal lengths, with k annealed from all: the network learns as
# fast as with Muon's steps early on, and consists of few parts at the end. The weights are replaced `turnover` times,
# however long the training is. The soft threshold removes parts that few vertices share; with it, a smaller turnover is
# best. Chosen on validation images of CIFAR-10 at 16×16, of Fashion-MNIST and, the threshold for rank, of digits.
_ANNEALED = {
    **_SFW,
    "rescale": "none",
    "vertices": "sparse",
    "k_start": 1.0,
    "every": 20,
    "other_lr": 0.1,
}


# The other recipes. "gradient": k-support balls, steps as long as those of SGD, a constant k. "paper" adds L2 balls on
# biases, normalisations and the classifier, as in Zimmer, Spiegel, Pokutta, arXiv 2205.11921, where filters are then
# pruned and weights truncated by the same share in all layers: --allocation uniform of a sweep.
GRADIENT: dict[str, Any] = {
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


_VERTICES, _OWN_NORM = "the kind of the balls: support", "or a norm of vectors as package.module:Class."
_DOCS = {
    "strength": "share of the vertices that a part of a weight must be in to stay; needs rescale none.",
    "every": "steps between two soft thresholds.",
    "vertices": f"{_VERTICES}, sparse, {_OWN_NORM}",
}
_K = "{} per layer that one step may use: 3 is a count, 0.1 a share."
_CRAM = {"strength": "length of the step up the gradient before the weights are compressed, in gradients."}
_FILTERS, _RANK, _WEIGHTS, _NM = ("filters",), ("rank",), ("weights",), ("nm",)


def _k(settings: Resolved) -> float:
    """Return k; an arbitrary number for a norm without k."""
    k: float | None = settings.k
    return 1 if k is None else k


# The strengths of NUC, CAT and spectral decay all take about lr·0.02 off every singular value per step.
METHODS = {
    "sgd": Method("SGD with momentum and weight decay", sgd),
    "sfw-filters": Method(
        "SFW towards few filters per layer",
        sfw(lambda s: filters(_k(s), s.radius, vertices=vertices_of(s.vertices))),
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
        docs={
            **_DOCS,
            "k": _K.format("filters"),
            "vertices": f"{_VERTICES}, sparse, orthogonal, {_OWN_NORM}",
        },
        cut_by=_FILTERS,
    ),
    "sfw-rank": Method(
        "SFW towards low rank",
        sfw(lambda s: rank(_k(s), s.radius, vertices=vertices_of(s.vertices), spatial=s.scheme == "spatial")),
        lr=None,
        own={**_ANNEALED, "turnover": 4.0, "k": 0.5, "strength": 0.06, "scheme": None},
        docs={**_DOCS, "k": _K.format("singular directions")},
        cut_by=_RANK,
    ),
    "sfw-weights": Method(
        "SFW towards few weights",
        sfw(lambda s: weights(_k(s), s.radius, vertices=vertices_of(s.vertices))),
        own={"k": 0.1, **_SFW, "vertices": "support"},
        docs={**_DOCS, "k": _K.format("weights")},
        cut_by=_WEIGHTS,
    ),
    "sfw-nm": Method(
        "SFW towards N of M consecutive input channels",
        sfw(nm_preset),
        own={"k": None, "pattern": "2:4", **_SFW, "vertices": "support"},
        docs={**_DOCS, "k": "weights of M that one step may use; without it, N."},
        cut_by=_NM,
    ),
    "k-sparse": Method(
        "SFW on k-sparse polytopes of weights",
        sfw(lambda s: weights(s.k, s.radius, vertices="sparse")),
        own={"k": 0.1, **_SFW},
        docs={**_DOCS, "k": _K.format("weights")},
        cut_by=_WEIGHTS,
    ),
    "ssl": matrix_method(
        "group lasso over filters in the loss",
        baselines.SSL,
        docs={"strength": "factor of the group lasso."},
        cut_by=_FILTERS,
    ),
    "glt": matrix_method(
        "soft threshold on the norms of filters",
        baselines.GLT,
        docs={"strength": "threshold, in units of lr·√(weights in a filter)."},
        cut_by=_FILTERS,
    ),
    "pat-filters": Method(
        "torchao's proximal optimizer, group lasso",
        pat("filters"),
        own={"strength": 2e-4},
        docs={"strength": "factor of the group lasso."},
        cut_by=_FILTERS,
    ),
    "pat-rank": Method(
        "torchao's proximal optimizer, nuclear norm",
        pat("rank"),
        own={"strength": 2e-4},
        docs={"strength": "factor of the nuclear norm."},
        cut_by=_RANK,
    ),
    "cram-filters": matrix_method(
        "gradients at pruned filters added", baselines.CrAM, passes=2, docs=_CRAM, cut_by=_FILTERS, part="filters"
    ),
    "cram-rank": matrix_method(
        "gradients at truncated weights added", baselines.CrAM, passes=2, docs=_CRAM, cut_by=_RANK, part="rank"
    ),
    "cram-weights": matrix_method(
        "gradients at pruned weights added", baselines.CrAM, passes=2, docs=_CRAM, cut_by=_WEIGHTS, part="weights"
    ),
    "nuc": matrix_method(
        "nuclear norm in the loss",
        baselines.NUC,
        docs={"strength": "factor of the nuclear norm."},
        cut_by=_RANK,
    ),
    "cat": matrix_method(
        "soft threshold on singular values",
        baselines.CAT,
        docs={"strength": "threshold, in units of lr."},
        cut_by=_RANK,
    ),
    "trp": matrix_method(
        "truncated decompositions during the training",
        baselines.TRP,
        docs={
            "energy": "share of the squared singular values that a truncation may leave out.",
            "every": "steps between two truncations.",
            "strength": "the amount by which a truncation lowers the singular values that stay, in units of lr.",
        },
        cut_by=_RANK,
    ),
    "lorita": Method("products of factors under weight decay", lorita, own={"factors": 2}, cut_by=_RANK),
    "condlr": Method(
        "fixed rank, singular values near each other",
        condlr,
        own={"k": 0.5, "condition": 2.0},
        docs={"k": "rank of the weights: 3 is a count, 0.1 a share."},
        cut_by=_RANK,
    ),
    "spectral-decay": matrix_method(
        "decay of all singular values alike",
        baselines.SpectralDecay,
        docs={"strength": "factor of the decay."},
        cut_by=_RANK,
    ),
    "q3r": matrix_method(
        "reweighted quadratic in the loss",
        baselines.Q3R,
        own={"k": 0.2},
        docs={
            "k": "rank to go to: 3 is a count, 0.1 a share.",
            "every": "steps between two decompositions.",
            "strength": "factor of the quadratic.",
        },
        cut_by=_RANK,
    ),
    # The length of their steps does not depend on the gradient, so that their lr differs from SGD's.
    "muon": matrix_method(
        "steps along polar factors",
        baselines.Muon,
        lr=0.02,
        own={"other_lr": 0.1},
        docs={"strength": "factor of the decay of the weights."},
        cut_by=_FILTERS + _RANK,
    ),
    "numuon": matrix_method(
        "steps along leading singular directions",
        baselines.NuMuon,
        lr=0.02,
        own={"k": 0.25, "k_start": 1.0, "anneal": 0.5, "other_lr": 0.1},
        docs={
            "k": _K.format("singular directions"),
            "k_start": "anneal k from here down to k; the value of k for a constant one.",
            "strength": "factor of the decay of the weights.",
        },
        cut_by=_RANK,
    ),
    "scion": matrix_method(
        "convex steps along polar factors",
        baselines.Scion,
        lr=0.005,
        own={"other_lr": 0.1},
        docs={"radius": "size of the balls, as published."},
        cut_by=_RANK,
    ),
}
