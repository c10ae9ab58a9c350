"""What defines a norm, its dual, its oracle and its diameter. Symmetries, zeros, ties and scales: test_invariance.py;
solvers that know nothing of these formulas: test_independent.py."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.compression.factored import matrices
from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm
from pliant.norms.shapes import row_dims
from tests.instances import (
    INSTANCES,
    LIFTED_SHAPES,
    VECTOR_NORMS,
    Lift,
    Shape,
    entries,
    few_integers,
    folded,
    gaussian,
    tiled,
    unfolded,
)

every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)
every_lifted_shape = pytest.mark.parametrize(
    ("lift", "shape", "magnitudes"), LIFTED_SHAPES, ids=[f"{lift(Lp(2))}-{shape}" for lift, shape, _ in LIFTED_SHAPES]
)

# Relative rounding allowed in a scalar. Measured: 7 eps under Spectral and 3 eps elsewhere; in half precision, where
# only the vertex itself is rounded, 0.4 eps.
ROUNDING = {
    torch.float64: 16 * torch.finfo(torch.float64).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def inner_product(x: Tensor, y: Tensor) -> float:
    return torch.sum(x.double() * y.double()).item()


# --- what defines a vertex, a dual and a norm -------------------------------------------------------------------------


@every_instance
@every_dtype
def test_vertex_attains_the_dual_and_lies_on_the_sphere(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    g = gaussian(shape, dtype=dtype)
    v = norm.lmo(g)
    assert v.shape == g.shape
    assert v.dtype == dtype
    assert norm(v.double()).item() == pytest.approx(1, rel=ROUNDING[dtype])
    assert inner_product(g, v) == pytest.approx(-norm.dual(g).item(), rel=ROUNDING[dtype])


@every_instance
def test_hoelder_inequality(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape, 1)
    # Near the vertex the inequality is tight, so that a norm or a dual slightly too small would break it.
    for seed, distance in enumerate([0.0, 0.01, 0.1, 1.0, 100.0]):
        x = distance * gaussian(shape, seed + 2) - norm.lmo(g)
        assert inner_product(x, g) <= norm(x) * norm.dual(g) * (1 + ROUNDING[g.dtype])


@every_instance
def test_gradient_of_the_norm_is_a_dual_certificate(norm: Norm, shape: Shape) -> None:
    x = gaussian(shape, 3).requires_grad_()
    value = norm(x)
    (y,) = torch.autograd.grad(value, x)
    # dual(y) = 1 and ⟨x, y⟩ = norm(x) prove that the norm is neither too small nor too large at x.
    assert norm.dual(y).item() == pytest.approx(1, rel=1e-9)
    assert torch.sum(x * y).item() == pytest.approx(value.item(), rel=1e-9)


@every_instance
def test_minus_vertex_is_the_gradient_of_the_dual(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape, 4).requires_grad_()
    (y,) = torch.autograd.grad(norm.dual(g), g)
    torch.testing.assert_close(norm.lmo(g.detach()), -y, rtol=1e-8, atol=1e-9)


@every_instance
def test_gradients_are_those_of_finite_differences(norm: Norm, shape: Shape) -> None:
    x = gaussian(shape, 5).requires_grad_()
    assert torch.autograd.gradcheck(norm, x, fast_mode=True)
    assert torch.autograd.gradcheck(norm.dual, x, fast_mode=True)


@settings(max_examples=300)
@given(few_integers, st.sampled_from(INSTANCES))
def test_gradients_at_ties_and_zeros_are_subgradients(values: list[int], instance: tuple[Norm, Shape]) -> None:
    norm, shape = instance
    x = tiled(values, shape).requires_grad_()
    for value, other in ((norm(x), norm.dual), (norm.dual(x), norm)):
        (y,) = torch.autograd.grad(value, x)
        assert other(y) <= 1 + 1e-9
        torch.testing.assert_close(torch.sum(x * y), value, rtol=1e-9, atol=1e-9)


@every_instance
def test_an_oracle_builds_no_graph_and_keeps_its_argument(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape).requires_grad_()
    assert not norm.lmo(g).requires_grad
    assert torch.equal(g, gaussian(shape))


# --- limits and special cases -----------------------------------------------------------------------------------------


def assert_same(norm: Norm, other: Norm, shape: Shape) -> None:
    x = gaussian(shape, 6)
    torch.testing.assert_close(norm(x), other(x))
    torch.testing.assert_close(norm.dual(x), other.dual(x))
    torch.testing.assert_close(norm.lmo(x), other.lmo(x))
    assert norm.diameter(shape) == pytest.approx(other.diameter(shape))


@every_lifted_shape
def test_limits_of_k(lift: Lift, shape: Shape, magnitudes: int) -> None:
    assert lift(KSupport(1)).length(shape) == magnitudes
    assert_same(lift(KSupport(1)), lift(Lp(1)), shape)
    assert_same(lift(KSparse(1)), lift(Lp(1)), shape)
    assert_same(lift(KSupport(magnitudes)), lift(Lp(2)), shape)
    assert_same(lift(KSparse(magnitudes)), lift(Lp(math.inf)), shape)


@every_lifted_shape
def test_every_lift_of_the_l2_norm_is_the_l2_norm(lift: Lift, shape: Shape, magnitudes: int) -> None:
    assert_same(lift(Lp(2)), Lp(2), shape)


@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
def test_lifts_of_a_column_one_block_or_one_row(inner: VectorNorm) -> None:
    assert_same(Rows(inner), inner, (6, 1))
    assert_same(Rows(inner), inner, (6,))
    assert_same(Blocks(inner, 6), inner, (1, 6))
    assert_same(Blocks(inner, 6, dim=0), inner, (6,))
    if (inner.k or 1) == 1:
        assert_same(Rows(inner), Lp(2), (1, 6))
        assert_same(Blocks(inner, 1), Lp(2), (2, 3))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("inner", [v for v in VECTOR_NORMS if (v.k or 1) == 1], ids=str)
def test_of_one_entry_every_norm_is_the_magnitude(inner: VectorNorm, shape: Shape) -> None:
    x = torch.full(shape, -3.0)
    for norm in (inner, Rows(inner)):
        assert norm(x) == norm.dual(x) == 3
        assert torch.equal(norm.lmo(x), torch.ones(shape))
        assert norm.diameter(shape) == 2


def test_known_values() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert Rows(Lp(1))(x) == 15  # group lasso
    assert Rows(KSparse(2)).dual(x) == 15
    torch.testing.assert_close(Rows(Lp(1)).lmo(x), torch.tensor([[0, 0], [0, 0], [-0.6, -0.8]]))
    assert Spectral(Lp(1))(torch.diag(torch.tensor([3.0, -2.0, 1.0]))).item() == pytest.approx(6)  # nuclear
    assert KSupport(2)(torch.tensor([1.0, 1.0, 1.0, 1.0])).item() == pytest.approx(4 / math.sqrt(2))
    assert KSupport(2)(torch.tensor([5.0, 1.0, 1.0])).item() == pytest.approx(math.sqrt(25 + 4))


def test_spectral_vertices_have_rank_k_and_blocks_have_n_of_m() -> None:
    g = gaussian((12, 8))
    assert torch.linalg.matrix_rank(Spectral(KSupport(3)).lmo(g)) == 3
    blocks = Blocks(KSupport(2), 4).lmo(g).reshape(-1, 4)
    assert (blocks.count_nonzero(dim=1) == 2).all()


def test_operator_norm_vertex_is_the_polar_factor() -> None:
    g = gaussian((4, 6))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(Spectral(Lp(math.inf)).lmo(g), -u @ vh)


@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
def test_groups_are_one_block_diagonal_matrix(inner: VectorNorm) -> None:
    g = gaussian((6, 4))
    whole = torch.block_diag(g[:3], g[3:])
    grouped, plain = Spectral(inner, groups=2), Spectral(inner)
    torch.testing.assert_close(grouped(g), plain(whole))
    torch.testing.assert_close(torch.block_diag(*grouped.lmo(g).split(3)), plain.lmo(whole), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_spatial_matrices_are_those_that_a_convolution_is_factored_by(inner: VectorNorm, groups: int) -> None:
    layer = nn.Conv2d(3 * groups, 4, (2, 3), groups=groups, dtype=torch.float64)
    spatial, blocks = Spectral(inner, groups=groups, spatial=True), Spectral(inner, groups=groups)
    weight, matrix = layer.weight.detach(), matrices(layer, "spatial").flatten(0, 1)
    torch.testing.assert_close(spatial(weight), blocks(matrix))
    layer.weight = nn.Parameter(spatial.lmo(weight))
    torch.testing.assert_close(matrices(layer, "spatial").flatten(0, 1), blocks.lmo(matrix))
    layer.weight = nn.Parameter(spatial.soft_threshold(weight, 0.1))
    torch.testing.assert_close(matrices(layer, "spatial").flatten(0, 1), blocks.soft_threshold(matrix, 0.1))


def test_rows_of_dimension_one_are_those_of_the_transpose() -> None:
    g = gaussian((3, 5, 2))
    moved = Rows(KSupport(2), dim=1).lmo(g).transpose(0, 1)
    torch.testing.assert_close(moved, Rows(KSupport(2)).lmo(g.transpose(0, 1)))


# --- several tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lift", [entries, Rows, Spectral], ids=["entries", "rows", "spectral"])
@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
def test_several_tensors_are_one_block_diagonal_object(lift: Lift, inner: VectorNorm) -> None:
    norm, parts = lift(inner), [gaussian((3, 4), 1), gaussian((2, 5), 2)]
    whole = torch.block_diag(*parts)
    torch.testing.assert_close(norm(parts), norm(whole))
    torch.testing.assert_close(norm.dual(parts), norm.dual(whole))
    vertices = norm.lmo(parts)
    torch.testing.assert_close(torch.block_diag(*vertices), norm.lmo(whole), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("inner", VECTOR_NORMS, ids=str)
def test_the_blocks_of_several_tensors_are_those_of_their_union(inner: VectorNorm) -> None:
    norm, parts = Blocks(inner, 4), [gaussian((2, 8), 1), gaussian((3, 4), 2)]
    whole = torch.cat([part.reshape(-1, 4) for part in parts])
    torch.testing.assert_close(norm(parts), norm(whole))
    torch.testing.assert_close(norm.dual(parts), norm.dual(whole))
    torch.testing.assert_close(torch.cat([v.reshape(-1, 4) for v in norm.lmo(parts)]), norm.lmo(whole))
    assert norm.diameter([(2, 8), (3, 4)]) == norm.diameter((5, 4))


def test_lengths_of_several_tensors_add_up() -> None:
    shapes = [(3, 4), (2, 5)]
    assert Lp(math.inf).diameter(shapes) == Lp(math.inf).diameter((22,))
    assert Rows(Lp(4)).diameter(shapes) == Lp(4).diameter((5,))
    assert Spectral(Lp(4)).diameter(shapes) == Lp(4).diameter((3 + 2,))
    assert Rows(KSparse(5)).length(shapes) == 5


def test_vertices_keep_the_dtype_of_each_tensor() -> None:
    g = [gaussian((3, 4), 1, torch.bfloat16), gaussian((2, 5), 2, torch.float32), gaussian((4, 4), 3)]
    for norm in (KSupport(3), Rows(KSparse(2)), Spectral(Lp(1)), Blocks(KSupport(1), 1)):
        assert [v.dtype for v in norm.lmo(g)] == [torch.bfloat16, torch.float32, torch.float64]
        exact = norm.lmo([part.double() for part in g])
        for v, w in zip(norm.lmo(g), exact, strict=True):
            assert (v - w).abs().max() <= torch.finfo(v.dtype).eps * 16


# --- diameters --------------------------------------------------------------------------------------------------------


def longest_magnitudes(norm: VectorNorm, n: int) -> Tensor:
    """The magnitudes of norm 1 with the largest L2 norm, as geometry has them: a corner, or the diagonal of a cube."""
    ones = torch.ones(n, dtype=torch.float64)
    match norm:
        case Lp(p) if p > 2:
            return ones * n ** (-1 / p)
        case KSparse(k):
            return ones * (torch.arange(n) < k)
    return ones * (torch.arange(n) == 0)


def longest_point(norm: Norm, shape: Shape, magnitudes: int) -> Tensor:
    """Lay the longest magnitudes out as entries, as first entries of rows, on diagonals of matrices or in one block."""
    vector = norm.inner if isinstance(norm, Rows | Spectral | Blocks) else norm
    a = longest_magnitudes(vector, magnitudes)  # type: ignore[arg-type]
    x = torch.zeros(shape, dtype=torch.float64)
    first = [0] * (len(shape) - 1)
    match norm:
        case Rows(_, dim):
            dims = row_dims(dim)
            moved = x.movedim(dims, tuple(range(len(dims))))
            moved[(..., *first[len(dims) - 1 :])] = a.view(moved.shape[: len(dims)])
        case Spectral(_, _, groups):
            diagonals = torch.stack([part.diag() for part in a.chunk(groups)])
            padded = unfolded(norm, x)
            padded[:, : diagonals.shape[1], : diagonals.shape[2]] = diagonals
            x.copy_(folded(norm, padded, shape))
        case Blocks(_, size, dim):
            x.movedim(dim, -1)[(*first, slice(size))] = a
        case _:
            x.view(-1).copy_(a)
    return x


@pytest.mark.parametrize(
    ("norm", "shape", "magnitudes"),
    [(lift(v), shape, n) for lift, shape, n in LIFTED_SHAPES for v in VECTOR_NORMS if (v.k or 1) <= n],
    ids=str,
)
def test_diameter_is_attained_and_never_exceeded(norm: Norm, shape: Shape, magnitudes: int) -> None:
    diameter, x = norm.diameter(shape), longest_point(norm, shape, magnitudes)
    assert norm(x).item() == pytest.approx(1)
    assert (x - -x).norm().item() == pytest.approx(diameter)
    for seed in range(10):
        assert 2 * norm.lmo(gaussian(shape, seed)).norm() <= diameter * (1 + 1e-12)
        inner_point = gaussian(shape, seed + 20) * 10 ** gaussian(shape, seed + 40)
        assert 2 * (inner_point / norm(inner_point)).norm() <= diameter * (1 + 1e-12)


@pytest.mark.parametrize(("p", "expected"), [(1.5, 2.0), (1.01, 2.0), (2, 2.0), (4, 2 * 16**0.25), (math.inf, 8.0)])
def test_diameter_of_p_balls(p: float, expected: float) -> None:
    assert Lp(p).diameter((4, 4)) == pytest.approx(expected)


# --- plain data and bad input -----------------------------------------------------------------------------------------


@every_instance
def test_spec_survives_json(norm: Norm, shape: Shape) -> None:
    again = Norm.from_spec(json.loads(json.dumps(norm.to_spec())))
    assert again == norm
    assert hash(again) == hash(norm)


def test_specs_from_before_spatial_matrices_are_read() -> None:
    spec = Spectral(KSparse(3), groups=2).to_spec()
    del spec["spatial"]
    assert Norm.from_spec(spec) == Spectral(KSparse(3), groups=2)


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
        lambda: KSupport(0),
        lambda: KSupport(True),
        lambda: KSupport(1.5),  # type: ignore[arg-type]
        lambda: Rows(Rows(Lp(1))),  # type: ignore[arg-type]
        lambda: Blocks(KSupport(5), 4),
        lambda: Blocks(KSupport(2), 0),
        lambda: Spectral(Lp(1), groups=0),
        lambda: Spectral(Lp(1), spatial=1),  # type: ignore[arg-type]
    ],
)
def test_bad_norms_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"needs|lifts"):
        make()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (KSupport(8), (7,)),
        (KSparse(8), (7,)),
        (Rows(KSparse(3)), (2, 9)),
        (Spectral(KSupport(4)), (3, 9)),
        (Spectral(Lp(1)), (9,)),
        (Blocks(KSupport(2), 4), (3, 6)),
        (Blocks(KSupport(2), 4), (8,)),
        (Rows(Lp(1), dim=3), (2, 2)),
        (Spectral(Lp(1), groups=3), (4, 4)),
        (Spectral(Lp(1), spatial=True), (4, 4)),
        (Spectral(Lp(1), groups=3, spatial=True), (4, 4, 3, 3)),
    ],
    ids=str,
)
def test_tensors_a_norm_cannot_hold_are_refused(norm: Norm, shape: Shape) -> None:
    for call in (norm, norm.dual, norm.lmo):
        with pytest.raises(ValueError, match=r"needs|multiple|split|counted"):
            call(torch.ones(shape))
    with pytest.raises(ValueError, match=r"needs|multiple|split|counted"):
        norm.diameter(shape)


NO_NORM = {
    "integers": torch.ones(3, dtype=torch.int64),
    "complex": torch.ones(3, dtype=torch.complex64),
    "sparse": torch.ones(3).to_sparse(),
    "empty": torch.ones(0),
    "nothing": [],
}


@pytest.mark.parametrize("x", NO_NORM.values(), ids=NO_NORM)
def test_tensors_without_a_norm_are_refused(x: Tensor) -> None:
    for call in (Lp(2), Lp(2).dual, Lp(2).lmo):
        with pytest.raises(ValueError, match="a norm needs"):
            call(x)


def test_projection_is_not_promised_where_none_is_known() -> None:
    with pytest.raises(NotImplementedError, match="Lp"):
        Lp(3).project(torch.ones(3), 1.0)
