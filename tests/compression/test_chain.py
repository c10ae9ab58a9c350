"""Chains: what one link leaves the next one takes, and the plan replays all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import Chain, FilterPruning, Int8, LowRank, Magnitude, SemiStructured, compress
from pliant.errors import BadInput, Refused
from pliant.experiments.models import build_model

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8", num_classes=5, image_shape=(3, 8, 8), width=0.5).eval()


@torch.no_grad()
def output(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_chain_is_one_compressor_after_the_other() -> None:
    model = network()
    data = [torch.randn(16, 3, 8, 8)]
    chain = Chain(FilterPruning(0.3, importance="l2"), LowRank(0.5))
    by_hand = compress(compress(model, FilterPruning(0.3), X), LowRank(0.5), X, data, refit=False)
    assert torch.equal(output(compress(model, chain, X, data, refit=False)), output(by_hand))
    plan = chain.plan(model, X, analysis=chain.analyse(model, X, data))
    assert [link.compressor for link in plan.links] == ["FilterPruning", "LowRank"]
    assert plan.params_before == size(model) == plan.links[0].params_before
    assert plan.params_after == size(by_hand) == plan.links[1].params_after
    assert plan.links[0].params_after == plan.links[1].params_before
    assert plan.ratio == pytest.approx(0.65)
    assert plan.ratio_removed == pytest.approx(0.65, abs=0.03)


def test_ratio_is_shared_out_in_the_proportions_of_the_links() -> None:
    chain = Chain(FilterPruning(0.19), SemiStructured(), LowRank(0.1))  # log(0.81) = 2·log(0.9)
    assert chain.ratio == pytest.approx(1 - 0.9**3)
    first, fixed, last = chain.at(1 - 0.5**3).links
    assert (first.ratio, last.ratio) == pytest.approx((0.75, 0.5))
    assert fixed == SemiStructured()
    assert [link.ratio for link in chain.at(0.0).links[::2]] == [0, 0]
    again = Chain(FilterPruning(0.0), Chain(LowRank(0.0), Int8()), Magnitude(0.0)).at(1 - 0.3**3)
    assert [getattr(link, "ratio", None) for link in again.links] == pytest.approx([0.7] * 3)
    assert chain.at(chain.ratio).ratio == pytest.approx(chain.ratio)


def test_links_that_find_the_same_network_are_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    calls = []
    analyse = LowRank.analyse
    monkeypatch.setattr(LowRank, "analyse", lambda self, *args: calls.append(self.ratio) or analyse(self, *args))
    analysis = Chain(FilterPruning(0.3), LowRank()).analyse(model, X)
    for ratio in (0.2, 0.5, 0.8):
        chain = Chain(FilterPruning(0.3), LowRank(ratio))
        plan = chain.plan(model, X, analysis=analysis)
        chain.apply(model, plan, analysis=analysis)
    same = Chain(FilterPruning(0.3001), LowRank(0.5))  # asks for more, and removes the same
    same.apply(model, same.plan(model, X, analysis=analysis), analysis=analysis)
    assert calls == [0.2]
    other = Chain(FilterPruning(0.6), LowRank(0.5))
    plan = other.plan(model, X, analysis=analysis)
    assert len(calls) == 2
    assert torch.equal(output(other.apply(model, plan, analysis=analysis)), output(compress(model, other, X)))


@pytest.mark.filterwarnings("ignore:few calibration samples")
def test_whitened_links_see_the_data_through_the_links_before_them() -> None:
    model = network()
    data = [torch.randn(32, 3, 8, 8) * torch.tensor([3.0, 1, 0.1]).view(3, 1, 1)]
    chain = Chain(FilterPruning(0.2), LowRank(0.6))
    small = compress(model, chain, X, data)
    pruned = compress(model, FilterPruning(0.2), X)
    plain = compress(pruned, LowRank(0.6), X)
    errors = [float((output(net, data[0]) - output(pruned, data[0])).square().mean()) for net in (small, plain)]
    assert errors[0] < errors[1]
    analysis = chain.analyse(model, X, data)
    plan = chain.plan(model, X, analysis=analysis)
    assert plan.links[1].options["whiten"] is True
    with pytest.raises(BadInput, match="calibration data"):
        chain.apply(model, plan)


def test_a_link_that_finds_nothing_left_does_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(2, 4)
    plan = Chain(FilterPruning(0.9), LowRank(0.5)).plan(model, x)
    assert plan.links[1].ratio_removed == 0
    assert plan.params_after == plan.links[0].params_after < plan.params_before
    with pytest.raises(Refused, match="FilterPruning finds nothing"):
        Chain(FilterPruning(0.9), LowRank(0.5)).plan(nn.Linear(4, 1), torch.randn(2, 4))


def test_eight_bits_are_the_last_link() -> None:
    model = network()
    small = compress(model, Chain(LowRank(0.5), Int8()), X)
    alone = compress(model, LowRank(0.5), X)
    assert size(small) == size(alone)
    assert any(p.dtype == torch.int8 for p in small.parameters())
    torch.testing.assert_close(output(small), output(alone), rtol=0.05, atol=0.05 * float(output(alone).abs().max()))
    with pytest.raises(Refused, match="forward of its own"):
        compress(model, Chain(Int8(), LowRank(0.5)), X)


def test_a_plan_of_other_links_is_refused() -> None:
    plan = Chain(FilterPruning(0.3), LowRank(0.5)).plan(network(), X)
    with pytest.raises(BadInput, match=r"\['FilterPruning', 'LowRank'\].*\['LowRank'\]"):
        Chain(LowRank(0.5)).apply(network(), plan)


@pytest.mark.parametrize(
    ("links", "message"), [((), "at least one"), ((LowRank(), "rank"), "made of compressors, got 'rank'")]
)
def test_bad_chains(links: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Chain(*links)
    with pytest.raises(BadInput, match="not an iterator"):
        Chain(LowRank()).analyse(network(), X, iter([X]))
    with pytest.raises(BadInput, match="no link of the chain has a ratio"):
        Chain(SemiStructured()).at(0.5)
