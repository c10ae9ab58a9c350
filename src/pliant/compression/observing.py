"""Every linear map of a network, and its inputs and outputs while the network runs.

A map is a linear layer, a ``Conv1D``, a convolution, one of the two thin layers of a factorised one, or a projection
of ``nn.MultiheadAttention``: the packed one has the name of the attention module, the one of the outputs that of
``out_proj``, which its module reads without calling it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.structure import ThinAttention, named_layers, thin, untransposed

Watcher = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Gets the name of a map, its layer, its input and its output."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The parameters of one linear map.

    Args:
        name: its name in the network.
        layer: the linear layer, convolution or attention module that holds it.
        weight: the weight, filters first; shares the memory of the parameter.
        bias: the bias (filters,), or None.
    """

    name: str
    layer: nn.Module
    weight: Tensor
    bias: Tensor | None


def linear_map(model: nn.Module, name: str) -> LinearMap | None:
    """Return the map of a layer or of an attention module with a packed projection; None for any other module."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.MultiheadAttention):
        weight, bias = layer._parameters.get("in_proj_weight"), layer._parameters.get("in_proj_bias")
    else:
        plain = untransposed(layer)
        weight, bias = plain._parameters.get("weight"), plain._parameters.get("bias")
    if weight is None or not weight.is_floating_point():
        return None
    return LinearMap(name, layer, weight.detach(), None if bias is None else bias.detach())


def map_names(model: nn.Module) -> list[str]:
    """Return the names of all maps, in the model's order."""
    layers = {name for name, _ in named_layers(model)}
    return [
        name for name, module in model.named_modules() if name in layers or isinstance(module, nn.MultiheadAttention)
    ]


@contextlib.contextmanager
def observing(model: nn.Module, names: Iterable[str], watch: Watcher) -> Iterator[set[str]]:
    """Return a context in which ``watch`` is called whenever one of the named maps is applied.

    The context is a set, to which the names of all maps are added whose outputs a BatchNorm reads: it absorbs any
    constant that is added to them.

    Args:
        model: a copy of the user's model: its ``nn.MultiheadAttention`` modules become ``ThinAttention``, which
            computes the same.
        names: names of maps.
        watch: called with name, layer, input and output. A packed projection is reported if its queries, keys and
            values are made from the same input.
    """
    handles: list[Any] = []
    watched: list[ThinAttention] = []
    absorbed: set[str] = set()
    latest: list[tuple[str, Tensor]] = []  # the last map that was applied, and its output
    fast_path = torch.backends.mha.get_fastpath_enabled()
    wanted = set(names)

    def report(name: str, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        (value,) = [*args, *kwargs.values()][:1]
        watch(name, layer, value, output)
        latest[:] = [(name, output)]

    def normalise(_: nn.Module, args: tuple[Any, ...]) -> None:
        absorbed.update(name for name, output in latest if args and args[0] is output)

    try:
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels call no layer
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.MultiheadAttention):
                attention = {name, f"{name}.out_proj" if name else "out_proj"} & wanted
                if attention and module._parameters.get("in_proj_weight") is not None:
                    thin(module)
                    assert isinstance(module, ThinAttention)
                    module.watch = partial(_attention, name, attention, watch)
                    watched.append(module)
            elif name in wanted:
                handles.append(module.register_forward_hook(partial(report, name), with_kwargs=True))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(normalise))
        yield absorbed
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for attentive in watched:
            attentive.watch = None


def _attention(name: str, wanted: set[str], watch: Watcher, part: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
    path = f"{name}.{part}".strip(".") if part else name
    if path in wanted:
        watch(path, layer, x, y)
