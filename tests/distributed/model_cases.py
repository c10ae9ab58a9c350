"""Checks of whole models on many processes: FSDP2, checkpoints, schedules and thresholds."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from benchmarks.costs import Traffic
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import pliant
from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral
from pliant.optim import SFW
from tests.distributed.cases import CASES as CASES
from tests.distributed.cases import Problem, Shape, assert_close, case, cut, raised, whole
from tests.instances import gaussian

# --- whole models -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, wide, tall and single-output layers, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 5, 3)
        self.wide = nn.Linear(5 * 36, 40)
        self.unused = nn.Linear(3, 3)
        self.tall = nn.Linear(40, 60)
        self.last = nn.Linear(60, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.convolution(x)).flatten(1)
        return self.last(torch.tanh(self.tall(torch.tanh(self.wide(x)))))


RULES = [
    ("convolution.weight", pliant.filters(k=2, radius=3)),
    ("wide.weight", pliant.rank(k=3, radius=3)),
    ("tall.weight", pliant.rank(k=3, radius=3)),
    ("unused.weight", pliant.weights(k=3, radius=3)),
    ("last.*", pliant.l2(radius=3)),
]


def make_net(sharded_over: DeviceMesh | None = None, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net().double()
    if sharded_over is not None:
        for layer in (net.convolution, net.wide):
            fully_shard(layer, mesh=sharded_over)
        fully_shard(net, mesh=sharded_over)
    return net


def make_optimizer(net: nn.Module, **options: Any) -> SFW:
    return SFW(pliant.constrain(net, RULES, default=None), **{"lr": 0.02, "check_finite": True, **options})


def batch(step: int) -> tuple[Tensor, Tensor]:
    # More images than directions are kept: beyond the rank of a gradient they would be made of rounding.
    return gaussian((48, 1, 8, 8), 1000 + step), gaussian((48, 1), 2000 + step)


def take_steps(net: nn.Module, opt: SFW, steps: range, part: slice = slice(None), after: Any = None) -> None:
    for step in steps:
        images, targets = batch(step)
        opt.zero_grad()
        nn.functional.mse_loss(net(images[part]), targets[part]).backward()
        opt.step()
        if after is not None:
            after.step()


def own_part(mesh: DeviceMesh) -> slice:
    each = 48 // mesh.size()
    return slice(mesh.get_local_rank() * each, (mesh.get_local_rank() + 1) * each)


# Two trainings drift apart: 3e-9 where measured.
def assert_same_network(net: nn.Module, twin: nn.Module, tolerance: float = 3e-8) -> None:
    for (name, p), (_, q) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        try:
            assert_close(p, q, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@case
def fsdp2_trains_as_one_process_does(mesh: DeviceMesh, folder: Path) -> None:
    one, many = make_net(), make_net(mesh)
    first, second = make_optimizer(one), make_optimizer(many)
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert a["param_names"] == b["param_names"]
        assert a["ball"] == b["ball"]  # the radius is measured on the initialiser's draws, in pieces or not
    schedules = [pliant.KSchedule(opt, start=0.5, steps=4) for opt in (first, second)]
    take_steps(one, first, range(5), after=schedules[0])
    take_steps(many, second, range(5), own_part(mesh), after=schedules[1])
    assert_same_network(many, one)
    assert_close(second.gap(), first.gap(), 1e-6)
    assert many.unused.weight not in second.state
    assert many.last.weight.to_local().shape[0] == (1 if mesh.get_local_rank() == 0 else 0)


@case
def soft_thresholds_are_those_of_one_process(mesh: DeviceMesh, folder: Path) -> None:
    one, many = make_net(), make_net(mesh)
    first, second = (make_optimizer(net, rescale=None) for net in (one, many))
    thresholds = [pliant.SoftThreshold(opt, 0.3, every=2) for opt in (first, second)]
    unused = whole(many.unused.weight).clone()
    take_steps(one, first, range(4), after=thresholds[0])
    take_steps(many, second, range(4), own_part(mesh), after=thresholds[1])
    assert_same_network(many, one, 1e-6)
    assert torch.equal(whole(many.unused.weight), unused)


@case
def weights_changed_by_others_are_brought_inside_on_all_processes(mesh: DeviceMesh, folder: Path) -> None:
    one, many = make_net(), make_net(mesh)
    first, second = make_optimizer(one), make_optimizer(many)
    take_steps(one, first, range(2))
    take_steps(many, second, range(2), own_part(mesh))
    assert all(second.inside().values())
    with torch.no_grad():
        for net in (one, many):
            net.wide.weight.mul_(1e3)
            net.convolution.weight.mul_(1e3)
    assert first.inside() == second.inside()
    assert [name for name, inside in second.inside().items() if not inside] == ["convolution.weight", "wide.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, shrunk = first.bring_inside(), second.bring_inside()
    assert list(shrunk) == list(expected) == ["convolution.weight", "wide.weight"]
    for name, factor in expected.items():
        assert math.isclose(shrunk[name], factor, rel_tol=1e-6), name
    assert all(second.inside().values())
    assert_same_network(many, one, 1e-6)
    with torch.no_grad():
        if mesh.get_local_rank() == 0:
            many.tall.weight.to_local()[0, 0] = math.nan
    assert not second.inside()["tall.weight"]


@case
def a_flattened_state_goes_on_with_its_schedule(mesh: DeviceMesh, folder: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for momentum in (0.0, 0.9):
        net, other = make_net(mesh), make_net(mesh)
        opt, twin = (make_optimizer(each, momentum=momentum, rescale=None) for each in (net, other))
        anneal, again = (pliant.KSchedule(each, start=0.5, steps=6) for each in (opt, twin))
        # Without momentum, such a state does not tell which layers were used: their thresholds and balls may differ.
        thresholds = [pliant.SoftThreshold(each, 0.1, every=3) for each in (opt, twin) if momentum]
        take_steps(net, opt, range(2), own_part(mesh))
        again.load_state_dict(anneal.state_dict())  # first: the state is as large as its k says
        with torch.no_grad():
            for p, q in zip(other.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        for _ in range(2):
            saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
            for key in [key for key in saved if key.startswith("state.unused")]:
                del saved[key]
            set_optimizer_state_dict(other, twin, saved, options=options)
        assert again.state_dict() == anneal.state_dict()
        assert len({str(threshold.state_dict()) for threshold in thresholds}) <= 1
        take_steps(net, opt, range(2, 7), own_part(mesh))
        take_steps(other, twin, range(2, 7), own_part(mesh))
        assert again.last_step == anneal.last_step == 7
        if not momentum:
            del net.unused, other.unused
        assert_same_network(other, net)


@case
def an_optimizer_from_before_goes_on_with_exchanged_parameters(mesh: DeviceMesh, folder: Path) -> None:
    # This is what Accelerate does when it prepares a model and an optimizer for FSDP2.
    one, early = make_net(), make_net()
    opt = make_optimizer(early)
    many = make_net(mesh)
    new = dict(many.named_parameters())
    for group in opt.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    take_steps(one, make_optimizer(one), range(2))
    take_steps(many, opt, range(2), own_part(mesh))
    assert_same_network(many, one)


@case
def pretrained_radii_are_those_of_the_whole_weights(mesh: DeviceMesh, folder: Path) -> None:
    groups = [pliant.constrain(net, RULES, default=None, pretrained=True) for net in (make_net(), make_net(mesh))]
    assert [g["ball"] for g in groups[0]] == [g["ball"] for g in groups[1]]


@case
def ddp_replicas_are_bitwise_equal_and_as_one_process(mesh: DeviceMesh, folder: Path) -> None:
    one, net = make_net(), make_net()
    take_steps(one, make_optimizer(one), range(5))
    # Without find_unused_parameters the layer that is not used would be an error of DDP.
    replica = DistributedDataParallel(net, find_unused_parameters=True)
    take_steps(replica, make_optimizer(net), range(5), own_part(mesh))
    assert_same_network(net, one)
    for p in net.parameters():
        copies = [torch.empty_like(p) for _ in range(mesh.size())]
        dist.all_gather(copies, p.detach())
        assert all(torch.equal(p, q) for q in copies)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, processes: int) -> Path:
    return folder / f"checkpoint-{processes}"


def template(net: Net, opt: SFW, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, opt, options=options)}


@case
def checkpoints_are_written(mesh: DeviceMesh, folder: Path) -> None:
    net = make_net(mesh)
    opt = make_optimizer(net)
    schedule = pliant.KSchedule(opt, start=0.5, steps=20)
    take_steps(net, opt, range(12), own_part(mesh), schedule)  # the directions have been measured
    state = template(net, opt, flat=False)
    dcp.save({**state, "schedule": schedule.state_dict()}, checkpoint_id=checkpoint(folder, mesh.size()))
    full = get_optimizer_state_dict(net, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights = {name: whole(p).clone() for name, p in net.named_parameters()}
    if mesh.get_rank() == 0:
        torch.save({"optimizer": full, "weights": weights}, folder / f"full-{mesh.size()}.pt")
    dist.barrier()


@case
def checkpoints_go_on_with_another_number_of_processes(mesh: DeviceMesh, folder: Path) -> None:
    one = make_net()
    reference = make_optimizer(one)
    schedule = pliant.KSchedule(reference, start=0.5, steps=20)
    take_steps(one, reference, range(16), after=schedule)
    written = [n for n in (1, 2, 3) if (checkpoint(folder, n) / ".metadata").exists()]
    assert mesh.size() in written
    if mesh.size() == 3:
        assert 2 in written  # test_distributed.py starts two processes before three
    for processes in written:
        net = make_net(mesh, seed=1)
        opt = make_optimizer(net)
        anneal = pliant.KSchedule(opt, start=0.5, steps=20)
        schedules = {"schedule": anneal.state_dict()}
        dcp.load(schedules, checkpoint_id=checkpoint(folder, processes))
        anneal.load_state_dict(schedules["schedule"])  # first: the state is as large as its k says
        state = template(net, opt, flat=False)
        # The layer that is not used has no state, but gets one in the template.
        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state, checkpoint_id=checkpoint(folder, processes), planner=planner)
        net.load_state_dict(state["model"])
        set_optimizer_state_dict(net, opt, state["optimizer"])
        take_steps(net, opt, range(12, 16), own_part(mesh), anneal)
        assert_same_network(net, one, 1e-6)  # 3e-7 where measured
        for a, b in zip(reference.param_groups, opt.param_groups, strict=True):
            assert a["ball"] == b["ball"]
        for (name, p), q in zip(one.named_parameters(), net.parameters(), strict=True):
            got, expected = opt.state.get(q, {}), reference.state.get(p, {})
            assert got.get("steps") == expected.get("steps"), name
            assert got.get("iterations") == expected.get("iterations"), name
            if "quality" in expected:
                assert_close(got["quality"], expected["quality"], 1e-5)


@case
def whole_states_go_to_one_process_and_back(mesh: DeviceMesh, folder: Path) -> None:
    one = make_net()
    reference = make_optimizer(one)
    schedule = pliant.KSchedule(reference, start=0.5, steps=20)
    take_steps(one, reference, range(12), after=schedule)
    ball = [copy.deepcopy(g["ball"]) for g in reference.param_groups]
    take_steps(one, reference, range(12, 14))
    for target in (None, mesh):
        saved = torch.load(folder / f"full-{mesh.size()}.pt", weights_only=True)
        net = make_net(target, seed=1)
        with torch.no_grad():
            for name, p in net.named_parameters():
                source = saved["weights"][name]
                p.copy_(source if target is None else cut(source, mesh, [Shard(0)]))
        opt = make_optimizer(net)
        pliant.KSchedule(opt, start=0.5, steps=20)  # the largest ball: what is loaded into it is not scaled inside
        options = StateDictOptions(full_state_dict=True, strict=False)  # not strict: the layer that is not used
        set_optimizer_state_dict(net, opt, saved["optimizer"], options=options)
        assert [g["ball"] for g in opt.param_groups] == ball
        take_steps(net, opt, range(12, 14), slice(None) if target is None else own_part(mesh))
        assert_same_network(net, one, 1e-6)  # 4e-7 where measured


@case
def states_of_another_kind_are_refused_untouched(mesh: DeviceMesh, folder: Path) -> None:
    problem = Problem(Rows(KSupport(2)), [(12, 8), (5, 4)])
    _, one = problem.whole(2)
    parameters, many = problem.pieces(mesh, 2)
    before = [whole(many.state[p]["momentum_buffer"]).clone() for p in parameters]
    message = raised(ValueError, lambda: many.load_state_dict(one.state_dict()))
    assert "set_optimizer_state_dict" in message, message
    whole_parameters, plain = problem.whole(1)
    message = raised(ValueError, lambda: plain.load_state_dict(many.state_dict()))
    assert "full_state_dict=True" in message, message
    local = many.state_dict()
    state = {i: {"momentum_buffer": s["momentum_buffer"].to_local()[:1]} for i, s in local["state"].items()}
    message = raised(ValueError, lambda: many.load_state_dict({**local, "state": state}))
    assert "number of processes" in message, message
    _, other = Problem(Spectral(KSupport(1)), [(12, 8), (5, 4)]).pieces(mesh, 1)
    message = raised(ValueError, lambda: many.load_state_dict(other.state_dict()))
    assert "Spectral" in message, message
    assert "Rows" in message, message
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(whole(many.state[p]["momentum_buffer"]), old)
    assert many.param_groups[0]["ball"]["norm"]["norm"] == "Rows"
    assert len(whole_parameters) == 2


# --- traffic ----------------------------------------------------------------------------------------------------------


def sent_in_a_step(norm: Norm, shape: Shape, mesh: DeviceMesh) -> Traffic:
    """Return what a step sends once weights are inside and directions are kept."""
    problem = Problem(norm, [shape])
    parameters, opt = problem.pieces(mesh, 2, power_iterations=1)
    parameters[0].grad = cut(problem.gradients(2)[0], mesh, [Shard(0)])
    with Traffic() as traffic:
        opt.step()
    assert traffic.sent
    return traffic


@case
def filters_send_one_number_each(mesh: DeviceMesh, folder: Path) -> None:
    for shape in [(48, 20), (20, 4, 3, 3), (50, 7)]:
        for inner in (KSupport(2), KSparse(2), Lp(1)):
            own = math.ceil(shape[0] / mesh.size())
            # One for each of the filters here, and a scale; then a norm of θ − v with its scale.
            assert sent_in_a_step(Rows(inner), shape, mesh).total == own + 1 + 2


@case
def rank_sends_columns_times_directions(mesh: DeviceMesh, folder: Path) -> None:
    k = 3
    for shape in [(24, 200), (200, 24), (60, 60), (20, 4, 3, 3), (24, 900)]:
        rows, columns = shape[0], math.prod(shape[1:])
        norms = 3 if rows <= columns else 4
        traffic = sent_in_a_step(Spectral(KSupport(k)), shape, mesh)
        # Of the k×k triangle of a factorisation; or the k lengths of columns.
        little = min(math.ceil(rows / mesh.size()), k) * k if rows <= columns else k
        assert traffic.total == columns * k + little + 2 * norms


@case
def entries_send_no_entries(mesh: DeviceMesh, folder: Path) -> None:
    for shape in [(48, 20), (100, 100)]:
        counts = 3 * 2**11 + 3 * 2**10  # of float64
        totals = {sent_in_a_step(KSupport(k), shape, mesh).total for k in (1, 50, 500)}
        assert totals == {counts + 1 + 2 + 2 + 2}  # ties; norms of m, of the vertex and of θ − v


@case
def blocks_and_spheres_send_norms(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Blocks(KSupport(2), 4), Lp(2), Spectral(Lp(2))):
        assert sent_in_a_step(norm, (48, 20), mesh).total == 6
