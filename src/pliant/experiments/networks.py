"""The networks of the experiments, for images of any channel count and (almost) any size.

A network is an ``nn.Sequential`` of named layers in the order of computation; only blocks with a shortcut or attention
are classes.

Training and compression rely on three properties of every network. A layer is initialised only by its own
``reset_parameters``, because the radius of a constraint is measured by drawing from it again. A convolution before a
BatchNorm has no bias. No layer is used twice or works in place, so that a graph tracer sees every tie.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import BadInput

ImageShape = tuple[int, int, int]
"""Channels, height and width of an image."""


def _scaled(channels: int, width: float) -> int:
    return max(1, int(channels * width + 0.5))


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


# --- plain networks ---------------------------------------------------------------------------------------------------


def mlp(*, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    """Two hidden layers of 300 and 100 neurons, no BatchNorm: LeNet-300-100 (LeCun et al. 1998) with ReLU."""
    hidden1, hidden2 = _scaled(300, width), _scaled(100, width)
    return _named(
        flatten=nn.Flatten(),
        fc1=nn.Linear(math.prod(image_shape), hidden1),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden1, hidden2),
        relu2=nn.ReLU(),
        fc3=nn.Linear(hidden2, num_classes),
    )


def lenet5(*, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU, max-pooling and BatchNorm.

    Both 5×5 convolutions are padded to keep the image size, so that 8×8 images are enough; the first linear
    layer therefore sees 7×7 instead of 5×5 positions on a 28×28 image.
    """
    channels, height, breadth = image_shape
    conv1, conv2, fc1, fc2 = (_scaled(c, width) for c in (6, 16, 120, 84))
    return _named(
        conv1=nn.Conv2d(channels, conv1, 5, padding=2, bias=False),
        bn1=nn.BatchNorm2d(conv1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(conv1, conv2, 5, padding=2, bias=False),
        bn2=nn.BatchNorm2d(conv2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(conv2 * (height // 4) * (breadth // 4), fc1),
        relu3=nn.ReLU(),
        fc2=nn.Linear(fc1, fc2),
        relu4=nn.ReLU(),
        fc3=nn.Linear(fc2, num_classes),
    )


def vgg16(*, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    """VGG-16 (Simonyan & Zisserman 2015, column D) with BatchNorm and, for small images, one linear layer.

    Pools round up, which changes nothing at multiples of 32 and keeps 28×28 or 8×8 images from vanishing.
    """
    features: list[nn.Module] = []
    c_in = image_shape[0]
    for channels, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        c_out = _scaled(channels, width)
        for _ in range(convolutions):
            features += [_conv3x3(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        features.append(nn.MaxPool2d(2, ceil_mode=True))
    return _named(
        features=nn.Sequential(*features),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(c_in, num_classes),
    )


# --- residual networks ------------------------------------------------------------------------------------------------


def resnet(
    channels: tuple[int, ...], blocks: int, *, num_classes: int, image_shape: ImageShape, width: float
) -> nn.Module:
    """ResNet (He et al. 2015) for small images: a 3×3 stem of stride 1, no max-pool, basic blocks.

    One stage of ``blocks`` blocks for each entry of ``channels``: 16, 32, 64 are the networks of the paper's
    §4.2, with projections (option B) where the shape changes; 64, 128, 256, 512 are its ResNet-18.
    """
    stem, *stages = (_scaled(c, width) for c in channels[:1] + channels)
    return _named(
        conv1=_conv3x3(image_shape[0], stem),
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        **_stages(BasicBlock, stem, stages, blocks),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(stages[-1], num_classes),
    )


def resnet50(*, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    """ResNet-50 (He et al. 2015) with bottleneck blocks whose 3×3 convolution has the stride, as usual today.

    Images of 128 pixels and more go through the 7×7 stem of stride 2 and the max-pool, smaller ones through the stem
    of :func:`resnet`.
    """
    stem, *inner = (_scaled(c, width) for c in (64, 64, 128, 256, 512))
    large = min(image_shape[1:]) >= 128
    if large:
        conv1 = nn.Conv2d(image_shape[0], stem, 7, stride=2, padding=3, bias=False)
    else:
        conv1 = _conv3x3(image_shape[0], stem)
    stages: dict[str, nn.Module] = {}
    c_in = stem
    for index, (c, blocks) in enumerate(zip(inner, (3, 4, 6, 3), strict=True), start=1):
        first = Bottleneck(c_in, c, stride=1 if index == 1 else 2)
        c_in = Bottleneck.EXPANSION * c
        stages[f"layer{index}"] = nn.Sequential(first, *(Bottleneck(c_in, c) for _ in range(blocks - 1)))
    return _named(
        conv1=conv1,
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        **({"maxpool": nn.MaxPool2d(3, stride=2, padding=1)} if large else {}),
        **stages,
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(c_in, num_classes),
    )


def wide_resnet(
    depth: int,
    widen: int,
    *,
    num_classes: int,
    image_shape: ImageShape,
    width: float,
) -> nn.Module:
    """Pre-activation wide ResNet (Zagoruyko & Komodakis 2016) without dropout; depth = 6·blocks + 4."""
    stem, *stages = (_scaled(c, width) for c in (16, 16 * widen, 32 * widen, 64 * widen))
    return _named(
        conv1=_conv3x3(image_shape[0], stem),
        **_stages(PreActBlock, stem, stages, (depth - 4) // 6),
        bn=nn.BatchNorm2d(stages[-1]),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(stages[-1], num_classes),
    )


def _stages(
    block: type[BasicBlock] | type[PreActBlock], c_in: int, channels: list[int], blocks: int
) -> dict[str, nn.Module]:
    """Return ``layer1``, ``layer2``, …, one per entry of ``channels``; all but the first halve the image."""
    stages: dict[str, nn.Module] = {}
    for index, c_out in enumerate(channels, start=1):
        first = block(c_in, c_out, stride=1 if index == 1 else 2)
        stages[f"layer{index}"] = nn.Sequential(first, *(block(c_out, c_out) for _ in range(blocks - 1)))
        c_in = c_out
    return stages


def _projection(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Return the shortcut around a block: the identity if the shapes agree, else a 1×1 convolution with BatchNorm."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut: (B, c_in, H, W) to (B, c_out, ⌈H/stride⌉, ⌈W/stride⌉)."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv3x3(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(self.downsample(x) + y)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a shortcut: (B, c_in, H, W) to (B, 4c, ⌈H/stride⌉, ⌈W/stride⌉)."""

    EXPANSION = 4

    def __init__(self, c_in: int, c: int, stride: int = 1) -> None:
        super().__init__()
        c_out = self.EXPANSION * c
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = _conv3x3(c, c, stride)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(self.downsample(x) + y)


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions; shapes as ``BasicBlock``.

    A projection starts from the activated input, as in the authors' networks; an identity from the raw one.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv3x3(c_out, c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut + residual, without an activation at the end."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = F.relu(self.bn2(self.conv1(y)))
        out: Tensor = shortcut + self.conv2(y)
        return out


# --- vision transformer -----------------------------------------------------------------------------------------------


def vit_tiny(*, num_classes: int, image_shape: ImageShape, width: float) -> nn.Module:
    """Vision transformer with 3 heads × 64 channels (DeiT-Ti, Touvron et al. 2021), adapted to small images.

    The patch size is the smallest power of two from 2 to 16 that cuts the longer side into at most 8 pieces (2 for
    8×8, 4 for 28×28 and 32×32, 16 for 224×224); the depth is DeiT's 12 above 32 pixels, else 6.
    """
    channels, height, breadth = image_shape
    patch = 2
    while patch < 16 and max(height, breadth) > 8 * patch:
        patch *= 2
    if height % patch or breadth % patch:
        raise BadInput(
            f"model 'vit_tiny' cuts {height}×{breadth} images into patches of {patch}×{patch}: "
            f"resize them to multiples of {patch}"
        )
    num_heads = _scaled(3, width)
    dim = 64 * num_heads
    depth = 12 if max(height, breadth) > 32 else 6
    return _named(
        patch_embed=nn.Conv2d(channels, dim, patch, stride=patch),
        pos_embed=PositionEmbedding((height // patch) * (breadth // patch), dim),
        blocks=nn.Sequential(*(TransformerBlock(dim, num_heads) for _ in range(depth))),
        norm=nn.LayerNorm(dim),
        pool=MeanTokens(),
        head=nn.Linear(dim, num_classes),
    )


class PositionEmbedding(nn.Module):
    """A layer that turns a map of patches (B, dim, H, W) into tokens (B, H·W, dim) and adds a learned position."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(tokens, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the positions from N(0, 0.02²), the initialisation of Dosovitskiy et al. (2021)."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, row by row of the map."""
        return x.flatten(2).transpose(1, 2) + self.table


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each after a LayerNorm and with a shortcut: (B, T, dim) to (B, T, dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention, and the MLP added to that."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (B, T, dim) to (B, T, dim).

    The rows of ``qkv`` are queries, keys and values; each of these is ordered by heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Kept as a number: a head that loses channels must still divide by the root of its original size.
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projected concatenation of all heads."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(
            self._split_heads(q), self._split_heads(k), self._split_heads(v), scale=self.scale
        )
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.num_heads, -1)).transpose(1, 2)


class MeanTokens(nn.Module):
    """Mean over the tokens: (B, T, dim) to (B, dim), in place of a class token (Beyer et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean token."""
        return x.mean(1)
