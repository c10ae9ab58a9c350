import itertools

import pytest
import safetensors.torch
import torch
from torch import nn

import pliant
from pliant import measuring
from pliant.compression import FilterPruning, LowRank
from pliant.errors import BadInput
from pliant.experiments.models import build_model

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
    times = measuring.take_turns(calls, seconds=1e-4, rounds=3, threads=1)
    assert [len(series) for series in times] == [3, 3, 3]
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b", "c"] * 3


def test_precision() -> None:
    assert measuring.resolve_precision("fp32", CPU) == "fp32"
    assert measuring.resolve_precision("auto", CPU) in ("fp32", "bf16")
    with pytest.raises(BadInput, match="precision"):
        measuring.resolve_precision("fp8", CPU)


def test_the_versions_are_those_of_what_is_running() -> None:
    versions = measuring.versions()
    assert versions["pliant"] == pliant.__version__
    assert versions["torch"] == torch.__version__
