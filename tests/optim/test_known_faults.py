"""Mistakes that are easy to make here. Each one is written out, small and wrong, and shown to disagree with the truth
at an input where the project's own function agrees with it: a test that does not fail on the mistake proves nothing.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pliant import FilterPruning, Magnitude, NormBall, compress, constrain, filters, l2
from pliant.constraints import resolve_k
from pliant.norms import KSupport, Lp, Rows, Spectral
from pliant.optim import SFW
from tests.instances import gaussian

# Mistakes that tests of other files catch:
#
#   radii kept by shape: a BatchNorm's shift gets that of its scale     test_constraints: test_radii_are_kept_by_...
#   measuring radii re-initialises the model or moves the random state  test_constraints: test_neither_weights_nor_...
#   parameters not called weight or bias get no ball, silently          test_constraints: test_every_parameter_is_...
#   ties between entries, in blocks, between singular values            test_invariance: test_with_ties_and_zeros_...
#   factorised convolutions forget dilation, groups, padding mode       test_rank: test_factored_convolution_is_the_...
#   a low ratio adds parameters                                         test_rank: test_shipped_networks_shrink_to_...
#   filters are masked and called removed                               test_filters: test_small_network_equals_...
#   a zeroed filter counts as removed though BatchNorm shifts it        test_filters: the same, with the masked twin
#   the device is waited for, once for each tensor                      test_sfw: test_step_needs_no_value_of_a_tensor


# --- norms and oracles ------------------------------------------------------------------------------------------------


def k_support_norm_whose_loop_ends_too_early(x: Tensor, k: int) -> Tensor:
    """Search the split of the k-support norm by a loop over range(k − 1): the flattest split is never tried."""
    z = x.abs().flatten().sort(descending=True).values
    for r in range(k - 1):
        tail = z[k - r - 1 :].sum() / (r + 1)
        if z[k - r - 2] > tail >= z[k - r - 1]:
            return torch.sqrt(z[: k - r - 1].square().sum() + (r + 1) * tail.square())
    return z.norm()


@pytest.mark.parametrize(
    ("k", "x"), [(1, [3.0, -2.0, 1.0]), (2, [1.0, 1.0, 1.0, 1.0]), (3, [1.0, -1.0, 1.0, 1.0, 1.0])]
)
def test_k_support_norm_at_k_1_and_of_flat_vectors(k: int, x: list[float]) -> None:
    x_, flat = torch.tensor(x, dtype=torch.float64), torch.tensor(x).abs().sum().item()
    # The truth: for k = 1, and for entries of one size, the norm is ‖x‖₁/√k.
    assert KSupport(k)(x_).item() == pytest.approx(flat / math.sqrt(k))
    assert k_support_norm_whose_loop_ends_too_early(x_, k).item() < 0.9 * flat / math.sqrt(k)
    steep = torch.tensor([9.0, 3.0, 1.0, 0.5, 0.25], dtype=torch.float64)  # elsewhere the mistake does not show
    torch.testing.assert_close(k_support_norm_whose_loop_ends_too_early(steep, 3), KSupport(3)(steep))


def p_diameter_from_the_diagonal(p: float, n: int) -> float:
    """Take the diagonal of the ball as its longest line: right for p >= 2 only."""
    return 2 * n ** (0.5 - 1 / p)


@pytest.mark.parametrize("p", [1.0, 1.2, 1.5, 1.9])
def test_diameter_of_p_balls_below_2(p: float) -> None:
    # The truth: e and −e lie in the ball, 2 apart.
    e = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    assert Lp(p)(e) == Lp(p)(-e) == 1
    assert Lp(p).diameter((8,)) == pytest.approx((e + e).norm().item())
    assert p_diameter_from_the_diagonal(p, 8) < 1.9
    assert p_diameter_from_the_diagonal(4.0, 8) == pytest.approx(Lp(4).diameter((8,)))


def filter_oracle_by_threshold(g: Tensor, k: int) -> Tensor:
    """Keep the filters whose norm is at least the k-th largest: with ties these are more than k."""
    norms = g.flatten(1).norm(dim=1)
    kept = g * (norms >= norms.topk(k).values[-1]).view(-1, *[1] * (g.ndim - 1))
    return -kept / kept.norm()


def test_ties_between_filters_keep_k_of_them() -> None:
    g = torch.ones(6, 2, 3, 3, dtype=torch.float64)
    norm, wrong = Rows(KSupport(2)), filter_oracle_by_threshold(g, 2)
    v = norm.lmo(g)
    assert v.flatten(1).any(dim=1).sum() == 2
    assert wrong.flatten(1).any(dim=1).sum() == 6
    # The truth, without the norm's own formula: in the hull of L2 unit vectors with 2 filters, ⟨y, ·⟩ is at most the
    # length of the two longest filters of y. The mistake is √3 times too far out along its own direction.
    reach = math.sqrt(2) * wrong[0].norm().item()
    assert torch.sum(wrong * wrong).item() == pytest.approx(math.sqrt(3) * reach)
    assert -torch.sum(v * wrong).item() >= -reach
    generic = gaussian((6, 2, 3, 3))  # without ties the mistake does not show
    torch.testing.assert_close(filter_oracle_by_threshold(generic, 2), norm.lmo(generic))


def spectral_oracle_that_divides(g: Tensor, k: int) -> Tensor:
    """Normalise the leading singular values by their length, whatever it is."""
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return -(u[:, :k] * (s[:k] / s[:k].norm())) @ vh[:k]


@pytest.mark.parametrize("shape", [(5, 4), (40, 30)], ids=["small", "large"])
def test_zero_gradients_of_spectral_balls_move_nothing(shape: tuple[int, int]) -> None:
    norm, zero = Spectral(KSupport(2)), torch.zeros(shape, dtype=torch.float64)
    assert torch.equal(norm.lmo(zero), zero)
    assert spectral_oracle_that_divides(zero, 2).isnan().all()
    g = gaussian(shape)
    torch.testing.assert_close(spectral_oracle_that_divides(g, 2), norm.lmo(g))
    p = nn.Parameter(0.01 * gaussian(shape, 1))
    opt = SFW([{"params": [p], "ball": NormBall(norm, 30.0)}])
    before = p.detach().clone()
    for _ in range(2):
        p.grad = zero
        opt.step()
    assert torch.equal(p, before)


# --- the step ---------------------------------------------------------------------------------------------------------


def step_that_pairs_by_position(parameters: list[nn.Parameter], ball: NormBall, eta: float) -> None:
    """Collect the gradients that exist, then pair their vertices with all parameters."""
    vertices = [ball.lmo(p.grad) for p in parameters if p.grad is not None]
    with torch.no_grad():
        for p, v in zip(parameters, vertices, strict=False):
            p.lerp_(v, eta)


def three_layers_the_second_without_gradient() -> list[nn.Parameter]:
    layers = [nn.Parameter(0.1 * gaussian((4, 4), seed)) for seed in range(3)]
    layers[0].grad, layers[2].grad = gaussian((4, 4), 3), gaussian((4, 4), 5)
    return layers


def test_a_layer_without_gradient_does_not_shift_the_vertices_of_the_next() -> None:
    ball, eta = NormBall(Rows(KSupport(1)), 2.0), 0.25
    start = three_layers_the_second_without_gradient()
    expected = [start[0].lerp(ball.lmo(start[0].grad), eta), start[1], start[2].lerp(ball.lmo(start[2].grad), eta)]  # type: ignore[arg-type]
    ours, wrong = three_layers_the_second_without_gradient(), three_layers_the_second_without_gradient()
    SFW([{"params": ours, "ball": ball}], lr=eta, momentum=0.0, rescale=None).step()
    step_that_pairs_by_position(wrong, ball, eta)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
    assert not torch.equal(wrong[1], expected[1])
    assert torch.equal(wrong[2], start[2])


def parameters_by_the_end_of_their_name(model: nn.Module) -> list[nn.Parameter]:
    """Train what is called weight or bias."""
    return [p for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))]


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return self.gain * y


def test_every_parameter_moves_whatever_its_name() -> None:
    torch.manual_seed(0)
    model = WithAttention()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = SFW(constrain(model, [("*weight", filters(k=0.5))], default=l2()), lr=0.1)
    model(torch.randn(2, 3, 8)).square().sum().backward()
    opt.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.grad.any())  # type: ignore[union-attr]
    forgotten = set(model.parameters()) - set(parameters_by_the_end_of_their_name(model))
    assert len(forgotten) == 3  # in_proj_weight, in_proj_bias and gain


class Decompositions(TorchDispatchMode):
    """Count decompositions of matrices with more than ``size`` rows and columns, and all QR decompositions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.counts = size, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if any(part in name for part in ("svd", "eig", "linalg_qr")):
            kind = "qr" if "qr" in name else "full"
            if kind == "qr" or min(args[0].shape[-2:]) > self.size:
                self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


