"""The choice of a ball for each parameter: from a model and rules to the parameter groups of :class:`~pliant.SFW`.

::

    groups = pliant.constrain(model, [("*.weight", pliant.rank(k=0.1, radius=10))], default=None)
    opt = pliant.SFW(groups, lr=0.1)
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pliant.calling import plain
from pliant.constraints.presets import Layout, Preset
from pliant.constraints.radius import initial_norm
from pliant.errors import BadInput
from pliant.norms import Channels, NormBall

Rule = tuple[str | Callable[[str, Tensor], bool], Preset | None]

_UNMATCHED: Any = object()


def constrain(
    model: nn.Module,
    rules: Sequence[Rule],
    default: Preset | None = _UNMATCHED,
    *,
    pretrained: bool = False,
    coupled: Sequence[CoupledChannels] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for :class:`~pliant.SFW` that cover every trainable parameter of ``model``.

    A rule pairs a selector with a preset, or with None for "no ball". A selector is a name pattern (as for file names:
    ``"*.weight"``, ``"layer1.*"``) or a predicate ``f(name, parameter)``. The first rule that matches a parameter
    decides. A structured preset matches only weight matrices, so ``"*.weight"`` does not match the weight of a
    BatchNorm. A tied parameter matches under any of its names.

    With FSDP2, call this function after ``fully_shard``, which replaces the parameters by new ones; balls and radii
    are the same before and after.

    Weights, buffers and the random state do not change. Radii are measured on draws from each layer's own initialiser;
    for a layer without one, and for every layer if ``pretrained``, on the current weights. A rule that matches nothing
    causes a warning.

    Args:
        model: any module.
        rules: pairs of a selector and a preset; the first match wins.
        default: the preset of all other parameters, or None for no ball; without it every parameter must match a rule.
        pretrained: whether the weights are trained; the radius then follows from their current norm.
        coupled: channels that leave the network together, ``pliant.coupled_channels(model, example_inputs).groups``.
            If :func:`filters` is the preset of a group's first weight, the ball holds the channels of the whole group
            jointly: all filters that are tied together, with their biases and normalisations, but not the layers that
            read them.

    Returns:
        Groups with ``params``, ``param_names`` and ``ball`` (plain data or None).

    Raises:
        BadInput: no rule matches a parameter, k exceeds the size of a layer, or a pattern does not fit a layer; the
            message names the parameter. Or a module is lazy and has no parameters yet.
    """
    for rule in rules:
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[1], Preset | None)):
            raise BadInput(f"a rule is a pair of a pattern or predicate and a preset or None, got {rule!r}")
    model = plain(model)
    trainable = trainable_parameters(model)
    if not trainable:
        raise BadInput("this model has no trainable parameter")
    used: set[int] = set()  # indices of rules
    joint = _joint_groups(model, rules, coupled, trainable, pretrained, used)
    taken = {p for group in joint for p in group["params"]}
    rest = {p: names for p, names in trainable.items() if p not in taken}
    groups: dict[str, dict[str, Any]] = {}
    for parameter, (name, preset) in _presets(model, rules, default, rest, used).items():
        ball = None if preset is None else _make_ball(preset, name, parameter, owner_of(model, name), pretrained)
        # A group without a ball takes the optimizer's default of weight_decay.
        decay = {} if ball is None else {"weight_decay": 0.0}
        group = groups.setdefault(repr(ball), {"params": [], "param_names": [], "ball": ball, **decay})
        group["params"].append(parameter)
        group["param_names"].append(rest[parameter][0])
    for index, (selector, _) in enumerate(rules):
        if index not in used:
            warnings.warn(f"rule {index + 1} ({selector!r}) decides for no parameter of this model", stacklevel=2)
    result = [*joint, *groups.values()]
    for group in result:
        group["ball"] = None if group["ball"] is None else group["ball"].to_spec()
    return result


def _joint_groups(
    model: nn.Module,
    rules: Sequence[Rule],
    coupled: Sequence[CoupledChannels],
    trainable: dict[Tensor, list[str]],
    pretrained: bool,
    used: set[int],
) -> list[dict[str, Any]]:
    """Return a parameter group for each group of channels whose first weight gets a preset for coupled channels."""
    by_name = {name: p for p, names in trainable.items() for name in names}
    result: dict[str, dict[str, Any]] = {}
    for channels in coupled:
        members = _members(channels, by_name)
        choice = _choose(model, rules, [members[0][0]], members[0][1]) if members else None
        preset = rules[choice[0]][1] if choice else None
        if choice and preset and preset.coupled:
            used.add(choice[0])
            result[channels.name] = _coupled_group(model, preset, channels, members, pretrained)
    return list(result.values())


def _presets(
    model: nn.Module,
    rules: Sequence[Rule],
    default: Preset | None,
    trainable: dict[Tensor, list[str]],
    used: set[int],
) -> dict[Tensor, tuple[str, Preset | None]]:
    """Return for each parameter the name that decided and its preset; raises BadInput where nothing fits."""
    unmatched, misfit = [], []
    result: dict[Tensor, tuple[str, Preset | None]] = {}
    for parameter, names in trainable.items():
        choice = _choose(model, rules, names, parameter)
        if choice is not None:
            used.add(choice[0])
            result[parameter] = choice[1], rules[choice[0]][1]
        elif default is _UNMATCHED:
            unmatched.append(names[0])
        elif default is not None and default.structured and not _is_matrix(owner_of(model, names[0]), parameter):
            misfit.append(names[0])
        else:
            result[parameter] = names[0], default
    if unmatched:
        raise BadInput(
            f"no rule matches {', '.join(unmatched)}: add a rule, or default=None to train them without a ball"
        )
    if misfit:
        raise BadInput(
            f"the default preset is for weight matrices, not for {', '.join(misfit)}: make it a rule ('*', preset), "
            "and the default None or pliant.l2()"
        )
    return result


