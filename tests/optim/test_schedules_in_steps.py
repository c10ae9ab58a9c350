"""Schedules count the steps that the optimizer takes, and no others: whoever takes, skips, saves or wraps them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.errors import BadInput
from pliant.norms import Blocks, Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule, SoftThreshold
from tests.instances import gaussian
from tests.optimizer_cases import assert_equal, assert_same_state, quiet_first_steps

pytestmark = quiet_first_steps

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


# --- who counts -------------------------------------------------------------------------------------------------------


def by_hand(norm: Norm, steps: int) -> list[nn.Parameter]:
    """Train with k and thresholds set by hand after each step, without a schedule."""
    weights, opt = fresh(norm)
    group, pending = opt.param_groups[0], 0.0
    end, length = norm.k, norm.length((20, 24))
    diameter = NormBall(norm, 2.0).diameter((20, 24))

    def ball_of(k: int) -> NormBall:
        return NormBall(norm.with_k(k), diameter / norm.with_k(k).diameter((20, 24)))

    assert end is not None
    opt.set_ball(group, ball_of(length))
    for step in range(steps):
        go(weights, opt, range(step, step + 1))
        ball = NormBall.from_spec(group["ball"])
        parts = ball.norm.parts_of_vertex((20, 24))
        assert parts is not None
        pending += 0.1 * 0.05 * ball.diameter((20, 24)) / 2 / math.sqrt(parts)
        if step % 2:
            weights[0].data.copy_(ball.norm.soft_threshold(weights[0].detach(), pending))
            pending = 0.0
        k = math.floor(length + (end - length) * min(1.0, (step + 1) / STEPS) + 0.5)
        if k != ball.norm.k:
            opt.set_ball(group, ball_of(k))
    return weights


@every_norm
@pytest.mark.parametrize("called", [True, False], ids=["step called", "step not called"])
def test_the_steps_are_those_of_k_and_thresholds_by_hand(norm: Norm, called: bool) -> None:
    weights, opt, anneal, threshold = scheduled(norm)
    go(weights, opt, range(8), (threshold, anneal) if called else ())
    assert k_of(opt) == norm.k
    assert (anneal.last_step, threshold.last_step) == (8, 8)
    for p, q in zip(weights, by_hand(norm, 8), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def by_scaler(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum((p.float() * (1.0 if good else math.inf)).sum() for p in weights)).backward()  # type: ignore[union-attr, arg-type]
    scaler.step(opt)
    scaler.update()


def by_check(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    for p in weights:
        p.grad = torch.full_like(p, 1.0 if good else math.nan)
    if good:
        opt.step()
        return
    with pytest.raises(FloatingPointError):
        opt.step()


def by_closure(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    def closure() -> float:
        if not good:
            raise ArithmeticError
        for p in weights:
            p.grad = torch.ones_like(p)
        return 0.0

    if good:
        opt.step(closure)
        return
    with pytest.raises(ArithmeticError):
        opt.step(closure)


def by_accumulation(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    sum(p.sum() for p in weights).backward()  # type: ignore[union-attr]
    if good:
        opt.step()


def by_sparse_gradient(opt: SFW, weights: list[nn.Parameter], good: bool) -> None:
    for p in weights:
        p.grad = torch.ones_like(p)
    if good:
        opt.step()
        return
    weights[0].grad = torch.eye(20, 24, dtype=weights[0].dtype).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        opt.step()


@pytest.mark.parametrize("take", [by_scaler, by_check, by_closure, by_accumulation, by_sparse_gradient])
def test_steps_that_are_not_taken_do_not_count(take: Callable[[SFW, list[nn.Parameter], bool], None]) -> None:
    weights, opt, anneal, threshold = scheduled(check_finite=True)
    for good in (False, True, False, False, True, False):
        opt.zero_grad()
        take(opt, weights, good)
        threshold.step()
        anneal.step()
    assert (anneal.last_step, threshold.last_step) == (2, 2)
    assert k_of(opt) == math.floor(20 - 18 * 2 / STEPS + 0.5)
    assert threshold.state_dict()["pending"] == [0.0, 0.0]  # taken off in the second step


def test_a_replayed_graph_is_counted_by_whoever_replays_it() -> None:
    weights, opt, anneal, threshold = scheduled(capturable=True)
    go(weights, opt, range(2))
    assert (anneal.last_step, threshold.last_step) == (0, 0)
    threshold.step()
    anneal.step()
    assert (anneal.last_step, threshold.last_step) == (1, 1)
    assert k_of(opt) == 17


# --- wrappers ---------------------------------------------------------------------------------------------------------


def accelerated(opt: SFW) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True).prepare(opt)


def of_lightning(opt: SFW) -> Any:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(opt)


def of_fabric(opt: SFW) -> Any:
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricOptimizer

    return _FabricOptimizer(opt, SingleDeviceStrategy(torch.device("cpu")))


class Holder:
    """A wrapper as Opacus and others write it."""

    def __init__(self, original_optimizer: Any) -> None:
        self.original_optimizer = original_optimizer

    @property
    def param_groups(self) -> Any:
        return self.original_optimizer.param_groups


WRAPPERS: dict[str, Callable[[SFW], Any]] = {
    "accelerate": accelerated,
    "lightning": of_lightning,
    "fabric": of_fabric,
    "opacus": Holder,
    "twice": lambda opt: Holder(accelerated(opt)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_optimizer_is_as_good(wrap: Callable[[SFW], Any]) -> None:
    plain, bare, *_ = scheduled()
    go(plain, bare, range(8))
    weights, opt = fresh()
    wrapper = wrap(opt)
    anneal, threshold = KSchedule(wrapper, 1.0, steps=STEPS), SoftThreshold(wrapper, 0.1, every=2)
    assert anneal.optimizer is threshold.optimizer is opt
    go(weights, opt, range(8), (threshold, anneal))
    assert_equal(weights, plain)


@pytest.mark.parametrize("wrong", [torch.optim.SGD([nn.Parameter(torch.ones(2))]), Holder(None), None, "sfw", 3])
def test_what_holds_no_sfw_is_refused(wrong: Any) -> None:
    for make in (lambda: KSchedule(wrong, steps=3), lambda: SoftThreshold(wrong, 0.1)):
        with pytest.raises(BadInput, match=r"needs a pliant\.SFW"):
            make()


def test_accelerate_counts_the_steps_it_takes() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Linear(24, 20, bias=False)
    opt = SFW([{"params": [model.weight], "ball": NormBall(NORMS[1], 2.0)}], lr=0.05, rescale=None)
    early = KSchedule(opt, 1.0, steps=STEPS)
    network, prepared = accelerator.prepare(model, opt)
    threshold = SoftThreshold(prepared, 0.1)
    for _ in range(16):
        with accelerator.accumulate(network):
            accelerator.backward(network(torch.ones(2, 24)).sum())
            prepared.step()
            threshold.step()
            early.step()
            prepared.zero_grad()
    assert (early.last_step, threshold.last_step) == (4, 4)


# --- groups that come later -------------------------------------------------------------------------------------------


@every_norm
def test_a_group_that_comes_later_takes_part(norm: Norm) -> None:
    weights, opt, anneal, threshold = scheduled(norm)
    go(weights, opt, range(3))
    late = nn.Parameter(gaussian((20, 24), 9) / 50)
    opt.add_param_group({"params": [late], "ball": NormBall(norm, 2.0)})
    assert k_of(opt, 2) == k_of(opt, 0)
    go([*weights, late], opt, range(3, STEPS), (threshold, anneal))
    assert k_of(opt, 2) == k_of(opt, 0) == norm.k
    assert opt.param_groups[2]["soft_threshold"] == {
        **opt.param_groups[0]["soft_threshold"],
        "pending": pytest.approx(0),
    }
    assert anneal.state_dict()["spans"] == [opt_span(norm), None, opt_span(norm)]
    twin = copy.deepcopy(opt)
    assert_same_state(twin.state_dict(), opt.state_dict())


def opt_span(norm: Norm) -> list[int | None]:
    return [norm.length((20, 24)), norm.k]


@pytest.mark.parametrize("ball", [None, NormBall(Lp(2), 1.0), NormBall(Spectral(Lp(math.inf)), 1.0)])
def test_a_later_group_without_a_k_does_not(ball: NormBall | None) -> None:
    weights, opt, anneal, _ = scheduled()
    late = nn.Parameter(gaussian((20, 24), 9) / 50)
    opt.add_param_group({"params": [late], "ball": ball})
    go([*weights, late], opt, range(STEPS))
    assert anneal.state_dict()["spans"] == [[20, 2], None, None]


def test_a_later_group_that_cannot_take_part_is_refused() -> None:
    _, opt = fresh()
    KSchedule(opt, 18, steps=STEPS)
    for shape, message in (((5, 24), "k=18"), ((20, 24), None)):
        late = nn.Parameter(gaussian(shape, 9) / 50)
        group = {"params": [late], "ball": NormBall(Rows(KSparse(2)), 2.0)}
        if message is None:
            opt.add_param_group(group)
        else:
            with pytest.raises(BadInput, match=message):
                opt.add_param_group(group)
            assert len(opt.param_groups) == 2
    assert len(opt.param_groups) == 3


def test_a_group_may_leave() -> None:
    _, opt, anneal, threshold = scheduled()
    opt.add_param_group({"params": [nn.Parameter(gaussian((20, 24)))], "ball": NormBall(NORMS[1], 2.0)})
    del opt.param_groups[0]
    opt.step()
    assert (anneal.last_step, threshold.last_step) == (1, 1)


# --- saving and loading -----------------------------------------------------------------------------------------------


def restored(way: str, opt: SFW, weights: list[nn.Parameter], norm: Norm) -> tuple[list[nn.Parameter], SFW]:
    """Return weights and an optimizer that go on; only the optimizer's state was saved."""
    if way in ("deepcopy", "pickle"):
        twin = copy.deepcopy(opt) if way == "deepcopy" else pickle.loads(pickle.dumps(opt))
        return [p for group in twin.param_groups for p in group["params"]], twin
    saved = copy.deepcopy(opt.state_dict())
    others, twin = fresh(norm)
    for p, q in zip(others, weights, strict=True):
        p.data.copy_(q.data)
    if way == "schedules first":
        KSchedule(twin, 1.0, steps=STEPS)
        SoftThreshold(twin, 0.1, every=2)
    twin.load_state_dict(saved)
    if way == "state first":
        KSchedule(twin, 1.0, steps=STEPS)
        SoftThreshold(twin, 0.1, every=2)
    return others, twin


