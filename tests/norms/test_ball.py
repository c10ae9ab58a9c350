import json
import math

import pytest
import torch

from pliant.norms import KSupport, Lp, Norm, NormBall, Rows
from tests.instances import INSTANCES

every_instance = pytest.mark.parametrize(("norm", "shape"), INSTANCES, ids=str)


@every_instance
def test_ball_scales_the_unit_ball(norm: Norm, shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ball = NormBall(norm, 3.0)
    torch.testing.assert_close(ball.lmo(g), 3 * norm.lmo(g))
    assert ball.diameter(shape) == 3 * norm.diameter(shape)
    assert ball.contains(ball.lmo(g) * (1 - 1e-13))  # the rounding of singular values is a little above 4 units
    assert not ball.contains(1.001 * ball.lmo(g))


@every_instance
def test_scale_inside_is_radial_and_leaves_inner_points_alone(norm: Norm, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outside = NormBall(norm, norm(x).item() / 5)
    shrunk = outside.scale_inside(x)
    assert outside.contains(shrunk)
    torch.testing.assert_close(shrunk * 5, x)
    inside = NormBall(norm, norm(x).item() * 2)
    assert torch.equal(inside.scale_inside(x), x)


@every_instance
def test_gap_is_zero_at_the_vertex_and_positive_elsewhere(norm: Norm, shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ball = NormBall(norm, 2.0)
    v = ball.lmo(g)
    assert ball.gap(v, g).item() == pytest.approx(0, abs=1e-9)
    assert ball.gap(-v, g).item() == pytest.approx(2 * ball.radius * norm.dual(g).item())


def test_joint_methods_take_sequences() -> None:
    ball, parts = NormBall(Rows(KSupport(1)), 1.0), [torch.ones(2, 2), 3 * torch.ones(3, 2)]
    vertices = ball.lmo(parts)
    assert vertices[0].count_nonzero() == 0
    assert vertices[1].count_nonzero() == 2
    assert ball.gap(vertices, parts).item() == pytest.approx(0, abs=1e-5)
    assert not ball.contains(parts)
    assert ball.contains(ball.scale_inside(parts))


def test_spec_survives_json() -> None:
    ball = NormBall(Rows(Lp(math.inf)), 0.1)
    assert NormBall.from_spec(json.loads(json.dumps(ball.to_spec()))) == ball


@pytest.mark.parametrize("radius", [0, -1, math.nan, math.inf])
def test_bad_radius(radius: float) -> None:
    with pytest.raises(ValueError, match="positive, finite radius"):
        NormBall(Lp(2), radius)


@pytest.mark.parametrize("spec", [{}, {"norm": "Lp", "radius": 1}, {"norm": {"norm": "Lp", "p": 2}}, 3])
def test_bad_spec(spec: object) -> None:
    with pytest.raises(ValueError, match="spec"):
        NormBall.from_spec(spec)  # type: ignore[arg-type]


def test_ball_needs_a_norm() -> None:
    with pytest.raises(ValueError, match="needs a norm"):
        NormBall("l2", 1.0)  # type: ignore[arg-type]
