"""What Frank-Wolfe promises: the primal bound at every step, the gap above the primal error, and feasible weights.

The quadratics f(x) = ½⟨x − b, H(x − b)⟩ are made so that their minimiser over the ball is known without any oracle:
x* is a point on the sphere, y the gradient of the norm there, which has ⟨x*, y⟩ = radius and dual norm 1. With
b = x* + c·H⁻¹y the gradient at x* is −c·y, and by Hölder's inequality no point of the ball is better than x*.
"""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pliant import constrain, filters, l2, rank, semi_structured, weights
from pliant.constraints import Preset
from pliant.norms import Blocks, KSparse, KSupport, Lp, NormBall, Rows, Spectral
from pliant.optim import RESCALES, SFW, Rescale
from tests.instances import Shape, gaussian

BALLS = [
    NormBall(Lp(1), 1.0),
    NormBall(Lp(1.5), 1.0),
    NormBall(Lp(2), 1.0),
    NormBall(Lp(3), 1.0),
    NormBall(Lp(math.inf), 0.3),
    NormBall(KSparse(5), 0.5),
    NormBall(KSupport(5), 1.0),
    NormBall(Rows(Lp(1)), 2.0),
    NormBall(Rows(KSparse(2)), 2.0),
    NormBall(Rows(KSupport(2)), 1.0),
    NormBall(Spectral(Lp(1)), 1.0),
    NormBall(Spectral(Lp(math.inf)), 0.7),
    NormBall(Spectral(KSparse(2)), 1.0),
    NormBall(Spectral(KSupport(2)), 1.0),
    NormBall(Blocks(KSparse(2), 4), 1.0),
    NormBall(Blocks(KSupport(2), 4), 1.0),
]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=str)


# --- a convex problem whose answer is known ---------------------------------------------------------------------------


@dataclass
class Quadratic:
    """f(x) = ½⟨x − b, H(x − b)⟩ with its minimiser over a ball; ``smoothness`` is L, the largest eigenvalue of H."""

    hessian: Tensor
    centre: Tensor
    minimiser: Tensor
    smoothness: float

    def value(self, x: Tensor) -> float:
        return 0.5 * torch.sum((x - self.centre) * self.gradient(x)).item()

    def gradient(self, x: Tensor) -> Tensor:
        return (self.hessian @ (x - self.centre).flatten()).reshape(x.shape)


def quadratic_over(ball: NormBall, shape: Shape, *, pull: float = 2.0) -> Quadratic:
    x = gaussian(shape, 1).requires_grad_()
    (y,) = torch.autograd.grad(ball.norm(x), x)
    minimiser = x.detach() * (ball.radius / ball.norm(x).item())
    n = math.prod(shape)
    vectors, eigenvalues = torch.linalg.qr(gaussian((n, n), 2)).Q, torch.logspace(-1, 0.5, n, dtype=torch.float64)
    hessian = vectors * eigenvalues @ vectors.T
    centre = minimiser + pull * torch.linalg.solve(hessian, y.flatten()).reshape(shape)
    return Quadratic(hessian, centre, minimiser, eigenvalues.max().item())


WITHOUT_PROJECTION = (Lp(1.5), Lp(3), Blocks(KSparse(2), 4))


@pytest.mark.parametrize("ball", [ball for ball in BALLS if ball.norm not in WITHOUT_PROJECTION], ids=str)
def test_the_minimisers_are_those_of_projected_gradients(ball: NormBall) -> None:
    problem = quadratic_over(ball, (4, 8))
    # The fixed point of a projected gradient step, found without any oracle, is the minimiser.
    step = problem.minimiser - problem.gradient(problem.minimiser) / problem.smoothness
    torch.testing.assert_close(ball.project(step), problem.minimiser, rtol=0, atol=1e-12)


@every_ball
def test_primal_error_keeps_jaggis_bound_and_the_gap_stays_above_it_at_every_step(ball: NormBall) -> None:
    # Jaggi 2013, theorem 1: f(x_t) − f* <= 2LD²/(t + 2) with steps 2/(t + 2); theorem 2: of the gaps up to t, one is
    # below 27/4·LD²/(t + 2).
    problem = quadratic_over(ball, (4, 8))
    bound = problem.smoothness * ball.diameter((4, 8)) ** 2
    best = problem.value(problem.minimiser)
    p = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    opt = SFW([{"params": [p], "ball": ball}], momentum=0.0, rescale=None)
    gaps: list[float] = []
    for t in range(200):
        x = p.detach()
        p.grad = problem.gradient(x)
        error = problem.value(x) - best
        gaps.append(ball.gap(x, p.grad).item())
        assert error >= -1e-12  # no point of the ball is better than the minimiser
        assert gaps[-1] >= error
        if t >= 1:
            assert error <= 2 * bound / (t + 2)
            assert opt.gap().item() == pytest.approx(gaps[-1])  # the optimizer reports this certificate
        if t >= 2:
            assert min(gaps[1:]) <= 27 / 4 * bound / (t + 2)
        opt.param_groups[0]["lr"] = 2 / (t + 2)
        opt.step()


