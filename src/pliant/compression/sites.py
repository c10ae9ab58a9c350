"""The maps of a small network that can be fitted, and which map of the dense network each has to agree with.

A convolution with many columns (:data:`WIDE`) that has lost channels is fitted in its channels only: the channels of
the dense network that it would read are estimated from those that are left, x ≈ T x', and the weight becomes W T at
every kernel position. The error of an estimate counts as much as the weight multiplies it,

    min_T E‖R (x − T x' − t)‖²    with R = (Σ_k W_kᵀ W_k)^½,

so that ``fitting`` applies with targets R x. So a wide layer has few unknowns, and costs little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.compression.factored import FactoredConvolution, FactoredLinear
from pliant.compression.moments import MAX_COLUMNS
from pliant.compression.observing import LinearMap, linear_map, map_names
from pliant.compression.plan import Plan
from pliant.structure import obstacle, tied_parameters

WIDE = 1152  # columns
_RANK = 1e-10  # share of the largest eigenvalue of Σ_k W_kᵀ W_k below which it counts as zero


@dataclass(frozen=True, eq=False)
class Frame:
    """The weight of a dense convolution as a map of its input channels.

    Args:
        weight: the weight, its filters those that are left (filters, channels, *kernel).
        bias: the bias of these filters, or None.
    """

    weight: Tensor
    bias: Tensor | None

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        matrix = self._rows(self.weight)
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        return values.clamp(min=0.0), vectors

    @cached_property
    def root(self) -> Tensor:
        """R, float64 (channels, channels)."""
        values, vectors = self._eigen
        root: Tensor = vectors * values.sqrt() @ vectors.T
        return root

    @cached_property
    def columns(self) -> Tensor:
        """W R⁺, float64 (filters · kernel positions, channels)."""
        values, vectors = self._eigen
        inverse = torch.where(values > _RANK * values.amax(), values, torch.inf).rsqrt()
        columns: Tensor = self._rows(self.weight) @ (vectors * inverse @ vectors.T)
        return columns

    def estimate(self, weight: Tensor) -> Tensor:
        """Return R T of a weight W T, float64 (1, channels, channels left)."""
        return (self.columns.T @ self._rows(weight)).unsqueeze(0)

    def weights(self, estimate: Tensor, shape: torch.Size) -> Tensor:
        """Return the weight W T of the given shape, where ``estimate`` is R T."""
        flat: Tensor = self.columns @ estimate.squeeze(0)
        weight: Tensor = flat.unflatten(0, (shape[0], *shape[2:])).movedim(-1, 1)
        return weight

    def outputs(self, means: Tensor) -> Tensor:
        """Return the means of the outputs that inputs with the means R x, (1, channels), add to: (filters,)."""
        flat: Tensor = self.columns @ means.squeeze(0)
        return flat.view(len(self.weight), -1).sum(1)

    @staticmethod
    def _rows(weight: Tensor) -> Tensor:
        return weight.double().movedim(1, -1).flatten(0, -2)


@dataclass(frozen=True, eq=False)
class Site:
    """A map of the small network that can be fitted.

    Args:
        name: its name in the small network.
        source: the name of the dense map whose outputs it has.
        kept: which outputs of the dense map are left, int64; None for all.
        frame: what it is fitted in if that is its channels; None for its columns.
    """

    name: str
    source: str
    kept: Tensor | None
    frame: Frame | None = None


def sites(model: nn.Module, small: nn.Module, plan: Plan, wide: int) -> tuple[list[Site], list[tuple[str, str]]]:
    """Return the maps that can be fitted, and (name, reason) for the others.

    Args:
        model: the dense network.
        small: the network that ``plan`` makes of it.
        plan: the plan.
        wide: the number of columns up to which a convolution that has lost channels is fitted in its columns.
    """
    outputs, inputs = _kept(plan, "outputs"), _kept(plan, "inputs")
    tied = tied_parameters(small)
    modules = dict(small.named_modules())
    found: list[Site] = []
    unfitted: list[tuple[str, str]] = []
    for source in map_names(model):
        module = modules.get(source)
        name = source
        if isinstance(module, (FactoredLinear, FactoredConvolution)):
            name = f"{source}.expand".lstrip(".")
        now = None if module is None else linear_map(small, name)
        dense = linear_map(model, source)
        if now is None or dense is None:
            unfitted.append((source, "has no weights that can be fitted"))
            continue
        kept = outputs.get(source)
        if name != source and name in outputs:  # the factorised layer has lost outputs
            kept = outputs[name] if kept is None else kept[outputs[name]]
        reason = _unfit(now, tied)
        if reason is None and len(now.weight) != len(dense.weight if kept is None else kept):
            reason = "has other outputs than the dense layer"
        frame = None
        if reason is None and name == source and now.weight[0].numel() > wide:
            frame = _frame(now, dense, kept, inputs.get(source))
        most = MAX_COLUMNS["convolution" if isinstance(now.layer, _ConvNd) else "linear"]
        if reason is None and frame is None and now.weight[0].numel() > most:
            reason = f"has {now.weight[0].numel()} columns, more than {most}"
        if reason is None:
            found.append(Site(name, source, kept, frame))
        else:
            unfitted.append((source, reason))
    return found, unfitted


def _frame(now: LinearMap, dense: LinearMap, outputs: Tensor | None, inputs: Tensor | None) -> Frame | None:
    """Return the frame of a convolution that has lost channels and is the same otherwise; None for any other map."""
    if not isinstance(now.layer, _ConvNd) or now.layer.groups > 1:
        return None
    weight, bias = dense.weight, dense.bias
    if outputs is not None:
        weight = weight[outputs.to(weight.device)]
        bias = None if bias is None else bias[outputs.to(bias.device)]
    cut = weight if inputs is None else weight[:, inputs.to(weight.device)]
    return Frame(weight, bias) if cut.shape == now.weight.shape and torch.equal(cut, now.weight) else None


def _unfit(found: LinearMap, tied: frozenset[int]) -> str | None:
    """Return why a map cannot be fitted, or None."""
    if isinstance(found.layer, _ConvTransposeNd):
        return "is a transposed convolution"
    if isinstance(found.layer, nn.MultiheadAttention):
        shared = any(id(p) in tied for p in found.layer.parameters(recurse=False))
        return "shares a parameter with another layer" if shared else None
    return obstacle(found.layer, tied)


def _kept(plan: Plan, axis: str) -> Mapping[str, Tensor]:
    """Return which outputs or inputs of each layer are left after a plan, for layers that lose some; int64 (n,).

    A layer whose channels are zeroed in place of removed has as many as before, and is not in the result.
    """
    kept: dict[str, Tensor] = {}
    for link in plan.links or (plan,):
        for layer in link.layers:
            left = getattr(layer, axis)
            if left is not None and layer.params < layer.params_dense:
                positions = torch.tensor(left)
                kept[layer.name] = kept[layer.name][positions] if layer.name in kept else positions
    return kept