def step_with_a_full_decomposition(p: nn.Parameter, ball: NormBall, eta: float) -> None:
    """Ask the exact oracle in every step."""
    with torch.no_grad():
        p.lerp_(ball.lmo(p.grad), eta)  # type: ignore[arg-type]


def step_from_a_random_start(p: nn.Parameter, ball: NormBall, eta: float) -> None:
    """Find the singular directions by 20 iterations from random ones, in every step."""
    with torch.no_grad():
        basis = torch.randn(p.shape[1], 4, dtype=p.dtype)
        for _ in range(20):
            basis = torch.linalg.qr(p.grad.T @ (p.grad @ basis)).Q  # type: ignore[union-attr]
        image = p.grad @ basis  # type: ignore[operator]
        p.lerp_(-ball.radius * image @ basis.T / image.norm(), eta)


def test_a_step_on_a_large_layer_takes_no_full_decomposition_and_no_new_start() -> None:
    ball, p = NormBall(Spectral(KSupport(4)), 5.0), nn.Parameter(0.01 * gaussian((96, 128)))
    opt = SFW([{"params": [p], "ball": ball}], power_iterations=1)
    state = torch.get_rng_state()

    def ours(p: nn.Parameter, ball: NormBall, eta: float) -> None:
        opt.step()

    counts = {}
    steps: list[Callable[[nn.Parameter, NormBall, float], None]] = [
        ours,
        step_with_a_full_decomposition,
        step_from_a_random_start,
    ]
    for step in steps:
        p.grad = gaussian((96, 128), 1)
        step(p, ball, 0.1)  # the first step may do more
        p.grad = p.grad + 0.1 * gaussian((96, 128), 2)
        with Decompositions(size=32) as seen:
            step(p, ball, 0.1)
        counts[step.__name__] = seen.counts
        if step is ours:
            assert torch.equal(torch.get_rng_state(), state)
    assert counts["ours"]["full"] == 0
    assert counts["ours"]["qr"] <= 4
    assert counts["step_with_a_full_decomposition"]["full"] == 1
    assert counts["step_from_a_random_start"]["qr"] == 20


# --- counting ---------------------------------------------------------------------------------------------------------


def kept_by_truncation(ratio: float, n: int) -> int:
    """Keep int((1 − ratio)·n) of n: 0.2·10 is 1.9999999999999996 in floating point."""
    return int((1 - ratio) * n)


@pytest.mark.parametrize(("ratio", "n", "kept"), [(0.8, 10, 2), (0.9, 10, 1), (0.8, 20, 4), (0.9, 40, 4)])
def test_what_is_kept_is_rounded_not_truncated(ratio: float, n: int, kept: int) -> None:
    assert kept_by_truncation(ratio, n) == kept - 1
    assert resolve_k(1 - ratio, n) == kept
    layer = nn.Linear(n, 1, bias=False)
    assert compress(layer, Magnitude(ratio), torch.ones(1, n)).weight.count_nonzero() == kept
    model = nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, 2))
    assert compress(model, FilterPruning(ratio), torch.ones(1, 3))[0].out_features == kept
