"""Facts about attention: which layers produce the heads of a module, and how many heads there are.

An attention module is recognised by its projections: linear layers for queries, keys and values, separate or packed in
one, or the packed weight of ``nn.MultiheadAttention``. Nothing else is assumed about its forward; the caller has to
verify that it is still right without some of its heads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_ROLES = {
    "query": ("q", "query", "queries", "wq"),
    "key": ("k", "key", "keys", "wk"),
    "value": ("v", "value", "values", "wv"),
    "packed": ("qkv", "wqkv", "query_key_value", "c_attn", "in"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
Layer = tuple[str, int]  # the name of a child and its number of outputs
_FILLERS = {"proj", "projection", "lin", "linear", "to", "fc", "layer", "w", "dense"}  # to_q, q_proj, linear_q, ...
_SIZES = {"dim", "size", "width", "channels", "features", "d"}


@dataclass(frozen=True)
class Projections:
    """The projections of an attention module and the number of heads in them.

    Args:
        query, key, value: names of child layers; three times the same if one layer packs them all, and "" if the
            module holds the packed weight itself.
        heads: number of heads of keys and values. Each is read by ``readers`` heads of queries and can only be removed
            together with them.
        readers: heads of queries per head of keys; 1 except in grouped-query attention.
        size: number of channels of a head of queries.
        attributes: (name, amount per head) of the module's integers that depend on the number of heads.
    """

    query: str
    key: str
    value: str
    heads: int
    readers: int
    size: int
    attributes: tuple[tuple[str, int], ...]

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values are rows of one weight."""
        return self.query == self.value


def projections(module: nn.Module) -> Projections | None:
    """Return the projections of a module; None if it is not recognised as attention."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module)
    children: dict[str, Layer] = {}
    for name, child in module.named_children():
        words = [word for word in name.lower().split("_") if word not in _FILLERS]
        width = linear_width(_inner(child))
        role = _ROLE_OF.get(name.lower()) or _ROLE_OF.get("_".join(words))
        if width is not None and role is not None:
            children.setdefault(role, (name, width))
    if {"query", "key", "value"} <= set(children):
        return _separate(module, children["query"], children["key"], children["value"])
    if "packed" in children:
        return _packed(module, *children["packed"])
    return None


def _inner(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter wraps, such as peft's, or the module itself."""
    return module._modules.get("base_layer") or module


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is the ``Conv1D`` of transformers: a linear layer with weight (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")  # if it is not loaded, there is no such layer
    return library is not None and isinstance(module, library.Conv1D)


def linear_width(module: nn.Module) -> int | None:
    """Return the number of outputs of a linear layer, None for every other module."""
    if isinstance(module, nn.Linear):
        return module.out_features
    weight = module._parameters["weight"] if is_conv1d(module) else None
    return None if weight is None else weight.shape[1]


# --- how many heads ---------------------------------------------------------------------------------------------------


def _multihead(module: nn.MultiheadAttention) -> Projections | None:
    weight = module._parameters.get("in_proj_weight")
    if weight is None or module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return None
    heads = len(weight) // (3 * module.head_dim)
    return Projections("", "", "", heads, 1, module.head_dim, ())


def _separate(module: nn.Module, query: Layer, key: Layer, value: Layer) -> Projections | None:
    (_, queries), (_, keys), (_, values) = query, key, value
    size = _size(module) or _over(queries, _count(module))
    if size is None or queries % size or keys % size:
        return None
    return _projections(module, (query[0], key[0], value[0]), queries // size, keys // size, size, values)


def _packed(module: nn.Module, name: str, width: int) -> Projections | None:
    size, count, groups = _size(module), _count(module), _count(module, of_keys=True)
    if count is None:
        count = _over(width, 3 * size) if size else None
    if count is None:
        return None
    size = size or _over(width, count + 2 * (groups or count))
    if size is None or width % size or (width // size - count) % 2:
        return None
    kv = (width // size - count) // 2
    return _projections(module, (name, name, name), count, kv, size, kv * size)


def _projections(
    module: nn.Module, names: tuple[str, str, str], queries: int, heads: int, size: int, values: int
) -> Projections | None:
    """Return projections with these numbers of heads of queries and of keys; None if the numbers are inconsistent."""
    if not heads or queries % heads or values % heads or _count(module) not in (None, queries):
        return None
    attributes = []
    for name, value, words in _numbers(module):
        expected = heads if _of_keys(words) else queries
        counts = _counts_heads(words) and value == expected
        if counts or (_is_width(words) and value == expected * size):
            attributes.append((name, value // heads))
    return Projections(*names, heads, queries // heads, size, tuple(attributes))


def _numbers(module: nn.Module) -> Iterator[tuple[str, int, set[str]]]:
    """Yield, for each positive integer attribute of the module, its name, its value and the words of its name.

    So for the numbers of heads in its configuration that it has no attributes of its own for: ``config.num_heads``.
    """
    own = vars(module)
    for name, value in own.items():
        if type(value) is int and value > 0:
            yield name, value, set(name.lower().split("_"))
    for name, value in vars(own["config"]).items() if hasattr(own.get("config"), "__dict__") else ():
        words = set(name.lower().split("_"))
        if type(value) is int and value > 0 and name not in own and _counts_heads(words):
            yield f"config.{name}", value, words


def _count(module: nn.Module, *, of_keys: bool = False) -> int | None:
    counts = (n for _, n, words in _numbers(module) if _counts_heads(words) and _of_keys(words) == of_keys)
    return next(counts, None)


def _size(module: nn.Module) -> int | None:
    return next(
        (n for _, n, words in _numbers(module) if _of_head(words) and words & _SIZES and "all" not in words), None
    )


def _of_head(words: set[str]) -> bool:
    return bool(words & {"head", "heads", "nhead", "nheads"})


def _of_keys(words: set[str]) -> bool:
    return "kv" in words or {"key", "value"} <= words


def _counts_heads(words: set[str]) -> bool:
    return _of_head(words) and not words & (_SIZES | {"group", "groups"})


def _is_width(words: set[str]) -> bool:
    return bool(words & _SIZES) and (not _of_head(words) or "all" in words)


def _over(a: int, b: int | None) -> int | None:
    return a // b if b and a % b == 0 else None
