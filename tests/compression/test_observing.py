"""Maps of a network: found by name, watched while it runs, and nothing of it stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import HeadPruning, Int8, LowRank, compress
from pliant.compression.observing import linear_map, map_names, observing, unfused
from pliant.structure import ThinAttention

X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.core = nn.MultiheadAttention(12, 4, batch_first=True)
        self.conv = nn.Conv1d(5, 4, 3, groups=1)
        self.emb = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.conv(self.core(x, x, x)[0])


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_names_of_all_maps_in_the_order_of_the_model() -> None:
    assert map_names(network()) == ["fc", "core", "core.out_proj", "conv"]
    assert map_names(nn.Linear(2, 3)) == [""]
    assert map_names(nn.MultiheadAttention(4, 2)) == ["", "out_proj"]
    shared = nn.Linear(2, 2)
    assert map_names(nn.Sequential(shared, nn.ReLU(), shared)) == ["0"]


def test_maps_share_the_memory_of_their_parameters() -> None:
    library = pytest.importorskip("transformers.pytorch_utils")
    net = network()
    net.transposed = library.Conv1D(5, 7)
    for name in ("fc", "core", "core.out_proj", "conv", "transposed"):
        found, layer = linear_map(net, name), net.get_submodule(name)
        weight = layer.in_proj_weight if name == "core" else layer.weight
        bias = layer.in_proj_bias if name == "core" else layer.bias
        assert found is not None
        assert found.bias is not None
        assert found.weight.shape == (weight.T.shape if name == "transposed" else weight.shape)
        assert (found.layer is layer, found.name, found.weight.requires_grad) == (True, name, False)
        found.weight.fill_(3)
        found.bias.fill_(4)
        assert (weight == 3).all()
        assert (bias == 4).all()


def test_modules_without_a_weight_of_floats_are_no_maps() -> None:
    net = network()
    assert linear_map(net, "emb") is not None  # callers ask for layers only
    assert linear_map(nn.Sequential(nn.ReLU()), "0") is None
    assert linear_map(nn.MultiheadAttention(4, 2, kdim=3), "") is None
    assert linear_map(compress(nn.Sequential(nn.Linear(8, 8)), Int8(), torch.randn(2, 8)), "0") is None
    nn.utils.parametrizations.weight_norm(net.fc)
    assert linear_map(net, "fc") is None
    assert linear_map(nn.Linear(2, 3, bias=False), "").bias is None  # type: ignore[union-attr]


def test_what_is_watched_is_y_of_x_and_the_outputs_are_those_of_the_network() -> None:
    net = network()
    expected = net(X).detach()
    seen: list[str] = []

    def watch(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        seen.append(name)
        found = linear_map(net, name)
        assert found is not None
        if name != "conv":
            torch.testing.assert_close(x @ found.weight.T + found.bias, y)

    with torch.no_grad(), observing(net, map_names(net), watch):
        torch.testing.assert_close(net(X), expected)
    assert sorted(seen) == ["conv", "core", "core.out_proj", "fc"]
    seen.clear()
    net(X)
    assert seen == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with torch.no_grad(), observing(net, ["core.out_proj"], watch):
        net(X)
    assert seen == ["core.out_proj"]


def test_heads_that_have_left_and_thin_layers_are_watched() -> None:
    small = compress(network(), HeadPruning(0.5), X).eval()
    shapes = {}

    def watch(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        shapes[name] = (tuple(x.shape), tuple(y.shape))

    with torch.no_grad(), observing(small, map_names(small), watch):
        small(X)
    assert shapes["core"] == ((3, 5, 12), (3, 5, 18))
    assert shapes["core.out_proj"] == ((3, 5, 6), (3, 5, 12))
    thin = compress(nn.Sequential(nn.Linear(12, 12)), LowRank(0.5), X).eval()
    with torch.no_grad(), observing(thin, map_names(thin), watch):
        thin(X)
    assert shapes["0.reduce"][0] == shapes["0.expand"][1] == (3, 5, 12)


def test_an_error_leaves_nothing_behind() -> None:
    net = network()
    state = copy.deepcopy(net.state_dict())
    enabled = torch.backends.mha.get_fastpath_enabled()

    def watch(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError), torch.no_grad(), observing(net, map_names(net), watch):
        net(X)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    net(X)
    torch.testing.assert_close(net.state_dict(), state)
    with pytest.raises(ZeroDivisionError), unfused():
        1 / torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == enabled


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_tokens_of_an_encoder_are_numbers_and_no_zeros() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 16, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        fused = net(X, src_key_padding_mask=padding)
        with unfused():
            plain = net(X, src_key_padding_mask=padding)
        names: list[str] = []
        with observing(net, map_names(net), lambda name, *_: names.append(name)):
            watched = net(X, src_key_padding_mask=padding)
    assert (fused[padding] == 0).all(), "no fused kernel: the test is blind"
    torch.testing.assert_close(plain[~padding], fused[~padding])
    torch.testing.assert_close(watched, plain)
    assert len(names) == 8


@pytest.mark.parametrize("names", [["core"], ["core.out_proj"], ["fc", "core", "core.out_proj", "conv"]])
def test_attention_is_what_it_was_afterwards(names: list[str]) -> None:
    net = network()
    before = {**vars(net.core)}
    with torch.no_grad(), observing(net, names, lambda *_: None):
        net(X)
        assert type(net.core) is ThinAttention
    assert type(net.core) is nn.MultiheadAttention
    assert vars(net.core) == before
    small = compress(network(), HeadPruning(0.5), X).eval()
    with torch.no_grad(), observing(small, names, lambda *_: None):
        small(X)
    assert type(small.core) is ThinAttention
    assert small.core.watch is None
