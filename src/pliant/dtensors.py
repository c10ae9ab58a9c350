"""Tensors that lie in pieces on many processes (DTensors): told apart, taken apart, put together.

A process works on its *piece*, the local tensor. Only what meets a DTensor imports ``torch.distributed``: everything
here takes plain tensors as well, and hands them back as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of the tensors is a DTensor, which lies on many processes."""
    # It is known by its method to_local, so that plain tensors need no import of torch.distributed.
    return any(type(x) not in (Tensor, nn.Parameter) and hasattr(x, "to_local") for x in tensors)


def local_piece(x: Tensor) -> Tensor:
    """Return this process's piece of a DTensor, in the same memory; any other tensor itself."""
    if not is_sharded((x,)):
        return x
    piece: Tensor = x.to_local()  # type: ignore[attr-defined]
    return piece


def whole(x: Tensor) -> Tensor:
    """Return the whole of a DTensor, on every process; any other tensor itself. Without gradient."""
    if not is_sharded((x,)):
        return x.detach()
    values: Tensor = x.detach().full_tensor()  # type: ignore[attr-defined]
    return values


def placed_as(piece: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor that lies on processes as ``like`` does, of which this is the piece here.

    The piece itself where ``like`` is whole on every process.
    """
    if not is_sharded((like,)):
        return piece
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_as(values: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, the same on every process, cut as ``like`` is; the first process's values count."""
    if not is_sharded((like,)):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values, like.device_mesh, like.placements)


def gradient_piece(p: Tensor) -> Tensor:
    """Return this process's piece of the gradient of a parameter, cut as the parameter is; 0 where there is none."""
    if p.grad is None:
        return torch.zeros_like(local_piece(p))
    if not is_sharded((p,)):
        return p.grad
    from torch.distributed.tensor import DTensor

    gradient = p.grad
    assert isinstance(p, DTensor)
    assert isinstance(gradient, DTensor)
    if gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return gradient.to_local()


def agreed(
    finite: Sequence[Tensor], present: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[list[bool], list[bool]]:
    """Return which gradients are finite on all processes, and which exist on some processes but not on all.

    Args:
        finite: of each gradient that exists here, a boolean scalar tensor.
        present: of each tensor, whether it has a gradient here.
        tensors: parameters, at least one a DTensor; the processes of all their meshes get the same answer.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    device = tensors[0].device
    there = torch.tensor(present, device=device)
    ok = torch.ones_like(there)
    if finite:
        ok[there] = torch.stack(list(finite)).to(device)
    flags = torch.stack([ok, there, ~there]).to(torch.int32)
    meshes = {x.device_mesh: None for x in tensors if isinstance(x, DTensor)}
    for mesh in meshes:
        flags = flags.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=mesh.get_group(dim))
    everywhere, all_there, none_there = (row.bool() for row in flags.cpu())
    return everywhere.tolist(), (~(all_there | none_there)).tolist()


def whole_copy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a layer with whole parameters on the CPU, whose values are not set, for its DTensors.

    What ``fully_shard`` has added to the layer, its hooks among them, stays behind.

    Args:
        layer: it, or layers inside, may be wrapped.
        memo: of copy.deepcopy, by id; copies are added.
    """
    from torch.distributed.fsdp import FSDPModule

    for child in layer.children():
        memo[id(child)] = whole_copy(child, memo)
    for p in layer.parameters(recurse=False):
        if is_sharded((p,)):
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    classes = type(layer).__mro__
    kind: Any = classes[classes.index(FSDPModule) + 1] if isinstance(layer, FSDPModule) else classes[0]
    copied = cast(nn.Module, kind.__new__(kind))
    nn.Module.__init__(copied)
    added = {name for name in vars(copied) if "hooks" in name}
    own = {n: v for n, v in vars(layer).items() if n not in added and not n.startswith("__composable_api_state_key")}
    copied.__dict__.update(copy.deepcopy(own, memo))
    return copied
