"""The contract of an optimizer, continued: memory layouts, number formats, and the faster ways to take a step."""

import copy
import math
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pliant.norms import Lp, NormBall
from pliant.optim import SFW
from tests.instances import LAYOUTS, gaussian
from tests.optimizer_cases import (
    CASES,
    SHAPES,
    Case,
    assert_close,
    assert_equal,
    assert_same_state,
    copies,
    devices,
    every_case,
    exact_cases,
    give_gradients,
    objective,
    optimizer,
    quiet_first_steps,
    run,
    some_cases,
    weights,
)

pytestmark = quiet_first_steps


# --- memory layouts and number formats --------------------------------------------------------------------------------


@exact_cases
@devices
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("foreach", [False, True])
def test_memory_layout_does_not_matter(
    case: Case, device: str, layout: Callable[[Tensor], Tensor], foreach: bool
) -> None:
    plain = weights(device=device)
    parameters = [nn.Parameter(layout(p.detach().clone())) for p in plain]
    strides = [p.stride() for p in parameters]
    run(optimizer(plain, case, foreach=foreach), plain, range(4))
    opt = optimizer(parameters, case, foreach=foreach)
    for step in range(4):
        give_gradients(parameters, step)
        if step != 1:  # the first gradient gives the momentum its layout
            for p in parameters:
                p.grad = layout(p.grad)
        opt.step()
    assert_close(parameters, plain, rtol=1e-10, atol=1e-12)  # sums may come in another order
    assert [p.stride() for p in parameters] == strides


@exact_cases
@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_number_formats_follow_double(case: Case, device: str, dtype: torch.dtype) -> None:
    parameters = weights(dtype, device)
    double = [nn.Parameter(p.detach().double()) for p in parameters]
    opt = optimizer(parameters, case)
    reference = optimizer(double, case)
    give_gradients(parameters, 0)
    for p, q in zip(parameters, double, strict=True):
        q.grad = p.grad.double()
    opt.step()
    reference.step()
    rounding = torch.finfo(dtype).eps
    for p, q in zip(parameters, double, strict=True):
        assert (p.double() - q).abs().max() <= 2 * rounding * q.abs().max()
    for p in parameters:
        assert p.dtype == dtype
        buffer = opt.state[p].get("momentum_buffer")
        assert (buffer is None) if case.options.get("momentum") == 0 else (buffer.dtype == dtype)
    run(opt, parameters, range(1, 4))
    assert all(p.isfinite().all() for p in parameters)


@some_cases
@pytest.mark.parametrize("foreach", [False, True])
def test_one_optimizer_holds_several_number_formats(case: Case, foreach: bool) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32]
    mixed = [nn.Parameter(p.detach().to(d)) for p, d in zip(weights(), dtypes, strict=True)]
    if case.joint:
        mixed[0] = nn.Parameter(mixed[0].detach().float())
    apart = copies(mixed)
    run(optimizer(mixed, case, foreach=foreach), mixed, range(3))
    assert [p.dtype for p in mixed[1:]] == dtypes[1:]
    if not case.joint:
        for p in apart:
            other = SFW([{"params": [p], "ball": None if p.ndim == 1 else case.ball}], lr=0.05, foreach=foreach)
            for step in range(3):
                give_gradients(apart, step)
                other.step()
        for p, q in zip(mixed, apart, strict=True):
            assert (p - q).abs().max() <= 2 * torch.finfo(p.dtype).eps * q.abs().max()


@every_case
def test_a_model_on_the_meta_device_takes_steps(case: Case) -> None:
    # Meta tensors have no values: a step that asked for one would fail.
    parameters = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    opt = optimizer(parameters, case, capturable=True)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.empty_like(p)
        opt.step()
    assert set(opt.state) == set(parameters)
    for p in parameters:
        buffer = opt.state[p].get("momentum_buffer")
        assert buffer is None or (buffer.is_meta and buffer.shape == p.shape)