@every_norm
@pytest.mark.parametrize("way", ["schedules first", "state first", "no schedules made", "deepcopy", "pickle"])
def test_the_state_of_the_optimizer_is_enough_to_go_on(norm: Norm, way: str) -> None:
    weights, opt, *_ = scheduled(norm)
    go(weights, opt, range(3))
    others, twin = restored(way, opt, weights, norm)
    assert_equal(others, weights)
    go(weights, opt, range(3, 8))
    go(others, twin, range(3, 8))
    assert_equal(others, weights)
    assert_same_state(twin.state_dict(), opt.state_dict())


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_states_of_earlier_versions_go_on(optimizer_first: bool) -> None:
    weights, opt, anneal, threshold = scheduled()
    go(weights, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:  # they were kept beside the optimizer
        group.pop("k_schedule", None)
        group.pop("soft_threshold", None)
    beside = anneal.state_dict(), threshold.state_dict()
    others, twin = fresh()
    for p, q in zip(others, weights, strict=True):
        p.data.copy_(q.data)
    if optimizer_first:
        twin.load_state_dict(saved)
    again, debt = KSchedule(twin, 1.0, steps=STEPS), SoftThreshold(twin, 0.1, every=2)
    for schedule, state in zip((again, debt), beside, strict=True):
        schedule.load_state_dict(state)
    if not optimizer_first:
        twin.load_state_dict(saved)
    assert (again.state_dict(), debt.state_dict()) == beside
    go(weights, opt, range(3, 8))
    go(others, twin, range(3, 8))
    assert_equal(others, weights)


def test_a_saved_state_does_not_change_with_later_steps() -> None:
    weights, opt, *_ = scheduled()
    go(weights, opt, range(1))
    saved = opt.state_dict()["param_groups"]
    kept = copy.deepcopy(saved)
    go(weights, opt, range(1, 4))
    assert saved == kept


def test_another_schedule_begins_anew() -> None:
    weights, opt, *_ = scheduled()
    go(weights, opt, range(8))
    again = KSchedule(opt, 1.0, steps=STEPS)  # the same, but nothing was loaded: it is a second one
    assert again.last_step == 0
    assert k_of(opt) == 20
    others, twin = fresh()
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.warns(UserWarning, match=r"step 0 of a schedule of k with start=1\.0.*steps=6.*steps=9.*begins anew"):
        assert KSchedule(twin, 1.0, steps=9).steps == 9
    assert len(others) == 2


def test_strength_is_what_was_asked_for_last() -> None:
    weights, opt, _, threshold = scheduled()
    threshold.strength = 0.3
    assert opt.param_groups[0]["soft_threshold"]["strength"] == 0.3
    with pytest.raises(BadInput, match="strength"):
        threshold.strength = 1.0
    with pytest.raises(BadInput, match="every"):
        threshold.every = 0
    for loads_first in (True, False):
        _, twin = fresh()
        if loads_first:
            twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        other = SoftThreshold(twin, 0.2, every=3)
        if not loads_first:
            twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert (other.strength, other.every) == (0.2, 3)
    assert len(weights) == 2


def test_a_new_ball_ends_a_schedule_that_it_does_not_suit() -> None:
    weights, opt, anneal, _ = scheduled()
    group = opt.param_groups[0]
    opt.set_ball(group, NormBall(Rows(KSparse(3)), 1.0))
    go(weights, opt, range(2))
    assert k_of(opt) == 14
    opt.set_ball(group, NormBall(Spectral(Lp(1)), 1.0))
    go(weights, opt, range(2, 4))
    assert "k_schedule" not in group
    assert anneal.state_dict()["spans"] == [None, None]


def test_the_state_that_torch_makes_is_no_step() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(24, 20, bias=False, dtype=dtype)
        with torch.no_grad():
            model.weight.mul_(100)
        before = model.weight.detach().clone()
        opt = SFW([{"params": [model.weight], "ball": NormBall(NORMS[1], 2.0)}], rescale=None)
        anneal, threshold = KSchedule(opt, 1.0, steps=STEPS), SoftThreshold(opt, 0.1)
        get_optimizer_state_dict(model, opt)
        assert (anneal.last_step, threshold.last_step) == (0, 0)
        assert torch.equal(model.weight, before)
        assert opt.state[model.weight]
        model.weight.grad = torch.ones_like(model.weight)
        opt.param_groups[0]["lr"] = 0.0  # as at the start of a warm-up: a step of the training
        opt.step()
        assert anneal.last_step == 1


# --- trainers ---------------------------------------------------------------------------------------------------------


class Scored(nn.Module):
    """A network as the Trainer of transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(24, 20, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(x).square().mean()}


def rows(model: Scored) -> SFW:
    return SFW([{"params": [model.layer.weight], "ball": NormBall(NORMS[1], 2.0)}], lr=0.05, rescale=None)


@pytest.mark.slow
def test_the_trainer_of_transformers_resumes_them(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"x": gaussian((24,), i).float()} for i in range(8)]

    def train(folder: str, steps: int, resume: bool = False) -> tuple[Scored, SFW, KSchedule]:
        model = Scored()
        opt = rows(model)
        anneal = KSchedule(opt, 1.0, steps=STEPS)
        SoftThreshold(opt, 0.1, every=3)
        settings = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        schedule = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
        trainer = Trainer(model, settings, train_dataset=data, optimizers=(opt, schedule))  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return model, opt, anneal

    whole, _, anneal = train("whole", 4)
    train("parts", 2)
    resumed, opt, again = train("parts", 4, resume=True)
    assert anneal.last_step == again.last_step == 4
    assert k_of(opt) == 8
    torch.testing.assert_close(resumed.layer.weight, whole.layer.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers
def test_lightning_resumes_them_and_counts_accumulated_batches_once(tmp_path: Path) -> None:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Scored()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.model(batch[0])["loss"]

        def configure_optimizers(self) -> SFW:
            opt = rows(self.model)
            self.anneal, self.threshold = KSchedule(opt, 1.0, steps=STEPS), SoftThreshold(opt, 0.1, every=3)
            return opt

    loader = DataLoader(TensorDataset(torch.stack([gaussian((24,), i).float() for i in range(8)])), batch_size=2)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def fit(epochs: int, **options: Any) -> tuple[Module, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", accumulate_grad_batches=2, default_root_dir=tmp_path, **off
        )
        trainer.fit(module, loader, **options)
        return module, trainer

    whole, _ = fit(2)
    half, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
    assert (half.anneal.last_step, whole.anneal.last_step, resumed.anneal.last_step) == (2, 4, 4)
    assert resumed.threshold.state_dict() == whole.threshold.state_dict()
    torch.testing.assert_close(resumed.model.layer.weight, whole.model.layer.weight, rtol=1e-6, atol=1e-7)
