"""Soft thresholds: the proximal step of each norm's parts, and its turns with the steps of SFW."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
from pliant import NormBall, SoftThreshold
from pliant.errors import BadInput
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm
from tests.instances import INSTANCES, Shape, few_integers, gaussian, tiled

every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)


def total_length(norm: Norm) -> Norm:
    """Return the sum of the parts' lengths as a norm."""
    return Lp(1) if isinstance(norm, VectorNorm | Blocks) else replace(norm, inner=Lp(1))


def assert_proximal(norm: Norm, x: Tensor, y: Tensor, amount: float) -> None:
    """y minimises ½‖y − x‖² + amount·Ω(y): x − y is amount times a subgradient of Ω at y."""
    omega, size = total_length(norm), x.abs().max().item()
    assert omega.dual(x - y) <= amount + 1e-12 * size
    torch.testing.assert_close(torch.sum((x - y) * y), amount * omega(y), rtol=1e-10, atol=1e-11 * size * size)


# --- of a norm --------------------------------------------------------------------------------------------------------


@every_instance
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.1])
def test_is_the_proximal_step(norm: Norm, shape: Shape, share: float) -> None:
    x = gaussian(shape)
    longest = total_length(norm).dual(x).item()
    y = norm.soft_threshold(x, share * longest)
    assert_proximal(norm, x, y, share * longest)
    assert bool(y.any()) == (share < 1)
    assert norm(y) <= norm(x) * (1 + 1e-12)


