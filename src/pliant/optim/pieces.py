"""How the tensors of one ball lie on processes, and the communication between processes about their pieces.

Every process makes the same calls with tensors of the same sizes, whatever it holds: pieces may be uneven or empty.
Sums over processes are taken in the order of processes, so that all get the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.functional import pad

from pliant.linalg import common_dtype, long_norm, power_of_two_scale, vector_norm
from pliant.norms import Shape


class Pieces:
    """How J tensors lie on processes.

    Args:
        tensors: the parameters, all DTensors of one mesh. Each is cut along one of its dimensions, or not at all, and
            all cuts are over the same dimension of the mesh. Other dimensions of the mesh hold replicas (HSDP).
        names: the names of the parameters, for messages.

    Raises:
        ValueError: the placement of the tensors is not supported.

    Attributes:
        cut: for each tensor, whether it is cut.
        sizes: for each tensor, the number of rows of a piece; the last pieces may be smaller.
        spans: for each tensor, the (start, stop) of the rows of this process.
        by_rows: whether all tensors are cut along dim 0.
    """

    def __init__(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        cut_over = _check_placements(tensors, names)
        first = cast(DTensor, tensors[0])
        self.mesh: DeviceMesh = first.device_mesh
        self.placements = [cast(DTensor, x).placements for x in tensors]
        self.shapes: list[Shape] = [x.shape for x in tensors]
        self._strides = [x.stride() for x in tensors]
        self.group: Any = self.mesh.get_group(cut_over)
        self.rank, self.processes = self.mesh.get_local_rank(cut_over), self.mesh.size(cut_over)
        dims = [next((p.dim for p in placed if isinstance(p, Shard)), None) for placed in self.placements]
        self.cut = [dim is not None for dim in dims]
        self.by_rows = all(dim == 0 for dim in dims)
        # As in torch.chunk, pieces are of equal size, except the last ones.
        self.sizes = [math.ceil(shape[0] / self.processes) if shape else 1 for shape in self.shapes]
        self.spans = [
            (min(self.rank * size, shape[0]), min((self.rank + 1) * size, shape[0])) if shape else (0, 1)
            for size, shape in zip(self.sizes, self.shapes, strict=True)
        ]

    # --- numbers about all pieces ---

    def length(self, tensors: Sequence[Tensor], cut: Sequence[bool] | None = None) -> Tensor:
        """Return the L2 norm of all entries on all processes, (1,), safe from overflow and underflow.

        Args:
            tensors: pieces, of any shapes.
            cut: which of them are pieces; the others are the same everywhere and count once. None: as for the tensors
                of the ball.
        """
        scale, norms = self._scaled_norms(tensors, cut)
        return (scale * vector_norm(norms)).view(1)

    def well_scaled(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the L2 norm over all processes, (1,), and tensors divided by a power of two near the largest entry.

        Half precision becomes float32, mixed dtypes the widest of them.
        """
        dtype = common_dtype(tensors)
        tensors = [x.to(dtype) for x in tensors]
        scale, norms = self._scaled_norms(tensors, None)
        return (scale * vector_norm(norms)).view(1), [x / or_one(scale) for x in tensors]

    def _scaled_norms(self, tensors: Sequence[Tensor], cut: Sequence[bool] | None) -> tuple[Tensor, Tensor]:
        """Return a scale for all entries, and the L2 norm of each process's entries divided by it, (processes,)."""
        scale = scale_of(tensors)
        counted = self.own(tensors, cut)
        flat = torch.cat([(x / or_one(scale)).flatten() for x in counted]) if counted else scale.new_zeros(0)
        received = self.gather(torch.stack([scale, long_norm(flat, 2)]))
        scales, norms = received.unbind(dim=1)
        scale = scales.amax()
        return scale, norms * (scales / or_one(scale))

    def own(self, tensors: Sequence[Tensor], cut: Sequence[bool] | None) -> list[Tensor]:
        """Return the summands of this process: its pieces, and on the first process the uncut tensors; others are 0."""
        cut = self.cut if cut is None else cut
        return [x if is_cut or self.rank == 0 else torch.zeros_like(x) for x, is_cut in zip(tensors, cut, strict=True)]

    def sum(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the sum over tensors and processes, a scalar tensor; ``terms`` are scalar tensors, one per piece."""
        return self.gather(torch.stack(self.own(terms, None)).sum().view(1)).sum()

    # --- from piece to whole and back ---

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (n,) of all processes, (processes, n)."""
        received = values.new_empty(self.processes * len(values))
        dist.all_gather_single(received, values.contiguous(), group=self.group)
        return received.view(self.processes, -1)

    def all_rows(self, parts: Sequence[Tensor], cut: Sequence[bool]) -> list[Tensor]:
        """Return the parts with the rows of all processes, (1, all rows, columns).

        Args:
            parts: (1, rows here, columns).
            cut: which of them are cut; the others are returned as they are.
        """
        result = []
        for x, is_cut, size, shape in zip(parts, cut, self.sizes, self.shapes, strict=True):
            if is_cut:
                padded = pad(x, (0, 0, 0, size - x.shape[1]))
                x = self.gather(padded.flatten()).view(1, -1, x.shape[2])[:, : shape[0]]
            result.append(x)
        return result

    def own_rows(self, parts: Sequence[Tensor], cut: Sequence[bool]) -> list[Tensor]:
        """Return the rows of this process, of the parts that are cut; the inverse of :meth:`all_rows`."""
        return [x[:, slice(*span)] if is_cut else x for x, is_cut, span in zip(parts, cut, self.spans, strict=True)]

    def summed(self, parts: Sequence[Tensor], over: Sequence[bool]) -> list[Tensor]:
        """Return the parts, with those marked in ``over`` summed over processes."""
        sums = [x.contiguous() if is_over else x for x, is_over in zip(parts, over, strict=True)]
        for x, is_over in zip(sums, over, strict=True):
            if is_over:
                dist.all_reduce(x, group=self.group)
        return sums

    def added(self, parts: Sequence[Tensor], over: Sequence[bool]) -> Tensor:
        """Return the sum (1, n) of all parts (1, n), with those marked in ``over`` summed over processes as well."""
        if not any(over):
            return torch.stack(list(parts)).sum(dim=0)
        own = torch.stack(self.own(parts, over)).sum(dim=0)
        return self.gather(own.flatten()).sum(dim=0, keepdim=True)

    def whole(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Return the whole tensors, put together on every process."""
        return [
            DTensor.from_local(
                x.contiguous(), self.mesh, placed, run_check=False, shape=torch.Size(shape), stride=stride
            ).full_tensor()
            for x, placed, shape, stride in zip(pieces, self.placements, self.shapes, self._strides, strict=True)
        ]

    def cut_up(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's pieces of whole tensors, which must be the same on every process."""
        everywhere = [Replicate()] * self.mesh.ndim
        pieces = []
        for x, placed in zip(wholes, self.placements, strict=True):
            spread = DTensor.from_local(x.contiguous(), self.mesh, everywhere, run_check=False)
            pieces.append(spread.redistribute(placements=placed).to_local())
        return pieces


def _check_placements(tensors: Sequence[Tensor], names: Sequence[str]) -> int:
    """Return the dimension of the mesh that tensors are cut over; raise ValueError if that is not supported."""
    mesh: DeviceMesh | None = None
    cut_over: dict[int, str] = {}
    for x, name in zip(tensors, names, strict=True):
        if not isinstance(x, DTensor):
            raise ValueError(
                f"{name} is whole on every process, but {names[0]} of the same joint ball is a DTensor: shard all "
                "tensors of a joint ball, or give them balls of their own"
            )
        if mesh is None:
            mesh = x.device_mesh
        elif x.device_mesh != mesh:
            raise ValueError(
                f"{name} lies on {x.device_mesh}, but {names[0]} of the same joint ball on {mesh}: shard all tensors "
                "of a joint ball over one mesh, or give them balls of their own"
            )
        cuts = []
        for dim, placement in enumerate(x.placements):
            if isinstance(placement, Shard):
                cuts.append(dim)
            elif not isinstance(placement, Replicate):
                raise ValueError(
                    f"SFW cannot constrain {name} placed as {placement}: redistribute it to Shard or Replicate first"
                )
        if len(cuts) > 1:
            raise ValueError(
                f"{name} is cut over {len(cuts)} dimensions of its mesh (placements {x.placements}), as a tensor "
                "parallel layer under FSDP is: SFW constrains tensors cut over one; shard this layer with fully_shard "
                "alone, or put it in a group without a ball"
            )
        cut_over.update(dict.fromkeys(cuts, name))
    if len(cut_over) > 1:
        raise ValueError(
            f"{' and '.join(cut_over.values())} of one joint ball are cut over different dimensions of their mesh: "
            "give them balls of their own"
        )
    return next(iter(cut_over), 0)


def scale_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return a power of two near the largest entry, a scalar tensor; 0 if all entries are 0."""
    filled = [x for x in tensors if x.numel()]
    if not filled:
        return tensors[0].new_zeros(())
    largest = torch.stack([vector_norm(x, math.inf) for x in filled]).amax()
    return torch.where(largest == 0, largest, power_of_two_scale(filled))


def or_one(scale: Tensor) -> Tensor:
    """Return the scale, but 1 where it is 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
