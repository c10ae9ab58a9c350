"""Zeroing and rounding by moments: against all masks and plain least squares, exact counts, layers and networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import (
    Chain,
    Compressor,
    FilterPruning,
    Int8,
    LowRank,
    Magnitude,
    Plan,
    SemiStructured,
    compress,
    replay,
    skeleton,
)
from pliant.compression import inputs as layer_inputs
from pliant.compression.calibration import Calibration
from pliant.compression.compensation import (
    GONE,
    energy,
    inverse_factor,
    largest,
    loss_curve,
    prune,
    prune_blocks,
    round_to_grid,
)
from pliant.compression.inputs import from_matrices, matrices
from pliant.compression.observing import linear_map
from pliant.compression.refit import Refitter
from pliant.errors import BadInput


def problem(m: int = 5, n: int = 12, groups: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights and a moment with strong correlations, float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 3 * n, n, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(n, dtype=torch.float64) + 0.5 * torch.randn(n, n, generator=generator, dtype=torch.float64))
    return w, x.mT @ x / (3 * n)


def refitted(w: Tensor, h: Tensor, fixed: Tensor, free: Tensor) -> Tensor:
    """Return w with the entries ``free`` such that the error is least, once ``fixed`` has been added to the others."""
    a = h[free][:, free]
    new = w.clone()
    new[free] = w[free] - torch.linalg.solve(a, h[free] @ fixed)
    return new


def reference(w: Tensor, h: Tensor, new_value: Callable[[Tensor, int], float]) -> Tensor:
    """Sweep one row by solving the least squares of all columns to the right, from the start, after every column."""
    n = len(w)
    now = w.clone()
    for j in range(n):
        now[j] = new_value(now, j)
        change = torch.zeros_like(w)
        change[: j + 1] = now[: j + 1] - w[: j + 1]
        right = torch.arange(j + 1, n)
        now[right] = refitted(w, h, change, right)[right]
    return now


def errors(w: Tensor, new: Tensor, h: Tensor) -> Tensor:
    return ((w - new) @ h * (w - new)).sum(2)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, h = problem()
    u = inverse_factor(h)
    torch.testing.assert_close(u.mT @ u, torch.linalg.inv(h))
    assert torch.equal(u, u.triu())


def solved(w: Tensor, h: Tensor, stays: Tensor) -> Tensor:
    """Return the best weights (groups, m, n) with entries only where ``stays``, row by row."""
    new = torch.zeros_like(w)
    for g, rows in enumerate(stays):
        for i, row in enumerate(rows):
            new[g, i, row] = torch.linalg.solve(h[g][row][:, row], h[g][row] @ w[g, i])
    return new


def test_zeros_of_one_filter_against_all_masks() -> None:
    optimal = 0
    for seed in range(20):
        w, h = problem(1, 8, 1, seed)
        masks = torch.tensor([[bool(bits >> i & 1) for i in range(8)] for bits in range(256)])
        masks = masks[masks.sum(1) == 3]
        best = min(float(errors(w, solved(w, h, mask[None, None]), h)) for mask in masks)
        new = prune(w, h, 3)
        power = largest((w.abs() * h.diagonal(dim1=1, dim2=2).sqrt()).flatten(), 3).view_as(w)
        found, plain = float(errors(w, new, h)), float(errors(w, solved(w, h, power), h))
        assert best * (1 - 1e-9) <= found <= plain * (1 + 1e-6)
        optimal += found <= best * (1 + 1e-6)
    assert optimal >= 12


@pytest.mark.parametrize("kept", [0, 1, 37, 119, 120])
def test_what_stays_is_the_least_squares_and_counts_are_exact(kept: int) -> None:
    w, h = problem()
    new = prune(w, h, kept)
    assert int((new != 0).sum()) == kept
    torch.testing.assert_close(new, solved(w, h, new != 0), atol=1e-6, rtol=1e-6)


def test_one_entry_that_goes_is_made_up_for_as_by_the_surgeon() -> None:
    w, h = problem(1, 6, 1)
    new = prune(w, h, 5)
    inverse = torch.linalg.inv(h[0])
    j = int((new == 0).flatten().nonzero())
    torch.testing.assert_close(new[0, 0], w[0, 0] - w[0, 0, j] / inverse[j, j] * inverse[j], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(errors(w, new, h)[0, 0], w[0, 0, j] ** 2 / inverse[j, j])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 6), (1, 2)])
def test_every_block_keeps_its_number_and_makes_up_for_the_rest(n: int, m: int) -> None:
    w, h = problem(n=24)
    new = prune_blocks(w, h, n, m)
    stays = new != 0
    assert (stays.unflatten(2, (-1, m)).sum(3) == n).all()
    torch.testing.assert_close(new, solved(w, h, stays), atol=1e-6, rtol=1e-6)
    magnitude = largest(w.abs().unflatten(2, (-1, m)), n).flatten(2)
    assert errors(w, new, h).sum() < 0.9 * errors(w, solved(w, h, magnitude), h).sum()


def test_without_correlations_it_is_magnitude_times_power() -> None:
    w, _ = problem()
    identity = torch.eye(12, dtype=torch.float64).expand(2, -1, -1)
    assert torch.equal(prune(w, identity, 50), w * largest(w.abs().flatten(), 50).view_as(w))
    blocks = largest(w.abs().unflatten(2, (-1, 4)), 2).flatten(2)
    assert torch.equal(prune_blocks(w, identity, 2, 4), w * blocks)
    power = torch.rand(12, dtype=torch.float64) + 0.1
    new = prune(w, torch.diag(power.square()).expand(2, -1, -1), 50)
    torch.testing.assert_close(new, w * largest((w.abs() * power).flatten(), 50).view_as(w))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_gets_worse_than_without_making_up(seed: int) -> None:
    w, h = problem(8, 30, 1, seed)
    for kept in (20, 100, 200):
        new = prune(w, h, kept)
        assert (errors(w, new, h) <= errors(w, w * (new != 0), h)).all()
    scale = w.abs().amax(2, keepdim=True) / 7
    whole = round_to_grid(w, h, scale, 7)
    nearest = (w / scale).round().clamp(-7, 7)
    assert torch.equal(whole, whole.round())
    assert whole.abs().max() <= 7
    assert (errors(w, whole * scale, h) <= errors(w, nearest * scale, h)).all()
    assert errors(w, whole * scale, h).sum() < 0.9 * errors(w, nearest * scale, h).sum()
    torch.testing.assert_close(energy(w - new, h), errors(w, new, h).sum())


@pytest.mark.parametrize("width", [1, 3, 128])
def test_rounding_is_the_least_squares_of_the_columns_to_the_right(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr("pliant.compression.compensation.BLOCK", width)
    w, h = problem(3, 10, 1)
    scale = w.abs().amax(2, keepdim=True) / 5
    whole = round_to_grid(w, h, scale, 5)
    nearest = (w / scale).round().clamp(-5, 5) * scale
    for i in range(3):
        s = float(scale[0, i])
        expected = reference(w[0, i], h[0], lambda now, j, s=s: s * float((now[j] / s).round().clamp(-5, 5)))
        if errors(w, expected.expand_as(w), h)[0, i] <= errors(w, nearest, h)[0, i]:
            torch.testing.assert_close(whole[0, i] * s, expected)
        else:
            torch.testing.assert_close(whole[0, i] * s, nearest[0, i])


def test_curves_are_those_of_the_layer() -> None:
    w, h = problem(24, 40)
    curve = loss_curve(w, h)
    assert curve[0] == 0
    assert curve[-1] == 1
    assert (curve.diff() >= 0).all()
    for gone, loss in zip(GONE[1:-1], curve[1:-1].tolist(), strict=True):
        exact = float(energy(w - prune(w, h, round((1 - gone) * w.numel())), h) / energy(w, h))
        assert 0.9 * exact < loss < 1.4 * exact
    assert not loss_curve(torch.zeros_like(w), h).any()


def test_zeros_stay_zeros() -> None:
    w, h = problem()
    w[0, 1] = 0
    w[1, :, ::3] = 0
    gone = w == 0
    for new in (
        prune(w, h, 70),
        prune_blocks(w, h, 2, 4),
        round_to_grid(w, h, w.abs().amax() * torch.ones(2, 5, 1).double() / 3, 3),
    ):
        assert not new[gone].any()


# --- layers -----------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(16, 12), (64, 16)),
    "tokens": (nn.Linear(16, 12), (32, 5, 16)),
    "conv": (nn.Conv2d(8, 12, 3, padding=1), (32, 8, 6, 6)),
    "no bias": (nn.Conv2d(8, 12, 3, bias=False, stride=2), (32, 8, 7, 7)),
    "grouped": (nn.Conv2d(16, 12, 3, groups=4, padding=1), (32, 16, 6, 6)),
    "depthwise": (nn.Conv1d(8, 8, 5, groups=8), (64, 8, 12)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2), (32, 8, 5, 5)),
    "transposed groups": (nn.ConvTranspose2d(8, 6, 2, groups=2), (32, 8, 5, 5)),
}


def correlated(shape: tuple[int, ...], axis: int = 1) -> Tensor:
    """Return data whose features are correlated and have means."""
    generator = torch.Generator().manual_seed(1)
    n = shape[axis]
    x = torch.randn(shape, generator=generator).movedim(axis, -1)
    x = x @ (0.3 * torch.eye(n) + torch.randn(n, n, generator=generator) / n**0.5) + torch.randn(n, generator=generator)
    return x.movedim(-1, axis).contiguous()


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def missed(small: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return float((output(small, x).double() - output(dense, x).double()).square().mean())


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_compute_what_the_layer_does(name: str) -> None:
    layer, _ = LAYERS[name]
    found = linear_map(layer, "")
    assert found is not None
    w = matrices(found, found.weight)
    assert torch.equal(from_matrices(found, w), found.weight.double())
    if name == "grouped":
        assert torch.equal(w[1, 2, 4:8], found.weight[5, :, 0, 1].double())  # the second kernel position
    if name == "transposed":
        assert torch.equal(w[0, :9], found.weight[:, 0].flatten(1).double().T)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wide", [False, True])
def test_layers_of_all_kinds_lose_less_than_by_magnitude(
    monkeypatch: pytest.MonkeyPatch, name: str, wide: bool
) -> None:
    if wide:
        monkeypatch.setitem(layer_inputs.by_channel.__globals__["MAX_COLUMNS"], "convolution", 1)
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer))
    x = correlated(shape, -1 if "tokens" in name or "linear" in name else 1)
    compressors: list[Compressor[Any]] = [Magnitude(0.5), SemiStructured(), Int8()]
    for compressor in compressors:
        if "transposed" in name and not isinstance(compressor, Magnitude):
            continue
        if name == "depthwise" and isinstance(compressor, SemiStructured):
            continue
        small = compress(model, compressor, x[:2], [x], refit=False)
        plain = compress(model, compressor, x[:2])
        if not isinstance(compressor, Int8):
            assert int((small[0].weight == 0).sum()) == int((plain[0].weight == 0).sum())
        if name == "depthwise" and wide:
            continue  # one channel per group: nothing else can make up for it
        assert missed(small, model, x) < missed(plain, model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    x = correlated((64, 16)).to(dtype)
    for compressor in (Magnitude(0.6), SemiStructured()):
        small = compress(model, compressor, x[:2], [x], refit=False)
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert missed(small, model, x) < missed(compress(model, compressor, x[:2]), model, x)
    eight: Any = compress(model, Int8(), x[:2], [x], refit=False)
    assert eight[0].weight.dtype == torch.int8
    assert eight[0].bias.dtype == eight[0].scale.dtype == dtype


def test_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(pytorch_utils.Conv1D(12, 16))
    x = correlated((64, 16))
    for compressor in (Magnitude(0.5), SemiStructured(), Int8()):
        small = compress(model, compressor, x[:2], [x], refit=False)
        assert missed(small, model, x) < missed(compress(model, compressor, x[:2]), model, x)
    pattern = compress(model, SemiStructured(), x[:2], [x], refit=False)
    assert ((pattern[0].weight.unflatten(0, (-1, 4)) != 0).sum(1) == 2).all()


def test_dead_and_constant_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))
    with torch.no_grad():
        model[0].bias[:6] = -100  # dead neurons
        model[0].weight[6] = 0
        model[0].bias[6] = 1  # a constant one
    x = correlated((512, 16))
    x[:, 3] = 0
    x[:, 4] = 2
    for compressor in (Magnitude(0.5, "uniform"), SemiStructured(), Int8()):
        small = compress(model, compressor, x[:2], [x], refit=False)
        assert missed(small, model, x) < missed(compress(model, compressor, x[:2]), model, x)
    pruned = compress(model, Magnitude(0.5, "uniform"), x[:2], [x], refit=False)
    plain = compress(model, Magnitude(0.5, "uniform"), x[:2])
    dead = [int((small[2].weight[:, :6] != 0).sum()) for small in (pruned, plain)]
    assert dead[0] < dead[1] / 2  # what reads nothing goes first
    assert not pruned[0].weight[:, 3].any()


# --- networks ---------------------------------------------------------------------------------------------------------


def small_network() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network that was trained a little on correlated images, data and held-out data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)),
    )
    x = correlated((768, 4, 6, 6)).cumsum(2) / 3
    teacher = torch.randn(144, 8) / 4
    y = (x.flatten(1) @ teacher).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        batch = slice(128 * (step % 4), 128 * (step % 4) + 128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval(), x[:512], x[512:]


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor, Tensor]:
    return small_network()


@pytest.mark.parametrize(
    ("by_loss", "by_magnitude"),
    [
        (Magnitude(0.6), Magnitude(0.6, importance="magnitude")),
        (Magnitude(0.6, "uniform"), Magnitude(0.6, "uniform", importance="magnitude")),
        (SemiStructured(), SemiStructured(importance="magnitude")),
        (SemiStructured(1, 4), SemiStructured(1, 4, importance="magnitude")),
        (Int8(), Int8(compensate=False)),
    ],
)
@pytest.mark.parametrize("refit", [False, True])
def test_networks_lose_less_than_by_magnitude(
    network: tuple[nn.Module, Tensor, Tensor], by_loss: Compressor[Any], by_magnitude: Compressor[Any], refit: bool
) -> None:
    model, data, held = network
    small = compress(model, by_loss, data[:2], data.split(64), refit=refit)
    plain = compress(model, by_magnitude, data[:2], data.split(64), refit=refit)
    assert missed(small, model, held) < (1.05 if refit else 1) * missed(plain, model, held)


def test_one_analysis_serves_all_ratios(network: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, data, _ = network
    analysis = Magnitude().analyse(model, data[:2], data.split(64))
    for allocation in ("uniform", "global", "energy"):
        for ratio in (0.0, 0.3, 0.8, 0.999):
            compressor = Magnitude(ratio, allocation)
            plan = compressor.plan(model, data[:2], analysis=analysis)
            small = compressor.apply(model, plan, analysis=analysis)
            total = sum(layer.total for layer in plan.layers)
            zeroed = sum(int((small.get_submodule(layer.name).weight == 0).sum()) for layer in plan.layers)
            assert zeroed == round(ratio * total)
            for layer in plan.layers:
                assert int((small.get_submodule(layer.name).weight != 0).sum()) == layer.kept
    plain = Magnitude(0.5, importance="magnitude")
    same = plain.apply(model, plain.plan(model, data[:2], analysis=analysis), analysis=analysis)
    for p, q in zip(same.parameters(), compress(model, plain, data[:2]).parameters(), strict=True):
        assert torch.equal(p, q)


def test_moments_that_do_not_fit_are_measured_again(
    network: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, _ = network
    expected = compress(model, Magnitude(0.7), data[:2], data.split(64), refit=False)
    monkeypatch.setattr(layer_inputs, "MEMORY", 200_000)
    compressor = Magnitude(0.7)
    analysis = compressor.analyse(model, data[:2], data.split(64))
    assert analysis.inputs is not None
    for _ in range(2):
        plan = compressor.plan(model, data[:2], analysis=analysis)
        small = compressor.apply(model, plan, analysis=analysis)
        for p, q in zip(small.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_layers_that_are_not_applied_or_too_wide_go_by_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(16, 12), nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model, x = Two(), correlated((64, 16))
    for compressor in (Magnitude(0.5, "uniform"), SemiStructured()):
        small = compress(model, compressor, x[:2], [x], refit=False)
        plain = compress(model, compressor, x[:2])
        assert torch.equal(small.spare.weight, plain.spare.weight)
        assert not torch.equal(small.used.weight, plain.used.weight)
    assert compress(model, Magnitude(0.5), x[:2], [x]).used.weight.any()
    monkeypatch.setitem(layer_inputs.by_channel.__globals__["MAX_COLUMNS"], "linear", 8)
    small = compress(model, Magnitude(0.5, "uniform"), x[:2], [x], refit=False)
    assert torch.equal(small.used.weight, compress(model, Magnitude(0.5, "uniform"), x[:2]).used.weight)


@pytest.mark.parametrize("compressor", [Magnitude(0.5), SemiStructured(), Int8()])
def test_plans_from_data_need_their_analysis_but_their_skeletons_do_not(
    network: tuple[nn.Module, Tensor, Tensor], compressor: Compressor[Any]
) -> None:
    model, data, _ = network
    analysis = compressor.analyse(model, data[:2], data.split(64))
    plan = compressor.plan(model, data[:2], analysis=analysis)
    again = Plan.from_dict(plan.to_dict())
    small = compressor.apply(model, again, analysis=analysis)
    with pytest.raises(BadInput, match="depend on the calibration data"):
        replay(model, again)
    empty = skeleton(model, again)
    empty.load_state_dict(small.state_dict())
    torch.testing.assert_close(output(empty, data), output(small, data))
    plain = compressor.plan(model, data[:2])
    torch.testing.assert_close(output(replay(model, plain), data), output(compress(model, compressor, data[:2]), data))
    old = {name: value for name, value in plain.options.items() if name not in ("importance", "compensate")}
    earlier = Plan.from_dict({**plain.to_dict(), "options": old})  # as versions without these options wrote them
    torch.testing.assert_close(
        output(compressor.apply(model, earlier, analysis=analysis), data), output(replay(model, plain), data)
    )


@pytest.mark.parametrize(
    "chain",
    [
        Chain(LowRank(0.4), Int8()),
        Chain(FilterPruning(0.4), Int8()),
        Chain(Magnitude(0.5), Int8()),
        Chain(FilterPruning(0.3), LowRank(0.3), Int8()),
    ],
)
def test_eight_bits_come_after_the_refit(network: tuple[nn.Module, Tensor, Tensor], chain: Chain) -> None:
    model, data, held = network
    batches = data.split(64)
    calibration = Calibration(batches, model, data[:2])
    analysis = chain.analyse(model, data[:2], calibration)
    plan = chain.plan(model, data[:2], analysis=analysis)
    small, refitted = Refitter(model, data[:2], calibration).apply(chain, plan, analysis)
    assert refitted.refit is not None
    result = refitted.refit.errors[refitted.refit.result]
    assert result <= refitted.refit.errors["cut"]
    assert refitted.refit.errors["rounded"] < 1.1 * result + 1e-3
    torch.testing.assert_close(output(small, held), output(compress(model, chain, data[:2], batches), held))
    cut = compress(model, chain, data[:2], batches, refit=False)
    assert missed(small, model, held) < 1.05 * missed(cut, model, held)
    before = Chain(*chain.links[:-1])
    floats = compress(model, before, data[:2], batches)
    assert missed(small, floats, held) < 0.01 * float(output(floats, held).square().mean())
    if isinstance(chain.links[0], Magnitude):
        gone = floats[6].weight == 0
        assert gone.any()
        assert not small[6].weight[gone].any()
    again = Plan.from_dict(refitted.to_dict())
    empty = skeleton(model, again)
    empty.load_state_dict(small.state_dict())
    torch.testing.assert_close(output(empty, held), output(small, held))
    assert "rounded" in str(again)


def test_links_after_others_options_are_analysed_anew(network: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, data, _ = network
    first = Chain(SemiStructured(2, 4), Magnitude(0.6, "uniform"))
    analysis = first.analyse(model, data[:2], data.split(64))
    first.plan(model, data[:2], analysis=analysis)
    other = Chain(SemiStructured(2, 4, importance="magnitude"), Magnitude(0.6, "uniform"))
    plan = other.plan(model, data[:2], analysis=analysis)
    small = other.apply(model, plan, analysis=analysis)
    torch.testing.assert_close(
        output(small, data), output(compress(model, other, data[:2], data.split(64), refit=False), data)
    )


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (Magnitude(0.5, importance="loss"), "importance"),
        (SemiStructured(importance="loss"), "importance"),
        (Int8(True), "compensate"),
    ],
)
def test_data_that_is_asked_for_is_needed(compressor: Compressor[Any], message: str) -> None:
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    with pytest.raises(BadInput, match=f"{message}=.*calibration data"):
        compressor.plan(model, x)
    plain = type(compressor)().analyse(model, x)
    with pytest.raises(BadInput, match=f"{message}=.*calibration data"):
        compressor.plan(model, x, analysis=plain)


def test_bad_options() -> None:
    with pytest.raises(BadInput, match="importance"):
        Magnitude(0.5, importance="l2")
    with pytest.raises(BadInput, match="importance"):
        SemiStructured(importance="los")
    with pytest.raises(BadInput, match="compensate"):
        Int8(compensate="always")