# --- faster ways ------------------------------------------------------------------------------------------------------


@every_case
@devices
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
def test_foreach_equals_one_by_one(case: Case, device: str, lr: float | Tensor) -> None:
    results = []
    for foreach in (False, True, None):
        parameters = weights(device=device)
        run(optimizer(parameters, case, lr=lr, foreach=foreach), parameters, range(6))
        results.append(parameters)
    for other in results[1:]:
        # Measured: equal but for the last bits of sums and of singular vectors.
        assert_close(results[0], other, rtol=1e-10, atol=1e-12)


@every_case
@devices
def test_capturable_equals_plain(case: Case, device: str) -> None:
    options = {"power_iterations": 1}  # measuring the quality of vertices looks at values: not when capturable
    plain, captured = weights(device=device), weights(device=device)
    run(optimizer(plain, case, **options), plain, range(6))
    run(optimizer(captured, case, capturable=True, **options), captured, range(6))
    assert_close(plain, captured, rtol=1e-12, atol=1e-14)


def test_capturable_is_silent_about_far_weights() -> None:
    p = nn.Parameter(torch.full((3,), 100.0))
    opt = SFW([{"params": [p], "ball": NormBall(Lp(2), 1.0)}], capturable=True)
    p.grad = torch.ones(3)
    opt.step()  # warnings are errors here
    assert p.norm() <= 1 + 1e-6


def a_group_of_each_kind(*names: str) -> tuple[list[nn.Parameter], SFW]:
    kinds = [CASES[name] for name in names]
    parameters = [nn.Parameter(0.1 * gaussian((20, 24), i, torch.float32)) for i in range(len(kinds))]
    pairs = zip(parameters, kinds, strict=True)
    return parameters, SFW([{"params": [p], "ball": kind.ball, **kind.options} for p, kind in pairs], lr=0.05)


def compiled_equals_plain(backend: str, *names: str, **tolerances: float) -> None:
    torch._dynamo.reset()
    (plain, opt), (compiled, other) = a_group_of_each_kind(*names), a_group_of_each_kind(*names)
    run(opt, plain, range(4))
    step = torch.compile(other.step, backend=backend)
    for i in range(4):
        give_gradients(compiled, i)
        step()
    assert_close(plain, compiled, **tolerances)


def test_a_compiled_step_equals_the_plain_one() -> None:
    compiled_equals_plain("eager", "no ball", "entries", "filters", "2:4", "low rank", rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*_prims_common.check.*:FutureWarning")
def test_a_step_compiled_to_machine_code_equals_the_plain_one() -> None:
    # Each group is compiled by itself, for many seconds.
    compiled_equals_plain("inductor", "no ball", "filters", "low rank", rtol=1e-4, atol=1e-6)


# --- loss scaling -----------------------------------------------------------------------------------------------------


@some_cases
def test_scaled_losses_give_the_same_steps(case: Case) -> None:
    plain, scaled = weights(torch.float32), weights(torch.float32)
    opt, other = optimizer(plain, case), optimizer(scaled, case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        opt.zero_grad()
        objective(plain).backward()
        opt.step()
        other.zero_grad()
        scaler.scale(objective(scaled)).backward()
        scaler.step(other)
        scaler.update()
    assert_equal(plain, scaled)  # a power of two is exact


@some_cases
def test_overflowing_gradients_skip_the_step_and_halve_the_scale(case: Case) -> None:
    parameters = weights(torch.float32)
    opt = optimizer(parameters, case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(objective(parameters)).backward()
    scaler.step(opt)
    scaler.update()
    before, state = copies(parameters), copy.deepcopy(opt.state_dict())
    opt.zero_grad()
    scaler.scale(objective(parameters)).backward()
    assert parameters[1].grad is not None
    parameters[1].grad[0, 0, 0, 0] = math.inf
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512
    assert_equal(parameters, before)
    assert_same_state(opt.state_dict(), state)
