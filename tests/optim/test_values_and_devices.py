"""Numbers of every kind: half precision, learning rates, NaN and infinite gradients, views, other default devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule, SoftThreshold
from tests.instances import gaussian
from tests.optimizer_cases import (
    CASES,
    Case,
    assert_equal,
    assert_same_state,
    every_case,
    optimizer,
    quiet_first_steps,
    run,
    weights,
)

pytestmark = quiet_first_steps

NORMS = [
    Lp(1),
    Lp(2),
    Lp(3.0),
    Lp(math.inf),
    KSparse(4),
    KSupport(4),
    Rows(KSparse(2)),
    Rows(KSparse(2), orthogonal=True),
    Channels(KSupport(2), 4),
    Blocks(KSupport(1), 4),
    Spectral(KSparse(2)),
    Spectral(KSupport(2)),
    Spectral(Lp(1)),
    Spectral(Lp(3.0)),
    Spectral(Lp(math.inf)),
]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


# --- the gap in half precision ----------------------------------------------------------------------------------------


@every_norm
@halves
def test_the_gap_of_half_precision_is_computed_in_float32(norm: Norm, dtype: torch.dtype) -> None:
    x, g = (gaussian((8, 64), i).to(dtype) for i in (1, 2))
    ball = NormBall(norm, 3.0)
    gap, exact = ball.gap(x, g), ball.gap(x.double(), g.double())
    assert gap.dtype == torch.float32
    torch.testing.assert_close(gap.double(), exact, rtol=1e-4, atol=1e-4)
    together = ball.gap([x, x], [g, g.double()])
    torch.testing.assert_close(together.double(), ball.gap([x.double()] * 2, [g.double()] * 2), rtol=1e-4, atol=1e-4)


def test_the_gap_of_half_precision_does_not_overflow() -> None:
    x, g = torch.full((64, 64), 60.0, dtype=torch.float16), torch.full((64, 64), 60.0, dtype=torch.float16)
    assert NormBall(Lp(2), 1.0).gap(x, g).item() == pytest.approx(64 * 64 * 3600 + 64 * 60)


@pytest.mark.parametrize(
    "norm", [Lp(2), KSupport(40), Rows(KSparse(2)), Spectral(KSupport(2)), Blocks(KSupport(1), 4)], ids=str
)
@halves
def test_the_gap_of_an_optimizer_in_half_precision(norm: Norm, dtype: torch.dtype) -> None:
    p = nn.Parameter((gaussian((24, 64)) / 20).to(dtype))
    opt = SFW([{"params": [p], "ball": NormBall(norm, 3.0)}], lr=0.01)
    for step in range(40):
        p.grad = gaussian((24, 64), step).to(dtype)
        opt.step()
    ball = NormBall.from_spec(opt.param_groups[0]["ball"])
    exact = 0.1 * ball.gap(p.detach().double(), opt.state[p]["momentum_buffer"].double())
    assert opt.gap().item() == pytest.approx(exact.item(), rel=1e-4)


# --- learning rates ---------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), torch.bfloat16), ((1,), torch.float32), ((1, 1), torch.float64), ((1, 1, 1, 1, 1), torch.float32)],
    ids=str,
)
def test_a_tensor_of_one_element_is_a_learning_rate(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    number, tensor = weights(), weights()
    scalars = [nn.Parameter(torch.tensor(0.5, dtype=torch.float64)) for _ in range(2)]
    first, second = (
        optimizer(number, case, lr=0.0625),
        optimizer(tensor, case, lr=torch.full(shape, 0.0625, dtype=dtype)),
    )
    for opt, parameters, scalar in ((first, number, scalars[0]), (second, tensor, scalars[1])):
        opt.add_param_group({"params": [scalar]})
        scalar.grad = torch.tensor(2.0, dtype=torch.float64)
        run(opt, parameters, range(3))
        assert [p.shape for p in parameters] == [p.shape for p in number]
    for p, q in zip([*number, scalars[0]], [*tensor, scalars[1]], strict=True):
        torch.testing.assert_close(p, q)


WRONG = [-1.0, math.nan, math.inf, -math.inf]
WRONG_TENSORS = [torch.tensor(value) for value in WRONG] + [torch.tensor([[-1.0]]), torch.ones(2), torch.ones(0)]


@pytest.mark.parametrize("lr", [*WRONG, *WRONG_TENSORS], ids=str)
def test_a_wrong_learning_rate_is_refused(lr: Any) -> None:
    p, q = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(2, 4))
    for ball in (None, NormBall(Lp(2), 9.0)):
        with pytest.raises(ValueError, match="lr"):
            SFW([{"params": [p], "ball": ball}], lr=lr)
        opt = SFW([{"params": [p], "ball": ball}])
        with pytest.raises(ValueError, match="lr"):
            opt.add_param_group({"params": [q], "lr": lr})
        assert len(opt.param_groups) == 1


@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_a_learning_rate_that_became_nan_is_refused_before_anything_changes(lr: float) -> None:
    parameters = weights()
    opt = optimizer(parameters, CASES["filters"])
    before = [p.detach().clone() for p in parameters]
    opt.param_groups[1]["lr"] = lr
    with pytest.raises(ValueError, match="lr must be finite"):
        run(opt, parameters, range(1))
    assert_equal(parameters, before)
    assert not opt.state


def test_a_learning_rate_without_a_value_is_taken_on_trust() -> None:
    p = nn.Parameter(torch.ones(2, 4, device="meta"))
    SFW([p], lr=torch.ones((), device="meta"))


# --- gradients --------------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(8, 12), (20, 24)], ids=["small", "large"])
def test_a_gradient_that_is_not_finite_is_named_for_every_ball(
    norm: Norm, value: float, shape: tuple[int, int]
) -> None:
    parameters = [nn.Parameter(gaussian(shape, i) / 50) for i in range(4)]
    named = list(zip(["a", "b", "c", "d"], parameters, strict=True))
    ball = NormBall(norm, 4.0)
    groups = [{"params": named[:1], "ball": ball}, {"params": named[1:3], "ball": ball}, {"params": named[3:]}]
    opt = SFW(groups, lr=0.02)
    for spoiled in (False, True):
        for i, p in enumerate(parameters):
            p.grad = gaussian(shape, 10 + i)
        if spoiled:
            parameters[2].grad[1, 2] = value  # type: ignore[index]
            before, state = [p.detach().clone() for p in parameters], copy.deepcopy(opt.state_dict())
            with pytest.raises(FloatingPointError, match=r"NaN or infinite gradient in c; .* nothing has changed"):
                opt.step()
        else:
            opt.step()
    assert_equal(parameters, before)
    assert_same_state(opt.state_dict(), state)


@pytest.mark.parametrize(
    "norm", [Spectral(KSparse(2)), Spectral(Lp(1)), Spectral(Lp(3.0)), Spectral(KSparse(8))], ids=str
)
def test_a_decomposition_that_fails_in_a_step_names_the_parameter(norm: Norm) -> None:
    # Gradients in float16 may be finite, but not their sum.
    p = nn.Parameter(torch.zeros(8, 12, dtype=torch.float16))
    opt = SFW([{"params": [("weight", p)], "ball": NormBall(norm, 1.0)}], lr=0.02)
    p.grad = torch.full_like(p, 6e4)
    opt.step()
    with pytest.raises(FloatingPointError, match="momentum of weight"):
        opt.step()


def test_large_finite_gradients_are_no_error() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        p = nn.Parameter(torch.zeros(8, 12, dtype=dtype))
        opt = SFW([{"params": [p], "ball": NormBall(Rows(KSparse(2)), 1.0)}], momentum=0.0)
        p.grad = torch.full_like(p, torch.finfo(dtype).max)  # the sum of its entries overflows
        opt.step()
        assert p.isfinite().all()


def negative(g: Tensor) -> Tensor:
    """Return a view of the negative of a tensor, as the imaginary part of a conjugate is one."""
    view = torch.complex(torch.zeros_like(g), -g).conj().imag
    assert view.is_neg()
    return view


@every_norm
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_may_be_views_of_the_negative_of_a_tensor(norm: Norm, momentum: float) -> None:
    results = []
    for view in (False, True):
        p, free = nn.Parameter(gaussian((8, 12)) / 50), nn.Parameter(gaussian((3,)))
        opt = SFW([{"params": [p], "ball": NormBall(norm, 4.0)}, {"params": [free]}], lr=0.02, momentum=momentum)
        for step in range(3):
            for q in (p, free):
                g = gaussian(tuple(q.shape), step)
                q.grad = negative(g) if view else g
            opt.step()
        results.append([p, free])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# --- points on the boundary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [Lp(1), KSparse(3), Rows(Lp(1)), Spectral(Lp(1)), Blocks(KSparse(2), 4)], ids=str)
@pytest.mark.parametrize("lr", [0.03, 0.01, 0.003])
def test_rounding_of_steps_does_not_leave_the_ball(norm: Norm, lr: float) -> None:
    random = torch.Generator().manual_seed(0)
    p, ball = nn.Parameter(torch.randn(20, 24, generator=random)), NormBall(norm, 1.0)
    p.data /= norm(p.data)
    opt = SFW([{"params": [p], "ball": ball}], lr=lr, momentum=0.0, rescale=None)
    signs = p.detach().sign()
    for _ in range(60):
        p.grad = -(torch.rand(20, 24, generator=random) + 0.1) * signs  # along a face of the ball of entries
        opt.step()
        assert ball.contains(p.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_norm
def test_points_outside_are_outside(norm: Norm, dtype: torch.dtype) -> None:
    x = gaussian((8, 12), 0, dtype)
    ball = NormBall(norm, norm(x).item())
    assert ball.contains(x)
    assert not ball.contains(x * (1 + 100 * torch.finfo(dtype).eps))


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _meta_by_default() -> Iterator[None]:
    """Make every tensor without a device a meta tensor, which has no values."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@every_case
