"""Single weights: exact counts, ties, blocks, and nothing but weights touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import Magnitude, SemiStructured, compress
from pliant.compression.compensation import largest
from pliant.errors import BadInput, Refused


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2), nn.Flatten(), nn.Linear(75, 6)
    )
    return model, torch.randn(2, 4, 6, 6)


def zeros(x: Tensor) -> int:
    return int((x == 0).sum())


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.5, 0.999])
def test_exactly_the_asked_count_is_zero_per_layer_and_globally(ratio: float) -> None:
    model, x = network()
    uniform = compress(model, Magnitude(ratio, "uniform"), x)
    weights = [uniform[i].weight for i in (0, 3, 5)]
    assert [zeros(w) for w in weights] == [round(ratio * w.numel()) for w in weights]
    everything = compress(model, Magnitude(ratio, "global"), x)
    total = sum(w.numel() for w in weights)
    assert sum(zeros(everything[i].weight) for i in (0, 3, 5)) == round(ratio * total)
    plan = Magnitude(ratio, "global").plan(model, x)
    assert plan.ratio_removed == round(ratio * total) / total
    assert plan.params_after == plan.params_before


def test_the_smallest_magnitudes_go_and_the_rest_stays_bitwise() -> None:
    model, x = network()
    small = compress(model, Magnitude(0.6), x)
    for i in (0, 3, 5):
        old, new = model[i].weight, small[i].weight
        gone = new == 0
        assert torch.equal(new[~gone], old[~gone])
        assert old[gone].abs().max() <= old[~gone].abs().min()
        assert torch.equal(small[i].bias, model[i].bias)
    assert torch.equal(small[1].weight, model[1].weight)


def test_global_compares_layers_and_uniform_does_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 17.0).view(4, 4))
        model[1].weight.copy_(-torch.arange(101.0, 117.0).view(4, 4))
    x = torch.randn(2, 4)
    plan = Magnitude(0.5, "global").plan(model, x)
    assert [layer.kept for layer in plan.layers] == [0, 16]
    assert [layer.kept for layer in Magnitude(0.5, "uniform").plan(model, x).layers] == [8, 8]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_ties_keep_the_lower_index(allocation: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.tensor([1.0, -1.0]).repeat(layer.in_features).view_as(layer.weight))
    small = compress(model, Magnitude(0.25, allocation), torch.randn(1, 4))
    kept = torch.cat([layer.weight.flatten() for layer in small]) != 0
    expected = [True] * 9 + [False] * 3 if allocation == "global" else [True] * 6 + [False] * 2 + [True] * 3 + [False]
    assert kept.tolist() == expected


def test_largest_against_a_loop() -> None:
    x = torch.randint(0, 4, (5, 7, 6), generator=torch.Generator().manual_seed(0)).float()
    for count in range(7):
        mask = largest(x, count)
        for row, keep in zip(x.flatten(0, 1), mask.flatten(0, 1), strict=True):
            order = sorted(range(6), key=lambda i: (-float(row[i]), i))[:count]
            assert sorted(order) == keep.nonzero().flatten().tolist()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_every_block_of_input_channels_keeps_its_largest(n: int, m: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    x = torch.randn(2, 16, 6, 6)
    small = compress(model, SemiStructured(n, m), x)
    old, new = model[0].weight, small[0].weight
    for filter_ in range(6):
        for row in range(3):
            for column in range(3):
                for start in range(0, 16, m):
                    before = old[filter_, start : start + m, row, column]
                    after = new[filter_, start : start + m, row, column]
                    keep = before.abs().topk(n).indices
                    assert torch.equal(after.nonzero().flatten(), keep.sort().values)
                    assert torch.equal(after[keep], before[keep])
    rows = small[2].weight.unflatten(1, (-1, m))
    assert ((rows != 0).sum(-1) == n).all()
    plan = SemiStructured(n, m).plan(model, x)
    assert plan.ratio == plan.ratio_removed == 1 - n / m


def test_layers_that_the_pattern_does_not_fit_are_refused_by_name() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.ConvTranspose2d(8, 4, 1)
    )
    plan = SemiStructured().plan(model, torch.randn(1, 3, 2, 2))
    assert [layer.name for layer in plan.layers] == ["1"]
    reasons = dict(plan.refused)
    assert "3 input channels, which 4 does not divide" in reasons["0"]
    assert "2 input channels" in reasons["2"]
    assert "transposed" in reasons["3"]
    with pytest.raises(Refused, match="3 input channels"):
        SemiStructured().plan(nn.Conv2d(3, 8, 1), torch.randn(1, 3, 2, 2))


def test_weights_that_are_not_a_layers_own_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    model[1].weight = model[0].weight
    model.append(nn.Linear(4, 4))
    plan = Magnitude().plan(model, torch.randn(1, 4))
    assert [layer.name for layer in plan.layers] == ["3"]
    assert set(dict(plan.refused)) == {"0", "1", "2"}


@pytest.mark.parametrize("pattern", [(4, 4), (0, 4), (5, 4), (2.0, 4), (True, 4)])
def test_impossible_pattern(pattern: Any) -> None:
    with pytest.raises(BadInput, match="1 <= n < m"):
        SemiStructured(*pattern)


@pytest.mark.parametrize("options", [{"ratio": 1.5}, {"allocation": "locally"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Magnitude(**options)


def test_energy_zeroes_what_holds_the_same_share_in_every_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0, 2, 3, 4]]))  # shares lost: 1/30, 5/30, 14/30, 1
        model[1].weight.copy_(torch.tensor([[10.0], [10], [10], [10]]))  # 1/4, 2/4, 3/4, 1
        model[2].weight.zero_()  # nothing
    x = torch.randn(2, 4)
    for zeroed, expected in {8: [4, 4, 0], 9: [3, 4, 0], 10: [2, 4, 0], 11: [2, 3, 0], 12: [1, 3, 0]}.items():
        plan = Magnitude(zeroed / 16, "energy").plan(model, x)
        assert [layer.kept for layer in plan.layers] == expected
    small = compress(model, Magnitude(10 / 16, "energy"), x)
    assert small[0].weight.tolist() == [[0, 0, 3, 4]]
