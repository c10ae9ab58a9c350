"""Facts about single layers: where their channels lie, and whether their weight may be changed.

Convention: a layer's ``"outputs"`` axis holds its filters or neurons, its ``"inputs"`` axis the columns that read
the layer before; the ``"outputs"`` of an attention module are its heads. Every other parameter or buffer that a module
holds may have *free axes*: see :func:`free_axes`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from pliant.structure.attention import is_conv1d, projections
from pliant.structure.thin_attention import thin

AxisName = str
"""``"outputs"``, ``"inputs"``, ``"gamma.1"`` for dimension 1 of a tensor that belongs to neither, or ``"width.count"``
for an attribute that counts channels and lies along none."""

# Facts about a layer hold for these classes and for subclasses that keep their forward.
_KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.PReLU,
    nn.GroupNorm,
    nn.Embedding,
)


@dataclass(frozen=True)
class Axis:
    """One axis of a layer.

    Args:
        length: number of positions.
        tensors: the (tensor, dim) pairs that lie along the axis.
        attributes: (name, amount per position) of the layer's integers that count them; of those that count groups of
            positions the amount is a fraction.
    """

    length: int
    tensors: tuple[tuple[str, int], ...]
    attributes: tuple[tuple[str, int | Fraction], ...]


def axes(module: nn.Module) -> dict[AxisName, Axis]:
    """Return the axes along which channels can be removed from ``module``; empty for layers of unknown types.

    A BatchNorm and a PReLU pass each channel on: they have only the outputs axis. So do a GroupNorm and a grouped
    convolution, which whole groups can leave. An attention module counts its heads, which lie in its projections;
    ``nn.MultiheadAttention`` holds their rows itself.
    """
    outputs: AxisName = "outputs"
    inputs: AxisName = "inputs"
    if isinstance(module, nn.Linear):
        out = _axis(module, ("out_features",), ("weight", 0), ("bias", 0))
        return {outputs: out, inputs: _axis(module, ("in_features",), ("weight", 1))}
    if is_conv1d(module):
        return {
            outputs: _axis(module, ("nf",), ("weight", 1), ("bias", 0)),
            inputs: _axis(module, ("nx",), ("weight", 0)),
        }
    if isinstance(module, _ConvNd) and module.groups == 1:
        filters, columns = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
        out = _axis(module, ("out_channels",), ("weight", filters), ("bias", 0))
        return {outputs: out, inputs: _axis(module, ("in_channels",), ("weight", columns))}
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return {outputs: _axis(module, ("out_channels", "in_channels", "groups"), ("weight", 0), ("bias", 0))}
    if isinstance(module, nn.Embedding):
        return {outputs: _axis(module, ("embedding_dim",), ("weight", 1))}
    if isinstance(module, nn.GroupNorm):
        return {outputs: _axis(module, ("num_channels", "num_groups"), ("weight", 0), ("bias", 0))}
    if isinstance(module, _NormBase):
        tensors = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))
        return {outputs: _axis(module, ("num_features",), *tensors)}
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return {outputs: _axis(module, ("num_parameters",), ("weight", 0))}
    attention = projections(module)
    if isinstance(module, nn.MultiheadAttention) and attention is not None:  # rows of the packed weight, not heads
        return {outputs: Axis(len(module.in_proj_weight), (("in_proj_weight", 0), ("in_proj_bias", 0)), ())}
    return {} if attention is None else {outputs: Axis(attention.heads, (), attention.attributes)}


def _axis(module: nn.Module, attributes: tuple[str, ...], *tensors: tuple[str, int]) -> Axis:
    length = int(getattr(module, attributes[0]))
    return Axis(length, tensors, tuple((name, Fraction(getattr(module, name), length)) for name in attributes))


def free_axes(module: nn.Module) -> dict[AxisName, Axis]:
    """Return the dimensions of a module's other floating-point tensors, those of none of the :func:`axes`.

    Any of them may lie along channels.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return {}
    known = {tensor for axis in axes(module).values() for tensor, _ in axis.tensors}
    return {
        f"{name}.{dim}": Axis(length, ((name, dim),), ())
        for name, held in {**module._parameters, **module._buffers}.items()
        if held is not None and name not in known and held.is_floating_point()
        for dim, length in enumerate(held.shape)
        if length > 1
    }


def counting_axes(module: nn.Module) -> dict[AxisName, Axis]:
    """Return an axis for each integer attribute of a module that is no layer: any of them may count channels."""
    if axes(module):
        return {}
    counts = {name: value for name, value in vars(module).items() if type(value) is int and value > 1}
    return {f"{name}.count": Axis(value, (), ((name, 1),)) for name, value in counts.items()}


def axis_of(module: nn.Module, name: AxisName) -> Axis | None:
    """Return an axis by its name, a free one too; None if the module has none of that name."""
    if name in ("outputs", "inputs"):
        return axes(module).get(name)
    return (counting_axes(module) if name.endswith(".count") else free_axes(module)).get(name)


def _known_axis(module: nn.Module, name: AxisName) -> Axis:
    axis = axis_of(module, name)
    if axis is None:
        raise KeyError(name)
    return axis


def axis_length(module: nn.Module, axis: AxisName) -> int:
    """Return the number of positions on one axis."""
    return _known_axis(module, axis).length


