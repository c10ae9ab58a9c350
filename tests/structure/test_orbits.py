"""Channels that own several positions: gates of one layer, shuffles, groups, flattened images; they leave together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.compression import FilterPruning, compress
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES, conv, cut, pooled, removable

Forward = Callable[[Any, Tensor], Tensor]
Case = tuple[Callable[[], nn.Module], set[str]]
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Layers, and a function of them and the input as forward."""

    def __init__(self, compute: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


# --- gate and value in one layer --------------------------------------------------------------------------------------


def simple_gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b


def sliced_gate(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:].sigmoid()


def interleaved_gate(x: Tensor) -> Tensor:
    return F.silu(x[:, ::2]) * x[:, 1::2]


def unflattened_gate(x: Tensor) -> Tensor:
    value, gate = x.unflatten(1, (2, -1)).unbind(1)
    return value * F.gelu(gate)


def split_gate(x: Tensor) -> Tensor:
    value, gate = x.split(x.shape[1] // 2, 1)
    return value * gate.tanh()


def max_feature_map(x: Tensor) -> Tensor:
    return torch.maximum(*x.chunk(2, 1))


def maxout(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, 2)).amax(2)


GATES = [
    nn.GLU(1),
    simple_gate,
    sliced_gate,
    interleaved_gate,
    unflattened_gate,
    split_gate,
    max_feature_map,
    maxout,
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", "GLU"))
def test_gate_and_value_of_one_layer_leave_together(gate: Callable[[Tensor], Tensor]) -> None:
    layers = {"a": conv(3, 16), "n": nn.BatchNorm2d(16), "b": conv(8, 6), "head": nn.Linear(6, 5)}
    model = Net(lambda n, x: n.head(pooled(n.b(gate(n.n(n.a(x)))))), **layers)
    small, plan = cut(model)
    assert removable(plan) == {"a", "b"}
    assert small.get_submodule("a").out_channels == 2 * small.get_submodule("b").in_channels < 16


class GEGLU(nn.Module):
    """The MLP of many transformers."""

    def __init__(self, activation: Callable[[Tensor], Tensor], *, gate_first: bool) -> None:
        super().__init__()
        self.activation, self.gate_first = activation, gate_first
        self.wi, self.wo, self.head = nn.Linear(6, 20), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wi(x).chunk(2, dim=-1)
        a, b = (a, b) if self.gate_first else (b, a)
        return self.head((x + self.wo(self.activation(a) * b)).mean(1))


@pytest.mark.parametrize("activation", [F.gelu, F.silu, torch.relu], ids=["GEGLU", "SwiGLU", "ReGLU"])
@pytest.mark.parametrize("gate_first", [False, True])
def test_gated_mlps_in_one_layer(activation: Callable[[Tensor], Tensor], gate_first: bool) -> None:
    small, plan = cut(GEGLU(activation, gate_first=gate_first), TOKENS)
    assert removable(plan) == {"wi"}
    assert small.get_submodule("wi").out_features == 2 * small.get_submodule("wo").in_features == 10


# --- shuffles and splits ----------------------------------------------------------------------------------------------


def shuffle(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def ends(net: Any, x: Tensor) -> Tensor:
    return net.head(pooled(net.last(x.relu())))


def tail(columns: int) -> dict[str, nn.Module]:
    return {"last": conv(columns, 6), "head": nn.Linear(6, 5)}


class C2f(nn.Module):
    """YOLOv8's block: two halves of one convolution, of which one goes through bottlenecks with a shortcut."""

    def __init__(self, *, add: bool) -> None:
        super().__init__()
        self.add = add
        self.cv1, self.n1, self.cv2 = conv(3, 16), nn.BatchNorm2d(16), conv(32, 12)
        self.m = nn.ModuleList(nn.Sequential(conv(8, 8), nn.SiLU(), conv(8, 8)) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.n1(self.cv1(x)).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]) if self.add else m(y[-1]))
        return self.head(pooled(self.cv2(torch.cat(y, 1))))


class SelectiveKernel(nn.Module):
    """Two branches that attention over them sums up (SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), nn.Conv2d(3, 8, 5, padding=2), nn.Linear(8, 4)
        self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x).relu(), self.b(x).relu()], 1)
        z = self.fc(branches.sum(1).mean((2, 3))).relu()
        weights = torch.stack([self.one(z), self.two(z)], 1).softmax(1)
        return self.head((branches * weights[..., None, None]).sum(1).mean((2, 3)))


class SpatialAttention(nn.Module):
    """A map over places, made of the mean and the largest channel (CBAM), scales all channels alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.map, self.last, self.head = (
            conv(3, 8),
            conv(8, 4),
            nn.Conv2d(4, 1, 1),
            conv(8, 6),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return ends(self, y * self.map(self.gate(y).relu()).sigmoid())


SHUFFLES: dict[str, Case] = {
    "pixel shuffle": (
        lambda: Net(lambda n, x: ends(n, F.pixel_shuffle(n.a(x), 2)), a=conv(3, 32), **tail(8)),
        {"a", "last"},
    ),
    "pixel unshuffle": (
        lambda: Net(lambda n, x: ends(n, F.pixel_unshuffle(n.a(x), 2)), a=conv(3, 8), **tail(32)),
        {"a", "last"},
    ),
    "space to depth by slices": (
        lambda: Net(
            lambda n, x: ends(n, torch.cat([n.a(x)[..., ::2, ::2], n.b(x)[..., 1::2, 1::2]], 1)),
            a=conv(3, 8),
            b=conv(3, 8),
            **tail(16),
        ),
        {"a", "b", "last"},
    ),
    "channel shuffle": (
        lambda: Net(lambda n, x: ends(n, shuffle(n.a(x))), a=conv(3, 8), **tail(8)),
        {"a", "last"},
    ),
    "nn.ChannelShuffle": (
        lambda: Net(lambda n, x: ends(n, n.s(n.a(x))), a=conv(3, 8), s=nn.ChannelShuffle(2), **tail(8)),
        {"last"},
    ),
    "C2f": (lambda: C2f(add=True), {"cv1", "cv2", "m.0.0", "m.0.2", "m.1.0", "m.1.2"}),
    "C2f without shortcut": (lambda: C2f(add=False), {"cv1", "cv2", "m.0.0", "m.0.2", "m.1.0", "m.1.2"}),
    "selective kernel": (SelectiveKernel, {"a", "b", "fc", "one", "two"}),
    "spatial attention": (SpatialAttention, {"a", "gate", "last"}),
}


@pytest.mark.parametrize("case", SHUFFLES)
def test_what_moves_channels_about_keeps_them_together(case: str) -> None:
    torch.manual_seed(0)
    build, expected = SHUFFLES[case]
    _, plan = cut(build())
    assert removable(plan) == expected


# --- images from vectors, vectors from images -------------------------------------------------------------------------


def generator(view: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    layers = {"fc": nn.Linear(4, 8 * 9), "up": nn.ConvTranspose2d(8, 6, 4, 2, 1), "out": conv(6, 3)}
    return Net(lambda n, z: n.out(n.up(view(n, n.fc(z)).relu()).relu()).tanh(), **layers)


VIEWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the width of the next layer": lambda n, h: h.view(-1, n.up.in_channels, 3, 3),
    "open": lambda n, h: h.view(len(h), -1, 3, 3),
    "unflatten": lambda n, h: h.unflatten(1, (-1, 3, 3)),
    "last": lambda n, h: h.view(len(h), 3, 3, -1).permute(0, 3, 1, 2),
    "reshape in steps": lambda n, h: h.reshape(len(h), -1, 9).unflatten(2, (3, 3)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_vectors_become_images(view: str) -> None:
    small, plan = cut(generator(VIEWS[view]), NOISE)
    assert removable(plan) == {"fc", "up"}
    assert small.get_submodule("fc").out_features == 9 * small.get_submodule("up").in_channels < 72


FLATTENED: dict[str, Forward] = {
    "channels first": lambda n, x: n.fc(n.a(x).relu().flatten(1)),
    "channels last": lambda n, x: n.fc(n.a(x).relu().permute(0, 2, 3, 1).flatten(1)),
    "width first": lambda n, x: n.fc(n.a(x).relu().transpose(1, 3).reshape(len(x), -1)),
    "channels between": lambda n, x: n.fc(n.a(x).relu().transpose(1, 2).flatten(1)),
    "tokens": lambda n, x: n.fc(n.a(x).flatten(2).transpose(1, 2).relu().reshape(len(x), -1)),
}


@pytest.mark.parametrize("order", FLATTENED)
def test_images_become_vectors_in_any_order(order: str) -> None:
    small, plan = cut(Net(FLATTENED[order], a=conv(3, 8), fc=nn.Linear(512, 5)))
    assert removable(plan) == {"a"}
    assert small.get_submodule("fc").in_features == 256


# --- groups -----------------------------------------------------------------------------------------------------------


class GroupNormBlock(nn.Module):
    def __init__(self, channels: int, groups: int, *, affine: bool = True) -> None:
        super().__init__()
        self.c1, self.c2 = conv(channels, channels), conv(channels, channels)
        self.n1, self.n2 = (nn.GroupNorm(groups, channels, affine=affine) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.n2(self.c2(self.n1(self.c1(x)).relu()))).relu()


class ResNeXtBlock(nn.Module):
    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = conv(width, width, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.d = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.d(self.nb(self.b(self.na(self.a(x)).relu())).relu())).relu()


def sequence(*layers: nn.Module, width: int = 16) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def eegnet() -> nn.Module:
    return sequence(
        conv(3, 8),
        nn.BatchNorm2d(8),
        conv(8, 16, groups=8),
        nn.BatchNorm2d(16),
        nn.ELU(),
        conv(16, 16, groups=16),
        nn.Conv2d(16, 16, 1),
        nn.ELU(),
    )


GROUPS: dict[str, Case] = {
    "GroupNorm": (
        lambda: sequence(conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), GroupNormBlock(16, 4)),
        {"0", "3.c1", "3.c2"},
    ),
    "GroupNorm without scales": (
        lambda: sequence(conv(3, 16), nn.ReLU(), GroupNormBlock(16, 8, affine=False)),
        {"0", "2.c1", "2.c2"},
    ),
    "ResNeXt": (
        lambda: sequence(conv(3, 16), nn.ReLU(), ResNeXtBlock(16, 32, 8)),
        {"0", "2.a", "2.b", "2.d"},
    ),
    "two grouped convolutions": (
        lambda: sequence(conv(3, 12), conv(12, 24, groups=4), nn.ReLU(), conv(24, 16, groups=8), nn.ReLU()),
        {"0", "1", "3"},
    ),
    "depthwise with a multiplier": (eegnet, {"0", "2", "5", "6"}),
}


@pytest.mark.parametrize("case", GROUPS)
def test_whole_groups_leave(case: str) -> None:
    torch.manual_seed(0)
    build, expected = GROUPS[case]
    small, plan = cut(build())
    assert removable(plan) == expected
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == 2 * module.num_groups or module.num_channels == 4 * module.num_groups


def test_groups_of_a_norm_keep_their_size() -> None:
    model = sequence(conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), GroupNormBlock(16, 4))
    group = next(group for group in coupled_channels(model, IMAGES).groups if group.name == "3.c1")
    assert [slot.indices.tolist() for slot in group.slots] == [
        [list(range(4 * i, 4 * i + 4)) for i in range(4)] for _ in group.slots
    ]


# --- with data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["C2f", "pixel shuffle", "GroupNorm", "ResNeXt", "depthwise with a multiplier"])
def test_data_choose_and_correct_channels_of_several_positions(case: str) -> None:
    torch.manual_seed(0)
    build, expected = (SHUFFLES | GROUPS)[case]
    model = build().eval()
    data = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    outputs = model(data[0]).detach()
    errors = []
    for calibration in (None, data):
        compressor = FilterPruning(0.4, allocation="uniform")
        assert removable(compressor.plan(model, IMAGES)) == expected
        small = compress(model, compressor, IMAGES, calibration)
        errors.append(float((small.eval()(data[0]).detach() - outputs).square().mean()))
    assert errors[1] < errors[0]


# --- sizes from attributes --------------------------------------------------------------------------------------------


class HeldWidth(nn.Module):
    """A forward that takes the sizes of the parts from attributes of its module."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.c, self.both, self.classes = spelling, 8, 16, 5
        self.a, self.n, self.last, self.head = conv(3, 16), nn.BatchNorm2d(16), conv(8, 6), nn.Linear(6, 5)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.spelling == "split":
            return x.split((self.c, self.c), 1)
        if self.spelling == "slices":
            return x[:, : self.c], x[:, self.c : 2 * self.c]
        if self.spelling == "view":
            return x.view(len(x), 2, self.c, *x.shape[2:]).unbind(1)
        if self.spelling == "narrow":
            return x.narrow(1, 0, self.c), x.narrow(1, self.c, self.both - self.c)
        return x.unflatten(1, (2, self.both // 2)).unbind(1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.parts(self.n(self.a(x)))
        y = ends(self, first * second.sigmoid())
        return y.view(-1, self.classes)


@pytest.mark.parametrize("spelling", ["split", "slices", "view", "narrow", "unflatten"])
def test_sizes_that_a_module_holds_change_with_the_channels(spelling: str) -> None:
    torch.manual_seed(0)
    small, plan = cut(HeldWidth(spelling))
    assert removable(plan) == {"a", "last"}
    width = small.both if spelling == "unflatten" else 2 * small.c
    assert small.get_submodule("a").out_channels == width < 16
    assert small.classes == 5
