"""The oracle over tensors that this process has whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.linalg import readable
from pliant.norms import Channels, Norm, NormBall, Rows, Spectral
from pliant.optim.kept_directions import leading_vertices
from pliant.optim.oracle import Oracle, State
from pliant.optim.vertices import Vertex, persistent, unit_vertices, well_scaled


class Local(Oracle):
    """The oracle of L balls over J whole tensors each; :class:`~pliant.optim.oracle.Oracle` documents the methods."""

    def stacks(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return J stacks; stack j holds the j-th tensor of each ball."""
        return [stack(column) for column in zip(*tensors, strict=True)]

    def takes_memory(self, directions: Sequence[Tensor]) -> bool:
        """Return whether it is a single ball on the CPU, where new pages of memory cost more than the arithmetic."""
        return len(directions[0]) == 1 and readable(directions[0])

    def well_scaled(self, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Divide each member by a power of two if its squares could overflow or vanish."""
        lengths, stacks, _ = well_scaled(directions)
        return lengths, stacks

    def vertices(
        self,
        norm: Norm,
        directions: Sequence[Tensor],
        memory: Sequence[Tensor] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[Tensor, list[Vertex]]:
        """Call :func:`~pliant.optim.vertices.unit_vertices`."""
        return unit_vertices(norm, directions, memory, exact=exact)

    def leading_vertices(
        self,
        norm: Spectral,
        directions: Sequence[Tensor],
        basis: Tensor | None,
        iterations: int,
        memory: Sequence[Tensor] | None = None,
    ) -> tuple[list[Vertex], Tensor, Tensor]:
        """Call :func:`~pliant.optim.kept_directions.leading_vertices`."""
        return leading_vertices(norm, directions, basis, iterations, memory)

    def basis(self, norm: Spectral, states: Sequence[Sequence[State]]) -> Tensor | None:
        """Stack the bases of all balls; a joint ball keeps its basis in the state of its first tensor."""
        return stack([state[0]["basis"] for state in states]) if "basis" in states[0][0] else None

    def keep_basis(self, norm: Spectral, basis: Tensor, states: Sequence[Sequence[State]]) -> None:
        """Put the basis of each ball into the state of its first tensor."""
        for state, own in zip(states, basis, strict=True):
            state[0]["basis"] = own

    def persistent(
        self, norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
    ) -> list[Tensor]:
        """Call :func:`~pliant.optim.vertices.persistent`."""
        return persistent(norm, directions, weights, persistence)

    def length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norms, (L,), computed on scaled tensors."""
        return well_scaled(tensors)[0]

    def norm(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm."""
        return norm(tensors)

    def shrinkage(self, ball: NormBall, tensors: Sequence[Tensor]) -> Tensor:
        """Call :meth:`~pliant.NormBall.shrinkage`."""
        return ball.shrinkage(tensors)

    def gap(self, ball: NormBall, tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """Call :meth:`~pliant.NormBall.gap`."""
        return ball.gap(tensors, directions)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return L tensors as a stack (L, *shape); a single tensor as a view, so that changes in place reach the tensor."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
