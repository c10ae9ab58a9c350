import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import RESCALES, SFW, Rescale

BALLS = [
    NormBall(Lp(2), 1.5),
    NormBall(Lp(math.inf), 0.3),
    NormBall(KSparse(5), 0.5),
    NormBall(KSupport(5), 1.0),
    NormBall(Rows(KSupport(2)), 1.0),
    NormBall(Rows(Lp(1)), 2.0),
    NormBall(Spectral(KSupport(2)), 1.0),
    NormBall(Spectral(Lp(1)), 2.0),
    NormBall(Spectral(Lp(math.inf)), 0.7),
    NormBall(Blocks(KSupport(2), 4), 1.0),
]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=str)
every_rescale = pytest.mark.parametrize("rescale", RESCALES)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.1)


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def descend(opt: torch.optim.Optimizer, p: Tensor, target: Tensor, steps: int) -> Iterator[int]:
    """Minimise ½‖p − target‖²."""
    for step in range(steps):
        p.grad = p.detach() - target
        opt.step()
        yield step


def group(p: Tensor, ball: NormBall | None, **options: Any) -> list[dict[str, Any]]:
    return [{"params": [p], "ball": ball, **options}]


# --- the step ---------------------------------------------------------------------------------------------------------


@every_ball
@every_rescale
def test_weights_stay_in_the_ball(ball: NormBall, rescale: Rescale) -> None:
    p = parameter(24, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these balls are small on purpose
        opt = SFW(group(p, ball), lr=0.1, rescale=rescale)
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
            assert ball.norm(p) <= ball.radius * (1 + 1e-5)


@pytest.mark.parametrize("norm", [Lp(2), Lp(1), KSupport(3), Rows(KSupport(2)), Spectral(KSupport(2))], ids=str)
def test_finds_the_minimiser_over_the_ball(norm: Norm) -> None:
    # The minimiser of ½‖x − target‖² satisfies ⟨target − x, v − x⟩ <= 0 for all v in the ball: its gap is 0.
    target, ball = parameter(8, 6, dtype=torch.float64).detach() * 20, NormBall(norm, 1.0)
    p = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    opt = SFW(group(p, ball), lr=1.0, momentum=0.0, rescale=None)
    for step in range(2000):
        opt.param_groups[0]["lr"] = 2 / (step + 2)  # Jaggi's schedule
        p.grad = p.detach() - target
        opt.step()
    # Theorem 1 of Jaggi 2013: f(x_t) − f* <= 2LD²/(t + 2); the last gradient's gap bounds it from above.
    assert ball.gap(p.detach(), p.detach() - target) <= 27 / 4 * ball.diameter(p.shape) ** 2 / 2002


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.5}, {"momentum": 0.5, "dampening": 0.5}, {"maximize": True}]
)
def test_without_a_ball_it_is_sgd(options: dict[str, Any]) -> None:
    options = {"lr": 0.25, "momentum": 0.5, **options}
    mine, theirs = (nn.Parameter(integers(5, 3)) for _ in range(2))
    sfw, sgd = SFW([mine], **options), torch.optim.SGD([theirs], **options)
    for step in range(6):
        mine.grad, theirs.grad = integers(5, 3, seed=step), integers(5, 3, seed=step)
        sfw.step()
        sgd.step()
        assert torch.equal(mine, theirs)


def test_l2_ball_with_fast_gradient_is_sgd_with_decay() -> None:
    # Powers of two and a gradient of length 4 make every operation exact.
    p = nn.Parameter(torch.tensor([1.0, -1.0, 0.0, 2.0]))
    before, g, lr, radius = p.detach().clone(), torch.tensor([2.0, 2.0, -2.0, 2.0]), 0.5, 8.0
    p.grad = g
    SFW(group(p, NormBall(Lp(2), radius)), lr=lr, rescale="fast-gradient").step()
    assert torch.equal(p, (1 - lr * 4 / radius) * before - lr * g)


def test_infinity_ball_without_rescale_is_sign_sgd_with_decay() -> None:
    p, g = nn.Parameter(integers(4, 4)), integers(4, 4, seed=1)
    before = p.detach().clone()
    p.grad = g
    SFW(group(p, NormBall(Lp(math.inf), 4.0)), lr=0.25, rescale=None).step()
    assert torch.equal(p, 0.75 * before - 0.25 * 4 * g.sign())


def test_operator_norm_ball_without_rescale_is_muons_exact_step() -> None:
    permutation = torch.tensor([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]])
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = permutation @ torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    SFW(group(p, NormBall(Spectral(Lp(math.inf)), 1.0)), lr=0.5, rescale=None).step()
    torch.testing.assert_close(p.detach(), -0.5 * permutation)


