"""``exact=True``: vertices of spectral balls by decompositions, whatever the size and the spectrum of the momentum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.norms import KSparse, KSupport, Lp, Norm, NormBall, Spectral
from pliant.optim import SFW
from tests.instances import gaussian


def with_spectrum(rows: int, columns: int, least: float) -> Tensor:
    """A matrix with singular values from 1 to 10^least, evenly spread on a logarithmic scale."""
    n = min(rows, columns)
    u, v = torch.linalg.qr(gaussian((rows, n))).Q, torch.linalg.qr(gaussian((columns, n), 1)).Q
    return ((u * torch.logspace(0, least, n, dtype=torch.float64)) @ v.T).float()


def step_of(norm: Norm, gradients: list[Tensor], joint: bool = False, **options: Any) -> list[Tensor]:
    """Return where one step of full length takes weights: to the vertices."""
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    group = {"params": parameters, "ball": NormBall(norm, 1.0), "joint": joint}
    opt = SFW([group], lr=1.0, rescale=None, momentum=0.0, **options)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    opt.step()
    return [p.detach() for p in parameters]


NORMS = [Lp(math.inf), KSparse(40), KSparse(5), KSupport(5), KSupport(3), Lp(1)]


@pytest.mark.parametrize("inner", NORMS, ids=str)
@pytest.mark.parametrize("least", [-1, -3])
def test_vertices_are_those_of_the_oracle(inner: Any, least: float) -> None:
    g, norm = with_spectrum(40, 64, least), Spectral(inner)
    (found,) = step_of(norm, [g], exact=True)
    torch.testing.assert_close(found, norm.lmo(g), rtol=0, atol=1e-5)


def test_singular_values_far_below_the_largest_count_as_well() -> None:
    g, norm = with_spectrum(40, 64, -3), Spectral(Lp(math.inf))
    (exact,), (products,) = step_of(norm, [g], exact=True), step_of(norm, [g])
    values = torch.linalg.svdvals(exact)
    torch.testing.assert_close(values, torch.ones(40), rtol=0, atol=1e-5)
    assert torch.linalg.svdvals(products).min() < 0.9  # what exact is for
    torch.testing.assert_close(-(exact * g).sum(), norm.dual(g))
    assert norm.dual(g) * 0.99 < -(products * g).sum() < norm.dual(g)


@pytest.mark.parametrize("joint", [False, True])
def test_several_matrices(joint: bool) -> None:
    gradients, norm = [with_spectrum(40, 64, -2), with_spectrum(40, 64, -1).flip(0)], Spectral(KSupport(4))
    expected = norm.lmo([-g for g in gradients]) if joint else [norm.lmo(-g) for g in gradients]
    found = step_of(norm, gradients, joint, exact=True)
    torch.testing.assert_close(found, [-v for v in expected], rtol=0, atol=1e-5)


def test_no_directions_are_kept() -> None:
    p = nn.Parameter(torch.zeros(40, 64))
    opt = SFW([{"params": [p], "ball": NormBall(Spectral(KSupport(3)), 1.0)}], exact=True)
    p.grad = torch.ones_like(p)
    opt.step()
    assert set(opt.state[p]) == {"momentum_buffer"}


def test_states_of_older_versions_are_not_exact() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    opt = SFW([{"params": [p], "ball": NormBall(Spectral(KSupport(1)), 1.0)}])
    state = opt.state_dict()
    for group in state["param_groups"]:
        group.pop("exact")
    opt.load_state_dict(state)
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.param_groups[0]["exact"] is False


@pytest.mark.parametrize("exact", [None, 1, "yes"])
def test_exact_is_true_or_false(exact: Any) -> None:
    with pytest.raises(ValueError, match="exact must be True or False"):
        SFW([nn.Parameter(torch.ones(2, 2))], exact=exact)
