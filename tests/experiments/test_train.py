import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pliant.errors import BadInput, DamagedFile, Diverged
from pliant.experiments.compress import compress_run
from pliant.experiments.methods import METHODS
from pliant.experiments.run_folder import Run, load
from pliant.experiments.train import train
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.schedules import SCHEDULES, learning_rate
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import Settings
from pliant.norms import NormBall
from pliant.storage import load_weights, save_weights


def quick(out: Path, **options: Any) -> Path:
    return train(**{"model": "lenet5", "width": 0.5, "epochs": 2, "batch_size": 256, "out": str(out)} | options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Run.open(run).load().state_dict()


def log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "train.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("method", [name for name in METHODS if name == "sgd" or name.startswith("sfw")])
def test_every_method_learns_and_leaves_a_run_folder(method: str, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", method=method, epochs=12, batch_size=64, width=1.0)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "shape.json",
        "env.json",
        "train.jsonl",
        "checkpoint",
        "model.safetensors",
    }
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["val_top1"] > 0.5  # chance is 0.1
    assert (lines[-1]["gap"] is None) == (method == "sgd")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["method"] == method
    assert load(run).training is False


@pytest.mark.parametrize("options", [{}, {"method": "sfw-rank", "k_start": 1.0, "schedule": "linear"}])
def test_resumed_training_is_bitwise_the_same(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick(tmp_path / "whole", epochs=4, **options)
    save, stopped = Session.save, tmp_path / "stopped"

    def save_then_die(self: Session, path: Path) -> None:
        save(self, path)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            quick(stopped, epochs=4, **options)
    assert not (stopped / "model.safetensors").exists()
    with pytest.raises(DamagedFile, match="not complete"):
        Run.open(stopped).load()
    torch.manual_seed(99)  # another process would start from another random state
    train(out=str(stopped), resume=True)
    assert_equal(weights(stopped), weights(whole))
    assert log(stopped) == log(whole)


def test_resume_of_a_complete_run_changes_nothing(tmp_path: Path) -> None:
    run = quick(tmp_path / "run")
    before = weights(run)
    train(out=str(run), resume=True)
    assert_equal(weights(run), before)


def test_resume_leaves_finished_work_alone(tmp_path: Path) -> None:
    run = quick(tmp_path / "run")
    (run / CHECKPOINT).unlink()
    before = (run / "model.safetensors").stat()
    train(out=str(run), resume=True)
    assert (run / "model.safetensors").stat() == before
    small = compress_run(run, "weights", ratio=0.5, importance="magnitude", refit=False, out=str(tmp_path / "small"))
    with pytest.raises(BadInput, match="compressed network, not a run"):
        train(out=str(small), resume=True)
    with pytest.raises(BadInput, match="compressed already"):
        compress_run(small, "weights", out=str(tmp_path / "smaller"))


def test_loading_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quick(tmp_path / "run", epochs=1)
    small = compress_run(run, "filters", ratio=0.5, importance="l2", refit=False, out=str(tmp_path / "small"))
    monkeypatch.setattr("pliant.experiments.run_folder.load_data", None)
    assert load(run)(torch.zeros(1, 1, 8, 8)).shape == load(small)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    for content, message in ((b"{", "damaged"), (b"[1]", "damaged"), (None, "missing")):
        (small / "shape.json").unlink() if content is None else (small / "shape.json").write_bytes(content)
        with pytest.raises(DamagedFile, match=message):
            load(small)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 5))", r"scores of shape \(2, 10\).*got shape \(2, 5\)"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(63, 10))", r"cannot be run on images of shape \(2, 1, 8, 8\)"),
        ("nn.Sequential(nn.Flatten(), nn.LSTM(64, 10))", "got tuple"),
    ],
)
def test_networks_that_do_not_fit_are_named(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"net{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"from torch import nn\ndef make():\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        quick(tmp_path / "run", model=f"{module}:make", width=1.0)
    assert not (tmp_path / "run").exists()


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    assert (quick(tmp_path / "run", resume=True) / "model.safetensors").exists()


def test_contradicting_a_resumed_run_is_an_error(tmp_path: Path) -> None:
    run = quick(tmp_path / "run")
    with pytest.raises(BadInput, match=r"--lr 0\.7 contradicts 0\.1"):
        train(out=str(run), resume=True, lr=0.7)


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run = quick(tmp_path / "run")
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match="exists"):
        quick(run)
    assert (run / "model.safetensors").read_bytes() == before


