"""Schedules count the steps that the optimizer takes, and no others: whoever takes, skips, saves or wraps them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pliant.errors import BadInput
from pliant.norms import KSparse, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule, SoftThreshold
from tests.instances import gaussian
from tests.optimizer_cases import assert_equal, assert_same_state, quiet_first_steps
from tests.schedule_cases import NORMS, STEPS, every_norm, fresh, go, k_of, scheduled

pytestmark = quiet_first_steps

# --- who counts -------------------------------------------------------------------------------------------------------


def by_hand(norm: Norm, steps: int) -> list[nn.Parameter]:
    """Train with k and thresholds set by hand after each step, without a schedule."""
    weights, opt = fresh(norm)
    group, pending = opt.param_groups[0], 0.0
    end, length = norm.k, norm.length((20, 24))
    diameter = NormBall(norm, 2.0).diameter((20, 24))

    def ball_of(k: int) -> NormBall:
        return NormBall(norm.with_k(k), diameter / norm.with_k(k).diameter((20, 24)))

    assert end is not None
    opt.set_ball(group, ball_of(length))
    for step in range(steps):
        go(weights, opt, range(step, step + 1))
        ball = NormBall.from_spec(group["ball"])
        parts = ball.norm.parts_of_vertex((20, 24))
        assert parts is not None
        pending += 0.1 * 0.05 * ball.diameter((20, 24)) / 2 / math.sqrt(parts)
        if step % 2:
            weights[0].data.copy_(ball.norm.soft_threshold(weights[0].detach(), pending))
            pending = 0.0
        k = math.floor(length + (end - length) * min(1.0, (step + 1) / STEPS) + 0.5)
        if k != ball.norm.k:
            opt.set_ball(group, ball_of(k))
    return weights


@every_norm
@pytest.mark.parametrize("called", [True, False], ids=["step called", "step not called"])
def test_the_steps_are_those_of_k_and_thresholds_by_hand(norm: Norm, called: bool) -> None:
    weights, opt, anneal, threshold = scheduled(norm)
    go(weights, opt, range(8), (threshold, anneal) if called else ())
    assert k_of(opt) == norm.k
    assert (anneal.last_step, threshold.last_step) == (8, 8)
    for p, q in zip(weights, by_hand(norm, 8), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def by_scaler(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum((p.float() * (1.0 if good else math.inf)).sum() for p in weights)).backward()  # type: ignore[union-attr, arg-type]
    scaler.step(opt)
    scaler.update()


def by_check(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    for p in weights:
        p.grad = torch.full_like(p, 1.0 if good else math.nan)
    if good:
        opt.step()
        return
    with pytest.raises(FloatingPointError):
        opt.step()


def by_closure(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    def closure() -> float:
        if not good:
            raise ArithmeticError
        for p in weights:
            p.grad = torch.ones_like(p)
        return 0.0

    if good:
        opt.step(closure)
        return
    with pytest.raises(ArithmeticError):
        opt.step(closure)


def by_accumulation(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    sum(p.sum() for p in weights).backward()  # type: ignore[union-attr]
    if good:
        opt.step()


def by_sparse_gradient(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    for p in weights:
        p.grad = torch.ones_like(p)
    if good:
        opt.step()
        return
    weights[0].grad = torch.eye(20, 24, dtype=weights[0].dtype).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        opt.step()


@pytest.mark.parametrize("take", [by_scaler, by_check, by_closure, by_accumulation, by_sparse_gradient])
def test_steps_that_are_not_taken_do_not_count(take: Callable[[SFW, list[nn.Parameter], bool], None]) -> None:
    weights, opt, anneal, threshold = scheduled(check_finite=True)
    for good in (False, True, False, False, True, False):
        opt.zero_grad()
        take(opt, weights, good)
        threshold.step()
        anneal.step()
    assert (anneal.last_step, threshold.last_step) == (2, 2)
    assert k_of(opt) == math.floor(20 - 18 * 2 / STEPS + 0.5)
    assert threshold.state_dict()["pending"] == [0.0, 0.0]  # taken off in the second step


def test_a_replayed_graph_is_counted_by_whoever_replays_it() -> None:
    weights, opt, anneal, threshold = scheduled(capturable=True)
    go(weights, opt, range(2))
    assert (anneal.last_step, threshold.last_step) == (0, 0)
    threshold.step()
    anneal.step()
    assert (anneal.last_step, threshold.last_step) == (1, 1)
    assert k_of(opt) == 17


# --- wrappers ---------------------------------------------------------------------------------------------------------


def accelerated(opt: SFW) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True).prepare(opt)


def of_lightning(opt: SFW) -> Any:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(opt)


def of_fabric(opt: SFW) -> Any:
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricOptimizer

    return _FabricOptimizer(opt, SingleDeviceStrategy(torch.device("cpu")))


class Holder:
    """A wrapper as Opacus and others write it."""

    def __init__(self, original_optimizer: Any) -> None:
        self.original_optimizer = original_optimizer

    @property
    def param_groups(self) -> Any:
        return self.original_optimizer.param_groups


WRAPPERS: dict[str, Callable[[SFW], Any]] = {
    "accelerate": accelerated,
    "lightning": of_lightning,
    "fabric": of_fabric,
    "opacus": Holder,
    "twice": lambda opt: Holder(accelerated(opt)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_optimizer_is_as_good(wrap: Callable[[SFW], Any]) -> None:
    plain, bare, *_ = scheduled()
    go(plain, bare, range(8))
    weights, opt = fresh()
    wrapper = wrap(opt)
    anneal, threshold = KSchedule(wrapper, 1.0, steps=STEPS), SoftThreshold(wrapper, 0.1, every=2)
    assert anneal.optimizer is threshold.optimizer is opt
    go(weights, opt, range(8), (threshold, anneal))
    assert_equal(weights, plain)


@pytest.mark.parametrize("wrong", [torch.optim.SGD([nn.Parameter(torch.ones(2))]), Holder(None), None, "sfw", 3])
def test_what_holds_no_sfw_is_refused(wrong: Any) -> None:
    for make in (lambda: KSchedule(wrong, steps=3), lambda: SoftThreshold(wrong, 0.1)):
        with pytest.raises(BadInput, match=r"needs a pliant\.SFW"):
            make()


def test_accelerate_counts_the_steps_it_takes() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Linear(24, 20, bias=False)
    opt = SFW([{"params": [model.weight], "ball": NormBall(NORMS[1], 2.0)}], lr=0.05, rescale=None)
    early = KSchedule(opt, 1.0, steps=STEPS)
    network, prepared = accelerator.prepare(model, opt)
    threshold = SoftThreshold(prepared, 0.1)
    for _ in range(16):
        with accelerator.accumulate(network):
            accelerator.backward(network(torch.ones(2, 24)).sum())
            prepared.step()
            threshold.step()
            early.step()
            prepared.zero_grad()
    assert (early.last_step, threshold.last_step) == (4, 4)


# --- groups that come later -------------------------------------------------------------------------------------------


@every_norm
def test_a_group_that_comes_later_takes_part(norm: Norm) -> None:
    weights, opt, anneal, threshold = scheduled(norm)
    go(weights, opt, range(3))
    late = nn.Parameter(gaussian((20, 24), 9) / 50)
    opt.add_param_group({"params": [late], "ball": NormBall(norm, 2.0)})
    assert k_of(opt, 2) == k_of(opt, 0)
    go([*weights, late], opt, range(3, STEPS), (threshold, anneal))
    assert k_of(opt, 2) == k_of(opt, 0) == norm.k
    assert opt.param_groups[2]["soft_threshold"] == {
        **opt.param_groups[0]["soft_threshold"],
        "pending": pytest.approx(0),
    }
    assert anneal.state_dict()["spans"] == [opt_span(norm), None, opt_span(norm)]
    twin = copy.deepcopy(opt)
    assert_same_state(twin.state_dict(), opt.state_dict())


def opt_span(norm: Norm) -> list[int | None]:
    return [norm.length((20, 24)), norm.k]


@pytest.mark.parametrize("ball", [None, NormBall(Lp(2), 1.0), NormBall(Spectral(Lp(math.inf)), 1.0)])
def test_a_later_group_without_a_k_does_not(ball: NormBall | None) -> None:
    weights, opt, anneal, _ = scheduled()
    late = nn.Parameter(gaussian((20, 24), 9) / 50)
    opt.add_param_group({"params": [late], "ball": ball})
    go([*weights, late], opt, range(STEPS))
    assert anneal.state_dict()["spans"] == [[20, 2], None, None]


def test_a_later_group_that_cannot_take_part_is_refused() -> None:
    _, opt = fresh()
    KSchedule(opt, 18, steps=STEPS)
    for shape, message in (((5, 24), "k=18"), ((20, 24), None)):
        late = nn.Parameter(gaussian(shape, 9) / 50)
        group = {"params": [late], "ball": NormBall(Rows(KSparse(2)), 2.0)}
        if message is None:
            opt.add_param_group(group)
        else:
            with pytest.raises(BadInput, match=message):
                opt.add_param_group(group)
            assert len(opt.param_groups) == 2
    assert len(opt.param_groups) == 3


def test_a_group_may_leave() -> None:
    _, opt, anneal, threshold = scheduled()
    opt.add_param_group({"params": [nn.Parameter(gaussian((20, 24)))], "ball": NormBall(NORMS[1], 2.0)})
    del opt.param_groups[0]
    opt.step()
    assert (anneal.last_step, threshold.last_step) == (1, 1)
