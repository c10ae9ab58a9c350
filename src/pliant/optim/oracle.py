"""The interface between a step of the optimizer and the tensors of its balls, whole or sharded.

Two implementations give the same results: :class:`~pliant.optim.local.Local` for tensors that this process has whole,
:class:`~pliant.optim.sharded.Sharded` for DTensors, of which every process has a piece.
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
    """The oracle over L balls of one kind, each over J tensors.

    Directions, weights and vertices are J *stacks* (L, *shape): L tensors of one shape, or this process's pieces of
    them. Either L or J is 1.

    Args:
        shapes: the shapes of the J whole tensors.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = list(shapes)

    @abstractmethod
    def stacks(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return L × J tensors as J stacks; views of their memory if L is 1."""

    @abstractmethod
    def takes_memory(self, directions: Sequence[Tensor]) -> bool:
        """Return whether vertices for these directions can be written to memory that exists already."""

    @abstractmethod
    def well_scaled(self, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the L2 norm of the directions of each ball, (L,), and stacks whose entries can be squared safely."""

    @abstractmethod
    def vertices(
        self,
        norm: Norm,
        directions: Sequence[Tensor],
        memory: Sequence[Tensor] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[Tensor, list[Vertex]]:
        """Return the L2 norm of the directions of each ball, and the vertices of the unit balls for them.

        Args:
            norm: the norm of the balls.
            directions: J stacks (L, *shape); where one is 0, so is the vertex.
            memory: tensors of the shapes of the directions, for the carriers of the vertices; None: new memory.
            exact: decompose large matrices, too, where products would find polar factors.

        Returns:
            The norms, (L,), and J vertices.
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
        """Return the results of :func:`pliant.optim.kept_directions.leading_vertices` for well-scaled directions."""

    @abstractmethod
    def basis(self, norm: Spectral, states: Sequence[Sequence[State]]) -> Tensor | None:
        """Return the basis that :meth:`keep_basis` put into the states of the L × J tensors; None if there is none."""

    @abstractmethod
    def keep_basis(self, norm: Spectral, basis: Tensor, states: Sequence[Sequence[State]]) -> None:
        """Put the basis for the next step into the states, in the form that checkpoints keep."""

    @abstractmethod
    def persistent(
        self, norm: Rows | Channels, directions: Sequence[Tensor], weights: Sequence[Tensor], persistence: float
    ) -> list[Tensor]:
        """Return the result of :func:`pliant.optim.vertices.persistent`."""

    @abstractmethod
    def length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over all J stacks for each ball, (L,), safe from overflow and underflow."""

    @abstractmethod
    def norm(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of the J tensors of a single ball, a scalar tensor."""

    @abstractmethod
    def shrinkage(self, ball: NormBall, tensors: Sequence[Tensor]) -> Tensor:
        """Return :meth:`~pliant.NormBall.shrinkage` of the J tensors of a single ball, a scalar tensor."""

    @abstractmethod
    def gap(self, ball: NormBall, tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """Return :meth:`~pliant.NormBall.gap` of the J tensors of a single ball, a scalar tensor."""
