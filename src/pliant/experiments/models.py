"""Networks by name: those of the experiments, ``MODELS``, and those of other packages.

A package offers ``small = "my_package.nets:small"`` under ``[project.entry-points."pliant.models"]``. A network of a
package that is not installed is named ``my_package.nets:small``. The object is a callable that returns a network.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from pliant.errors import BadInput, one_line, shown
from pliant.experiments.networks import ImageShape, lenet5, mlp, resnet, resnet50, vgg16, vit_tiny, wide_resnet
from pliant.extensions import current_directory_importable, described, find, import_named

MIN_SIDE = 8  # pixels: scikit-learn's digits, the smallest images that the networks here are meant for

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet5": lenet5,
    "resnet8": partial(resnet, (16, 32, 64), 1),
    "resnet20": partial(resnet, (16, 32, 64), 3),
    "resnet56": partial(resnet, (16, 32, 64), 9),
    "resnet18": partial(resnet, (64, 128, 256, 512), 2),
    "resnet50": resnet50,
    "vgg16": vgg16,
    "wrn28_10": partial(wide_resnet, 28, 10),
    "vit_tiny": vit_tiny,
}


def build_model(name: str, *, num_classes: int, image_shape: ImageShape, width: float = 1.0) -> nn.Module:
    """Build the network ``name`` with freshly drawn weights, on the default device.

    Args:
        name: a key of ``MODELS``, the name that an installed package gives its network, or
            ``"package.module:callable"``. A callable of another package is searched in the current directory first, and
            gets those of ``num_classes``, ``image_shape`` and ``width`` that its signature accepts.
        num_classes: number of outputs (logits), at least 2.
        image_shape: (channels, height, width) of one image; height and width in pixels.
        width: factor on all channel counts, rounded, at least 1 channel; in ``vit_tiny`` on the number of heads.

    Returns:
        A module in training mode that maps images (B, C, H, W) to logits (B, num_classes).

    Raises:
        BadInput: an argument is out of range, the image is too small, the name is unknown, or the network of another
            package cannot be imported or built (its exception is chained).
    """
    if num_classes < 2:
        raise BadInput(f"num_classes must be at least 2, got {num_classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise BadInput(f"image_shape must be (channels, height, width), each at least 1, got {image_shape}")
    if not (width > 0 and math.isfinite(width)):
        raise BadInput(f"width must be a positive factor, got {width}")
    if name in MODELS:
        return _build(name, num_classes=num_classes, image_shape=image_shape, width=width)
    return _build_outside(name, num_classes=num_classes, image_shape=image_shape, width=width)


def _build(name: str, *, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    if min(image_shape[1:]) < MIN_SIDE:
        raise BadInput(
            f"model {name!r} needs images of at least {MIN_SIDE}×{MIN_SIDE} pixels, "
            f"got {image_shape[1]}×{image_shape[2]}: resize them by image_size"
        )
    try:
        return MODELS[name](num_classes=num_classes, image_shape=image_shape, width=width)
    except (RuntimeError, TypeError, OverflowError) as error:  # what torch raises for sizes beyond memory and integers
        size = f"at width {width:g} for images of shape {tuple(image_shape)}"
        raise BadInput(f"model {name!r} cannot be built {size}: {str(error).splitlines()[0]}") from error


# --- networks of other packages ---------------------------------------------------------------------------------------


def _build_outside(name: str, *, width: float, **others: Any) -> nn.Module:
    constructor, origin, attribute = _constructor(name), described("model", name), name.rpartition(":")[2]
    offered = {**others, "width": width}
    try:
        accepted = _accepted(constructor, offered)
    except ValueError as error:
        raise BadInput(f"{origin}: {attribute} has no signature, wrap it in a def") from error
    if width != 1 and "width" not in accepted:
        raise BadInput(f"{origin} takes no argument 'width', got width {width}: leave it at 1")
    try:
        with current_directory_importable():
            model = constructor(**accepted)
    except (Exception, SystemExit) as error:  # other packages may raise anything
        raise BadInput(f"{origin}: {attribute} raised {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"{origin}: expected a torch.nn.Module from it, got a {type(model).__name__}")
    return model


def _constructor(name: str) -> Callable[..., object]:
    if ":" not in name:
        return find("model", name, MODELS, _fault)
    constructor = import_named("model", name, "callable", "my_nets:small_net")
    if not callable(constructor):
        module, _, attribute = name.partition(":")
        raise BadInput(f"model {name!r}: module {module} has no callable named {attribute!r}")
    return constructor  # type: ignore[no-any-return]


def _fault(thing: object) -> str | None:
    return None if callable(thing) else f"expected a callable that returns a torch.nn.Module, got {shown(thing)}"


def _accepted(constructor: Callable[..., object], offered: dict[str, object]) -> dict[str, object]:
    parameters = inspect.signature(constructor).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in offered.items() if key in by_keyword}
