"""Draw a unit ball in three dimensions, whatever its norm: its visible side, its edges, its vertices.

A point of the surface in the direction d is d / norm(d); a vertex is what ``norm.lmo`` returned for a random gradient.
A convex body needs no more to be drawn: the triangles that face the viewer never cover each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from torch import Tensor

from pliant import Norm, Spectral

INK, FAINT, SURFACE, EDGE = "#24292f", "#8c959f", "#d3e0f0", "#8aa3c2"
PIECES = {1: "#d1495b", 2: "#1f6fb2", 3: "#5c6670"}  # a dot's colour: how many entries, filters or directions it has
GRADIENTS = 300
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]

# --- solids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solid:
    """A unit ball in three coordinates.

    Args:
        title: above the picture.
        norm: its unit ball is drawn.
        tensor: from three coordinates to the tensor that the norm measures, keeping lengths.
        coordinates: back from that tensor.
        pieces: how many pieces a vertex has.
        axes: what stands at the three axes.
        globe: lay the grid of the surface like a globe's about the third axis; else alike about all axes.
        note: below the picture.
    """

    title: str
    norm: Norm
    tensor: Callable[[Tensor], Tensor]
    coordinates: Callable[[Tensor], Tensor]
    pieces: Callable[[Tensor], int]
    axes: tuple[str, str, str]
    globe: bool
    note: str

    def length(self, points: Tensor) -> Tensor:
        """Return the norm of each of many points. Shapes: (..., 3) -> (...)."""
        flat = torch.vmap(lambda point: self.norm(self.tensor(point)))(points.reshape(-1, 3))
        return flat.reshape(points.shape[:-1])

    def vertices(self) -> tuple[Tensor, list[int]]:
        """Return the vertices for random gradients, and how many pieces each has."""
        gradients = torch.randn(GRADIENTS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vertices = [self.norm.lmo(self.tensor(g)) for g in gradients]
        return torch.stack([self.coordinates(v) for v in vertices]), [self.pieces(v) for v in vertices]


def count(values: Tensor) -> int:
    """Return how many values are not zero, up to rounding."""
    return int((values.abs() > 1e-9).sum())


def entries(title: str, norm: Norm, note: str) -> Solid:
    """Return the ball of a vector norm: the coordinates are the entries."""
    return Solid(title, norm, lambda x: x, lambda x: x, count, ("$x_1$", "$x_2$", "$x_3$"), False, note)


def two_rows(title: str, norm: Norm, pieces: Callable[[Tensor], int], note: str) -> Solid:
    """Return the ball for matrices [[x, y], [z, 0]]: a filter with two weights and one with a single weight."""

    def tensor(x: Tensor) -> Tensor:
        return torch.stack([x[0], x[1], x[2], torch.zeros_like(x[2])]).reshape(2, 2)

    return Solid(title, norm, tensor, lambda m: m.flatten()[:3], pieces, ("$x$", "$y$", "$z$"), True, note)


def symmetric(title: str, inner: Norm, note: str) -> Solid:
    """Return the ball for symmetric matrices [[a, b], [b, c]], drawn over ((a − c)/√2, √2·b, (a + c)/√2)."""

    def tensor(x: Tensor) -> Tensor:
        return torch.stack([x[2] + x[0], x[1], x[1], x[2] - x[0]]).reshape(2, 2) / math.sqrt(2)

    def coordinates(m: Tensor) -> Tensor:
        return torch.stack([m[0, 0] - m[1, 1], m[0, 1] + m[1, 0], m[0, 0] + m[1, 1]]) / math.sqrt(2)

    def rank(m: Tensor) -> int:
        return count(torch.linalg.svdvals(m))

    return Solid(title, Spectral(inner), tensor, coordinates, rank, ("$a-c$", "$b$", "$a+c$"), True, note)


def directions(globe: bool) -> Tensor:
    """Return triangles of directions that cover the sphere, with sides where norms of this kind may have kinks.

    Shapes: (triangles, 3 corners, 3).
    """
    if globe:
        latitude = torch.linspace(-math.pi / 2, math.pi / 2, 57, dtype=torch.float64)[:, None]
        longitude = torch.linspace(0, 2 * math.pi, 145, dtype=torch.float64)[None, :]
        parts = (latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin().expand(57, 145))
        grid = torch.stack(parts, dim=-1)
        a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]
        return torch.cat([torch.stack([a, b, c], dim=2), torch.stack([a, c, d], dim=2)]).reshape(-1, 3, 3)
    # By symmetry the entries are in descending order; kinks lie at x1 = x2 + x3, the line from (1, 1, 0) to (2, 1, 1).
    parts = torch.tensor([[[1, 0, 0], [1, 1, 0], [2, 1, 1]], [[2, 1, 1], [1, 1, 0], [1, 1, 1]]], dtype=torch.float64)
    chamber = torch.cat([subdivide(part / part.norm(dim=1, keepdim=True), 14) for part in parts])
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 3)
    return torch.cat([chamber[:, :, order] * sign for order in orders for sign in signs])


def subdivide(triangle: Tensor, n: int) -> Tensor:
    """Return the n² triangles of a grid on one. Shapes: (3, 3) -> (n², 3, 3)."""
    steps = []
    for i in range(n):
        for j in range(n - i):
            steps.append([(i, j), (i + 1, j), (i, j + 1)])
            if i + j < n - 1:
                steps.append([(i + 1, j), (i + 1, j + 1), (i, j + 1)])
    first, second = (torch.tensor(steps, dtype=triangle.dtype) / n).unbind(dim=-1)
    weights = torch.stack([1 - first - second, first, second], dim=-1)
    return weights @ triangle


# --- drawing a convex body --------------------------------------------------------------------------------------------


def camera(azimuth: float, elevation: float) -> Tensor:
    """Return the rows right, up and towards the viewer of a parallel projection. Shapes: (3, 3)."""
    a, e = math.radians(azimuth), math.radians(elevation)
    right = [-math.sin(a), math.cos(a), 0.0]
    up = [-math.sin(e) * math.cos(a), -math.sin(e) * math.sin(a), math.cos(e)]
    towards = [math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]
    return torch.tensor([right, up, towards], dtype=torch.float64)


def draw_solid(axes: Axes, solid: Solid, view: Tensor) -> None:
    """Draw the visible side of a unit ball, its axes and its vertices."""
    corners = directions(solid.globe)
    corners = corners / solid.length(corners)[..., None]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    keep = normals.norm(dim=1) > 1e-9  # at a pole of the grid two corners may coincide
    corners, normals = corners[keep], normals[keep]
    normals = normals / normals.norm(dim=1, keepdim=True)
    normals = normals * (normals * corners.mean(dim=1)).sum(dim=1, keepdim=True).sign()
    front = normals @ view[2] > 1e-6

    size = float(corners.norm(dim=-1).max())
    draw_axes(axes, solid, view, size)
    light = torch.tensor([-0.4, 0.6, 0.8], dtype=torch.float64) @ view
    shade = 0.74 + 0.28 * (normals[front] @ (light / light.norm())).clamp_min(0)
    colours = (shade[:, None] * torch.tensor(to_rgb(SURFACE), dtype=torch.float64)).clamp(0, 1).numpy()
    flat = (corners[front] @ view[:2].T).numpy()
    axes.add_collection(PolyCollection(flat, facecolors=colours, edgecolors=colours, linewidths=0.4, zorder=2))
    sides = creases(corners, normals, front, view).numpy()
    axes.add_collection(LineCollection(sides, colors=EDGE, linewidths=0.8, zorder=3))

    vertices, pieces = solid.vertices()
    seen = solid.length(vertices + 1e-3 * view[2]) > 1 + 1e-7  # a step towards the viewer leaves the ball
    points = vertices @ view[:2].T
    for number, colour in PIECES.items():
        chosen = seen & torch.tensor([p == number for p in pieces])
        dots = torch.unique((points[chosen] * 1e4).round(), dim=0) / 1e4
        axes.scatter(dots[:, 0], dots[:, 1], s=15, color=colour, edgecolors="white", linewidths=0.4, zorder=5)

    reach = 1.5 * size
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_axis_off()
    axes.set_title(solid.title, fontsize=12, color=INK, family="monospace", pad=2)
    axes.text(0.5, 0.045, solid.note, fontsize=9.5, color=INK, ha="center", va="top", transform=axes.transAxes)


def draw_axes(axes: Axes, solid: Solid, view: Tensor, size: float) -> None:
    """Draw the three axes outside of the ball, each end behind or before it."""
    for name, axis in zip(solid.axes, torch.eye(3, dtype=torch.float64), strict=True):
        for end in (axis, -axis):
            start = end / solid.length(end)
            towards_viewer = float(end @ view[2]) > 0
            line = (torch.stack([start, 1.32 * size * end]) @ view[:2].T).numpy()
            axes.plot(line[:, 0], line[:, 1], color=FAINT, linewidth=0.8, zorder=4 if towards_viewer else 1)
        tip = (1.44 * size * axis @ view[:2].T).numpy()
        axes.text(tip[0], tip[1], name, fontsize=11, color=INK, ha="center", va="center", zorder=6, path_effects=HALO)


def creases(corners: Tensor, normals: Tensor, front: Tensor, view: Tensor) -> Tensor:
    """Return the visible sides at which the surface has an edge, projected. Shapes: -> (sides, 2 ends, 2)."""
    points, names = torch.unique((corners.reshape(-1, 3) * 1e6).round() + 0.0, dim=0, return_inverse=True)
    sides = names.reshape(-1, 3)[:, [[0, 1], [1, 2], [2, 0]]].sort(dim=-1).values.reshape(-1, 2)
    sides, owner_of, owners = torch.unique(sides, dim=0, return_inverse=True, return_counts=True)
    sides = sides[owners == 2]
    pairs = owner_of.argsort(stable=True)[(owners == 2).repeat_interleave(owners)].reshape(-1, 2) // 3
    bent = (normals[pairs[:, 0]] * normals[pairs[:, 1]]).sum(dim=1) < math.cos(math.radians(20))
    return points[sides[bent & front[pairs].any(dim=1)]] / 1e6 @ view[:2].T
