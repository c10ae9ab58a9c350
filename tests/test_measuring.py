import itertools
import math
import statistics

import pytest
import safetensors.torch
import torch
from torch import nn

from pliant import measuring
from pliant.compression import FilterPruning, LowRank
from pliant.errors import BadInput
from pliant.experiments.models import build_model
from pliant.measuring import Latency, backend_latencies

CPU = torch.device("cpu")


def small_convnet() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def test_macs_and_parameters_by_hand() -> None:
    model, x = small_convnet(), torch.zeros(4, 3, 4, 4)
    assert measuring.parameters(model) == 8 * 27 + 8 + 5 * 128 + 5
    assert measuring.macs(model, x) == 16 * 8 * 27 + 5 * 128
    assert measuring.macs(model, x[:1]) == measuring.macs(model, x)


def test_macs_of_grouped_strided_convolutions() -> None:
    model = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4)
    assert measuring.macs(model, torch.zeros(1, 8, 8, 8)) == 16 * 16 * 2 * 9


def test_factorised_convolutions_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1)), torch.randn(2, 8, 8, 8)
    for scheme in ("channel", "spatial"):
        low = LowRank(0.5, scheme=scheme)
        plan = low.plan(model, x)
        (layer,) = plan.layers
        rank = layer.kept
        assert 0 < rank < 16
        small = low.apply(model, plan)
        if scheme == "channel":  # the stride is in the first of the two
            assert measuring.parameters(small) == rank * 8 * 9 + 16 * rank + 16
            assert measuring.macs(small, x) == 4 * 4 * (rank * 8 * 9 + 16 * rank)
        else:  # each has the stride of its direction
            assert measuring.parameters(small) == rank * 8 * 3 + 16 * rank * 3 + 16
            assert measuring.macs(small, x) == 4 * 8 * (rank * 8 * 3) + 4 * 4 * (16 * rank * 3)


def test_a_factorised_linear_layer_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(2, 24)
    plan = LowRank(0.5).plan(model, x)
    (layer,) = plan.layers
    small = LowRank().apply(model, plan)
    assert measuring.parameters(small) == layer.kept * (24 + 40) + 40
    assert measuring.macs(small, x) == layer.kept * (24 + 40)


def test_removed_filters_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    plan = FilterPruning(0.5).plan(model.eval(), x)
    kept = next(layer.kept for layer in plan.layers if layer.name == "0")
    assert 0 < kept < 8
    small = FilterPruning().apply(model, plan)
    assert measuring.parameters(small) == (27 + 1) * kept + 2 * kept + 6 * (9 * kept + 1)
    assert measuring.macs(small, x) == 4 * 4 * 27 * kept + 2 * 2 * 6 * 9 * kept


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("build", [small_convnet, lambda: build_model("resnet8", num_classes=5, image_shape=(3, 8, 8))])
def test_factorised_layers_never_add_parameters_or_macs(build, allocation: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = build()
    x = torch.randn(2, 3, *([4, 4] if isinstance(model[1], nn.ReLU) else [8, 8]))
    analysis = LowRank().analyse(model, x)
    costs = [(measuring.parameters(model), measuring.macs(model, x))]
    for ratio in (0.02, 0.1, 0.5, 0.9):
        compressor = LowRank(ratio, allocation)
        plan = compressor.plan(model, x, analysis=analysis)
        small = compressor.apply(model, plan, analysis=analysis)
        for layer in plan.layers:
            own = model.get_submodule(layer.name)
            assert measuring.parameters(small.get_submodule(layer.name)) <= measuring.parameters(own)
        costs.append((measuring.parameters(small), measuring.macs(small, x)))
    assert all(after[i] <= before[i] for before, after in itertools.pairwise(costs) for i in (0, 1))
    assert costs[-1][1] < costs[0][1]


def test_macs_see_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    tokens = 5
    projections, attention, mlp = tokens * 4 * 8 * 8, 2 * tokens * tokens * 8, tokens * 2 * 8 * 16
    assert measuring.macs(model, torch.zeros(3, tokens, 8)) == projections + attention + mlp
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_networks_that_need_real_numbers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.abs().sum().item() >= 0
            return self.lstm(x, (torch.zeros(1, len(x), 8), torch.zeros(1, len(x), 8)))[0]

    assert measuring.macs(Recurrent(), torch.zeros(2, 5, 4)) == 5 * 4 * 8 * (4 + 8)


def test_nonzero_counts_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    assert measuring.nonzero(model) == 3
    assert measuring.parameters(model) == 9


def test_file_bytes_are_those_of_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = small_convnet()
    safetensors.torch.save_file(measuring.state_tensors(model), tmp_path / "x.safetensors")
    assert measuring.file_bytes(model) == (tmp_path / "x.safetensors").stat().st_size


def test_evaluate_counts_and_keeps_modes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9))  # the input is the score of each class
    model[1].eval()
    scores = torch.eye(4)
    batches = [(scores, torch.tensor([0, 1, 2, 0])), (scores[:2], torch.tensor([0, 1]))]
    assert measuring.evaluate(model, batches, CPU) == 5 / 6
    assert model.training
    assert not model[1].training


