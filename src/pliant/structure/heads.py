"""Attention heads as candidates for removal, none of which is trusted until it is verified.

A head of an attention module consists of the rows of its queries, keys and values, and of the columns of the output
projection that read it. Which rows these are depends on the layout of a packed projection, and the output projection
need not lie in the module; if the model does not show it, there are several alternatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pliant.structure.attention import Projections, linear_width, projections
from pliant.structure.channel_groups import ChannelGroup, Slot
from pliant.structure.layers import AxisName, axis_length, obstacle, tensors_along, tied_parameters

_MOST = 3  # output projections to try; the right one has always been the first or second


@dataclass(frozen=True, eq=False)
class Site:
    """An attention module that may lose heads.

    Args:
        module: name of the attention module.
        layers: names of the layers that produce its heads.
        alternatives: the groups that the heads may form, the likeliest first.
    """

    module: str
    layers: tuple[str, ...]
    alternatives: tuple[ChannelGroup, ...]


def attention_sites(model: nn.Module, calls: Counter[nn.Module]) -> tuple[list[Site], dict[str, str]]:
    """Return the attention modules that may lose heads; and layer → reason for the projections of the others.

    Args:
        model: any module; not changed.
        calls: the result of :func:`~pliant.calling.count_calls` on this model.
    """
    tied = tied_parameters(model)
    sites: list[Site] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        attention = projections(module)
        if attention is None:
            if isinstance(module, nn.MultiheadAttention):
                reasons[name] = "keeps its projections apart or adds keys of its own"
            continue
        layers = tuple(dict.fromkeys(_join(name, child) for child in (attention.query, attention.key, attention.value)))
        reason = _unfit(model, layers, tied, calls) or ("has a single head" if attention.heads == 1 else None)
        alternatives: list[ChannelGroup] = []
        if reason is None:
            outputs = list(_outputs(model, name, attention, tied))[:_MOST]
            alternatives = [group for output in outputs for group in _groups(model, name, attention, output)]
        if alternatives:
            sites.append(Site(name, layers, tuple(alternatives)))
        else:
            reasons.update(dict.fromkeys(layers, reason or "the output projection of its heads is not known"))
    return sites, reasons


def with_seen_heads(sites: Sequence[Site], seen: Sequence[ChannelGroup]) -> list[Site]:
    """Return sites in which the heads that a forward has shown come before those that are only guessed."""
    found: list[Site] = []
    rest = list(sites)
    for group in seen:
        layers = tuple(slot.module for slot in group.producers if slot.tensors)
        own = [site for site in rest if set(site.layers) & set(layers)]
        rest = [site for site in rest if site not in own]
        guesses = own[0].alternatives if len(own) == 1 else ()
        found.append(Site(group.name, layers, (group, *guesses)))
    return [*found, *rest]


def projection_layers(model: nn.Module) -> list[str]:
    """Return the names of all layers that produce the heads of an attention module."""
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        attention = projections(module)
        if attention is not None:
            names |= dict.fromkeys(_join(name, child) for child in (attention.query, attention.key, attention.value))
        elif isinstance(module, nn.MultiheadAttention):
            names[name] = None
    return list(names)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _unfit(model: nn.Module, layers: tuple[str, ...], tied: frozenset[int], calls: Counter[nn.Module]) -> str | None:
    """Return why heads cannot be removed from the layers, or None."""
    for name in layers:
        module = model.get_submodule(name)
        packed = isinstance(module, nn.MultiheadAttention)
        reason = packed_obstacle(module, tied) if packed else obstacle(module, tied)
        if reason is None and not calls[module]:
            reason = "is not called on the example"
        if reason is not None:
            return reason if len(layers) == 1 else f"{name!r} {reason}"
    return None


def packed_obstacle(module: nn.Module, tied: frozenset[int]) -> str | None:
    """Return why the packed weight of attention may not be changed, or None; cutting it also replaces the forward."""
    if not type(module).__module__.startswith(("torch.nn", "pliant.")) or "forward" in vars(module):
        return f"is a {type(module).__name__} with a forward of its own"
    if any(id(p) in tied for p in module.parameters(recurse=False)):
        return "shares a parameter with another layer"
    return None


def _outputs(model: nn.Module, name: str, attention: Projections, tied: frozenset[int]) -> Iterator[str]:
    """Yield linear layers as wide as the heads together, those in the attention module first."""
    parent = name.rpartition(".")[0]
    value = model.get_submodule(_join(name, attention.value))
    width = attention.heads * attention.readers * attention.size
    if not attention.packed:
        width = axis_length(value, "outputs") * attention.readers
    seen = {_join(name, child) for child in (attention.query, attention.key, attention.value)}
    for place in (name, parent) if name else (name,):
        for child, module in model.get_submodule(place).named_modules():
            path = _join(place, child)
            if linear_width(module) is None or path in seen:
                continue
            seen.add(path)
            if axis_length(module, "inputs") == width and obstacle(module, tied) is None:
                yield path


def _groups(model: nn.Module, name: str, attention: Projections, output: str) -> list[ChannelGroup]:
    """Return the group of heads that ``output`` reads, one for each possible layout of packed rows."""
    heads = attention.heads
    consumer = _slot(model, output, "inputs", _runs(heads, axis_length(model.get_submodule(output), "inputs")))
    # The module comes first: it is recognised by its projections, so it must be updated before they are cut.
    counter = () if attention.query == "" else (_slot(model, name, "outputs", _runs(heads, heads)),)
    layers = [_join(name, child) for child in dict.fromkeys((attention.query, attention.key, attention.value))]
    if not attention.packed:
        layouts = [[_runs(heads, axis_length(model.get_submodule(layer), "outputs")) for layer in layers]]
    else:
        queries, keys = heads * attention.readers * attention.size, heads * attention.size
        parts = [_runs(heads, queries), queries + _runs(heads, keys), queries + keys + _runs(heads, keys)]
        stacked, interleaved = torch.cat(parts, 1), _runs(heads, queries + 2 * keys)
        layouts = [[stacked], [interleaved]] if attention.query else [[stacked]]
    return [
        ChannelGroup(
            heads,
            (*counter, *(_slot(model, layer, "outputs", rows) for layer, rows in zip(layers, layout, strict=True))),
            (consumer,),
            "heads",
        )
        for layout in layouts
    ]


def _runs(heads: int, length: int) -> Tensor:
    """Return the positions 0 … length − 1, split into one row for each head: (heads, length/heads)."""
    return torch.arange(length).view(heads, -1)


def _slot(model: nn.Module, name: str, axis: AxisName, indices: Tensor) -> Slot:
    return Slot(name, axis, tensors_along(model.get_submodule(name), name, axis), indices)
