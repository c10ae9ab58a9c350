"""Every linear map of a network, and its inputs and outputs while the network runs.

A map is a linear layer, a ``Conv1D``, a convolution, one of the two thin layers of a factorised one, or a projection
of ``nn.MultiheadAttention``: the packed one has the name of the attention module, the one of the outputs that of
``out_proj``, which ``ThinAttention`` calls.
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
from torch.nn.modules.conv import _ConvNd

from pliant.structure import ThinAttention, can_be_thin, named_layers, own_forward, thin, untransposed

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


def applies_plainly(layer: nn.Module) -> bool:
    """Return whether a layer's outputs are its map of its inputs; a class with a forward of its own may do more."""
    return not (isinstance(layer, (nn.Linear, _ConvNd)) and own_forward(layer))


@contextlib.contextmanager
def observing(model: nn.Module, names: Iterable[str], watch: Watcher) -> Iterator[dict[str, str]]:
    """Return a context in which ``watch`` is called whenever one of the named maps is applied.

    The context is a dict: the name of each map whose outputs go to a BatchNorm, as they are and in every call → the
    name of that BatchNorm, which absorbs any constant that is added to them. It is complete at the end of the context.

    Args:
        model: a copy of the user's model: in the context its ``nn.MultiheadAttention`` modules are ``ThinAttention``,
            which computes the same.
        names: names of maps.
        watch: called with name, layer, input and output. A packed projection is reported if its queries, keys and
            values are made from the same input. Attention that ``ThinAttention`` cannot compute is not reported.
    """
    absorbed: dict[str, str] = {}
    bare: set[str] = set()  # maps with an output that no BatchNorm reads, or another one than before
    latest: list[tuple[str, Tensor, int]] = []  # the last map that was applied, its output, and how often it changed
    wanted = set(names)

    def report(name: str, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        (value,) = [*args, *kwargs.values()][:1]
        watch(name, layer, value, output)
        settle(None)
        latest[:] = [(name, output, output._version)]

    def settle(read: Tensor | None, norm: str = "") -> None:
        for name, output, version in latest:
            if read is not output or output._version != version or absorbed.setdefault(name, norm) != norm:
                bare.add(name)
        latest.clear()

    def normalise(norm: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        settle(args[0] if args else None, norm)

    with contextlib.ExitStack() as stack:
        stack.enter_context(unfused())
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.MultiheadAttention):
                attention = {name, f"{name}.out_proj" if name else "out_proj"} & wanted
                if attention and can_be_thin(module):
                    kind, same = type(module), module._qkv_same_embed_dim
                    stack.callback(setattr, module, "__class__", kind)
                    stack.callback(setattr, module, "_qkv_same_embed_dim", same)
                    thin(module)
                    assert isinstance(module, ThinAttention)
                    if name in wanted:
                        module.watch = partial(watch, name)
                        stack.callback(delattr, module, "watch")
            elif name in wanted:
                handle = module.register_forward_hook(partial(report, name), with_kwargs=True)
                stack.callback(handle.remove)
            elif isinstance(module, _BatchNorm) and not own_forward(module):
                stack.callback(module.register_forward_pre_hook(partial(normalise, name)).remove)
        yield absorbed
        settle(None)
        for name in bare:
            absorbed.pop(name, None)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Return a context in which attention is computed layer by layer, not by fused kernels, which call no layer.

    With padding masks these also give zeros where the layers give numbers that nobody reads.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
