"""Vertices that rather have the rows or channels that the weights have already."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.errors import BadInput
from pliant.experiments.methods import make_optimizer
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule
from pliant.optim.vertices import LEAST
from tests.experiments.test_methods import settings
from tests.instances import gaussian
from tests.optimizer_cases import quiet_first_steps

NORMS = {
    "rows": Rows(KSparse(3)),
    "rows, scaled": Rows(KSupport(3)),
    "rows, orthogonal": Rows(KSparse(3), orthogonal=True),
    "columns": Rows(KSparse(3), dim=1),
    "channels": Channels(KSparse(3), 12),
    "channels in parts": Channels(KSparse(3), 6, parts=2),
    "channels, orthogonal": Channels(KSparse(3), 12, orthogonal=True),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
exponents = pytest.mark.parametrize("persistence", [0.5, 1.0, 2.0])


def vertex(ball: NormBall, weights: list[Tensor], gradients: list[Tensor], persistence: float) -> list[Tensor]:
    """Return where a step of length 1 leads."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    group = {"params": parameters, "ball": ball, "joint": len(parameters) > 1}
    opt = SFW([group], lr=1.0, momentum=0.0, rescale=None, persistence=persistence)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    opt.step()
    return [p.detach() for p in parameters]


@quiet_first_steps
@exponents
@every_norm
def test_a_vertex_is_that_of_the_direction_with_its_parts_multiplied(norm: Any, persistence: float) -> None:
    ball = NormBall(norm, 1.5)
    weights, g = ball.scale_inside(gaussian((12, 16), 1)), gaussian((12, 16), 2)
    split = weights.view(norm.parts, norm.count, -1) if isinstance(norm, Channels) else None
    if split is not None:
        lengths = split.square().sum(dim=(0, 2)).sqrt()
        multiplied = (g.view(split.shape) * ((lengths / lengths.mean()) ** persistence)[:, None]).view(g.shape)
    else:
        lengths = weights.square().sum(dim=1 - norm.dim, keepdim=True).sqrt()
        multiplied = g * (lengths / lengths.mean()) ** persistence
    (reached,) = vertex(ball, [weights], [g], persistence)
    torch.testing.assert_close(reached, ball.lmo(multiplied))
    assert ball.contains(reached)
    assert not torch.allclose(reached, ball.lmo(g))


@quiet_first_steps
def test_channels_of_several_tensors_count_as_one() -> None:
    ball = NormBall(Channels(KSparse(1), 3), 1.0)
    weights = [torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.1, 0.0]]), torch.tensor([0.0, 4.0, 0.1])]
    gradients = [torch.tensor([[1.0, 0.0], [0.1, 0.0], [1.0, 0.0]]), torch.tensor([0.0, 0.9, 1.2])]
    # Lengths of the weights √(9, 17, 0.02), of the gradients √(1, 0.82, 2.44): the products are largest in channel 1.
    matrix, vector = vertex(ball, weights, gradients, 1.0)
    assert [bool(row.any()) for row in matrix] == [bool(x) for x in vector] == [False, True, False]
    matrix, vector = vertex(ball, weights, gradients, 0.0)
    assert [bool(row.any()) for row in matrix] == [bool(x) for x in vector] == [False, False, True]


