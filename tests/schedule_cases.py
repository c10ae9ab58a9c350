"""An optimizer with schedules, and what the tests of them share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from pliant.norms import Blocks, Channels, KSparse, KSupport, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule, SoftThreshold
from tests.instances import gaussian

NORMS = [
    KSparse(4),
    Rows(KSupport(2)),
    Rows(KSparse(2), orthogonal=True),
    Channels(KSupport(2), 10),
    Spectral(KSparse(2)),
    Spectral(KSupport(2)),
    Blocks(KSparse(1), 4),
]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
STEPS = 6


def fresh(norm: Norm = NORMS[1], **options: Any) -> tuple[list[nn.Parameter], SFW]:
    weights = [nn.Parameter(gaussian((20, 24), 7) / 50), nn.Parameter(gaussian((5,), 8))]
    groups = [{"params": weights[:1], "ball": NormBall(norm, 2.0)}, {"params": weights[1:]}]
    return weights, SFW(groups, **{"lr": 0.05, "rescale": None, "momentum": 0.5, **options})


def scheduled(norm: Norm = NORMS[1], **options: Any) -> tuple[list[nn.Parameter], SFW, KSchedule, SoftThreshold]:
    weights, opt = fresh(norm, **options)
    return weights, opt, KSchedule(opt, 1.0, steps=STEPS), SoftThreshold(opt, 0.1, every=2)


def go(weights: list[nn.Parameter], opt: Any, steps: range, after: tuple[Any, ...] = ()) -> None:
    for step in steps:
        for i, p in enumerate(weights):
            p.grad = gaussian(tuple(p.shape), 100 + 10 * step + i).to(p.dtype)
        opt.step()
        for each in after:
            each.step()


def k_of(opt: SFW, index: int = 0) -> int | None:
    return NormBall.from_spec(opt.param_groups[index]["ball"]).norm.k