def test_k_sparse_spectral_ball_without_rescale_is_numuons_step_with_decay() -> None:
    p, g, lr, radius = nn.Parameter(parameter(6, 5, dtype=torch.float64).detach()), integers(6, 5).double(), 0.1, 4.0
    before = p.detach().clone()
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    p.grad = g
    SFW(group(p, NormBall(Spectral(KSparse(2)), radius)), lr=lr / radius, rescale=None).step()
    torch.testing.assert_close(p.detach(), (1 - lr / radius) * before - lr * u[:, :2] @ vh[:2])


@every_ball
def test_gradient_rescale_gives_steps_of_the_length_of_sgd(ball: NormBall) -> None:
    p = nn.Parameter(torch.zeros(24, 40))
    p.grad = integers(24, 40)
    SFW(group(p, ball), lr=0.001, rescale="gradient").step()
    assert p.norm().item() == pytest.approx(0.001 * integers(24, 40).norm().item(), rel=1e-4)


@every_ball
@pytest.mark.parametrize(("rescale", "share"), [("diameter", 0.2), (None, 0.01)])
def test_fixed_rescales_move_a_fixed_share(ball: NormBall, rescale: Rescale, share: float) -> None:
    p = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    p.grad = integers(4, 8).double()
    vertex = ball.lmo(p.grad)
    SFW(group(p, ball), lr=share, rescale=rescale).step()
    eta = share / ball.diameter((4, 8)) if rescale == "diameter" else share
    torch.testing.assert_close(p.detach(), eta * vertex)


@every_ball
@every_rescale
def test_zero_gradient_or_zero_lr_changes_nothing(ball: NormBall, rescale: Rescale) -> None:
    start = ball.scale_inside(parameter(24, 40).detach())
    for lr, g in ((0.1, torch.zeros(24, 40)), (0.0, integers(24, 40))):
        p = nn.Parameter(start.clone())
        p.grad = g
        SFW(group(p, ball), lr=lr, rescale=rescale).step()
        assert torch.equal(p, start)


def test_gap_without_momentum_or_gradient_is_unknown() -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = SFW(group(p, NormBall(Lp(2), 1.0)), momentum=0.0)
    p.grad = torch.ones(3)
    opt.step()
    assert opt.gap() >= 0
    opt.zero_grad()
    assert opt.gap().isnan()


def test_copies_keep_their_options() -> None:
    opt = SFW([parameter(2)], check_finite=True)
    twin = pickle.loads(pickle.dumps(opt))
    twin.param_groups[0]["params"][0].grad = torch.full((2,), math.nan)
    with pytest.raises(FloatingPointError):
        twin.step()


def test_state_of_sgd_can_be_loaded() -> None:
    p, q = parameter(3), parameter(3)
    sgd, opt = torch.optim.SGD([p], lr=0.1, momentum=0.9), SFW([q], lr=0.5)
    p.grad = q.grad = torch.ones(3)
    sgd.step()
    opt.load_state_dict(sgd.state_dict())
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.1
    assert torch.equal(opt.state[q]["momentum_buffer"], torch.full((3,), 1.9))


def test_state_with_a_ball_that_does_not_fit_is_refused() -> None:
    large = SFW(group(parameter(9), NormBall(KSupport(9), 1.0)))
    small = SFW(group(parameter(3), NormBall(KSupport(2), 1.0)))
    with pytest.raises(ValueError, match="k <= 3"):
        small.load_state_dict(large.state_dict())
    other = SFW(group(parameter(9), NormBall(Lp(2), 1.0)))
    with pytest.raises(ValueError, match=r"one of a KSupport ball, but .* has a Lp ball: make the optimizer"):
        other.load_state_dict(large.state_dict())


def test_at_the_vertex_it_stays() -> None:
    ball, g = NormBall(KSupport(2), 1.0), torch.tensor([4.0, 3.0, 0.0])
    p = nn.Parameter(ball.lmo(g))
    p.grad = g
    before = p.detach().clone()
    SFW(group(p, ball), lr=0.1).step()
    assert torch.equal(p, before)


@every_rescale
@pytest.mark.parametrize("norm", [Lp(1), Lp(math.inf), KSparse(2), KSupport(2), Rows(KSupport(1))], ids=str)
def test_nan_gradients_are_not_hidden(norm: Norm, rescale: Rescale) -> None:
    p = nn.Parameter(torch.ones(3, 3) / 10)
    p.grad = torch.full((3, 3), math.nan)
    SFW(group(p, NormBall(norm, 1.0)), rescale=rescale, capturable=True).step()  # otherwise, on a CPU, it is refused
    assert p.isnan().any()


