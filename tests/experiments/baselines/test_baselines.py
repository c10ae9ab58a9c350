"""The methods that pliant is compared with, each on a problem whose answer is known."""

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant import SFW, KSparse, Lp, NormBall, Spectral
from pliant.errors import BadInput
from pliant.experiments import baselines
from pliant.experiments.baselines import (
    CAT,
    GLT,
    NUC,
    Q3R,
    SSL,
    TRP,
    CrAM,
    MatrixSGD,
    Muon,
    NuMuon,
    Scion,
    SpectralDecay,
)
from pliant.experiments.baselines import matrices as mat
from pliant.experiments.baselines.numuon import k_of_step
from pliant.experiments.baselines.trp import needed


def parameter(*shape: int) -> nn.Parameter:
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    return p


def of_singular_values(values: list[float], rows: int, columns: int) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(n, len(values))).Q for n in (rows, columns))
    return (u * torch.tensor(values)) @ v.mT


def group(p: Tensor, row_dim: int = 0, blocks: int = 1, **options: Any) -> dict[str, Any]:
    return {"params": [p], "row_dim": row_dim, "blocks": blocks, **options}


def stepped(method: Callable[..., MatrixSGD], p: nn.Parameter, **options: Any) -> Tensor:
    """Return what one step of a method, lr 0.1 and no momentum, makes of a copy of p."""
    copied = nn.Parameter(p.detach().clone())
    copied.grad = None if p.grad is None else p.grad.clone()
    method([group(copied)], lr=0.1, momentum=0.0, **options).step()
    return copied.detach()


# --- what all of them share -------------------------------------------------------------------------------------------


ALL = [SSL, GLT, NUC, CAT, TRP, SpectralDecay, Q3R, Muon, NuMuon, Scion]
REGULARISERS = [SSL, GLT, NUC, CAT, SpectralDecay, Q3R]


