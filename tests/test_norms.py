import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.linalg import topk_mask
from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm

from .instances import INSTANCES, VECTOR_NORMS

every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)


def gradient(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- what defines a vertex, a dual and a norm -------------------------------------------------------------------------


@every_instance
def test_vertex_attains_the_dual_and_lies_on_the_sphere(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gradient(shape)
    v = norm.lmo(g)
    assert v.shape == g.shape
    assert torch.sum(g * v).item() == pytest.approx(-norm.dual(g).item(), rel=1e-12)
    assert norm(v).item() == pytest.approx(1, rel=1e-12)


@every_instance
def test_hoelder_inequality(norm: Norm, shape: tuple[int, ...]) -> None:
    x, g = gradient(shape, 1), gradient(shape, 2)
    assert torch.sum(x * g) <= norm(x) * norm.dual(g) * (1 + 1e-12)


@every_instance
def test_gradient_of_the_norm_is_a_dual_certificate(norm: Norm, shape: tuple[int, ...]) -> None:
    x = gradient(shape, 3).requires_grad_()
    value = norm(x)
    (y,) = torch.autograd.grad(value, x)
    # dual(y) = 1 and ⟨x, y⟩ = norm(x) prove that the norm is neither too small nor too large at x.
    assert norm.dual(y).item() == pytest.approx(1, rel=1e-9)
    assert torch.sum(x * y).item() == pytest.approx(value.item(), rel=1e-9)


@every_instance
def test_minus_vertex_is_the_gradient_of_the_dual(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gradient(shape, 4).requires_grad_()
    (y,) = torch.autograd.grad(norm.dual(g), g)
    torch.testing.assert_close(norm.lmo(g.detach()), -y, rtol=1e-8, atol=1e-9)


@given(st.lists(st.integers(-2, 2), min_size=12, max_size=12), st.sampled_from(INSTANCES))
def test_vertices_on_ties_and_zeros(values: list[int], instance: tuple[Norm, tuple[int, ...]]) -> None:
    norm, shape = instance
    g = torch.tensor(values, dtype=torch.float64).repeat(-(-math.prod(shape) // 12))[: math.prod(shape)].reshape(shape)
    v = norm.lmo(g)
    assert norm(v) <= 1 + 1e-9
    torch.testing.assert_close(torch.sum(g * v), -norm.dual(g), rtol=1e-9, atol=1e-9)


# --- zeros, ties, scale, precision ------------------------------------------------------------------------------------


@every_instance
def test_zero_gradient_gives_the_zero_vertex(norm: Norm, shape: tuple[int, ...]) -> None:
    zero = torch.zeros(shape)
    assert torch.equal(norm.lmo(zero), zero)
    assert norm(zero) == norm.dual(zero) == 0


@pytest.mark.parametrize("inner", [KSparse(2), KSupport(2)], ids=str)
def test_ties_keep_exactly_k(inner: VectorNorm) -> None:
    ones = torch.ones(5, 4)
    assert inner.lmo(ones).count_nonzero() == 2
    assert Rows(inner).lmo(ones).norm(dim=1).count_nonzero() == 2
    assert torch.linalg.matrix_rank(Spectral(inner).lmo(torch.eye(6))) == 2
    assert (Blocks(inner, 4).lmo(ones).count_nonzero(dim=1) == 2).all()


def test_ties_go_to_the_lower_index() -> None:
    assert topk_mask(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(("norm", "shape"), [i for i in INSTANCES if len(i[1]) > 1 and i[1][0] >= 4], ids=str)
def test_zero_filters_stay_zero(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gradient(shape)
    g[1:3] = 0
    assert norm.lmo(g)[1:3].abs().max() < 1e-12


@every_instance
@pytest.mark.parametrize("exponent", [-100, 100])
def test_scale_of_the_gradient_does_not_matter(norm: Norm, shape: tuple[int, ...], exponent: int) -> None:
    g, scale = gradient(shape, dtype=torch.float32), 2.0**exponent
    torch.testing.assert_close(norm.lmo(g * scale), norm.lmo(g), rtol=0, atol=0)
    torch.testing.assert_close(norm(g * scale), norm(g) * scale, rtol=0, atol=0)
    torch.testing.assert_close(norm.dual(g * scale), norm.dual(g) * scale, rtol=0, atol=0)


@every_instance
def test_bfloat16_follows_float32(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gradient(shape).to(torch.bfloat16)
    v = norm.lmo(g)
    assert v.dtype == torch.bfloat16
    torch.testing.assert_close(v, norm.lmo(g.float()).to(torch.bfloat16))
    assert norm(g).dtype == torch.float32
    assert norm(g) == norm(g.float())


@pytest.mark.parametrize(("norm", "shape"), [i for i in INSTANCES if not isinstance(i[0], Spectral)], ids=str)
def test_nan_is_not_hidden(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gradient(shape)
    g.view(-1)[0] = math.nan
    assert norm(g).isnan()


@pytest.mark.parametrize("norm", [Rows(Lp(math.inf)), Rows(KSparse(3)), Rows(KSupport(2))], ids=str)
@pytest.mark.parametrize("tiny", [2.0**-62, 2.0**-70, 2.0**-130])
def test_vanishing_rows_do_not_leave_the_ball(norm: Norm, tiny: float) -> None:
    for g in (gradient((6, 5), dtype=torch.float32), gradient((6,), dtype=torch.float32)):
        g[2:] *= tiny
        assert norm(norm.lmo(g)) <= 1 + 1e-6


@pytest.mark.parametrize("p", [1.00001, 1.0001, 1.01])
def test_powers_near_one_stay_in_the_ball(p: float) -> None:
    ties = torch.full((1000,), 0.1)
    assert Lp(p)(Lp(p).lmo(ties)).item() == pytest.approx(1, abs=2e-6)


def test_zero_rows_stay_exactly_zero_under_the_operator_norm() -> None:
    u, _, vh = torch.linalg.svd(gradient((8, 6), dtype=torch.float32), full_matrices=False)
    g = (u * torch.logspace(0, -5, 6)) @ vh
    g[[2, 5]] = 0
    assert Spectral(Lp(math.inf)).lmo(g)[[2, 5]].count_nonzero() == 0


# --- limits and special cases -----------------------------------------------------------------------------------------

LIMITS = [
    (KSupport(1), Lp(1)),
    (KSparse(1), Lp(1)),
    (KSupport(6), Lp(2)),
    (KSparse(6), Lp(math.inf)),
    (Rows(KSupport(3)), Lp(2)),
    (Spectral(Lp(2)), Lp(2)),
    (Spectral(KSupport(2)), Lp(2)),
    (Blocks(Lp(2), 2), Lp(2)),
]


@pytest.mark.parametrize(("norm", "limit"), LIMITS, ids=str)
def test_limits(norm: Norm, limit: Norm) -> None:
    x = gradient((3, 2))
    torch.testing.assert_close(norm(x), limit(x))
    torch.testing.assert_close(norm.dual(x), limit.dual(x))
    torch.testing.assert_close(norm.lmo(x), limit.lmo(x))


def test_known_values() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert Rows(Lp(1))(x) == 15  # group lasso
    assert Rows(KSparse(2)).dual(x) == 15
    torch.testing.assert_close(Rows(Lp(1)).lmo(x), torch.tensor([[0, 0], [0, 0], [-0.6, -0.8]]))
    assert Spectral(Lp(1))(torch.diag(torch.tensor([3.0, -2.0, 1.0]))).item() == pytest.approx(6)  # nuclear
    assert KSupport(2)(torch.tensor([1.0, 1.0, 1.0, 1.0])).item() == pytest.approx(4 / math.sqrt(2))
    assert KSupport(2)(torch.tensor([5.0, 1.0, 1.0])).item() == pytest.approx(math.sqrt(25 + 4))


def test_spectral_vertices_have_rank_k_and_blocks_have_n_of_m() -> None:
    g = gradient((12, 8))
    assert torch.linalg.matrix_rank(Spectral(KSupport(3)).lmo(g)) == 3
    blocks = Blocks(KSupport(2), 4).lmo(g).reshape(-1, 4)
    assert (blocks.count_nonzero(dim=1) == 2).all()


def test_operator_norm_vertex_is_the_polar_factor() -> None:
    g = gradient((4, 6))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(Spectral(Lp(math.inf)).lmo(g), -u @ vh)


@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
def test_groups_are_one_block_diagonal_matrix(inner: VectorNorm) -> None:
    g = gradient((6, 4))
    whole = torch.block_diag(g[:3], g[3:])
    grouped, plain = Spectral(inner, groups=2), Spectral(inner)
    torch.testing.assert_close(grouped(g), plain(whole))
    torch.testing.assert_close(torch.block_diag(*grouped.lmo(g).split(3)), plain.lmo(whole), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("lift", [lambda inner: inner, Rows, Spectral], ids=["vector", "rows", "spectral"])
@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
def test_several_tensors_are_one_block_diagonal_object(lift, inner: VectorNorm) -> None:  # type: ignore[no-untyped-def]
    norm, parts = lift(inner), [gradient((3, 4), 1), gradient((2, 5), 2)]
    whole = torch.block_diag(*parts)
    torch.testing.assert_close(norm(parts), norm(whole))
    vertices = norm.lmo(parts)
    torch.testing.assert_close(torch.block_diag(*vertices), norm.lmo(whole), atol=1e-10, rtol=1e-8)


def test_rows_of_dimension_one_are_those_of_the_transpose() -> None:
    g = gradient((3, 5, 2))
    moved = Rows(KSupport(2), dim=1).lmo(g).transpose(0, 1)
    torch.testing.assert_close(moved, Rows(KSupport(2)).lmo(g.transpose(0, 1)))


# --- diameters --------------------------------------------------------------------------------------------------------


@every_instance
def test_diameter_is_that_of_two_opposite_vertices(norm: Norm, shape: tuple[int, ...]) -> None:
    # For p < 2 it is attained between opposite corners e_i and −e_i; the vertices of some direction attain it always.
    diameter = norm.diameter(shape)
    vector = norm.inner if isinstance(norm, Rows | Spectral | Blocks) else norm
    directions = [gradient(shape, seed) for seed in range(20)]
    longest = max(2 * norm.lmo(g).norm().item() for g in directions)
    assert longest <= diameter * (1 + 1e-12)
    if not (isinstance(vector, Lp) and vector.p not in (1, 2, math.inf)) and not isinstance(norm, Blocks):
        assert longest == pytest.approx(diameter)


@pytest.mark.parametrize(("p", "expected"), [(1.5, 2.0), (1.01, 2.0), (2, 2.0), (4, 2 * 16**0.25), (math.inf, 8.0)])
def test_diameter_of_p_balls(p: float, expected: float) -> None:
    assert Lp(p).diameter((4, 4)) == pytest.approx(expected)


# --- the warm-started oracle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [KSupport(4), KSparse(4), Lp(1)], ids=str)
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 10, 3, 3)])
def test_warm_oracle_is_feasible_at_once_and_exact_in_the_end(inner: VectorNorm, shape: tuple[int, ...]) -> None:
    norm = Spectral(inner)
    assert norm.uses_warm_start(shape)
    u, _, vh = torch.linalg.svd(gradient(shape).flatten(1), full_matrices=False)
    g = ((u * 0.8 ** torch.arange(40)) @ vh).reshape(shape)
    vertex, basis = norm.lmo_warm(g, None)
    assert norm(vertex) <= 1 + 1e-9
    for _ in range(60):
        vertex, basis = norm.lmo_warm(g, basis)
    assert norm(vertex) <= 1 + 1e-9
    torch.testing.assert_close(vertex, norm.lmo(g), atol=1e-4, rtol=1e-3)


def test_warm_oracle_leaves_the_random_state_and_survives_zero() -> None:
    norm, before = Spectral(KSupport(3)), torch.get_rng_state()
    _, basis = norm.lmo_warm(gradient((30, 30)), None)
    vertex, again = norm.lmo_warm(torch.zeros(30, 30, dtype=torch.float64), basis)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, basis)
    assert vertex.count_nonzero() == 0


# --- plain data and bad input -----------------------------------------------------------------------------------------


@every_instance
def test_spec_survives_json(norm: Norm, shape: tuple[int, ...]) -> None:
    again = Norm.from_spec(json.loads(json.dumps(norm.to_spec())))
    assert again == norm
    assert hash(again) == hash(norm)


def test_infinity_is_a_string_in_a_spec() -> None:
    assert Lp(math.inf).to_spec() == {"norm": "Lp", "p": "inf"}


@pytest.mark.parametrize(
    "spec", [{}, {"norm": "Huge"}, {"norm": "Lp"}, {"norm": "KSparse", "k": 2, "q": 1}, {"norm": "Rows", "inner": {}}]
)
def test_foreign_specs_are_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="spec"):
        Norm.from_spec(spec)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lp(0.5),
        lambda: Lp(math.nan),
        lambda: KSparse(0),
        lambda: KSupport(True),
        lambda: KSupport(1.5),  # type: ignore[arg-type]
        lambda: Rows(Rows(Lp(1))),  # type: ignore[arg-type]
        lambda: Blocks(KSupport(5), 4),
        lambda: Blocks(KSupport(2), 0),
        lambda: Spectral(Lp(1), groups=0),
    ],
)
def test_bad_norms_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"needs|lifts"):
        make()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (KSupport(8), (7,)),
        (Rows(KSparse(3)), (2, 9)),
        (Spectral(KSupport(4)), (3, 9)),
        (Spectral(Lp(1)), (9,)),
        (Blocks(KSupport(2), 4), (3, 6)),
        (Blocks(KSupport(2), 4), (8,)),
        (Rows(Lp(1), dim=3), (2, 2)),
        (Spectral(Lp(1), groups=3), (4, 4)),
    ],
    ids=str,
)
def test_tensors_a_norm_cannot_hold_are_refused(norm: Norm, shape: tuple[int, ...]) -> None:
    for call in (norm, norm.dual, norm.lmo):
        with pytest.raises(ValueError, match=r"needs|multiple|split|counted"):
            call(torch.ones(shape))
    with pytest.raises(ValueError, match=r"needs|multiple|split|counted"):
        norm.diameter(shape)


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64), torch.ones(0)])
def test_tensors_without_a_norm_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="a norm needs"):
        Lp(2)(x)


def test_projection_is_not_promised_where_none_is_known() -> None:
    with pytest.raises(NotImplementedError, match="Lp"):
        Lp(3).project(torch.ones(3), 1.0)
