"""Packages of others whose networks are cut here and in the tests."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from typing import Any

_TORCHVISION = ("", "datasets", "io", "models", "ops", "ops.misc", "transforms", "transforms.functional", "utils")


class _Named(type):
    """A class that has every attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(types.ModuleType):
    """A module that has every class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


def timm() -> Any:
    """Return timm; raise ImportError without it.

    torchvision's wheels do not load beside a CPU build of torch, and timm's networks need no more of it than its names:
    modules of empty classes stand in for it while timm is imported.
    """
    if "timm" in sys.modules:
        return sys.modules["timm"]
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}
    stands = {}
    for part in _TORCHVISION:
        name = f"torchvision.{part}".rstrip(".")
        stands[name] = module = _Anything(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(stands[parent], own, module)
    sys.modules.update(stands)
    try:
        return importlib.import_module("timm")
    finally:
        for name in stands:
            del sys.modules[name]
        sys.modules.update(hidden)
