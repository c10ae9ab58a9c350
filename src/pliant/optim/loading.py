"""What happens to a state before and after torch loads it: checks before anything changes, entries, number formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.dtensors import gradient_piece, is_sharded
from pliant.linalg import accumulation_dtype, readable
from pliant.norms import NormBall
from pliant.optim.annealing import COURSE
from pliant.optim.balls import Group, as_ball
from pliant.optim.checks import check_ball_fits, check_options, name_of
from pliant.optim.thresholding import DEBT

State = dict[str, Any]
MAKE_IT = "make the optimizer with the balls that it was saved with"


def after_hooks(hooks: Iterable[Callable[[Any, State], State | None]], optimizer: Any, state_dict: State) -> State:
    """Return what the hooks before loading make of a state, a shallow copy of which they may change."""
    state_dict = state_dict.copy()
    for hook in hooks:
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def check_state(groups: Sequence[Group], defaults: Group, state_dict: State) -> None:
    """Raise ValueError for a state of other tensors, of other balls, or of another number of processes.

    A schedule may have changed k and radius; everything else about a ball must agree.

    Args:
        groups: of the optimizer that is to load the state.
        defaults: its options, for what older states lack.
        state_dict: the state.
    """
    sizes = [[len(g["params"]) for g in side] for side in (groups, state_dict["param_groups"])]
    if sizes[0] != sizes[1]:
        return  # torch refuses these itself, before anything changes
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        if not group["params"]:
            continue
        name, ball = name_of(group["params"][0], group), as_ball(saved.get("ball"))
        _check_kind(group, saved, ball, name)
        # Its lr is what a schedule made of it, and not checked.
        check_options({**defaults, **saved, "lr": 0.0}, ball)
        check_ball_fits(ball, group["params"], joint=saved.get("joint", False))
        for index, p in zip(saved["params"], group["params"], strict=True):
            buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
            if isinstance(buffer, Tensor):
                _check_buffer(buffer, p, name_of(p, group))


def _check_kind(group: Group, saved: Group, ball: NormBall | None, name: str) -> None:
    """Raise ValueError if the saved ball differs from that of a group in more than k and radius."""
    own = as_ball(group["ball"])
    kinds = [_kind(b) for b in (own, ball)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the state is one of {kinds[1]}, but the group of {name} has {kinds[0]}: {MAKE_IT}")
    if ball is None or own is None:
        return
    theirs, ours = (_details(b.norm.to_spec()) for b in (ball, own))
    differing = [key for key in ours if theirs[key] != ours[key]]
    if len(group["params"]) > 1:
        theirs["joint"], ours["joint"] = bool(saved.get("joint", False)), bool(group["joint"])
        differing += ["joint"] if theirs["joint"] != ours["joint"] else []
    if differing:
        there, here = (", ".join(f"{key}={values[key]}" for key in differing) for values in (theirs, ours))
        raise ValueError(
            f"the state is one of {kinds[1]} with {there}, but the group of {name} has one with {here}: {MAKE_IT}"
        )


def _kind(ball: NormBall | None) -> str:
    """Return the names of the norms of a ball."""
    if ball is None:
        return "no ball"
    lift, inner = type(ball.norm).__name__, getattr(ball.norm, "inner", None)
    lift = f"spatial {lift}" if getattr(ball.norm, "spatial", False) else lift
    return f"a {lift} ball" if inner is None else f"a {lift}({type(inner).__name__}) ball"


def _details(spec: State) -> State:
    """Return all parameters in the spec of a norm but k, those of its inner norm included."""
    found = {key: value for key, value in spec.items() if key not in ("k", "norm") and not isinstance(value, dict)}
    for value in spec.values():
        found |= _details(value) if isinstance(value, dict) else {}
    return found


def _check_buffer(buffer: Tensor, p: Tensor, name: str) -> None:
    sharded, module = (is_sharded([buffer]), is_sharded([p])), "torch.distributed.checkpoint.state_dict"
    if sharded == (True, False):
        raise ValueError(
            f"the state of {name} lies on many processes, the parameter does not: save it with {module}."
            "get_optimizer_state_dict and the option full_state_dict=True"
        )
    if buffer.shape != p.shape:
        hint = f", as a state of another number of processes is: save and load with {module}" if any(sharded) else ""
        raise ValueError(f"the state of {name} has shape {tuple(buffer.shape)}, not {tuple(p.shape)}{hint}")
    if sharded == (False, True):
        raise ValueError(
            f"the state of {name} is whole, the parameter lies on many processes: load it with {module}."
            "set_optimizer_state_dict and the option full_state_dict=True"
        )
    if sharded == (True, True) and buffer.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(f"the state of {name} lies on other processes than the parameter: save and load with {module}")


def with_schedules(groups: Sequence[Group], state_dict: State) -> State:
    """Return a state whose groups also have what the optimizer's groups have and states of earlier versions lack.

    What a schedule has counted comes from the state. If the state has none, as of earlier versions, the schedule of the
    optimizer is kept as it is. The strength of a threshold is no state: it stays as it was asked for last.
    """
    if len(groups) != len(state_dict["param_groups"]):
        return state_dict
    merged = []
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        own = {key: group[key] for key in (COURSE, DEBT) if key in group and key not in saved}
        if DEBT in group and DEBT in saved:
            own[DEBT] = {**saved[DEBT], **{name: group[DEBT][name] for name in ("strength", "every")}}
        merged.append({**saved, **own})
    return {**state_dict, "param_groups": merged}


def entries(groups: Sequence[Group], key: str) -> list[Any]:
    """Return what each group has under a key, None if it has nothing there."""
    return [group.get(key) for group in groups]


def keep_formats(groups: Sequence[Group], states: MutableMapping[Tensor, State], state_dict: State) -> None:
    """Give a loaded state the number formats that it was saved in, where torch has cast it to those of the parameters.

    Singular directions keep their own precision, and so does a momentum in float32 of weights in half precision, whose
    gradients are in float32. Entries without a value, which earlier versions and the flattened states of
    torch.distributed.checkpoint have, are dropped.
    """
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    parameters = [(p, group) for group in groups for p in group["params"]]
    for index, (p, group) in zip(saved, parameters, strict=True):
        given, own = state_dict["state"].get(index, {}), states.get(p)
        if own is None:
            continue
        for key, value in given.items():
            if value is None or (isinstance(value, dict) and not value):
                own.pop(key, None)
        if group["momentum"] and "momentum_buffer" not in own:
            del states[p]  # no step has moved it
            continue
        if isinstance(given.get("basis"), Tensor):
            own["basis"] = given["basis"].to(p.device, copy=True)
        if isinstance(given.get("quality"), Tensor):
            own["quality"] = given["quality"].to("cpu", copy=True)
        buffer = given.get("momentum_buffer")
        if isinstance(buffer, Tensor) and p.dtype != accumulation_dtype(p) == buffer.dtype:
            own["momentum_buffer"] = buffer.to(p.device, copy=True)


def only_makes_states(groups: Sequence[Group], states: Mapping[Tensor, Any]) -> bool:
    """Return whether a coming step is the one by which torch.distributed.checkpoint makes the state of an optimizer.

    There is no state yet, every parameter has a gradient, and all gradients and learning rates are 0. Such a step is
    none of the training.
    """
    if states or torch.compiler.is_compiling() or any(group["capturable"] for group in groups):
        return False
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    if not trained or any(p.grad is None or not _has_values(p) for p in trained):
        return False
    if any(float(group["lr"]) != 0 for group in groups):
        return False
    zero = [~gradient_piece(p).any() for p in trained]
    if is_sharded(trained):
        from pliant.dtensors import agreed

        return all(agreed(zero, [True] * len(zero), trained)[0])
    return all(bool(flag) for flag in zero)


def _has_values(p: Tensor) -> bool:
    return readable(p) or is_sharded([p]) or p.device.type not in ("cpu", "meta")
