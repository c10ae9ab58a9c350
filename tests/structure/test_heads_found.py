"""Heads are found where attention reads them, whatever the layers are called and however their rows are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.compression import HeadPruning
from pliant.structure import coupled_channels
from tests.structure.cutting import cut

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))}
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [4, 8], "window_size": 4}
Case = tuple[nn.Module, Any, int]


def phi3() -> Case:
    config = transformers.Phi3Config(**SIZES, **ENDS, num_key_value_heads=2)
    return transformers.Phi3ForCausalLM(config), IDS, 2


def modernbert() -> Case:
    config = transformers.ModernBertConfig(**SIZES, **ENDS, cls_token_id=1, sep_token_id=2)
    return transformers.ModernBertForSequenceClassification(config), IDS, 2


def mixtral() -> Case:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    return transformers.MixtralForCausalLM(config), IDS, 2


def t5() -> Case:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    # one group for all blocks of a stack, which share the biases of the first one, and one for each cross-attention
    return transformers.T5Model(config), {**IDS, "decoder_input_ids": IDS["input_ids"]}, 4


def swin() -> Case:
    return transformers.SwinModel(transformers.SwinConfig(**SWIN)), torch.randn(2, 3, 32, 32), 2


def swin_v2() -> Case:
    return transformers.Swinv2Model(transformers.Swinv2Config(**SWIN)), torch.randn(2, 3, 32, 32), 2


def conformer() -> Case:
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=5,
    )
    return transformers.Wav2Vec2ConformerModel(config), torch.randn(2, 200), 1


def lora() -> Case:
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    adapted = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapted).requires_grad_(True), IDS, 2


REAL = [phi3, modernbert, mixtral, t5, swin, swin_v2, conformer, lora]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("build", REAL, ids=lambda build: build.__name__)
def test_heads_of_networks_of_other_packages(build: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    model, example, groups = build()
    structure = coupled_channels(model.eval(), example)
    assert sum(group.kind == "heads" for group in structure.groups) == groups, structure.refused
    cut(model, example, HeadPruning(0.5, allocation="uniform"))


class Own(nn.Module):
    """Attention whose layers have names of their own."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.width = layout, 4
        self.stem, self.last, self.head = nn.Linear(6, 12), nn.Linear(16, 12), nn.Linear(12, 3)
        self.alpha, self.beta, self.gamma = (nn.Linear(12, 16) for _ in range(3))
        self.all = nn.Linear(12, 48)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.layout == "stacked":
            q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in self.all(x).chunk(3, -1))
        elif self.layout == "by heads":
            q, k, v = self.all(x).unflatten(-1, (-1, 3, self.width)).permute(3, 0, 2, 1, 4)
        elif self.layout == "heads inside":
            q, k, v = (y.unflatten(-1, (self.width, -1)).permute(0, 3, 1, 2) for y in self.all(x).chunk(3, -1))
        else:
            layers = (self.alpha, self.beta, self.gamma)
            q, k, v = (layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in layers)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.layout == "by products":
            return (q @ k.transpose(-2, -1) / self.width**0.5).softmax(-1) @ v
        if self.layout == "by einsum":
            shares = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            return torch.einsum("bhqk,bhkd->bhqd", shares, v)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.attend(*self.split(x))
        y = y.permute(0, 2, 3, 1) if self.layout == "heads inside" else y.transpose(1, 2)
        return self.head((x + self.last(y.flatten(2))).mean(1))


@pytest.mark.parametrize(
    "layout", ["apart", "stacked", "by heads", "heads inside", "by products", "by einsum"], ids=lambda x: x
)
def test_names_and_layouts_do_not_matter(layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    (group,) = (group for group in coupled_channels(Own(layout), x).groups if group.kind == "heads")
    assert group.channels == 4
    small, _ = cut(Own(layout), x, HeadPruning(0.5, allocation="uniform"))
    assert small.get_submodule("last").in_features == 8
