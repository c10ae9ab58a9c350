"""DTensors, which lie in pieces on many processes: recognise them, cut them up, put them together.

A process works on its *piece*, the local tensor. Every function takes plain tensors as well and returns them unchanged;
``torch.distributed`` is imported only when a DTensor is met.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether one of the tensors is a DTensor, which lies on many processes."""
    # A DTensor is recognised by its method to_local, so that plain tensors need no import of torch.distributed.
    return any(type(x) not in (Tensor, nn.Parameter) and hasattr(x, "to_local") for x in tensors)


def local_piece(x: Tensor) -> Tensor:
    """Return this process's piece of a DTensor, in the same memory; any other tensor unchanged."""
    if not is_sharded((x,)):
        return x
    piece: Tensor = x.to_local()  # type: ignore[attr-defined]
    return piece


def whole(x: Tensor) -> Tensor:
    """Return the whole of a DTensor, on every process; any other tensor unchanged. The result is detached."""
    if not is_sharded((x,)):
        return x.detach()
    values: Tensor = x.detach().full_tensor()  # type: ignore[attr-defined]
    return values


def placed_as(piece: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor that lies on processes as ``like`` does, and whose piece here is ``piece``.

    If ``like`` is whole on every process, return the piece itself.
    """
    if not is_sharded((like,)):
        return piece
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_as(values: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor cut as ``like`` is; every process has the whole, and the values of the first count."""
    if not is_sharded((like,)):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values, like.device_mesh, like.placements)


def gradient_piece(p: Tensor) -> Tensor:
    """Return this process's piece of a parameter's gradient, cut as the parameter is; zeros if there is no gradient."""
    if p.grad is None:
        return torch.zeros_like(local_piece(p))
    if not is_sharded((p,)):
        return p.grad.resolve_neg()  # the gradient itself, unless it is a view of the negative of another tensor
    from torch.distributed.tensor import DTensor

    gradient = p.grad
    assert isinstance(p, DTensor)
    assert isinstance(gradient, DTensor)
    if gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return gradient.to_local().resolve_neg()


def agreed(
    finite: Sequence[Tensor], present: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[list[bool], list[bool]]:
    """Return which gradients are finite on all processes, and which exist on some processes but not on all.

    Args:
        finite: for each gradient that exists here, whether it is finite, a boolean scalar tensor.
        present: for each tensor, whether it has a gradient here.
        tensors: parameters, at least one of them a DTensor.

    Returns:
        Two lists with an entry per tensor, the same on the processes of all meshes of the tensors.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    device = tensors[0].device
    exists = torch.tensor(present, device=device)
    ok = torch.ones_like(exists)
    if finite:
        ok[exists] = torch.stack(list(finite)).to(device)
    flags = torch.stack([ok, exists, ~exists]).to(torch.int32)  # (3, tensors)
    meshes = {x.device_mesh: None for x in tensors if isinstance(x, DTensor)}
    for mesh in meshes:
        flags = flags.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=mesh.get_group(dim))
    all_finite, all_exist, none_exist = (row.bool() for row in flags.cpu())
    return all_finite.tolist(), (~(all_exist | none_exist)).tolist()


def whole_copy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a layer whose DTensors become whole, uninitialised parameters on the CPU.

    The copy has none of the additions of ``fully_shard``, such as its hooks.

    Args:
        layer: the layer; it or layers inside may be wrapped by ``fully_shard``.
        memo: the memo of ``copy.deepcopy``, by id; copies are added to it.
    """
    from torch.distributed.fsdp import FSDPModule

    for child in layer.children():
        memo[id(child)] = whole_copy(child, memo)
    for p in layer.parameters(recurse=False):
        if is_sharded((p,)):
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), p.requires_grad)
    classes = type(layer).__mro__
    kind: Any = classes[classes.index(FSDPModule) + 1] if isinstance(layer, FSDPModule) else classes[0]
    copied = cast(nn.Module, kind.__new__(kind))
    nn.Module.__init__(copied)
    added = {name for name in vars(copied) if "hooks" in name}
    own = {n: v for n, v in vars(layer).items() if n not in added and not n.startswith("__composable_api_state_key")}
    copied.__dict__.update(copy.deepcopy(own, memo))
    return copied
