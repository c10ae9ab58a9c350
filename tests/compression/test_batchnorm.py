"""Re-estimated BatchNorm statistics: those of the given batches, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import reestimate_batchnorm
from pliant.errors import BadInput


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 6, 6, generator=generator) + 2, torch.zeros(size)) for _ in range(count)]


def test_statistics_are_those_of_the_batches() -> None:
    model = network()
    new = reestimate_batchnorm(model, batches(3))
    with torch.no_grad():
        seen = [model[0](images) for images, _ in batches(3)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(new[1].running_mean, mean)
    torch.testing.assert_close(new[1].running_var, variance)
    assert int(new[1].num_batches_tracked) == 3


def test_images_alone_will_do() -> None:
    model = network()
    pairs, images = reestimate_batchnorm(model, batches(2)), reestimate_batchnorm(model, [x for x, _ in batches(2)])
    assert torch.equal(pairs[1].running_mean, images[1].running_mean)


def test_all_else_stays() -> None:
    model = network().append(nn.Dropout(0.5)).train()
    model[1].eval()
    model[1].momentum = 0.3
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    new = reestimate_batchnorm(model, batches(2))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p, q) for p, q in zip(new.parameters(), model.parameters(), strict=True))
    assert [m.training for m in new.modules()] == [m.training for m in model.modules()]
    assert new[1].momentum == 0.3
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(new[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("untracked", [False, True])
def test_nothing_to_do_without_statistics(untracked: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    if untracked:
        model.append(nn.BatchNorm2d(4, track_running_stats=False))

    def loader() -> object:
        raise AssertionError("the loader was read")
        yield

    new = reestimate_batchnorm(model, loader())  # type: ignore[arg-type]
    assert new is not model
    assert torch.equal(new[0].weight, model[0].weight)


def test_empty_loader_and_unusable_batches_are_bad_input() -> None:
    with pytest.raises(BadInput, match="empty"):
        reestimate_batchnorm(network(), [])
    with pytest.raises(BadInput, match="batch 1 cannot be run"):
        reestimate_batchnorm(network(), [*batches(1), (torch.randn(2, 5, 6, 6), torch.zeros(2))])
    vectors = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(BadInput, match="more than 1 value"):
        reestimate_batchnorm(vectors, [torch.randn(1, 3)])


def test_dropout_is_off_while_statistics_are_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    batches = [(torch.randn(64, 4), None) for _ in range(3)]
    first, second = (reestimate_batchnorm(model, batches) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    mean = torch.stack([model[0](x).mean(0) for x, _ in batches]).mean(0)
    torch.testing.assert_close(first[2].running_mean, mean)
    assert first[1].p == 0.5
