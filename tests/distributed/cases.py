"""What several processes are asked to show, each a function of the mesh that raises if it is not so.

``worker.py`` calls all of them in each of its processes; ``test_distributed.py`` makes a test of each.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral, VectorNorm
from pliant.optim import RESCALES, SFW, kept_directions
from pliant.optim.kept_directions import leading_vertices
from pliant.optim.momentum import direction
from pliant.optim.oracle import State
from pliant.optim.sharded import Sharded
from pliant.optim.vertices import unit_vertices
from tests.instances import gaussian

Check = Callable[[DeviceMesh, Path], None]
Shape = tuple[int, ...]
CASES: dict[str, Check] = {}


def case(check: Check) -> Check:
    CASES[check.__name__.replace("_", " ")] = check
    return check


# --- one and many processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Tensors with balls, and the options of the optimizer."""

    norm: Norm | None
    shapes: Sequence[Shape]
    joint: bool = False
    radius: float = 3.0
    options: tuple[tuple[str, Any], ...] = ()
    without_gradient: Sequence[int] = ()
    size: float = 1.0
    dtype: torch.dtype = torch.float64
    dim: int = 0

    def weights(self) -> list[Tensor]:
        return [0.1 * gaussian(shape, i).to(self.dtype) for i, shape in enumerate(self.shapes)]

    def gradients(self, step: int) -> list[Tensor | None]:
        return [
            None if i in self.without_gradient else (self.size * gaussian(shape, 100 * step + i + 50)).to(self.dtype)
            for i, shape in enumerate(self.shapes)
        ]

    def optimizer(self, parameters: list[Any], **options: Any) -> SFW:
        ball = None if self.norm is None else NormBall(self.norm, self.radius)
        group = {"params": parameters, "ball": ball, "joint": self.joint}
        return SFW([group], **{"lr": 0.05, **dict(self.options), **options})

    def whole(self, steps: int, **options: Any) -> tuple[list[nn.Parameter], SFW]:
        parameters = [nn.Parameter(w) for w in self.weights()]
        opt = self.optimizer(parameters, **options)
        for step in range(steps):
            for p, g in zip(parameters, self.gradients(step), strict=True):
                p.grad = g
            opt.step()
        return parameters, opt

    def pieces(self, mesh: DeviceMesh, steps: int, **options: Any) -> tuple[list[nn.Parameter], SFW]:
        placed = [Shard(self.dim)]
        parameters = [nn.Parameter(cut(w, mesh, placed)) for w in self.weights()]
        opt = self.optimizer(parameters, **options)
        for step in range(steps):
            for p, g in zip(parameters, self.gradients(step), strict=True):
                p.grad = None if g is None else cut(g, mesh, placed)
            opt.step()
        return parameters, opt

    def check(self, mesh: DeviceMesh, steps: int, tolerance: float, **options: Any) -> tuple[SFW, SFW]:
        """Assert that many processes take the steps of one."""
        (expected, one), (got, many) = self.whole(steps, **options), self.pieces(mesh, steps, **options)
        for p, q in zip(expected, got, strict=True):
            assert_close(q, p, tolerance)
        # The gap is a difference: 0 where weights have come to a vertex.
        size = sum(
            self.radius * direction(p, one.state[p], one.param_groups[0]).norm() for p in expected if p in one.state
        )
        assert (many.gap() - one.gap()).abs() <= 10 * tolerance * size
        for p, q in zip(expected, got, strict=True):
            buffer = many.state[q].get("momentum_buffer") if q in many.state else None
            if buffer is not None:
                assert isinstance(buffer, DTensor)
                assert buffer.placements == q.placements
                assert_close(buffer, one.state[p]["momentum_buffer"], tolerance)
        return one, many


def cut(x: Tensor, mesh: DeviceMesh, placed: Sequence[Placement]) -> DTensor:
    """Return the DTensor of a tensor that all processes have: nothing is sent."""
    return distribute_tensor(x, mesh, placed, src_data_rank=None)


def whole(x: Tensor) -> Tensor:
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = relative_error(got, expected)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = whole(got).double(), whole(expected).double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


