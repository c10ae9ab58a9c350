"""Vertices whose rows are turned towards orthogonal ones: points of the ball, and good ones."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from pliant.constraints import constrain, filters, rank, weights
from pliant.errors import BadInput
from pliant.experiments.models import build_model
from pliant.norms import Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, VectorNorm
from pliant.optim import SFW, KSchedule
from pliant.optim.vertices import unit_vertices
from pliant.structure.verification import coupled_channels
from tests.instances import few_integers, gaussian, tiled

SHAPES = [(16, 40), (40, 16), (8, 4, 3, 3), (6, 1), (1, 7), (5,)]
cases = pytest.mark.parametrize(
    ("shape", "k"), [(shape, k) for shape in SHAPES for k in {1, 3, shape[0]} if k <= shape[0]], ids=str
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def rows(k: int, dim: int = 0) -> Rows:
    return Rows(KSparse(k), dim, orthogonal=True)


def inner_product(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()


def in_the_ball(norm: Norm, x: Tensor | list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    assert norm(x).item() <= 1 + 8 * torch.finfo(dtype).eps


@cases
@dtypes
def test_a_vertex_is_in_the_ball_and_has_the_rows_of_the_plain_one(
    shape: tuple[int, ...], k: int, dtype: torch.dtype
) -> None:
    g = gaussian(shape, dtype=dtype)
    vertex, plain = rows(k).lmo(g), Rows(KSparse(k)).lmo(g)
    assert vertex.dtype == dtype
    in_the_ball(rows(k), vertex, dtype)
    matrix = vertex.reshape(shape[0], -1)
    chosen = matrix.abs().amax(dim=1) > 0
    assert torch.equal(chosen, plain.reshape(shape[0], -1).abs().amax(dim=1) > 0)
    assert chosen.sum() == k
    torch.testing.assert_close(
        matrix[chosen].double().norm(dim=1), torch.ones(k).double(), rtol=0, atol=8 * torch.finfo(dtype).eps
    )
    # Every row descends, and by no more than the dual norm allows.
    products = (g.reshape(shape[0], -1) * matrix).sum(dim=1)
    assert (products[chosen] < 0).all()
    assert 0.9 * rows(k).dual(g).item() <= -inner_product(g, vertex) <= rows(k).dual(g).item() * (1 + 1e-2)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_rows_of_a_wide_vertex_are_orthonormal_and_nearest(k: int) -> None:
    g = gaussian((16, 40))
    vertex = rows(k).lmo(g)
    chosen = vertex.abs().amax(dim=1) > 0
    torch.testing.assert_close(vertex[chosen] @ vertex[chosen].T, torch.eye(k).double(), rtol=0, atol=2e-3)
    u, s, vh = torch.linalg.svd(g[chosen], full_matrices=False)
    torch.testing.assert_close(vertex[chosen], -u @ vh, rtol=0, atol=2e-3)
    assert -inner_product(g, vertex) == pytest.approx(s.sum().item(), rel=2e-3)  # the nuclear norm of these rows


@pytest.mark.parametrize("k", [1, 4, 9])
def test_rows_are_chosen_among_those_of_several_tensors_and_turned_in_each(k: int) -> None:
    tensors = [gaussian((2, 20), 1), gaussian((7, 12), 2)]  # k may be more than a tensor has rows
    found, plain = rows(k).lmo(tensors), Rows(KSparse(k)).lmo(tensors)
    in_the_ball(rows(k), found)
    for vertex, unturned, g in zip(found, plain, tensors, strict=True):
        chosen = unturned.any(dim=1)
        torch.testing.assert_close(vertex[chosen], rows(int(chosen.sum())).lmo(g[chosen]) if chosen.any() else g[:0])
        assert not vertex[~chosen].any()


def test_rows_that_are_orthogonal_already_attain_the_dual_norm() -> None:
    q = torch.linalg.qr(gaussian((12, 6))).Q.T
    g = torch.tensor([5.0, 4, 3, 2, 1, 0.5]).double()[:, None] * q
    vertex = rows(3).lmo(g)
    assert -inner_product(g, vertex) == pytest.approx(12, rel=1e-3)
    torch.testing.assert_close(vertex, Rows(KSparse(3)).lmo(g), rtol=0, atol=2e-3)


def test_equal_rows_are_no_worse_than_plain_ones() -> None:
    g = gaussian((1, 9)).expand(4, 9).contiguous()
    torch.testing.assert_close(rows(3).lmo(g), Rows(KSparse(3)).lmo(g))


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_the_scale_does_not_matter_and_zero_has_no_vertex(power: int) -> None:
    g = gaussian((6, 4, 2, 2), dtype=torch.float32)
    torch.testing.assert_close(rows(2).lmo(g * 2.0**power), rows(2).lmo(g), rtol=0, atol=0)
    assert not rows(2).lmo(0 * g).any()


def test_rotations_of_the_columns_and_orders_of_the_rows_go_through() -> None:
    g = gaussian((7, 11))
    q = torch.linalg.qr(gaussian((11, 11), seed=1)).Q
    torch.testing.assert_close(rows(4).lmo(g @ q), rows(4).lmo(g) @ q)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows(4).lmo(g[order]), rows(4).lmo(g)[order])
    torch.testing.assert_close(rows(4, dim=1).lmo(g.T), rows(4).lmo(g).T)


@given(few_integers)
def test_ties_zeros_and_low_rank_stay_in_the_ball(values: list[int]) -> None:
    for shape in [(4, 6), (6, 4), (4, 3, 2, 2), (7,)]:
        for dtype in (torch.float64, torch.float32):
            g = tiled(values, shape).to(dtype)
            for k in (1, 3):
                vertex = rows(k).lmo(g)
                in_the_ball(rows(k), vertex, dtype)
                assert (vertex.reshape(shape[0], -1).abs().amax(dim=1) > 0).sum() <= k
                assert inner_product(g, vertex) <= 0
                assert inner_product(g, vertex) < 0 or not g.any()


def test_rows_of_all_sizes_stay_in_the_ball() -> None:
    for power in (-8, -15, -18, -19, -25, -37):
        g = gaussian((8, 20), dtype=torch.float32)
        g[4:] *= 10.0**power
        vertex = rows(6).lmo(g)
        assert vertex.isfinite().all()
        in_the_ball(rows(6), vertex, torch.float32)


# --- channels ---------------------------------------------------------------------------------------------------------


def coupled_tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [gaussian(s, seed=i, dtype=dtype) for i, s in enumerate([(12, 5, 3, 3), (12,), (24, 2), (12,)])]


@dtypes
def test_tensors_keep_their_shares_of_each_channel(dtype: torch.dtype) -> None:
    norm, plain = Channels(KSparse(3), 12, orthogonal=True), Channels(KSparse(3), 12)
    tensors = coupled_tensors(dtype)
    vertices, straight = norm.lmo(tensors), plain.lmo(tensors)
    in_the_ball(norm, vertices, dtype)
    for v, s in zip(vertices, straight, strict=True):
        lengths = (v.reshape(12, -1).double().norm(dim=1), s.reshape(12, -1).double().norm(dim=1))
        torch.testing.assert_close(*lengths, rtol=4 * torch.finfo(dtype).eps, atol=0)
    # Of single entries only the sign can turn, and it does not.
    torch.testing.assert_close(vertices[1], straight[1])
    first = vertices[0].flatten(1)[vertices[0].flatten(1).any(dim=1)].double()
    unit = first / first.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ unit.T, torch.eye(3).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 1, 3]])
def test_channels_that_were_not_chosen_turn_nothing(order: list[int]) -> None:
    first = torch.diag(torch.tensor([5, 4, 0.1, 0.1])).double()  # decides for channels 0 and 1
    second = torch.tensor([[0, 0, 0], [3, 0, 0], [1, 1, 0], [1, -1, 0.5]]).double()  # of which 0 has no part in this
    vertices = Channels(KSparse(2), 4, orthogonal=True).lmo([first[order], second[order]])
    expected = torch.zeros(4, 3).double()
    expected[1, 0] = -0.6
    torch.testing.assert_close(vertices[1], expected[order])


def test_the_channels_of_one_tensor_are_its_rows() -> None:
    g = gaussian((6, 3, 2, 2))
    torch.testing.assert_close(Channels(KSparse(2), 6, orthogonal=True).lmo(g), rows(2).lmo(g), rtol=0, atol=0)


def test_channels_of_several_rows_and_packed_parts() -> None:
    norm = Channels(KSparse(2), 3, parts=2, orthogonal=True)
    g = gaussian((12, 30))
    vertex = norm.lmo(g)
    in_the_ball(norm, vertex)
    runs = vertex.view(2, 3, 2, 30)
    lengths = runs.square().sum(dim=(0, 2, 3)).sqrt()
    assert sorted(lengths.tolist()) == pytest.approx([0, 1, 1])
    kept = runs[:, lengths > 0].reshape(8, 30)
    torch.testing.assert_close(kept @ kept.T, torch.eye(8).double() / 4, rtol=0, atol=2e-3)


# --- in the optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 40), (8, 4, 3, 3), (6, 1)], ids=str)
def test_balls_of_one_kind_move_in_one_batch(shape: tuple[int, ...]) -> None:
    stack = torch.stack([gaussian(shape, seed) for seed in range(3)])
    lengths, (vertex,) = unit_vertices(rows(3), [stack])
    torch.testing.assert_close(lengths, stack.flatten(1).norm(dim=1))
    torch.testing.assert_close(-vertex.factor * vertex.carrier, torch.stack([rows(3).lmo(g) for g in stack]))


def test_all_rows_without_rescaling_are_the_step_of_muon_with_an_exact_polar_factor() -> None:
    p, g = nn.Parameter(0.01 * gaussian((10, 30))), gaussian((10, 30), seed=1)
    before = p.detach().clone()
    p.grad = g.clone()
    SFW([{"params": [p], "ball": NormBall(rows(10), 2.0)}], lr=0.1, momentum=0.0, rescale=None).step()
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(p.detach(), 0.9 * before - 0.2 * u @ vh, rtol=0, atol=5e-4)


@pytest.mark.parametrize("rescale", ["gradient", "diameter", None])
@dtypes
def test_weights_stay_in_their_ball(rescale: str, dtype: torch.dtype) -> None:
    ball = NormBall(Channels(KSparse(3), 12, orthogonal=True), 1.5)
    parameters = [nn.Parameter(0.1 * x) for x in coupled_tensors(dtype)]
    opt = SFW([{"params": parameters, "ball": ball, "joint": True}], lr=0.2, rescale=rescale)
    for step in range(300):
        for i, p in enumerate(parameters):
            p.grad = gaussian(tuple(p.shape), 10 * step + i, dtype)
        opt.step()
        assert ball.contains([p.detach() for p in parameters])
    assert opt.gap() >= 0


def test_a_quadratic_is_solved_to_a_vertex_of_the_ball() -> None:
    target = 10 * torch.linalg.qr(gaussian((20, 6))).Q.T
    target[3:] *= 0.1
    p = nn.Parameter(torch.zeros(6, 20, dtype=torch.float64))
    opt = SFW([{"params": [p], "ball": NormBall(rows(3), 2.0)}], lr=0.1, momentum=0.0, rescale=None)
    for step in range(400):
        opt.param_groups[0]["lr"] = 2 / (step + 2)
        p.grad = p.detach() - target
        opt.step()
    expected = torch.cat([target[:3] / 5, torch.zeros(3, 20).double()])
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-2)


def test_training_starts_from_all_channels_and_ends_with_few() -> None:
    torch.manual_seed(0)
    model, x = build_model("resnet8", num_classes=10, image_shape=(1, 8, 8), width=0.5), torch.randn(4, 1, 8, 8)
    groups = coupled_channels(model, x).groups
    balls = constrain(model, [("*", filters(k=0.25, vertices="orthogonal"))], default=None, coupled=groups)
    joint = [g for g in balls if g["ball"] is not None and g.get("joint")]
    assert joint
    assert all(NormBall.from_spec(g["ball"]).norm.orthogonal for g in joint)  # type: ignore[attr-defined]
    opt = SFW(balls, lr=0.05, rescale=None)
    anneal = KSchedule(opt, 1.0, steps=4)
    losses = []
    for _ in range(8):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        opt.step()
        anneal.step()
    assert losses[-1] < losses[0]
    assert all(math.isfinite(value) for value in losses)


# --- specs and bad input ----------------------------------------------------------------------------------------------


def test_the_flag_is_part_of_a_spec() -> None:
    for norm in (rows(2), Channels(KSparse(2), 4, orthogonal=True)):
        assert Norm.from_spec(norm.to_spec()) == norm
    assert Norm.from_spec({"norm": "Rows", "inner": {"norm": "KSparse", "k": 2}, "dim": 0}) == Rows(KSparse(2))


def test_projection_and_diameter_are_those_of_the_ball() -> None:
    x = gaussian((6, 10))
    torch.testing.assert_close(rows(2).project(x, 1.0), Rows(KSparse(2)).project(x, 1.0))
    assert rows(2).diameter(x.shape) == Rows(KSparse(2)).diameter(x.shape)


@pytest.mark.parametrize("inner", [KSupport(2), Lp(1), Lp(2)], ids=str)
def test_other_vector_norms_are_refused(inner: VectorNorm) -> None:
    with pytest.raises(ValueError, match="equal lengths"):
        Rows(inner, orthogonal=True)
    with pytest.raises(ValueError, match="equal lengths"):
        Channels(inner, 4, orthogonal=True)
    with pytest.raises(ValueError, match="True or False"):
        Rows(KSparse(2), orthogonal="yes")  # type: ignore[arg-type]


def test_only_filters_have_rows_to_turn() -> None:
    for preset in (rank, weights):
        with pytest.raises(BadInput, match="'support', 'sparse', got 'orthogonal'"):
            preset(0.1, vertices="orthogonal")
    with pytest.raises(BadInput, match="'orthogonal', got 'round'"):
        filters(0.1, vertices="round")  # type: ignore[arg-type]
