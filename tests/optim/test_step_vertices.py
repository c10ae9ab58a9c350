"""Where a step of the optimizer goes: by the formula, and to the vertex of the norm's oracle, however it is found."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral, VectorNorm
from pliant.optim import RESCALES, SFW, Rescale
from pliant.optim.vertices import unit_vertices
from tests.instances import INSTANCES, LAYOUTS, Shape, few_integers, folded, gaussian, tiled, unfolded
from tests.optimizer_cases import quiet_first_steps

pytestmark = quiet_first_steps

one_of_each_kind = pytest.mark.parametrize(
    "norm", [Lp(2), KSparse(3), KSupport(3), Rows(KSupport(2)), Spectral(Lp(1)), Blocks(KSupport(2), 4)], ids=str
)
every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)


# --- the formula ------------------------------------------------------------------------------------------------------


def plain_steps(
    weights: list[Tensor], gradients: list[list[Tensor]], ball: NormBall, lr: float, rescale: Rescale, **options: Any
) -> list[Tensor]:
    """Stochastic Frank-Wolfe on one ball, written down as its definition reads."""
    theta, momenta = ball.scale_inside(weights), None
    diameter = ball.diameter([w.shape for w in weights])
    for now in gradients:
        signed = [-g for g in now] if options.get("maximize") else now
        if momenta is None or options["momentum"] == 0:
            momenta = signed
        else:
            old, new = options["momentum"], 1 - options["dampening"]
            momenta = [old * m + new * g for m, g in zip(momenta, signed, strict=True)]
        vertices = ball.lmo(momenta)
        length = torch.cat([m.flatten() for m in momenta]).norm()
        distance = torch.cat([(t - v).flatten() for t, v in zip(theta, vertices, strict=True)]).norm()
        factor = {"gradient": length / distance, "fast-gradient": length / (diameter / 2), "diameter": 1 / diameter}
        eta = min(1.0, lr * float(factor.get(str(rescale), 1.0)))
        theta = [(1 - eta) * t + eta * v for t, v in zip(theta, vertices, strict=True)]
    return theta


@one_of_each_kind
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.0}, {"momentum": 0.5, "dampening": 0.3, "maximize": True}],
    ids=["plain", "momentum", "ascent"],
)
def test_steps_are_the_formula(norm: Norm, rescale: Rescale, options: dict[str, Any]) -> None:
    ball, shapes = NormBall(norm, 1.5), [(4, 8), (5, 4, 2, 2), (4, 8)]
    start = [0.2 * gaussian(shape, seed) for seed, shape in enumerate(shapes)]
    gradients = [[gaussian(shape, 10 * t + seed) for seed, shape in enumerate(shapes)] for t in range(1, 6)]
    for joint, foreach in product([False, True], [False, True]):
        parameters = [nn.Parameter(w.clone()) for w in start]
        group = {"params": parameters, "ball": ball, "joint": joint}
        opt = SFW([group], lr=0.1, rescale=rescale, foreach=foreach, **options)
        for now in gradients:
            for p, g in zip(parameters, now, strict=True):
                p.grad = g.clone()
            opt.step()
        sets = [range(3)] if joint else [[0], [1], [2]]
        for members in sets:
            given = [[now[i] for i in members] for now in gradients]
            expected = plain_steps([start[i] for i in members], given, ball, 0.1, rescale, **options)
            for i, w in zip(members, expected, strict=True):
                torch.testing.assert_close(parameters[i].detach(), w)


# --- the vertex -------------------------------------------------------------------------------------------------------


def step_to_vertex(norm: Norm, gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """Take a whole step from 0: where it ends is the vertex, divided by the radius."""
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    joint = options.pop("joint", False)
    group = {"params": parameters, "ball": NormBall(norm, 2.0), "joint": joint}
    opt = SFW([group], **{"lr": 1.0, "momentum": 0.0, "rescale": None, **options})
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    opt.step()
    return [p.detach() / 2 for p in parameters]


@every_instance
@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_a_whole_step_ends_at_the_vertex_of_the_norm(norm: Norm, shape: Shape, foreach: bool) -> None:
    gradients = [gaussian(shape, 1), 1e3 * gaussian(shape, 2), torch.zeros(shape, dtype=torch.float64)]
    for v, g in zip(step_to_vertex(norm, gradients, foreach=foreach), gradients, strict=True):
        torch.testing.assert_close(v, norm.lmo(g), rtol=1e-10, atol=1e-12)
    together = step_to_vertex(norm, gradients, foreach=foreach, joint=True)
    for v, w in zip(together, norm.lmo(gradients), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-10, atol=1e-12)


@every_instance
def test_a_whole_step_does_not_see_the_scale(norm: Norm, shape: Shape) -> None:
    for dtype, exponent, foreach in product([torch.float32, torch.bfloat16], [-100, 100], [False, True]):
        g = gaussian(shape, 1, dtype)
        for v in step_to_vertex(norm, [g * 2.0**exponent] * 2, foreach=foreach):
            assert v.dtype == dtype
            torch.testing.assert_close(v, norm.lmo(g), rtol=4 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize(
    "norm", [Lp(2), KSparse(3), Rows(KSupport(2)), Spectral(Lp(1)), Blocks(KSupport(2), 4)], ids=str
)
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("lr", [1e3, torch.tensor(1e3)], ids=["number", "tensor"])
def test_no_step_goes_beyond_the_vertex(norm: Norm, rescale: Rescale, lr: float | Tensor) -> None:
    g = gaussian((5, 8))
    for v in step_to_vertex(norm, [g, g], lr=lr, rescale=rescale):
        torch.testing.assert_close(v, norm.lmo(g))


@every_instance
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_zero_gradient_moves_nothing_whatever_the_radius(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    for radius, foreach in product([1e-6, 1e6], [False, True]):
        start = (gaussian(shape, 1) * radius / (2 * norm(gaussian(shape, 1)))).to(dtype)
        parameters = [nn.Parameter(start.clone()) for _ in range(2)]
        opt = SFW([{"params": parameters, "ball": NormBall(norm, radius)}], lr=0.5, foreach=foreach)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        opt.step()
        for p in parameters:
            assert torch.equal(p, start)


@settings(max_examples=300)
@given(few_integers, st.sampled_from(INSTANCES), st.booleans())
def test_a_whole_step_on_ties_and_zeros_is_feasible_and_optimal(
    values: list[int], instance: tuple[Norm, Shape], foreach: bool
) -> None:
    norm, shape = instance
    g = tiled(values, shape)
    for v in step_to_vertex(norm, [g, g], foreach=foreach):
        assert norm(v) <= 1 + 1e-9
        torch.testing.assert_close(torch.sum(g * v), -norm.dual(g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [Lp(1), Lp(2), Lp(3), KSparse(1), Rows(KSupport(1))], ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_a_whole_step_of_scalars(norm: Norm, foreach: bool, joint: bool) -> None:
    gradients = [torch.tensor(3.0), torch.tensor(-4.0), torch.tensor([0.5])]
    vertices = step_to_vertex(norm, gradients, foreach=foreach, joint=joint)
    expected = norm.lmo(gradients) if joint else [norm.lmo(g) for g in gradients]
    for v, w in zip(vertices, expected, strict=True):
        torch.testing.assert_close(v, w)


LARGE: list[Norm] = [
    *(Lp(p) for p in (1, 2, math.inf)),
    *(KSparse(k) for k in (1, 400, 50_000)),
    *(KSupport(k) for k in (1, 400, 50_000)),
    *(Rows(inner) for inner in (Lp(1), Lp(3), KSparse(7), KSupport(7))),
    Rows(KSupport(7), dim=1),
    *(Blocks(inner, 4) for inner in (KSparse(2), KSupport(1), KSupport(2), Lp(1))),
]


@pytest.mark.parametrize("norm", LARGE, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["gaussian", "ties"])
def test_the_same_for_large_tensors(norm: Norm, ties: bool) -> None:
    g = gaussian((64, 32, 5, 5), 1, torch.float32)
    g = g.round() if ties else g
    (v,) = step_to_vertex(norm, [g])
    # Measured: 4e-7, the rounding of sums of 51,200 entries in single precision.
    assert norm(v.double()) <= 1 + 4e-6
    assert torch.sum(g.double() * v.double()).item() == pytest.approx(-norm.dual(g.double()).item(), rel=4e-6)
    assert torch.equal(v != 0, norm.lmo(g) != 0) or ties
    assert (v != 0).sum() == (norm.lmo(g) != 0).sum() or (ties and isinstance(norm, Rows))


@pytest.mark.parametrize("period", range(2, 18))
def test_no_pattern_hides_the_largest_entries(period: int) -> None:
    # A look at every so many entries would see only the small ones, or only the large ones.
    index = torch.arange(300_000)
    for place in (0, 1):
        g = gaussian((300_000,), 1, torch.float32) + 100 * (index % period == place)
        for norm in (KSparse(1000), KSupport(1000)):
            (v,) = step_to_vertex(norm, [g])
            assert v.count_nonzero() == 1000
            assert torch.sum(-g.double() * v.double()).item() == pytest.approx(norm.dual(g.double()).item(), rel=1e-6)


@pytest.mark.parametrize("norm", [n for n in LARGE if (n.k or 0) != 50_000], ids=str)
def test_one_nan_in_a_large_gradient_is_not_hidden(norm: Norm) -> None:
    g = gaussian((64, 32, 5, 5), 1, torch.float32)
    g[13, 7, 2, 2] = math.nan
    (v,) = step_to_vertex(norm, [g], capturable=True)  # otherwise, on a CPU, it is refused
    assert v.isnan().any()


@pytest.mark.parametrize("inner", [KSupport(4), KSparse(4), Lp(1)], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((40, 90), "strided"), ((90, 40), "transposed"), *(((40, 10, 3, 3), layout) for layout in LAYOUTS)],
    ids=str,
)
def test_singular_directions_are_feasible_at_once_and_exact_in_the_end(
    inner: VectorNorm, shape: Shape, layout: str
) -> None:
    # Directions kept from step to step: an early vertex is a point of the ball, the later ones become exact.
    u, _, vh = torch.linalg.svd(gaussian(shape).flatten(1), full_matrices=False)
    g = ((u * 0.8 ** torch.arange(40)) @ vh).reshape(shape)
    ball, p = NormBall(Spectral(inner), 1.0), nn.Parameter(LAYOUTS[layout](torch.zeros(shape, dtype=torch.float64)))
    opt = SFW([{"params": [p], "ball": ball}], lr=1.0, momentum=0.0, rescale=None)
    for _ in range(60):
        p.grad = LAYOUTS[layout](g)
        opt.step()
        assert ball.norm(p) <= 1 + 1e-9
        assert torch.linalg.matrix_rank(p.detach().flatten(1)) <= (inner.k or 1)
    torch.testing.assert_close(p.detach(), ball.lmo(g), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 12, 2, 3), (20, 20, 3, 1), (20, 20, 1, 3), (24, 40, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "norm",
    [Spectral(KSparse(4), spatial=True), Spectral(KSupport(4), 1, spatial=True), Spectral(Lp(1), 1, 2, spatial=True)],
    ids=str,
)
def test_singular_directions_of_spatial_matrices_are_exact_in_the_end(
    norm: Spectral, shape: Shape, layout: str
) -> None:
    _, rows, columns = unfolded(norm, torch.empty(shape)).shape
    decay = 0.8 ** torch.arange(min(rows, columns), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(gaussian((norm.groups, rows, columns)), full_matrices=False)
    g = folded(norm, torch.tensor([1.0, 0.9])[: norm.groups, None, None] * (u * decay @ vh), shape)
    p = nn.Parameter(LAYOUTS[layout](torch.zeros(shape, dtype=torch.float64)))
    ball = NormBall(norm, 1.0)
    opt = SFW([{"params": [p], "ball": ball}], lr=1.0, momentum=0.0, rescale=None)
    for _ in range(60):
        p.grad = LAYOUTS[layout](g)
        opt.step()
        assert norm(p) <= 1 + 1e-9
    assert ("basis" in opt.state[p]) == (min(rows, columns) > 16)  # smaller ones are decomposed
    torch.testing.assert_close(p.detach(), ball.lmo(g), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("inner", [KSupport(3), KSparse(3), Lp(1)], ids=str)
def test_gradients_of_lower_rank_give_vertices_of_no_more_rank(inner: VectorNorm) -> None:
    g = gaussian((40, 2), 1) @ gaussian((2, 50), 2)
    g[10:20] = 0
    norm = Spectral(inner)
    for foreach in (False, True):
        for v in step_to_vertex(norm, [g, g], foreach=foreach):
            torch.testing.assert_close(v, norm.lmo(g), rtol=0, atol=1e-3)  # measured: 1.1e-4
            assert not v[10:20].any()
            assert torch.linalg.matrix_rank(v) <= 2


def test_singular_directions_survive_gradients_of_zero_and_of_lower_rank() -> None:
    ball, p = NormBall(Spectral(KSupport(3)), 1.0), nn.Parameter(torch.zeros(40, 40))
    opt = SFW([{"params": [p], "ball": ball}], lr=1.0, momentum=0.0, rescale=None)
    low = gaussian((40, 1), 1, torch.float32) @ gaussian((1, 40), 2, torch.float32)
    for g in [torch.zeros(40, 40), low, torch.zeros(40, 40), low, *[gaussian((40, 40), 3, torch.float32)] * 20]:
        before = p.detach().clone()
        p.grad = g
        opt.step()
        assert p.isfinite().all()
        assert ball.norm(p) <= 1 + 1e-5
        if not g.any():
            assert torch.equal(p, before)
    assert torch.sum(-g * p) > 0.98 * ball.norm.dual(g)


# --- large balls of full rank, and of many directions -----------------------------------------------------------------

FULL_RANK = [
    (Spectral(Lp(math.inf)), [(40, 60)]),
    (Spectral(KSparse(40)), [(40, 8, 3, 3)]),
    (Spectral(KSparse(40), dim=1), [(9, 40, 2, 3)]),
    (Spectral(KSparse(70), groups=2), [(70, 50, 1, 1)]),
    (Spectral(KSparse(36), spatial=True), [(20, 12, 3, 3)]),
    (Spectral(KSparse(72), 1, groups=2, spatial=True), [(18, 40, 2, 2)]),
    (Spectral(KSparse(43)), [(40, 60), (3, 8)]),  # jointly, one of them small
    (Spectral(KSparse(36)), [(48, 64)]),  # not all directions, but many
]


@pytest.mark.parametrize(("norm", "shapes"), FULL_RANK, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_polar_factors_by_products_are_feasible_and_nearly_optimal(
    norm: Spectral, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    group = {"params": parameters, "ball": NormBall(norm, 2.0), "joint": len(shapes) > 1}
    opt = SFW([group], lr=1.0, momentum=0.0, rescale=None)
    gradients = [gaussian(shape, seed, dtype) for seed, shape in enumerate(shapes)]
    for _ in range(1 if norm.inner != KSparse(36) else 12):  # kept directions need some steps
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        opt.step()
    vertices = [p.detach().double() for p in parameters]
    assert norm(vertices) <= 2 * (1 + 16 * torch.finfo(dtype).eps)
    value = -sum((g.double() * v).sum() for g, v in zip(gradients, vertices, strict=True))
    assert value >= 0.98 * 2 * norm.dual([g.double() for g in gradients])


def test_a_batch_of_full_rank_balls_takes_the_steps_of_each() -> None:
    stack = torch.stack([gaussian((40, 36), seed) for seed in range(3)])
    norm = Spectral(Lp(math.inf))
    lengths, (together,) = unit_vertices(norm, [stack])
    torch.testing.assert_close(lengths, stack.flatten(1).norm(dim=1))
    for i, g in enumerate(stack):
        _, (alone,) = unit_vertices(norm, [g[None]])
        torch.testing.assert_close((together.factor * together.carrier)[i], (alone.factor * alone.carrier)[0])
