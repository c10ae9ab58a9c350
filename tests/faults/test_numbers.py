"""Numbers that go wrong: training stops with the cause and a checkpoint to go on from, or goes on as it should."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pliant import SFW, FilterPruning, LowRank, Magnitude, SemiStructured, compress, constrain, filters, load, rank
from pliant.constraints import weights as entries
from pliant.errors import BadInput, Diverged
from pliant.experiments.data import ImageData, Split
from pliant.experiments.run_folder import Run
from pliant.experiments.train import train, train_run
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import Settings


def quick(out: Path, **options: Any) -> Path:
    settings = {"model": "mlp", "width": 0.1, "epochs": 2, "batch_size": 256}
    return train(**(settings | options), out=str(out))


def finite(path: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load(path).state_dict().values())


@pytest.mark.parametrize("method", ["sgd", "sfw-filters", "sfw-rank", "muon", "ssl", "condlr"])
@pytest.mark.parametrize("where", ["loss", "gradient", "infinite gradient"])
def test_a_number_that_is_none_stops_the_training_which_can_go_on(
    method: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick(tmp_path / "whole", method=method)
    backward = Session._backward

    def spoil(self: Session, *arguments: Any, **options: Any) -> tuple[float, int]:
        loss, correct = backward(self, *arguments, **options)
        if self.epoch == 1:
            if where == "loss":
                return math.nan, correct
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.view(-1)[0] = math.nan if where == "gradient" else math.inf
        return loss, correct

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_backward", spoil)
        with pytest.raises(Diverged, match=r"in epoch 2.*checkpoint of epoch 1 is kept") as caught:
            quick(run, method=method)
    assert any(word in str(caught.value) for word in ("nan", "NaN", "inf", "non-finite"))
    assert not (run / "model.safetensors").exists()
    saved = torch.load(run / CHECKPOINT, weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in saved.values())
    train(out=str(run), resume=True)  # without the fault it goes on, as if there had been none
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["sgd", "sfw-filters", "sfw-rank", "sfw-weights", "sfw-nm", "muon", "scion"])
def test_a_huge_learning_rate_is_named_or_does_no_harm(method: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with contextlib.suppress(Diverged):
        quick(run, method=method, lr=1e30, warmup=0.0, model="lenet5")
    # A step of SFW goes to a vertex at most.
    assert not (run / "model.safetensors").exists() or finite(run)


def images(count: int, classes: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(count) % classes)


def data(train_split: Split, *, std: float = 0.3) -> ImageData:
    names = ("a", "b", "c", "d")
    return ImageData("own", train_split, images(40, 4), images(40, 4, 1), names, (0.5,), (std,), flip=False, pad=0)


def settings(**options: Any) -> Settings:
    return Settings(**{"model": "lenet5", "width": 0.3, "epochs": 2, "batch_size": 32} | options)


@pytest.mark.parametrize("method", ["sgd", "sfw-filters"])
def test_images_that_are_no_numbers_are_named(method: str, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="loss became nan in epoch 1"):
        train_run(settings(method=method), tmp_path / "run", data(images(64, 4), std=math.nan))


@pytest.mark.parametrize("method", ["sgd", "sfw-filters", "sfw-rank"])
@pytest.mark.parametrize("kind", ["a class without images", "one class", "black images", "two images"])
def test_poor_data_are_trained_on(method: str, kind: str, tmp_path: Path) -> None:
    few = {
        "a class without images": images(60, 3),
        "one class": images(60, 1),
        "black images": Split(torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.arange(64) % 4),
        "two images": images(2, 2),
    }[kind]
    run = train_run(settings(method=method), tmp_path / "run", data(few))
    assert (run / "model.safetensors").exists()
    assert finite_weights(Run.open(run), few)


def finite_weights(run: Run, split: Split) -> bool:
    from pliant.experiments.models import build_model
    from pliant.storage import load_weights

    model = build_model(run.config["model"], num_classes=4, image_shape=(1, 8, 8), width=run.config["width"])
    load_weights(model, run.path / "model.safetensors")
    outputs = model.eval()(split.images.float() / 255)
    return bool(outputs.isfinite().all())


# --- extreme layers ---------------------------------------------------------------------------------------------------


class Narrow(nn.Sequential):
    """Layers of one filter, and of three."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 1, 3, bias=False),
            nn.BatchNorm2d(1),
            nn.ReLU(),
            nn.Conv2d(1, 3, 3),
            nn.Flatten(),
            nn.Linear(48, 2),
        )


PRESETS = {"filters": filters, "rank": rank, "weights": entries}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("k", [1, 1.0])
@pytest.mark.parametrize("start", ["drawn", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_layers_are_trained_and_compressed(preset: str, k: float, start: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Narrow().to(dtype)
    groups = constrain(model, [("*.weight", PRESETS[preset](k=k, radius=5.0))], default=None)
    if start == "zero":
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    optimizer = SFW(groups, lr=0.1, momentum=0.9, check_finite=True)
    x = torch.randn(8, 1, 8, 8, dtype=dtype)
    y = torch.arange(8) % 2
    for _ in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        assert optimizer.gap().isfinite()
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
    model.eval()
    for compressor in (FilterPruning(0.5), LowRank(0.5), Magnitude(0.5)):
        output: Tensor = compress(model, compressor, x)(x)
        assert output.isfinite().all()


@pytest.mark.parametrize("compressor", [FilterPruning(0.5), LowRank(0.5), Magnitude(0.5), SemiStructured(2, 4)])
def test_zero_networks_are_compressed(compressor: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(compress(model, compressor, torch.ones(2, 8))(torch.ones(2, 8)), torch.zeros(2, 4))


# --- deterministic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sgd", "sfw-rank"])
def test_two_deterministic_trainings_are_bitwise_equal(method: str, tmp_path: Path) -> None:
    one, two = (quick(tmp_path / name, method=method, deterministic=True, model="resnet8") for name in "ab")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_is_on_in_the_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Session.step

    def look(self: Session, *arguments: Any) -> tuple[float, int]:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return step(self, *arguments)

    monkeypatch.setattr(Session, "step", look)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        quick(tmp_path / "a", deterministic=True, epochs=1)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(seen) == {(True, False)}
    seen.clear()
    quick(tmp_path / "b", epochs=1)
    assert {wanted for wanted, _ in seen} == {False}


def test_an_operation_that_is_not_deterministic_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scatter_net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        y = self.layer(x.flatten(1))\n"
        "        if self.training:\n"
        "            torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))\n"
        "        return y\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"--deterministic: put_ does not have a deterministic implementation"):
        quick(tmp_path / "run", model="scatter_net:Net", width=1.0, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_checkpoint_within_an_epoch_changes_nothing(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick(tmp_path / "whole", batch_size=128)  # 11 steps per epoch
    save, stopped = Session.save, tmp_path / "stopped"

    def save_then_die(self: Session, path: Path) -> None:
        save(self, path)
        if (self.epoch, self.batches) == (1, 8):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            quick(stopped, batch_size=128, checkpoint_steps=steps)
    torch.manual_seed(99)
    train(out=str(stopped), resume=True)
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
