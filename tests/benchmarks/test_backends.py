"""benchmarks/backends.py: networks in torch, compiled and in ONNX Runtime, in turns."""

import importlib
import itertools
import math
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from pliant.errors import BadInput

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("backends")


def test_a_latency_compares_round_by_round(backends: ModuleType) -> None:
    dense = backends.Latency("dense", "eager", 1, 8, (2.0, 4.0, 8.0))
    small = backends.Latency("small", "eager", 1, 8, (1.0, 1.0, 4.0))
    assert dense.quartiles() == (3.0, 4.0, 6.0)
    assert small.speedup(over=dense) == (2.0, 2.0, 3.0)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_every_model_is_measured_in_every_backend_and_the_rest_has_a_reason(backends: ModuleType) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    models = {"plain": nn.Linear(4, 4), "branching": Branching()}
    threads = torch.get_num_threads()
    rows = backends.backend_latencies(models, torch.ones(3, 4), backends=["eager", "onnx"], rounds=2, seconds=1e-4)
    assert torch.get_num_threads() == threads
    assert {(row.model, row.backend, row.threads) for row in rows} == set(
        itertools.product(models, ["eager", "onnx"], [1, 2])
    )
    for row in rows:
        assert row.batch == 3
        if (row.model, row.backend) == ("branching", "onnx"):
            assert row.seconds == ()
            assert "values of a tensor" in row.skipped
        else:
            assert len(row.seconds) == 2
            assert row.skipped == ""
            assert all(t > 0 and math.isfinite(t) for t in row.seconds)
    assert models["plain"].training


class Named(nn.Module):
    def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + 2 * right


def test_networks_of_keyword_arguments_are_measured_too(backends: ModuleType) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    inputs = {"left": torch.ones(3, 4), "right": torch.ones(3, 4)}
    rows = backends.backend_latencies(
        {"m": Named()}, inputs, backends=["eager", "onnx"], threads=[1], rounds=2, seconds=1e-4
    )
    assert [(row.batch, len(row.seconds), row.skipped) for row in rows] == [(3, 2, ""), (3, 2, "")]


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_graph_that_is_not_the_model_is_not_measured(backends: ModuleType) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = backends.backend_latencies(
        {"m": Noisy()}, torch.ones(3, 4), backends=["eager", "onnx"], threads=[1], rounds=2, seconds=1e-4
    )
    assert rows[0].seconds
    assert rows[1].seconds == ()
    assert "differs from the model" in rows[1].skipped


class Noting(nn.Module):
    seen: list[int] = []  # noqa: RUF012 - shared with the copies, on purpose

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.get_num_threads())
        return x


def test_warming_up_and_measuring_have_the_threads_that_were_asked_for(backends: ModuleType) -> None:
    Noting.seen.clear()
    backends.backend_latencies(
        {"m": Noting()}, torch.ones(1, 1), backends=["eager"], threads=[3], rounds=2, seconds=1e-4
    )
    assert Noting.seen[0] == torch.get_num_threads() != 3  # the check of the example
    assert set(Noting.seen[1:]) == {3}


def test_onnx_latency_is_that_of_the_runtime(backends: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    asked: list[int] = []
    real = backends.onnx_session
    monkeypatch.setattr(backends, "onnx_session", lambda path, threads: (asked.append(threads), real(path, threads))[1])
    backends.backend_latencies(
        {"m": nn.Linear(4, 4)}, torch.ones(1, 4), backends=["onnx"], threads=[2, 1], rounds=2, seconds=1e-4
    )
    assert asked == [2, 1]


def test_latencies_refuse_what_they_cannot_measure(backends: ModuleType) -> None:
    with pytest.raises(BadInput, match="did you mean 'eager'"):
        backends.backend_latencies({"m": nn.Identity()}, torch.ones(1, 1), backends=["eagr"])
    with pytest.raises(BadInput, match="rounds"):
        backends.backend_latencies({"m": nn.Identity()}, torch.ones(1, 1), rounds=1)
    with pytest.raises(BadInput, match="cannot be called"):
        backends.backend_latencies({"m": nn.Linear(3, 3)}, torch.ones(1, 1), backends=["eager"])


@pytest.mark.slow
def test_compiled_models_are_measured_or_skipped_with_a_reason(backends: ModuleType) -> None:
    (row,) = backends.backend_latencies(
        {"m": nn.Sequential(nn.Linear(4, 4), nn.ReLU())},
        torch.ones(2, 4),
        backends=["compile"],
        threads=[1],
        rounds=2,
        seconds=1e-4,
    )
    assert bool(row.seconds) != bool(row.skipped), row
    assert statistics.median(row.seconds) > 0 if row.seconds else "ompiler" in row.skipped, row