@pytest.mark.parametrize("method", REGULARISERS)
def test_without_strength_a_regulariser_is_sgd(method: type[MatrixSGD]) -> None:
    weight, bias = parameter(4, 3, 2, 2), parameter(4)
    other = [nn.Parameter(p.detach().clone()) for p in (weight, bias)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    ours = method([group(weight), {"params": [bias]}], strength=0.0, **options)
    sgd = torch.optim.SGD(other, **options)
    for _ in range(3):
        for a, b in zip((weight, bias), other, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        sgd.step()
    torch.testing.assert_close([weight, bias], other)


@pytest.mark.parametrize("method", ALL)
def test_only_matrices_are_treated_and_grouped_ones_block_by_block(method: type[MatrixSGD]) -> None:
    options = {"lr": 0.1, "momentum": 0.5, **({"every": 1} if "every" in method.options else {})}
    grouped, rest = parameter(6, 2, 3, 3), parameter(4, 3)
    halves = [nn.Parameter(half.detach().clone()) for half in grouped.chunk(2)]
    plain = nn.Parameter(rest.detach().clone())
    together = method([group(grouped, blocks=2), {"params": [rest]}], **options)
    apart = method([group(half) for half in halves], **options)
    sgd = torch.optim.SGD([plain], lr=0.1, momentum=0.5)
    for _ in range(2):
        grouped.grad, rest.grad = torch.randn_like(grouped), torch.randn_like(rest)
        plain.grad = rest.grad.clone()
        for half, g in zip(halves, grouped.grad.chunk(2), strict=True):
            half.grad = g.clone()
        for optimizer in (together, apart, sgd):
            optimizer.step()
    torch.testing.assert_close(grouped.detach(), torch.cat([half.detach() for half in halves]))
    assert torch.equal(rest, plain)


@pytest.mark.parametrize("method", ALL)
def test_saved_loaded_and_continued_equals_never_stopped(method: type[MatrixSGD]) -> None:
    p = parameter(5, 4)
    gradients = torch.randn(6, 5, 4)

    def go(p: nn.Parameter, optimizer: MatrixSGD, steps: range) -> None:
        for step in steps:
            p.grad = gradients[step].clone()
            optimizer.step()

    make = {"lr": 0.1, "momentum": 0.9, **({"every": 2} if "every" in method.options else {})}
    whole = method([group(p)], **make)
    go(p, whole, range(3))
    q = nn.Parameter(p.detach().clone())
    resumed = method([group(q)], **make)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    go(p, whole, range(3, 6))
    go(q, resumed, range(3, 6))
    assert torch.equal(p, q)


def test_a_step_with_nan_is_refused_by_name_and_changes_nothing() -> None:
    p, q = parameter(3, 2), parameter(2)
    assert q.grad is not None
    q.grad[1] = math.nan
    optimizer = GLT([{"params": [("fc.weight", p)], "row_dim": 0}, {"params": [("fc.bias", q)]}], lr=0.1)
    before = p.detach().clone(), q.detach().clone()
    with pytest.raises(FloatingPointError, match=r"gradient in fc\.bias;"):
        optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_options_of_another_method_are_errors() -> None:
    with pytest.raises(TypeError, match="GLT has no option energy"):
        GLT([group(parameter(2, 2))], lr=0.1, energy=0.1)


def test_parameters_without_gradients_are_left_alone() -> None:
    p = parameter(3, 2)
    p.grad = None
    before = p.detach().clone()
    CAT([group(p)], lr=0.1).step()
    assert torch.equal(p, before)


# --- filters ----------------------------------------------------------------------------------------------------------


def test_ssl_adds_the_gradient_of_the_group_lasso() -> None:
    p = parameter(4, 3, 2, 2)
    p.grad = torch.zeros_like(p)
    penalty = 0.3 * p.flatten(1).norm(dim=1).sum()
    (expected,) = torch.autograd.grad(penalty, p)
    torch.testing.assert_close(stepped(SSL, p, strength=0.3), p.detach() - 0.1 * expected)


def test_ssl_leaves_a_zero_filter_where_it_is() -> None:
    p = parameter(3, 4)
    p.data[1] = 0
    p.grad = torch.zeros_like(p)
    moved = stepped(SSL, p)
    assert torch.equal(moved[1], torch.zeros(4))
    assert (moved[0] != p[0]).all()


def test_glt_takes_the_proximal_step_of_the_group_lasso() -> None:
    p = parameter(8, 3, 2, 2)
    p.data[:4] *= 0.2  # some below the threshold, some above
    p.grad = torch.zeros_like(p)
    threshold = 0.1 * 4.0 * math.sqrt(12)
    w, x = p.detach().flatten(1), stepped(GLT, p, strength=4.0).flatten(1)
    gone = w.norm(dim=1) <= threshold
    assert 0 < gone.sum() < 8
    assert torch.equal(x[gone], torch.zeros_like(x[gone]))
    # x minimises ½‖x − w‖² + t·‖x‖ where it is not 0 exactly if w − x = t·x/‖x‖.
    residual = threshold * x[~gone] / x[~gone].norm(dim=1, keepdim=True)
    torch.testing.assert_close((w - x)[~gone], residual)


# --- rank -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (6, 4)])
def test_nuc_adds_the_gradient_of_the_nuclear_norm(shape: tuple[int, ...]) -> None:
    p = parameter(*shape)
    p.grad = torch.zeros_like(p)
    (expected,) = torch.autograd.grad(0.3 * torch.linalg.svdvals(p.flatten(1)).sum(), p)
    torch.testing.assert_close(stepped(NUC, p, strength=0.3), p.detach() - 0.1 * expected)


def test_cat_soft_thresholds_singular_values() -> None:
    p = nn.Parameter(of_singular_values([2.0, 0.9, 0.4, 0.1], 4, 12).view(4, 3, 2, 2))
    p.grad = torch.zeros_like(p)
    u, s, vh = torch.linalg.svd(p.detach().flatten(1), full_matrices=False)
    expected = u @ torch.diag((s - 0.5).clamp_min(0)) @ vh
    moved = stepped(CAT, p, strength=5.0)
    torch.testing.assert_close(moved.flatten(1), expected)
    torch.testing.assert_close(torch.linalg.svdvals(moved.flatten(1)), torch.tensor([1.5, 0.4, 0.0, 0.0]))


def test_trp_truncates_every_so_many_steps() -> None:
    p = nn.Parameter(of_singular_values([3.0, 2.0, 0.3, 0.2], 6, 5))
    optimizer = TRP([group(p)], lr=0.1, momentum=0.0, energy=0.02, every=3, strength=0.5)
    ranks = []
    for _ in range(6):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        ranks.append(int(torch.linalg.matrix_rank(p.detach())))
    assert ranks == [4, 4, 2, 2, 2, 2]
    # Twice 0.1·0.5 off each singular value that stayed.
    torch.testing.assert_close(torch.linalg.svdvals(p.detach())[:2], torch.tensor([2.9, 1.9]))


@pytest.mark.parametrize("energy", [0.0, 0.001, 0.02, 0.3, 0.9])
def test_trp_keeps_the_least_rank_that_loses_no_more_energy(energy: float) -> None:
    s = torch.linalg.svdvals(torch.randn(2, 9, 7))
    for values, kept in zip(s.square(), needed(s, energy), strict=True):
        r = int(kept.sum())
        assert torch.equal(kept, torch.arange(7) < r)
        assert values[r:].sum() <= energy * values.sum() < values[r - 1 :].sum()


def test_spectral_decay_lowers_all_singular_values_alike() -> None:
    p = nn.Parameter(of_singular_values([2.0, 1.0, 0.5], 5, 3))
    p.grad = torch.zeros_like(p)
    moved = stepped(SpectralDecay, p, strength=0.4)
    # 0.04 less each, times the error of the polar factor, at most 7e-4.
    expected = torch.tensor([1.96, 0.96, 0.46])
    torch.testing.assert_close(torch.linalg.svdvals(moved), expected, rtol=0, atol=3e-5)


def q3r_surrogate(w: Tensor, epsilon: Tensor) -> Tensor:
    """Return Σ f(σ) with f(σ) = ε²·(ln(σ/ε) + ½) above ε and σ²/2 below."""
    s = torch.linalg.svdvals(w)
    return torch.where(s > epsilon, epsilon**2 * (torch.log(s / epsilon) + 0.5), s**2 / 2).sum()


def test_q3r_has_the_gradient_of_the_smoothed_log_determinant_where_it_is_refreshed() -> None:
    p = parameter(5, 7)
    p.grad = torch.zeros_like(p)
    epsilon = torch.linalg.svdvals(p.detach())[2]
    (expected,) = torch.autograd.grad(q3r_surrogate(p, epsilon), p)
    torch.testing.assert_close(stepped(Q3R, p, k=2, strength=0.3), p.detach() - 0.1 * 0.3 * expected)


def test_q3r_majorises_the_smoothed_log_determinant() -> None:
    w0 = torch.randn(5, 7)
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    pull = 1 - (s[2] / s).clamp_max(1)

    def quadratic(w: Tensor) -> Tensor:
        image = baselines.q3r.reweighted(w[None], u[None], vh.mT[None], pull[None])[0]
        return (w * image).sum() / 2

    for _ in range(20):
        w = w0 + 0.5 * torch.randn(5, 7)
        assert quadratic(w) - quadratic(w0) >= q3r_surrogate(w, s[2]) - q3r_surrogate(w0, s[2])


def test_q3r_refreshes_every_so_many_steps_and_never_raises_epsilon() -> None:
    p = parameter(4, 6)
    optimizer = Q3R([group(p)], lr=0.1, momentum=0.0, k=1, every=2, strength=0.0)
    seen = []
    for step in range(6):
        # The second singular value falls, and in the end rises again.
        p.data = of_singular_values([3.0, [1.0, 0.9, 0.8, 0.7, 2.0, 2.0][step], 0.1, 0.1], 4, 6)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        seen.append(optimizer.state[p]["epsilon"].item())
    assert seen == pytest.approx([1.0, 1.0, 0.8, 0.8, 0.8, 0.8])


# --- directions -------------------------------------------------------------------------------------------------------


def test_muon_steps_as_torchs_muon() -> None:
    p = nn.Parameter(torch.randn(24, 40, dtype=torch.float32))
    q = nn.Parameter(p.detach().clone())
    ours = Muon([group(p)], lr=0.02, momentum=0.95, strength=0.1)
    theirs = torch.optim.Muon([q], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        before = q.detach().clone()
        ours.step()
        theirs.step()
        # torch iterates in bfloat16; the measured distance is 0.6 % of the step.
        distance = (p - q).detach().norm() / (q - before).detach().norm()
        assert distance < 0.015
        p.data.copy_(q)


def test_muon_treats_a_convolution_as_its_matrix_whatever_its_memory_format() -> None:
    w, gradients = torch.randn(6, 4, 3, 3), torch.randn(2, 6, 4, 3, 3)
    results = []
    for p in (w.clone(), w.clone(memory_format=torch.channels_last), w.flatten(1).clone()):
        p = nn.Parameter(p)
        optimizer = Muon([group(p)], lr=0.1)
        for g in gradients:
            p.grad = g.reshape(p.shape).clone(memory_format=torch.preserve_format)
            optimizer.step()
        results.append(p.detach().reshape(w.shape))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def beside_sfw(method: MatrixSGD, p: Tensor, ball: NormBall, lr: float) -> None:
    """Assert that a method takes the same three steps as SFW without rescaling."""
    q = nn.Parameter(p.detach().clone())
    sfw = SFW([{"params": [q], "ball": ball}], lr=lr, momentum=0.9, rescale=None)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        method.step()
        sfw.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_numuon_is_sfw_on_a_k_sparse_spectral_ball(k: int) -> None:
    p = nn.Parameter(1e-3 * torch.randn(7, 5))
    ball = NormBall(Spectral(KSparse(k)), radius=0.2 * math.sqrt(7) / 0.5)
    beside_sfw(NuMuon([group(p)], lr=0.04, momentum=0.9, k=k, strength=0.5), p, ball, lr=0.02)


def test_scion_is_sfw_on_an_operator_norm_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(1e-3 * torch.randn(3, 12))
    scion = Scion([group(p)], lr=0.02, momentum=0.9, radius=8.0)
    monkeypatch.setattr("pliant.experiments.baselines.scion.polar", lambda m, converging: mat.polar_by_svd(m))
    beside_sfw(scion, p, NormBall(Spectral(Lp(math.inf)), radius=8.0 * math.sqrt(3 / 12)), lr=0.02)


def test_scion_stays_in_its_ball_up_to_the_error_of_the_iteration() -> None:
    p = nn.Parameter(torch.zeros(4, 9))
    scion = Scion([group(p)], lr=0.3, momentum=0.5, radius=6.0)
    for _ in range(20):
        p.grad = torch.randn_like(p)
        scion.step()
        assert torch.linalg.matrix_norm(p.detach(), 2) <= 1.21 * 6.0 * math.sqrt(4 / 9)


def test_k_falls_from_start_to_end_and_goes_on_after_loading() -> None:
    annealed = {"k": 2, "k_start": 8, "k_steps": 4}
    p, q, r = (parameter(8, 9) for _ in range(3))
    optimizer = NuMuon([group(p, **annealed), {"params": [parameter(3)]}], lr=0.1)
    assert [k_of_step(optimizer.param_groups[0], done) for done in range(6)] == [8, 7, 5, 4, 2, 2]  # halves go up
    q.data.copy_(p)
    r.data.copy_(p)
    by_hand = NuMuon([group(q)], lr=0.1)
    loaded = NuMuon([group(r, **annealed), {"params": [parameter(3)]}], lr=0.1)
    for step, k in enumerate([8, 7, 5, 4, 2, 2]):
        p.grad = torch.randn_like(p)
        q.grad, r.grad = p.grad.clone(), p.grad.clone()
        by_hand.param_groups[0]["k"] = k
        optimizer.step()
        by_hand.step()
        assert torch.equal(p, q)
        if step < 2:
            r.data.copy_(p)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            loaded.step()
            assert torch.equal(p, r)


def test_steps_can_be_skipped_to_a_later_k() -> None:
    p, q = parameter(8, 9), parameter(8, 9)
    q.data.copy_(p)
    skipping = NuMuon([group(p, k=2, k_start=8, k_steps=4)], lr=0.1)
    later = NuMuon([group(q)], lr=0.1)
    for k in (8, 4):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        later.param_groups[0]["k"] = k
        skipping.step()
        later.step()
        skipping.skip(2)  # 7 and 5
    assert torch.equal(p, q)


# --- CrAM -------------------------------------------------------------------------------------------------------------


def truncated(w: Tensor, k: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k], lambda g: u[:, :k] @ u[:, :k].mT @ g


def rows_kept(w: Tensor, k: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    mask = torch.zeros(len(w), 1)
    mask[w.norm(dim=1).topk(k).indices] = 1
    return w * mask, lambda g: g * mask


def entries_kept(w: Tensor, k: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    mask = (w.abs() >= w.abs().flatten().topk(k).values[-1]).to(w.dtype)
    return w * mask, lambda g: g * mask


@pytest.mark.parametrize(
    ("part", "compress", "kept"), [("weights", entries_kept, 10), ("filters", rows_kept, 2), ("rank", truncated, 2)]
)
def test_crams_gradient_on_a_quadratic(
    part: str, compress: Callable[..., Any], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pliant.experiments.baselines.cram.SHARES", (0.5,))
    curvature, target, offset = torch.rand(4, 5) + 0.5, torch.randn(4, 5), torch.randn(4)
    w, b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4))
    w0, b0, rho, lr = w.detach().clone(), b.detach().clone(), 0.3, 0.1

    def backward() -> float:  # of ½Σ c·(w − t)² + ½‖b − o‖²
        w.grad, b.grad = (curvature * (w - target)).detach(), (b - offset).detach()
        return 7.0

    backward()
    optimizer = CrAM([group(w), {"params": [b]}], lr=lr, momentum=0.0, strength=rho, part=part)
    assert optimizer.step(backward) == 7.0
    clean = curvature * (w0 - target)
    compressed, keep = compress(w0 + rho * clean, kept)
    torch.testing.assert_close(w.detach(), w0 - lr * (clean + keep(curvature * (compressed - target))))
    # What is not a matrix is perturbed, not compressed: here ∇(b + ρ∇) = (1 + ρ)·∇.
    torch.testing.assert_close(b.detach(), b0 - lr * (2 + rho) * (b0 - offset))


def test_cram_needs_a_second_pass() -> None:
    with pytest.raises(TypeError, match="needs a closure"):
        CrAM([group(parameter(3, 2))], lr=0.1).step()


def test_cram_draws_every_share_from_torchs_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter(10, 2)
    optimizer = CrAM([group(p)], lr=0.0, part="filters")
    seen = []
    torch.manual_seed(5)
    for _ in range(12):
        optimizer.step(lambda: seen.append(int((p != 0).any(dim=1).sum())) or 0.0)
    assert set(seen) == {1, 3, 5}
    torch.manual_seed(5)
    first = 10 * baselines.cram.SHARES[int(torch.randint(3, ()))]
    assert seen[0] == first


# --- torchao ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["filters", "rank"])
def test_pats_thresholds_grow_with_the_sum_of_learning_rates(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao.prototype.pat")
    monkeypatch.setattr("pliant.experiments.baselines.pat.WARMUP", 0)
    w, b = nn.Parameter(torch.randn(6, 3, 2, 2).to(memory_format=torch.channels_last)), parameter(6)
    start, bias = w.detach().clone(), b.detach().clone()
    options = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "strength": 1.0}
    optimizer = baselines.pat_optimizer([group(w), {"params": [b]}], part, **options)
    for _ in range(2):
        w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)
        optimizer.step()
    matrix = start.flatten(1)
    if part == "filters":
        norms = matrix.norm(dim=1, keepdim=True)
        expected = matrix * ((norms - 0.2 * math.sqrt(12)).clamp_min(0) / norms)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        expected = (u * (s - 0.2).clamp_min(0)) @ vh
    torch.testing.assert_close(w.detach().flatten(1), expected)
    assert torch.equal(b, bias)


def test_pat_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.prototype.pat", None)
    with pytest.raises(BadInput, match=r"pip install 'pliant\[pat\]'"):
        baselines.pat_optimizer([group(parameter(2, 2))], "rank", lr=0.1, momentum=0.0, weight_decay=0.0, strength=0.1)
