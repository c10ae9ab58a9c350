"""The optimizer's short ways to a vertex, against ``Norm.lmo`` and against what they promise."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.linalg import advanced, keep_largest, keep_n_of_m, kth_largest, orthonormalised, times, topk_mask
from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral
from pliant.optim.kept_directions import keeps_directions, leading_vertices
from pliant.optim.vertices import unit_vertices, well_scaled
from tests.instances import INSTANCES, few_integers, gaussian, tiled

every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)


def single(norm: Norm, g: Tensor) -> Tensor:
    _, [(carrier, factor)] = unit_vertices(norm, [g[None]])
    return (-factor * carrier)[0]


# --- exact vertices ---------------------------------------------------------------------------------------------------


@every_instance
def test_one_vertex_is_that_of_the_norm(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gaussian(shape)
    lengths, _ = unit_vertices(norm, [g[None]])
    assert lengths.item() == pytest.approx(g.norm().item(), rel=1e-12)
    torch.testing.assert_close(single(norm, g), norm.lmo(g), rtol=1e-12, atol=1e-12)


@every_instance
def test_a_batch_is_many_single_ones(norm: Norm, shape: tuple[int, ...]) -> None:
    g = gaussian((3, *shape))
    lengths, [(carrier, factor)] = unit_vertices(norm, [g])
    torch.testing.assert_close(lengths, g.flatten(1).norm(dim=1))
    for one, vertex in zip(g, -factor * carrier, strict=True):
        torch.testing.assert_close(vertex, norm.lmo(one), rtol=1e-10, atol=1e-12)


@every_instance
@pytest.mark.parametrize("exponent", [-100, 100])
def test_extreme_scales_and_half_precision(norm: Norm, shape: tuple[int, ...], exponent: int) -> None:
    g = gaussian(shape, dtype=torch.float32)
    lengths, [(carrier, factor)] = unit_vertices(norm, [g[None] * 2.0**exponent])
    assert lengths.item() == pytest.approx(g.norm().item() * 2.0**exponent, rel=1e-6)
    torch.testing.assert_close((-factor * carrier)[0], norm.lmo(g), rtol=1e-5, atol=1e-6)
    half = g.bfloat16()
    torch.testing.assert_close(single(norm, half), norm.lmo(half.float()), rtol=1e-5, atol=1e-6)


@given(few_integers, st.sampled_from(INSTANCES))
def test_ties_and_zeros(values: list[int], instance: tuple[Norm, tuple[int, ...]]) -> None:
    norm, shape = instance
    g = tiled(values, shape)
    v = single(norm, g)
    assert norm(v) <= 1 + 1e-9
    torch.testing.assert_close(torch.sum(g * v), -norm.dual(g), rtol=1e-9, atol=1e-9)
    if not isinstance(norm, Spectral):  # with equal singular values, its vertex depends on the decomposition
        torch.testing.assert_close(v, norm.lmo(g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "norm", [KSparse(5), KSupport(5), Rows(KSupport(2)), Rows(KSparse(2), dim=1), Blocks(KSupport(2), 4)], ids=str
)
def test_the_layout_in_memory_does_not_matter(norm: Norm) -> None:
    g = gaussian((6, 8, 3, 3)).round()  # rounded: ties must go the same way
    memory = torch.empty(1, 6, 8, 3, 3, dtype=g.dtype)
    strided = torch.empty(6, 8, 6, 3, dtype=g.dtype)[:, :, ::2].copy_(g)
    for same in (g.to(memory_format=torch.channels_last), g.transpose(0, 1).contiguous().transpose(0, 1), strided):
        torch.testing.assert_close(norm(single(norm, same)), norm(norm.lmo(g)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.sum(g * single(norm, same)), -norm.dual(g), rtol=1e-12, atol=1e-12)
    _, [(carrier, factor)] = unit_vertices(norm, [g[None]], [memory])
    torch.testing.assert_close((-factor * carrier)[0], norm.lmo(g), rtol=1e-12, atol=1e-12)


JOINT = [Lp(2), Lp(math.inf), Lp(3), KSparse(4), KSupport(4), Rows(KSupport(2)), Rows(Lp(1)), Spectral(Lp(1))]


@pytest.mark.parametrize("norm", [*JOINT, Spectral(KSupport(5)), Spectral(Lp(2)), Blocks(KSupport(1), 1)], ids=str)
def test_a_joint_ball_has_one_vertex(norm: Norm) -> None:
    parts = [gaussian((3, 4), seed=1), gaussian((2, 5), seed=2)]
    lengths, vertices = unit_vertices(norm, [g[None] for g in parts])
    assert lengths.item() == pytest.approx(torch.cat([g.flatten() for g in parts]).norm().item())
    for (carrier, factor), expected in zip(vertices, norm.lmo(parts), strict=True):
        torch.testing.assert_close((-factor * carrier)[0], expected, rtol=1e-10, atol=1e-12)


def test_well_scaled_tensors_are_not_copied() -> None:
    g = gaussian((1, 5, 5))
    assert well_scaled([g])[1][0] is g
    assert well_scaled([g * 2.0**60])[1][0].abs().max() < 2


# --- keeping the largest ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_keeping_the_largest_is_the_mask(values: list[int], data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    parts = [part.clone() for part in x.split([cut, len(values) - cut]) if len(part)]
    keep_largest(parts, k, parts)
    assert torch.equal(torch.cat(parts), x * topk_mask(x.abs(), k))


@pytest.mark.parametrize("share", [1e-5, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "zeros", "blind sample"])
def test_selection_from_many_entries(share: float, kind: str) -> None:
    x = gaussian((500_000,), dtype=torch.float32)
    match kind:
        case "ties":
            x = (x * 4).round()
        case "zeros":
            x[torch.arange(len(x)) % 5 > 0] = 0
        case "blind sample":
            x[:: 500_000 // 2**15 | 1] = 1000  # all that a sample of every 15th entry would see
    k = max(1, int(share * len(x)))
    out = torch.empty_like(x)
    keep_largest([x], k, [out])
    assert torch.equal(out, x * topk_mask(x.abs(), k))
    threshold, surplus = kth_largest([x[:100_000].numpy(), x[100_000:].numpy()], k)
    assert threshold == x.abs().sort(descending=True).values[k - 1]
    assert surplus == int((x.abs() >= threshold).sum()) - k


@given(
    st.lists(st.integers(-3, 3), min_size=24, max_size=24), st.sampled_from([(1, 4), (2, 4), (3, 4), (1, 2), (3, 6)])
)
def test_n_of_m_is_the_mask_of_each_block(values: list[int], pattern: tuple[int, int]) -> None:
    n, m = pattern
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=dtype).reshape(2, 12)
        expected = x * topk_mask(x.abs().reshape(-1, m), n).reshape(x.shape)
        for dim, y in ((1, x), (0, x.T), (1, x[:, :, None].expand(2, 12, 3).contiguous())):
            out = torch.empty_like(y)
            keep_n_of_m(y, n, m, dim, out)
            wanted = {(2, 12): expected, (12, 2): expected.T}.get(tuple(y.shape), expected[:, :, None].expand(2, 12, 3))
            assert torch.equal(out, wanted)


# --- kept singular directions -----------------------------------------------------------------------------------------


def steps(norm: Spectral, g: Sequence[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
    basis = None
    for _ in range(count):
        vertices, basis, value = leading_vertices(norm, [x[None] for x in g], basis, 1)
    return [(-factor * carrier)[0] for carrier, factor in vertices], value


@pytest.mark.parametrize("inner", [KSupport(4), KSparse(4), Lp(1), KSupport(25), KSparse(25), KSupport(39)], ids=str)
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 10, 3, 3)])
def test_kept_directions_are_feasible_at_once_and_exact_in_the_end(
    inner: KSupport | KSparse | Lp, shape: tuple[int, ...]
) -> None:
    norm = Spectral(inner)
    assert keeps_directions(norm, [shape])
    u, _, vh = torch.linalg.svd(gaussian(shape).flatten(1), full_matrices=False)
    g = ((u * 0.8 ** torch.arange(40)) @ vh).reshape(shape)
    for count in (1, 60):
        [vertex], value = steps(norm, [g], count)
        assert norm(vertex) <= 1 + 1e-9
        assert torch.linalg.matrix_rank(vertex.flatten(1)) <= (norm.inner.k if inner != Lp(1) else 1)
        assert value.item() == pytest.approx(-torch.sum(g * vertex).item(), rel=1e-9)
        assert value <= norm.dual(g) * (1 + 1e-9)
    torch.testing.assert_close(vertex, norm.lmo(g), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("inner", [KSupport(6), KSparse(6)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_groups_joint_balls_and_transposed_layouts(inner: KSupport | KSparse, dim: int) -> None:
    decay = 0.8 ** torch.arange(20, dtype=torch.float64)
    g = (
        gaussian((40, 40, 2, 2))
        * torch.cat([decay, decay])[:, None, None, None]
        * torch.cat([decay, decay])[:, None, None]
    )
    norm = Spectral(inner, dim, groups=2)
    [vertex], _ = steps(norm, [g], 100)
    assert norm(vertex) <= 1 + 1e-9
    assert torch.sum(-g * vertex) > 0.999 * norm.dual(g)
    joint, parts = Spectral(inner, dim), [g[:, :25], g[:30, 25:]]
    vertices, value = steps(joint, parts, 100)
    assert joint(vertices) <= 1 + 1e-9
    assert value > 0.999 * joint.dual(parts)
    assert value.item() == pytest.approx(-sum(torch.sum(x * v).item() for x, v in zip(parts, vertices, strict=True)))


def test_batched_directions_are_those_of_single_matrices() -> None:
    norm, g = Spectral(KSupport(3)), gaussian((4, 20, 30))
    vertices, basis, value = leading_vertices(norm, [g], None, 2)
    alone = [leading_vertices(norm, [x[None]], None, 2) for x in g]
    torch.testing.assert_close(value, torch.cat([a[2] for a in alone]))
    assert basis.shape == (4, 30, 3)
    for x, vertex in zip(g, vertices[0].factor * vertices[0].carrier, strict=True):
        assert norm(vertex) == pytest.approx(1, rel=1e-9)
        assert torch.sum(x * vertex) > 0.9 * norm.dual(x)


def test_zero_rows_stay_zero_and_zero_matrices_give_zero() -> None:
    g = gaussian((30, 50))
    g[4:9] = 0
    norm = Spectral(KSupport(3))
    vertices, basis, _ = leading_vertices(norm, [g[None]], None, 1)
    assert vertices[0].carrier[0, 4:9].count_nonzero() == 0
    vertices, basis, value = leading_vertices(norm, [torch.zeros_like(g)[None]], basis, 1)
    assert vertices[0].carrier.count_nonzero() == value == 0
    for _ in range(20):
        _, basis, value = leading_vertices(norm, [g[None]], basis, 1)
    assert value > 0.99 * norm.dual(g)


def test_starting_directions_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    leading_vertices(Spectral(KSupport(3)), [gaussian((1, 30, 30))], None, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("rho", "share"), [(0.99, 0.99), (1.0, 0.995)])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3)])
def test_ten_steps_reach_what_is_promised(rho: float, share: float, shape: tuple[int, ...]) -> None:
    norm = Spectral(KSupport(round(0.1 * shape[0])))
    generator, decay = torch.Generator().manual_seed(0), torch.linspace(1, 0.01, math.prod(shape[1:]))

    def noise() -> Tensor:
        return (torch.randn(shape[0], len(decay), generator=generator) * decay).reshape(shape)

    g, basis = noise(), None
    for _ in range(10):
        g = rho * g + math.sqrt(1 - rho**2) * noise()
        _, basis, value = leading_vertices(norm, [g[None]], basis, 1)
    assert value >= share * norm.dual(g)


@pytest.mark.parametrize("columns", [1, 3, 16, 17])
def test_an_iteration_is_shifted_by_a_share_of_the_smallest_rayleigh_quotient(columns: int) -> None:
    a, z = gaussian((2, 20, 30), 1), gaussian((2, 30, columns), 2)
    u, r = orthonormalised(times(a, z))
    torch.testing.assert_close(u @ r, a @ z)
    assert (r.diagonal(dim1=1, dim2=2) > 0).all()
    right = times(a.mT, u)
    (got,) = advanced([right], [z], r, right.square().sum(dim=1))
    shift = 0.47 * right.square().sum(dim=1).amin(dim=1)[:, None, None]
    torch.testing.assert_close(got, (a.mT @ a - shift * torch.eye(30)) @ z @ torch.linalg.inv(r))


def test_a_shift_counts_as_a_second_iteration() -> None:
    # Without it the share of the unwanted directions shrinks by (0.9)² here, with it by (0.81 − 0.47) / (1 − 0.47).
    spectrum = torch.cat([torch.ones(4), 0.9 * torch.ones(36)]).double()
    left, right = (torch.linalg.qr(gaussian((40, 40), seed)).Q for seed in (1, 2))
    a, z = ((left * spectrum) @ right.T)[None], gaussian((1, 40, 4), 3)
    wanted = right[:, :4]
    tangents = []
    for _ in range(30):
        u, r = orthonormalised(a @ z)
        back = a.mT @ u
        (z,) = advanced([back], [z], r, back.square().sum(dim=1))
        inside = wanted.T @ z[0]
        tangents.append(torch.linalg.matrix_norm((z[0] - wanted @ inside) @ torch.linalg.inv(inside), 2).item())
    assert tangents[-1] / tangents[-2] == pytest.approx((0.81 - 0.47) / (1 - 0.47), rel=0.02)


def test_directions_outlive_another_k() -> None:
    g = gaussian((40, 60)) * 0.9 ** torch.arange(60)
    basis = None
    for _ in range(30):
        _, basis, _ = leading_vertices(Spectral(KSupport(8)), [g[None]], basis, 1)
    for k, share in ((5, 0.9999), (12, 0.95)):  # of more directions, some are new
        norm = Spectral(KSupport(k))
        _, other, value = leading_vertices(norm, [g[None]], basis, 1)
        assert other.shape == (1, 60, k)
        assert share * norm.dual(g) < value <= norm.dual(g) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("norm", "shape", "kept"),
    [
        (Spectral(KSupport(3)), (40, 40), True),
        (Spectral(KSupport(3)), (16, 40), False),  # decomposed exactly at no more cost
        (Spectral(Lp(math.inf)), (40, 40), False),  # of full rank
        (Spectral(KSupport(40)), (40, 40), False),  # the Frobenius norm
        (Spectral(KSupport(3), groups=8), (40, 40), False),
    ],
    ids=str,
)
def test_who_keeps_directions(norm: Spectral, shape: tuple[int, ...], kept: bool) -> None:
    assert keeps_directions(norm, [shape]) == kept


def test_a_joint_ball_may_mix_dtypes() -> None:
    parts = [gaussian((4, 3), seed=1), gaussian((5, 3), seed=2, dtype=torch.float32)]
    for norm in (Rows(KSupport(2)), KSparse(4), Spectral(Lp(1)), Lp(2)):
        expected = norm.lmo([g.double() for g in parts])
        for (carrier, factor), vertex in zip(unit_vertices(norm, [g[None] for g in parts])[1], expected, strict=True):
            torch.testing.assert_close((-factor * carrier)[0], vertex, rtol=1e-5, atol=1e-6)
