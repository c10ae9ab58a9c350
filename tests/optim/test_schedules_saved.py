"""The state of an optimizer holds its schedules: whoever saves it, in whatever order things are made and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.errors import BadInput
from pliant.norms import KSparse, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule, SoftThreshold
from tests.instances import gaussian
from tests.optimizer_cases import assert_equal, assert_same_state, quiet_first_steps
from tests.schedule_cases import NORMS, STEPS, every_norm, fresh, go, k_of, scheduled

pytestmark = quiet_first_steps


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
