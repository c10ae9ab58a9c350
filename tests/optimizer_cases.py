"""The kinds of balls and options that the contract of an optimizer is tested with, and what these tests share."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.norms import Blocks, KSparse, KSupport, Lp, NormBall, Rows, Spectral
from pliant.optim import SFW
from tests.instances import gaussian

# Some of these balls are smaller than the weights: the warning about that has its own tests.
quiet_first_steps = pytest.mark.filterwarnings("ignore:.*started outside of their balls.*:UserWarning")


@dataclass(frozen=True)
class Case:
    """A ball for three weights, two of them of one shape, and options of the optimizer."""

    ball: NormBall | None
    options: dict[str, Any] = field(default_factory=dict)
    joint: bool = False


CASES = {
    "no ball": Case(None),
    "no ball, decay": Case(None, {"weight_decay": 0.1, "momentum": 0.0}),
    "no ball, dampening": Case(None, {"weight_decay": 0.1, "dampening": 0.5}),
    "l2, fast-gradient": Case(NormBall(Lp(2), 3.0), {"rescale": "fast-gradient"}),
    "signs, no rescale": Case(NormBall(Lp(math.inf), 0.5), {"rescale": None}),
    "entries": Case(NormBall(KSupport(5), 4.0)),
    "entries, no momentum": Case(NormBall(KSparse(5), 2.0), {"momentum": 0.0}),
    "filters": Case(NormBall(Rows(KSupport(2)), 4.0)),
    "filters, persistence": Case(NormBall(Rows(KSparse(3)), 2.0), {"rescale": None, "persistence": 1.0}),
    "group lasso, diameter": Case(NormBall(Rows(Lp(1)), 6.0), {"rescale": "diameter"}),
    "2:4": Case(NormBall(Blocks(KSupport(2), 4), 4.0)),
    "low rank": Case(NormBall(Spectral(KSupport(2)), 4.0), {"power_iterations": 1}),
    "low rank, equal lengths": Case(NormBall(Spectral(KSparse(2)), 3.0), {"dampening": 0.5}),
    "operator norm": Case(NormBall(Spectral(Lp(math.inf)), 2.0), {"rescale": None}),
    "filters of all layers": Case(NormBall(Rows(KSupport(3)), 8.0), joint=True),
    "low rank of all layers": Case(NormBall(Spectral(KSupport(3)), 8.0), joint=True),
}
SOME = ["no ball", "entries", "filters", "2:4", "low rank", "filters of all layers"]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# The singular directions of large matrices are approximate at first: they start from random ones, which depend on the
# number format and on the order in memory.
exact = {name: case for name, case in CASES.items() if "low rank" not in name}
separate = {name: case for name, case in CASES.items() if not case.joint}
exact_cases = pytest.mark.parametrize("case", exact.values(), ids=exact)
separate_cases = pytest.mark.parametrize("case", separate.values(), ids=separate)
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)
devices = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])

# Two weights of one shape, large enough that singular directions are kept from step to step; a bias is in no ball.
SHAPES = [(8, 24), (20, 4, 3, 3), (20, 4, 3, 3), (6,)]
NAMES = ["dense.weight", "first.weight", "second.weight", "dense.bias"]


def weights(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(0.1 * gaussian(s, i, dtype).to(device)) for i, s in enumerate(SHAPES)]


def copies(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]


def groups(parameters: list[Any], case: Case) -> list[dict[str, Any]]:
    return [{"params": parameters[:3], "ball": case.ball, "joint": case.joint}, {"params": parameters[3:]}]


def optimizer(parameters: list[Any], case: Case, **options: Any) -> SFW:
    return SFW(groups(parameters, case), **{"lr": 0.05, **case.options, **options})


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(parameters):
        p.grad = gaussian(tuple(p.shape), 100 + 10 * step + i).to(p.device, p.dtype)


def run(opt: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> list[nn.Parameter]:
    for step in steps:
        give_gradients(parameters, step)
        opt.step()
    return parameters


def train(case: Case, steps: int = 4, **options: Any) -> list[nn.Parameter]:
    parameters = weights()
    return run(optimizer(parameters, case, **options), parameters, range(steps))


def assert_equal(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)


def leaves(state: Any) -> list[Any]:
    """Return all values in plain data of dicts and lists, in order, with their keys."""
    if isinstance(state, dict):
        return [leaf for key, value in state.items() for leaf in (key, *leaves(value))]
    if isinstance(state, list | tuple):
        return [leaf for value in state for leaf in leaves(value)]
    return [state]


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    ours, theirs = leaves(first), leaves(second)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (torch.equal(a, b) and a.dtype == b.dtype) if isinstance(a, Tensor) else a == b


def assert_close(first: list[Any], second: list[Any], **tolerances: float) -> None:
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerances)


def objective(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([(p - 1).square().sum() for p in parameters]).sum()
