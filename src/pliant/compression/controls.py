"""What users ask of every structured compressor: multiples, layers to keep, floors, ceilings and ratios of layers.

A layer has ``total`` *parts*: channels for filter pruning, heads for head pruning, and for low rank as many directions
as its full rank. :meth:`Controlled.allowed` says how many of them it may keep, :meth:`Controlled.named` which layers
the patterns mean. How the compressors choose among the allowed numbers is their business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pliant.compression.base import A, Compressor
from pliant.errors import BadInput, shown

AT_LEAST = 0.05
"""The share of its channels or rank that every layer keeps by default."""
KEPT = "is kept by name"
"""The reason in plans for a layer that ``keep`` names."""

_RATIOS = "ratios (--layer_ratios)"  # in the shell, ratios are those of a sweep
_SHOWN = 5  # names of layers in a message
_ROUNDING = 1e-9  # 0.1 of 30 is 3, although 0.1 · 30 > 3 in floating point


@dataclass(frozen=True, kw_only=True)
class Controlled(Compressor[A]):
    """A compressor with controls over how much every layer keeps, in channels, heads or rank.

    A number of at least one part, such as 8, is a count; a number with a point is a share: 1 is one, 1.0 is all.
    Patterns are those of ``fnmatch``, for names of layers such as "head.*" or "fc". A pattern that matches no layer but
    a module with layers in it stands for these: "layer1" for "layer1.*". With a ratio of 0 nothing is removed.

    Args:
        multiple_of: every layer that is cut keeps a multiple of this many parts, which suits accelerators: 8 or 16. A
            layer with fewer parts stays whole.
        keep: patterns of layers that do not change at all; neither do the layers whose channels they produce or read.
            The ratio is of the other layers.
        at_least: the count or share of its parts that every layer keeps, whatever the ratio, and at least one. For low
            rank it is a share of the largest rank that makes the layer smaller, so a share of its parameters, too.
        at_most: the count or share of its parts that every layer keeps at most, whatever the ratio. Where both cannot
            hold, ``at_least`` does.
        ratios: pattern → share of its own channels, for low rank of its own cost, that a layer removes as nearly as
            the other controls allow, whatever the allocation says; the first match counts. The other layers share what
            is left of the ratio. It is kept as pairs.

    Raises:
        BadInput: a value is out of range, or two contradict each other.
    """

    multiple_of: int = 1
    keep: tuple[str, ...] = ()
    at_least: int | float = AT_LEAST
    at_most: int | float = 1.0
    ratios: Mapping[str, float] | Sequence[tuple[str, float]] = ()

    def check_controls(self) -> None:
        """Check the controls, and make tuples of those that came from a list, a mapping or JSON; raise BadInput."""
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            raise BadInput(f"multiple_of must be an int of at least 1, got {shown(self.multiple_of)}")
        _check_patterns(self.keep)
        _check_bound("at_least", self.at_least, 0.0)
        _check_bound("at_most", self.at_most, math.ulp(0.0))
        if type(self.at_least) is type(self.at_most) and self.at_least > self.at_most:
            raise BadInput(f"at_least={self.at_least} is more than at_most={self.at_most}: no layer can keep that")
        object.__setattr__(self, "keep", tuple(self.keep))  # the dataclass is frozen
        object.__setattr__(self, "ratios", _pairs(self.ratios))

    def plan_options(self) -> dict[str, Any]:
        """Return the options by name as plain data, without the controls that have their defaults."""
        options = super().plan_options()
        controls = {name: options.pop(name) for name in _DEFAULTS}
        controls |= {"keep": list(self.keep), "ratios": dict(self.ratios)}
        # 1 == 1.0, but they are one and all.
        return options | {name: value for name, value in controls.items() if repr(value) != _DEFAULTS[name]}

    def options_key(self) -> str:
        """Return a text that tells apart all options but the ratio, to find what was computed for them before."""
        return repr(self.at(0.0))  # not the compressor itself: at_most=1 and at_most=1.0 are equal

    def allowed(self, total: int, useful: int | None = None) -> tuple[int, ...]:
        """Return how many of ``total`` parts a layer may keep, falling; the last one is its floor.

        Args:
            total: number of parts of the dense layer.
            useful: the largest number of parts at which the layer gets smaller, of which ``at_least`` is a share.
        """
        least = (
            total
            if total < 1
            else max(1, _count(self.at_least, total if isinstance(self.at_least, int) else useful or total, math.ceil))
        )
        most = _count(self.at_most, total, math.floor)
        step = self.multiple_of
        counts = [total, *range((total - 1) // step * step, -(-least // step) * step - 1, -step)]
        return tuple([count for count in counts if count <= most] or counts[-1:])

    def named(self, layers: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Return the layers to keep, and layer → its own ratio in the order of the patterns.

        Args:
            layers: names of all layers of the model.

        Raises:
            BadInput: a pattern matches no layer.
        """
        left = {name for pattern in self.keep for name in _matching("keep", pattern, layers)}
        own: dict[str, float] = {}
        for pattern, ratio in dict(self.ratios).items():
            for name in _matching(_RATIOS, pattern, layers):
                own.setdefault(name, ratio)
        return left, own


