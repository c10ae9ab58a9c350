"""Networks by name: those of the experiments, ``MODELS``, and ``package.module:callable`` for one of one's own."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import nn

from pliant.errors import BadInput, unknown
from pliant.experiments.networks import ImageShape, lenet5, mlp, resnet, resnet50, vgg16, vit_tiny, wide_resnet

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
        name: a key of ``MODELS``, or ``"package.module:callable"`` for a network of one's own. The callable
            is looked for in the current directory first, and gets those of ``num_classes``, ``image_shape``
            and ``width`` that its signature accepts.
        num_classes: number of outputs (logits), at least 2.
        image_shape: (channels, height, width) of one image; height and width in pixels.
        width: factor on all channel counts, rounded, at least 1 channel; in ``vit_tiny`` on the heads.

    Returns:
        A module in training mode that maps images (B, C, H, W) to logits (B, num_classes).

    Raises:
        BadInput: an argument is out of range, the image is too small, the name is unknown, or the network
            of one's own cannot be imported or built (its exception is chained).
    """
    if num_classes < 2:
        raise BadInput(f"num_classes must be at least 2, got {num_classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise BadInput(f"image_shape must be (channels, height, width), each at least 1, got {image_shape}")
    if not (width > 0 and math.isfinite(width)):
        raise BadInput(f"width must be a positive factor, got {width}")
    if ":" in name:
        return _build_own(name, num_classes=num_classes, image_shape=image_shape, width=width)
    if name not in MODELS:
        raise unknown("model", name, MODELS)
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


def _build_own(name: str, *, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not (module_name and all(part.isidentifier() for part in [*module_name.split("."), attribute])):
        raise BadInput(f"model {name!r}: expected package.module:callable, such as my_nets:small_net")
    with _current_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise BadInput(f"model {name!r}: import failed with {_one_line(error)}") from error
        constructor = getattr(module, attribute, None)
        if not callable(constructor):
            raise BadInput(f"model {name!r}: module {module_name} has no callable named {attribute!r}")
        offered = {"num_classes": num_classes, "image_shape": image_shape, "width": width}
        try:
            accepted = _accepted(constructor, offered)
        except ValueError as error:
            raise BadInput(f"model {name!r}: {attribute} has no signature, wrap it in a def") from error
        if width != 1 and "width" not in accepted:
            raise BadInput(f"model {name!r} takes no argument 'width', got width {width}: leave it at 1")
        try:
            model = constructor(**accepted)
        except Exception as error:
            raise BadInput(f"model {name!r}: {attribute} raised {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"model {name!r}: expected a torch.nn.Module from it, got a {type(model).__name__}")
    return model


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Search the current directory first, as ``python -m`` does; the installed command alone does not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _accepted(constructor: Callable[..., object], offered: dict[str, object]) -> dict[str, object]:
    parameters = inspect.signature(constructor).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in offered.items() if key in by_keyword}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
