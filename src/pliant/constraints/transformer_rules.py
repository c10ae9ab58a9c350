"""Transformers: rules that tell the parts of their blocks apart, for any of them with attention that is known.

::

    rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.1, radius=3))
    groups = pliant.constrain(model, rules, default=None)

Heads and neurons leave with whatever is tied to them. To find it, an example is needed:

    groups = pliant.coupled_channels(model, example_inputs).groups
    rules = pliant.transformer_rules(model, heads=pliant.filters(k=0.25), neurons=pliant.filters(k=0.1), coupled=groups)
    groups = pliant.constrain(model, rules, default=None, coupled=groups)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

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
    """Return rules for :func:`pliant.constrain`; what no rule is for, such as norms, biases and the head, is left open.

    Args:
        model: a network of transformers, ``nn.TransformerEncoder``, or any other whose blocks are in an
            ``nn.ModuleList`` or ``nn.Sequential`` and have attention with the usual names of projections.
        linear: for all linear layers in the blocks that the next two are not for: ``pliant.rank``, ``pliant.weights``
            or ``pliant.semi_structured``. A weight with queries, keys and values in one is one matrix, since it is
            cut as one. The layers around the blocks, such as the one that gives classes or tokens, have no rule.
        heads: for the layers that make the heads of attention. With ``pliant.filters`` the ball holds all of a
            module's heads, k counts them, and what becomes zero is what :class:`pliant.HeadPruning` removes.
        neurons: for the layers that make the neurons of the MLPs, gates too; ``pliant.filters`` as for heads.
        embeddings: for the tables of tokens and positions; ``pliant.l2``, since nothing cuts them.
        coupled: ``pliant.coupled_channels(model, example_inputs).groups``, for heads and neurons; give it to
            ``constrain`` as well.

    Raises:
        BadInput: a preset is given for blocks, heads or neurons, and the model has none that are known.
    """
    rules: list[Rule] = []
    layers = frozenset(f"{name}.weight" for name in _block_layers(model))
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
    """The weights of one part of the model, as the selector of a rule."""

    kind: str
    names: frozenset[str] = field(repr=False)

    def __call__(self, name: str, parameter: Tensor) -> bool:
        return name in self.names


def _made_by(coupled: Sequence[ChannelGroup], kind: str) -> frozenset[str]:
    """Return the names of the weights whose rows are the channels of the groups of a kind."""
    if not coupled:
        raise BadInput(f"{kind} needs coupled=pliant.coupled_channels(model, example_inputs).groups")
    slots = [slot for group in coupled if group.kind == kind for slot in group.producers]
    return frozenset(name for slot in slots for name, _ in slot.tensors if name.endswith("weight"))


def _block_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers in the blocks."""
    layers = [name for name, module in model.named_modules() if linear_width(module) is not None]
    blocks = {_block(model, name, layers) for name, module in model.named_modules() if projections(module) is not None}
    return (name for name in layers if any(name.startswith(f"{block}.") for block in blocks if block))


def _block(model: nn.Module, attention: str, layers: Sequence[str]) -> str | None:
    """Return the smallest member of a list of modules with this attention and an MLP, None without one."""
    found = projections(model.get_submodule(attention))
    assert found is not None
    own = {f"{attention}.{child}" for child in (found.query, found.key, found.value)}
    path = attention.split(".") if attention else []
    for end in range(len(path), 0, -1):
        name, parent = ".".join(path[:end]), model.get_submodule(".".join(path[: end - 1]))
        others = [layer for layer in layers if layer.startswith(f"{name}.") and layer not in own]
        if isinstance(parent, nn.ModuleList | nn.Sequential) and len(others) > 1:  # attention alone has its output only
            return name
    return None
