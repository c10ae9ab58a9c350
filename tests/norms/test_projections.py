"""Euclidean projections: what defines the nearest point, limits, precision. Other solvers: test_independent.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from tests.instances import INSTANCES

EPS = torch.finfo(torch.float64).eps


def has_projection(norm: Norm) -> bool:
    if isinstance(norm, Blocks):
        return isinstance(norm.inner, KSupport)
    inner = norm.inner if isinstance(norm, Rows | Spectral) else norm
    return not isinstance(inner, Lp) or inner.p in (1, 2, math.inf)


PROJECTABLE = [(norm, shape) for norm, shape in INSTANCES if has_projection(norm)]
every_projection = pytest.mark.parametrize(("norm", "shape"), PROJECTABLE, ids=str)
one_shape_each = pytest.mark.parametrize(("norm", "shape"), list(dict(PROJECTABLE).items()), ids=str)


def gaussian(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def graded(shape: tuple[int, ...], seed: int) -> Tensor:
    """Entries whose sizes differ by many powers of ten."""
    return gaussian(shape, seed) * 10 ** (4 * gaussian(shape, seed + 1000))


def assert_nearest(norm: Norm, x: Tensor, p: Tensor, radius: float) -> None:
    """The projection is the one p in the ball with ⟨x − p, v − p⟩ <= 0 for all v in it, the vertices above all."""
    # NormBall.contains allows 4·eps; the singular values of the rebuilt matrix came out up to 5·eps too large.
    assert norm(p) <= radius * (1 + (16 if isinstance(norm, Spectral) else 4) * EPS)
    residual = x - p
    # The largest ⟨x − p, v⟩ belongs to the vertex lmo(p − x). 30·eps is what was measured, under Spectral(Lp(inf)).
    for direction in [-residual, gaussian(x.shape, 7), gaussian(x.shape, 8)]:
        gap = torch.sum(residual * (radius * norm.lmo(direction) - p))
        assert gap <= 100 * EPS * x.norm() * radius


# --- what defines the nearest point -----------------------------------------------------------------------------------


@every_projection
@pytest.mark.parametrize("make", [gaussian, graded])
def test_variational_inequality(make, norm: Norm, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    for seed, share in enumerate([1e-9, 0.1, 0.7, 1 - 1e-9]):
        x = make(shape, seed)
        radius = share * norm(x).item()
        p = norm.project(x, radius)
        assert_nearest(norm, x, p, radius)
        assert norm(p).item() == pytest.approx(radius, rel=1e-12)  # a point outside goes to the boundary


@given(
    st.lists(st.integers(-2, 2), min_size=12, max_size=12),
    st.sampled_from(PROJECTABLE),
    st.sampled_from([0.3, 0.5, 1.0, math.sqrt(2), 2.0, 3.5]),
)
def test_ties_and_zeros(values: list[int], instance: tuple[Norm, tuple[int, ...]], radius: float) -> None:
    norm, shape = instance
    x = torch.tensor(values, dtype=torch.float64).repeat(-(-math.prod(shape) // 12))[: math.prod(shape)].reshape(shape)
    p = norm.project(x, radius)
    assert_nearest(norm, x, p, radius)
    if not isinstance(norm, Spectral):
        assert not p[x == 0].any()
        assert (p * x >= 0).all()


@every_projection
def test_points_inside_are_left_as_they_are(norm: Norm, shape: tuple[int, ...]) -> None:
    x = gaussian(shape, 1)
    x.view(-1)[0] = -0.0
    for radius in (norm(x).item(), 1.5 * norm(x).item(), 1e300):
        p = norm.project(x, radius)
        assert torch.equal(p, x)
        assert torch.equal(p.signbit(), x.signbit())
    zero = torch.zeros(shape)
    assert torch.equal(norm.project(zero, 1e-6), zero)


@one_shape_each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projecting_twice_changes_nothing(norm: Norm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gaussian(shape, 2, dtype)
    ball = NormBall(norm, 0.4 * norm(x).item())
    once = ball.project(x)
    twice = ball.project(once)
    if isinstance(norm, Spectral):  # where rounding leaves the matrix just outside, it moves by as little
        torch.testing.assert_close(twice, once, rtol=0, atol=16 * torch.finfo(dtype).eps * ball.radius)
    else:
        assert ball.contains(once)
        assert torch.equal(twice, once)


@one_shape_each
def test_distances_do_not_grow(norm: Norm, shape: tuple[int, ...]) -> None:
    for seed in range(4):
        x, step = gaussian(shape, seed), 10.0**-seed * gaussian(shape, seed + 50)
        radius = 0.6 * norm(x).item()
        distance = (norm.project(x + step, radius) - norm.project(x, radius)).norm()
        assert distance <= step.norm() * (1 + 1e-10)


# --- symmetries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [Lp(1), Lp(2), Lp(math.inf), KSparse(3), KSupport(1), KSupport(3)], ids=str)
def test_signs_and_order_of_entries_do_not_matter(norm: Norm) -> None:
    x, order = gaussian((9,), 1), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    signs = gaussian((9,), 2).sign()
    radius = 0.5 * norm(x).item()
    torch.testing.assert_close(norm.project((signs * x)[order], radius), (signs * norm.project(x, radius))[order])


@pytest.mark.parametrize("inner", [Lp(1), Lp(math.inf), KSparse(2), KSupport(2)], ids=str)
def test_rotations_do_not_matter_to_rows_and_spectra(inner: Lp | KSparse | KSupport) -> None:
    x, left, right = gaussian((4, 5), 1), *(torch.linalg.qr(gaussian((n, n), n)).Q for n in (4, 5))
    radius = 0.5 * Rows(inner)(x).item()
    torch.testing.assert_close(Rows(inner).project(x @ right, radius), Rows(inner).project(x, radius) @ right)
    radius = 0.5 * Spectral(inner)(x).item()
    turned = Spectral(inner).project(left @ x @ right, radius)
    torch.testing.assert_close(turned, left @ Spectral(inner).project(x, radius) @ right)


def test_order_of_blocks_does_not_matter() -> None:
    norm, x = Blocks(KSupport(2), 4), gaussian((3, 8), 1)
    p = norm.project(x, 1.0)
    torch.testing.assert_close(norm.project(x.roll(4, dims=1).flip(0), 1.0), p.roll(4, dims=1).flip(0))


# --- limits and known values ------------------------------------------------------------------------------------------

LIMITS = [
    (KSupport(1), Lp(1)),
    (KSparse(1), Lp(1)),
    (KSupport(6), Lp(2)),
    (KSparse(6), Lp(math.inf)),
    (Rows(KSupport(3)), Lp(2)),
    (Spectral(KSupport(2)), Lp(2)),
    (Spectral(Lp(2)), Lp(2)),
    (Blocks(KSupport(2), 2), Lp(2)),
    (Blocks(KSupport(2), 6, dim=0), KSupport(2)),
]


@pytest.mark.parametrize(("norm", "limit"), LIMITS, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_limits(norm: Norm, limit: Norm, share: float) -> None:
    x = gaussian((6, 1) if isinstance(norm, Blocks) and norm.dim == 0 else (3, 2), 3)
    radius = share * norm(x).item()
    torch.testing.assert_close(norm.project(x, radius), limit.project(x, radius))


@pytest.mark.parametrize(
    ("norm", "x", "radius", "expected"),
    [
        (Lp(1), [3.0, -1.0, 2.5], 2.0, [1.25, 0.0, 0.75]),
        (Lp(2), [3.0, -4.0], 1.0, [0.6, -0.8]),
        (Lp(math.inf), [3.0, -0.1, 1.0], 0.5, [0.5, -0.1, 0.5]),
        (KSparse(2), [9.0, 2.0, -1.5, 1.0], 1.0, [1.0, 0.75, -0.25, 0.0]),
        (KSparse(2), [9.0, 0.5, 0.25], 1.0, [1.0, 0.5, 0.25]),  # the box alone is enough
        (KSparse(2), [9.0, -9.0, 0.5], 1.0, [1.0, -1.0, 0.0]),
        # λ = 1 and d = 1, so t = 1: 4 is halved; the two entries of 3/2 have θ = 1/2 each.
        (KSupport(2), [4.0, 1.5, -1.5, 1.0, 0.3], math.sqrt(5), [2.0, 0.5, -0.5, 0.0, 0.0]),
        (KSupport(2), [6.0, 8.0, 1.0], 5.0, [3.0, 4.0, 0.0]),  # λ = 1; the last entry is below the threshold
        (KSupport(3), [6.0, 0.0, 8.0, 0.0], 5.0, [3.0, 0.0, 4.0, 0.0]),  # fewer entries than k
        (KSupport(2), [1.0, 1.0, 1.0, 1.0], math.sqrt(2), [0.5, 0.5, 0.5, 0.5]),
    ],
    ids=str,
)
def test_known_values(norm: Norm, x: list[float], radius: float, expected: list[float]) -> None:
    p = norm.project(torch.tensor(x, dtype=torch.float64), radius)
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_blocks_share_one_ball() -> None:
    # With the same λ = 1 in both blocks, each is the projection onto its own ball of radius √5; together √10.
    block = torch.tensor([4.0, 1.5, -1.5, 1.0], dtype=torch.float64)
    p = Blocks(KSupport(2), 4).project(torch.cat([block, -block])[None], math.sqrt(10))
    half = torch.tensor([2.0, 0.5, -0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(p, torch.cat([half, -half])[None], rtol=0, atol=1e-14)


# --- scale and precision ----------------------------------------------------------------------------------------------


@one_shape_each
@pytest.mark.parametrize("scale", [1e9, 1e-30])
def test_large_and_small_inputs_in_single_precision(norm: Norm, shape: tuple[int, ...], scale: float) -> None:
    x = (gaussian(shape, 4) * scale).float()
    for share in (0.05, 0.9):
        radius = share * norm(x).item()
        p, exact = norm.project(x, radius).double(), norm.project(x.double(), radius)
        assert (p - exact).norm() <= 3e-6 * exact.norm()  # measured: 6e-7
        assert torch.equal(norm.project(x, 10 * norm(x).item()), x)


@pytest.mark.parametrize("norm", [Lp(1), Lp(2), Lp(math.inf), KSparse(3), KSupport(1), KSupport(3)], ids=str)
@pytest.mark.parametrize("radius", [1.0, 100.0, 1e4])
def test_differences_of_large_entries_are_not_lost(norm: Norm, radius: float) -> None:
    # Neighbours in single precision, 64 apart: a threshold near 2^30 would be wrong by more than the radius.
    x = 2.0**30 + 64 * (2 * gaussian((12,), 5, torch.float32)).round()
    p, exact = norm.project(x, radius).double(), norm.project(x.double(), radius)
    assert (p - exact).norm() <= 2e-6 * exact.norm()  # measured: 3e-7


@one_shape_each
@pytest.mark.parametrize("exponent", [-100, 100])
def test_scale_does_not_matter(norm: Norm, shape: tuple[int, ...], exponent: int) -> None:
    x, scale = gaussian(shape, 6, torch.float32), 2.0**exponent
    radius = 0.5 * norm(x).item()
    torch.testing.assert_close(norm.project(x * scale, radius * scale), norm.project(x, radius) * scale, rtol=0, atol=0)


@one_shape_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(norm: Norm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gaussian(shape, 4, dtype)
    radius = 0.5 * norm(x).item()
    p = norm.project(x, radius)
    assert p.dtype == dtype
    assert torch.equal(p, norm.project(x.float(), radius).to(dtype))


@pytest.mark.parametrize(("norm", "radius"), [(KSparse(50), 5.0), (KSupport(1), 100.0), (KSupport(50), 60.0)], ids=str)
def test_long_tensors_stay_inside(norm: Norm, radius: float) -> None:
    # One threshold for many entries: without the last shrink, single precision ends outside by up to 3e-5.
    x = 1 + 1e-3 * gaussian((100_000,), 2, torch.float32)
    x[:50] = 2
    p = norm.project(x, radius)
    assert NormBall(norm, radius).contains(p)
    assert norm(p.double()).item() == pytest.approx(radius, rel=1e-4)


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [Lp(1), Lp(2), Lp(math.inf), Rows(KSparse(3)), Spectral(KSupport(2)), Blocks(KSupport(2), 4)], ids=str
)
def test_nothing_waits_for_the_device(norm: Norm) -> None:
    # Meta tensors have no values: reading one, as .item() or an if does, raises.
    assert norm.project(torch.empty(4, 8, device="meta"), 1.0).shape == (4, 8)


def test_no_gradient_flows_and_the_input_is_kept() -> None:
    x = torch.ones(4, requires_grad=True)
    p = KSupport(2).project(x, 1.0)
    assert not p.requires_grad
    assert torch.equal(x.detach(), torch.ones(4))


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_bad_radii_are_refused(radius: float) -> None:
    with pytest.raises(ValueError, match="positive, finite radius"):
        Lp(1).project(torch.ones(3), radius)


@pytest.mark.parametrize(("norm", "shape"), [(KSupport(4), (3,)), (Spectral(Lp(1)), (3,)), (Rows(KSparse(3)), (2, 5))])
def test_tensors_a_norm_cannot_hold_are_refused(norm: Norm, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs"):
        norm.project(torch.ones(shape), 1.0)


@pytest.mark.parametrize(("norm", "shape"), [i for i in INSTANCES if i not in PROJECTABLE], ids=str)
def test_other_norms_say_that_none_is_known(norm: Norm, shape: tuple[int, ...]) -> None:
    with pytest.raises(NotImplementedError, match=r"no Euclidean projection is known for (Lp|Blocks)"):
        norm.project(torch.ones(shape), 1.0)
