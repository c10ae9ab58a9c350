"""Coupled channels: everything that must leave a network together with a filter or a head, verified numerically.

Removing output channel ``c`` of a convolution also removes its bias, the scale, shift and statistics of the
BatchNorm behind it, the same channel of every convolution that a residual connection adds to it (the
*producers*), and the input columns of every layer that reads it (the *consumers*). A neuron of a gated MLP has
two producers; an attention head has the rows of its queries, keys and values as producers, and the columns of
the output projection as consumer. A :class:`~pliant.structure.ChannelGroup` describes this, as plain data, for all
channels, neurons or heads of one set of layers::

    coupled_channels(model, example_inputs) -> Structure(groups, refused)

The source of the candidates (``channels`` reads the flow of labels, ``heads`` looks for attention modules,
``free_tensors`` adds what else lies along the channels) need not be trusted, because every group is tried on a copy of
the model in float64 with random weights and BatchNorm statistics.
Without half of the channels, the small network must equal its *masked twin*, the network with dense shapes in which
only the consumers' input columns are zero, in eval mode and in training mode. (Zeroing filters would not give a twin:
the BatchNorm shift behind them still flows.) Layers of groups that fail are refused by name with the reason. Then other
numbers of channels are tried: a group may have to keep a multiple of some number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from pliant.calling import (
    Example,
    Inputs,
    as_inputs,
    copied,
    count_calls,
    duplicate,
    map_tensors,
    run,
    tensors_of,
)
from pliant.structure.channel_groups import ChannelGroup, Structure
from pliant.structure.channels import channel_candidates
from pliant.structure.counts import first_count, kept_fault, second_count, with_counts
from pliant.structure.free_tensors import with_counts_held, with_free_tensors
from pliant.structure.heads import Site, attention_sites, with_seen_heads
from pliant.structure.layers import AxisName, axes, axis_length, weighted_layers
from pliant.structure.proof import Proof
from pliant.structure.reasons import advised
from pliant.structure.soundness import largest_sound


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
    probe = copied(model).eval()
    calls = _calls(probe, inputs)
    inputs = _first_two(probe, inputs)
    sites, headless = attention_sites(probe, calls)
    proof = Proof(probe, inputs)
    training = _as_given(proof.training_only, inputs)
    candidates, reasons = channel_candidates(probe, inputs, training)
    sites = with_seen_heads(sites, [group for group in candidates if group.kind == "heads"])
    candidates = [group for group in candidates if group.kind != "heads"]
    heads, stuck = _sound_heads(proof, sites)
    places = {place for group in heads for place in _places(group)}
    candidates = [with_free_tensors(proof, group) for group in candidates]
    apart = [group for group in candidates if not places & _places(group)]
    sound, failed = _sound_channels(proof, apart, {group: first_count(group) for group in heads})
    for split in ("outer", "inner") if proof.problem is None else ():
        offers = _larger(failed, channel_candidates(probe, inputs, training, split)[0]) if failed else []
        if offers:
            sound, _ = _sound_channels(proof, offers, sound)
            good = {place for group in sound for place in _places(group)}
            failed = [(group, why) for group, why in failed if not good & _places(group)]
    for group, why in list(failed) if proof.problem is None else ():
        for offer in with_counts_held(proof.model, group) if "cannot run" in why else ():
            sound, still = _sound_channels(proof, [offer], sound)
            if not still:
                failed.remove((group, why))
                break
    trained, unfit = largest_sound(list(sound), lambda groups: _fault(proof, {g: sound[g] for g in groups}, True))
    if unfit and not proof.repeats():
        trained, unfit = list(sound), []
    readable, hidden = _unread(proof, trained)
    failed += [*unfit, *hidden]
    accepted = with_counts({g: sound[g] for g in readable}, lambda kept: _fault(proof, kept, False))
    failed += [(group, "shares its channels with attention heads") for group in candidates if group not in apart]
    reasons |= {slot.module: _explained(group, why) for group, why in failed for slot in group.producers}
    reasons |= headless | stuck
    removable = {slot.module for group in accepted for slot in group.producers}
    refused = ((name, advised(reasons[name])) for name, _ in weighted_layers(probe) if name not in removable)
    return Structure(tuple(accepted), tuple(refused), proof)


def _calls(model: nn.Module, inputs: Inputs) -> Counter[nn.Module]:
    """Count the calls of each module in a copy, whose modules may keep what they compute."""
    twin = duplicate(model)
    calls = count_calls(twin, inputs)
    return Counter(dict(zip(model.modules(), (calls[module] for module in twin.modules()), strict=True)))


def _explained(group: ChannelGroup, why: str) -> str:
    """Return why a group fails, with the module that may mix its channels if it holds tensors along them."""
    if not group.others or "masked twin" not in why:
        return why
    slot = group.others[0]
    return (
        f"{why}: {slot.module or 'the network'!r}, which holds {slot.tensors[0][0]!r} along them, may mix its channels"
    )


def _as_given(training: Sequence[tuple[Inputs, int]], inputs: Inputs) -> list[tuple[Inputs, int]]:
    """Return inputs for training mode in the types of the given ones."""
    types = [x.dtype for x in tensors_of(inputs)]

    def typed(data: Inputs) -> Inputs:
        known = iter(types)
        return map_tensors(lambda x: x.to(next(known)), data)

    return [(typed(data), seed) for data, seed in training]


def _places(group: ChannelGroup) -> set[tuple[str, AxisName]]:
    return {(slot.module, slot.axis) for slot in group.slots}


# --- verification -----------------------------------------------------------------------------------------------------


def _fault(proof: Proof, kept: Mapping[ChannelGroup, int], training: bool) -> str | None:
    """Return why groups cannot keep just so many channels in one of the modes, None if they can."""
    return kept_fault(proof, kept, training=training)


def _larger(failed: Sequence[tuple[ChannelGroup, str]], groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups that couple channels of groups that failed to each other."""
    known = {group.name: group for group, _ in failed}
    return [group for group in groups if group.name in known and group.channels < known[group.name].channels]


