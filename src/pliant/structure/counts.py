"""How many channels of a group may stay: some networks run with multiples of four only, or with halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pliant.structure.channel_groups import ChannelGroup
from pliant.structure.layers import AxisName
from pliant.structure.proof import Proof
from pliant.structure.soundness import largest_sound

STEPS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 24, 32, 64)
"""The multiples that are tried where not every number works."""

_MANY = 6  # groups

Fault = Callable[[Mapping[ChannelGroup, int]], str | None]


def kept_fault(proof: Proof, kept: Mapping[ChannelGroup, int], *, training: bool | None = None) -> str | None:
    """Return why a network fails if so many channels of some groups stay, None if it does not fail.

    Args:
        proof: the proof.
        kept: group → number of channels that stay.
        training: as for :meth:`Proof.fault`.
    """
    generator = torch.Generator().manual_seed(2)
    gone = [
        torch.randperm(group.channels, generator=generator)[: group.channels - stay] for group, stay in kept.items()
    ]
    return proof.fault(positions(list(kept), gone), training=training)


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


def first_count(group: ChannelGroup) -> int:
    """Return the number of channels to try first: half of them."""
    return group.channels - group.channels // 2


def second_count(group: ChannelGroup) -> int | None:
    """Return another number to try if the first one fails: a multiple of a larger power of two; None if it is one."""
    step = max((step for step in (2, 4, 8, 16) if step < group.channels), default=1)
    stay = (group.channels - 1) // step * step
    return stay if first_count(group) % step else None


def with_counts(groups: Mapping[ChannelGroup, int], fault: Fault) -> list[ChannelGroup]:
    """Return the groups, each with the numbers of channels that may stay.

    Two trials suffice for a network that runs with any number: one with numbers that are multiples of nothing, and one
    with a single channel of each group.

    Args:
        groups: group → a number of channels that may stay; they are sound together.
        fault: returns why the network fails with so many channels of some groups.
    """
    odd = {group: _odd(group.channels) for group in groups}
    single = dict.fromkeys(groups, 1)
    sound, failed = largest_sound(list(groups), lambda some: fault({group: odd[group] for group in some}))
    counts: dict[ChannelGroup, tuple[int, ...] | None] = dict.fromkeys(sound)
    limits: dict[ChannelGroup, str] = {}
    shared = _shared_step([group for group, _ in failed], {group: odd[group] for group in sound}, fault)
    for group, why in failed:
        if shared is not None:
            counts[group], single[group] = tuple(range(shared, group.channels, shared)), shared
            limits[group] = f"keeps a multiple of {shared} channels: with {odd[group]}, {why}"
            continue
        others = {other: odd[other] for other in sound}
        runs, text = _counts(group, groups[group], partial(_with, fault, others, group))
        counts[group], single[group] = runs, min(runs)
        limits[group] = f"keeps {text}: with {odd[group]}, {why}"
    _, failed = largest_sound(list(groups), lambda some: fault({group: single[group] for group in some}))
    for group, why in failed:
        known = counts[group] or tuple(range(1, group.channels))
        stay = single[group]
        while stay < groups[group]:
            stay = min(2 * stay, groups[group])
            if stay in known and fault({group: stay}) is None:
                break
        counts[group] = tuple(count for count in known if count >= stay)
        limits.setdefault(group, f"keeps at least {stay} channels: with {single[group]}, {why}")
    return [
        dataclasses.replace(group, counts=counts[group], limit=limits[group]) if group in limits else group
        for group in groups
    ]


def larger_counts(kept: int, channels: int) -> list[int]:
    """Return numbers of channels above ``kept`` to try in its place, ascending: the next multiples, and halves."""
    multiples = {-(-kept // step) * step for step in STEPS}
    halves = {channels >> shift for shift in range(1, channels.bit_length())}
    return sorted(count for count in multiples | halves if kept < count < channels)


def _shared_step(groups: Sequence[ChannelGroup], others: Mapping[ChannelGroup, int], fault: Fault) -> int | None:
    """Return a multiple that works for many groups at once; None if there are few, which are looked at one by one."""
    for step in STEPS if len(groups) > _MANY else ():
        offer = {group: step * _odd(group.channels // step) for group in groups}
        if all(0 < stay < group.channels for group, stay in offer.items()) and fault({**others, **offer}) is None:
            return step
    return None


def _with(fault: Fault, others: Mapping[ChannelGroup, int], group: ChannelGroup, stay: int) -> str | None:
    return fault({**others, group: stay})


def _counts(group: ChannelGroup, good: int, fault: Callable[[int], str | None]) -> tuple[tuple[int, ...], str]:
    """Return the numbers of channels with which a network runs, and in words which these are; ``good`` is one."""
    for step in STEPS:
        stay = step * _odd(group.channels // step)
        if stay < group.channels and fault(stay) is None:
            return tuple(range(step, group.channels, step)), f"a multiple of {step} channels"
    halves = [group.channels >> shift for shift in range(1, group.channels.bit_length())]
    runs = sorted({good, *(stay for stay in halves if stay != good and fault(stay) is None)})
    return tuple(runs), f"{' or '.join(map(str, runs))} channels"


def _odd(channels: int) -> int:
    """Return a prime below about three quarters of a number, so that it is a multiple of nothing else; or 1."""
    for number in range(3 * channels // 4, 1, -1):
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)) and number > 2:
            return number
    return 1
