import pytest
import safetensors.torch
import torch
from torch import nn

from pliant import measuring
from pliant.errors import BadInput
from pliant.models import build_model

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


def test_precision() -> None:
    assert measuring.resolve_precision("fp32", CPU) == "fp32"
    assert measuring.resolve_precision("auto", CPU) in ("fp32", "bf16")
    with pytest.raises(BadInput, match="precision"):
        measuring.resolve_precision("fp8", CPU)
