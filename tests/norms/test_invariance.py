"""What must not matter to norms and oracles: symmetries, scale, number format, memory layout; and what must survive:
zeros and, under ties, exactly k."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.linalg import topk_mask
from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm
from pliant.norms.shapes import row_dims
from tests.instances import INSTANCES, LAYOUTS, Shape, few_integers, folded, gaussian, tiled, unfolded

every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)
NOT_SPECTRAL = [i for i in INSTANCES if not isinstance(i[0], Spectral)]


# --- symmetries -------------------------------------------------------------------------------------------------------


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def signs(shape: Shape, seed: int) -> Tensor:
    return gaussian(shape, seed).sign()


def orthogonal(count: int, n: int, seed: int) -> Tensor:
    """Return ``count`` random orthogonal matrices (count, n, n)."""
    return torch.linalg.qr(gaussian((count, n, n), seed)).Q


def symmetry(norm: Norm, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Return a random element of the largest group of linear maps of matrices that this family of norms ignores."""

    def along(dims: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        # Let ``change`` see the matrix whose rows are counted by ``dims``.
        def move(x: Tensor) -> Tensor:
            moved = x.movedim(dims, tuple(range(len(dims))))
            rows = math.prod(moved.shape[: len(dims)])
            return change(moved.reshape(rows, -1)).reshape(moved.shape).movedim(tuple(range(len(dims))), dims)

        return move

    entries = math.prod(shape)
    match norm:
        case Rows(_, dim):  # any order of rows, each of them turned in its own way
            dims = row_dims(dim)
            n = math.prod(shape[d] for d in dims)
            turns = orthogonal(n, entries // n, 1)
            return along(dims, lambda m: torch.einsum("rc,rcd->rd", m, turns)[permutation(n, 2)])
        case Spectral(_, _, groups):  # any order of groups, each multiplied from both sides
            _, rows, columns = unfolded(norm, torch.empty(shape)).shape
            left, right = orthogonal(groups, rows, 1), orthogonal(groups, columns, 2)
            order = permutation(groups, 3)
            return lambda x: folded(norm, (left @ unfolded(norm, x) @ right)[order], shape)
        case Blocks(_, size, dim):  # any order of blocks, each with its own signed permutation

            def shuffle(x: Tensor) -> Tensor:
                moved = x.movedim(dim, -1)
                blocks = moved.reshape(-1, size)
                inside = torch.stack([permutation(size, seed) for seed in range(len(blocks))])
                blocks = (blocks * signs(tuple(blocks.shape), 1)).gather(1, inside)[permutation(len(blocks), 2)]
                return blocks.reshape(moved.shape).movedim(-1, dim)

            return shuffle
    return lambda x: (x * signs(shape, 1)).flatten()[permutation(entries, 2)].reshape(shape)


@every_instance
def test_symmetries_leave_the_norms_alone_and_move_the_vertex_along(norm: Norm, shape: Shape) -> None:
    transform, g = symmetry(norm, shape), gaussian(shape, 5)
    moved = transform(g)
    assert math.prod(shape) == 1 or not torch.equal(moved, g)
    torch.testing.assert_close(moved.norm(), g.norm())
    torch.testing.assert_close(norm(moved), norm(g))
    torch.testing.assert_close(norm.dual(moved), norm.dual(g))
    torch.testing.assert_close(norm.lmo(moved), transform(norm.lmo(g)), rtol=1e-8, atol=1e-9)


@every_instance
def test_vertices_of_opposite_gradients_are_opposite(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape)
    torch.testing.assert_close(norm.lmo(-g), -norm.lmo(g), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm(-g), norm(g), rtol=1e-14, atol=0)
    torch.testing.assert_close(norm.dual(-g), norm.dual(g), rtol=1e-14, atol=0)


# --- memory layout ----------------------------------------------------------------------------------------------------


@every_instance
def test_memory_layout_does_not_matter(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape)
    for other in (change(g) for change in LAYOUTS.values()):
        # Sums may come in another order.
        torch.testing.assert_close(norm(other), norm(g), rtol=1e-14, atol=0)
        torch.testing.assert_close(norm.dual(other), norm.dual(g), rtol=1e-14, atol=0)
        torch.testing.assert_close(norm.lmo(other), norm.lmo(g), rtol=1e-12, atol=1e-14)


# --- scale ------------------------------------------------------------------------------------------------------------


@every_instance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-100, 100])
def test_powers_of_two_change_nothing_but_the_exponent(
    norm: Norm, shape: Shape, dtype: torch.dtype, exponent: int
) -> None:
    g, scale = gaussian(shape, dtype=dtype), 2.0**exponent
    pairs = [
        (norm.lmo(g * scale), norm.lmo(g)),
        (norm(g * scale), norm(g) * scale),
        (norm.dual(g * scale), norm.dual(g) * scale),
    ]
    for scaled, expected in pairs:
        if isinstance(norm, Spectral):  # a singular value decomposition may scale by what it likes
            torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        else:
            assert torch.equal(scaled, expected)