def _sound_channels(
    proof: Proof, groups: Sequence[ChannelGroup], known: Mapping[ChannelGroup, int]
) -> tuple[dict[ChannelGroup, int], list[tuple[ChannelGroup, str]]]:
    """Return group → a number of channels that may stay, for all that are sound together; and the others.

    A group that fails with half of its channels is tried with another number.

    Args:
        proof: the proof.
        groups: groups to add.
        known: the same for groups that are known to be sound.
    """
    sound = dict(known)

    def extended(offer: Mapping[ChannelGroup, int]) -> list[tuple[ChannelGroup, str]]:
        good, bad = largest_sound(
            list(offer), lambda some: _fault(proof, {**sound, **{group: offer[group] for group in some}}, False)
        )
        sound.update((group, offer[group]) for group in good)
        return bad

    failed = extended({group: first_count(group) for group in groups})
    again = {group: stay for group, _ in failed if (stay := second_count(group)) is not None}
    if proof.problem is None:
        extended(again)
    ordered = {group: sound[group] for group in [*(group for group in groups if group in sound), *known]}
    return ordered, [(group, why) for group, why in failed if group not in sound]


def _sound_heads(proof: Proof, sites: Sequence[Site]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the first sound alternative of each site; and layer → reason for sites without one."""
    sound: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    open_sites = list(sites)
    attempt = 0

    def fault(groups: Sequence[ChannelGroup]) -> str | None:
        return _fault(proof, {group: first_count(group) for group in [*sound, *groups]}, False)

    while open_sites:
        offers = {with_free_tensors(proof, site.alternatives[attempt]): site for site in open_sites}
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
        run(duplicate(model), few)
    except Exception:  # dim 0 is not a batch, or its size is fixed; the whole example is known to run
        return inputs
    return few


def _unread(proof: Proof, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, str]]]:
    """Split groups into those that no layer can read unseen, and the others with the reason.

    If training mode cannot be tried, a layer that eval mode does not call may read the channels of any group that fits.
    """
    if proof.untrained is None:
        return list(groups), []
    widths = {group: _width(proof.model, group) for group in groups}
    hidden = _hidden_readers(proof)
    good: list[ChannelGroup] = []
    bad: list[tuple[ChannelGroup, str]] = []
    for group in groups:
        others = {width for other, width in widths.items() if other is not group}
        readers = [name for name, lengths in hidden.items() if _may_read(lengths, widths[group], others)]
        readers.sort(key=lambda name: widths[group] not in hidden[name])  # the likeliest first
        layer = next(iter(readers), None)
        if layer is None or group.kind == "heads":
            good.append(group)
        else:
            why = f"{layer!r}, which eval mode does not call, may read its channels in training mode"
            bad.append((group, f"{why}, which cannot be tried: {proof.untrained}"))
    return good, bad


def _width(model: nn.Module, group: ChannelGroup) -> int:
    """Return how many channels the layers behind a group see."""
    slot = next((slot for slot in group.producers if slot.tensors), group.producers[0])
    return axis_length(model.get_submodule(slot.module), slot.axis)


def _hidden_readers(proof: Proof) -> dict[str, set[int]]:
    """Return layer → the numbers of channels that it may read, for layers with parameters that nothing has read."""
    readers: dict[str, set[int]] = {}
    for path in proof.unread:
        name, _, parameter = path.rpartition(".")
        module = proof.model.get_submodule(name)
        known = axes(module)
        if "inputs" in known:
            lengths = {axis_length(module, "inputs")}
        elif "outputs" in known:
            lengths = {axis_length(module, "outputs")}
        else:
            lengths = set(module.get_parameter(parameter).shape)
        readers.setdefault(name or path, set()).update(lengths - {1})
    return readers


def _may_read(lengths: Collection[int], width: int, others: Collection[int]) -> bool:
    """Return whether one of the lengths is a multiple of a width, as after a flatten, or its sum with another."""
    return any(n >= width and (n % width == 0 or n - width in others) for n in lengths)
