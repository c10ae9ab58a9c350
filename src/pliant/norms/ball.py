"""NormBall = (norm, radius): the set that constrained weights live in; radii are kept here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from pliant.linalg import common_dtype
from pliant.norms.base import Norm
from pliant.norms.shapes import Shape, Tensors, tolerance


@dataclass(frozen=True)
class NormBall:
    """The set {x : norm(x) <= radius}.

    As with norms, every method takes one tensor or a sequence of tensors that share the ball, except where it says one.

    Args:
        norm: any :class:`~pliant.Norm`.
        radius: positive and finite, absolute (in units of the weights).
    """

    norm: Norm
    radius: float

    def __post_init__(self) -> None:
        if not isinstance(self.norm, Norm):
            raise ValueError(f"NormBall needs a norm, got {self.norm!r}")
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"NormBall needs a positive, finite radius, got {self.radius}")

    @overload
    def lmo(self, g: Tensor) -> Tensor: ...
    @overload
    def lmo(self, g: Sequence[Tensor]) -> list[Tensor]: ...
    def lmo(self, g: Tensors) -> Tensor | list[Tensor]:
        """Return a vertex that minimises ⟨g, ·⟩ over the ball, of g's shape(s) and dtype(s); 0 for g = 0."""
        if isinstance(g, Tensor):
            return self.radius * self.norm.lmo(g)
        return [self.radius * v for v in self.norm.lmo(g)]

    def gap(self, x: Tensors, g: Tensors) -> Tensor:
        """Return the Frank-Wolfe gap, max ⟨g, x − v⟩ over the points v of the ball = ⟨g, x⟩ + radius·dual(g).

        For x in the ball it is >= 0, and 0 exactly where x is stationary: no point of the ball improves on x to
        first order. (Jaggi 2013, equation 2.)

        Args:
            x: the weight(s).
            g: the gradient(s), of the shape(s) of x.

        Returns:
            A scalar tensor, float32 for half-precision input.
        """
        pairs = [(x, g)] if isinstance(x, Tensor) and isinstance(g, Tensor) else list(zip(x, g, strict=True))
        dtype = common_dtype([t for pair in pairs for t in pair])
        inner = torch.stack([torch.sum(a.to(dtype) * b.to(dtype)) for a, b in pairs]).sum()
        return inner + self.radius * self.norm.dual(g)

    def contains(self, x: Tensors) -> Tensor:
        """Return whether norm(x) <= radius, up to the rounding of convex combinations; a boolean scalar tensor.

        The relative error allowed is 32 eps of float32 or float64, 4 eps of half precision.
        """
        return self.reaches(self.norm(x), x)

    def reaches(self, length: Tensor, like: Tensors) -> Tensor:
        """Return :meth:`contains` for tensors whose norm is known.

        Args:
            length: the norm of the tensors, a scalar tensor.
            like: tensor(s) of the same dtype(s), which set the tolerance.
        """
        return length <= self.radius * (1 + tolerance(like))

    @overload
    def scale_inside(self, x: Tensor) -> Tensor: ...
    @overload
    def scale_inside(self, x: Sequence[Tensor]) -> list[Tensor]: ...
    def scale_inside(self, x: Tensors) -> Tensor | list[Tensor]:
        """Return x if the ball contains it, else x shrunk radially onto the boundary; of x's shape(s) and dtype(s)."""
        factor = self.shrinkage(x)
        if isinstance(x, Tensor):
            return x / factor.to(x.dtype)
        return [t / factor.to(t.dtype) for t in x]

    def shrinkage(self, x: Tensors) -> Tensor:
        """Return the factor >= 1 that :meth:`scale_inside` divides by, exactly 1 inside; a scalar tensor."""
        return self.shrinkage_of(self.norm(x), x)

    def shrinkage_of(self, length: Tensor, like: Tensors) -> Tensor:
        """Return :meth:`shrinkage` for tensors whose norm is known.

        Args:
            length: the norm of the tensors, a scalar tensor.
            like: tensor(s) of the same dtype(s), which set the tolerance.
        """
        outside = length > self.radius * (1 + tolerance(like))
        return torch.where(outside, length / self.radius, torch.ones_like(length))

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the ball nearest to x, one tensor, in L2; of x's shape and dtype.

        Raises:
            NotImplementedError: no projection is known for the norm.
        """
        return self.norm.project(x, self.radius)

    def diameter(self, shape: Shape | Sequence[Shape]) -> float:
        """Return the largest L2 distance between two points of the ball for tensor(s) of this shape."""
        return self.radius * self.norm.diameter(shape)

    def to_spec(self) -> dict[str, Any]:
        """Return the ball as plain data: strings, numbers and dicts, as checkpoints keep it."""
        return {"norm": self.norm.to_spec(), "radius": self.radius}

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> NormBall:
        """Return the ball that :meth:`to_spec` described.

        Raises:
            ValueError: the dict is not the spec of a ball.
        """
        if not isinstance(spec, dict) or set(spec) != {"norm", "radius"} or not isinstance(spec["norm"], dict):
            raise ValueError(f"a ball's spec is {{'norm': {{...}}, 'radius': number}}, got {spec!r}")
        return NormBall(Norm.from_spec(spec["norm"]), float(spec["radius"]))
