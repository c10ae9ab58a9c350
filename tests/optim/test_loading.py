"""Loading: hooks come first, all checks come before anything changes, and every way of saving goes on as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import pliant
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule, SoftThreshold
from tests.instances import gaussian
from tests.optimizer_cases import assert_equal, assert_same_state, quiet_first_steps

pytestmark = quiet_first_steps

SHAPE = (20, 24)


def made(norm: Norm | None, joint: bool = False, radius: float = 4.0, **options: Any) -> tuple[list[nn.Parameter], SFW]:
    weights = [nn.Parameter(gaussian(SHAPE, i) / 50) for i in range(2)] + [nn.Parameter(gaussian((5,), 3))]
    named = list(zip(["a", "b", "free"], weights, strict=True))
    ball = None if norm is None else NormBall(norm, radius)
    groups = [{"params": named[:2], "ball": ball, "joint": joint}, {"params": named[2:]}]
    return weights, SFW(groups, **{"lr": 0.02, **options})


def go(weights: list[nn.Parameter], opt: SFW, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(weights):
            p.grad = gaussian(tuple(p.shape), 50 + 3 * step + i).to(p.dtype)
        opt.step()


def stepped(norm: Norm | None, **options: Any) -> tuple[list[nn.Parameter], SFW]:
    weights, opt = made(norm, **options)
    go(weights, opt, range(2))
    return weights, opt


# --- what is refused --------------------------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[Norm, Norm, str]] = {
    "p": (Lp(1), Lp(math.inf), r"with p=1, but the group of a has one with p=inf"),
    "p of an inner norm": (Rows(Lp(1)), Rows(Lp(2)), r"with p=1, but .* with p=2"),
    "p of singular values": (Spectral(Lp(1)), Spectral(Lp(math.inf)), r"with p=1, but .* with p=inf"),
    "dim": (Rows(KSparse(2)), Rows(KSparse(2), dim=1), r"with dim=0, but .* with dim=1"),
    "dim of a matrix": (Spectral(KSparse(2)), Spectral(KSparse(2), dim=1), r"with dim=0, but .* with dim=1"),
    "orthogonal": (
        Rows(KSparse(2), orthogonal=True),
        Rows(KSparse(2)),
        r"with orthogonal=True, but .* orthogonal=False",
    ),
    "groups": (Spectral(KSparse(2), groups=2), Spectral(KSparse(2)), r"with groups=2, but .* groups=1"),
    "block size": (Blocks(KSparse(1), 4), Blocks(KSparse(1), 2), r"with size=4, but .* size=2"),
    "block dim": (Blocks(KSparse(1), 4), Blocks(KSparse(1), 4, dim=0), r"with dim=1, but .* dim=0"),
    "channels": (Channels(KSparse(2), 10), Channels(KSparse(2), 20), r"with count=10, but .* count=20"),
    "parts": (Channels(KSparse(2), 10), Channels(KSparse(2), 10, parts=2), r"with parts=1, but .* parts=2"),
    "two of them": (Rows(Lp(1)), Rows(Lp(2), dim=1), r"with p=1, dim=0|with dim=0, p=1"),
    "kind": (Rows(KSparse(2)), Rows(KSupport(2)), r"one of a Rows\(KSparse\) ball, but .* a Rows\(KSupport\) ball"),
    "lift": (Rows(KSparse(2)), Spectral(KSparse(2)), r"Rows\(KSparse\) ball, but .* Spectral\(KSparse\)"),
}


@pytest.mark.parametrize(("saved", "present", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_ball_is_refused_by_what_differs(saved: Norm, present: Norm, message: str) -> None:
    state = stepped(saved)[1].state_dict()
    weights, opt = stepped(present)
    assert_refused(opt, weights, state, message)


def assert_refused(opt: SFW, weights: list[nn.Parameter], state: dict[str, Any], message: str) -> None:
    before, kept = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in weights]
    groups, given = opt.param_groups, copy.deepcopy(state)
    with pytest.raises((ValueError, KeyError), match=message):
        opt.load_state_dict(state)
    assert opt.param_groups is groups
    assert_same_state(opt.state_dict(), before)
    assert_same_state(state, given)
    assert_equal(weights, kept)
    go(weights, opt, range(2, 3))


@pytest.mark.parametrize("joint", [True, False])
def test_one_ball_for_all_is_not_one_for_each(joint: bool) -> None:
    state = stepped(Rows(KSparse(2)), joint=not joint)[1].state_dict()
    weights, opt = stepped(Rows(KSparse(2)), joint=joint)
    assert_refused(opt, weights, state, f"with joint={not joint}, but the group of a has one with joint={joint}")


def wrong_shape(state: dict[str, Any]) -> None:
    state["state"][1]["momentum_buffer"] = torch.zeros(3, 4)


def wrong_option(state: dict[str, Any]) -> None:
    state["param_groups"][0]["rescale"] = "none"


def wrong_decay(state: dict[str, Any]) -> None:
    state["param_groups"][0]["weight_decay"] = 0.1


def no_spec(state: dict[str, Any]) -> None:
    state["param_groups"][0]["ball"] = {"norm": "Rows"}


def too_large_a_k(state: dict[str, Any]) -> None:
    state["param_groups"][0]["ball"]["norm"]["inner"]["k"] = 21


def a_group_less(state: dict[str, Any]) -> None:
    del state["param_groups"][1]


def a_tensor_less(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def no_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


DAMAGES = [wrong_shape, wrong_option, wrong_decay, no_spec, too_large_a_k, a_group_less, a_tensor_less, no_groups]
MESSAGES = ["shape", "rescale", "weight_decay", "spec", "k <= 20", "parameter group", "parameter group", "param_groups"]


@pytest.mark.parametrize(("damage", "message"), [*zip(DAMAGES, MESSAGES, strict=True)])
@pytest.mark.parametrize("by_hook", [False, True])
def test_a_damaged_state_changes_nothing(damage: Callable[..., None], message: str, by_hook: bool) -> None:
    state = copy.deepcopy(stepped(Rows(KSparse(2)))[1].state_dict())
    weights, opt = stepped(Rows(KSparse(2)))
    if by_hook:

        def spoil(opt: Any, given: dict[str, Any]) -> dict[str, Any]:
            spoiled = copy.deepcopy(given)
            damage(spoiled)
            return spoiled

        opt.register_load_state_dict_pre_hook(spoil)
    else:
        damage(state)
    assert_refused(opt, weights, state, message)


@pytest.mark.parametrize(
    ("saved", "present"),
    [
        (KSparse(3), KSparse(50)),
        (Rows(KSupport(2)), Rows(KSupport(20))),
        (Spectral(KSparse(2)), Spectral(KSparse(7))),
        (Blocks(KSupport(1), 4), Blocks(KSupport(4), 4)),
        (Channels(KSparse(1), 10), Channels(KSparse(9), 10)),
    ],
    ids=str,
)
def test_another_k_or_radius_is_what_a_schedule_leaves(saved: Norm, present: Norm) -> None:
    weights, opt = stepped(saved, radius=1.0)
    others, twin = made(present, radius=9.0)
    for p, q in zip(others, weights, strict=True):
        p.data.copy_(q.data)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert twin.param_groups[0]["ball"] == opt.param_groups[0]["ball"]
    go(weights, opt, range(2, 4))
    go(others, twin, range(2, 4))
    assert_equal(weights, others)


# --- hooks ------------------------------------------------------------------------------------------------------------


def other_ids(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Turn ids into names, as some checkpoints have them."""
    groups = [{**group, "params": [f"p{i}" for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {f"p{i}": value for i, value in state["state"].items()}, "param_groups": groups}


def add_a_prefix(opt: Any, state: dict[str, Any]) -> None:
    state["note"] = "changed in place"


def right_ball(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Give a state of another ball the one of the optimizer."""
    balls = [group["ball"] for group in opt.param_groups]
    groups = [{**group, "ball": ball} for group, ball in zip(state["param_groups"], balls, strict=True)]
    return {**state, "param_groups": groups}


def no_directions(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    kept = {i: {key: value for key, value in own.items() if key != "basis"} for i, own in state["state"].items()}
    return {**state, "state": kept}


def groups_in_order(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": state["param_groups"][::-1]}


def of_a_larger_network(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": state["param_groups"][:2]}


HOOKS: list[tuple[Callable[..., Any], Callable[[dict[str, Any]], dict[str, Any]]]] = [
    (other_ids, lambda state: state),
    (add_a_prefix, lambda state: state),
    (right_ball, lambda state: {**state, "param_groups": [{**g, "ball": None} for g in state["param_groups"]]}),
    (groups_in_order, lambda state: {**state, "param_groups": state["param_groups"][::-1]}),
    (of_a_larger_network, lambda s: {**s, "param_groups": [*s["param_groups"], {"params": [9]}]}),
]


@pytest.mark.parametrize(("hook", "stored"), HOOKS)
@pytest.mark.parametrize("norm", [Spectral(KSupport(2)), Rows(KSparse(2))], ids=str)
def test_what_hooks_make_of_a_state_is_what_is_checked_and_loaded(norm: Norm, hook: Any, stored: Any) -> None:
    weights, opt = stepped(norm)
    others, twin = made(norm)
    for p, q in zip(others, weights, strict=True):
        p.data.copy_(q.data)
    calls: list[str] = []
    twin.register_load_state_dict_pre_hook(hook)
    twin.register_load_state_dict_pre_hook(lambda opt, state: calls.append("before"))
    twin.register_load_state_dict_post_hook(lambda opt: calls.append("after"))
    twin.load_state_dict(stored(copy.deepcopy(opt.state_dict())))
    assert calls == ["before", "after"]
    go(weights, opt, range(2, 4))
    go(others, twin, range(2, 4))
    assert_equal(weights, others)


def test_what_a_hook_removed_stays_away() -> None:
    _, opt = stepped(Spectral(KSupport(2)))
    _, twin = made(Spectral(KSupport(2)))
    twin.register_load_state_dict_pre_hook(no_directions)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not any("basis" in state for state in twin.state.values())


def test_a_hook_after_loading_sees_the_state_as_it_will_be_used() -> None:
    weights = [nn.Parameter(gaussian((20, 24)).bfloat16() / 50)]
    group = {"params": weights, "ball": NormBall(Spectral(KSupport(2)), 4.0)}
    opt = SFW([group], lr=0.02)
    weights[0].grad = torch.ones_like(weights[0])
    opt.step()
    seen: list[torch.dtype] = []
    opt.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state[weights[0]]["basis"].dtype))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert seen == [torch.float32] == [opt.state[weights[0]]["basis"].dtype]


def test_hooks_remain_and_can_be_removed_after_an_error() -> None:
    weights, opt = stepped(Rows(KSparse(2)))
    calls: list[int] = []
    handle = opt.register_load_state_dict_pre_hook(lambda opt, state: calls.append(1))
    with pytest.raises(ValueError, match="Rows"):
        opt.load_state_dict(stepped(Lp(2))[1].state_dict())
    with pytest.raises(ValueError, match="groups"):
        opt.load_state_dict({"state": {}, "param_groups": []})
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    handle.remove()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert len(calls) == 3
    assert len(weights) == 3


# --- number formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [None, Rows(KSparse(2)), KSupport(9), Spectral(KSupport(2)), Lp(2)], ids=str)
def test_a_float32_momentum_of_half_precision_weights_stays_one(dtype: torch.dtype, norm: Norm | None) -> None:
    def make() -> tuple[nn.Parameter, SFW]:
        p = nn.Parameter((gaussian(SHAPE) / 50).to(dtype))
        p.grad_dtype = torch.float32
        return p, SFW([{"params": [p], "ball": None if norm is None else NormBall(norm, 4.0)}], lr=0.02)

    def run(p: nn.Parameter, opt: SFW, steps: range) -> None:
        for step in steps:
            p.grad = gaussian(SHAPE, step).float()
            opt.step()

    (p, opt), (q, twin) = make(), make()
    run(p, opt, range(3))
    q.data.copy_(p.data)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert twin.state[q]["momentum_buffer"].dtype == torch.float32
    assert_same_state(opt.state_dict(), twin.state_dict())
    run(p, opt, range(3, 6))
    run(q, twin, range(3, 6))
    assert torch.equal(p, q)


# --- what a state holds -----------------------------------------------------------------------------------------------

STATES: list[tuple[Norm | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"momentum": 0.0}),
    (Lp(2), {"momentum": 0.0}),
    (Rows(KSparse(2)), {"momentum": 0.0}),
    (Spectral(KSupport(2)), {"momentum": 0.0}),
    (Spectral(KSupport(2)), {}),
    (Rows(KSparse(2)), {"joint": True}),
]
every_state = pytest.mark.parametrize(("norm", "options"), STATES, ids=str)


@every_state
def test_states_of_equal_optimizers_are_equal_whatever_was_loaded(norm: Norm | None, options: dict[str, Any]) -> None:
    _, opt = stepped(norm, **options)
    loaded = stepped(norm, **options)[1]
    for _ in range(2):
        loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same_state(loaded.state_dict(), opt.state_dict())
    for each in (opt, loaded):
        each.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    assert_same_state(loaded.state_dict(), opt.state_dict())
    twin = copy.deepcopy(loaded)
    assert_same_state(twin.state_dict(), opt.state_dict())


@every_state
def test_a_state_has_tensors_and_numbers_only(norm: Norm | None, options: dict[str, Any]) -> None:
    _, opt = stepped(norm, **options)
    values = [value for state in opt.state.values() for value in state.values()]
    assert all(isinstance(value, Tensor | int | float) for value in values)
    assert all(p in opt.state for group in opt.param_groups for p in group["params"])


@pytest.mark.parametrize("norm", [Lp(2), Rows(KSparse(2)), Spectral(KSupport(2))], ids=str)
def test_states_of_earlier_versions_without_momentum_go_on(norm: Norm) -> None:
    weights, opt = stepped(norm, momentum=0.0)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["momentum_buffer"] = None
    for group in saved["param_groups"]:
        group["differentiable"] = False
    others, twin = made(norm, momentum=0.0)
    for p, q in zip(others, weights, strict=True):
        p.data.copy_(q.data)
    twin.load_state_dict(saved)
    assert_same_state(twin.state_dict(), opt.state_dict())
    go(weights, opt, range(2, 4))
    go(others, twin, range(2, 4))
    assert_equal(weights, others)


# --- torch.distributed.checkpoint -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A wide and a tall matrix, and biases without a ball."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall = nn.Linear(40, 24), nn.Linear(24, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(torch.tanh(self.wide(x)))


def trained(
    steps: int, momentum: float, preset: pliant.constraints.Preset, done: dict[str, Any] | None = None
) -> tuple[Net, SFW]:
    net = Net()
    opt = SFW(pliant.constrain(net, [("*.weight", preset)], default=None), lr=0.02, momentum=momentum, rescale=None)
    anneal = KSchedule(opt, 1.0, steps=6)
    if done is not None:
        anneal.load_state_dict(done)
    SoftThreshold(opt, 0.1, every=3)
    train(net, opt, range(steps))
    return net, opt


def spans_of(opt: SFW) -> list[Any]:
    courses = [group.get("k_schedule") for group in opt.param_groups]
    return [course and [course["first"], course["last"]] for course in courses]


def train(net: Net, opt: SFW, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        net(gaussian((8, 40), step).float()).square().mean().backward()
        opt.step()


PRESETS = {
    "filters": pliant.filters(k=2, radius=3),
    "rank": pliant.rank(k=2, radius=3),
    "equal rank": pliant.rank(k=2, radius=3, vertices="sparse"),
    "weights": pliant.weights(k=9, radius=3),
    "2:4": pliant.semi_structured(2, 4, 3),
}
every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


@every_preset
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("flat", [True, False])
def test_a_distributed_state_goes_on_also_when_restored_twice(
    preset: pliant.constraints.Preset, momentum: float, flat: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, opt = trained(3, momentum, preset)
    saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
    # Flattened states of spectral balls have as many directions as k: let the optimizer know it first.
    done = {"last_step": 3, "steps": 6, "spans": spans_of(opt)} if flat else None
    other, twin = trained(0, momentum, preset, done)
    other.load_state_dict(net.state_dict())
    for _ in range(2):
        set_optimizer_state_dict(other, twin, copy.deepcopy(saved), options=options)
    assert_same_state(twin.state_dict(), opt.state_dict())
    assert get_optimizer_state_dict(other, twin, options=options).keys() == saved.keys()
    train(net, opt, range(3, 8))
    train(other, twin, range(3, 8))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*assuming the intent is to.*:UserWarning")
def test_a_distributed_checkpoint_on_disk_goes_on(momentum: float, flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, opt = trained(3, momentum, PRESETS["filters"])
    dcp.save(
        {"net": net.state_dict(), "opt": get_optimizer_state_dict(net, opt, options=options)}, checkpoint_id=tmp_path
    )
    other, twin = trained(0, momentum, PRESETS["filters"])
    state = {"net": other.state_dict(), "opt": get_optimizer_state_dict(other, twin, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["net"])
    set_optimizer_state_dict(other, twin, state["opt"], options=options)
    assert_same_state(twin.state_dict(), opt.state_dict())
    train(net, opt, range(3, 8))
    train(other, twin, range(3, 8))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_flattened_state_without_momentum_goes_into_an_optimizer_with_it() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    net, opt = trained(3, 0.0, PRESETS["rank"])
    saved = get_optimizer_state_dict(net, opt, options=options)
    other, twin = trained(1, 0.9, PRESETS["rank"])
    set_optimizer_state_dict(other, twin, saved, options=options)
    assert not any("momentum_buffer" in state for state in twin.state.values())
    train(other, twin, range(3, 5))