VECTOR_NORMS: list[VectorNorm] = [KSupport(2), KSparse(2), Lp(1), Lp(1.5), Lp(2), Lp(math.inf)]
# Over two processes the pieces of 12, 7 and 1 rows are even, uneven and empty; over three, those of 12, 20 and 2.
SHAPES: list[Shape] = [(12, 8), (20, 4, 3, 3), (2, 12), (1, 8), (7,)]
MATRICES: list[Shape] = [(20, 4, 3, 3), (50, 20), (17, 17), (2, 40), (1, 6)]
EXACT, SPECTRAL = 1e-12, 1e-10


def steps_of_one_process(norms: Sequence[Norm], shapes: Sequence[Shape], tolerance: float) -> Check:
    def check(mesh: DeviceMesh, folder: Path) -> None:
        for norm in norms:
            for rescale in RESCALES:
                fitting = [s for s in shapes if fits(norm, s)]
                assert fitting
                problem = Problem(norm, fitting, options=(("rescale", rescale),))
                problem.check(mesh, 5 if rescale == "gradient" else 2, tolerance)

    return check


def fits(norm: Norm, shape: Shape) -> bool:
    try:
        norm.length(shape)
    except ValueError:
        return False
    return True


for inner in VECTOR_NORMS:
    CASES[f"rows, {inner}"] = steps_of_one_process([Rows(inner)], SHAPES, EXACT)
    CASES[f"entries, {inner}"] = steps_of_one_process([inner], SHAPES, EXACT)
    CASES[f"spectral, {inner}"] = steps_of_one_process([Spectral(inner)], MATRICES, SPECTRAL)
    CASES[f"blocks, {inner}"] = steps_of_one_process([Blocks(inner, 4)], SHAPES[:-1], EXACT)
CASES["rows, another layout"] = steps_of_one_process([Rows(KSupport(2), dim=1)], [(12, 8), (5, 4), (1, 8)], EXACT)
CASES["spectral, another layout"] = steps_of_one_process([Spectral(KSupport(2), dim=1)], [(24, 36), (20, 4)], EXACT)
CASES["spectral, grouped"] = steps_of_one_process([Spectral(KSupport(3), groups=2)], [(40, 30), (6, 30)], EXACT)
CASES["blocks along rows"] = steps_of_one_process([Blocks(KSupport(2), 4, 0)], [(12, 3), (4, 2), (24, 5)], EXACT)
CASES["spectral, spatial"] = steps_of_one_process([Spectral(KSupport(3), spatial=True)], [(20, 24, 3, 2)], EXACT)
CASES["full rank"] = steps_of_one_process([Spectral(KSupport(20))], [(20, 30)], EXACT)
CASES["full rank, by products"] = steps_of_one_process([Spectral(Lp(math.inf))], [(40, 48)], SPECTRAL)
CASES["rows, orthogonal"] = steps_of_one_process([Rows(KSparse(2), orthogonal=True)], SHAPES, EXACT)
CASES["channels"] = steps_of_one_process([Channels(KSupport(2), 4, parts=3)], [(24, 5), (12, 3, 2)], EXACT)


@case
def no_ball_takes_the_steps_of_sgd(mesh: DeviceMesh, folder: Path) -> None:
    shapes = [(12, 8), (5, 3), (1, 4), (7,)]
    for options in ({}, {"momentum": 0.0, "weight_decay": 0.1}, {"lr": torch.tensor(0.05), "maximize": True}):
        for foreach in (None, False):
            Problem(None, shapes, without_gradient=[1]).check(mesh, 3, EXACT, **options, foreach=foreach)


