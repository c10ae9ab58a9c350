"""What a step of the optimizer asks of the tensors of its balls, wherever they lie.

One interface, two implementations with the same answers: :class:`~pliant.optim.local.Local` for tensors that this
process has whole, :class:`~pliant.optim.sharded.Sharded` for DTensors, of which every process has a piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pliant.norms import Channels, Norm, NormBall, Rows, Shape, Spectral
from pliant.optim.vertices import Vertex

State = dict[str, Any]


class Oracle(ABC):
    """The oracles over L balls of one kind, each over J tensors.

    Directions, weights and vertices are J *stacks* (L, *shape) of what this process has: L tensors of one shape. Either
    L or J is 1.

    Args:
        shapes: of the J whole tensors.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = list(shapes)

    @abstractmethod
    def stacks(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return L × J tensors as J stacks; a view of their memory where L is 1."""

    @abstractmethod
    def takes_memory(self, directions: Sequence[Tensor]) -> bool:
        """Tell whether vertices for these directions can be written to memory that exists already."""

    @abstractmethod
    def well_scaled(self, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the L2 norm of the directions of each ball, (L,), and stacks whose entries can be squared safely."""

    @abstractmethod
    def vertices(
        self, norm: Norm, directions: Sequence[Tensor], memory: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Vertex]]:
        """Return the L2 norm of the directions of each ball, (L,), and the vertices of the unit balls for them.

        Args:
            norm: of the balls.
            directions: not 0, or the vertex is 0.
            memory: for the carriers of the vertices, shaped as the directions; None: new memory.
        """

    @abstractmethod
    def leading_vertices(
        self,
        norm: Spectral,
        directions: Sequence[Tensor],
        basis: Tensor | None,
        iterations: int,
        memory: Sequence[Tensor] | None = None,
    ) -> tuple[list[Vertex], Tensor, Tensor]:
        """Return what :func:`pliant.optim.kept_directions.leading_vertices` does, for well-scaled directions."""

    @abstractmethod
    def basis(self, norm: Spectral, states: Sequence[Sequence[State]]) -> Tensor | None:
        """Return the basis that :meth:`keep_basis` put into the states of the L × J tensors; None without one."""

    @abstractmethod
    def keep_basis(self, norm: Spectral, basis: Tensor, states: Sequence[Sequence[State]]) -> None:
        """Put the basis for the next step into the states, as a checkpoint keeps it."""

    @abstractmethod
    def persistent(
        self, norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
    ) -> list[Tensor]:
        """Return what :func:`pliant.optim.vertices.persistent` does."""

    @abstractmethod
    def length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over all J stacks for each ball, (L,), safe from overflow and underflow."""

    @abstractmethod
    def shrinkage(self, ball: NormBall, tensors: Sequence[Tensor]) -> Tensor:
        """Return :meth:`~pliant.NormBall.shrinkage` of the J tensors of a single ball, a scalar tensor."""

    @abstractmethod
    def gap(self, ball: NormBall, tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """Return :meth:`~pliant.NormBall.gap` of the J tensors of a single ball, a scalar tensor."""
