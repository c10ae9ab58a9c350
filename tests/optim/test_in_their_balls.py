"""Weights are in the balls of their groups, whatever has become of the weights, the balls or the optimizer."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule
from tests.instances import gaussian
from tests.optimizer_cases import assert_equal, quiet_first_steps

NORMS = [
    Lp(2),
    Lp(1),
    KSparse(4),
    Rows(KSupport(2)),
    Blocks(KSparse(1), 4),
    Spectral(KSupport(2)),
    Spectral(KSparse(2)),
]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
every_momentum = pytest.mark.parametrize("momentum", [0.0, 0.9])
NAMES = ["first.weight", "second.weight", "free"]


def trained(norm: Norm, momentum: float = 0.9, joint: bool = False, steps: int = 2) -> tuple[list[nn.Parameter], SFW]:
    weights = [nn.Parameter(gaussian((20, 24), i) / 100) for i in range(2)] + [nn.Parameter(gaussian((5,), 3))]
    named = list(zip(NAMES, weights, strict=True))
    groups = [{"params": named[:2], "ball": NormBall(norm, 8.0), "joint": joint}, {"params": named[2:]}]
    opt = SFW(groups, lr=0.01, momentum=momentum)
    go(weights, opt, range(steps))
    return weights, opt


def go(weights: list[nn.Parameter], opt: SFW, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(weights):
            p.grad = gaussian(tuple(p.shape), 50 + 3 * step + i)
        opt.step()


def balls_of(opt: SFW) -> list[tuple[NormBall, list[Tensor]]]:
    found = []
    for group in opt.param_groups:
        if group["ball"] is not None:
            ball = NormBall.from_spec(group["ball"])
            tensors = [p.detach() for p in group["params"]]
            found += [(ball, tensors)] if group["joint"] else [(ball, [x]) for x in tensors]
    return found


def all_inside(opt: SFW) -> bool:
    return all(bool(ball.contains(tensors)) for ball, tensors in balls_of(opt))


def grown(weights: list[nn.Parameter], by: float = 1e3) -> None:
    with torch.no_grad():
        for p in weights[:2]:
            p.mul_(by)


# --- what changes -----------------------------------------------------------------------------------------------------


def load_a_smaller_ball(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["ball"]["radius"] = 1e-3
    opt.load_state_dict(saved)
    return opt


def load_a_state_with_other_weights(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    grown(weights)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return opt


def set_the_spec(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    opt.param_groups[0]["ball"] = {**opt.param_groups[0]["ball"], "radius": 1e-3}
    return opt


def change_the_spec(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    opt.param_groups[0]["ball"]["radius"] = 1e-3
    return opt


def set_a_smaller_ball(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    ball = NormBall.from_spec(opt.param_groups[0]["ball"])
    opt.set_ball(opt.param_groups[0], NormBall(ball.norm, 1e-3))
    return opt


def set_no_ball_and_one_again(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    ball = opt.param_groups[0]["ball"]
    opt.set_ball(opt.param_groups[0], None)
    grown(weights)
    opt.set_ball(opt.param_groups[0], ball)
    return opt


def replace_the_weights(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    new = [nn.Parameter(1e3 * p.detach()) for p in weights[:2]]
    weights[:2] = new
    opt.param_groups[0]["params"] = new
    return opt


def copy_it(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    grown(weights)
    twin = copy.deepcopy(opt)
    weights[:] = [p for group in twin.param_groups for p in group["params"]]
    return twin


def pickle_it(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    grown(weights)
    twin = pickle.loads(pickle.dumps(opt))
    weights[:] = [p for group in twin.param_groups for p in group["params"]]
    return twin


def let_them_share_a_ball(opt: SFW, weights: list[nn.Parameter]) -> SFW:
    with torch.no_grad():
        for ball, (x,) in balls_of(opt):
            x.mul_(ball.radius / ball.norm(x))  # each is inside alone, not both together
    opt.param_groups[0]["joint"] = True
    return opt


CHANGES = [
    load_a_smaller_ball,
    load_a_state_with_other_weights,
    set_the_spec,
    change_the_spec,
    set_a_smaller_ball,
    set_no_ball_and_one_again,
    replace_the_weights,
    copy_it,
    pickle_it,
]


@every_norm
@every_momentum
@pytest.mark.parametrize("change", CHANGES)
@quiet_first_steps
def test_the_next_step_is_inside(norm: Norm, momentum: float, change: Callable[..., SFW]) -> None:
    weights, opt = trained(norm, momentum)
    opt = change(opt, weights)
    go(weights, opt, range(2, 3))
    assert all_inside(opt)
    assert all(opt.inside().values())


@pytest.mark.parametrize("norm", [Lp(1), Lp(2), KSparse(4), Rows(Lp(1)), Spectral(Lp(1))], ids=str)
def test_tensors_that_now_share_a_ball_are_inside_together(norm: Norm) -> None:
    weights, opt = trained(norm)
    let_them_share_a_ball(opt, weights)
    assert opt.inside() == {"first.weight": False, "second.weight": False}
    go(weights, opt, range(2, 3))
    assert all_inside(opt)


@pytest.mark.parametrize("norm", [KSparse(4), Rows(KSparse(2)), Spectral(KSparse(2)), Blocks(KSparse(1), 4)], ids=str)
@every_momentum
@quiet_first_steps
def test_a_new_schedule_of_k_on_a_running_optimizer(norm: Norm, momentum: float) -> None:
    weights, opt = trained(norm, momentum)
    with torch.no_grad():
        for ball, (x,) in balls_of(opt):
            x.copy_(ball.lmo(gaussian((20, 24), 4)))  # a vertex is far outside of the balls of larger k
    before = [p.detach().clone() for p in weights]
    KSchedule(opt, 1.0, steps=10)
    assert_equal(weights, before)
    assert not any(opt.inside().values())
    go(weights, opt, range(2, 3))
    assert all_inside(opt)


def test_far_outside_warns_and_inside_is_silent() -> None:
    weights, opt = trained(Rows(KSupport(2)))
    grown(weights)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    message = r"2 constrained parameters .* were shrunk, (first|second)\.weight by a factor"
    with pytest.warns(UserWarning, match=message) as seen:
        go(weights, opt, range(2, 3))
    assert [w.filename for w in seen] == [__file__]  # it points at the call of step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        go(weights, opt, range(3, 5))


@every_norm
def test_rounding_is_not_taken_for_outside(norm: Norm) -> None:
    weights, opt = trained(norm)
    with torch.no_grad():
        for ball, (x,) in balls_of(opt):
            x.mul_((1 + 1e-10) * ball.radius / ball.norm(x))
    before = [p.detach().clone() for p in weights]
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for group in opt.param_groups:
        group["lr"] = 0.0
    go(weights, opt, range(2, 3))
    assert_equal(weights, before)


# --- asking and bringing ----------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("joint", [False, True])
@quiet_first_steps
def test_weights_changed_by_others_are_seen_and_brought_inside_when_asked(norm: Norm, joint: bool) -> None:
    weights, opt = trained(norm, joint=joint)
    assert opt.inside() == {"first.weight": True, "second.weight": True}
    assert opt.bring_inside() == {}
    model = nn.ParameterDict({"first": weights[0], "second": weights[1]})
    model.load_state_dict({"first": 1e4 * weights[0].detach(), "second": weights[1].detach()})
    assert opt.inside() == {"first.weight": False, "second.weight": not joint}
    expected = [[x.clone() for x in ball.scale_inside(tensors)] for ball, tensors in balls_of(opt)]
    shrunk = opt.bring_inside()
    assert set(shrunk) == ({"first.weight", "second.weight"} if joint else {"first.weight"})
    assert min(shrunk.values()) > 10
    assert_equal([x for tensors in expected for x in tensors], [p.detach() for p in weights[:2]])
    assert all(opt.inside().values())


def test_bringing_inside_warns_about_what_was_far_outside() -> None:
    weights, opt = trained(Lp(2))
    for by, far in ((1.5, False), (10.0, True)):
        with torch.no_grad():
            weights[0].mul_(by * 8 / weights[0].norm())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert opt.bring_inside() == {"first.weight": pytest.approx(by)}
        assert all(w.filename == __file__ for w in seen)
        assert [str(w.message).count("first.weight by a factor of 10") for w in seen] == [1] * far


@every_norm
def test_it_may_come_before_the_first_step(norm: Norm) -> None:
    weights, opt = trained(norm, steps=0)
    grown(weights)
    assert opt.inside() == {"first.weight": False, "second.weight": False}
    with pytest.warns(UserWarning, match="2 constrained"):
        assert set(opt.bring_inside()) == {"first.weight", "second.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(weights, opt, range(1))
    assert all_inside(opt)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_norm
def test_what_is_not_finite_is_not_inside(norm: Norm, value: float) -> None:
    weights, opt = trained(norm)
    with torch.no_grad():
        weights[1][3, 4] = value
    assert opt.inside() == {"first.weight": True, "second.weight": False}


@pytest.mark.parametrize("norm", [Spectral(KSparse(2)), Spectral(Lp(1)), Spectral(Lp(3.0))], ids=str)
def test_weights_that_are_not_finite_are_named(norm: Norm) -> None:
    weights, opt = trained(norm, steps=0)
    with torch.no_grad():
        weights[1][3, 4] = math.nan
    with pytest.raises(FloatingPointError, match=r"weights of second\.weight"):
        go(weights, opt, range(1))


def test_tensors_without_names_have_a_place() -> None:
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    opt = SFW([{"params": [q]}, {"params": [p, nn.Parameter(torch.ones(2))], "ball": NormBall(Lp(2), 2.0)}])
    assert opt.inside() == {"parameter 0 of group 1": False, "parameter 1 of group 1": True}
    assert SFW([q]).inside() == SFW([q]).bring_inside() == {}


# --- set_ball ---------------------------------------------------------------------------------------------------------


@every_norm
@every_momentum
def test_without_a_ball_a_group_takes_the_steps_of_sgd(norm: Norm, momentum: float) -> None:
    weights, opt = trained(norm, momentum)
    opt.set_ball(opt.param_groups[0], None)
    twins = [nn.Parameter(p.detach().clone()) for p in weights]
    sgd = torch.optim.SGD(twins, lr=0.01, momentum=momentum)
    for p, q in zip(twins, weights, strict=True):
        if momentum:
            sgd.state[p]["momentum_buffer"] = opt.state[q]["momentum_buffer"].clone()
    go(weights, opt, range(2, 5))
    go(twins, sgd, range(2, 5))  # type: ignore[arg-type]
    for p, q in zip(weights, twins, strict=True):
        torch.testing.assert_close(p, q)
    assert opt.inside() == {}
    assert opt.gap() == 0
    again = trained(norm, momentum, steps=0)[1]
    again.set_ball(again.param_groups[0], None)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(set(state) <= {"momentum_buffer"} for state in opt.state.values())


def test_a_ball_may_be_given_as_plain_data() -> None:
    weights, opt = trained(Lp(2))
    opt.set_ball(opt.param_groups[0], NormBall(Rows(KSupport(2)), 1e-3).to_spec())
    assert all_inside(opt)
    assert len(weights) == 3


WRONG: dict[str, tuple[Any, str]] = {
    "fits no tensor": (NormBall(Rows(KSupport(30)), 1.0), "k <= 20"),
    "no ball": ("l2", "must be a NormBall"),
    "no spec": ({"norm": "Lp"}, "spec"),
}


@pytest.mark.parametrize(("ball", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_ball_changes_nothing(ball: Any, message: str) -> None:
    weights, opt = trained(Rows(KSupport(2)))
    before, kept = [p.detach().clone() for p in weights], copy.deepcopy(opt.param_groups[0]["ball"])
    with pytest.raises(ValueError, match=message):
        opt.set_ball(opt.param_groups[0], ball)
    assert_equal(weights, before)
    assert opt.param_groups[0]["ball"] == kept


def test_the_group_of_before_a_load_is_refused() -> None:
    _, opt = trained(Lp(2))
    stale = opt.param_groups[0]
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(ValueError, match="take it from param_groups"):
        opt.set_ball(stale, None)
