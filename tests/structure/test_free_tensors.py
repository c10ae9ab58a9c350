"""Tensors along channels that belong to no known layer: they leave with the channels, whatever module holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.compression import FilterPruning, HeadPruning, Plan, compress, masked_twin, replay
from pliant.compression.applying import skeleton
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES, Body, conv, cut, package, pooled, removable


class FrozenNorm(nn.Module):
    """A normalisation by buffers: torchvision's ``FrozenBatchNorm2d``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class CalledNorm(FrozenNorm):
    """detectron2's, which hands its buffers to PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class Frozen(Body):
    def __init__(self, kind: type[nn.Module] = FrozenNorm) -> None:
        super().__init__()
        self.n, self.m = kind(8), kind(12)

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.m(self.b(self.middle(x))))


class FrozenStream(Body):
    """Frozen norms on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.c, self.m = FrozenNorm(8), conv(8, 8), FrozenNorm(8)

    def middle(self, x: Tensor) -> Tensor:
        x = super().middle(x)
        return F.relu(x + self.m(self.c(x)))


class Scaled(Body):
    """Scales of several shapes, two of them as long as each other on different channels, and held by the network."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv(8, 8)
        self.first, self.second = nn.Parameter(torch.full((1, 8, 1, 1), 1e-6)), nn.Parameter(torch.zeros(8, 1, 1))
        self.third = nn.Parameter(torch.ones(1, 12))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.c(super().middle(x) * self.first)) + self.second

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.b(self.middle(x))) * self.third


class LayerScale(nn.Module):
    """The scale of a branch, channels last: ConvNeXt's and CaiT's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2)


class Branch(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8), LayerScale(8))

    def middle(self, x: Tensor) -> Tensor:
        x = super().middle(x)
        return x + self.inner(x)


class GainedLinear(nn.Linear):
    """A linear layer with a gain of its own beside its weight."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.gain = nn.Parameter(torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.gain


class Gained(Body):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = GainedLinear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.hidden(self.features(x))))


class Handed(Body):
    """The network hands a tensor, which is in no state_dict, to a module that holds none."""

    class Scale(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale[None, :, None, None]

    def __init__(self) -> None:
        super().__init__()
        self.scale = Handed.Scale()
        self.register_buffer("steady", torch.linspace(0.5, 1.5, 8), persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        return self.scale(super().middle(x), self.steady)


class Places(Body):
    """A learnt offset for each row of the image and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(1, 8, 5, 1))

    def middle(self, x: Tensor) -> Tensor:
        return super().middle(x) + F.interpolate(self.offset, (8, 1))


class Tokens(Body):
    """A free parameter replaces masked places."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        if self.training:
            h = torch.where(torch.rand(len(x), 1, *h.shape[2:]) < 0.3, self.token, h)
        return self.head(pooled(self.b(h)))


MODELS: dict[str, tuple[Any, set[str], dict[str, int]]] = {  # what loses outputs, and the sizes of some tensors
    "frozen": (Frozen, {"a", "b"}, {"n.running_var": 1, "m.bias": 1}),
    "frozen, in one call": (lambda: Frozen(CalledNorm), {"a", "b"}, {"n.running_mean": 1}),
    "frozen stream": (FrozenStream, {"a", "b", "c"}, {"m.weight": 1}),
    "scales": (Scaled, {"a", "b", "c"}, {"first": 1, "second": 1, "third": 1}),
    "layer scale": (Branch, {"a", "b", "inner.0", "inner.2"}, {"inner.3.gamma": 1}),
    "gain": (Gained, {"a", "b", "hidden"}, {"hidden.gain": 1}),
    "handed": (Handed, {"a", "b"}, {}),
    "places": (Places, {"a", "b"}, {"offset": 5}),
    "token": (Tokens, {"a", "b"}, {"token": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_any_module_leave_with_the_channels(name: str) -> None:
    torch.manual_seed(0)
    build, expected, others = MODELS[name]
    model = build().eval()
    small, plan = cut(model)
    assert removable(plan) == expected
    dense, now = dict(model.state_dict()), dict(small.state_dict())
    for tensor, width in others.items():
        assert now[tensor].numel() < dense[tensor].numel()
        assert now[tensor].numel() % width == 0
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    replayed = replay(model, again)
    assert all(torch.equal(x, now[key]) for key, x in replayed.state_dict().items())
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    zeroed = FilterPruning(0.5, allocation="uniform", mode="mask")
    masked = zeroed.apply(model, zeroed.plan(model, IMAGES))
    with torch.no_grad():
        torch.testing.assert_close(masked.eval()(IMAGES), small.eval()(IMAGES), rtol=1e-4, atol=1e-6)


def test_balls_over_coupled_channels_leave_them_out() -> None:
    model = Scaled()
    coupled = coupled_channels(model, IMAGES).groups
    assert [len(group.others) for group in coupled] == [1, 1, 1]
    rules = [("*.weight", pliant.filters(k=0.5, radius=1))]
    optimizer = pliant.SFW(pliant.constrain(model, rules, default=None, coupled=coupled), lr=0.1)
    model(IMAGES).square().mean().backward()
    optimizer.step()


def test_data_choose_and_refit_such_channels() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    for build in (Frozen, Scaled):
        model = build().eval()
        small = compress(model, FilterPruning(0.5), IMAGES, batches)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert small.eval()(IMAGES).isfinite().all()


def test_folders_know_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    every = pliant.elastic(model, FilterPruning(allocation="uniform"), IMAGES, tmp_path / "every", batches, (0.5,))
    small: Any = pliant.rebuild(Scaled(), every, keep_params=0.5)
    assert small.first.numel() < 8
    assert small.eval()(IMAGES).isfinite().all()
    plan = FilterPruning(0.5).plan(model, IMAGES)
    small = FilterPruning().apply(model, plan)
    pliant.export(small, tmp_path / "small", IMAGES, formats=["safetensors"], plan=plan)
    again = pliant.rebuild(Scaled(), tmp_path / "small")
    assert torch.equal(again(IMAGES), small.eval()(IMAGES))


class MeanNorm(nn.Module):
    """A normalisation over the channels, by hand: ``LlamaRMSNorm``, ``LayerNorm2d``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


