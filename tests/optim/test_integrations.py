"""SFW where people train: accumulation, checkpointing, autocast, compilation, Accelerate, Lightning, Trainer.

One optimizer holds the whole network, with balls of several kinds and none; the contract of a single step is in
test_optimizer_*.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import pliant
from pliant.norms import NormBall
from pliant.optim import SFW

pytestmark = pytest.mark.filterwarnings("ignore:.*started outside of their balls.*:UserWarning")

STEPS = 6


class Network(nn.Module):
    """Layers for balls of three kinds, and a normalisation for none; ``again``: activations are computed anew."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.convolution = nn.Conv2d(1, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.wide = nn.Linear(8 * 36, 40)
        self.middle = nn.Linear(40, 40)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).relu().flatten(1)
        for layer in (self.wide, self.middle):
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
            x = x.relu()
        return self.head(x)


def network(*, dtype: torch.dtype = torch.float64, again: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(again=again).to(dtype)


def optimizer_of(model: nn.Module, **options: Any) -> SFW:
    rules = [
        ("*convolution.weight", pliant.filters(k=2, radius=3)),
        ("*wide.weight", pliant.rank(k=3, radius=3)),
        ("*middle.weight", pliant.weights(k=0.2, radius=3)),
    ]
    return SFW(pliant.constrain(model, rules, default=None), **{"lr": 0.05} | options)


def batches(dtype: torch.dtype = torch.float64, count: int = STEPS, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(images, torch.randint(10, (count, size), generator=generator), strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: SFW, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_equal(a: nn.Module, b: nn.Module, **tolerances: float) -> None:
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()), **tolerances)


def assert_inside(optimizer: SFW) -> None:
    groups = [group for group in optimizer.param_groups if group["ball"]]
    assert len(groups) == 3
    for group in groups:
        ball = NormBall.from_spec(group["ball"])
        assert all(ball.contains(p) for p in group["params"])


def test_accumulated_gradients_give_the_step_of_the_whole_batch() -> None:
    whole, parts = network(), network()
    train(whole, optimizer_of(whole), batches())
    optimizer = optimizer_of(parts)
    for images, labels in batches():
        optimizer.zero_grad()
        for part in zip(images.chunk(4), labels.chunk(4), strict=True):
            (loss_of(parts, part) / 4).backward()
        optimizer.step()
    assert_equal(whole, parts, rtol=1e-3, atol=1e-6)  # 5e-8 measured: kept singular directions amplify rounding
    assert_inside(optimizer)


def test_checkpointed_activations_change_nothing() -> None:
    plain, again = network(), network(again=True)
    train(plain, optimizer_of(plain), batches())
    train(again, optimizer_of(again), batches())
    assert_equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_weights(dtype: torch.dtype) -> None:
    plain, model = network(dtype=torch.float32), network(dtype=torch.float32)
    data = batches(torch.float32, count=1) * 20
    expected = train(plain, optimizer_of(plain), data)
    optimizer, losses = optimizer_of(model, check_finite=True), []
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for batch in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=100.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_inside(optimizer)
    assert expected[-1] < 0.7 * expected[0]
    assert losses == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_compiled_model_and_step_train_as_plain_ones() -> None:
    torch._dynamo.reset()
    plain, model = network(), network()
    train(plain, optimizer_of(plain), batches(count=3))
    optimizer = optimizer_of(model)
    compiled, step = (torch.compile(f, backend="eager") for f in (model, optimizer.step))
    for batch in batches(count=3):
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()
        step()
    assert_equal(plain, model, rtol=1e-3, atol=1e-6)  # as above


def test_accelerate_takes_the_steps_of_a_plain_loop_and_its_checkpoint_goes_on(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    plain = network(dtype=torch.float32)
    optimizer = optimizer_of(plain)
    schedule = CosineAnnealingLR(optimizer, T_max=STEPS)
    data = batches(torch.float32, count=2 * STEPS)
    for first, second in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        for batch in (first, second):
            (loss_of(plain, batch) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), max_norm=0.5)
        optimizer.step()
        schedule.step()

    def start() -> tuple[Any, ...]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, step_scheduler_with_optimizer=False)
        model = network(dtype=torch.float32)
        sfw = optimizer_of(model)
        return accelerator, *accelerator.prepare(model, sfw, CosineAnnealingLR(sfw, T_max=STEPS))

    def go_on(accelerator: Any, model: Any, optimizer: Any, schedule: Any, some: list[tuple[Tensor, Tensor]]) -> None:
        for batch in some:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()

    stopped = start()
    go_on(*stopped, data[:STEPS])
    stopped[0].save_state(tmp_path)
    resumed = start()
    with torch.no_grad():
        for p in resumed[1].parameters():
            p.zero_()  # what is loaded must come from the checkpoint
    resumed[0].load_state(tmp_path)
    go_on(*resumed, data[STEPS:])
    assert_equal(resumed[0].unwrap_model(resumed[1]), plain, rtol=1e-5, atol=1e-6)
    assert resumed[2].optimizer.gap() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own, about loggers, workers and versions
def test_lightning_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network(dtype=torch.float32)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.network, batch)

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self)
            return [optimizer], [CosineAnnealingLR(optimizer, T_max=4)]

    images, labels = (torch.cat(parts) for parts in zip(*batches(torch.float32), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)

    def fit(module: Any, epochs: int, **options: Any) -> Any:
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", gradient_clip_val=0.5, **off)
        trainer.fit(module, loader, **options)
        return trainer

    whole, half, resumed = Module(), Module(), Module()
    fit(whole, 4)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(resumed, 4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(resumed, whole)
    assert trainer.optimizers[0].gap() > 0
    with pytest.raises(AssertionError):
        assert_equal(half, whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Trainer's own, about workers and versions
def test_trainer_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    texts = torch.randint(16, (48, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": text, "labels": text} for text in texts]

    def trainer(folder: str) -> Any:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        rules = pliant.transformer_rules(model, linear=pliant.rank(k=0.25, radius=5))
        optimizer = SFW(pliant.constrain(model, rules, default=None), lr=0.05)
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            save_strategy="steps",
            save_steps=3,
            report_to="none",
            disable_tqdm=True,
        )
        schedule = CosineAnnealingLR(optimizer, T_max=6)
        return transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimizer, schedule))

    whole = trainer("run")
    before = copy.deepcopy(whole.model)
    whole.train()
    resumed = trainer("again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert whole.state.global_step == resumed.state.global_step == 6
    assert_equal(resumed.model, whole.model)
    with pytest.raises(AssertionError):
        assert_equal(before, whole.model)
