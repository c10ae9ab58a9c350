"""Labels for what the functions of layers return.

A convolution labels its results with its channels, and notes which ones its columns read. A norm passes channels on,
attention reads whole heads, and functions that cut a tensor in equal parts couple the channels at their same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pliant.structure.labelled import Labelled
from pliant.structure.layers import axes

_CONVOLUTIONS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
_PARTS = (torch.chunk, Tensor.chunk, F.glu)


class LayerFunctions(TorchFunctionMode):
    """The functions that know their channels: those of layers, and those that cut a tensor in equal parts.

    A rule returns labels that broadcast to those of the result, or None if it cannot say more than the single steps.
    """

    def __init__(self, known: Labelled) -> None:
        super().__init__()
        self.known = known
        self.rules: dict[Any, Callable[..., Tensor | None]] = {
            F.linear: self._linear,
            F.batch_norm: self._batch_norm,
            F.instance_norm: self._batch_norm,
            F.group_norm: self._group_norm,
            F.layer_norm: self._layer_norm,
            F.rms_norm: self._layer_norm,
            torch.prelu: self._prelu,
            F.glu: self._glu,
            F.embedding: self._embedding,
            F.scaled_dot_product_attention: self._attention,
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        kwargs, known = kwargs or {}, self.known
        if known.paused:
            return func(*args, **kwargs)
        if func in _PARTS:
            self._tie(func, *args, **kwargs)
        known.operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)]
        labels = self.rules[func](*args, **kwargs) if func in self.rules else None
        if labels is None:
            result = func(*args, **kwargs)
            if any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):  # not a shape
                known.sees([x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)], "")
            return result
        known.paused = True
        try:
            result = func(*args, **kwargs)
        finally:
            known.paused = False
        known.note(result, labels.to(result.device).expand(result.shape))
        if func is F.linear or func in _CONVOLUTIONS:
            known.produced(self._layer(args[1] if len(args) > 1 else kwargs["weight"])[0], result)
        reader = self._norm() if func is F.batch_norm else None
        known.sees([x for x in args[:1] if isinstance(x, Tensor)], "" if reader is None else reader)
        return result

    def _layer(self, weight: Tensor) -> tuple[str, Any]:
        """Return (name, layer) of a layer from the weight of its step; ("", None) if it is not known.

        A layer may also compute the weight of its step from its own, in a forward of its own.
        """
        name = self.known.layers.get(id(weight))
        if name is not None:
            return name, self.known.modules[name]
        name = self.known.running[-1]
        module: Any = self.known.modules[name]
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
        elif isinstance(module, _ConvNd):
            shape = (module.out_channels, module.in_channels // module.groups)
            shape = (module.in_channels, shape[0] // module.groups) if module.transposed else shape
        else:
            return "", None
        return (name, module) if tuple(weight.shape[:2]) == shape and "outputs" in axes(module) else ("", None)

    def _columns(self, x: Tensor, dim: int) -> Tensor | None:
        """Return the labels of the columns that read dimension ``dim`` of a tensor, None without any."""
        labels = self.known.of(x)
        if labels is None:
            return None
        others = [d for d in range(x.dim()) if d != dim % x.dim()]
        return self.known.labels.merged(labels, others, self.known.cause()).flatten().cpu()

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        known = self.known
        name, module = self._layer(weight)
        if not isinstance(module, nn.Linear):
            return None
        own, labels = known.own(name), known.of(input)
        vary = known.labels.vary
        elsewhere = range(input.dim() - 1)
        if labels is not None and not vary(labels, -1) and any(vary(labels, dim) for dim in elsewhere):
            known.labels.fix(own, f"the {type(module).__name__} {name!r} reads places, not channels")
            return labels[..., :1]
        columns = self._columns(input, -1)
        if columns is not None:
            known.reads(name, columns)
        return own.clone()

    def _convolution(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        known = self.known
        name, module = self._layer(weight)
        if not isinstance(module, _ConvNd):
            return None
        own, dims = known.own(name), weight.dim() - 2
        columns = self._columns(input, -1 - dims)
        if module.groups == 1:
            if columns is not None:
                known.reads(name, columns)
        elif columns is None or not bool((columns >= 0).all()):
            known.labels.fix(own, "is a grouped convolution: its channels are tied to their places")
            if columns is not None:
                known.labels.fix(columns, f"the grouped convolution {name!r} does not treat its channels one by one")
        else:  # whole groups can leave
            ours = known.labels.merged(own.view(module.groups, -1), [1])
            theirs = known.labels.merged(columns.view(module.groups, -1), [1])
            known.labels.join(ours, theirs)
        return own.view(-1, *[1] * dims)

    def _norm(self) -> str | None:
        """Return the name of the norm that runs, None without one."""
        name = self.known.running[-1]
        known = isinstance(self.known.modules[name], (_NormBase, nn.GroupNorm))
        return name if known and "outputs" in axes(self.known.modules[name]) else None

    def _by_channel(self, input: Tensor, name: str | None) -> Tensor | None:
        """Join the channels of a tensor with those of the module that treats them one by one, None for no module."""
        labels = self.known.of(input)
        if labels is None:
            return None
        labels = self.known.labels.merged(labels, [d for d in range(input.dim()) if d != 1], self.known.cause())
        if name is not None:
            self.known.labels.join(labels.flatten().cpu(), self.known.own(name))
        return labels

    def _batch_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return self._by_channel(input, self._norm())

    def _group_norm(self, input: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> Tensor | None:
        labels = self._batch_norm(input)
        if labels is not None:
            self.known.labels.merged(labels.flatten().view(num_groups, -1), [1], self.known.cause())
        return labels

    def _layer_norm(self, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor | None:
        labels = self.known.of(input)
        if labels is None:
            return None
        return self.known.labels.merged(labels, range(-len(normalized_shape), 0), self.known.cause())

    def _prelu(self, input: Tensor, weight: Tensor) -> Tensor | None:
        name = self.known.running[-1]
        if isinstance(self.known.modules[name], nn.PReLU) and weight.numel() > 1:
            self._by_channel(input, name)
        return self.known.of(input)

    def _embedding(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        name = self.known.running[-1]
        module = self.known.modules[name]
        known = isinstance(module, nn.Embedding) and module._parameters.get("weight") is weight
        return self.known.own(name).clone() if known else None

    def _glu(self, input: Tensor, dim: int = -1) -> Tensor | None:
        labels = self.known.of(input)
        return None if labels is None else labels.narrow(dim, 0, labels.shape[dim] // 2)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        known, labels = self.known, self.known.labels
        seen = [known.of(x) for x in (query, key, value, attn_mask)]
        heads = [labels.merged(own, [-2, -1]) for own in seen if own is not None]
        if not heads:
            return None
        most = max(own.shape[-3] if own.dim() > 2 else 1 for own in heads)  # heads of keys may serve several queries
        heads = [own.repeat_interleave(most // own.shape[-3], -3) if own.dim() > 2 else own for own in heads]
        for own in heads:
            labels.attend(own, known.running[-1])
        return labels.combined(heads, known.cause())

    def _tie(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Couple the channels at the same places of the equal parts that a tensor is cut into."""
        labels = self.known.of(input)
        if func is F.glu:
            parts, dim = 2, kwargs.get("dim", args[0] if args else -1)
        else:
            parts = kwargs.get("chunks", args[0] if args else 1)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if labels is not None and input.shape[dim] % parts == 0 and self.known.labels.vary(labels, dim):
            self.known.labels.merged(labels.unflatten(dim, (parts, -1)), [dim % input.dim()])
