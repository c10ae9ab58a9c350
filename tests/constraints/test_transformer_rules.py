"""Rules for transformers: which weights they are for, and that what they make zero can leave for nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.calling import as_inputs, call, run
from pliant.compression import FilterPruning, HeadPruning, compress
from pliant.errors import BadInput
from pliant.norms import Channels, KSupport, Lp, NormBall, Spectral
from pliant.optim import SFW
from tests.structure.test_transformers import CASES, lively

# Names within a block: what makes heads, what makes neurons, and what reads them.
PARTS: dict[str, tuple[str, set[str], set[str], set[str]]] = {
    "bert": (
        "bert.encoder.layer.{}.",
        {"attention.self.query", "attention.self.key", "attention.self.value"},
        {"intermediate.dense"},
        {"attention.output.dense", "output.dense"},
    ),
    "gpt2": ("transformer.h.{}.", {"attn.c_attn"}, {"mlp.c_fc"}, {"attn.c_proj", "mlp.c_proj"}),
    "llama": (
        "model.layers.{}.",
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"self_attn.o_proj", "mlp.down_proj"},
    ),
}


def weights(name: str, *parts: set[str]) -> set[str]:
    prefix = PARTS[name][0]
    return {f"{prefix.format(block)}{layer}.weight" for block in (0, 1) for layer in set().union(*parts)}


def constrained(groups: list[dict[str, Any]], *lifts: type) -> set[str]:
    """Return the weight matrices whose ball has a norm of one of the given kinds."""
    found = [g for g in groups if g["ball"] and isinstance(NormBall.from_spec(g["ball"]).norm, lifts)]
    return {name for g in found for name in g["param_names"] if name.endswith("weight")}


@pytest.mark.parametrize("name", PARTS)
def test_every_linear_layer_of_the_blocks_gets_its_ball_and_nothing_else(name: str) -> None:
    model = CASES[name].build()
    groups = pliant.constrain(model, pliant.transformer_rules(model, linear=pliant.rank(k=0.1)), default=None)
    _, *parts = PARTS[name]
    assert constrained(groups, Spectral) == weights(name, *parts)
    free = {n for g in groups if g["ball"] is None for n in g["param_names"]}
    assert free == {n for n, _ in model.named_parameters()} - weights(name, *parts)
    row_dims = {NormBall.from_spec(g["ball"]).norm.dim for g in groups if g["ball"]}  # type: ignore[attr-defined]
    assert row_dims == ({1} if name == "gpt2" else {0})


@pytest.mark.parametrize("name", PARTS)
def test_heads_neurons_and_embeddings_are_told_apart(name: str) -> None:
    model = CASES[name].build()
    coupled = pliant.coupled_channels(model, CASES[name].inputs(2, 6)).groups
    rules = pliant.transformer_rules(
        model,
        heads=pliant.filters(k=1),
        neurons=pliant.filters(k=0.25),
        linear=pliant.rank(k=0.1),
        embeddings=pliant.l2(),
        coupled=coupled,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every rule decides for something
        groups = pliant.constrain(model, rules, default=None, coupled=coupled)
    _, heads, neurons, readers = PARTS[name]
    assert constrained(groups, Channels) == weights(name, heads, neurons)
    assert constrained(groups, Spectral) == weights(name, readers)
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert constrained(groups, Lp) == tables
    for group in groups:
        norm = None if group["ball"] is None else NormBall.from_spec(group["ball"]).norm
        if isinstance(norm, Channels):
            assert group["joint"]
            makes_heads = any(layer in group["param_names"][0] for layer in heads)
            assert norm.inner == KSupport(1 if makes_heads else norm.count // 4)
            assert norm.count == (4 if makes_heads else 128 if name == "gpt2" else 48)
            assert all(p.endswith(("weight", "bias")) for p in group["param_names"])


@pytest.mark.parametrize("name", [*PARTS, "vit"])
def test_heads_and_neurons_that_training_makes_zero_leave_for_nothing(name: str) -> None:
    model, example = CASES[name].build(), CASES[name].inputs(2, 6)
    if name == "bert":
        model = model.bert
        model.pooler = None  # its neurons are no MLP's, and could leave too
    model = lively(model)
    coupled = pliant.coupled_channels(model, example).groups
    rules = pliant.transformer_rules(
        model, heads=pliant.filters(k=2, radius=1), neurons=pliant.filters(k=0.5, radius=1), coupled=coupled
    )
    groups = pliant.constrain(model, rules, default=None, pretrained=True, coupled=coupled)
    optimizer = SFW([g for g in groups if g["ball"]], lr=1.0, rescale=None)  # one step goes to the vertex
    call(model, as_inputs(example))[0].square().mean().backward()
    optimizer.step()
    dense = run(model, as_inputs(example))[0]
    fewer = compress(model, HeadPruning(0.5, "uniform"), example)
    smaller = compress(fewer, FilterPruning(0.5, "uniform"), example)
    assert sum(p.numel() for p in smaller.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    assert dense.std() > 1e-3
    torch.testing.assert_close(run(smaller, as_inputs(example))[0], dense, rtol=1e-4, atol=1e-5)
    # and the other halves would be missed
    assert (run(compress(smaller, HeadPruning(0.5, "uniform"), example), as_inputs(example))[0] - dense).abs().max() > (
        1e-3 * dense.abs().max()
    )


class Block(nn.Module):
    """A home-made block that holds its projections itself, with an attention output beside its MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.to_qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(3, -1))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def test_blocks_of_other_kinds_are_found() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    models = {
        nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 3)): {
            f"{block}.{layer}.weight" for block in (1, 2) for layer in ("to_qkv", "proj", "up", "down")
        },
        nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 3)): {
            f"1.layers.{block}.{layer}.weight"
            for block in (0, 1)
            for layer in ("self_attn.out_proj", "linear1", "linear2")
        },
    }
    for model, expected in models.items():
        groups = pliant.constrain(model, pliant.transformer_rules(model, linear=pliant.rank(k=1)), default=None)
        assert constrained(groups, Spectral) == expected


def test_a_decoder_of_one_block_with_two_attentions_is_whole() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    model = transformers.T5Model(transformers.T5Config(vocab_size=50, **sizes))
    groups = pliant.constrain(model, pliant.transformer_rules(model, linear=pliant.rank(k=1)), default=None)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert constrained(groups, Spectral) == linear


def test_what_cannot_be_found_is_named() -> None:
    model = CASES["bert"].build()
    with pytest.raises(BadInput, match=r"heads needs coupled=pliant\.coupled_channels"):
        pliant.transformer_rules(model, heads=pliant.filters(1))
    with pytest.raises(BadInput, match="no linear found in this Sequential"):
        pliant.transformer_rules(nn.Sequential(nn.Linear(2, 2)), linear=pliant.rank(1))
    with pytest.raises(BadInput, match="no embeddings found in this Sequential"):
        pliant.transformer_rules(nn.Sequential(nn.Linear(2, 2)), embeddings=pliant.l2())
    with pytest.raises(BadInput, match=r"embeddings takes pliant.l2\(radius\)"):
        pliant.transformer_rules(model, embeddings=pliant.rank(1))
