"""Coupled channels: everything that must leave a network together with a filter or a head, verified numerically.

Removing output channel ``c`` of a convolution also removes its bias, the scale, shift and statistics of the
BatchNorm behind it, the same channel of every convolution that a residual connection adds to it (the
*producers*), and the input columns of every layer that reads it (the *consumers*). A neuron of a gated MLP has
two producers; an attention head has the rows of its queries, keys and values as producers, and the columns of
the output projection as consumer. A :class:`~pliant.structure.ChannelGroup` describes this, as plain data, for all
channels, neurons or heads of one set of layers::

    coupled_channels(model, example_inputs) -> Structure(groups, refused)

The source of the candidates (``channels`` reads torch-pruning's graph, ``heads`` looks for attention modules) need not
be trusted, because every group is tried on a copy of the model in float64 with random weights and BatchNorm statistics.
Without half of the channels, the small network must equal its *masked twin*, the network with dense shapes in which
only the consumers' input columns are zero. (Zeroing filters would not give a twin: the BatchNorm shift behind them
still flows.) Layers of groups that fail are refused by name with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pliant.calling import Example, Inputs, as_inputs, count_calls, map_tensors, run, tensors_of
from pliant.errors import first_line
from pliant.structure.attention import is_conv1d
from pliant.structure.channel_groups import ChannelGroup, Structure
from pliant.structure.channels import channel_candidates
from pliant.structure.heads import Site, attention_sites
from pliant.structure.layers import AxisName, complement, keep_channels, weighted_layers, zero_channels
from pliant.structure.soundness import largest_sound

_TOLERANCE = 1e-8  # relative; float64 networks of a hundred layers agree to about 1e-13


def coupled_channels(model: nn.Module, example_inputs: Example) -> Structure:
    """Find and verify the groups of channels, neurons and heads that can be removed from ``model``.

    The model, its gradients and the random number generators do not change. If the model cannot be traced, the only
    groups are heads, and each other layer is refused with the reason.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments that the model takes in eval mode.

    Returns:
        The verified groups, and (layer, reason) for all other layers.

    Raises:
        BadInput: the model cannot be called with the example.
    """
    inputs = as_inputs(example_inputs)
    probe = copy.deepcopy(model).eval()
    calls = count_calls(probe, inputs)
    inputs = _first_two(probe, inputs)
    sites, headless = attention_sites(probe, calls)
    candidates, reasons = channel_candidates(probe, inputs, calls)
    _randomise(probe)
    noise = _random_like(inputs)
    heads, stuck = _sound_heads(probe, sites, noise)
    places = {place for group in heads for place in _places(group)}
    apart = [group for group in candidates if not places & _places(group)]
    channels, failed = largest_sound(apart, lambda groups: _fault(probe, [*heads, *groups], noise))
    accepted = [*channels, *heads]
    reasons |= {name: "is not reached through its forward" for name, m in weighted_layers(probe) if not calls[m]}
    failed += [(group, "shares its channels with attention heads") for group in candidates if group not in apart]
    reasons |= {slot.module: why for group, why in failed for slot in group.producers}
    reasons |= headless | stuck
    removable = {slot.module for group in accepted for slot in group.producers}
    refused = ((name, reasons[name]) for name, _ in weighted_layers(probe) if name not in removable)
    return Structure(tuple(accepted), tuple(refused))


def positions(groups: Sequence[ChannelGroup], channels: Sequence[Tensor]) -> dict[tuple[str, AxisName], Tensor]:
    """Return the positions on the axes of layers that belong to some channels of each group.

    Args:
        groups: the groups.
        channels: for each group, int64 (n,), indices of channels.

    Returns:
        (layer, axis) → int64 (m,), the positions.
    """
    parts: dict[tuple[str, AxisName], list[Tensor]] = {}
    for group, chosen in zip(groups, channels, strict=True):
        for slot in group.slots:
            parts.setdefault((slot.module, slot.axis), []).append(slot.indices[chosen].flatten())
    return {place: torch.cat(indices) for place, indices in parts.items()}


def _places(group: ChannelGroup) -> set[tuple[str, AxisName]]:
    return {(slot.module, slot.axis) for slot in group.slots}


# --- verification -----------------------------------------------------------------------------------------------------


def _sound_heads(model: nn.Module, sites: Sequence[Site], inputs: Inputs) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the first sound alternative of each site; and layer → reason for sites without one."""
    sound: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    open_sites = list(sites)
    attempt = 0

    def fault(groups: Sequence[ChannelGroup]) -> str | None:
        return _fault(model, [*sound, *groups], inputs)

    while open_sites:
        offers = {site.alternatives[attempt]: site for site in open_sites}
        accepted, failed = largest_sound(list(offers), fault)
        sound += accepted
        open_sites = []
        for group, why in failed:
            site = offers[group]
            for layer in site.layers:  # the reason of the first alternative, the most likely one
                reasons.setdefault(layer, f"its heads cannot leave: {why}")
            if attempt + 1 < len(site.alternatives):
                open_sites.append(site)
        attempt += 1
    return sound, reasons