@case
def joint_balls(mesh: DeviceMesh, folder: Path) -> None:
    wide_tall_small = [(24, 36), (50, 20), (2, 40), (20, 2, 3, 3)]
    for norm in (KSupport(40), KSparse(40), Lp(2), Lp(1), Lp(3), Blocks(KSupport(2), 2)):
        Problem(norm, wide_tall_small, True).check(mesh, 2, EXACT)
    for norm in (Spectral(KSupport(5)), Spectral(KSparse(5))):
        Problem(norm, wide_tall_small, True).check(mesh, 5, SPECTRAL)
    for rescale in RESCALES:
        options = (("rescale", rescale),)
        Problem(Rows(KSupport(5)), wide_tall_small, True, options=options).check(mesh, 3, EXACT)
        for coupled in (Channels(KSupport(3), 12), Channels(KSparse(3), 12, orthogonal=True)):
            Problem(coupled, [(12, 5, 3, 3), (12,), (24, 2), (12,)], True, options=options).check(mesh, 3, EXACT)


@case
def persistence(mesh: DeviceMesh, folder: Path) -> None:
    options = (("rescale", None), ("persistence", 1.0))
    shapes = [(12, 5, 3, 3), (12,), (24, 2), (12,)]
    for norm in (Rows(KSupport(5)), Rows(KSparse(5)), Rows(KSparse(5), orthogonal=True)):
        Problem(norm, [(24, 36), (50, 20), (2, 40)], True, options=options).check(mesh, 3, EXACT)
    for norm in (Rows(KSparse(2)), Rows(KSparse(2), dim=1), Rows(KSparse(2), orthogonal=True)):
        Problem(norm, [(24, 36), (5, 4)], options=options).check(mesh, 3, EXACT)
    for coupled in (Channels(KSupport(3), 12), Channels(KSparse(3), 12), Channels(KSparse(3), 12, orthogonal=True)):
        Problem(coupled, shapes, True, options=options).check(mesh, 3, EXACT)


@case
def parameters_without_gradient(mesh: DeviceMesh, folder: Path) -> None:
    shapes = [(12, 8), (5, 4), (1, 8)]
    for norm in (Rows(KSupport(1)), KSupport(2), Spectral(KSupport(1)), Blocks(KSupport(2), 4)):
        for joint in (False, True):
            for missing in ([1], [0, 2], [0, 1, 2]):
                Problem(norm, shapes, joint, without_gradient=missing).check(mesh, 3, EXACT)


@case
def zero_gradients_leave_weights_as_they_are(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Rows(KSupport(1)), KSupport(2), KSparse(2), Spectral(KSupport(1)), Blocks(KSupport(2), 4), Lp(2)):
        problem = Problem(norm, [(20, 20), (1, 8)], radius=100.0, size=0.0)
        for rescale in RESCALES:
            parameters, _ = problem.pieces(mesh, 1, rescale=rescale)
            for p, start in zip(parameters, problem.weights(), strict=True):
                assert torch.equal(whole(p), start)


@case
def options_of_the_optimizer(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Rows(KSupport(2)), KSupport(9), Spectral(KSupport(2))):
        for options in (
            {"momentum": 0.0},
            {"dampening": 0.5},
            {"maximize": True},
            {"lr": torch.tensor(0.05)},
            {"foreach": False},
            {"power_iterations": 2},
        ):
            Problem(norm, [(24, 36), (5, 4)]).check(mesh, 2, SPECTRAL, **options)


@case
def float32_on_many_processes(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Rows(KSupport(2)), KSupport(9), KSparse(9), Blocks(KSupport(2), 4), Spectral(KSupport(2))):
        steps = 1 if isinstance(norm, Spectral) else 3  # for more of them see the next case
        for size in (1.0, 2.0**100, 2.0**-100):
            # A step is a fraction of the radius whatever the gradient; 2^±100 would not fit into a square.
            problem = Problem(norm, [(20, 4, 3, 3), (2, 8)], dtype=torch.float32, size=size)
            expected, one = problem.whole(steps, rescale=None)
            got, many = problem.pieces(mesh, steps, rescale=None)
            for p, q in zip(expected, got, strict=True):
                assert_close(q, p, 1e-6)
            assert_close(many.gap(), one.gap(), 1e-5)


