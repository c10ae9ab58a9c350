"""Labels for what every single operation returns.

One that moves numbers moves their labels, one that combines numbers couples their channels, and one that is not known
keeps all the channels that it reads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pliant.structure.labelled import Labelled


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAME = _names("clone _to_copy contiguous alias detach lift_fresh")
_MOVES = _names(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze unsqueeze select slice split unbind "
    "split_with_sizes flip roll repeat index_select gather index cat stack constant_pad_nd diagonal unfold "
    "pixel_shuffle pixel_unshuffle channel_shuffle"
)
_POINTWISE = _names(  # besides those that PyTorch says are
    "native_dropout hardswish copy _prelu_kernel prelu log_sigmoid_forward where masked_fill floor_divide rrelu "
    "rrelu_with_noise complex polar"
)
_ALONG = _names(  # they combine the numbers along a dimension
    "sum mean amax amin max min var std var_mean std_mean prod logsumexp linalg_vector_norm norm all any argmax argmin "
    "median nanmean nansum _softmax _log_softmax softmax log_softmax cumsum cumprod sort topk count_nonzero"
)
_SPATIAL = re.compile(r"(?:max_pool|avg_pool|adaptive|upsample|reflection_pad|replication_pad|grid_sampler).*?([123])d")
_PRODUCTS = {  # operation → its factors
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}
_TRANSPOSING = (torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
_NEW = _names(  # their results are no numbers of any channel
    "zeros_like ones_like full_like empty_like new_zeros new_empty new_full new_ones rand_like randn_like randint_like "
    "bernoulli is_nonzero _local_scalar_dense item equal is_same_size sym_size"
)


class Operations(TorchDispatchMode):
    """A context in which every single operation labels what it returns."""

    def __init__(self, known: Labelled) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self._matrices: dict[int, tuple[str, Tensor]] = {}  # id of a transposed weight → the layer, and the tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.known.paused:
            schema = func._schema.arguments
            stated = {arg.name: value for arg, value in zip(schema, args, strict=False)} | kwargs
            self._label(func, {arg.name: stated.get(arg.name, arg.default_value) for arg in schema}, result)
        return result

    def _label(self, func: Any, given: dict[str, Any], result: Any) -> None:
        """Label the results of an operation on ``given``, its arguments by name."""
        known = self.known
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name  # in place
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        results = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if name in ("mm", "addmm") and id(given["mat2"]) in self._matrices:
            self._layer(given["self" if name == "mm" else "mat1"], self._matrices[id(given["mat2"])][0], result)
        elif func in _TRANSPOSING and self._linear(given["self"]):
            self._matrices[id(result)] = known.layers[id(given["self"])], result
        elif not any(known.of(x) is not None for x in tensors):
            for x in results if not tensors else ():
                known.note(x, torch.full(x.shape, -1, device=x.device))  # may be written to
        elif name in _SAME or (name == "as_strided" and given["self"].shape == result.shape):
            known.note(result, self._of(given["self"]))
        elif name in _MOVES:
            self._move(func, name, given, results)
        elif name in _ALONG and "other" not in given:
            self._along(given, results)
        elif spatial := _SPATIAL.search(name):
            x = given["self"] if "self" in given else given["input"]
            merged = known.labels.merged(self._of(x), range(-int(spatial[1]), 0), known.cause())
            for y in results:
                known.note(y, merged.expand(y.shape))
        elif name in _PRODUCTS:
            self._product(name, given, result)
        elif torch.Tag.pointwise in func.tags or name in _POINTWISE:
            self._pointwise([x for x in given.values() if isinstance(x, Tensor)], results)
        elif name not in _NEW:
            known.mix(tensors)

    def _linear(self, x: Tensor) -> bool:
        """Return whether a tensor is the weight of a linear layer."""
        name = self.known.layers.get(id(x))
        return name is not None and isinstance(self.known.modules[name], nn.Linear)

    def _of(self, x: Tensor) -> Tensor:
        """Return the labels of a tensor, all -1 if it has none."""
        labels = self.known.of(x)
        return torch.tensor(-1, device=x.device).expand(x.shape) if labels is None else labels

    def _layer(self, x: Tensor, name: str, result: Tensor) -> None:
        """Label what a linear layer returns that multiplies by its weight itself."""
        labels = self.known.of(x)
        if labels is not None:
            self.known.reads(name, self.known.labels.merged(labels, [0], self.known.cause()).flatten().cpu())
        self.known.note(result, self.known.own(name).to(result.device).expand(result.shape))

    def _move(self, func: Any, name: str, given: dict[str, Any], results: list[Tensor]) -> None:
        """Move labels as the numbers of a tensor, or of several."""
        first, *rest = given
        if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            before = self._of(given[first])
            moved: Any = before.reshape(results[0].shape)
            self._split(before, moved)
        else:
            sources = pytree.tree_map_only(Tensor, self._of, given[first])
            others = {key: given[key] for key in rest} | ({"value": -1} if name == "constant_pad_nd" else {})
            moved = func(sources, **others)
        for x, labels in zip(results, moved if isinstance(moved, (tuple, list)) else [moved], strict=True):
            self.known.note(x, labels)

    def _split(self, before: Tensor, after: Tensor) -> None:
        """Couple the channels along one of two dimensions that were a single one."""
        split, labels = self.known.split, self.known.labels
        for dim in range(after.dim() - 1) if split and after.dim() == before.dim() + 1 else ():
            if after.flatten(dim, dim + 1).shape == before.shape and labels.vary(before, dim):
                labels.merged(after, [dim if split == "outer" else dim + 1])
                return

    def _along(self, given: dict[str, Any], results: list[Tensor]) -> None:
        """Join the channels along the dimensions that an operation combines."""
        if not any(y.is_floating_point() or y.is_complex() for y in results):
            return  # places of the largest, say: they belong to no channel
        x, dim = given.get("self", given.get("input")), given.get("dim")
        assert isinstance(x, Tensor)
        dims = {d % max(1, x.dim()) for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}  # none are all
        merged = self.known.labels.merged(self._of(x), dims, self.known.cause())
        for y in results:
            whole = y.dim() == x.dim()
            small = merged if whole else merged[tuple(0 if d in dims else slice(None) for d in range(x.dim()))]
            self.known.note(y, small.expand(y.shape))

    def _pointwise(self, tensors: list[Tensor], results: list[Tensor]) -> None:
        """Join the channels of numbers that are combined one by one."""
        total = self.known.labels.combined([self._of(x) for x in tensors], self.known.cause())
        for y in results:
            old, labels = self.known.of(y), total.expand(y.shape)
            if old is not None and 0 not in old.stride():  # it is written in place, maybe as a part of a larger tensor
                old.copy_(labels)
            else:
                self.known.note(y, labels)

    def _product(self, name: str, given: dict[str, Any], result: Tensor) -> None:
        """Join the channels that a product of matrices sums over, and those of both factors."""
        known, factors = self.known, [given[factor] for factor in _PRODUCTS[name]]
        labelled = [known.of(x) is not None for x in factors]
        parts = []
        for x, dim in zip(factors, (-1, -2), strict=True):
            labels = self._of(x)
            summed = known.labels.vary(labels, dim)
            labels = known.labels.merged(labels, [dim], known.cause())
            if all(labelled):  # the products of attention: what it reads leaves by whole heads
                known.labels.attend(labels, known.running[-1])
            elif summed:
                known.labels.fix(labels, known.cause())
                labels = torch.full_like(labels, -1)
            parts.append(labels)
        a, b = torch.broadcast_tensors(*parts)
        known.labels.join(a, b)
        total = torch.maximum(a, b)
        if "self" not in _PRODUCTS[name]:  # something is added
            total = known.labels.combined([total, self._of(given["self"])], known.cause())
        known.note(result, total.expand(result.shape))
