"""Draw the pictures of docs/norms.md: ``python docs/pictures/balls.py [FOLDER]``, in about ten seconds.

The output is always the same.
Nothing here knows what a ball looks like: every point, vertex and path comes from pliant's own norms and optimizer.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from solids import (
    EDGE,
    FAINT,
    HALO,
    INK,
    PIECES,
    SURFACE,
    Solid,
    camera,
    count,
    draw_solid,
    entries,
    symmetric,
    two_rows,
)
from torch import Tensor

from pliant import SFW, Blocks, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral

IMAGES = Path(__file__).parents[1] / "images"
RED, BLUE = PIECES[1], PIECES[2]


# --- unit balls -------------------------------------------------------------------------------------------------------


def vector_balls() -> Figure:
    """Return the unit balls of the vector norms in R³."""
    solids = [
        entries("Lp(1)", Lp(1), "= KSparse(1) = KSupport(1)"),
        entries("KSparse(2)", KSparse(2), "12 vertices"),
        entries("Lp(inf)", Lp(math.inf), "= KSparse(3)"),
        entries("Lp(1.5)", Lp(1.5), "every point of the surface is a vertex"),
        entries("KSupport(2)", KSupport(2), "three circles of vertices"),
        entries("Lp(2)", Lp(2), "= KSupport(3)"),
    ]
    legend = {1: "1 non-zero entry", 2: "2 non-zero entries", 3: "3 non-zero entries"}
    return draw_solids(solids, ["", ""], legend)


def lifted_balls() -> Figure:
    """Return unit balls of the lifts."""

    def filters(m: Tensor) -> int:
        return count(m.norm(dim=1))

    def per_block(m: Tensor) -> int:
        return max(count(row) for row in m)

    solids = [
        two_rows("Rows(KSupport(1))", Rows(KSupport(1)), filters, "one filter: a circle, or a tip"),
        two_rows("Rows(KSparse(2))", Rows(KSparse(2)), filters, "both filters, each of length 1"),
        two_rows("Blocks(KSupport(1), 2)", Blocks(KSupport(1), 2), per_block, "one entry in each block of two"),
        symmetric("Spectral(KSupport(1))", KSupport(1), "nuclear norm: rank 1"),
        symmetric("Spectral(KSupport(2))", KSupport(2), "L2 norm: any matrix of length 1"),
        symmetric("Spectral(KSparse(2))", KSparse(2), "operator norm: orthogonal matrices"),
    ]
    legend = {1: "1 filter · 1 entry per block · rank 1", 2: "2 filters · rank 2"}
    return draw_solids(solids, ["matrices [[x, y], [z, 0]]", "matrices [[a, b], [b, c]]"], legend)


def draw_solids(solids: list[Solid], headings: list[str], legend: dict[int, str]) -> Figure:
    """Return a figure with one heading and three solids per row."""
    figure, grid = plt.subplots(len(headings), 3, figsize=(9.4, 3.3 * len(headings) + 0.3))
    for axes, solid in zip(grid.flat, solids, strict=True):
        draw_solid(axes, solid, camera(azimuth=36, elevation=22))
    for row, heading in zip(grid, headings, strict=True):
        row[0].text(0.02, 0.5, heading, transform=row[0].transAxes, rotation=90, va="center", fontsize=9.5, color=INK)
    dot = {"marker": "o", "linestyle": "", "markersize": 6}
    handles = [Line2D([], [], color=PIECES[n], label=text, **dot) for n, text in legend.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=10, labelcolor=INK)
    figure.subplots_adjust(left=0.0, right=1.0, top=0.955, bottom=0.1, wspace=0.0, hspace=0.12)
    return figure


# --- vertices of a larger matrix --------------------------------------------------------------------------------------


def vertices() -> Figure:
    """Return −g and the vertices that several norms answer with, for one gradient of 12 filters with 16 weights."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((12, 2), (2, 16), (12, 16))
    left, right, noise = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    g = left @ right + 0.6 * noise
    pictures: list[tuple[str, str, Tensor]] = [("−g", "minus the gradient", -g)]
    chosen: list[tuple[str, str, Norm]] = [
        ("KSupport(20)", "20 entries", KSupport(20)),
        ("KSparse(20)", "20 entries of one size", KSparse(20)),
        ("Blocks(KSupport(2), 4)", "2 of every 4 entries", Blocks(KSupport(2), 4)),
        ("Rows(KSupport(3))", "3 filters", Rows(KSupport(3))),
        ("Rows(KSparse(3))", "3 filters of one length", Rows(KSparse(3))),
        ("Spectral(KSupport(1))", "rank 1", Spectral(KSupport(1))),
        ("Spectral(KSparse(12))", "operator norm, full rank", Spectral(KSparse(12))),
    ]
    pictures += [(title, note, norm.lmo(g)) for title, note, norm in chosen]
    figure, grid = plt.subplots(2, 4, figsize=(9.4, 4.3))
    for axes, (title, note, matrix) in zip(grid.flat, pictures, strict=True):
        reach = float(matrix.abs().max())
        axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(FAINT)
        axes.set_title(title, fontsize=9.5, color=INK, family="monospace", pad=4)
        axes.set_xlabel(note, fontsize=9.5, color=INK, labelpad=4)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.06, wspace=0.06, hspace=0.28)
    return figure