def test_the_seed_decides(tmp_path: Path) -> None:
    a, b, c = (quick(tmp_path / name, seed=seed, epochs=1) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_equal(weights(a), weights(b))
    assert not torch.equal(weights(a)["fc3.weight"], weights(c)["fc3.weight"])


def test_accumulation_computes_the_same_gradients(tmp_path: Path) -> None:
    options = {"model": "mlp", "precision": "fp32", "epochs": 1}
    whole = weights(quick(tmp_path / "whole", **options))
    parts = weights(quick(tmp_path / "parts", accumulate=4, **options))
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_weights_stay_in_their_balls(tmp_path: Path) -> None:
    run = quick(tmp_path / "run", method="sfw-rank", radius=3)
    session = Session(Settings.from_config(Run.open(run).config))
    session.restore(run / CHECKPOINT)
    balls = [g for g in session.optimizer.param_groups if g["ball"] is not None]
    assert balls
    for group in balls:
        for p in group["params"]:
            ball = NormBall.from_spec(group["ball"])
            assert ball.norm(p.detach()) <= ball.radius * (1 + 1e-5)
    constrained = {name for g in balls for name in g["param_names"]}
    assert "fc1.weight" in constrained
    assert "fc3.weight" not in constrained  # the classifier


def test_divergence_is_named_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = Session._backward, []

    def explode(self: Session, *arguments: Any, **options: Any) -> tuple[float, int]:
        loss, correct = backward(self, *arguments, **options)
        calls.append(loss)
        return (math.nan if self.epoch == 1 else loss), correct

    monkeypatch.setattr(Session, "_backward", explode)
    with pytest.raises(Diverged, match=r"loss became nan in epoch 2.*checkpoint of epoch 1"):
        quick(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert saved["epoch"] == 1
    assert all(p.isfinite().all() for p in saved["model"].values())


def test_an_exploding_learning_rate_is_caught(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="train with a smaller --lr"):
        quick(tmp_path / "run", lr=1e12, warmup=0.0)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    run = quick(tmp_path / "run")
    checkpoint = run / CHECKPOINT
    content = {"truncated": checkpoint.read_bytes()[:1000], "foreign": b"not a checkpoint", "empty": b""}[damage]
    checkpoint.write_bytes(content)
    with pytest.raises(DamagedFile, match=re.escape(str(checkpoint))):
        train(out=str(run), resume=True)


def test_checkpoints_that_would_run_code_are_refused(tmp_path: Path) -> None:
    run = quick(tmp_path / "run")
    torch.save({"model": nn.Linear(2, 2)}, run / CHECKPOINT)
    with pytest.raises(DamagedFile):
        train(out=str(run), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sfw-rnk"}, "did you mean 'sfw-rank'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"rescale": "gradients"}, "did you mean 'gradient'"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 0}, "--batch_size"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": math.nan}, "--lr"),
        ({"radius": -1.0}, "--radius"),
        ({"momentum": 1.0}, "--momentum"),
        ({"warmup": 2.0}, "--warmup"),
        ({"weight_decay": -1.0}, "--weight_decay"),
        ({"seed": -1}, "--seed"),
        ({"pattern": "4:2"}, "N:M"),
        ({"k": 0}, "k as a count"),
        ({"k": 1.5}, "k as a fraction"),
        ({"method": "sfw-filters", "k": 1000}, r"channels of conv1: k=1000"),
        ({"precision": "fp8"}, "precision"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"epochs": "3"}, "--epochs expects int, got '3'"),
        ({"augment": None}, "--augment expects bool, got None"),
        ({"data": None}, "--data expects str"),
        ({"width": None}, "--width expects float"),
    ],
)
def test_bad_settings_leave_nothing_behind(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        quick(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_warms_up_and_follows_the_schedule(schedule: str) -> None:
    factor = learning_rate(schedule, 0.1, 100)
    assert 0 < factor(0) < factor(5) < factor(10) == 1
    assert all(factor(t) <= 1 for t in range(101))
    assert factor(100) == pytest.approx({"cosine": 0, "linear": 0, "step": 0.01, "constant": 1}[schedule])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(nn.Linear(3, 3), tmp_path / "w.safetensors")
    with pytest.raises(DamagedFile, match="another model"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DamagedFile, match="damaged"):
        load_weights(nn.Linear(3, 3), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        "data: [",
        "data: digits\n",
        "\xff",
        "{data: 5, model: mlp, method: sgd, seed: 0}",
        "{data: digits, model: mlp, method: sgd, seed: 0, width: x}",
    ],
)
def test_damaged_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedFile, match=r"config\.yaml is damaged"):
        Run.open(tmp_path)