@quiet_first_steps
def test_rows_of_several_tensors_are_compared_with_each_other() -> None:
    ball = NormBall(Rows(KSparse(1)), 1.0)
    weights = [torch.tensor([[0.1, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])]
    gradients = [torch.tensor([[2.0, 0.0], [0.4, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])]
    first, second = vertex(ball, weights, gradients, 1.0)
    assert not first.any()
    assert second.any()


@quiet_first_steps
def test_what_is_zero_can_come_back() -> None:
    ball = NormBall(Rows(KSparse(1)), 1.0)
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    mean = 2 / 3
    for size, chosen in ((0.9 / LEAST / mean, 0), (1.1 / LEAST / mean, 2)):
        gradient = torch.tensor([[1.0, 0.0], [0.5, 0.0], [size, 0.0]])
        (reached,) = vertex(ball, [weights], [gradient], 1.0)
        assert reached.any(dim=1).nonzero().tolist() == [[chosen]]


@quiet_first_steps
@every_norm
def test_weights_of_one_length_or_of_none_make_no_difference(norm: Any) -> None:
    ball, g = NormBall(norm, 1.5), gaussian((12, 12), 2)
    for weights in (torch.zeros(12, 12, dtype=g.dtype), torch.eye(12, dtype=g.dtype) / 12):
        torch.testing.assert_close(vertex(ball, [weights], [g], 2.0), vertex(ball, [weights], [g], 0.0))


@quiet_first_steps
@every_norm
def test_many_tensors_at_a_time_are_the_same_as_one_by_one(norm: Any) -> None:
    ball, results = NormBall(norm, 1.5), []
    for foreach in (True, False):
        parameters = [nn.Parameter(gaussian((12, 16), i)) for i in range(3)]
        opt = SFW([{"params": parameters, "ball": ball}], lr=0.1, rescale=None, persistence=1.0, foreach=foreach)
        for step in range(4):
            for i, p in enumerate(parameters):
                p.grad = gaussian((12, 16), 10 * step + i)
            opt.step()
        results.append(torch.stack([p.detach() for p in parameters]))
    torch.testing.assert_close(results[0], results[1])


def test_vertices_of_noise_agree_more() -> None:
    """Of gradients that say nothing a third of all rows is chosen at random; with persistence few rows remain."""
    kept = {}
    for persistence in (0.0, 1.0):
        p = nn.Parameter(1e-3 * torch.ones(30, 8, dtype=torch.float64))
        group = {"params": [p], "ball": NormBall(Rows(KSparse(10)), 1.0)}
        opt = SFW([group], lr=0.05, rescale=None, persistence=persistence)
        for step in range(200):
            p.grad = gaussian((30, 8), step)
            opt.step()
        energies = p.detach().square().sum(dim=1).sort(descending=True).values
        kept[persistence] = float(energies[:10].sum() / energies.sum())
    assert kept[1.0] > 0.98  # in ten of thirty rows
    assert kept[0.0] < 0.9  # 0.8 measured


@quiet_first_steps
def test_a_schedule_of_k_goes_with_it() -> None:
    p = nn.Parameter(gaussian((10, 4), 1))
    opt = SFW([{"params": [p], "ball": NormBall(Rows(KSparse(2)), 1.0)}], lr=1.0, rescale=None, persistence=1.0)
    schedule = KSchedule(opt, 1.0, steps=2)
    chosen = []
    for step in range(3):
        p.grad = gaussian((10, 4), step)
        opt.step()
        schedule.step()
        chosen.append(int(p.detach().any(dim=1).sum()))
    assert chosen == [10, 6, 2]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    p = nn.Parameter(torch.ones(4, 8))
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="persistence must be >= 0, got"):
            SFW([p], persistence=value)
    for norm in (Lp(1), KSparse(2), Spectral(KSparse(2)), Blocks(KSparse(2), 4)):
        with pytest.raises(ValueError, match=r"persistence=1\.0 is for balls of rows or channels"):
            SFW([{"params": [p], "ball": NormBall(norm, 1.0)}], rescale=None, persistence=1.0)
    with pytest.raises(ValueError, match="persistence needs rescale=None, got 'gradient'"):
        SFW([{"params": [p], "ball": NormBall(Rows(KSparse(2)), 1.0)}], persistence=1.0)
    opt = SFW([{"params": [p], "ball": NormBall(Rows(KSparse(2)), 1.0)}], rescale=None, persistence=1.0)
    with pytest.raises(ValueError, match="rows or channels"):
        opt.set_ball(opt.param_groups[0], NormBall(KSparse(2), 1.0))


def test_the_method_has_it_where_the_steps_are_convex() -> None:
    model = pliant.build_model("resnet8", num_classes=10, image_shape=(1, 8, 8), width=0.25)
    for given, expected in (({}, 1.0), ({"persistence": 0.5}, 0.5), ({"recipe": "paper"}, 0.0)):
        chosen = dataclasses.replace(settings("sfw-filters", **given), lr=0.1)
        opt = make_optimizer(copy.deepcopy(model), chosen, torch.zeros(2, 1, 8, 8))
        assert {g["persistence"] for g in opt.param_groups if g["ball"] is not None} == {expected}
    with pytest.raises(BadInput, match="--persistence of --method sfw-filters needs --rescale none"):
        settings("sfw-filters", recipe="paper", persistence=1.0)
    with pytest.raises(BadInput, match="--persistence is not a setting of --method sfw-rank"):
        settings("sfw-rank", persistence=1.0)
