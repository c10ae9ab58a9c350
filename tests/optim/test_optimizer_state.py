"""The contract of an optimizer, continued: saving, loading, copying, hooks."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pliant.norms import KSupport, NormBall, Spectral
from pliant.optim import SFW
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
    optimizer,
    quiet_first_steps,
    run,
    some_cases,
    weights,
)

pytestmark = quiet_first_steps


# --- state ------------------------------------------------------------------------------------------------------------


@every_case
@devices
@pytest.mark.parametrize("way", ["state dict", "file", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_if_never_stopped(case: Case, device: str, way: str) -> None:
    parameters = weights(device=device)
    opt = optimizer(parameters, case)
    run(opt, parameters, range(3))
    twins = copies(parameters)
    match way:
        case "state dict":
            # As everywhere in torch, a state dict refers to the tensors in use: two optimizers must not share one.
            twin, saved = optimizer(twins, case), copy.deepcopy(opt.state_dict())
            kept = copy.deepcopy(saved)
            twin.load_state_dict(saved)
            assert_same_state(saved, kept)  # loading changes nothing in what it loads
        case "file":
            buffer = io.BytesIO()
            torch.save(opt.state_dict(), buffer)
            buffer.seek(0)
            twin = optimizer(twins, case)
            twin.load_state_dict(torch.load(buffer, weights_only=True))
        case "deepcopy":
            twin = copy.deepcopy(opt)
            twins = [p for group in twin.param_groups for p in group["params"]]
        case "pickle":
            twin = pickle.loads(pickle.dumps(opt))
            twins = [p for group in twin.param_groups for p in group["params"]]
    run(twin, twins, range(3, 5))
    if way != "file":
        # What the copy did has not reached the original.
        assert not any(torch.equal(p, q) for p, q in zip(parameters[:1], twins[:1], strict=True))
    run(opt, parameters, range(3, 5))
    assert_equal(parameters, twins)
    assert_same_state(opt.state_dict()["state"], twin.state_dict()["state"])


@some_cases
def test_half_precision_goes_on_after_loading_too(case: Case) -> None:
    # torch casts what it loads to the number format of the parameter; not all of the state is in that format. After 80
    # steps the singular directions have been measured, and their number of iterations adapted, twice.
    parameters = weights(torch.bfloat16)
    options = {**case.options, "power_iterations": None}
    opt = optimizer(parameters, Case(case.ball, options, case.joint))
    run(opt, parameters, range(10))
    twins = copies(parameters)
    twin = optimizer(twins, Case(case.ball, options, case.joint))
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same_state(opt.state_dict()["state"], twin.state_dict()["state"])
    run(opt, parameters, range(10, 80))
    run(twin, twins, range(10, 80))
    assert_equal(parameters, twins)


@every_case
def test_copies_have_all_public_attributes(case: Case) -> None:
    opt = optimizer(weights(), case, check_finite=True)
    public = {name for name in vars(opt) if not name.startswith("_")}
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert {name for name in vars(twin) if not name.startswith("_")} == public
        assert twin.defaults.items() >= opt.defaults.items()  # torch adds an option of its own


@some_cases
def test_a_state_without_the_newer_options_can_be_loaded(case: Case) -> None:
    parameters = weights()
    opt = optimizer(parameters, case)
    run(opt, parameters, range(2))
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for option in ("maximize", "foreach", "capturable", "check_finite", "power_iterations", "joint"):
            if not (case.joint and option == "joint"):
                del group[option]
    twins = copies(parameters)
    twin = optimizer(twins, case)
    twin.load_state_dict(saved)
    run(twin, twins, range(2, 4))
    run(opt, parameters, range(2, 4))
    assert_equal(parameters, twins)


@some_cases
@pytest.mark.parametrize(("named", "loads_named"), [(True, False), (False, True), (True, True)])
def test_states_with_and_without_names_fit_each_other(case: Case, named: bool, loads_named: bool) -> None:
    parameters = weights()
    twins = copies(parameters)
    opt = optimizer(list(zip(NAMES, parameters, strict=True)) if named else parameters, case)
    twin = optimizer(list(zip(NAMES, twins, strict=True)) if loads_named else twins, case)
    run(opt, parameters, range(2))
    for p, q in zip(parameters, twins, strict=True):
        q.data.copy_(p.data)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, parameters, range(2, 4))
    run(twin, twins, range(2, 4))
    assert_equal(parameters, twins)
    if loads_named:
        assert twin.param_groups[0]["param_names"] == NAMES[:3]


@some_cases
def test_a_loaded_state_takes_the_number_format_of_the_parameters(case: Case) -> None:
    single = weights(torch.float32)
    opt = optimizer(single, case)
    run(opt, single, range(2))
    double = [nn.Parameter(p.detach().double()) for p in single]
    twin = optimizer(double, case)
    twin.load_state_dict(opt.state_dict())
    for p in double:
        assert twin.state[p]["momentum_buffer"].dtype == torch.float64
    run(opt, single, range(2, 4))
    run(twin, double, range(2, 4))
    assert_close([p.double() for p in single], double, rtol=1e-4, atol=1e-4)


def test_a_state_of_other_groups_is_refused() -> None:
    parameters = weights()
    opt = optimizer(parameters, CASES["filters"])
    run(opt, parameters, range(2))
    for other in (SFW(weights()), optimizer(weights()[:3], CASES["filters"])):
        with pytest.raises(ValueError, match="parameter group"):
            other.load_state_dict(opt.state_dict())


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_step_hooks_run_before_and_after_and_can_be_removed() -> None:
    parameters = weights()
    opt = optimizer(parameters, CASES["filters"])
    seen: list[tuple[str, bool]] = []
    start = parameters[0].detach().clone()

    def note(name: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((name, torch.equal(parameters[0], start)))

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
        opt.register_step_pre_hook(note("before")),
        opt.register_step_post_hook(note("after")),
    ]
    try:
        run(opt, parameters, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen[:2]) == [("before", True), ("global before", True)]
    assert sorted(seen[2:]) == [("after", False), ("global after", False)]
    run(opt, parameters, range(1, 2))
    assert len(seen) == 4


def test_state_hooks_see_and_may_change_what_is_saved_and_loaded() -> None:
    parameters = weights()
    opt = optimizer(parameters, CASES["low rank"])
    run(opt, parameters, range(2))
    order: list[str] = []
    opt.register_state_dict_pre_hook(lambda opt: order.append("before saving"))
    opt.register_state_dict_post_hook(lambda opt, state: {**state, "note": "saved"})
    saved = opt.state_dict()
    assert order == ["before saving"]
    assert saved["note"] == "saved"

    def halve(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order.append("before loading")
        group_list = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": group_list}

    opt.register_load_state_dict_pre_hook(halve)
    opt.register_load_state_dict_pre_hook(lambda opt, state: order.append("first of all"), prepend=True)
    opt.register_load_state_dict_post_hook(lambda opt: order.append("after loading"))
    opt.load_state_dict(saved)
    assert order[1:] == ["first of all", "before loading", "after loading"]
    assert opt.param_groups[0]["lr"] == 0.025
    run(opt, parameters, range(2, 3))


def test_tensors_of_one_shape_may_keep_directions_of_another_k() -> None:
    # One of them has no gradient while k grows.
    ball = NormBall(Spectral(KSupport(4)), 3.0)
    a, b = (nn.Parameter(0.01 * torch.randn(40, 30)) for _ in range(2))
    opt = SFW([{"params": [a, b], "ball": ball}], lr=0.1, power_iterations=1)
    for members, k in (((a, b), 4), ((a,), 8), ((a, b), 8), ((a, b), 3)):
        opt.set_ball(opt.param_groups[0], NormBall(Spectral(KSupport(k)), 3.0))
        for p in (a, b):
            p.grad = torch.randn_like(p) if any(p is q for q in members) else None
        opt.step()
        for p in members:
            assert opt.state[p]["basis"].shape == (40, k)