@every_instance
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_other_scales_change_nothing_but_the_rounding(norm: Norm, shape: Shape, scale: float) -> None:
    # Squares of 1e30 overflow in single precision, those of 1e-30 vanish.
    g = gaussian(shape, dtype=torch.float32)
    scaled = (g.double() * scale).float()
    torch.testing.assert_close(norm(scaled) / scale, norm(g), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.dual(scaled) / scale, norm.dual(g), rtol=1e-6, atol=0)
    # Measured: 4e-7, and 5e-6 under Spectral, whose singular vectors feel the gaps between singular values.
    torch.testing.assert_close(norm.lmo(scaled), norm.lmo(g), rtol=0, atol=4e-5 if isinstance(norm, Spectral) else 1e-6)


@pytest.mark.parametrize("norm", [Rows(Lp(math.inf)), Rows(KSparse(3)), Rows(KSupport(2))], ids=str)
@pytest.mark.parametrize("tiny", [2.0**-62, 2.0**-70, 2.0**-130])
def test_vanishing_rows_do_not_leave_the_ball(norm: Norm, tiny: float) -> None:
    for g in (gaussian((6, 5), dtype=torch.float32), gaussian((6,), dtype=torch.float32)):
        g[2:] *= tiny
        assert norm(norm.lmo(g)) <= 1 + 1e-6


@pytest.mark.parametrize("p", [1.00001, 1.0001, 1.01])
def test_powers_near_one_stay_in_the_ball(p: float) -> None:
    ties = torch.full((1000,), 0.1)
    assert Lp(p)(Lp(p).lmo(ties)).item() == pytest.approx(1, abs=2e-6)


# --- number formats ---------------------------------------------------------------------------------------------------