# --- steps ------------------------------------------------------------------------------------------------------------


TARGET = torch.tensor([1.6, 0.4], dtype=torch.float64)  # the toy loss is half the squared distance to this point
START = torch.tensor([-0.15, -0.6], dtype=torch.float64)


def steps() -> Figure:
    """Return one step of Frank-Wolfe, and the paths of 20 noisy steps in two balls."""
    figure, grid = plt.subplots(1, 3, figsize=(9.4, 2.9), width_ratios=(2.5, 2.9, 2.9))
    draw_one_step(grid[0])
    draw_path(grid[1], "20 steps in Lp(1)", NormBall(Lp(1), 1.0))
    draw_path(grid[2], "20 steps in Lp(2)", NormBall(Lp(2), 1.0))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.02, wspace=0.04)
    return figure


def draw_one_step(axes: Axes) -> None:
    """Draw the ball, the weights, the direction, its vertex and the step between them."""
    ball, theta = NormBall(Lp(1), 1.0), torch.tensor([-0.32, 0.52], dtype=torch.float64)
    m = torch.tensor([-0.75, -0.42], dtype=torch.float64)
    eta = 0.35
    v = ball.lmo(m)
    moved = torch.lerp(theta, v, eta)
    draw_ball(axes, "one step", ball, right=1.35)
    along = torch.tensor([-m[1], m[0]]) / m.norm()
    line = torch.stack([v - 1.05 * along, v + 0.42 * along])
    axes.plot(line[:, 0], line[:, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot([theta[0], v[0]], [theta[1], v[1]], color=FAINT, linewidth=1)
    arrow(axes, theta, theta - 0.62 * m, INK)
    arrow(axes, theta, moved, RED)
    for point, colour in ((theta, INK), (v, BLUE), (moved, RED)):
        axes.plot(*point, "o", color=colour, markersize=6, zorder=5)
    label(axes, theta + torch.tensor([-0.03, 0.13]), "$\\theta$")
    label(axes, theta - 0.62 * m + torch.tensor([0.14, 0.03]), "$-m$")
    label(axes, v + torch.tensor([0.13, -0.1]), "$v$", BLUE)
    label(axes, moved + torch.tensor([-0.12, -0.16]), r"$(1-\eta)\,\theta+\eta\,v$", RED)


def draw_path(axes: Axes, title: str, ball: NormBall) -> None:
    """Draw the level lines of the toy loss and where SFW goes from the start."""
    draw_ball(axes, title, ball, right=1.75)
    for distance in (0.6, 0.9, 1.2, 1.5, 1.8, 2.1):
        circle(axes, TARGET, distance)
    theta = torch.nn.Parameter(START.clone())
    optimizer = SFW([{"params": [theta], "ball": ball}], lr=0.1, momentum=0.8)
    noise = torch.Generator().manual_seed(1)
    path = [START]
    for _ in range(20):
        theta.grad = theta.detach() - TARGET + 0.7 * torch.randn(2, generator=noise, dtype=torch.float64)
        optimizer.step()
        path.append(theta.detach().clone())
    walked = torch.stack(path)
    axes.plot(walked[:, 0], walked[:, 1], "-o", color=RED, linewidth=1, markersize=3, zorder=4)
    axes.plot(*path[0], "o", color=INK, markersize=6, zorder=5)
    axes.plot(*path[-1], "o", color=RED, markersize=6, zorder=5)
    label(axes, path[0] + torch.tensor([0.0, -0.17]), "start")
    first, second = (float(x) + 0.0 for x in path[-1])
    label(axes, path[-1] + torch.tensor([0.47, -0.02]), f"({first:.2f}, {second:.2f})", RED)


def draw_ball(axes: Axes, title: str, ball: NormBall, right: float) -> None:
    """Draw a ball in the plane and the coordinate axes, with a picture that ends at ``right``."""
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    ring = ball.radius * ring / torch.vmap(ball.norm)(ring)[:, None]
    axes.fill(ring[:, 0], ring[:, 1], facecolor=SURFACE, edgecolor=EDGE, linewidth=1.2, zorder=0)
    axes.axhline(0, color="white", linewidth=1, zorder=1)
    axes.axvline(0, color="white", linewidth=1, zorder=1)
    axes.set(xlim=(-1.15, right), ylim=(-1.1, 1.1), aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, color=INK, pad=4)


def circle(axes: Axes, centre: Tensor, radius: float) -> None:
    """Draw one level line of the toy loss."""
    axes.add_patch(plt.Circle(tuple(centre.tolist()), radius, fill=False, color=FAINT, linewidth=0.7, alpha=0.6))


def arrow(axes: Axes, start: Tensor, end: Tensor, colour: str) -> None:
    """Draw an arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 3}
    axes.annotate("", tuple(end.tolist()), tuple(start.tolist()), arrowprops=style, zorder=4)


def label(axes: Axes, at: Tensor, text: str, colour: str = INK) -> None:
    """Write beside a point."""
    x, y = at.tolist()
    axes.text(x, y, text, fontsize=11, color=colour, ha="center", va="center", path_effects=HALO, zorder=6)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG of at most 256 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)


def main(folder: Path = IMAGES) -> None:
    """Write all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (vector_balls, lifted_balls, vertices, steps):
        save(draw(), folder / f"{draw.__name__.replace('_', '-')}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
