"""Labels: to which channel every number of a tensor belongs.

A label tensor has the shape of the tensor that it describes. Each entry is the number of a channel, or -1 for a number
that belongs to none, such as an input or a constant. What reshapes a tensor reshapes its labels alike. What combines
numbers joins their channels to one class: they can only leave together::

    labels = Labels()
    a, b = labels.fresh(4), labels.fresh(4)     the channels of two layers
    labels.join(a, b)                           they are added: channel 0 of one is coupled to channel 0 of the other
    labels.merged(a.view(2, 2), [1])            a sum over pairs of channels: each pair is one class now
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Labels:
    """The channels of a network, in classes of those that can only leave together."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._seen: set[tuple[int, int]] = set()
        self.fixed: dict[int, str] = {}  # channel → why its class cannot leave
        self.causes: dict[int, str] = {}  # channel → what joined the channels of its tensor with each other
        self.attended: list[tuple[int, str]] = []  # channel whose class attention reads, and the module that does so

    def fresh(self, count: int) -> Tensor:
        """Return the labels of new channels, each a class of its own: int64 (count,)."""
        start = len(self._parent)
        self._parent += range(start, start + count)
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """Return the first channel of the class of a channel."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def roots(self, labels: Tensor) -> list[int]:
        """Return the first channel of the class of each label in a vector, -1 where there is no channel."""
        return [self.root(label) if label >= 0 else -1 for label in labels.tolist()]

    def join(self, a: Tensor, b: Tensor) -> bool:
        """Join the classes of the channels at the same places of two tensors, which broadcast; return if any was new.

        No channel, -1, is joined to nothing.
        """
        a, b = compact(*torch.broadcast_tensors(a, b))
        apart = (a != b) & (a >= 0) & (b >= 0)
        if not apart.any():
            return False
        size = len(self._parent)
        pairs = torch.unique(a[apart] * size + b[apart]).tolist()
        new = False
        for pair in pairs:
            first, second = divmod(pair, size)
            if (first, second) not in self._seen:
                self._seen.add((first, second))
                x, y = sorted((self.root(first), self.root(second)))
                self._parent[y] = x
                new |= x != y
        return new

    def merged(self, labels: Tensor, dims: Iterable[int], cause: str = "") -> Tensor:
        """Join all channels along some dimensions; return the labels with these dimensions of length 1."""
        dims = sorted({dim % labels.dim() for dim in dims}) if labels.dim() else []
        if not dims or not labels.numel():
            return labels
        small = compact(labels)[0]
        first = small.amax(dims, keepdim=True)
        if self.join(small, first) and cause:
            for label in torch.unique(first).tolist():
                self.causes.setdefault(label, cause)
        return first.expand([1 if dim in dims else length for dim, length in enumerate(labels.shape)])

    def combined(self, labels: Sequence[Tensor], cause: str) -> Tensor:
        """Join the channels of tensors that are combined number by number; return the labels of the result.

        A single channel that is combined with many others, such as a map of attention over places, is coupled to none
        of them: it can never leave, and the others are free.
        """
        total = labels[0]
        for other in labels[1:]:
            a, b = self._lone(total, other, cause), self._lone(other, total, cause)
            a, b = torch.broadcast_tensors(a, b)
            self.join(a, b)
            x, y = compact(a, b)
            total = torch.maximum(x, y).expand(a.shape)
        return total

    def _lone(self, labels: Tensor, other: Tensor, cause: str) -> Tensor:
        """Return labels, or none at all if they are one channel that is combined with many of the other tensor."""
        for dim in range(1, other.dim() + 1):
            single = dim > labels.dim() or labels.shape[-dim] == 1
            if single and other.shape[-dim] > 1 and self.vary(other, -dim):
                self.fix(labels, cause)
                return torch.full_like(labels, -1)
        return labels

    def vary(self, labels: Tensor, dim: int) -> bool:
        """Return whether labels along a dimension are of different classes."""
        (small,) = compact(labels)
        if not small.numel() or not bool((small != small.narrow(dim, 0, 1)).any()):
            return False
        numbers, places = torch.unique(small, return_inverse=True)
        classes = torch.tensor(self.roots(numbers))[places.cpu()]
        return bool((classes != classes.narrow(dim, 0, 1)).any())

    def fix(self, labels: Tensor, why: str) -> None:
        """Note that the classes of some channels cannot leave."""
        for label in torch.unique(compact(labels)[0]).tolist():
            if label >= 0:
                self.fixed.setdefault(label, why)

    def attend(self, labels: Tensor, module: str) -> None:
        """Note that attention reads some channels, in the module of this name."""
        self.attended += [(label, module) for label in torch.unique(compact(labels)[0]).tolist() if label >= 0]

    def by_root(self, notes: dict[int, str]) -> dict[int, str]:
        """Return what is noted of channels as notes of their classes; the first note of a class holds."""
        found: dict[int, str] = {}
        for label, note in notes.items():
            found.setdefault(self.root(label), note)
        return found


def compact(*labels: Tensor) -> list[Tensor]:
    """Return label tensors of equal shape with length 1 in the dimensions along which all are constant for sure."""
    for dim in range(labels[0].dim()):
        if labels[0].shape[dim] > 1 and all(x.stride(dim) == 0 for x in labels):
            labels = tuple(x.narrow(dim, 0, 1) for x in labels)
    return list(labels)
