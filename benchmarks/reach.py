"""How far structure lets networks be cut: the smallest share of the parameters that filters and heads can reach.

    python benchmarks/reach.py [NAME ...]      # prints the table of docs/own-model.md: two minutes

The networks are small and untrained, of the architectures that users bring: from timm and transformers, where these are
installed, or of the same shape, written here. What is left below ten percent says nothing about accuracy: it shows that
no layer stands in the way. Every plan is proved against its masked twin, as always.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.packages import timm

from pliant import Chain, FilterPruning, HeadPruning, Refused, coupled_channels
from pliant.compression.budgets import SMALLEST

Case = tuple[nn.Module, Any]
IDS = {"input_ids": torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))}
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def unit(columns: int, rows: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(columns, rows, 3, stride, 1, bias=False),
        nn.BatchNorm2d(rows),
        nn.SiLU(),
    )


class C2f(nn.Module):
    """YOLOv8's block: a convolution in two halves, bottlenecks on one of them, and all of it concatenated."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.first, self.last = unit(columns, rows), unit(2 * rows, rows)
        self.blocks = nn.ModuleList(nn.Sequential(unit(rows // 2, rows // 2), unit(rows // 2, rows // 2)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """A backbone of C2f blocks with pooling at several sizes, a path back up, and heads over two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.down, self.high = unit(3, 16, 2), C2f(16, 32), unit(32, 64, 2), C2f(64, 64)
        self.before, self.after, self.up = unit(64, 32), unit(128, 64), C2f(96, 32)
        self.boxes = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in (32, 64))
        self.classes = nn.ModuleList(nn.Conv2d(width, 5, 1) for width in (32, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        low = self.low(self.stem(x))
        pools = [self.before(self.high(self.down(low)))]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        high = self.after(torch.cat(pools, 1))
        levels = [self.up(torch.cat([F.interpolate(high, scale_factor=2), low], 1)), high]
        return [torch.cat([b(y), c(y)], 1) for b, c, y in zip(self.boxes, self.classes, levels, strict=True)]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = unit(3, 16), unit(16, 32), unit(32, 64)
        self.up1, self.up2 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.d, self.e, self.out = unit(64, 32), unit(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        y = self.d(torch.cat([self.up1(c), b], 1))
        return self.out(self.e(torch.cat([self.up2(y), a], 1)))


class Siamese(nn.Module):
    """One encoder called on two images, of which the difference is segmented."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(unit(3, 16), unit(16, 32, 2), unit(32, 32))
        self.head = nn.Sequential(unit(32, 16), nn.Conv2d(16, 2, 1))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.head((self.encoder(before) - self.encoder(after)).abs())


class Generator(nn.Module):
    """DCGAN's: a vector, a linear layer, a view as an image, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.n0 = nn.Linear(20, 64 * 16), nn.BatchNorm2d(64)
        self.up1, self.n1 = nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32)
        self.up2, self.n2 = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16)
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.n0(self.fc(z).view(len(z), -1, 4, 4)).relu()
        x = self.n2(self.up2(self.n1(self.up1(x)).relu())).relu()
        return self.out(x).tanh()


class CRNN(nn.Module):
    """Text recognition: convolutions, the columns of the image as steps of a GRU, letters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(1, 16), nn.MaxPool2d(2), unit(16, 32), nn.MaxPool2d((2, 1)), unit(32, 32))
        self.project, self.rnn = nn.Linear(32 * 4, 32), nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.letters = nn.Linear(48, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).permute(0, 3, 1, 2).flatten(2)
        return self.letters(self.rnn(self.project(y).relu())[0])


def hugging(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return network


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


CONFORMER = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
CASES: dict[str, Callable[[], Case]] = {
    "MobileNetV3 (timm)": lambda: (timm().create_model("mobilenetv3_small_050", num_classes=10), image(64)),
    "detector with C2f blocks": lambda: (Detector(), image(32)),
    "U-Net": lambda: (UNet(), image(32)),
    "Siamese encoder": lambda: (Siamese(), (image(16), image(16))),
    "GAN generator": lambda: (Generator(), torch.randn(2, 20)),
    "CRNN": lambda: (CRNN(), image(16, 1)),
    "Swin (transformers)": lambda: (
        hugging(
            "SwinModel",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[4, 8],
            window_size=4,
        ),
        image(32),
    ),
    "T5 (transformers)": lambda: (
        hugging("T5Model", "T5Config", vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
    ),
    "Llama, GQA (transformers)": lambda: (
        hugging("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2),
        IDS,
    ),
    "Phi-3 (transformers)": lambda: (
        hugging("Phi3ForCausalLM", "Phi3Config", **SIZES, **ENDS, num_key_value_heads=2),
        IDS,
    ),
    "Mixtral (transformers)": lambda: (
        hugging("MixtralForCausalLM", "MixtralConfig", **SIZES, num_key_value_heads=2, num_local_experts=2),
        IDS,
    ),
    "ModernBERT (transformers)": lambda: (
        hugging(
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            **SIZES,
            **ENDS,
            cls_token_id=1,
            sep_token_id=2,
        ),
        IDS,
    ),
    "Conformer (transformers)": lambda: (
        hugging(
            "Wav2Vec2ConformerModel",
            "Wav2Vec2ConformerConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=5,
            **CONFORMER,
        ),
        torch.randn(2, 200),
    ),
}


def row(name: str) -> str:
    """Return the line of the table for a network."""
    torch.manual_seed(0)
    model, example = CASES[name]()
    compressor = Chain(HeadPruning(SMALLEST), FilterPruning(SMALLEST))
    try:
        plan = compressor.plan(model.eval(), example)
    except Refused as error:
        return f"| {name} | 100 % | {error} |"
    left = Counter(reason.partition(" (")[0] for _, reason in coupled_channels(model, example).refused)
    reason, count = left.most_common(1)[0]
    return f"| {name} | {plan.params_after / plan.params_before:.1%} | {count} of {sum(left.values())}: {reason} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; all networks without any")
    names = parser.parse_args().names
    print("| network | least | what stays, mostly because |\n|---|---|---|")
    for name in CASES:
        if not names or any(part in name for part in names):
            print(row(name), flush=True)


if __name__ == "__main__":
    main()