@every_instance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_follows_float32(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    g = gaussian(shape, dtype=dtype)
    assert torch.equal(norm.lmo(g), norm.lmo(g.float()).to(dtype))
    for half, single in ((norm(g), norm(g.float())), (norm.dual(g), norm.dual(g.float()))):
        assert half.dtype == torch.float32
        assert half == single


@every_instance
def test_single_precision_follows_double(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape, dtype=torch.float32)
    rounding = 16 * torch.finfo(torch.float32).eps  # measured: 3 eps
    assert norm(g).item() == pytest.approx(norm(g.double()).item(), rel=rounding)
    assert norm.dual(g).item() == pytest.approx(norm.dual(g.double()).item(), rel=rounding)
    torch.testing.assert_close(norm.lmo(g), norm.lmo(g.double()).float(), rtol=1e-4, atol=1e-5)


MILLIONS = [
    Lp(1),
    Lp(1.5),
    Lp(2),
    Lp(3),
    Rows(Lp(1)),
    KSparse(5),
    KSupport(5),
    Rows(KSupport(5)),
    Blocks(KSupport(2), 4),
]


@pytest.mark.parametrize("norm", MILLIONS, ids=str)
def test_a_million_entries_lose_no_precision(norm: Norm) -> None:
    # Adding one by one in single precision would be wrong by 1e-5 (p = 2) to 3e-4 (others).
    x = gaussian((125_000, 8), 1, torch.float32)
    rounding = 32 * torch.finfo(torch.float32).eps
    assert norm(x).item() == pytest.approx(norm(x.double()).item(), rel=rounding)
    assert norm.dual(x).item() == pytest.approx(norm.dual(x.double()).item(), rel=rounding)
    assert norm(norm.lmo(x).double()).item() == pytest.approx(1, rel=rounding)


@pytest.mark.parametrize(("norm", "shape"), NOT_SPECTRAL, ids=str)
def test_nan_is_not_hidden(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape)
    g.view(-1)[0] = math.nan
    assert norm(g).isnan()


# --- zeros and ties ---------------------------------------------------------------------------------------------------


@every_instance
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_gradient_gives_the_zero_vertex(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(norm.lmo(zero), zero)
    assert norm(zero) == norm.dual(zero) == 0


@pytest.mark.parametrize(("norm", "shape"), [i for i in INSTANCES if len(i[1]) > 1 and max(i[1][:2]) > 2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_removed_filters_stay_exactly_zero(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    dim = norm.dim if isinstance(norm, Rows | Spectral) else 0
    dim = row_dims(dim)[-1]
    g = gaussian(shape, dtype=dtype)
    g.movedim(dim, 0)[1 : 1 + shape[dim] // 2] = 0
    v = norm.lmo(g)
    assert not v.movedim(dim, 0)[1 : 1 + shape[dim] // 2].any()
    assert v.any()


@pytest.mark.parametrize(("norm", "shape"), NOT_SPECTRAL, ids=str)
def test_masked_entries_stay_exactly_zero(norm: Norm, shape: Shape) -> None:
    g = gaussian(shape)
    g[gaussian(shape, 1) < 0.3] = 0
    v = norm.lmo(g)
    assert not v[g == 0].any()
    assert (v * g <= 0).all()


def test_zero_columns_stay_zero_under_spectral_norms_up_to_rounding() -> None:
    for inner in (Lp(1), Lp(math.inf), KSparse(3), KSupport(2)):
        g = gaussian((6, 8))
        g[:, 2:6] = 0  # rank 4
        assert Spectral(inner).lmo(g)[:, 2:6].abs().max() < 1e-15


def test_zero_rows_stay_exactly_zero_under_the_operator_norm() -> None:
    u, _, vh = torch.linalg.svd(gaussian((8, 6), dtype=torch.float32), full_matrices=False)
    g = (u * torch.logspace(0, -5, 6)) @ vh
    g[[2, 5]] = 0
    assert Spectral(Lp(math.inf)).lmo(g)[[2, 5]].count_nonzero() == 0


def atoms(norm: Norm, x: Tensor) -> Tensor:
    """Return how many magnitudes of x are not zero, for each block where the norm has blocks."""
    match norm:
        case Rows(_, dim):
            dims = row_dims(dim)
            moved = x.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
            return moved.reshape(len(moved), -1).any(dim=1).sum()
        case Spectral():
            return (torch.linalg.svdvals(unfolded(norm, x)) > 1e-9).sum()
        case Blocks(_, size, dim):
            return x.movedim(dim, -1).reshape(-1, size).count_nonzero(dim=1)
    return x.count_nonzero()


@settings(max_examples=500)
@given(few_integers, st.sampled_from(INSTANCES))
def test_with_ties_and_zeros_exactly_k_survive_and_the_vertex_is_feasible(
    values: list[int], instance: tuple[Norm, Shape]
) -> None:
    norm, shape = instance
    g = tiled(values, shape)
    v = norm.lmo(g)
    assert norm(v) <= 1 + 1e-9
    torch.testing.assert_close(torch.sum(g * v), -norm.dual(g), rtol=1e-9, atol=1e-9)
    vector = norm.inner if isinstance(norm, Rows | Spectral | Blocks) else norm
    expected = atoms(norm, g)  # the zeros of g stay
    if isinstance(vector, KSparse | KSupport) or vector == Lp(1):
        expected = expected.clamp_max(vector.k or 1)
    assert torch.equal(atoms(norm, v), expected)


@pytest.mark.parametrize("inner", [KSparse(2), KSupport(2)], ids=str)
def test_ties_keep_exactly_k(inner: VectorNorm) -> None:
    ones = torch.ones(5, 4)
    assert inner.lmo(ones).count_nonzero() == 2
    assert Rows(inner).lmo(ones).norm(dim=1).count_nonzero() == 2
    assert torch.linalg.matrix_rank(Spectral(inner).lmo(torch.eye(6))) == 2
    assert (Blocks(inner, 4).lmo(ones).count_nonzero(dim=1) == 2).all()


def test_ties_go_to_the_lower_index() -> None:
    assert topk_mask(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]
