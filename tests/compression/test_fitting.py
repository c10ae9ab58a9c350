"""Least squares for one layer: against numpy's, with biases, groups and masks; never worse than before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.compression import fitting
from pliant.compression.fitting import Fit, Sums, fit

GROUPS, ROWS, N, M = 2, 60, 6, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, rows: int = ROWS, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (groups, rows, n), y (groups, rows, m) with means and noise, and a cut weight (groups, m, n)."""
    x = drawn(GROUPS, rows, N, seed=seed) @ drawn(GROUPS, N, N, seed=seed + 1) + drawn(GROUPS, 1, N, seed=seed + 2)
    weight = drawn(GROUPS, M, N, seed=seed + 3)
    y = x @ weight.mT + drawn(GROUPS, 1, M, seed=seed + 4) + noise * drawn(GROUPS, rows, M, seed=seed + 5)
    return x, y, weight + drawn(GROUPS, M, N, seed=seed + 6)


def lstsq(x: Tensor, y: Tensor, support: Tensor | None = None) -> Tensor:
    """Return the weight (m, n) of least squares, each row on the columns of its support."""
    weight = np.zeros((y.shape[1], x.shape[1]))
    for row in range(y.shape[1]):
        columns = np.arange(x.shape[1]) if support is None else support[row].nonzero().flatten().numpy()
        weight[row, columns] = np.linalg.lstsq(x.numpy()[:, columns], y.numpy()[:, row], rcond=None)[0]
    return torch.tensor(weight)