def test_a_module_that_mixes_channels_is_named() -> None:
    model = Body()
    model.n = MeanNorm()
    plan = FilterPruning(0.5).plan(model, IMAGES)
    reason = dict(plan.refused)["a"]
    assert "the MeanNorm 'n' does not treat its channels one by one" in reason
    assert removable(plan) == {"b"}


class Attention(nn.Module):
    """Attention with a scale per head, as Swin v2 has it, and with a table of biases, as Swin has it."""

    def __init__(self, heads: int = 4, size: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.qkv, self.proj = nn.Linear(12, 3 * heads * size), nn.Linear(heads * size, 12)
        self.logit_scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.table = nn.Parameter(torch.zeros(9, heads))
        self.register_buffer("index", (torch.arange(5)[:, None] - torch.arange(5)) + 4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        shares = (q @ k.transpose(-2, -1) * self.logit_scale.exp() + bias).softmax(-1)
        return self.head(self.proj((shares @ v).transpose(1, 2).reshape(n, t, -1)))


def test_tensors_along_heads_leave_with_them() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 12)
    small, plan = cut(model, x, HeadPruning(0.5))
    assert small.logit_scale.shape == (2, 1, 1)
    assert small.table.shape == (9, 2)
    assert small.qkv.out_features == 18
    torch.testing.assert_close(small(x), masked_twin(model, plan)(x))


@pytest.mark.filterwarnings("ignore")
def test_tables_of_biases_of_swin_leave_with_the_heads() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 4])).eval()
    small, plan = cut(model, torch.randn(2, 3, 16, 16), HeadPruning(0.5, allocation="uniform"))
    for layer, heads in zip(small.encoder.layers, (1, 2), strict=True):
        assert layer.blocks[0].attention.relative_position_bias.relative_position_bias_table.shape == (49, heads)
    assert next(x.others for x in plan.layers if x.others)[0][0] == "relative_position_bias_table.1"


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_biases_of_t5_leaves_with_the_heads_of_its_only_layer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=50, **sizes)).eval()
    small, _ = cut(model, {"input_ids": torch.randint(1, 50, (2, 6))}, HeadPruning(0.5, allocation="uniform"))
    assert small.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 2)


def test_what_meets_a_single_head_by_chance_stays() -> None:
    class Turned(Attention):
        """Frequencies as long as there are heads, which meet tensors of size one: rotary embeddings."""

        def __init__(self) -> None:
            super().__init__(heads=2)
            self.register_buffer("frequencies", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            angles = self.frequencies[None, :, None] * torch.arange(5.0)[None, None, :]
            return super().forward(x) * angles.cos().mean()

    torch.manual_seed(0)
    model = Turned().eval()
    del model.table, model.logit_scale  # no tensor of the heads themselves
    model.table, model.logit_scale = torch.zeros(9, 1), torch.ones(1)
    small, _ = cut(model, torch.randn(2, 5, 12), HeadPruning(0.5))
    assert small.frequencies.shape == (2,)


def test_a_frozen_norm_of_timm() -> None:
    model = Frozen(package("timm").layers.FrozenBatchNormAct2d)
    _, plan = cut(model.eval())
    assert removable(plan) == {"a", "b"}


def test_what_is_shared_or_reads_several_ways_stays() -> None:
    class Shared(Body):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = LayerScale(8), LayerScale(8)
            self.two.gamma = self.one.gamma

        def middle(self, x: Tensor) -> Tensor:
            return self.two(self.one(super().middle(x)))

    structure = coupled_channels(Shared(), IMAGES)
    assert "in 'one'" in dict(structure.refused)["a"]
    plan = FilterPruning(0.5).plan(model := Shared(), IMAGES)
    assert torch.equal(skeleton(model, plan).one.gamma, model.one.gamma)
