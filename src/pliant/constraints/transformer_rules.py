"""Transformers: separate rules for the parts of their blocks, if the kind of attention is known.

::

    rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.1, radius=3))
    groups = pliant.constrain(model, rules, default=None)

Removing heads or neurons also removes all that is tied to them. To find it, an example input is needed::

    groups = pliant.coupled_channels(model, example_inputs).groups
    rules = pliant.transformer_rules(model, heads=pliant.filters(k=0.25), neurons=pliant.filters(k=0.1), coupled=groups)
    groups = pliant.constrain(model, rules, default=None, coupled=groups)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pliant.constraints.parameter_groups import Rule
from pliant.constraints.presets import Preset
from pliant.errors import BadInput
from pliant.structure.attention import linear_width, projections
from pliant.structure.channel_groups import ChannelGroup


def transformer_rules(
    model: nn.Module,
    *,
    linear: Preset | None = None,
    heads: Preset | None = None,
    neurons: Preset | None = None,
    embeddings: Preset | None = None,
    coupled: Sequence[ChannelGroup] = (),
) -> list[Rule]:
    """Return rules for :func:`pliant.constrain`; normalisations, biases and the head of the model get no rule.

    Args:
        model: a transformer of the ``transformers`` package, an ``nn.TransformerEncoder``, or any other model whose
            blocks are in an ``nn.ModuleList`` or ``nn.Sequential`` and have attention with the usual names of
            projections.
        linear: the preset for all linear layers in the blocks that neither ``heads`` nor ``neurons`` covers, and for
            the experts of a mixture, which one weight of three dimensions holds as a matrix in each slice:
            ``pliant.rank``, ``pliant.weights`` or ``pliant.semi_structured``. A weight that packs queries, keys and
            values is one matrix, because compressors treat it as one. Routers and layers outside the blocks, such as
            the classifier, have no rule.
        heads: the preset for the layers that produce the heads of attention. With ``pliant.filters`` the ball holds all
            heads of a module, k counts them, and :class:`pliant.HeadPruning` removes the heads that become zero.
        neurons: the preset for the layers that produce the neurons of the MLPs, gates included; ``pliant.filters`` as
            for heads.
        embeddings: the preset for the tables of tokens and positions: ``pliant.l2``, because no compressor cuts them.
        coupled: ``pliant.coupled_channels(model, example_inputs).groups``, needed for heads and neurons; give it to
            ``constrain`` as well.

    Raises:
        BadInput: the model has no known part of a kind that a preset is given for, ``coupled`` is missing, or the
            preset for embeddings is structured.
    """
    rules: list[Rule] = []
    layers = frozenset(_block_weights(model))
    if heads is not None:
        rules.append((_Part("heads", _made_by(coupled, "heads")), heads))
    if neurons is not None:
        rules.append((_Part("neurons", _made_by(coupled, "neurons") & layers), neurons))
    if linear is not None:
        rules.append((_Part("linear", layers), linear))
    if embeddings is not None:
        if embeddings.structured:
            raise BadInput("embeddings takes pliant.l2(radius): no compressor cuts a table of embeddings")
        kinds = (nn.Embedding, nn.EmbeddingBag)
        tables = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        rules.append((_Part("embeddings", frozenset(f"{name}.weight" for name in tables)), embeddings))
    for part, _ in rules:
        if isinstance(part, _Part) and not part.names:
            raise BadInput(f"no {part.kind} found in this {type(model).__name__}: give rules of your own to constrain")
    return rules


@dataclass(frozen=True)
class _Part:
    """The selector of a rule that matches the weights of one part of the model.

    Args:
        kind: the part, for messages.
        names: the names of the weights.
    """

    kind: str
    names: frozenset[str] = field(repr=False)

    def __call__(self, name: str, parameter: Tensor) -> bool:
        return name in self.names


def _made_by(coupled: Sequence[ChannelGroup], kind: str) -> frozenset[str]:
    """Return the names of the weights whose rows produce the channels of all groups of this kind."""
    if not coupled:
        raise BadInput(f"{kind} needs coupled=pliant.coupled_channels(model, example_inputs).groups")
    slots = [slot for group in coupled if group.kind == kind for slot in group.producers]
    return frozenset(name for slot in slots for name, _ in slot.tensors if name.endswith("weight"))


def _block_weights(model: nn.Module) -> Iterator[str]:
    """Yield the names of the weights of linear layers and experts in the blocks."""
    weights = [
        *(f"{name}.weight" for name, module in model.named_modules() if linear_width(module) is not None),
        *_stacked(model),
    ]
    blocks = {_block(model, name, weights) for name, module in model.named_modules() if projections(module) is not None}
    return (name for name in weights if any(name.startswith(f"{block}.") for block in blocks if block))


def _stacked(model: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters of three dimensions that layers of their own multiply with."""
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd | nn.MultiheadAttention):
            yield from (f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if p.ndim == 3)


def _block(model: nn.Module, attention: str, weights: Sequence[str]) -> str | None:
    """Return the innermost member of a list of modules that has this attention and an MLP; None if there is none."""
    projected = projections(model.get_submodule(attention))
    assert projected is not None
    own = {f"{attention}.{child}.weight" for child in (projected.query, projected.key, projected.value)}
    path = attention.split(".") if attention else []
    for end in range(len(path), 0, -1):
        name, parent = ".".join(path[:end]), model.get_submodule(".".join(path[: end - 1]))
        others = [weight for weight in weights if weight.startswith(f"{name}.") and weight not in own]
        if isinstance(parent, nn.ModuleList | nn.Sequential) and len(others) > 1:  # attention alone has one: its output
            return name
    return None
