"""Layers of classes with a forward of their own, and layers that are called several times: the proof decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.compression import FilterPruning, LowRank, compress
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES, conv, cut, pooled, removable


class NormedConv(nn.Conv2d):
    """A convolution with its normalisation and activation, as detectron2 has it."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class SameConv(nn.Conv2d):
    """A convolution that pads as TensorFlow does: timm's ``Conv2dSame``."""

    def forward(self, x: Tensor) -> Tensor:
        gaps = [
            (-(-n // s) - 1) * s + k - n for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        pads = [part for gap in reversed(gaps) for part in (max(gap, 0) // 2, max(gap, 0) - max(gap, 0) // 2)]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class ActivatedNorm(nn.BatchNorm2d):
    """A normalisation with an activation: timm's ``BatchNormAct2d``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        return self.act(self.drop(x))


class ChannelNorm(nn.LayerNorm):
    """A normalisation over the channels of images: timm's ``LayerNorm2d``."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Binary(nn.Conv2d):
    """Signs times their mean magnitude."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Equalised(nn.Linear):
    """A scale by the number of inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Adapted(nn.Linear):
    """A linear layer with an adapter of low rank."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.down, self.up = nn.Linear(columns, 3, bias=False), nn.Linear(3, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def images(*layers: nn.Module, channels: int = 12) -> nn.Sequential:
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 6), nn.ReLU(), nn.Linear(6, 4)
    )


def normed() -> nn.Sequential:
    first = NormedConv(3, 8, 3, norm=nn.BatchNorm2d(8), activation=F.relu)
    return images(first, NormedConv(8, 12, 3, norm=nn.BatchNorm2d(12), activation=F.relu))


def mobile() -> nn.Sequential:
    """As MobileNetV3 of timm: norms with activations around depthwise convolutions that pad by themselves."""
    depthwise = SameConv(8, 8, 3, stride=2, groups=8, bias=False)
    return images(conv(3, 8), ActivatedNorm(8), depthwise, ActivatedNorm(8), nn.Conv2d(8, 12, 1), ActivatedNorm(12))


GOOD = {
    "norm inside": (normed, {"0", "1", "4"}),
    "padding": (lambda: images(SameConv(3, 8, 3, stride=2), nn.ReLU(), SameConv(8, 12, 3)), {"0", "2", "5"}),
    "norms with activations": (mobile, {"0", "2", "4", "8"}),
    "activation": (
        lambda: nn.Sequential(nn.Flatten(), Activated(192, 9), Activated(9, 8), nn.Linear(8, 4)),
        {"1", "2"},
    ),
    "adapter": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), Adapted(8, 12), nn.Linear(12, 4)),
        {"1", "3", "3.down", "3.up"},
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_forward_of_its_own_that_treats_channels_one_by_one_is_cut(case: str) -> None:
    build, names = GOOD[case]
    torch.manual_seed(0)
    _, plan = cut(build())
    assert removable(plan) == names


BAD = {
    "weight standardisation": lambda: images(conv(3, 8), Standardised(8, 12, 3), nn.ReLU()),
    "binary": lambda: images(conv(3, 8), Binary(8, 12, 3), nn.ReLU()),
    "norm over channels": lambda: images(conv(3, 8), ChannelNorm(8), conv(8, 12), nn.ReLU()),
    "scale by inputs": lambda: nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), Equalised(8, 4), nn.Linear(4, 2)
    ),
    "doubled": lambda: images(conv(3, 8), Twice(8, 12, 3), nn.ReLU()),
}


class Twice(nn.Conv2d):
    """Reads some channels once more, by their places."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:, 3:4, 1:-1, 1:-1] * self.weight[0, 0, 0, 0]


@pytest.mark.parametrize("case", BAD)
def test_a_forward_of_its_own_that_mixes_channels_keeps_them(case: str) -> None:
    torch.manual_seed(0)
    model = BAD[case]()
    _, plan = cut(model)
    first = "0.1" if case == "scale by inputs" else "0"
    assert first in dict(plan.refused)
    assert first not in removable(plan)


def test_layers_are_replaced_by_type_only() -> None:
    plan = LowRank(0.5).plan(normed().append(nn.Linear(4, 4)), IMAGES)
    assert "forward of its own" in dict(plan.refused)["1"]


@pytest.mark.parametrize("case", [*GOOD, "weight standardisation", "binary"])
def test_refit_leaves_alone_what_is_no_plain_map(case: str) -> None:
    torch.manual_seed(0)
    model = (GOOD[case][0] if case in GOOD else BAD[case])()
    data = [(torch.randn(8, 3, 8, 8), torch.zeros(8)) for _ in range(3)]
    small = compress(model, FilterPruning(0.4, allocation="uniform"), IMAGES, data)
    small(IMAGES)
    own = {name for name, m in small.named_modules() if type(m).__module__ == __name__ and name}
    cut_only = compress(model, FilterPruning(0.4, allocation="uniform"), IMAGES, data, refit=False)
    for name in own:
        if isinstance(small.get_submodule(name), (nn.Conv2d, nn.Linear)):
            assert torch.equal(small.get_submodule(name).weight, cut_only.get_submodule(name).weight)


# --- called several times -----------------------------------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU())
        self.mix, self.head = nn.Linear(12, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([pooled(self.encoder(x)), pooled(self.encoder(y))], 1)
        return self.head(F.relu(self.mix(both)))


class Pyramid(nn.Module):
    """One head on all levels, as in FCOS."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([conv(3, 6), conv(6, 10, stride=2), conv(10, 14, stride=2)])
        self.laterals = nn.ModuleList([nn.Conv2d(n, 8, 1) for n in (6, 10, 14)])
        self.tower = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU())
        self.classes = conv(8, 5)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for level, lateral, scale in zip(self.levels, self.laterals, self.scales, strict=True):
            x = F.relu(level(x))
            outputs.append(self.classes(self.tower(lateral(x))) * scale)
        return outputs


class Recurrence(nn.Module):
    """The same block again and again, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.n = conv(3, 8), conv(8, 10), conv(10, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(3):
            x = x + self.n(self.c(F.relu(self.b(x))))
        return self.head(pooled(x))


class Steps(nn.Module):
    """A recurrent network of plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep, self.out, self.head = nn.Linear(24, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.keep.in_features)
        for row in x.permute(2, 0, 1, 3):
            state = torch.tanh(self.read(row.flatten(1)) + self.keep(state))
        return self.head(F.relu(self.out(state)))


class Unrolled(Steps):
    """The same, with a state as wide as what was read."""

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor | float = 0.0
        for row in x.permute(2, 0, 1, 3):
            new = self.read(row.flatten(1))
            state = torch.tanh(new + self.keep(state) if isinstance(state, Tensor) else new)
        return self.head(F.relu(self.out(state)))


class Patches(nn.Module):
    """One embedding for every part of an image, and one head for every class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.score = nn.Linear(48, 9), nn.Linear(9, 7), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            F.gelu(self.embed(part.flatten(1))) for part in x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).unbind(2)
        ]
        return torch.cat([self.score(F.relu(self.mlp(part))) for part in parts], 1)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Siamese, {"encoder.0", "encoder.3", "mix"}),
        (Pyramid, {f"levels.{i}" for i in range(3)} | {f"laterals.{i}" for i in range(3)} | {"tower.0", "tower.3"}),
        (Recurrence, {"a", "b", "c"}),
        (Unrolled, {"read", "keep", "out"}),
        (Patches, {"embed", "mlp"}),
    ],
)
def test_layers_that_are_called_several_times_are_cut(kind: type[nn.Module], names: set[str]) -> None:
    torch.manual_seed(0)
    inputs = (IMAGES, IMAGES.flip(0)) if kind is Siamese else IMAGES
    _, plan = cut(kind(), inputs)
    assert removable(plan) == names
    model = kind()
    data = [((torch.randn(8, 3, 8, 8),) * 2 if kind is Siamese else torch.randn(8, 3, 8, 8), 0) for _ in range(3)]
    compress(model, FilterPruning(0.4), inputs, data)


def test_a_state_of_fixed_width_keeps_the_layers_that_make_it_or_is_cut_with_them() -> None:
    structure = coupled_channels(Steps(), IMAGES)
    assert "out" in {group.name for group in structure.groups}
    cut(Steps())
