"""The contract that every optimizer of PyTorch keeps, asked of SFW with every kind of ball: steps, rates, groups.

PyTorch tests its own optimizers by one list of promises over a table of configurations; so do this file,
test_optimizer_state.py and test_optimizer_formats.py. What is special to Frank-Wolfe: test_sfw.py, test_convergence.py.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pliant.norms import KSupport, Lp, NormBall, Rows, Spectral
from pliant.optim import SFW
from tests.instances import gaussian
from tests.optimizer_cases import (
    CASES,
    NAMES,
    Case,
    assert_close,
    assert_equal,
    assert_same_state,
    copies,
    devices,
    every_case,
    give_gradients,
    groups,
    objective,
    optimizer,
    quiet_first_steps,
    run,
    separate_cases,
    some_cases,
    train,
    weights,
)

pytestmark = quiet_first_steps


# --- it optimizes -----------------------------------------------------------------------------------------------------


@every_case
@devices
@pytest.mark.parametrize("maximize", [False, True])
def test_goes_downhill_or_uphill_as_asked(case: Case, device: str, maximize: bool) -> None:
    parameters = weights(device=device)
    opt = optimizer(parameters, case, lr=0.02, maximize=maximize)

    def closure() -> float:
        opt.zero_grad()
        loss = objective(parameters)
        loss.backward()
        return loss.item()

    losses = [opt.step(closure) for _ in range(15)]
    assert (losses[-1] > losses[0]) if maximize else (losses[-1] < losses[0])


@every_case
def test_maximizing_is_minimizing_the_negative(case: Case) -> None:
    up, down = weights(), weights()
    ascent, descent = optimizer(up, case, maximize=True), optimizer(down, case)
    for step in range(4):
        give_gradients(up, step)
        give_gradients(down, step)
        for p in down:
            p.grad = -p.grad
        ascent.step()
        descent.step()
    assert_close(up, down, rtol=1e-12, atol=1e-14)  # a sum and a difference may round differently


@every_case
def test_two_runs_are_equal_and_the_random_state_is_not_touched(case: Case) -> None:
    torch.manual_seed(1)
    first, state = train(case), torch.get_rng_state()
    torch.manual_seed(2)
    assert_equal(train(case), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# --- learning rates ---------------------------------------------------------------------------------------------------


@every_case
@devices
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_as_a_tensor_is_the_same_as_a_number(case: Case, device: str, shape: tuple[int, ...]) -> None:
    with_number = weights(device=device)
    run(optimizer(with_number, case, lr=0.0625), with_number, range(4))
    for home in {device, "cpu"}:
        lr, with_tensor = torch.full(shape, 0.0625, device=home), weights(device=device)
        run(optimizer(with_tensor, case, lr=lr), with_tensor, range(4))
        assert_close(with_number, with_tensor)
        assert torch.equal(lr, torch.full(shape, 0.0625, device=home))


@some_cases
def test_a_scheduler_may_change_a_tensor_lr_in_place(case: Case) -> None:
    results = []
    for lr in (0.0625, torch.tensor(0.0625, dtype=torch.float64)):
        parameters = weights()
        opt = optimizer(parameters, case, lr=lr)
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        for step in range(4):
            run(opt, parameters, range(step, step + 1))
            scheduler.step()
        results.append(parameters)
    assert_close(*results)


SCHEDULERS: dict[str, Callable[[SFW], lr_scheduler.LRScheduler]] = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=5),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),  # also cycles the momentum
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
    "warm-up": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
}


@some_cases
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_is_the_same_as_setting_the_options_by_hand(
    case: Case, make: Callable[[SFW], lr_scheduler.LRScheduler]
) -> None:
    scheduled, by_hand = weights(), weights()
    opt = optimizer(scheduled, case)
    opt.param_groups[1]["lr"] = 0.2
    scheduler, other = make(opt), optimizer(by_hand, case)
    seen = set()
    for step in range(6):
        for group, target in zip(opt.param_groups, other.param_groups, strict=True):
            target.update(lr=group["lr"], momentum=group["momentum"])
        seen.add(opt.param_groups[0]["lr"])
        run(opt, scheduled, range(step, step + 1))
        run(other, by_hand, range(step, step + 1))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert_equal(scheduled, by_hand)
    assert len(seen) > 1


def test_each_group_has_its_own_options() -> None:
    ball = NormBall(Rows(KSupport(2)), 4.0)
    together, apart = weights(), weights()
    options = [{"lr": 0.01}, {"lr": 0.1, "momentum": 0.0}, {"rescale": None}, {"ball": None, "weight_decay": 0.1}]
    opt = SFW([{"params": [p], "ball": ball, **o} for p, o in zip(together, options, strict=True)], lr=0.05)
    run(opt, together, range(4))
    alone = [SFW([{"params": [p], "ball": ball, **o}], lr=0.05) for p, o in zip(apart, options, strict=True)]
    for step in range(4):
        give_gradients(apart, step)
        for other in alone:
            other.step()
    assert_equal(together, apart)


# --- gradients --------------------------------------------------------------------------------------------------------


@every_case
@devices
def test_a_step_keeps_the_gradients(case: Case, device: str) -> None:
    parameters = weights(device=device)
    opt = optimizer(parameters, case)
    for step in range(3):
        give_gradients(parameters, step)
        given = [p.grad for p in parameters]
        before = [g.clone() for g in given]
        opt.step()
        assert all(p.grad is g for p, g in zip(parameters, given, strict=True))
        assert_equal(given, before)


@every_case
def test_the_momentum_is_not_the_gradients_memory(case: Case) -> None:
    # The first step takes the gradient itself as momentum; writing to the gradient later must not reach it.
    kept, overwritten = weights(), weights()
    first, second = optimizer(kept, case), optimizer(overwritten, case)
    for step in range(3):
        run(first, kept, range(step, step + 1))
        run(second, overwritten, range(step, step + 1))
        second.zero_grad(set_to_none=False)
        for p in overwritten:
            assert p.grad is not None
            assert p.grad.count_nonzero() == 0
            p.grad.fill_(7)
    assert_equal(kept, overwritten)


@every_case
@pytest.mark.parametrize("requires_grad", [True, False])
def test_without_gradients_a_step_does_nothing(case: Case, requires_grad: bool) -> None:
    parameters = weights()
    opt = optimizer(parameters, case)
    for p in parameters:
        p.requires_grad_(requires_grad)
    before = copies(parameters)
    for _ in range(2):
        opt.step()
    opt.zero_grad()
    assert_equal(parameters, before)
    assert not opt.state


@every_case
def test_zero_gradients_move_nothing(case: Case) -> None:
    parameters = weights()
    opt = optimizer(parameters, case, weight_decay=0.0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    opt.step()  # may scale them into their balls
    before = copies(parameters)
    opt.step()
    assert_equal(parameters, before)
    assert not any(p.isnan().any() for p in parameters)


@every_case
def test_a_frozen_parameter_stays_while_the_others_move(case: Case) -> None:
    parameters, reference = weights(), weights()
    parameters[1].requires_grad_(False)
    opt, other = optimizer(parameters, case), optimizer(reference, case)
    before = parameters[1].detach().clone()
    for step in range(3):
        give_gradients(parameters, step)
        give_gradients(reference, step)
        parameters[1].grad = reference[1].grad = None
        opt.step()
        other.step()
    assert_equal(parameters, reference)
    assert case.joint or torch.equal(parameters[1], before)


@pytest.mark.parametrize("name", ["filters of all layers", "low rank of all layers"])
def test_in_a_joint_ball_a_missing_gradient_counts_as_zero(name: str) -> None:
    missing, zero = weights(), weights()
    opt, other = optimizer(missing, CASES[name]), optimizer(zero, CASES[name])
    for step in range(3):
        give_gradients(missing, step)
        give_gradients(zero, step)
        missing[1].grad, zero[1].grad = None, torch.zeros_like(zero[1])
        opt.step()
        other.step()
    assert missing[1].grad is None
    assert_equal(missing, zero)


@separate_cases
def test_a_parameter_whose_gradient_comes_late_starts_late(case: Case) -> None:
    parameters, alone = weights(), weights()
    opt = optimizer(parameters, case)
    for step in range(3):
        give_gradients(parameters, step)
        parameters[2].grad = None
        opt.step()
    assert parameters[2] not in opt.state
    run(opt, parameters, range(3, 5))
    run(optimizer(alone, case), alone, range(3, 5))
    assert_close(parameters[2:3], alone[2:3])


@every_case
def test_expanded_gradients_are_as_good_as_full_ones(case: Case) -> None:
    # The gradient of a sum over the rows is one row, expanded. All its entries come many times: which of them a vertex
    # has may depend on their order in memory, how good it is may not.
    parameters, reference = weights(), weights()
    opt, other = optimizer(parameters, case), optimizer(reference, case)
    for step in range(3):
        for p, q in zip(parameters, reference, strict=True):
            q.grad = gaussian(tuple(p.shape), step)
            p.grad = q.grad.expand(1, *p.shape)[0] if p.ndim == 1 else q.grad[:1].expand(p.shape)
            q.grad = p.grad.contiguous()
        before = [q.detach().clone() for q in reference]
        opt.step()
        other.step()
        for p, q, start in zip(parameters, reference, before, strict=True):
            assert q.grad is not None
            gain, expected = (torch.sum(q.grad * (x.detach() - start)).item() for x in (p, q))
            assert gain == pytest.approx(expected, rel=1e-9, abs=1e-12)
            p.data.copy_(q.data)


@some_cases
@pytest.mark.parametrize("wrap", [torch.no_grad, torch.enable_grad])
def test_a_step_leaves_no_graph(case: Case, wrap: Callable[[], Any]) -> None:
    parameters = weights()
    opt = optimizer(parameters, case)
    with wrap():
        run(opt, parameters, range(2))
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in parameters)
    buffers = [v for state in opt.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert not any(b.requires_grad for b in buffers)
    assert_equal(parameters, train(case, 2))


@some_cases
def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned(case: Case) -> None:
    parameters = weights()
    opt = optimizer(parameters, case)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = objective(parameters)
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert opt.step(closure) == pytest.approx(objective(weights()).item())
    assert calls == [True]
    assert opt.step() is None


@separate_cases
def test_one_optimizer_per_parameter_inside_the_backward_pass(case: Case) -> None:
    together, apart = weights(), weights()
    opt = optimizer(together, case)
    options = {"lr": 0.05, **case.options}
    of = {p: SFW([{"params": [p], "ball": None if p.ndim == 1 else case.ball}], **options) for p in apart}

    def step_and_free(p: Tensor) -> None:
        of[p].step()
        of[p].zero_grad()

    for p in apart:
        p.register_post_accumulate_grad_hook(step_and_free)
    for _ in range(3):
        opt.zero_grad()
        objective(together).backward()
        opt.step()
        objective(apart).backward()
    assert all(p.grad is None for p in apart)
    assert_close(together, apart)


# --- groups -----------------------------------------------------------------------------------------------------------


@every_case
def test_groups_may_be_added_between_steps(case: Case) -> None:
    parameters, reference = weights(), weights()
    first, late = groups(parameters, case)
    opt = SFW([first], **{"lr": 0.05, **case.options})
    other = optimizer(reference, case)
    for step in range(4):
        if step == 2:
            opt.add_param_group(late)
        give_gradients(parameters, step)
        give_gradients(reference, step)
        if step < 2:
            reference[3].grad = None
        opt.step()
        other.step()
    assert_equal(parameters, reference)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    parameters = weights()
    opt = optimizer(parameters[:3], CASES["filters"])
    count = len(opt.param_groups)
    bad = nn.Parameter(torch.ones(3, 3))
    for group in (
        {"params": [bad], "ball": NormBall(KSupport(10), 1.0)},
        {"params": [bad], "lr": -1.0},
        {"params": [bad], "ball": NormBall(Lp(2), 1.0), "weight_decay": 0.1},
        {"params": [parameters[0]]},
    ):
        with pytest.raises(ValueError, match=r"k <= 9|lr|regulariser|more than one"):
            opt.add_param_group(group)
        assert len(opt.param_groups) == count


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no iterable": (lambda: SFW(weights()[0]), TypeError, "iterable"),
    "empty": (lambda: SFW([]), ValueError, "empty parameter list"),
    "not a tensor": (lambda: SFW([3]), TypeError, "Tensor"),
    "not a leaf": (lambda: SFW([weights()[0] * 2]), ValueError, "non-leaf"),
    "two groups": (lambda: SFW([{"params": p} for p in [weights()[0]] * 2]), ValueError, "more than one"),
    "some names": (lambda: SFW([("w", weights()[0]), weights()[1]]), ValueError, "names"),
    "lr": (lambda: SFW(weights(), lr=torch.ones(2)), ValueError, "one element"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_optimizer_takes(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_same_parameter_twice_in_a_group_warns() -> None:
    p = weights()[0]
    with pytest.warns(UserWarning, match="duplicate"):
        SFW([p, p])


def test_it_can_be_printed() -> None:
    text = repr(optimizer(weights(), CASES["filters"]))
    assert text.startswith("SFW")
    assert "KSupport" in text
    assert "rescale" in text


# --- what it cannot take ----------------------------------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.grad.to_sparse(), "dense, real gradients.*second.weight"),
        (lambda p: torch.full_like(p, math.nan), "NaN or infinite gradient in second.weight"),
        (lambda p: torch.full_like(p, -math.inf), "NaN or infinite gradient in second.weight"),
    ],
    ids=["sparse", "nan", "infinite"],
)
def test_bad_gradients_are_named_and_nothing_changes(
    case: Case, spoil: Callable[[nn.Parameter], Tensor], message: str
) -> None:
    parameters = weights()
    opt = optimizer(list(zip(NAMES, parameters, strict=True)), case, check_finite=True)
    run(opt, parameters, range(2))
    before, state = copies(parameters), copy.deepcopy(opt.state_dict())
    give_gradients(parameters, 2)
    parameters[2].grad = spoil(parameters[2])
    with pytest.raises((ValueError, FloatingPointError), match=message):
        opt.step()
    assert_equal(parameters, before)
    assert_same_state(opt.state_dict(), state)


@pytest.mark.parametrize("ball", [None, NormBall(Lp(2), 1.0)], ids=["no ball", "ball"])
def test_complex_parameters_are_refused_by_name(ball: NormBall | None) -> None:
    real = nn.Parameter(torch.ones(2))
    spectrum = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    real.grad, spectrum.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"real.*complex64.*spectrum"):  # now or in the step, but before it
        SFW([{"params": [("gain", real), ("spectrum", spectrum)], "ball": ball}]).step()
    assert torch.equal(real, torch.ones(2))
    assert torch.equal(spectrum, torch.ones(2, dtype=torch.complex64))


def test_a_parameter_without_entries_is_no_obstacle_without_a_ball() -> None:
    empty, other = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2))
    opt = SFW([empty, other], lr=0.5)
    empty.grad, other.grad = torch.ones(0, 3), torch.ones(2)
    opt.step()
    assert torch.equal(other, torch.full((2,), 0.5))


@pytest.mark.parametrize("norm", [Lp(2), Rows(Lp(1)), Spectral(Lp(1))], ids=str)
def test_a_ball_around_nothing_is_refused_before_anything_changes(norm: Any) -> None:
    empty, other = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2, 2))
    other.grad, empty.grad = torch.ones(2, 2), torch.ones(0, 3)
    with pytest.raises(ValueError, match="empty"):
        SFW([{"params": [other, empty], "ball": NormBall(norm, 1.0)}]).step()
    assert torch.equal(other, torch.ones(2, 2))