def _first_two(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the first two samples if the model accepts them: two images prove as much as two hundred."""
    tensors = tensors_of(inputs)
    if any(x.dim() == 0 or len(x) <= 2 or len(x) != len(tensors[0]) for x in tensors):
        return inputs
    few = map_tensors(lambda x: x[:2], inputs)
    try:
        run(model, few)
    except Exception:  # dim 0 is not a batch, or its size is fixed; the whole example is known to run
        return inputs
    return few


def _random_like(inputs: Inputs) -> Inputs:
    """Return float64 noise for every floating-point input; integers and inputs named as masks keep their values."""

    def noise(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        generator = torch.Generator().manual_seed(1)
        return torch.empty(x.shape, dtype=torch.float64).normal_(generator=generator).to(x.device)

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    if isinstance(inputs, tuple):
        return map_tensors(noise, inputs)
    return {name: map_tensors(double if "mask" in name else noise, value) for name, value in inputs.items()}


def _randomise(model: nn.Module) -> None:
    """Convert ``model`` to float64 and redraw the weights of its known layers, in place.

    Trained weights may be sparse, and zeros would hide a mistake.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).normal_(0.0, std, generator=generator))

    def positive(t: Tensor) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).uniform_(0.5, 1.5, generator=generator))

    model.double()
    with torch.no_grad():
        for module in model.modules():
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module):
                if weight is not None:  # None if a parametrisation computes it
                    fan_in = weight.numel() // max(1, len(weight.T if is_conv1d(module) else weight))
                    normal(weight, (2.0 / max(1, fan_in)) ** 0.5)
                if bias is not None:
                    normal(bias, 0.1)
            elif isinstance(module, nn.MultiheadAttention):
                packed = module._parameters.get("in_proj_weight")
                if packed is not None:
                    normal(packed, packed.shape[1] ** -0.5)
                if module.in_proj_bias is not None:
                    normal(module.in_proj_bias, 0.1)
            elif isinstance(module, _NormBase):
                for scale in (weight, module.running_var):
                    if scale is not None:
                        positive(scale)
                for shift in (bias, module.running_mean):
                    if shift is not None:
                        normal(shift, 0.5)


def _fault(model: nn.Module, groups: Sequence[ChannelGroup], inputs: Inputs) -> str | None:
    """Remove half of the channels of ``groups`` from a copy; return None if it equals the masked twin, else why not."""
    generator = torch.Generator().manual_seed(2)
    halves = [torch.randperm(group.channels, generator=generator)[: group.channels // 2] for group in groups]
    removed = positions(groups, halves)
    twin = copy.deepcopy(model)
    for (name, axis), gone in removed.items():
        if axis == "inputs":
            zero_channels(twin.get_submodule(name), axis, gone)
    try:
        expected = run(twin, inputs)
    except Exception as error:  # a user's forward may raise anything
        return f"cannot be verified, the network does not run in float64: {first_line(error)}"
    try:
        for (name, axis), gone in removed.items():
            module = twin.get_submodule(name)
            keep_channels(module, axis, complement(module, axis, gone))
        got = run(twin, inputs)
    except Exception as error:  # see above
        return f"the network cannot run without some of its channels: {first_line(error)}"
    return _difference(got, expected)


def _difference(got: list[Tensor], expected: list[Tensor]) -> str | None:
    if [x.shape for x in got] != [x.shape for x in expected]:
        return "its channels are outputs of the model"
    if not any(x.is_floating_point() for x in expected):
        return "the model has no floating-point output to check the removal on"
    for x, y in zip(got, expected, strict=True):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return "without it an output of whole numbers differs from that of its masked twin"
        elif y.numel():
            error, scale = (x - y).abs().max(), y.abs().max()
            if not error <= _TOLERANCE * scale:  # written so that NaN fails
                return f"without it the network differs from its masked twin (by {error / scale:.0e})"
    return None
