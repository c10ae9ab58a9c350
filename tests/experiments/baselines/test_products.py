"""LoRITa and CondLR: weights trained as products of factors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from pliant.experiments.baselines import (
    Composition,
    Conditioned,
    CondLR,
    factorise,
    merged,
)
from pliant.experiments.baselines import matrices as mat
from pliant.experiments.baselines.condlr import condition_, near_mean
from tests.experiments.baselines.test_baselines import of_singular_values

torch.manual_seed(0)  # these layers are made when the file is read, before the seed of a test
LAYERS = [
    (nn.Linear(5, 8), 0, 1),
    (nn.Linear(8, 5), 0, 1),
    (nn.Conv2d(3, 6, 3), 0, 1),
    (nn.Conv2d(4, 6, 3, groups=2), 0, 2),
    (nn.ConvTranspose2d(4, 6, 3), 1, 1),
]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("layer", "row_dim", "blocks"), LAYERS)
def test_loritas_product_starts_as_an_initialisation_and_is_what_is_merged(
    layer: nn.Module, row_dim: int, blocks: int, count: int
) -> None:
    model = nn.Sequential(copy.deepcopy(layer).double())
    before = model[0].weight.detach().clone()
    names = set(model.state_dict())
    factors = factorise(model[0], Composition(before.shape, row_dim, blocks, count=count))
    assert len(factors) == count
    read = mat.as_matrices(before, row_dim, blocks)
    torch.testing.assert_close(
        torch.linalg.svdvals(mat.as_matrices(model[0].weight.detach(), row_dim, blocks)), torch.linalg.svdvals(read)
    )
    with torch.no_grad():
        for _, p in factors:
            p.add_(0.1 * torch.randn_like(p))
    product = factors[0][1]
    for _, p in factors[1:]:
        product = product @ p
    whole = merged(model)
    x = torch.randn(2, layer.in_features) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 5, 5)
    assert torch.equal(whole(x), model(x))
    assert set(whole.state_dict()) == names
    assert type(whole[0]) is type(layer)
    torch.testing.assert_close(mat.as_matrices(whole[0].weight.detach(), row_dim, blocks), product.detach())
    assert len(list(model.parameters())) == count + 1  # merging made a copy


def test_decay_of_two_factors_is_decay_of_the_nuclear_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    target = of_singular_values([3.0, 1.5, 0.4, 0.2], 4, 6)
    factorise(model[0], Composition(target.shape, 0, 1, count=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(800):
        optimizer.zero_grad()
        functional.mse_loss(model[0].weight, target, reduction="sum").mul(0.5).backward()
        optimizer.step()
    # The least of ½‖W − T‖² + 0.5·‖W‖_* soft-thresholds the singular values of T at 0.5.
    values = torch.linalg.svdvals(merged(model)[0].weight.detach())
    torch.testing.assert_close(values, torch.tensor([2.5, 1.0, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_merging_leaves_other_models_and_parametrisations_alone() -> None:
    plain = nn.Sequential(nn.Linear(3, 2))
    assert merged(plain) is plain
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    factorise(normed[1], Composition(torch.Size((2, 2)), 0, 1, count=2))
    assert {name for name in merged(normed).state_dict() if name.startswith("0.")} == {
        name for name in normed.state_dict() if name.startswith("0.")
    }


@pytest.mark.parametrize(("layer", "row_dim", "blocks"), LAYERS)
def test_condlr_keeps_rank_and_condition(layer: nn.Module, row_dim: int, blocks: int) -> None:
    model = nn.Sequential(copy.deepcopy(layer).double())
    shape = model[0].weight.shape
    factors = factorise(model[0], Conditioned(shape, row_dim, blocks, k=2, condition=3.0))
    bias = model[0].bias
    optimizer = CondLR([{"params": factors, "condition": 3.0}, {"params": [("bias", bias)]}], lr=0.1, momentum=0.9)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        values = torch.linalg.svdvals(mat.as_matrices(merged(model)[0].weight.detach(), row_dim, blocks))
        assert (values[:, 0] / values[:, 1]).max() <= 3 + 1e-12
        assert values[:, 2:].max() < 1e-12
    left, _, right = (p for _, p in factors)
    torch.testing.assert_close(left.mT @ left, torch.eye(2).expand(blocks, 2, 2))
    torch.testing.assert_close(right @ right.mT, torch.eye(2).expand(blocks, 2, 2))


def test_condlr_changes_a_well_conditioned_product_no_further() -> None:
    left, core, right = torch.randn(1, 6, 3), torch.randn(1, 3, 3), torch.randn(1, 3, 5)
    product = left @ core @ right
    condition_(left, core, right, condition=1e9)
    torch.testing.assert_close(left @ core @ right, product)


def test_condlr_moves_the_factors_no_further_than_the_step() -> None:
    # LAPACK's Q has columns of its own sign; where one is the other way round, so would be the momentum.
    left, right = (torch.linalg.qr(torch.randn(2, size, 3))[0] * torch.tensor([1.0, -1.0, 1.0]) for size in (6, 5))
    factors = left, 2 * torch.eye(3).repeat(2, 1, 1), right.mT.contiguous()
    for size in (0.0, 1e-3):
        moved = [factor + size * torch.randn_like(factor) for factor in factors]
        condition_(*moved, condition=4.0)
        for now, before in zip(moved, factors, strict=True):
            assert (now - before).norm() < 1e-5 + 20 * size


def test_singular_values_are_clamped_around_their_mean() -> None:
    # Mean 2, t = (3 − 1)/(3 + 1) = ½: the interval [1, 3], whose ends have the ratio 3.
    s = torch.tensor([4.0, 2.5, 1.2, 0.3])
    torch.testing.assert_close(near_mean(s, 3.0), torch.tensor([3.0, 2.5, 1.2, 1.0]))