_DEFAULTS = {
    "multiple_of": "1",
    "keep": "[]",
    "at_least": repr(AT_LEAST),
    "at_most": "1.0",
    "ratios": "{}",
}
CONTROLS = tuple(_DEFAULTS)
"""The names of the controls."""


def layer_names(model: nn.Module, others: Iterable[str] = ()) -> list[str]:
    """Return the names of all modules that have parameters of their own, and of ``others``, in the model's order."""
    known = set(others)
    return [
        name
        for name, module in model.named_modules()
        if name in known or next(module.parameters(recurse=False), None) is not None
    ]


def with_reasons(refused: tuple[tuple[str, str], ...], reasons: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (layer, reason) pairs with the given reasons in place of others for these layers, or in addition."""
    return tuple({**dict(refused), **reasons}.items())


def _matching(control: str, pattern: str, layers: Sequence[str]) -> list[str]:
    for text in (pattern, f"{pattern}.*"):
        if found := [name for name in layers if fnmatchcase(name, text)]:
            return found
    some = ", ".join(layers[:_SHOWN]) + (", ..." if len(layers) > _SHOWN else "")
    raise BadInput(f"{control}: {pattern!r} matches no layer of the model: expected a name or pattern such as {some}")


def _count(bound: int | float, total: int, rounded: Any) -> int:
    """Return a count or share of ``total`` parts as a count, not more than there are."""
    if isinstance(bound, int):
        return min(bound, total)
    slack = -_ROUNDING if rounded is math.ceil else _ROUNDING
    return int(rounded(bound * total + slack))


def _check_bound(name: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{name} must be an int (count) or a float (share), got {shown(value)}")
    if isinstance(value, int) and value < 1:
        raise BadInput(f"{name} as a count must be at least 1, got {value}")
    if isinstance(value, float) and not least <= value <= 1:
        raise BadInput(
            f"{name} as a share must lie in {'[' if not least else '('}0, 1], got {value}; 1 is one, 1.0 all"
        )


def _pairs(ratios: Any) -> tuple[tuple[str, float], ...]:
    try:
        pairs = tuple((name, share) for name, share in (ratios.items() if isinstance(ratios, Mapping) else ratios))
    except (TypeError, ValueError):
        raise BadInput(
            f"ratios maps patterns of layer names to shares, such as {{'fc': 0.5}}; got {ratios!r}"
        ) from None
    for name, share in pairs:
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not isinstance(name, str) or not number or not 0 <= share < 1:
            raise BadInput(f"{_RATIOS}: {shown(name)} has the share {shown(share)} to remove: expected 0 <= share < 1")
    first: dict[str, float] = {}
    for name, share in pairs:
        first.setdefault(name, float(share))
    return tuple(first.items())


def _check_patterns(keep: Any) -> None:
    if not isinstance(keep, tuple | list) or not all(isinstance(pattern, str) for pattern in keep):
        raise BadInput(f"keep is a tuple of patterns of layer names, such as ('fc', 'head.*'); got {shown(keep)}")
