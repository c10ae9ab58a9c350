"""The base of all norms: the four things that Frank-Wolfe needs, and how each kind of norm computes them.

A norm provides its value ``norm(x)``, the dual norm ``norm.dual(g)``, the linear minimisation oracle ``norm.lmo(g)`` (a
minimiser of ⟨g, ·⟩ over the unit ball), and the L2 diameter ``norm.diameter(shape)`` of the unit ball.

All of them work in the same two steps. :meth:`Norm.split` takes a tensor apart into magnitudes a >= 0 and a function
that rebuilds a tensor from other magnitudes; :meth:`Norm.norm_of`, :meth:`Norm.dual_of` and :meth:`Norm.align` work on
the magnitudes alone, along the last dimension. ``align(a)`` is the point w >= 0 of the unit ball that maximises ⟨a, w⟩,
so that

    lmo(g) = −rebuild(align(a)),    where g = rebuild(a).

**One or several tensors.** Every method takes a tensor or a sequence of tensors. A sequence is read jointly, as one
block-diagonal object with a single k; under ``Channels``, all tensors of a sequence share their channels.

**Precision.** Half-precision input is computed in float32; its norms are returned in float32, vertices in the
input's dtype. Values are divided by a power of two near the largest entry first, so nothing overflows or vanishes
where the result itself does not.

To write a norm, subclass :class:`~pliant.norms.VectorNorm` (the magnitudes are the absolute values of the entries) and
define ``norm_of``, ``dual_of``, ``align`` and ``diameter_of``; every lift then works with it.
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
from pliant.norms.shapes import Rebuild, Shape, Tensors, scaled, shapes_of, tolerance


class Norm(ABC):
    """A norm on tensors, stateless and hashable; the base of all norms.

    A subclass is a frozen dataclass whose fields are its parameters. Specs, and therefore checkpoints, refer to it by
    its class name. Methods raise ValueError for tensors and shapes that the norm is not defined for, and for tensors
    that are sparse, empty or not real floating-point.
    """

    known: ClassVar[dict[str, type[Norm]]] = {}
    """All subclasses by name, including abstract ones."""

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
        """Return ‖x‖; differentiable.

        Args:
            x: tensor(s) of any shape that this norm is defined for.

        Returns:
            A scalar tensor, float32 for half-precision input.
        """
        tensors, scale = scaled(x)
        return scale * self.norm_of(self._join(tensors))

    def dual(self, g: Tensors) -> Tensor:
        """Return the dual norm, max ⟨g, v⟩ over the v of the unit ball; differentiable.

        Args:
            g: tensor(s) of any shape that this norm is defined for.

        Returns:
            A scalar tensor, float32 for half-precision input.
        """
        tensors, scale = scaled(g)
        return scale * self.dual_of(self._join(tensors))

    @overload
    def lmo(self, g: Tensor) -> Tensor: ...
    @overload
    def lmo(self, g: Sequence[Tensor]) -> list[Tensor]: ...
    @torch.no_grad()
    def lmo(self, g: Tensors) -> Tensor | list[Tensor]:
        """Return a vertex v of the unit ball with ⟨g, v⟩ = −dual(g); lmo(0) = 0.

        Args:
            g: tensor(s) of any shape that this norm is defined for.

        Returns:
            The vertex, of g's shape(s) and dtype(s).
        """
        tensors, _ = scaled(g)
        self.length([x.shape for x in tensors])
        magnitudes, rebuilds = zip(*(self.split_for_vertex(x) for x in tensors), strict=True)
        parts = self.spread(self.align(self.combine(magnitudes)), magnitudes)
        inputs = [g] if isinstance(g, Tensor) else list(g)
        parts = [part.to(x.dtype) for part, x in zip(parts, tensors, strict=True)]
        vertices = [-rebuild(part).to(x.dtype) for rebuild, part, x in zip(rebuilds, parts, inputs, strict=True)]
        return vertices[0] if isinstance(g, Tensor) else vertices

    def diameter(self, shape: Shape | Sequence[Shape]) -> float:
        """Return the largest L2 distance between two points of the unit ball.

        Args:
            shape: the shape of one tensor, or those of several tensors that share the ball.
        """
        return self.diameter_of(self.length(shape))

    def length(self, shape: Shape | Sequence[Shape]) -> int:
        """Return the number of magnitudes that the vector norm sees; a fractional k is a fraction of this number.

        It counts the entries for a vector norm, the filters for ``Rows``, the channels for ``Channels``, the singular
        values for ``Spectral``; for ``Blocks`` it is the block size.

        Args:
            shape: the shape of one tensor, or those of several tensors that share the ball.

        Raises:
            ValueError: this norm is not defined for the shape.
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
        """Return the point of the ball of this radius that is nearest to x in L2; x itself if the ball contains it.

        A projection is known for Lp(1), Lp(2), Lp(inf), KSparse and KSupport, also under Rows and Spectral, and for
        Blocks(KSupport).

        Args:
            x: of any shape that this norm is defined for.
            radius: positive and finite, in the units of x.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            NotImplementedError: no projection is known for this norm.
            ValueError: the radius is not positive and finite.
        """
        if not (radius > 0 and math.isfinite(radius)):
            raise ValueError(f"project needs a positive, finite radius, got {radius}")
        (divided,), scale = scaled(x)
        self.length(x.shape)
        magnitudes, rebuild = self.split(divided)
        nearest = scale * rebuild(self.nearest(magnitudes, radius / scale))
        # Rounding errors of singular vectors, or of one threshold for many entries, add up: shrink a point outside.
        nearest = nearest / (self(nearest) / radius).clamp_min(1)
        inside = self(x) <= radius * (1 + tolerance(x))
        return torch.where(inside, x, nearest.to(x.dtype))

    @overload
    def soft_threshold(self, x: Tensor, amount: float | Tensor) -> Tensor: ...
    @overload
    def soft_threshold(self, x: Sequence[Tensor], amount: float | Tensor) -> list[Tensor]: ...
    @torch.no_grad()
    def soft_threshold(self, x: Tensors, amount: float | Tensor) -> Tensor | list[Tensor]:
        """Return x with each of its parts shortened by ``amount``; a part that is not longer than that becomes 0.

        Parts are entries, filters under ``Rows``, channels under ``Channels``, singular directions under ``Spectral``.
        This is the proximal step y = argmin ½‖y − x‖² + amount·Ω(y), where Ω is the sum of the parts' lengths: the soft
        threshold of entries, of the group lasso (Yuan & Lin 2006) and of the nuclear norm (Cai, Candès, Shen 2010). It
        increases no norm, so y lies in every ball that contains x.

        Args:
            x: tensor(s) of any shape that this norm is defined for.
            amount: >= 0, in the units of x.

        Returns:
            The result, of x's shape(s) and dtype(s).
        """
        tensors, scale = scaled(x)
        self.length([t.shape for t in tensors])
        magnitudes, rebuilds = zip(*(self.split_into_parts(t) for t in tensors), strict=True)
        shorter = (self.combine(magnitudes) - amount / scale).clamp_min(0)
        parts = self.spread(shorter, magnitudes)
        inputs = [x] if isinstance(x, Tensor) else list(x)
        shrunk = [(scale * rebuild(part)).to(t.dtype) for rebuild, part, t in zip(rebuilds, parts, inputs, strict=True)]
        return shrunk[0] if isinstance(x, Tensor) else shrunk

    def to_spec(self) -> dict[str, Any]:
        """Return this norm as plain data: strings, numbers, lists and dicts (p = ∞ is the string "inf")."""
        spec: dict[str, Any] = {"norm": type(self).__name__}
        for field in fields(self):  # type: ignore[arg-type]  # every final class is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Norm):
                value = value.to_spec()
            if isinstance(value, tuple):  # formats of plain data have lists only
                value = list(value)
            spec[field.name] = "inf" if value == math.inf else value
        return spec

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> Norm:
        """Return the norm that :meth:`to_spec` described.

        A norm of another package is found once its module is imported, or if the package has an entry point for it in
        the group ``pliant.norms``.

        Raises:
            ValueError: the dict is not the spec of a known norm.
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
        arguments = {field: tuple(value) if isinstance(value, list) else value for field, value in arguments.items()}
        try:
            return final(**arguments)
        except TypeError as error:
            raise ValueError(f"not the spec of a {name} norm: {spec!r} ({error})") from None

    # --- facts about a norm ---

    k: int | None = None
    """The largest number of entries, filters, channels or directions of a vertex; None if the norm has no k."""

    def with_k(self, k: int) -> Self:
        """Return the same norm with another k.

        Raises:
            BadInput: the norm has no k.
        """
        raise BadInput(f"{self} has no k")

    def parts_of_vertex(self, shape: Shape | Sequence[Shape]) -> int | None:
        """Return the largest number of parts of a vertex; None if a vertex does not consist of parts.

        Parts are what :meth:`soft_threshold` shortens: entries, filters, channels or singular directions.
        """
        return self.k

    # --- to be defined by each kind of norm: between tensors and magnitudes ---

    @abstractmethod
    def size_of(self, shape: Shape) -> int:
        """Return how many magnitudes a tensor of this shape has.

        Raises:
            ValueError: the norm is not defined for the shape.
        """

    @abstractmethod
    def magnitudes(self, x: Tensor) -> Tensor:
        """Return the magnitudes a >= 0 of a tensor, (…, size); differentiable."""

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the magnitudes, and a function from other magnitudes of that shape to a tensor of x's shape."""

    def split_for_vertex(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return :meth:`split` as :meth:`lmo` uses it; a norm may rebuild a vertex in another way."""
        return self.split(x)

    def split_into_parts(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """Return :meth:`split`, into the parts that :meth:`soft_threshold` shortens."""
        return self.split(x)

    def combine(self, magnitudes: Sequence[Tensor]) -> Tensor:
        """Return the magnitudes of the joint object, given the magnitudes of its tensors."""
        return torch.cat(list(magnitudes))

    def spread(self, w: Tensor, magnitudes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each tensor's share of new magnitudes ``w`` of the joint object; the inverse of :meth:`combine`."""
        return list(w.split([len(a) for a in magnitudes]))

    def joint_size(self, sizes: list[int]) -> int:
        """Return how many magnitudes the joint object has, given the number for each of its tensors."""
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
        """Return the point of the ball of this radius that is nearest to a, a point outside of it (optional)."""
        raise NotImplementedError(f"no Euclidean projection is known for {self}")

    def check_length(self, n: int) -> None:
        """Raise ValueError unless the norm is defined for n magnitudes."""
        if n < 1:
            raise ValueError(f"{self} needs at least one magnitude, got {n}")

    def _join(self, tensors: list[Tensor]) -> Tensor:
        self.length([x.shape for x in tensors])
        return self.combine([self.magnitudes(x) for x in tensors])


def is_norm(thing: object) -> str | None:
    """Return what is wrong with an object that should be a class of norms; None if nothing is."""
    if not (isinstance(thing, type) and issubclass(thing, Norm)):
        return f"expected a subclass of pliant.Norm, got {shown(thing)}"
    missing = sorted(getattr(thing, "__abstractmethods__", ()))
    return f"{thing.__name__} does not define {', '.join(missing)}" if missing else None


def _class_of(name: object) -> type[Norm] | None:
    """Return the norm class of this name, imported if an installed package offers it; None if there is none."""
    if isinstance(name, str) and name not in Norm.known:
        for offered, entry in extensions.installed("norm").items():
            if extensions.attribute_of(entry) == name:
                extensions.find("norm", offered, {}, is_norm)
    kind = Norm.known.get(name) if isinstance(name, str) else None
    return None if kind is None or inspect.isabstract(kind) else kind