def test_the_default_device_does_not_matter(case: Case) -> None:
    expected, parameters = weights(), weights()
    gradients = [[gaussian(tuple(p.shape), 10 * step + i) for i, p in enumerate(parameters)] for step in range(3)]
    results: list[Any] = []
    for device, tensors in ((None, expected), ("meta", parameters)):
        opt = optimizer(tensors, case)
        torch.set_default_device(device)
        try:
            for each in gradients:
                for p, g in zip(tensors, each, strict=True):
                    p.grad = g
                opt.step()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            opt.step()
            results.append((opt.gap().item(), opt.inside(), opt.bring_inside()))
        finally:
            torch.set_default_device(None)
    assert results[0] == results[1]
    assert_equal(expected, parameters)


@pytest.mark.usefixtures("_meta_by_default")
@pytest.mark.parametrize(
    "preset",
    [pliant.filters(k=0.5), pliant.rank(k=0.5), pliant.weights(k=0.5), pliant.l2(), pliant.semi_structured(2, 4)],
)
def test_radii_and_schedules_do_not_ask_the_default_device(preset: Any) -> None:
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 20))
        x = torch.ones(2, 32)
    opt = SFW(pliant.constrain(model, [("*.weight", preset)], default=None), lr=0.1, rescale=None)
    if NormBall.from_spec(opt.param_groups[0]["ball"]).norm.k is not None:
        KSchedule(opt, 1.0, steps=2)
        SoftThreshold(opt, 0.1, every=2)
    for _ in range(3):
        opt.zero_grad()
        model(x).sum().backward()
        opt.step()
    assert opt.gap().device.type == "cpu"
    assert all(opt.inside().values())
    assert SFW(list(model.parameters())).gap().device.type == "cpu"
