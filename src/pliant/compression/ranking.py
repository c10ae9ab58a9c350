"""What channels are worth by their weights: norms of their filters, and shares in the energy of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pliant.structure import ChannelGroup, axes


def importances(model: nn.Module, group: ChannelGroup, importance: str) -> Tensor:
    """Return the norm of each channel over the filters of all producers, float64 of shape (channels,)."""
    norms = torch.stack(_norms(model, group, importance))
    return norms.sum(0) if importance == "l1" else norms.square().sum(0).sqrt()


def energies(model: nn.Module, group: ChannelGroup, importance: str) -> Tensor:
    """Return each channel's share of its layer's squared norms, summed over the producers, shape (channels,)."""
    squares = torch.stack(_norms(model, group, importance)).square()
    tiny = torch.finfo(squares.dtype).tiny  # a layer of zeros gives shares of 0
    return (squares / squares.sum(1, keepdim=True).clamp(min=tiny)).sum(0)


def _norms(model: nn.Module, group: ChannelGroup, importance: str) -> list[Tensor]:
    """Return the norms of the filters of each producer, float64 of shape (channels,)."""
    norms = []
    for slot in group.producers:
        module = model.get_submodule(slot.module)
        if not slot.tensors or isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)):
            continue
        weight, dim = axes(module)["outputs"].tensors[0]
        filters = getattr(module, weight).detach().movedim(dim, 0).flatten(1).double().cpu()  # (filters, entries)
        if importance == "bn" and slot.norm is not None:
            filters = filters * _scale(model.get_submodule(slot.norm)).unsqueeze(1)
        rows = filters[slot.indices].flatten(1)  # (channels, width · entries)
        norms.append(rows.abs().sum(1) if importance == "l1" else rows.square().sum(1).sqrt())
    return norms


def _scale(norm: nn.Module) -> Tensor:
    """Return |γ|/√(σ² + ε) of a BatchNorm, float64 of shape (channels,); a missing γ or σ counts as 1."""
    assert isinstance(norm, _NormBase)  # coupled_channels names no other modules
    scale = torch.ones(norm.num_features, dtype=torch.float64)
    if norm.weight is not None:
        scale *= norm.weight.detach().double().cpu().abs()
    if norm.running_var is not None:
        scale /= (norm.running_var.double().cpu() + norm.eps).sqrt()
    return scale


def weakest_first(scores: Tensor) -> Tensor:
    """Return the channels in the order of removal: ascending score, the higher index first among equals."""
    return len(scores) - 1 - scores.flip(0).argsort(stable=True)
