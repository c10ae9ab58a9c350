"""The labelled tensors of a forward pass, and what layers do with their channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pliant.structure.labels import Labels
from pliant.structure.layers import axes, axis_length, obstacle_to_cutting, tied_parameters, weighted_layers


class Labelled:
    """What is known of the channels of a network while it runs.

    Args:
        model: the network, which may be changed.
        split: which channels leave together where a tensor gets one more dimension: those along the ``"outer"`` or the
            ``"inner"`` one of the two, as for a forward that names its length; ``""``: none.

    Attributes:
        labels: the classes of all channels.
        made: layer → the labels of its own channels, in order of the first call.
        read: layer → the labels of the channels that its columns read.
        called: names of the modules that were called.
        running: names of the modules that run now, the innermost last.
        paused: whether what is computed now is no matter of labels.
        layers: id of a weight → the first layer that has it.
        operands: the parameters that the function that runs now is given.
    """

    def __init__(self, model: nn.Module, split: str = "") -> None:
        self.model, self.split = model, split
        self.modules = dict(model.named_modules())
        self.labels = Labels()
        self.made: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self.running: list[str] = []
        self.paused = False
        self.operands: list[nn.Parameter] = []
        self.layers: dict[int, str] = {}
        for name, module in weighted_layers(model):
            if "outputs" in axes(module) and module._parameters.get("weight") is not None:
                self.layers.setdefault(id(module._parameters["weight"]), name)
        self._of: dict[int, tuple[Tensor, Tensor]] = {}  # id → the tensor, so that its id stays its own, and its labels
        self._readers: dict[str, set[str]] = {}
        self._outputs: dict[int, str] = {}
        tied = tied_parameters(model)
        self._obstacles = {name: obstacle_to_cutting(m, tied) for name, m in self.modules.items() if axes(m)}
        self._free = {
            id(p): name
            for name, p in model.named_parameters()
            if p.dim() > 1 and not axes(self.modules[name.rpartition(".")[0]])
        }

    @property
    def norms(self) -> dict[str, str]:
        """Layer → name of the BatchNorm that is the only reader of its output."""
        single = {name: next(iter(readers)) for name, readers in self._readers.items() if len(readers) == 1}
        return {name: norm for name, norm in single.items() if norm in self.made}

    def forget(self) -> None:
        """Let go of all tensors."""
        self._of.clear()
        self._outputs.clear()

    def of(self, tensor: Any) -> Tensor | None:
        """Return the labels of a tensor, None without any."""
        _, labels = self._of.get(id(tensor), (None, None))
        return labels

    def note(self, tensor: Any, labels: Tensor) -> None:
        """Give a tensor labels."""
        if isinstance(tensor, Tensor):
            assert tensor.shape == labels.shape, (tensor.shape, labels.shape)
            self._of[id(tensor)] = tensor, labels

    def cause(self) -> str:
        """Return in words what joins channels now."""
        free = next((self._free[id(p)] for p in self.operands if id(p) in self._free), None)
        if free is not None:
            return f"the free parameter {free!r} shares its channels"
        name = next((name for name in reversed(self.running) if name), "")
        kind = type(self.modules[name]).__name__
        which = f"the {kind} {name!r}" if name else f"the forward of {kind}"
        return f"{which} does not treat its channels one by one"

    def mix(self, tensors: Sequence[Any]) -> None:
        """Note that tensors are read in a way that is not known."""
        for tensor in tensors:
            labels = self.of(tensor)
            if labels is not None:
                self.labels.fix(labels, self.cause())

    def own(self, name: str) -> Tensor:
        """Return the labels of a layer's channels."""
        if name not in self.made:
            self.made[name] = self.labels.fresh(axis_length(self.modules[name], "outputs"))
            self._hold(name, self.made[name])
        return self.made[name]

    def reads(self, name: str, columns: Tensor) -> None:
        """Note which channels the columns of a layer read, in one of its calls."""
        self._hold(name, columns)
        known = self.read.get(name)
        self.read[name] = columns if known is None else self.labels.combined([known, columns], self.cause())

    def _hold(self, name: str, labels: Tensor) -> None:
        """Note that channels cannot leave if the layer that makes or reads them cannot be cut."""
        if self._obstacles.get(name):
            self.labels.fix(labels, f"{name!r} {self._obstacles[name]}")

    def sees(self, tensors: Sequence[Tensor], reader: str) -> None:
        """Note who reads the output of a layer: the name of a norm, or "" for anything else."""
        for tensor in tensors:
            if id(tensor) in self._outputs:
                self._readers.setdefault(self._outputs[id(tensor)], set()).add(reader)

    def produced(self, name: str, result: Tensor) -> None:
        """Note that a tensor is the output of a layer."""
        self._outputs[id(result)] = name