@given(few_integers, st.sampled_from(INSTANCES), st.sampled_from([0.5, 1.0, 2.0]))
def test_with_ties_and_zeros(values: list[int], instance: tuple[Norm, Shape], amount: float) -> None:
    norm, shape = instance
    x = tiled(values, shape)
    y = norm.soft_threshold(x, amount)
    assert_proximal(norm, x, y, amount)
    if not isinstance(norm, Spectral):
        assert not y[x == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_instance
def test_is_as_exact_as_the_format(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    x = gaussian(shape, dtype=dtype)
    y = norm.soft_threshold(x, 0.3)
    assert y.dtype == dtype
    expected = norm.soft_threshold(x.double(), 0.3)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * x.double().norm().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [Spectral(KSparse(1)), Rows(KSparse(1)), KSparse(1)], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_zero_rows_and_columns_stay_zero(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    x = gaussian(shape, dtype=dtype)
    x[1], x[:, 3] = 0, 0
    y = norm.soft_threshold(x, 0.3)
    assert not y[1].any()
    assert y[0].any()
    assert not y[:, 3].any()


@every_instance
@pytest.mark.parametrize("exponent", [-100, 100])
def test_does_not_depend_on_the_scale(norm: Norm, shape: Shape, exponent: int) -> None:
    x, scale = gaussian(shape, dtype=torch.float32), 2.0**exponent
    torch.testing.assert_close(norm.soft_threshold(scale * x, scale * 0.3), scale * norm.soft_threshold(x, 0.3))


def test_channels_of_several_tensors_shrink_together() -> None:
    norm = Channels(KSparse(2), 3)
    x = [gaussian((3, 4)), gaussian((3,), 1), gaussian((6, 2), 2)]
    y = norm.soft_threshold(x, 1.0)
    rows = torch.cat([t.reshape(3, -1) for t in x], dim=1)
    lengths = rows.norm(dim=1, keepdim=True)
    expected = rows * (1 - 1 / lengths).clamp_min(0)
    torch.testing.assert_close(torch.cat([t.reshape(3, -1) for t in y], dim=1), expected)


# --- in turns with the optimizer --------------------------------------------------------------------------------------


def stepped(
    norm: Norm, every: int, steps: int, joint: bool = False
) -> tuple[list[nn.Parameter], pliant.SFW, SoftThreshold]:
    shapes = [(4, 6), (4, 6)]
    params = [nn.Parameter(gaussian(shape, i) / 20) for i, shape in enumerate(shapes)]
    opt = pliant.SFW([{"params": params, "ball": NormBall(norm, 3.0), "joint": joint}], lr=0.1, rescale=None)
    threshold = SoftThreshold(opt, 0.25, every=every)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gaussian(shapes[i], 10 + 2 * step + i)
        opt.step()
        threshold.step()
    return params, opt, threshold


# (norm, the L2 length of a part of a vertex of its unit ball)
PARTS = [
    (KSparse(3), 1.0),
    (KSupport(4), 0.5),
    (Lp(1), 1.0),
    (Rows(KSparse(2)), 1.0),
    (Rows(KSupport(2)), math.sqrt(0.5)),
    (Spectral(KSparse(2)), 1.0),
    (Spectral(KSupport(2)), math.sqrt(0.5)),
    (Blocks(KSupport(1), 2), math.sqrt(1 / 12)),
]


@pytest.mark.parametrize(("norm", "length"), PARTS, ids=str)
def test_takes_a_share_of_what_steps_add(norm: Norm, length: float) -> None:
    plain, *_ = stepped(norm, every=3, steps=2)  # too early
    before = [p.detach().clone() for p in plain]
    thresholded, *_ = stepped(norm, every=2, steps=2)
    for p, q in zip(thresholded, before, strict=True):
        torch.testing.assert_close(p.detach(), norm.soft_threshold(q, 0.25 * (2 * 0.1) * 3.0 * length))
        assert NormBall(norm, 3.0).contains(p)


def test_a_joint_ball_has_parts_of_all_its_tensors() -> None:
    norm = KSparse(3)
    plain, *_ = stepped(norm, every=9, steps=1, joint=True)
    thresholded, *_ = stepped(norm, every=1, steps=1, joint=True)
    for p, q in zip(thresholded, plain, strict=True):
        torch.testing.assert_close(p.detach(), norm.soft_threshold(q.detach(), 0.25 * 0.1 * 3.0))


def test_finds_the_directions_that_gradients_share() -> None:
    signal = torch.outer(gaussian((16,)), gaussian((24,), 1))
    ranks = []
    for strength in (0.0, 0.5):
        p = nn.Parameter(gaussian((16, 24)) / 50)
        group = {"params": [p], "ball": NormBall(Spectral(KSparse(4)), 1.0)}
        opt = pliant.SFW([group], lr=0.02, momentum=0, rescale=None)
        threshold = SoftThreshold(opt, strength, every=5)
        for step in range(200):
            p.grad = signal + gaussian((16, 24), step)
            opt.step()
            threshold.step()
        values = torch.linalg.svdvals(p.detach())
        assert values[0] > 0.4
        ranks.append(int((values > 1e-4).sum()))
    assert ranks == [16, 1]


def test_goes_on_from_its_state() -> None:
    norm = Spectral(KSparse(2))
    *_, threshold = stepped(norm, every=4, steps=3)
    *_, other = stepped(norm, every=4, steps=0)
    other.load_state_dict(threshold.state_dict())
    assert other.state_dict() == threshold.state_dict() == {"last_step": 3, "pending": [pytest.approx(0.25 * 0.3 * 3)]}
    with pytest.raises(BadInput, match="2 groups cannot go on with 1"):
        other.load_state_dict({"last_step": 0, "pending": [0.0, 0.0]})


def test_leaves_alone_what_has_no_parts_or_was_not_stepped() -> None:
    a, b, c, d = (nn.Parameter(gaussian((4, 4), i)) for i in range(4))
    groups = [
        {"params": [a, b], "ball": NormBall(Rows(KSparse(2)), 5.0)},
        {"params": [c], "ball": NormBall(Lp(2), 5.0)},
        {"params": [d], "ball": None},
    ]
    opt = pliant.SFW(groups, lr=0.1, rescale=None)
    twin = [p.detach().clone() for p in (a, b, c, d)]
    for p in (a, c, d):
        p.grad = torch.zeros_like(p)
    threshold = SoftThreshold(opt, 0.5, every=1)
    opt.step()
    threshold.step()
    for p, q, same in zip((a, b, c, d), twin, (False, True, True, True), strict=True):
        assert torch.equal(p.detach(), q) == same


def test_bad_input() -> None:
    p = nn.Parameter(gaussian((4, 4)))
    opt = pliant.SFW([{"params": [p], "ball": NormBall(Rows(KSparse(2)), 5.0)}], lr=0.1, rescale=None)
    for strength in (-0.1, 1.0, math.nan):
        with pytest.raises(BadInput, match="strength from 0 to below 1"):
            SoftThreshold(opt, strength)
    with pytest.raises(BadInput, match="every >= 1"):
        SoftThreshold(opt, 0.1, every=0)
    other = pliant.SFW([{"params": [p], "ball": NormBall(Rows(KSparse(2)), 5.0)}], lr=0.1, rescale="gradient")
    with pytest.raises(BadInput, match="rescale=None, got 'gradient'"):
        SoftThreshold(other, 0.1)
    without = pliant.SFW([{"params": [p], "ball": NormBall(Lp(2), 5.0)}], lr=0.1, rescale=None)
    with pytest.raises(BadInput, match="no group"):
        SoftThreshold(without, 0.1)
