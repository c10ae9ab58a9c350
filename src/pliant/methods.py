"""How a network is trained: each ``--method`` as an optimizer over the model's parameters.

The SFW methods put one structured ball on every convolution and linear weight but the classifier; biases,
normalisations and the classifier train without a ball, with the same weight decay as under SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pliant import sfw
from pliant.constraints import Preset, constrain, filters, layout_of, rank, resolve_k, semi_structured, weights
from pliant.errors import BadInput, unknown
from pliant.sfw import SFW


@dataclass(frozen=True)
class Method:
    """A method and the settings it takes where none are given.

    Args:
        summary: what it is.
        lr: learning rate.
        k: per vertex, None where a method has none or takes it from the pattern.
        radius: relative to the initialisation, None without a ball.
    """

    summary: str
    lr: float
    k: int | float | None = None
    radius: float | None = None


# Chosen to train every shipped network; smaller radii make a network with BatchNorm more compressible still, but
# starve layers without one. Tune radius first, then k, on the validation accuracy after compression.
METHODS = {
    "sgd": Method("SGD with momentum and weight decay", lr=0.1),
    "sfw-filters": Method("SFW towards few filters per layer", lr=0.1, k=0.3, radius=10.0),
    "sfw-rank": Method("SFW towards low rank", lr=0.1, k=0.1, radius=10.0),
    "sfw-weights": Method("SFW towards few weights", lr=0.1, k=0.1, radius=10.0),
    "sfw-nm": Method("SFW towards N of M consecutive input channels", lr=0.1, radius=10.0),
}
RESCALES = tuple("none" if rescale is None else rescale for rescale in sfw.RESCALES)


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with lr, k and radius of the method where they are None; BadInput for an unknown one."""
    if settings["method"] not in METHODS:
        raise unknown("method", settings["method"], METHODS)
    method = METHODS[settings["method"]]
    defaults = {"lr": method.lr, "k": method.k, "radius": method.radius}
    return settings | {name: value for name, value in defaults.items() if settings[name] is None}


def make_optimizer(
    model: nn.Module,
    method: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    k: int | float | None,
    radius: float | None,
    rescale: str,
    pattern: str,
) -> Optimizer:
    """Return the optimizer of a method.

    Args:
        model: its weights are not touched.
        method: one of :data:`METHODS`.
        lr: step size.
        momentum: of SGD and SFW.
        weight_decay: of all parameters (SGD), or of those without a ball (SFW).
        k: filters, singular directions or weights per vertex; None for the N of an N:M ``pattern``.
        radius: relative to the initialisation, see :class:`~pliant.constraints.Preset`; None under SGD.
        rescale: as for :class:`~pliant.SFW`, with "none" for None.
        pattern: "N:M", for sfw-nm.

    Raises:
        BadInput: an unknown name, or a value out of range.
    """
    if rescale not in RESCALES:
        raise unknown("rescale", rescale, RESCALES)
    if method == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    groups = constrain(model, rules(model, method, k=k, radius=radius, pattern=pattern), default=None)
    options: dict[str, Any] = {"weight_decay": weight_decay, "rescale": None if rescale == "none" else rescale}
    return SFW(groups, lr=lr, momentum=momentum, check_finite=True, **options)


def rules(model: nn.Module, method: str, *, k: int | float | None, radius: float | None, pattern: str) -> list[Any]:
    """Return the rules that an SFW method gives to :func:`~pliant.constrain`."""
    n, m = parse_pattern(pattern)
    if radius is None or (k is None and method != "sfw-nm"):
        raise BadInput(f"{method} needs k and a radius, got k={k} and radius={radius}")
    presets = {"sfw-filters": filters, "sfw-rank": rank, "sfw-weights": weights}
    preset: Preset
    if k is None or method == "sfw-nm":
        preset = semi_structured(n if k is None else resolve_k(k, m), m, radius)
    else:
        preset = presets[method](k, radius)
    # The dimension of the input channels of every weight that can be constrained.
    inputs = {
        f"{name}.weight": 1 - layout_of(module).dim
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    inputs.pop(f"{_classifier(model)}.weight", None)

    def constrained(name: str, parameter: Tensor) -> bool:
        # Hardware reads N:M along whole blocks of input channels; the first layer's 1 or 3 do not fill one.
        return name in inputs and (method != "sfw-nm" or parameter.shape[inputs[name]] % m == 0)

    if not any(constrained(name, p) for name, p in model.named_parameters()):
        raise BadInput(f"{method} finds no weight to constrain in this model; train it with --method sgd")
    return [(constrained, preset)]


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) of a pattern such as "2:4"; raises BadInput for anything else."""
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m)):
        raise BadInput(f"a pattern is N:M with 1 <= N <= M, such as 2:4; got {pattern!r}")
    return int(n), int(m)


def _classifier(model: nn.Module) -> str | None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None
