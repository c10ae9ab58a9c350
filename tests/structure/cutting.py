"""What the tests of structures share: networks that are cut, and their masked twins."""

from __future__ import annotations

from collections.abc import Sequence

from pliant.structure import ChannelGroup, Proof, kept_fault


def half_fault(proof: Proof, groups: Sequence[ChannelGroup]) -> str | None:
    """Return why groups cannot lose half of their channels."""
    return kept_fault(proof, {group: group.channels - group.channels // 2 for group in groups})