@every_ball
@pytest.mark.parametrize("exponent", [-100, 100])
def test_extreme_gradients(ball: NormBall, exponent: int) -> None:
    p = nn.Parameter(torch.zeros(24, 40))
    for _ in range(3):
        p.grad = integers(24, 40) * 2.0**exponent
    SFW(group(p, ball), lr=0.1).step()
    assert p.isfinite().all()
    assert ball.contains(p.detach() * (1 - 1e-5))


# --- several tensors --------------------------------------------------------------------------------------------------


def test_a_zero_first_gradient_does_not_freeze_the_spectral_basis() -> None:
    # The basis of a zero matrix is arbitrary; here it starts in columns that no later gradient has.
    ball, p = NormBall(Spectral(KSupport(3)), 1.0), nn.Parameter(torch.zeros(40, 40))
    opt = SFW(group(p, ball), momentum=0.0)
    p.grad = torch.zeros(40, 40)
    opt.step()
    g = integers(40, 40)
    g[:, :20] = 0
    for _ in range(20):
        p.grad = g
        opt.step()
    with torch.no_grad():
        p.zero_()
    opt.param_groups[0].update(lr=0.5, rescale=None)
    opt.step()  # half of the vertex
    assert torch.sum(-g * p.detach()) > 0.49 * ball.norm.dual(g)


def test_missing_gradients_do_not_shift_vertices() -> None:
    a, b, c = parameter(4, 4, seed=1), parameter(4, 4, seed=2), parameter(4, 4, seed=3)
    alone = nn.Parameter(c.detach().clone())
    opt = SFW([{"params": [a, b, c], "ball": NormBall(Rows(KSupport(1)), 1.0)}], lr=0.1)
    reference = SFW(group(alone, NormBall(Rows(KSupport(1)), 1.0)), lr=0.1)
    before = b.detach().clone()
    a.grad, c.grad, alone.grad = integers(4, 4, seed=1), integers(4, 4, seed=2), integers(4, 4, seed=2)
    opt.step()
    reference.step()
    assert torch.equal(b, before)
    assert b not in opt.state
    assert torch.equal(c, alone)


def test_joint_ball_has_one_k_for_all_tensors() -> None:
    a, b = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4, 2))
    a.grad, b.grad = torch.ones(3, 2), torch.ones(4, 2)
    b.grad[1] = 5
    ball = NormBall(Rows(KSupport(1)), 1.0)
    SFW([{"params": [a, b], "ball": ball, "joint": True}], lr=0.1).step()
    assert a.count_nonzero() == 0
    assert b.norm(dim=1).count_nonzero() == 1


def test_joint_ball_moves_as_a_whole_without_some_gradients() -> None:
    a, b = nn.Parameter(torch.full((3,), 0.2)), nn.Parameter(torch.full((3,), 0.2))
    ball = NormBall(Lp(1), 1.2)
    opt = SFW([{"params": [a, b], "ball": ball, "joint": True}], lr=0.5, rescale=None)
    a.grad = torch.tensor([1.0, 0, 0])
    opt.step()
    assert ball.contains([a.detach(), b.detach()])
    assert a.grad.tolist() == [1, 0, 0]
    a.grad = None
    before = a.detach().clone()
    opt.step()
    assert torch.equal(a, before)


def test_groups_with_and_without_ball_in_one_optimizer() -> None:
    w, b = parameter(4, 4), parameter(4)
    opt = SFW([{"params": [w], "ball": NormBall(Lp(2), 1.0)}, {"params": [b], "weight_decay": 0.1}], lr=0.1)
    w.grad, b.grad = integers(4, 4), integers(4)
    opt.step()
    assert opt.param_groups[0]["ball"] == {"norm": {"norm": "Lp", "p": 2}, "radius": 1.0}
    assert opt.param_groups[1]["ball"] is None


def test_parameters_may_come_later_be_frozen_or_tied() -> None:
    first, frozen = nn.Linear(4, 4), nn.Linear(4, 4)
    frozen.requires_grad_(False)
    tied = nn.Linear(4, 4)
    tied.weight = first.weight
    model = nn.Sequential(first, frozen, tied)
    opt = SFW([{"params": list(model.parameters()), "ball": NormBall(Lp(2), 5.0)}])
    late = nn.Linear(4, 4)
    opt.add_param_group({"params": late.parameters(), "ball": NormBall(Lp(2), 5.0)})
    before = copy.deepcopy(model.state_dict())
    late(model(torch.ones(2, 4))).sum().backward()
    opt.step()
    assert torch.equal(frozen.weight, before["1.weight"])
    assert not torch.equal(first.weight, before["0.weight"])
    assert first.weight is tied.weight
    assert late.weight in opt.state
    assert frozen.weight not in opt.state


