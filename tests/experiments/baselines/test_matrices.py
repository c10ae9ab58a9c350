"""Weights as matrices, decompositions and polar factors."""

import pytest
import torch
from torch import nn

from pliant import linalg
from pliant.experiments.baselines import matrices as mat
from tests.experiments.baselines.test_baselines import of_singular_values


@pytest.mark.parametrize(
    ("layer", "row_dim", "blocks", "shape"),
    [
        (nn.Linear(5, 4), 0, 1, (1, 4, 5)),
        (nn.Conv2d(6, 4, (2, 3)), 0, 1, (1, 4, 36)),
        (nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last), 0, 1, (1, 4, 54)),
        (nn.Conv2d(6, 4, 3, groups=2), 0, 2, (2, 2, 27)),
        (nn.ConvTranspose2d(6, 4, 3), 1, 1, (1, 4, 54)),
    ],
)
def test_weights_are_read_as_matrices_and_written_back(
    layer: nn.Module, row_dim: int, blocks: int, shape: tuple[int, ...]
) -> None:
    w = layer.weight.detach()
    read = mat.as_matrices(w, row_dim, blocks)
    assert read.shape == shape
    torch.testing.assert_close(read.flatten(0, 1)[1], w.select(row_dim, 1).flatten())
    out = torch.zeros_like(w)
    mat.write_matrices(read, out, row_dim)
    assert torch.equal(out, w)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_decompositions_multiply_to_the_matrix(shape: tuple[int, int]) -> None:
    a = torch.randn(3, *shape)
    u, s, vh = mat.svd(a)
    assert u.shape == (3, shape[0], min(shape))
    torch.testing.assert_close((u * s[:, None]) @ vh, a)
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_iteration_finds_the_polar_factor(shape: tuple[int, int]) -> None:
    a = of_singular_values([1.0, 0.7, 0.5, 0.2, 0.05, 0.004], *shape)[None]
    exact = mat.polar_by_svd(a)
    # The largest error of a singular value from 1/500 of the Frobenius norm upwards is 6e-4.
    assert torch.linalg.matrix_norm(linalg.polar(a) - exact, 2) < 7e-4
    assert 0.1 < torch.linalg.matrix_norm(linalg.polar(a, converging=0) - exact, 2) < 0.32
    torch.testing.assert_close(linalg.polar(1e-3 * a), linalg.polar(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_iteration_can_be_asked_to_stay_inside(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 1.0, 3.0, 8.0):  # powers of ten between the largest and the smallest column
        a = torch.randn(20, 12, 30, generator=generator, dtype=torch.float64)
        a = (a * torch.logspace(0, -spread, 12, dtype=torch.float64)[:, None]).to(dtype)
        values = torch.linalg.svdvals(linalg.polar(a, inside=True))
        assert values.max() <= 1 + 8 * torch.finfo(dtype).eps
        assert values[..., 0].min() > 0.989
        if spread == 0:
            assert values.min() > 0.989
    assert torch.linalg.svdvals(linalg.polar(a)).max() > 1 + 1e-6  # the other steps do not


def test_polar_factors_of_singular_matrices_stay_singular() -> None:
    a = of_singular_values([3.0, 1.0], 5, 4)[None]
    for factor in (linalg.polar(a), mat.polar_by_svd(a)):
        values = torch.linalg.svdvals(factor)[0]
        torch.testing.assert_close(values[:2], torch.ones(2), rtol=0, atol=7e-4)
        assert values[2] < 1e-10
    for factor in (linalg.polar(0 * a), mat.polar_by_svd(0 * a)):
        assert torch.equal(factor, 0 * a)
