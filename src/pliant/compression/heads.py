"""Heads: whole attention heads are removed from a network, with their queries, keys, values and output columns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pliant.compression.filters import FilterPruning, refusals
from pliant.errors import check_choice
from pliant.structure import ChannelGroup, Structure, projection_layers

IMPORTANCES = ("auto", "loss", "l2", "l1")


@dataclass(frozen=True)
class HeadPruning(FilterPruning):
    """Remove the least important attention heads; options and ratio as in :class:`FilterPruning`.

    A head consists of the rows of the query, key and value projections that produce it, and the columns of the output
    projection that read it. In grouped-query attention a head of keys and values is removed together with all the
    heads of queries that read it. At least one head of every attention module stays; the controls count heads.

    Two kinds of modules are recognised: ``nn.MultiheadAttention``, which becomes a ``pliant.structure.ThinAttention``,
    and every module with linear projections for queries, keys and values, packed or separate, under their usual names;
    its attributes that count heads are updated. Modules of other kinds, and those whose forward fails with fewer heads,
    are named in ``plan.refused``.

    Source: Michel et al. 2019, "Are sixteen heads really better than one?".

    Args:
        importance: the measure of a head: "loss", "l2", "l1" or "auto" as in :class:`FilterPruning`, with the norms of
            its rows.

    Raises:
        BadInput: the ratio is out of range, or an option is unknown.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("importance", self.importance, IMPORTANCES)

    def choose(
        self, model: nn.Module, structure: Structure
    ) -> tuple[tuple[ChannelGroup, ...], tuple[tuple[str, str], ...]]:
        """Return the groups of heads, and (layer, reason) for each other projection of an attention module."""
        groups = tuple(group for group in structure.groups if group.kind == "heads")
        refused = refusals(structure, groups, projection_layers(model), "has no heads that can leave")
        if not groups and not refused:
            refused = ((type(model).__name__, "has no attention module whose projections are known"),)
        return groups, refused