def test_named_parameters() -> None:
    model = nn.MultiheadAttention(4, 2)
    opt = SFW(model.named_parameters(), check_finite=True)
    names = opt.param_groups[0]["param_names"]
    assert "in_proj_weight" in names
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.in_proj_weight.grad[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="in_proj_weight"):
        opt.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not opt.state


# --- the first step ---------------------------------------------------------------------------------------------------


def test_constructing_touches_nothing_and_the_first_step_scales_inside() -> None:
    p = nn.Parameter(torch.full((2, 2), 8.0))
    opt = SFW(group(p, NormBall(Lp(2), 4.0)), lr=0.0)
    assert (p == 8).all()
    p.grad = torch.ones(2, 2)
    with pytest.warns(UserWarning, match="factor of 4"):
        opt.step()
    assert torch.equal(p, torch.full((2, 2), 2.0))


def test_a_small_first_shrinkage_is_silent_and_happens_once() -> None:
    p = nn.Parameter(torch.full((2, 2), 1.0))
    opt = SFW(group(p, NormBall(Lp(2), 1.5)), lr=0.0)
    p.grad = torch.ones(2, 2)
    opt.step()
    assert p.norm().item() == pytest.approx(1.5)
    with torch.no_grad():
        p.mul_(10)
    opt.step()
    assert p.norm().item() == pytest.approx(15)  # the user's own doing is not undone in silence


# --- the gap ----------------------------------------------------------------------------------------------------------


@every_ball
def test_gap_is_a_certificate(ball: NormBall) -> None:
    p, target = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64)), integers(4, 8).double()
    opt = SFW(group(p, ball), lr=0.05, momentum=0.0)
    assert opt.gap() == 0
    gaps = []
    for _ in range(200):
        p.grad = p.detach() - target
        gaps.append(ball.gap(p.detach(), p.grad).item())
        opt.step()
    assert min(gaps) >= -1e-9
    assert min(gaps[-20:]) < 0.5 * gaps[0]


def test_gap_of_constant_gradients_does_not_depend_on_momentum() -> None:
    gaps = []
    for options in ({"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}):
        p = nn.Parameter(torch.zeros(4, 8))
        opt = SFW(group(p, NormBall(KSupport(3), 1.0)), lr=0.0, **options)
        for _ in range(300):  # until the momentum sum has settled
            p.grad = integers(4, 8)
            opt.step()
        gaps.append(opt.gap().item())
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"lr": math.nan},
        {"lr": torch.ones(2)},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"dampening": 1.5},
        {"rescale": "none"},
        {"weight_decay": -1},
        {"power_iterations": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SFW([parameter(3)], **options)


def test_weight_decay_on_a_ball_is_an_error() -> None:
    with pytest.raises(ValueError, match="regulariser"):
        SFW(group(parameter(3), NormBall(Lp(2), 1.0)), weight_decay=0.1)


def test_a_ball_that_does_not_fit_is_refused_when_the_group_is_added() -> None:
    with pytest.raises(ValueError, match="matrix"):
        SFW(group(parameter(3), NormBall(Spectral(Lp(1)), 1.0)))
    opt = SFW([parameter(3)])
    with pytest.raises(ValueError, match="k <= 3"):
        opt.add_param_group({"params": [parameter(3)], "ball": NormBall(KSupport(4), 1.0)})
    assert len(opt.param_groups) == 1


def test_sets_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(TypeError, match="order"):
        SFW([{"params": {parameter(3)}}])
    p = parameter(3, 3)
    p.grad = torch.eye(3).to_sparse()
    first = parameter(2)
    first.grad = torch.ones(2)
    before = first.detach().clone()
    with pytest.raises(ValueError, match="dense"):
        SFW([{"params": [first]}, *group(p, NormBall(Lp(2), 1.0))], check_finite=True).step()
    assert torch.equal(first, before)
    with pytest.raises(ValueError, match="must be a NormBall"):
        SFW([{"params": [first], "ball": "l2"}])


def test_scratch_is_what_is_kept_beside_the_state() -> None:
    large, small, free = parameter(6, 5, seed=1), parameter(3, 2, seed=2), parameter(40)
    groups = [*group(large, NormBall(Rows(KSupport(2)), 1.0)), *group(small, NormBall(Lp(2), 1.0)), *group(free, None)]
    opt = SFW(groups)
    assert opt.scratch == []
    for p in (large, small, free):
        p.grad = torch.ones_like(p)
    opt.step()
    assert sum(x.numel() for x in opt.scratch) == large.numel()
    assert all(x.data_ptr() != kept.data_ptr() for x in opt.scratch for s in opt.state.values() for kept in s.values())