@case
def spectral_steps_in_float32_are_as_exact_as_those_of_one_process(mesh: DeviceMesh, folder: Path) -> None:
    # One process is itself up to 2e-6 away from the steps in float64 here, and a change of its gradients by a unit in
    # the last place moves it as far: directions that are kept from an unrelated gradient magnify rounding. So two
    # results in float32 cannot agree to 1e-6. What can be asked is that pieces cost no accuracy: 0.2 to 2.1 times the
    # distance of one process where measured. (An orthonormal basis by way of the Gram matrix: 3 to 26 times.)
    for shape in [(20, 4, 3, 3), (50, 20), (64, 48), (96, 200)]:
        for norm in (Spectral(KSupport(2)), Spectral(KSparse(2))):
            for steps, lr in ((1, 1.0), (3, 0.05)):  # the vertex, and steps from kept directions
                problem = Problem(norm, [shape], dtype=torch.float32)
                exact = in_float64(problem, steps, lr)
                (one,), _ = problem.whole(steps, rescale=None, lr=lr)
                (many,), _ = problem.pieces(mesh, steps, rescale=None, lr=lr)
                assert relative_error(many, exact) <= 4 * relative_error(one, exact), f"{shape}, {norm}, {steps} steps"


def in_float64(problem: Problem, steps: int, lr: float) -> Tensor:
    """Return the only weight after steps of one process in float64, from the numbers that float32 starts from."""
    drawn = kept_directions.starting_directions

    def same_start(blocks: Sequence[Tensor], size: int) -> list[Tensor]:
        return [z.double() for z in drawn([a.float() for a in blocks], size)]

    p = nn.Parameter(problem.weights()[0].double())
    opt = problem.optimizer([p], rescale=None, lr=lr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_directions, "starting_directions", same_start)
        for step in range(steps):
            p.grad = problem.gradients(step)[0].double()
            opt.step()
    return p


@case
def half_precision_stays_inside(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Rows(KSupport(2)), KSupport(9), Spectral(KSupport(2)), Lp(2)):
        problem = Problem(norm, [(24, 36), (5, 4)], radius=0.3, dtype=torch.bfloat16)
        expected, _ = problem.whole(5)
        got, _ = problem.pieces(mesh, 5)
        for p, q in zip(expected, got, strict=True):
            assert_close(q, p, 2e-2)  # two units of bf16: a rounding may fall to the other side
            assert NormBall(norm, 0.3).contains(whole(q))


@case
def equal_entries_leave_exactly_k(mesh: DeviceMesh, folder: Path) -> None:
    # Few values, so that the k-th largest has many equals, in several pieces and tensors: the same ones are chosen.
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 5), (5, 3), (1, 4), (7,)]
    tensors = [torch.randint(-2, 3, s, generator=generator).double() for s in shapes]
    pieces = [cut(x, mesh, [Shard(0)]) for x in tensors]
    oracle = Sharded(pieces, list("abcd"))
    for k in (1, 2, 10, 30, 41, 56):
        for norm in (KSparse(k), KSupport(k), Lp(1)):
            _, expected = unit_vertices(norm, [x[None] for x in tensors])
            _, got = oracle.vertices(norm, [x.to_local()[None] for x in pieces])
            for e, v, x in zip(expected, got, pieces, strict=True):
                piece = cut((e.factor * e.carrier)[0], mesh, [Shard(0)]).to_local()
                torch.testing.assert_close((v.factor * v.carrier)[0], piece, rtol=1e-12, atol=0)
                assert v.carrier.shape[1:] == x.to_local().shape


@case
def short_ways_find_the_vertices_of_the_whole_tensor(mesh: DeviceMesh, folder: Path) -> None:
    lifts = [*VECTOR_NORMS, *map(Rows, VECTOR_NORMS), *(Blocks(v, 4) for v in VECTOR_NORMS), Spectral(Lp(2))]
    for norm in [*lifts, Channels(KSupport(1), 4)]:
        for shape in [(12, 8), (20, 4, 3, 3), (4, 8)]:
            for x in (gaussian(shape), torch.zeros(shape, dtype=torch.float64)):
                x = cut(x, mesh, [Shard(0)])
                oracle = Sharded([x], ["x"])
                (length, (got,)), (expected_length, (expected,)) = (
                    way(norm, [x.to_local()[None]]) for way in (oracle.vertices, oracle.whole_vertices)
                )
                torch.testing.assert_close(length, expected_length, rtol=1e-12, atol=0)
                torch.testing.assert_close(
                    got.factor * got.carrier, expected.factor * expected.carrier, rtol=1e-12, atol=1e-15
                )