ONE_OF_EACH_LIFT = [ball for ball in BALLS if isinstance(getattr(ball.norm, "inner", ball.norm), KSupport)]


@pytest.mark.parametrize("ball", ONE_OF_EACH_LIFT, ids=str)
@pytest.mark.parametrize("rescale", RESCALES)
def test_every_rescale_with_momentum_comes_near_the_minimum(ball: NormBall, rescale: Rescale) -> None:
    problem = quadratic_over(ball, (4, 8))
    p = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    lr = 0.05 * ball.diameter((4, 8)) if rescale == "diameter" else 0.05
    opt = SFW([{"params": [p], "ball": ball}], lr=lr, momentum=0.9, dampening=0.9, rescale=rescale)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.01, total_iters=200)
    first = problem.value(p.detach())
    for _ in range(200):
        p.grad = problem.gradient(p.detach())
        opt.step()
        scheduler.step()
    best = problem.value(problem.minimiser)
    assert problem.value(p.detach()) - best <= 0.05 * (first - best)


# --- feasible for ever ------------------------------------------------------------------------------------------------


def excess(ball: NormBall, p: Tensor) -> float:
    """Return by how many units of rounding of p's dtype the norm is above the radius."""
    return (ball.norm(p.detach().double()).item() / ball.radius - 1) / torch.finfo(p.dtype).eps


def wander(ball: NormBall, dtype: torch.dtype, rates: list[float], steps: int) -> float:
    """Take steps along random gradients of all sizes, all rescales in turn; return the largest excess seen."""
    p = nn.Parameter(gaussian((24, 40), 1, dtype))
    opt = SFW([{"params": [p], "ball": ball}])
    generator = torch.Generator().manual_seed(2)
    drift, worst = gaussian((24, 40), 3, torch.float32), -math.inf
    turns = [(lr, rescale) for lr in rates for rescale in RESCALES]
    for turn, (lr, rescale) in enumerate(turns):
        opt.param_groups[0].update(lr=lr, rescale=rescale)
        for step in range(steps // len(turns)):
            size = 10 ** (3 * math.sin(step))
            noise = torch.randn(24, 40, generator=generator)
            p.grad = ((noise + drift * (turn % 3)) * size).to(dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the first step shrinks these weights a lot, on purpose
                opt.step()
            if step % 4 == 0:
                worst = max(worst, excess(ball, p))
    return worst


@pytest.mark.slow
@every_ball
def test_thousands_of_steps_in_single_precision_stay_in_the_ball(ball: NormBall) -> None:
    # Measured: 13 units under Spectral(Lp(inf)), 8 under Lp(1.5), 4 elsewhere. All of it is the rounding of norms: it
    # does not grow with the number of steps, because each step shrinks the errors of the earlier ones with the weight.
    assert wander(ball, torch.float32, [1.0, 0.1, 0.01, 0.001], 2000) <= 16


@pytest.mark.slow
@every_ball
def test_a_thousand_large_steps_in_bfloat16_stay_in_the_ball(ball: NormBall) -> None:
    # NormBall.contains allows 4 units. Measured: 2 under Spectral, 1 elsewhere.
    assert wander(ball, torch.bfloat16, [1.0, 0.1], 1000) <= 4


@every_ball
def test_small_steps_in_bfloat16_stay_in_the_ball(ball: NormBall) -> None:
    # The shrinkage by a small η rounds away, the vertex does not: without a remedy, norms reach 2.6 radii.
    assert wander(ball, torch.bfloat16, [0.003], 600) <= 4


# --- a network --------------------------------------------------------------------------------------------------------

PRESETS = {"filters": filters(k=0.5), "rank": rank(k=0.5), "weights": weights(k=0.2), "2:4": semi_structured(2, 4)}


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.from_numpy(data.images[:512]).float()[:, None] / 16
    return images, torch.from_numpy(data.target[:512])


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize(
    ("rescale", "lr"), [("gradient", 0.05), ("fast-gradient", 0.05), ("diameter", 0.5), (None, 0.01)]
)
def test_a_network_learns_from_batches_and_stays_feasible(preset: Preset, rescale: Rescale, lr: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    opt = SFW(constrain(model, [("0.weight", l2()), ("*.weight", preset)], default=l2()), lr=lr, rescale=rescale)
    images, labels = digits()
    losses = []
    for epoch in range(6):
        for batch in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
            for group in opt.param_groups:
                ball = NormBall.from_spec(group["ball"])
                assert all(excess(ball, p) <= 16 for p in group["params"])
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
