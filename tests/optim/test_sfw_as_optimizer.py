"""SFW as an optimizer of torch: states, schedulers, devices, batches of tensors, kept directions."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pliant import linalg
from pliant.norms import Blocks, KSupport, Lp, NormBall, Spectral
from pliant.optim import SFW, Rescale, kept_directions, local, vertices
from tests.optim.test_sfw import descend, every_ball, every_rescale, group, integers, parameter


@every_ball
def test_save_load_continue_equals_never_stopped(ball: NormBall) -> None:
    def fresh(start: Tensor) -> tuple[nn.Parameter, SFW]:
        p = nn.Parameter(start.clone())
        return p, SFW([{"params": [p], "ball": ball}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=0.05)

    start, target = ball.scale_inside(parameter(24, 40).detach()), integers(24, 40)
    p, opt = fresh(start)
    for _ in descend(opt, p, target, 4):
        pass
    buffer = io.BytesIO()
    torch.save({"p": p.detach(), "opt": opt.state_dict()}, buffer)
    for _ in descend(opt, p, target, 4):
        pass
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    q, again = fresh(saved["p"])
    again.load_state_dict(saved["opt"])
    for _ in descend(again, q, target, 4):
        pass
    assert torch.equal(p, q)


def test_basis_of_a_bfloat16_parameter_keeps_its_precision() -> None:
    p = nn.Parameter(parameter(40, 40).detach().bfloat16())
    opt = SFW(group(p, NormBall(Spectral(KSupport(3)), 1.0)))
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    basis = opt.state[p]["basis"]
    assert basis.dtype == torch.float32
    q = nn.Parameter(p.detach().clone())
    again = SFW(group(q, NormBall(Spectral(KSupport(3)), 1.0)))
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state[q]["basis"], basis)


def test_state_dict_is_plain_data() -> None:
    opt = SFW(group(parameter(4, 8), NormBall(Blocks(KSupport(2), 4), 1.0)))

    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(plain(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(plain(v) for v in value)
        return value is None or isinstance(value, str | int | float | Tensor)

    assert plain(opt.state_dict())


def test_lr_schedulers_tensor_lr_closures_and_copies() -> None:
    p = parameter(6, 6)
    ball = NormBall(Lp(2), 2.0)
    opt = SFW(group(p, ball), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)

    def closure() -> float:
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(10):
        losses.append(opt.step(closure))
        scheduler.step()
    assert losses[-1] < losses[0]
    assert opt.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    twin = copy.deepcopy(opt)
    assert twin.param_groups[0]["ball"] == opt.param_groups[0]["ball"]
    with_number, with_tensor = parameter(6, 6), parameter(6, 6)
    for q, lr in ((with_number, 0.1), (with_tensor, torch.tensor(0.1))):
        q.grad = integers(6, 6)
        SFW([{"params": [q], "ball": ball}], lr=lr).step()
    torch.testing.assert_close(with_number, with_tensor)


@every_ball
@every_rescale
def test_step_needs_no_value_of_a_tensor(ball: NormBall, rescale: Rescale) -> None:
    # Fake tensors have no values: asking for one, as waiting for a device would, raises.
    with FakeTensorMode():
        first, second, q = (nn.Parameter(torch.empty(shape)) for shape in [(24, 40), (24, 40), (3,)])
        parameters = {"params": [first, second], "ball": ball, "rescale": rescale, "capturable": True}
        opt = SFW([parameters, {"params": [q]}], lr=0.01)
        for _ in range(10):
            for p in (first, second, q):
                p.grad = torch.empty_like(p)
            opt.step()
            opt.gap()


@every_ball
@pytest.mark.parametrize("exponent", [0, 120])
def test_without_a_look_at_values_the_step_is_the_same(
    ball: NormBall, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for readable in (linalg.readable, lambda x: False):
        for module in (local, vertices, linalg):
            monkeypatch.setattr(module, "readable", readable)
        ps = [nn.Parameter(ball.scale_inside(parameter(24, 40, seed=i).detach())) for i in range(3)]
        opt = SFW([{"params": ps, "ball": ball}], lr=0.05)
        for step in range(5):
            for i, p in enumerate(ps):
                p.grad = integers(24, 40, seed=10 * step + i) * 2.0**exponent  # rich in ties
            opt.step()
        results.append(torch.stack([p.detach() for p in ps]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@every_ball
def test_many_tensors_at_a_time_are_the_same_as_one_by_one(ball: NormBall) -> None:
    results = []
    for foreach in (True, False):
        ps = [nn.Parameter(ball.scale_inside(parameter(24, 40, seed=i).detach())) for i in range(3)]
        free = [parameter(3), parameter(4, 4)]
        opt = SFW([{"params": ps, "ball": ball}, {"params": free, "weight_decay": 0.1}], lr=0.05, foreach=foreach)
        for step in range(6):
            for i, p in enumerate([*ps, *free]):
                p.grad = parameter(*p.shape, seed=10 * step + i).detach()
            opt.step()
        results.append([p.detach() for p in [*ps, *free]])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_power_iterations_follow_the_measured_quality() -> None:
    ball, p = NormBall(Spectral(KSupport(4)), 1.0), nn.Parameter(torch.zeros(64, 96))
    opt = SFW(group(p, ball), lr=0.01, momentum=0.0)

    def walk(steps: int, new: bool) -> None:
        for step in range(steps):
            if new or step == 0:
                p.grad = parameter(64, 96, seed=opt.state[p].get("steps", 0)).detach()
            opt.step()

    walk(9, new=True)
    assert (
        opt.state[p]["quality"] < kept_directions.ENOUGH
    )  # unrelated gradients: the directions of the last one do not help
    assert opt.state[p].get("iterations", 1) == 1
    walk(64, new=True)
    assert opt.state[p]["iterations"] == 2
    walk(128, new=False)
    assert opt.state[p]["quality"] > kept_directions.PLENTY
    walk(64, new=False)
    assert opt.state[p]["iterations"] == 1


@pytest.mark.parametrize("options", [{"power_iterations": 2}, {"capturable": True}])
def test_fixed_power_iterations_are_not_measured(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(40, 40))
    opt = SFW(group(p, NormBall(Spectral(KSupport(3)), 1.0)), **options)
    for step in range(12):
        p.grad = parameter(40, 40, seed=step).detach()
        opt.step()
    assert set(opt.state[p]) == {"momentum_buffer", "basis"}


def test_step_runs_on_meta_tensors() -> None:
    p = nn.Parameter(torch.empty(40, 40, device="meta"))
    opt = SFW(group(p, NormBall(Spectral(KSupport(3)), 1.0)))
    for _ in range(2):
        p.grad = torch.empty_like(p)
        opt.step()
    assert opt.state[p]["basis"].shape == (40, 3)
