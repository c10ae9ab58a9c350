"""Networks that run with some numbers of channels only: the plan keeps such a number and says so, or less leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.compression import Chain, FilterPruning, HeadPruning, LowRank, Plan, compress_to
from pliant.compression.ladder import make_elastic
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES, Body, conv, cut, pooled

RATIOS = (0.2, 0.5, 0.8, 0.97)


class Wide(Body):
    """The first convolution has many channels; subclasses say with how many the network runs."""

    channels = 24

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = conv(3, self.channels), nn.BatchNorm2d(self.channels), conv(self.channels, 12)

    def runs(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.head(pooled(self.b(self.runs(self.middle(x)))))


class Fours(Wide):
    def runs(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (-1, 4)).flatten(1, 2)


class Eights(Wide):
    channels = 20

    def runs(self, h: Tensor) -> Tensor:
        assert h.shape[1] in (8, 16, 20), "tuned kernels"
        return h


class Thirds(Wide):
    def runs(self, h: Tensor) -> Tensor:
        assert h.shape[1] % 3 == 0, "three colours"
        return h


class Powers(Wide):
    channels = 32

    def runs(self, h: Tensor) -> Tensor:
        if h.shape[1] & (h.shape[1] - 1):
            raise ValueError("not a power of two")
        return h


class Several(Wide):
    """A squeeze takes a single channel for something else."""

    def runs(self, h: Tensor) -> Tensor:
        assert h.squeeze().dim() == 4, "no channels"
        return h


class AtLeast(Wide):
    def runs(self, h: Tensor) -> Tensor:
        assert h.shape[1] >= 5
        return h


class Even(Wide):
    """Pairs of channels are swapped back and forth."""

    channels = 18

    def runs(self, h: Tensor) -> Tensor:
        return h.view(len(h), 2, -1, *h.shape[2:]).flatten(1, 2)


CASES: dict[type[Wide], Callable[[int], bool]] = {
    Fours: lambda n: n % 4 == 0,
    Eights: lambda n: n in (8, 16, 20),
    Thirds: lambda n: n % 3 == 0,
    Powers: lambda n: n & (n - 1) == 0,
    Several: lambda n: n > 1,
    AtLeast: lambda n: n >= 5,
    Even: lambda n: n % 2 == 0,
}


def kept(plan: Plan, name: str = "a") -> int:
    return next(layer.kept for layer in plan.layers if layer.name == name)


@pytest.mark.parametrize("kind", CASES)
def test_every_size_runs_and_the_plan_says_what_limits_it(kind: type[Wide]) -> None:
    torch.manual_seed(0)
    model = kind()
    compressor = FilterPruning(allocation="uniform")
    analysis = compressor.analyse(model, IMAGES)
    least = kind.channels
    for ratio in RATIOS:
        plan = compressor.at(ratio).plan(model, IMAGES, analysis=analysis)
        compressor.apply(model, plan)(IMAGES)
        assert CASES[kind](kept(plan))
        assert "keeps" in dict(plan.limited)["a"]
        assert "b" not in dict(plan.limited)
        assert "limited: a: keeps" in str(plan)
        assert Plan.from_dict(plan.to_dict()) == plan
        least = min(least, kept(plan))
    assert least < kind.channels
    cut(model, IMAGES, FilterPruning(0.6, allocation="uniform"))


def test_groups_whose_channels_have_to_agree_together_keep_what_works() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(3, 12), conv(28, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.a(x), self.b(x)], 1)
            if h.shape[1] % 4:
                raise ValueError("fours together")
            return self.head(pooled(self.c(F.relu(h))))

    torch.manual_seed(0)
    model = Joined()
    for ratio in RATIOS:
        plan = FilterPruning(ratio).plan(model, IMAGES)
        FilterPruning(ratio).apply(model, plan)(IMAGES)
        assert (kept(plan, "a") + kept(plan, "b")) % 4 == 0


class OnlyThese(Wide):
    """What the analysis tries works, but the planned number does not."""

    bad: tuple[int, ...] = ()

    def runs(self, h: Tensor) -> Tensor:
        if h.shape[1] in self.bad:
            raise ValueError(f"no kernel for {h.shape[1]}")
        return h


@pytest.mark.parametrize("bad", [(10,), (9, 10, 11), (10, 12, 16)])
def test_a_plan_that_fails_keeps_the_next_number_that_works(bad: tuple[int, ...]) -> None:
    class These(OnlyThese):
        pass

    torch.manual_seed(0)
    model = These()
    compressor = FilterPruning(0.5, allocation="uniform", ratios={"a": 14 / 24})
    assert kept(compressor.plan(model, IMAGES)) == 10
    analysis = compressor.analyse(model, IMAGES)
    These.bad = bad
    plan = compressor.plan(model, IMAGES, analysis=analysis)
    assert kept(plan) not in bad
    assert kept(plan) > 10
    assert dict(plan.limited)["a"] == (
        f"keeps {kept(plan)} channels: with 10, the network cannot run without some of its channels: no kernel for 10"
    )
    compressor.apply(model, plan)(IMAGES)


def test_a_plan_leaves_a_group_whole_if_nothing_smaller_works() -> None:
    class Whole(OnlyThese):
        pass

    model = Whole()
    compressor = FilterPruning(0.5, allocation="uniform")
    analysis = compressor.analyse(model, IMAGES)
    Whole.bad = tuple(range(1, 24))
    plan = compressor.plan(model, IMAGES, analysis=analysis)
    assert kept(plan) == 24
    assert kept(plan, "b") < 12
    assert "keeps 24 channels" in dict(plan.limited)["a"]


def test_heads_leave_in_pairs_where_the_network_wants_it() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = 8, 3
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 24) for _ in range(3))
            self.o_proj = nn.Linear(24, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(2, (-1, 3)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            assert self.num_heads % 2 == 0, "pairs of heads"
            return self.o_proj((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x, model = torch.randn(2, 5, 12), Pairs()
    for ratio in RATIOS:
        plan = HeadPruning(ratio).plan(model, x)
        HeadPruning(ratio).apply(model, plan)(x)
        assert next(layer.kept for layer in plan.layers if layer.name == "q_proj") % 6 == 0
        assert "multiple of 2" in dict(plan.limited)["q_proj"]


@pytest.mark.parametrize("limit", [{"keep_params": 0.5}, {"keep_macs": 0.5}, {"max_bytes": 9_000}])
def test_budgets_meet_sizes_that_run(limit: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = compress_to(Fours(), FilterPruning(), IMAGES, **limit)
    assert small.get_submodule("a").out_channels % 4 == 0
    small(IMAGES)


def test_a_budget_is_met_although_its_best_plan_fails() -> None:
    class Gap(OnlyThese):
        pass

    torch.manual_seed(0)
    model = Gap()
    whole = sum(p.numel() for p in model.parameters())
    first = compress_to(model, FilterPruning(), IMAGES, keep_params=0.5).get_submodule("a").out_channels
    Gap.bad = (first,)
    small = compress_to(model, FilterPruning(), IMAGES, keep_params=0.5)
    assert small.get_submodule("a").out_channels != first
    assert sum(p.numel() for p in small.parameters()) <= whole / 2
    small(IMAGES)


def test_chains_and_elastic_files_go_through_sizes_that_run() -> None:
    torch.manual_seed(0)
    model = Fours()
    chain = Chain(FilterPruning(0.4), LowRank(0.3))
    plan = chain.plan(model, IMAGES)
    assert "a" in dict(plan.limited)
    chain.apply(model, plan)(IMAGES)
    data = [(torch.randn(16, 3, 8, 8), torch.zeros(16)) for _ in range(2)]
    path = make_elastic(model, FilterPruning(), IMAGES, data, ladder=(0.5, 0.2)).path
    for step in path.sizes[:: max(1, len(path.sizes) // 8)]:
        FilterPruning().skeleton(model, path.plan(step))(IMAGES)


def test_networks_that_run_with_any_number_have_no_limits() -> None:
    structure = coupled_channels(Body(), IMAGES)
    assert [group.counts for group in structure.groups] == [None, None]
    assert FilterPruning(0.5).plan(Body(), IMAGES).limited == ()


def test_many_layers_with_the_same_limit_take_few_trials() -> None:
    class Block(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] in (3, 16) or x.shape[1] % 4 == 0, "fours"
            return super().forward(x).relu()

    widths = [3, *([16] * 9)]
    blocks = [Block(conv(a, b)) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*blocks, Block(nn.AdaptiveAvgPool2d(1)), nn.Flatten(), nn.Linear(16, 4))
    plan = FilterPruning(0.6).plan(model, IMAGES)
    assert len(plan.limited) == 9
    assert all("multiple of 4" in reason for _, reason in plan.limited)
    FilterPruning().apply(model, plan)(IMAGES)
