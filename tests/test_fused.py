"""Fused steps are the usual ones: on every kind of ball, in every memory layout, from step to step."""

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
from pliant.linalg import keep_n_of_m
from pliant.norms.ball import NormBall
from pliant.norms.lifts import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral
from pliant.optim import fused
from pliant.optim.sfw import RESCALES, SFW

from .instances import LAYOUTS, few_integers, gaussian, tiled
from .optimizer_cases import quiet_first_steps

pytestmark = quiet_first_steps

FUSED: list[Norm] = [
    Rows(KSupport(3)),
    Rows(KSparse(2)),
    Rows(Lp(1)),
    Rows(Lp(3)),
    KSparse(40),
    KSupport(1),
    KSupport(200),
    Blocks(KSupport(2), 4),
    Blocks(KSupport(2), 4, 0),
]


def trained(norm: Norm, start: Tensor, gradients: list[Tensor], fuse: bool, **options: Any) -> tuple[nn.Parameter, SFW]:
    p = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    opt = SFW([{"params": [p], "ball": NormBall(norm, 3.0)}], fused=fuse, **{"lr": 0.05, **options})
    for g in gradients:
        p.grad = g
        opt.step()
    return p, opt


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return what :func:`fused.step` answers from now on."""
    taken: list[bool] = []
    real = fused.step

    def step(*arguments: Any, **named: Any) -> bool:
        taken.append(real(*arguments, **named))
        return taken[-1]

    monkeypatch.setattr(fused, "step", step)
    return taken


@pytest.mark.parametrize("norm", FUSED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.3, "maximize": True}, {"lr": torch.tensor(0.05)}], ids=["plain", "ascent", "tensor"]
)
def test_fused_steps_are_the_usual_ones(
    norm: Norm, layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = steps_taken(monkeypatch)
    start = LAYOUTS[layout](gaussian((8, 12, 5, 5), 1, torch.float32))
    gradients = [LAYOUTS[layout](gaussian((8, 12, 5, 5), seed, torch.float32)) for seed in range(2, 10)]
    for rescale in RESCALES:
        expected, _ = trained(norm, start, gradients, False, rescale=rescale, **options)
        got, opt = trained(norm, start, gradients, True, rescale=rescale, **options)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)  # measured: 1e-6
        torch.testing.assert_close(
            opt.state[got]["momentum_buffer"], gradients_folded(gradients, options), rtol=1e-5, atol=1e-6
        )
        assert opt.param_groups[0]["ball"] is not None
        assert NormBall(norm, 3.0).contains(got.detach())
    dense = start.is_contiguous() or start.is_contiguous(memory_format=torch.channels_last)
    assert len(taken) == (4 * 7 if dense else 0)
    assert taken.count(False) <= (4 if norm == KSupport(1) else 0)  # it may come to its vertex, where nothing moves


def gradients_folded(gradients: list[Tensor], options: dict[str, Any]) -> Tensor:
    sign = -1 if options.get("maximize") else 1
    m = sign * gradients[0]
    for g in gradients[1:]:
        m = 0.9 * m + sign * (1 - options.get("dampening", 0)) * g
    return m


@pytest.mark.parametrize("shape", [(5, 3), (64, 40), (3, 70_000), (300, 400)], ids=str)
def test_sizes_that_fill_chunks_and_do_not(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = steps_taken(monkeypatch)
    n = math.prod(shape)
    for norm in (Rows(KSupport(2)), KSupport(max(1, n // 10)), KSparse(n - 1)):
        start = gaussian(shape, 1, torch.float32)
        gradients = [gaussian(shape, seed, torch.float32) for seed in range(2, 8)]
        expected, _ = trained(norm, start, gradients, False)
        got, _ = trained(norm, start, gradients, True)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
    assert sum(taken) >= 13  # of 15: by chance two of many entries are equal


@settings(max_examples=50)
@given(few_integers, st.sampled_from(FUSED))
def test_ties_and_zeros_are_those_of_the_usual_step(values: list[int], norm: Norm) -> None:
    shape = (8, 8, 5, 5)
    gradients = [tiled(values, shape).float().contiguous(), tiled(values[::-1], shape).float().contiguous()]
    start = gaussian(shape, 1, torch.float32)
    for g in (gradients, gradients[:1] * 4):
        expected, _ = trained(norm, start, g, False, momentum=0.5)
        got, _ = trained(norm, start, g, True, momentum=0.5)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def test_two_of_four_is_what_the_usual_kernel_keeps() -> None:
    for dim, layout in product((0, 1), LAYOUTS):
        p = nn.Parameter(LAYOUTS[layout](gaussian((8, 8, 3, 3), 1, torch.float32)))
        m = torch.zeros_like(p)
        p.grad = LAYOUTS[layout](gaussian((8, 8, 3, 3), 2, torch.float32).mul(2).round())
        if not fused.fits(Blocks(KSupport(2), 4, dim), p, m):
            continue
        scratch = torch.empty(p.numel())
        options: dict[str, Any] = {"radius": 1.0, "diameter": 2.0, "momentum": 0.9, "weight": 1.0, "lr": 0.0}
        norm = Blocks(KSupport(2), 4, dim)
        assert fused.step(norm, p, m, rescale=None, scratch=scratch, brackets={}, **options)
        expected = torch.empty_like(m)
        keep_n_of_m(m, 2, 4, dim, expected)
        assert torch.equal(scratch.as_strided(m.shape, m.stride()), expected)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 2.0**100, 2.0**-100])
@pytest.mark.parametrize("norm", FUSED, ids=str)
def test_what_needs_care_takes_the_usual_step(norm: Norm, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = steps_taken(monkeypatch)
    start, g = gaussian((8, 8, 3, 3), 1, torch.float32), gaussian((8, 8, 3, 3), 2, torch.float32)
    if math.isfinite(value):
        gradients = [g * value] * 3
    else:
        gradients = [g, g.clone()]
        gradients[1][0, 0, 0, 0] = value
    expected, _ = trained(norm, start, gradients, False)
    got, _ = trained(norm, start, gradients, True)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert taken == [False] * (len(gradients) - 1)


def test_the_kth_largest_is_found_again_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    real = fused.kth_largest
    monkeypatch.setattr(fused, "kth_largest", lambda arrays, k: searches.append(k) or real(arrays, k))
    shape = (100, 300)
    noise = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=noise) for _ in range(40)]
    trained(KSupport(3000), torch.zeros(shape), gradients, True)
    assert len(searches) < 8  # at first, and while the momentum grows
    # A leap misses, and is found by a search of everything.
    got, _ = trained(KSupport(3000), torch.zeros(shape), [gradients[0], *[1000 * g for g in gradients[:3]]], True)
    expected, _ = trained(KSupport(3000), torch.zeros(shape), [gradients[0], *[1000 * g for g in gradients[:3]]], False)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("norm", FUSED, ids=str)
@pytest.mark.parametrize("radius", [1e-22, 1e19, 1e21])
def test_any_radius_moves_weights_as_usual(norm: Norm, radius: float) -> None:
    gradients = [gaussian((8, 8, 5, 5), seed, torch.float32) for seed in range(4)]
    ends = []
    for fuse in (False, True):
        p = nn.Parameter(torch.zeros(8, 8, 5, 5))
        opt = SFW([{"params": [p], "ball": NormBall(norm, radius)}], lr=0.05, fused=fuse)
        for g in gradients:
            p.grad = g
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6 * min(radius, 1))


@pytest.mark.parametrize("shape", [(4, 4608), (8, 300), (4, 50_000), (8, 256), (4, 1)], ids=str)
def test_long_sums_do_not_leave_the_ball(shape: tuple[int, int]) -> None:
    ball = NormBall(Blocks(KSupport(2), 4, 0), 3.0)
    p = nn.Parameter(torch.zeros(shape))
    opt = SFW([{"params": [p], "ball": ball}], lr=1.0, rescale=None, fused=True)
    for _ in range(3):
        p.grad = torch.full(shape, 0.1)
        opt.step()
    assert ball.norm(p.detach().double()) == pytest.approx(3.0, rel=4e-7)


def test_momentum_may_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for fuse in (False, True):
        p = nn.Parameter(torch.zeros(8, 12))
        opt = SFW([{"params": [p], "ball": NormBall(KSupport(9), 3.0)}], dampening=0.5, fused=fuse)
        for step in range(4):
            opt.param_groups[0]["momentum"] = 0.9 if step < 2 else 0.0
            p.grad = gaussian((8, 12), step, torch.float32)
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], ends[0])


def test_a_view_that_negates_is_not_read_as_it_lies_in_memory() -> None:
    g = gaussian((8, 12), 1, torch.float32)
    expected, _ = trained(KSupport(9), torch.zeros(8, 12), [g, -g, -g], False)
    got, _ = trained(KSupport(9), torch.zeros(8, 12), [g, torch._neg_view(g), torch._neg_view(g)], True)
    torch.testing.assert_close(got, expected)


def test_what_does_not_fit_takes_the_usual_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "step", None)
    g = gaussian((8, 12), 2, torch.float32)
    for norm in (Lp(2), Lp(math.inf), KSupport(96), Blocks(KSupport(1), 4), Rows(KSupport(2), dim=1), Spectral(Lp(1))):
        trained(norm, torch.zeros(8, 12), [g] * 3, True)
    trained(KSupport(3), torch.zeros(8, 12), [g] * 3, True, momentum=0.0)
    trained(KSupport(3), torch.zeros(8, 12).double(), [g.double()] * 3, True)
    trained(KSupport(3), torch.zeros(8, 12).bfloat16(), [g.bfloat16()] * 3, True)
    p = nn.Parameter(torch.zeros(8, 12))
    opt = SFW([{"params": [p]}, {"params": [q := nn.Parameter(torch.zeros(16, 12)[::2])], "ball": NormBall(KSupport(3), 1)}], fused=True)  # fmt: skip  # noqa: E501
    for _ in range(3):
        p.grad, q.grad = g, g
        opt.step()


def test_autograd_sees_that_weights_have_changed() -> None:
    p = nn.Parameter(gaussian((8, 12), 1, torch.float32))
    opt = SFW([{"params": [p], "ball": NormBall(KSupport(3), 1.0)}], fused=True)
    for _ in range(2):
        p.grad = gaussian((8, 12), 2, torch.float32)
        opt.step()
    loss = (p * p).sum()
    p.grad = gaussian((8, 12), 2, torch.float32)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fused_training_saves_loads_and_goes_on() -> None:
    start, gradients = torch.zeros(8, 12), [gaussian((8, 12), seed, torch.float32) for seed in range(6)]
    expected, _ = trained(KSupport(9), start, gradients, True)
    p, opt = trained(KSupport(9), start, gradients[:3], True)
    q = nn.Parameter(p.detach().clone())
    again = SFW([{"params": [q], "ball": NormBall(KSupport(9), 3.0)}], fused=True, lr=0.05)
    again.load_state_dict(opt.state_dict())
    for g in gradients[3:]:
        q.grad = g
        again.step()
    torch.testing.assert_close(q, expected, rtol=1e-6, atol=1e-7)  # where the k-th largest was is not saved


def made_with(**environment: str) -> subprocess.CompletedProcess[str]:
    program = "import torch, pliant; pliant.SFW([torch.nn.Parameter(torch.zeros(2))], fused=True)"
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"CC": "no-such-compiler"},
            "RuntimeError: fused=True needs a C compiler, and 'no-such-compiler' is not there",
        ),
        ({"CC": "false"}, "RuntimeError: fused=True needs a C compiler with OpenMP, but 'false' failed"),
        (
            {"XDG_CACHE_HOME": "/proc/nowhere"},
            "RuntimeError: fused=True keeps compiled kernels in /proc/nowhere/pliant",
        ),
    ],
    ids=["none", "failing", "no folder"],
)
def test_without_kernels_there_is_a_named_error(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    done = made_with(**{"XDG_CACHE_HOME": str(tmp_path), **environment})
    assert done.returncode
    assert said in done.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert made_with(XDG_CACHE_HOME=str(tmp_path), CC="").returncode == 0
        (library,) = tmp_path.rglob("*.so")
        library.write_bytes(library.read_bytes()[:100])


def test_a_group_may_ask_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = steps_taken(monkeypatch)
    model = nn.Linear(12, 8)
    groups = pliant.constrain(model, [("weight", pliant.filters(2))], default=None)
    groups[0]["fused"] = True
    opt = SFW(groups)
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(3, 12)).square().mean().backward()
        opt.step()
    assert taken == [True, True]
