"""Presets: balls in relative terms. k is a count or a fraction, the radius in units of the initial weights' norm."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pliant.errors import BadInput
from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm, is_norm

Vertices = Literal["support", "sparse", "orthogonal"] | type[VectorNorm]


@dataclass(frozen=True)
class Layout:
    """How a weight is read as a matrix.

    Args:
        dim: the dimension that counts the rows (outputs), or those that count them together.
        groups: the number of consecutive groups of rows, each a matrix of its own (grouped convolutions, experts).
        inputs: the dimension of the input channels.
    """

    dim: int | tuple[int, ...] = 0
    groups: int = 1
    inputs: int = 1


@dataclass(frozen=True)
class Preset:
    """A ball in relative terms; the functions below return one.

    Args:
        norm: a function from a parameter's shape and layout to its norm, which may raise ValueError.
        radius: w, the radius in units of the expected L2 norm at initialisation: the ball gets the L2 diameter
            2·w·E‖θ_init‖₂, whatever its norm.
        structured: whether the preset is only for weights with at least two dimensions, except embeddings and
            normalisations.
        coupled: maps a number of channels to the vector norm of their lengths; None if the preset cannot constrain
            channels that several tensors share.
        orthogonal: whether the vertices of such a joint ball have orthogonal rows.

    Raises:
        BadInput: the radius is not positive and finite.
    """

    norm: Callable[[torch.Size, Layout], Norm]
    radius: float
    structured: bool = True
    coupled: Callable[[int], VectorNorm] | None = None
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise BadInput(f"radius must be positive and finite, got {self.radius}")


def filters(k: float, radius: float = 10.0, *, vertices: Vertices = "support") -> Preset:
    """Constrain to few filters (rows): ``Rows(KSupport(k))``.

    Args:
        k: filters per vertex; an int is a count, a float in (0, 1] a fraction of the layer's filters.
        radius: relative to the initialisation, see :class:`~pliant.constraints.Preset`.
        vertices: "support" scales the filters of a vertex with the gradient (k-support norm), "sparse" gives all of
            them the same length (k-sparse norm), "orthogonal" also makes them orthogonal (:class:`~pliant.Rows`). Or
            your own subclass of :class:`~pliant.norms.VectorNorm`, which gets k if it has a field k.

    Raises:
        BadInput: an argument is out of range.
    """
    check_k(k)
    check_vertices(vertices, "support", "sparse", "orthogonal")
    orthogonal = vertices == "orthogonal"

    def norm(shape: torch.Size, layout: Layout) -> Norm:
        n = Rows(Lp(2), layout.dim).length(shape)
        return Rows(_vector_norm(k, n, vertices), layout.dim, orthogonal)

    return Preset(norm, radius, coupled=lambda channels: _vector_norm(k, channels, vertices), orthogonal=orthogonal)


def rank(
    k: float, radius: float = 10.0, *, vertices: Vertices = "support", spatial: bool = False, parts: int = 1
) -> Preset:
    """Constrain to low rank: ``Spectral(KSupport(k))``.

    Args:
        k: singular directions per vertex; a count or a fraction as in :func:`filters`.
        radius: as in :func:`filters`.
        vertices: "support", "sparse" or a subclass of :class:`~pliant.norms.VectorNorm`, as in :func:`filters`.
        spatial: read 2-d convolutions so that they factor into k×1 and 1×k layers rather than k×k and 1×1
            (:class:`~pliant.Spectral`); it has no effect on kernels with one row or one column.
        parts: in how many matrices of equally many rows the weight falls: 3 for queries, keys and values in one weight.
            Their directions are counted together. :class:`pliant.LowRank` cuts the weight as one matrix all the same.

    Raises:
        BadInput: an argument is out of range. :func:`~pliant.constrain` raises it for a weight whose rows do not fall
            into the parts.
    """
    check_k(k)
    check_vertices(vertices)
    if not isinstance(spatial, bool):
        raise BadInput(f"spatial must be True or False, got {spatial!r}")
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise BadInput(f"parts must be an integer >= 1, got {parts!r}")

    def norm(shape: torch.Size, layout: Layout) -> Norm:
        both_ways = len(shape) == 4 and min(shape[2:]) > 1
        whole = Spectral(Lp(2), layout.dim, layout.groups * parts, spatial and both_ways)
        return replace(whole, inner=_vector_norm(k, whole.length(shape), vertices))

    return Preset(norm, radius)


def weights(k: float, radius: float = 10.0, *, vertices: Vertices = "support") -> Preset:
    """Constrain to few entries: ``KSupport(k)``; k counts entries, all else is as for :func:`filters`."""
    check_k(k)
    check_vertices(vertices)
    return Preset(lambda shape, layout: _vector_norm(k, math.prod(shape), vertices), radius)


def semi_structured(n: int = 2, m: int = 4, radius: float = 10.0, *, vertices: Vertices = "support") -> Preset:
    """Constrain to n of m consecutive input channels: ``Blocks(KSupport(n), m)``, the N:M pattern of hardware.

    :func:`~pliant.constrain` raises an error for a layer whose number of input channels is not a multiple of m: give
    such a layer another rule before this one.

    Args:
        n: non-zero entries per block.
        m: entries in a block.
        radius: as in :func:`filters`.
        vertices: "support", "sparse" or a subclass of :class:`~pliant.norms.VectorNorm`, as in :func:`filters`.

    Raises:
        BadInput: an argument is out of range.
    """
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m):
        raise BadInput(f"an N:M pattern needs integers 1 <= n <= m, got {n}:{m}")
    check_vertices(vertices)

    def norm(shape: torch.Size, layout: Layout) -> Norm:
        pattern = Blocks(_vector_norm(n, m, vertices), m, layout.inputs)
        pattern.length(shape)
        return pattern

    return Preset(norm, radius)


def l2(radius: float = 10.0) -> Preset:
    """Constrain any tensor to an L2 ball, which bounds it without sparsity; ``radius`` as in :func:`filters`."""
    return Preset(lambda shape, layout: Lp(2), radius, structured=False)


def resolve_k(k: float, n: int) -> int:
    """Return k as a count: an int unchanged, a float f in (0, 1] as max(1, floor(f·n + ½)).

    Raises:
        BadInput: k is below 1, above n, or a fraction outside of (0, 1].
    """
    check_k(k)
    count = k if isinstance(k, int) else max(1, math.floor(k * n + 0.5))
    if count > n:
        raise BadInput(f"k={k} is more than there are ({n}): give at most {n}, or a fraction such as 0.1")
    return count


def check_k(k: float) -> None:
    """Raise BadInput unless k is an int >= 1 (count) or a float in (0, 1] (fraction)."""
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise BadInput(f"k must be an int (count) or a float (fraction), got {k!r}")
    if isinstance(k, int) and k < 1:
        raise BadInput(f"k as a count must be at least 1, got {k}")
    if isinstance(k, float) and not 0 < k <= 1:
        raise BadInput(f"k as a fraction must lie in (0, 1], got {k}; a count is written without a point")


def check_vertices(vertices: Vertices, *known: str) -> None:
    """Raise BadInput unless ``vertices`` is one of the known names or a subclass of ``VectorNorm``."""
    known = known or ("support", "sparse")
    if isinstance(vertices, type):
        fault = is_norm(vertices) or (None if issubclass(vertices, VectorNorm) else "expected a subclass of VectorNorm")
        if fault:
            raise BadInput(f"vertices={vertices.__name__}: {fault}")
    elif vertices not in known:
        raise BadInput(f"vertices must be one of {', '.join(map(repr, known))}, got {vertices!r}")


def _vector_norm(k: float, n: int, vertices: Vertices) -> VectorNorm:
    """Return the vector norm of n magnitudes with this kind of vertices."""
    if not isinstance(vertices, type):
        return (KSupport if vertices == "support" else KSparse)(resolve_k(k, n))
    own: Callable[..., VectorNorm] = vertices
    return own(k=resolve_k(k, n)) if "k" in inspect.signature(vertices).parameters else own()