def _members(channels: CoupledChannels, parameters: dict[str, Tensor]) -> list[tuple[str, Tensor, int, Tensor]]:
    """Return (name, parameter, dimension, positions) of all trainable tensors that produce the channels."""
    return [
        (name, parameters[name], dim, slot.indices)
        for slot in channels.producers
        for name, dim in slot.tensors
        if name in parameters
    ]


def _coupled_group(
    model: nn.Module,
    preset: Preset,
    channels: CoupledChannels,
    members: list[tuple[str, Tensor, int, Tensor]],
    pretrained: bool,
) -> dict[str, Any]:
    assert preset.coupled is not None
    try:
        inner = preset.coupled(channels.channels)
    except BadInput as error:
        raise BadInput(f"the channels of {channels.name}: {error}") from None
    dims = {dim for _, p, dim, _ in members if p.ndim > 1} or {0}
    parts = {_parts(channels.name, name, p.shape[dim], positions) for name, p, dim, positions in members}
    if len(dims) > 1 or len(parts) > 1:
        raise BadInput(
            f"the tensors that share the channels of {channels.name} lay them out differently: leave this group out of "
            "coupled, so that its layers get balls of their own"
        )
    norm = Channels(inner, channels.channels, dims.pop(), parts.pop(), preset.orthogonal)
    lengths = [initial_norm(owner_of(model, name), name, p, pretrained) for name, p, _, _ in members]
    diameter = 2 * preset.radius * math.hypot(*lengths)
    parameters = [p for _, p, _, _ in members]
    ball = NormBall(norm, diameter / norm.diameter([p.shape for p in parameters]))
    names = [name for name, _, _, _ in members]
    return {"params": parameters, "param_names": names, "ball": ball, "weight_decay": 0.0, "joint": True}


def _parts(group: str, name: str, rows: int, positions: Tensor) -> int:
    """Return the number of equal parts of the rows in which each channel has an equal run.

    Raises:
        BadInput: the positions, (channels, width), are not of this form.
    """
    count, width = positions.shape
    for parts in range(1, width + 1 if count * width == rows else 1):
        order = torch.arange(rows, device=positions.device)
        runs = order.reshape(parts, count, -1) if width % parts == 0 else None
        if runs is not None and torch.equal(runs.transpose(0, 1).flatten(1), positions):
            return parts
    raise BadInput(
        f"the channels of {group} are not all rows of {name} in order: leave the group of {group} out of coupled, "
        "so that its layers get balls of their own"
    )


def _choose(model: nn.Module, rules: Sequence[Rule], names: list[str], parameter: Tensor) -> tuple[int, str] | None:
    """Return the index of the rule that decides for a parameter, and the name that it matched; None if none does."""
    for index, (selector, preset) in enumerate(rules):
        for name in names:
            matches = selector(name, parameter) if callable(selector) else fnmatch.fnmatchcase(name, selector)
            if matches and (preset is None or not preset.structured or _is_matrix(owner_of(model, name), parameter)):
                return index, name
    return None


def trainable_parameters(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return all names of every parameter that requires a gradient."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return names


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the layer that a parameter belongs to, even if parametrisations lie between the two."""
    return model.get_submodule(
        name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    )


def _is_matrix(owner: nn.Module, parameter: Tensor) -> bool:
    vectors = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return parameter.ndim >= 2 and not isinstance(owner, vectors)


class CoupledChannels(Protocol):
    """The attributes of coupled channels that :func:`constrain` reads; see :class:`pliant.structure.ChannelGroup`."""

    @property
    def name(self) -> str:
        """The layer that names the group."""

    @property
    def channels(self) -> int:
        """The number of channels."""

    @property
    def producers(self) -> Sequence[Any]:
        """The producers of the channels: objects with ``tensors`` (name, dim) and ``indices`` (channels, width)."""


def layout_of(owner: nn.Module, weight: Tensor) -> Layout:
    """Return how the weight of a layer is read as a matrix, or as several.

    A weight of three dimensions that is no convolution's holds a matrix in each slice: the experts of a mixture, the
    heads of an attention, the outputs of ``nn.Bilinear``. In slices, as in a linear layer, rows are outputs, unless the
    layer says that they are transposed, as experts of transformers do (``is_transposed``).

    Args:
        owner: the layer.
        weight: its weight.

    Raises:
        BadInput: the layer is a grouped transposed convolution.
    """
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        if owner.groups > 1:
            raise BadInput("grouped transposed convolutions have no layout yet: give them the rule (name, None)")
        return Layout(dim=1, inputs=0)
    if isinstance(owner, nn.modules.conv._ConvNd):
        return Layout(groups=owner.groups)
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):
        return Layout(dim=1, inputs=0)  # GPT-2's linear layer in transformers stores its weight as (in, out)
    if weight.ndim == 3:
        rows, inputs = (2, 1) if getattr(owner, "is_transposed", False) is True else (1, 2)
        return Layout((0, rows), len(weight), inputs)
    return Layout()


def _make_ball(preset: Preset, name: str, parameter: Tensor, owner: nn.Module, pretrained: bool) -> NormBall:
    try:
        norm = preset.norm(parameter.shape, layout_of(owner, parameter) if preset.structured else Layout())
    except ValueError as error:
        raise BadInput(f"{name} of shape {tuple(parameter.shape)}: {error}") from None
    diameter = 2 * preset.radius * initial_norm(owner, name, parameter, pretrained)
    return NormBall(norm, diameter / norm.diameter(parameter.shape))