def test_evaluate_needs_images() -> None:
    with pytest.raises(BadInput, match="at least one"):
        measuring.evaluate(nn.Identity(), [], CPU)


def test_latency_is_positive_for_each_model() -> None:
    model = build_model("resnet8", num_classes=10, image_shape=(1, 8, 8))
    times = measuring.latencies([model, nn.Identity()], torch.zeros(1, 1, 8, 8), seconds=0.001)
    assert len(times) == 2
    assert all(t > 0 for t in times)


def test_candidates_take_turns() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    times = measuring._take_turns(calls, seconds=1e-4, rounds=3, threads=1)
    assert [len(series) for series in times] == [3, 3, 3]
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b", "c"] * 3


def test_a_latency_compares_round_by_round() -> None:
    dense = Latency("dense", "eager", 1, 8, (2.0, 4.0, 8.0))
    small = Latency("small", "eager", 1, 8, (1.0, 1.0, 4.0))
    assert dense.quartiles() == (3.0, 4.0, 6.0)
    assert small.speedup(of=dense) == (2.0, 2.0, 3.0)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_every_model_is_measured_in_every_backend_and_the_rest_has_a_reason() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    models = {"plain": nn.Linear(4, 4), "branching": Branching()}
    threads = torch.get_num_threads()
    rows = backend_latencies(models, torch.ones(3, 4), backends=["eager", "onnx"], rounds=2, seconds=1e-4)
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


def test_networks_of_keyword_arguments_are_measured_too() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    inputs = {"left": torch.ones(3, 4), "right": torch.ones(3, 4)}
    rows = backend_latencies({"m": Named()}, inputs, backends=["eager", "onnx"], threads=[1], rounds=2, seconds=1e-4)
    assert [(row.batch, len(row.seconds), row.skipped) for row in rows] == [(3, 2, ""), (3, 2, "")]


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_graph_that_is_not_the_model_is_not_measured() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = backend_latencies(
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


def test_warming_up_and_measuring_have_the_threads_that_were_asked_for() -> None:
    Noting.seen.clear()
    backend_latencies({"m": Noting()}, torch.ones(1, 1), backends=["eager"], threads=[3], rounds=2, seconds=1e-4)
    assert Noting.seen[0] == torch.get_num_threads() != 3  # the check of the example
    assert set(Noting.seen[1:]) == {3}


def test_onnx_latency_is_that_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    asked: list[int] = []
    real = measuring.onnx_session
    monkeypatch.setattr(
        measuring, "onnx_session", lambda path, threads: (asked.append(threads), real(path, threads))[1]
    )
    backend_latencies(
        {"m": nn.Linear(4, 4)}, torch.ones(1, 4), backends=["onnx"], threads=[2, 1], rounds=2, seconds=1e-4
    )
    assert asked == [2, 1]


def test_latencies_refuse_what_they_cannot_measure() -> None:
    with pytest.raises(BadInput, match="did you mean 'eager'"):
        backend_latencies({"m": nn.Identity()}, torch.ones(1, 1), backends=["eagr"])
    with pytest.raises(BadInput, match="rounds"):
        backend_latencies({"m": nn.Identity()}, torch.ones(1, 1), rounds=1)
    with pytest.raises(BadInput, match="cannot be called"):
        backend_latencies({"m": nn.Linear(3, 3)}, torch.ones(1, 1), backends=["eager"])


@pytest.mark.slow
def test_compiled_models_are_measured_or_skipped_with_a_reason() -> None:
    (row,) = backend_latencies(
        {"m": nn.Sequential(nn.Linear(4, 4), nn.ReLU())},
        torch.ones(2, 4),
        backends=["compile"],
        threads=[1],
        rounds=2,
        seconds=1e-4,
    )
    assert bool(row.seconds) != bool(row.skipped), row
    assert statistics.median(row.seconds) > 0 if row.seconds else "ompiler" in row.skipped, row


def test_precision() -> None:
    assert measuring.resolve_precision("fp32", CPU) == "fp32"
    assert measuring.resolve_precision("auto", CPU) in ("fp32", "bf16")
    with pytest.raises(BadInput, match="precision"):
        measuring.resolve_precision("fp8", CPU)