def tensors_along(module: nn.Module, name: str, axis: AxisName) -> tuple[tuple[str, int], ...]:
    """Return (state_dict name, dim) of the tensors that lie along an axis of the module called ``name``."""
    held = {**module._parameters, **module._buffers}
    prefix = f"{name}." if name else ""
    return tuple(
        (prefix + tensor, dim) for tensor, dim in _known_axis(module, axis).tensors if held.get(tensor) is not None
    )


def complement(module: nn.Module, axis: AxisName, positions: Tensor) -> Tensor:
    """Return the positions on an axis that are not in ``positions``; int64 (n,), ascending."""
    mask = torch.ones(axis_length(module, axis), dtype=torch.bool)
    return mask.index_fill_(0, positions, False).nonzero().flatten()


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every convolution and linear layer once, under its first name; ``Conv1D`` is a linear layer."""
    for name, module in model.named_modules():
        if _is_layer(module):
            yield name, module


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of :func:`named_layers` and PyTorch's attention modules, which only heads can leave."""
    for name, module in model.named_modules():
        if _is_layer(module) or isinstance(module, nn.MultiheadAttention):
            yield name, module


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)


def other_matrices(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, reason) of every module that holds matrices but is no convolution or linear layer."""
    others = []
    for name, module in model.named_modules():
        matrices = [child for child, p in module._parameters.items() if p is not None and p.dim() > 1]
        known = _is_layer(module) or isinstance(module, parametrize.ParametrizationList)  # its layer is named
        if matrices and not known:
            kind = "MultiheadAttention" if isinstance(module, nn.MultiheadAttention) else type(module).__name__
            others.append((name, f"holds {', '.join(matrices)} as a {kind}, which is no convolution or linear layer"))
    return others


def untransposed(module: nn.Module) -> nn.Module:
    """Return ``module``, or for a ``Conv1D`` the equivalent linear layer, whose weight is a view."""
    if not is_conv1d(module):
        return module
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None  # callers rule this out by obstacle()
    columns, rows = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta").train(module.training)
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear


def obstacle(module: nn.Module, tied: frozenset[int]) -> str | None:
    """Return why the weight of ``module`` may not be replaced, or read as that of a linear map; or None.

    Args:
        module: a layer that holds parameters.
        tied: the result of :func:`tied_parameters` on the whole model.
    """
    fixed = obstacle_to_cutting(module, tied)
    if fixed is None and own_forward(module):
        return f"is a {type(module).__name__} with a forward of its own"
    return fixed


def obstacle_to_cutting(module: nn.Module, tied: frozenset[int]) -> str | None:
    """Return why no rows or columns of the weight of ``module`` can leave, or None: a proof has to decide the rest.

    Args:
        module, tied: as for :func:`obstacle`.
    """
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "is parametrised: its weight is computed, fold the parametrisation in first"
    if _base(module) is None:
        return f"is of type {type(module).__name__}, whose channels are not known"
    if any(id(p) in tied for p in module.parameters(recurse=False)):
        return "shares a parameter with another layer"
    return None


def own_forward(module: nn.Module) -> bool:
    """Return whether a layer of a known type may compute something else than that type does."""
    base = _base(module)
    return "forward" in vars(module) or any(
        getattr(type(module), method, None) is not getattr(base, method, None)
        for method in ("forward", "_conv_forward")
    )


def _base(module: nn.Module) -> type[nn.Module] | None:
    if is_conv1d(module):
        return type(module)
    return next((known for known in _KNOWN if isinstance(module, known)), None)


def tied_parameters(model: nn.Module) -> frozenset[int]:
    """Return the ids of all parameters that two modules share, or that one module holds under two names."""
    owners: dict[tuple[Any, ...], list[int]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                key = (p.data_ptr(),) if p.numel() and not p.is_meta else (None, id(p))
                owners.setdefault(key, []).append(id(p))
    return frozenset(i for ids in owners.values() if len(ids) > 1 for i in ids)


def keep_channels(module: nn.Module, axis: AxisName, keep: Tensor) -> None:
    """Reduce ``module`` in place to the positions ``keep``, int64 (n,), ascending, of one axis."""
    shortened = _known_axis(module, axis)
    for name, dim in shortened.tensors:
        old = getattr(module, name)
        if old is None:
            continue
        new = old.detach().index_select(dim, keep.to(old.device))
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
    for attribute, amount in shortened.attributes:
        _set_attribute(module, attribute, int(amount * len(keep)))
    if isinstance(module, nn.MultiheadAttention):
        thin(module)


def _set_attribute(module: nn.Module, name: str, value: int) -> None:
    """Set an integer of a module, or one of its configuration: ``config.num_heads``, of a copy that it has alone."""
    owner, _, name = name.rpartition(".")
    if not owner:
        setattr(module, name, value)
        return
    setattr(module, owner, copy.copy(getattr(module, owner)))
    setattr(getattr(module, owner), name, value)


def zero_channels(module: nn.Module, axis: AxisName, gone: Tensor) -> None:
    """Set the parameters of ``module`` at the positions ``gone``, int64 (n,), of one axis to zero, in place."""
    with torch.no_grad():
        for name, dim in _known_axis(module, axis).tensors:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.index_fill_(dim, gone.to(parameter.device), 0.0)