@case
def singular_directions_are_those_of_the_whole_tensor(mesh: DeviceMesh, folder: Path) -> None:
    for shapes in ([(24, 36)], [(50, 20)], [(24, 36), (50, 20), (3, 40)]):
        for norm in (Spectral(KSupport(3)), Spectral(KSparse(3)), Spectral(Lp(1))):
            low = [gaussian(s, i).flatten(1) * torch.linspace(1, 0.1, s[1]) ** 2 for i, s in enumerate(shapes)]
            tensors = [*low[:-1], low[-1] * 0] if len(low) > 1 else low
            oracle = Sharded([cut(x, mesh, [Shard(0)]) for x in tensors], ["x"] * len(tensors))
            pieces = [cut(x, mesh, [Shard(0)]).to_local()[None] for x in tensors]
            expected, basis, value = leading_vertices(norm, [x[None] for x in tensors], None, 6)
            got, kept, got_value = oracle.leading_vertices(norm, pieces, None, 6)
            states: list[State] = [{} for _ in tensors]
            torch.testing.assert_close(got_value, value, rtol=1e-9, atol=0)
            for _ in range(2):  # from the kept directions on
                expected, basis, value = leading_vertices(norm, [x[None] for x in tensors], basis, 2)
                oracle.keep_basis(norm, kept, [states])
                got, kept, got_value = oracle.leading_vertices(norm, pieces, oracle.basis(norm, [states]), 2)
            torch.testing.assert_close(got_value, value, rtol=1e-9, atol=0)
            for v, e in zip(got, expected, strict=True):
                whole_piece = cut((e.factor * e.carrier)[0], mesh, [Shard(0)]).to_local()
                torch.testing.assert_close((v.factor * v.carrier)[0], whole_piece, rtol=0, atol=1e-6)


@case
def the_quality_of_directions_is_measured_alike(mesh: DeviceMesh, folder: Path) -> None:
    problem = Problem(Spectral(KSupport(10)), [(40, 60), (70, 40)])
    with pytest.MonkeyPatch.context() as patch:  # twice in eight steps
        patch.setattr(kept_directions, "MEASURE_AT", 2)
        patch.setattr(kept_directions, "MEASURE_EVERY", 4)
        one, many = problem.check(mesh, 8, 1e-6, momentum=0.0)
    for a, b in zip(one.state.values(), many.state.values(), strict=True):
        assert a["iterations"] == b["iterations"] > 1  # unrelated gradients: more iterations are worth it
        assert a["steps"] == b["steps"]
        torch.testing.assert_close(a["quality"], b["quality"], rtol=1e-6, atol=0)


@case
def weights_far_outside_are_scaled_inside(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Rows(KSupport(2)), KSupport(5), Spectral(KSupport(1)), Blocks(KSupport(2), 4), Lp(2), Lp(1)):
        problem = Problem(norm, [(12, 8), (5, 4), (2, 8)], radius=0.01)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got, _ = problem.pieces(mesh, 1, lr=0.0)
        assert any("started outside of their balls" in str(w.message) for w in caught)
        expected, _ = problem.whole(1, lr=0.0)
        for p, q in zip(expected, got, strict=True):
            assert_close(q, p, EXACT)
            assert NormBall(norm, 0.01).contains(whole(q))


# --- bad input --------------------------------------------------------------------------------------------------------


def raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@case
def nan_on_one_process_is_refused_by_all(mesh: DeviceMesh, folder: Path) -> None:
    for value in (math.nan, math.inf):
        for norm in (Rows(KSupport(2)), None):
            problem = Problem(norm, [(12, 8), (5, 4), (7,)])
            parameters, opt = problem.pieces(mesh, 2, check_finite=True)
            before = [whole(p).clone() for p in parameters], copy.deepcopy(opt.state_dict())
            for p, g in zip(parameters, problem.gradients(2), strict=True):
                p.grad = cut(g, mesh, [Shard(0)])
            parameters[2].grad = None
            if mesh.get_local_rank() == 0:
                parameters[1].grad.to_local()[0, 0] = value
            message = raised(FloatingPointError, opt.step)
            assert "NaN or infinite gradient in an unnamed parameter of shape (5, 4)" in message, message
            assert "nothing has changed" in message
            for p, old in zip(parameters, before[0], strict=True):
                assert torch.equal(whole(p), old)
            for state, old in zip(opt.state_dict()["state"].values(), before[1]["state"].values(), strict=True):
                assert torch.equal(whole(state["momentum_buffer"]), whole(old["momentum_buffer"]))


@case
def a_gradient_on_some_processes_only_is_refused_by_all(mesh: DeviceMesh, folder: Path) -> None:
    if mesh.size() == 1:
        return
    problem = Problem(Rows(KSupport(2)), [(12, 8), (5, 4)])
    parameters, opt = problem.pieces(mesh, 2, check_finite=True)
    for p, g in zip(parameters, problem.gradients(2), strict=True):
        p.grad = cut(g, mesh, [Shard(0)])
    if mesh.get_local_rank() == 0:
        parameters[1].grad = None
    message = raised(RuntimeError, opt.step)
    assert "shape (5, 4) has a gradient on some processes only" in message, message


@case
def unsupported_placements_are_named(mesh: DeviceMesh, folder: Path) -> None:
    def step(parameters: list[Any], joint: bool = False) -> Callable[[], Any]:
        def call() -> None:
            group = {"params": parameters, "ball": NormBall(Lp(2), 1.0), "joint": joint}
            opt = SFW([group], lr=0.1)
            for _, p in parameters:
                p.grad = torch.zeros_like(p)
            opt.step()

        return call

    x = gaussian((4, 4))
    square = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("one", "all"))

    def placed(on: DeviceMesh, *placements: Placement) -> nn.Parameter:
        return nn.Parameter(DTensor.from_local(x, on, placements, run_check=False))

    first = placed(mesh, Shard(0))
    message = raised(ValueError, step([("head", placed(mesh, Partial()))]))
    assert "head" in message
    assert "redistribute it to Shard or Replicate" in message
    message = raised(ValueError, step([("mlp.weight", placed(square, Shard(0), Shard(1)))]))
    assert "mlp.weight is cut over 2 dimensions of its mesh" in message
    assert "fully_shard alone" in message
    message = raised(ValueError, step([("a", first), ("b", nn.Parameter(x))], joint=True))
    assert "b is whole on every process, but a of the same joint ball is a DTensor" in message
    message = raised(ValueError, step([("a", first), ("b", placed(square, Replicate(), Shard(0)))], joint=True))
    assert "over one mesh" in message
    message = raised(ValueError, step([("a", placed(square, Shard(0), Replicate())), ("b", placed(square, Replicate(), Shard(0)))], joint=True))  # fmt: skip  # noqa: E501
    assert "different dimensions of their mesh" in message


@case
def other_placements_and_hybrid_sharding(mesh: DeviceMesh, folder: Path) -> None:
    for norm in (Rows(KSupport(2)), KSupport(9), Spectral(KSupport(2)), Blocks(KSupport(2), 4), Lp(2), Lp(1.5)):
        Problem(norm, [(24, 36), (5, 4)], dim=1).check(mesh, 3, SPECTRAL)
        problem = Problem(norm, [(24, 36), (5, 4)])
        expected, _ = problem.whole(3)
        for sizes in ((1, mesh.size()), (mesh.size(), 1)):
            both = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
            for placed in ([Replicate(), Shard(0)], [Replicate(), Replicate()]):
                parameters = [nn.Parameter(cut(w, both, placed)) for w in problem.weights()]
                opt = problem.optimizer(parameters)
                for step in range(3):
                    for p, g in zip(parameters, problem.gradients(step), strict=True):
                        p.grad = cut(g, both, placed)
                    opt.step()
                for p, q in zip(expected, parameters, strict=True):
                    assert_close(q, p, SPECTRAL)
