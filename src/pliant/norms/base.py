"""The base of all norms: the four questions that Frank-Wolfe asks, and how each kind of norm answers them.

A norm answers four questions: its value ``norm(x)``, the dual norm ``norm.dual(g)``, a minimiser of ⟨g, ·⟩ over the
unit ball ``norm.lmo(g)`` (linear minimisation oracle), and the L2 ``norm.diameter(shape)`` of the unit ball.

All of them work by the same two moves. :meth:`Norm.split` takes a tensor apart into magnitudes a >= 0 and a function
that rebuilds a tensor from other magnitudes; :meth:`Norm.norm_of`, :meth:`Norm.dual_of` and :meth:`Norm.align` work on
the magnitudes alone, along the last dimension. ``align(a)`` is the point w >= 0 of the unit ball that maximises ⟨a, w⟩,
so that

    lmo(g) = −rebuild(align(a)),    where g = rebuild(a).

**One or several tensors.** Every method takes a tensor or a sequence of tensors; a sequence is read jointly, as one
block-diagonal object with one k for all; under ``Channels``, as one tensor whose channels all share.

**Precision.** Half-precision input is computed in float32; norms of it are returned in float32, vertices in the
input's dtype. Values are divided by a power of two near the largest entry first, so nothing overflows or vanishes
where the result itself does not.

To write a norm, subclass :class:`~pliant.norms.VectorNorm` (magnitudes are those of the entries) and define
``norm_of``, ``dual_of``, ``align`` and ``diameter_of``; every lift then works with it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor

from pliant import extensions
from pliant.errors import BadInput, shown
from pliant.norms.shapes import Rebuild, Shape, Tensors, scaled, shapes_of


class Norm(ABC):
    """A norm on tensors, stateless and hashable; the base of all norms.

    A subclass is a frozen dataclass whose fields are its parameters. Specs, and with them checkpoints, know it by the
    name of its class.
    """

    known: ClassVar[dict[str, type[Norm]]] = {}
    """All subclasses by name, abstract ones among them."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        namesake = Norm.known.get(cls.__name__)
        if namesake is not None and namesake.__module__ != cls.__module__:
            raise TypeError(
                f"a norm named {cls.__name__} exists in {namesake.__module__}, and specs know norms by their names: "
                "choose another name"
            )
        Norm.known[cls.__name__] = cls

    def __call__(self, x: Tensors) -> Tensor:
        """Return ‖x‖, a scalar tensor; differentiable."""
        tensors, scale = scaled(x)
        return scale * self.norm_of(self._join(tensors))

    def dual(self, g: Tensors) -> Tensor:
        """Return the dual norm max ⟨g, v⟩ over the unit ball, a scalar tensor; differentiable."""
        tensors, scale = scaled(g)
        return scale * self.dual_of(self._join(tensors))

    @overload
    def lmo(self, g: Tensor) -> Tensor: ...
    @overload
    def lmo(self, g: Sequence[Tensor]) -> list[Tensor]: ...
    @torch.no_grad()
    def lmo(self, g: Tensors) -> Tensor | list[Tensor]:
        """Return a vertex v of the unit ball with ⟨g, v⟩ = −dual(g), of g's shape(s); lmo(0) = 0."""
        tensors, _ = scaled(g)
        self.length([x.shape for x in tensors])
        magnitudes, rebuilds = zip(*(self.split_for_vertex(x) for x in tensors), strict=True)
        parts = self.spread(self.align(self.combine(magnitudes)), magnitudes)
        given = [g] if isinstance(g, Tensor) else list(g)
        parts = [part.to(x.dtype) for part, x in zip(parts, tensors, strict=True)]
        vertices = [-rebuild(part).to(x.dtype) for rebuild, part, x in zip(rebuilds, parts, given, strict=True)]
        return vertices[0] if isinstance(g, Tensor) else vertices

    def diameter(self, shape: Shape | Sequence[Shape]) -> float:
        """Return the largest L2 distance of two points of the unit ball for tensor(s) of this shape."""
        return self.diameter_of(self.length(shape))

    def length(self, shape: Shape | Sequence[Shape]) -> int:
        """Return how many magnitudes the vector norm sees: what a fraction of k is a fraction of.

        Entries for a vector norm, filters for ``Rows``, channels for ``Channels``, singular values for
        ``Spectral``, the block size for ``Blocks``. Raises ValueError where this norm is not defined for the shape.
        """
        shapes = shapes_of(shape)
        for s in shapes:
            if math.prod(s) == 0:
                raise ValueError(f"a norm needs non-empty tensors, got shape {tuple(s)}")
        n = self.joint_size([self.size_of(s) for s in shapes])
        self.check_length(n)
        return n

    @torch.no_grad()
    def project(self, x: Tensor, radius: float) -> Tensor:
        """Return the nearest point to x, in L2, of the ball of this radius; x itself where ``NormBall.contains`` it.

        Known for Lp(1), Lp(2), Lp(inf), KSparse and KSupport, under Rows and Spectral too, and for Blocks(KSupport);
        else raises NotImplementedError.

        Args:
            x: of any shape that this norm is defined for.
            radius: positive and finite, in the units of x.
        """
        if not (radius > 0 and math.isfinite(radius)):
            raise ValueError(f"project needs a positive, finite radius, got {radius}")
        (divided,), scale = scaled(x)
        self.length(x.shape)
        magnitudes, rebuild = self.split(divided)
        nearest = scale * rebuild(self.nearest(magnitudes, radius / scale))
        # The rounding of singular vectors, or of one threshold for many entries, adds up: shrink a result outside.
        nearest = nearest / (self(nearest) / radius).clamp_min(1)
        inside = self(x) <= radius * (1 + 4 * torch.finfo(x.dtype).eps)
        return torch.where(inside, x, nearest.to(x.dtype))

    @overload
    def soft_threshold(self, x: Tensor, amount: float | Tensor) -> Tensor: ...
    @overload
    def soft_threshold(self, x: Sequence[Tensor], amount: float | Tensor) -> list[Tensor]: ...
    @torch.no_grad()
    def soft_threshold(self, x: Tensors, amount: float | Tensor) -> Tensor | list[Tensor]:
        """Return x with each of its parts shorter by ``amount``, those that are not longer gone.

        Parts are entries, filters under ``Rows``, channels under ``Channels``, singular directions under ``Spectral``.
        It is the proximal step argmin_y ½‖y − x‖² + amount·Ω(y), Ω the sum of the parts' lengths: soft threshold,
        group lasso (Yuan & Lin 2006) and the nuclear norm (Cai, Candès, Shen 2010). No norm grows by it, so y lies in
        every ball that x lies in.

        Args:
            x: tensor(s) of any shape that this norm is defined for.
            amount: >= 0, in the units of x.
        """
        tensors, scale = scaled(x)
        self.length([t.shape for t in tensors])
        magnitudes, rebuilds = zip(*(self.split_into_parts(t) for t in tensors), strict=True)
        shorter = (self.combine(magnitudes) - amount / scale).clamp_min(0)
        parts = self.spread(shorter, magnitudes)
        given = [x] if isinstance(x, Tensor) else list(x)
        shrunk = [(scale * rebuild(part)).to(t.dtype) for rebuild, part, t in zip(rebuilds, parts, given, strict=True)]
        return shrunk[0] if isinstance(x, Tensor) else shrunk

    def to_spec(self) -> dict[str, Any]:
        """Return this norm as plain data: strings, numbers and dicts (p = ∞ is the string "inf")."""
        spec: dict[str, Any] = {"norm": type(self).__name__}
        for field in fields(self):  # type: ignore[arg-type]  # every final class is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Norm):
                value = value.to_spec()
            spec[field.name] = "inf" if value == math.inf else value
        return spec

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> Norm:
        """Return the norm that :meth:`to_spec` described; raises ValueError for anything else.

        A norm of another package is found once its module is imported, or if the package has an entry point for it in
        the group ``pliant.norms``.
        """
        arguments = dict(spec)
        name = arguments.pop("norm", None)
        final = _class_of(name)
        if final is None:
            known = ", ".join(name for name, kind in Norm.known.items() if not inspect.isabstract(kind))
            raise ValueError(f"a norm's spec needs 'norm' as one of {known}; got {spec!r}")
        if "inner" in arguments:
            arguments["inner"] = Norm.from_spec(arguments["inner"])
        if arguments.get("p") == "inf":
            arguments["p"] = math.inf
        try:
            return final(**arguments)
        except TypeError as error:
            raise ValueError(f"not the spec of a {name} norm: {spec!r} ({error})") from None

    # --- facts about a norm ---

    k: int | None = None
    """How many entries, filters, channels or directions a vertex has at most; None where that is no parameter."""

    def with_k(self, k: int) -> Self:
        """Return the same norm with another k; raises BadInput, a ValueError, where it has none."""
        raise BadInput(f"{self} has no k")

    def parts_of_vertex(self, shape: Shape | Sequence[Shape]) -> int | None:
        """Return how many parts a vertex has at most; None where a vertex is not made of parts.

        Parts are what :meth:`soft_threshold` shortens: entries, filters, channels or singular directions.
        """
        return self.k

    # --- to be defined by each kind of norm: between tensors and magnitudes ---

    @abstractmethod
    def size_of(self, shape: Shape) -> int:
        """Return how many magnitudes a tensor of this shape has; raises ValueError where the norm is not defined."""

    @abstractmethod
    def magnitudes(self, x: Tensor) -> Tensor:
        """Return the magnitudes a >= 0 of a tensor, (…, size); differentiable."""

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the magnitudes, and a function from other magnitudes of that shape to a tensor of x's shape."""

    def split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return :meth:`split` for :meth:`lmo`, which may rebuild in another way."""
        return self.split(x)

    def split_into_parts(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return :meth:`split` into the parts that :meth:`soft_threshold` shortens."""
        return self.split(x)

    def combine(self, magnitudes: Sequence[Tensor]) -> Tensor:
        """Return the magnitudes of several tensors as those of the joint object."""
        return torch.cat(list(magnitudes))

    def spread(self, w: Tensor, magnitudes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the share of each tensor in new magnitudes of the joint object."""
        return list(w.split([len(a) for a in magnitudes]))

    def joint_size(self, sizes: list[int]) -> int:
        """Return how many magnitudes the joint object has, given those of its tensors."""
        return sum(sizes)

    # --- to be defined by each kind of norm: on magnitudes a >= 0 alone, along their last dimension ---

    @abstractmethod
    def norm_of(self, a: Tensor) -> Tensor:
        """Return the norm, (…); differentiable."""

    @abstractmethod
    def dual_of(self, a: Tensor) -> Tensor:
        """Return the dual norm, max ⟨a, w⟩ over the unit ball, (…); differentiable."""

    @abstractmethod
    def align(self, a: Tensor) -> Tensor:
        """Return a vertex w >= 0 of the unit ball with ⟨a, w⟩ = dual_of(a), of a's shape; 0 for a = 0."""

    @abstractmethod
    def diameter_of(self, n: int) -> float:
        """Return the L2 diameter of the unit ball of n magnitudes."""

    def nearest(self, a: Tensor, radius: Tensor) -> Tensor:
        """Return the point of the ball of a radius that is nearest to a, which lies outside of it (optional)."""
        raise NotImplementedError(f"no Euclidean projection is known for {self}")

    def check_length(self, n: int) -> None:
        """Raise ValueError unless the norm is defined for n magnitudes."""
        if n < 1:
            raise ValueError(f"{self} needs at least one magnitude, got {n}")

    def _join(self, tensors: list[Tensor]) -> Tensor:
        self.length([x.shape for x in tensors])
        return self.combine([self.magnitudes(x) for x in tensors])


def is_norm(thing: object) -> str | None:
    """Return what is wrong with an object that should be a class of norms, None if nothing is."""
    if not (isinstance(thing, type) and issubclass(thing, Norm)):
        return f"expected a subclass of pliant.Norm, got {shown(thing)}"
    missing = sorted(getattr(thing, "__abstractmethods__", ()))
    return f"{thing.__name__} does not define {', '.join(missing)}" if missing else None


def _class_of(name: object) -> type[Norm] | None:
    """Return the class of a name in a spec, imported if an installed package offers it; None if nobody knows it."""
    if isinstance(name, str) and name not in Norm.known:
        for offered, entry in extensions.installed("norm").items():
            if extensions.attribute_of(entry) == name:
                extensions.find("norm", offered, {}, is_norm)
    kind = Norm.known.get(name) if isinstance(name, str) else None
    return None if kind is None or inspect.isabstract(kind) else kind