def expected(x: Tensor, y: Tensor, *, offset: bool, support: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return weights (groups, m, n) and biases (groups, m) of least squares."""
    weights, biases = [], []
    for g in range(len(x)):
        about_x, about_y = (x[g].mean(0), y[g].mean(0)) if offset else (0 * x[g, 0], 0 * y[g, 0])
        weight = lstsq(x[g] - about_x, y[g] - about_y, None if support is None else support[g])
        weights.append(weight)
        biases.append(about_y - weight @ about_x)
    return torch.stack(weights), torch.stack(biases)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "DAMPINGS", (1e-13,))


def error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *, centred: bool = False) -> float:
    """Return the share of the energy of y that is missed, in plain words."""
    rest = y - x @ weight.mT - (0 if bias is None else bias.unsqueeze(1))
    if centred:
        rest = rest - rest.mean(1, keepdim=True)
    return float(rest.square().sum() / (y - y.mean(1, keepdim=True)).square().sum())


# --- against numpy ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("kind", ["bias", "no bias", "centred"])
@pytest.mark.parametrize("masked", ["", "scattered", "columns and filters"])
def test_without_damping_it_is_least_squares(kind: str, masked: str) -> None:
    x, y, cut = problem()
    support = torch.ones(GROUPS, M, N, dtype=torch.bool)
    if masked == "scattered":
        support = drawn(GROUPS, M, N, seed=9) > -0.3
    elif masked:
        support[0, :, 2], support[1, :, 5], support[0, 1], support[1, 0] = False, False, False, False
    cut = cut * support
    bias = drawn(GROUPS, M, seed=8) if kind == "bias" else None
    sums = Sums.of(x, y)
    result = fit(sums, sums, cut, cut, bias, centred=kind == "centred")
    weight, offset = expected(x, y, offset=kind != "no bias", support=support)
    torch.testing.assert_close(result.weight, weight, rtol=1e-7, atol=1e-8)
    assert ((result.weight != 0) <= support).all()
    assert result.damping == 1e-13
    if bias is None:
        assert result.bias is None
    else:
        torch.testing.assert_close(result.bias, offset, rtol=1e-7, atol=1e-8)
    fitted = error(x, y, weight, offset if kind == "bias" else None, centred=kind == "centred")
    assert result.error == pytest.approx(fitted, rel=1e-6, abs=1e-9)
    before = error(x, y, cut, bias, centred=kind == "centred")
    assert result.error_before == pytest.approx(before, rel=1e-8)


@pytest.mark.parametrize("kind", ["bias", "no bias"])
@pytest.mark.parametrize("damping", fitting.DAMPINGS)
def test_damping_is_towards_the_cut(kind: str, damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "DAMPINGS", (damping,))
    x, y, cut = problem(3)
    now = cut + 5
    bias = drawn(GROUPS, M) if kind == "bias" else None
    result = fit(Sums.of(x, y), Sums.of(x, y), cut, now, bias, centred=False)
    for g in range(GROUPS):
        a, b = x[g], y[g]
        if bias is not None:
            a, b = a - a.mean(0), b - b.mean(0)
        level = a.square().mean()  # of E[x_i²]
        stacked = torch.cat([a / ROWS**0.5, (damping * level) ** 0.5 * torch.eye(N, dtype=torch.float64)])
        target = torch.cat([b / ROWS**0.5, (damping * level) ** 0.5 * cut[g].T])
        torch.testing.assert_close(result.weight[g], lstsq(stacked, target), rtol=1e-9, atol=1e-9)


def test_columns_of_zeros_do_not_change_the_damping() -> None:
    x, y, cut = problem(5)
    loud = torch.cat([x, 100 * drawn(GROUPS, ROWS, 3)], 2)
    wide = torch.cat([cut, torch.zeros(GROUPS, M, 3, dtype=torch.float64)], 2)
    more = torch.cat([wide, torch.zeros(GROUPS, 2, N + 3, dtype=torch.float64)], 1)
    outputs = torch.cat([y, drawn(GROUPS, ROWS, 2)], 2)
    small = fit(Sums.of(x, y), Sums.of(x, y), cut, cut, drawn(GROUPS, M), centred=False)
    bias = torch.cat([drawn(GROUPS, M), torch.zeros(GROUPS, 2, dtype=torch.float64)], 1)
    large = fit(Sums.of(loud, outputs), Sums.of(loud, outputs), more, more, bias, centred=False)
    torch.testing.assert_close(large.weight[:, :M, :N], small.weight, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(large.bias[:, :M], small.bias, rtol=1e-11, atol=1e-11)  # type: ignore[index]
    assert large.damping == small.damping
    assert not large.weight[:, :, N:].any()
    assert not large.weight[:, M:].any()
    assert not large.bias[:, M:].any()  # type: ignore[index]  # what a mask has removed stays away


def test_a_filter_without_inputs_but_with_a_bias_gives_the_mean() -> None:
    x, y, cut = problem(6)
    cut[:, 1] = 0
    result = fit(Sums.of(x, y), Sums.of(x, y), cut, cut, torch.ones(GROUPS, M).double(), centred=False)
    assert result.bias is not None
    torch.testing.assert_close(result.bias[:, 1], y.mean(1)[:, 1])


# --- never worse --------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 40),
    kind=st.sampled_from(["bias", "no bias", "centred"]),
    masked=st.booleans(),
    good=st.booleans(),
)
def test_the_error_on_held_out_rows_never_rises(seed: int, rows: int, kind: str, masked: bool, good: bool) -> None:
    x, y, cut = problem(seed, rows)
    held_x, held_y, _ = problem(seed, 30)
    held_x, held_y = held_x[:, ::2] + 0.1, held_y[:, ::2]
    if good:
        cut = expected(held_x, held_y, offset=kind != "no bias")[0]
    if masked:
        cut = cut * (drawn(GROUPS, M, N, seed=seed + 7) > 0)
    bias = drawn(GROUPS, M, seed=seed + 8) if kind == "bias" else None
    now = cut * 1.1
    held = Sums.of(held_x, held_y)
    result = fit(Sums.of(x, y), held, cut, now, bias, centred=kind == "centred")
    assert result.error <= result.error_before
    assert result.weight.isfinite().all()
    centred = kind == "centred"
    assert result.error == pytest.approx(error(held_x, held_y, result.weight, result.bias, centred=centred), abs=1e-9)
    assert result.error_before == pytest.approx(error(held_x, held_y, now, bias, centred=centred), abs=1e-9)
    assert not result.weight[cut == 0].any()
    if result.damping is None:
        assert torch.equal(result.weight, now)
        assert result.bias is bias


def test_what_is_best_stays_as_it_is() -> None:
    x, y, cut = problem(noise=0)
    weight, bias = expected(x, y, offset=True)
    result = fit(Sums.of(x[:, :3], y[:, :3]), Sums.of(x, y), cut, weight, bias, centred=False)
    assert result.damping is None
    assert result.weight is weight


@pytest.mark.parametrize("masked", [False, True])
def test_inputs_of_zeros_and_of_constants_do_no_harm(masked: bool) -> None:
    _, y, cut = problem()
    if masked:
        cut[0, 0, 0] = 0
    for value in (0.0, 1e-20, 3.0):
        x = torch.full((GROUPS, ROWS, N), value, dtype=torch.float64)
        for bias in (None, drawn(GROUPS, M)):
            result = fit(Sums.of(x, y), Sums.of(x, y), cut, cut, bias, centred=False)
            assert result.weight.isfinite().all()
            assert result.error <= result.error_before
            assert bias is None or result.error == pytest.approx(1)  # the mean, and no more


def test_outputs_that_are_constant_have_no_energy_and_do_no_harm() -> None:
    x, _, cut = problem()
    result = fit(
        Sums.of(x, torch.ones(GROUPS, ROWS, M).double()), *[Sums.of(x, 0 * x[..., :M])], cut, cut, None, centred=False
    )
    assert result.weight.isfinite().all()


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_sums_in_parts_are_those_of_all_rows(dtype: torch.dtype, mean: float) -> None:
    x, y, _ = problem(1)
    x, y = (x + mean).to(dtype), (y - mean).to(dtype)
    sums = Sums.of(x[:, :20], y[:, :20])
    sums.add(Sums.of(x[:, 20:], y[:, 20:]))
    wide, out = x.double(), y.double()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert sums.rows == ROWS
    assert sums.finite
    torch.testing.assert_close(sums.mean_x, wide.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.mean_y, out.mean(1), rtol=1e-12, atol=1e-12)
    second, cross, yy = sums.means(centred=False)
    torch.testing.assert_close(second, wide.mT @ wide / ROWS, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cross, wide.mT @ out / ROWS, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(yy, out.square().mean(1), rtol=tolerance, atol=tolerance)
    second, cross, yy = sums.means(centred=True)
    wide, out = wide - wide.mean(1, keepdim=True), out - out.mean(1, keepdim=True)
    torch.testing.assert_close(second, wide.mT @ wide / ROWS, rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(cross, wide.mT @ out / ROWS, rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(yy, out.square().mean(1), rtol=10 * tolerance, atol=1e-9)


def test_sums_that_are_not_finite_are_known() -> None:
    x, y, _ = problem(1)
    y[0, 0, 0] = float("nan")
    assert not Sums.of(x, y).finite
    assert not Sums.of(y, x).finite


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_large_means_in_float32_do_not_spoil_the_fit(mean: float) -> None:
    x, y, cut = problem(2, rows=2000)
    shifted = (x + mean).float()
    result: Fit = fit(
        Sums.of(shifted, y), Sums.of(shifted, y), cut, cut, torch.zeros(GROUPS, M).double(), centred=False
    )
    weight, bias = expected(shifted.double(), y, offset=True)
    best = error(shifted.double(), y, weight, bias)
    assert best <= result.error < best * 1.01


# --- conjugate gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 150])
def test_scattered_masks_of_large_layers_are_solved_well(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "DAMPINGS", (1e-4,))
    x = drawn(1, 3 * n, n, seed=0) * torch.logspace(-2, 2, n, dtype=torch.float64)  # columns of very different size
    x[..., 1:] += x[..., :-1]
    y = x @ drawn(1, n, 8, seed=1)
    mask = drawn(1, 8, n, seed=2) > 0
    cut = drawn(1, 8, n, seed=3) * mask
    sums = Sums.of(x, y)
    result = fit(sums, sums, cut, cut, None, centred=False)
    root = (1e-4 * x.square().mean() * 3 * n) ** 0.5 * torch.eye(n, dtype=torch.float64)
    stacked, target = torch.cat([x[0], root]), torch.cat([y[0], root @ cut[0].T])
    weight = lstsq(stacked, target, mask[0]).unsqueeze(0)
    assert result.error == pytest.approx(error(x, y, weight, None), rel=1e-3)
    assert result.error < result.error_before / 2
