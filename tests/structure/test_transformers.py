"""Networks of the transformers library, tiny and random: pruned correctly, or refused by name with a reason.

Their forwards take keyword arguments and return ModelOutput; their layers include a transposed linear layer
(GPT-2), grouped-query attention (Llama), depthwise convolutions and layer scales.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.calling import as_inputs, run
from pliant.compression import FilterPruning, HeadPruning, LowRank, Plan, masked_twin, replay, skeleton
from pliant.errors import Refused
from pliant.structure.attention import is_conv1d
from pliant.structure.verification import coupled_channels

transformers = pytest.importorskip("transformers")

BOTH = (FilterPruning, HeadPruning)


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, -2:] = 0
    ids = torch.randint(0, 50, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def images(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


@dataclass(frozen=True)
class Case:
    """A network, its inputs for (batch, length), and what can leave it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    filters: set[str]
    heads: int = 0


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(vocab_size=50, num_attention_heads=8, num_key_value_heads=4, **sizes)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, min_depth=4, depth_divisible_by=4)
    return transformers.MobileNetV2ForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)
    return transformers.ConvNextForImageClassification(config)


CASES = {
    "bert": Case(bert, tokens, {"neurons"}, 2),
    "gpt2": Case(gpt2, tokens, {"neurons"}, 2),
    "llama": Case(llama, tokens, {"neurons"}, 2),
    "vit": Case(vit, images, {"neurons"}, 2),
    "resnet": Case(resnet, images, {"channels"}),
    "mobilenet": Case(mobilenet, images, {"channels"}),
    "convnext": Case(convnext, images, {"neurons"}),
}


def lively(model: nn.Module) -> nn.Module:
    """Draw the weights of ``model`` larger than its initialisation does: with that one, outputs hardly differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 1.5 / p[0].numel() ** 0.5, generator=generator)
            else:
                p.uniform_(0.2, 1.2, generator=generator)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return run(model.eval(), as_inputs(inputs))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert got
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()  # 2e-6 measured


@functools.cache
def planned(name: str, kind: type[FilterPruning]) -> tuple[nn.Module, Plan]:
    model = lively(CASES[name].build())
    return model, kind(0.5).plan(model, CASES[name].inputs(2, 6))


def compressed(name: str, kind: type[FilterPruning]) -> tuple[nn.Module, Plan, nn.Module]:
    model, plan = planned(name, kind)
    return model, plan, kind().apply(model, plan)


PRUNED = [(name, kind) for name, case in CASES.items() for kind in BOTH if kind is FilterPruning or case.heads]
pruned = pytest.mark.parametrize(("name", "kind"), PRUNED, ids=lambda x: getattr(x, "__name__", x))


@pruned
def test_small_network_equals_masked_twin_for_any_batch_and_length(name: str, kind: type[FilterPruning]) -> None:
    model, plan, small = compressed(name, kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = masked_twin(model, plan)
    for batch, length in [(2, 6), (3, 9), (1, 4)]:
        inputs = CASES[name].inputs(batch, length)
        expected = outputs(twin, inputs)
        assert_same(outputs(small, inputs), expected)
        dense = outputs(model, inputs)
        assert any((x - y).abs().max() > 1e-3 * y.abs().max() for x, y in zip(dense, expected, strict=True))
    assert sum(p.numel() for p in small.parameters()) == plan.params_after < plan.params_before
    assert abs(plan.ratio_removed - 0.5) < 0.02
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pruned
def test_small_network_is_replayed_on_a_fresh_one_and_trains(name: str, kind: type[FilterPruning]) -> None:
    _, plan, small = compressed(name, kind)
    again = replay(CASES[name].build(), Plan.from_dict(plan.to_dict()))
    again.load_state_dict(small.state_dict())
    inputs = CASES[name].inputs(2, 6)
    before = outputs(small, inputs)
    assert all(torch.equal(x, y) for x, y in zip(outputs(again, inputs), before, strict=True))

    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    output = small(**inputs) if isinstance(inputs, dict) else small(inputs)
    output.logits.square().mean().backward()
    reached = {n for n, p in small.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)
    assert {layer.name for layer in plan.layers} & {n.rpartition(".")[0] for n in reached}
    optimizer.step()
    assert any(not torch.equal(x, y) for x, y in zip(outputs(small, inputs), before, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_leave_is_named_with_a_reason(name: str) -> None:
    case = CASES[name]
    model = case.build()
    structure = coupled_channels(model, case.inputs(2, 6))
    kinds = {group.kind for group in structure.groups}
    assert kinds == case.filters | ({"heads"} if case.heads else set())
    assert sum(group.kind == "heads" for group in structure.groups) == case.heads
    refused = dict(structure.refused)
    assert refused
    assert all(refused.values())
    layers = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    known = {n for n, m in model.named_modules() if isinstance(m, layers)}
    removable = {slot.module for group in structure.groups for slot in group.producers} & known
    assert removable | set(refused) == known
    assert not removable & set(refused)
    if not case.heads:
        with pytest.raises(Refused, match="no attention module"):
            HeadPruning(0.5).plan(model, case.inputs(2, 6))


@pytest.mark.parametrize("name", CASES)
def test_low_rank_factorises_all_layers_but_those_with_a_reason_of_their_own(name: str) -> None:
    case = CASES[name]
    model, inputs = lively(case.build()), case.inputs(2, 6)
    compressor = LowRank(0.3, allocation="uniform")
    analysis = compressor.analyse(model, inputs)
    plan = compressor.plan(model, inputs, analysis=analysis)
    assert plan.layers
    assert abs(plan.ratio_removed - 0.3) < 0.05
    known = ("depthwise", "too small", "shares a parameter", "no convolution or linear layer", "attribute 'weight'")
    assert not [pair for pair in plan.refused if not any(part in pair[1] for part in known)]
    small = compressor.apply(model, plan, analysis=analysis)
    merged = copy.deepcopy(model)  # the weights that the factors stand for, in the old shape
    for layer in (layer for layer in plan.layers if layer.kept < layer.total):
        thin: Any = small.get_submodule(layer.name)
        old: Any = merged.get_submodule(layer.name)
        if layer.scheme == "spatial":
            expand, reduce = thin.expand.weight[:, :, 0], thin.reduce.weight[..., 0]
            weight = torch.einsum("frw,rch->fchw", expand, reduce)
        else:
            weight = thin.expand.weight.flatten(1) @ thin.reduce.weight.flatten(1)
        old.weight.data = weight.T if is_conv1d(old) else weight.view_as(old.weight)
    again = skeleton(case.build(), Plan.from_dict(plan.to_dict())).eval()
    again.load_state_dict(small.state_dict())
    for batch, length in [(2, 6), (3, 9)]:
        other = case.inputs(batch, length)
        assert_same(outputs(small, other), outputs(merged, other))
        assert all(torch.equal(x, y) for x, y in zip(outputs(again, other), outputs(small, other), strict=True))


def test_the_outputs_are_compared_whatever_holds_them() -> None:
    model, example = vit(), images(2, 0)
    groups = coupled_channels(model, example).groups
    for other in ({"pixel_values": example}, {"pixel_values": example, "return_dict": False}, (example,)):
        found = coupled_channels(model, other).groups
        assert [(g.name, g.kind, g.channels) for g in found] == [(g.name, g.kind, g.channels) for g in groups]


def test_attention_weights_among_the_outputs_keep_the_heads() -> None:
    model = bert()
    model.set_attn_implementation("eager")
    asked = {**tokens(2, 6), "output_attentions": True}
    structure = coupled_channels(model, asked)
    assert {group.kind for group in structure.groups} == {"neurons"}
    assert "outputs of the model" in dict(structure.refused)["bert.encoder.layer.0.attention.self.query"]


def test_a_head_of_keys_leaves_with_all_queries_that_read_it() -> None:
    model, _, small = compressed("llama", HeadPruning)
    size, readers = 4, 2
    for old, new in zip(model.model.layers, small.model.layers, strict=True):
        heads = new.self_attn.k_proj.out_features // size
        assert heads < 4
        assert new.self_attn.v_proj.out_features == heads * size
        assert new.self_attn.q_proj.out_features == new.self_attn.o_proj.in_features == heads * readers * size
        rows = new.self_attn.k_proj.weight.view(heads, size, -1)
        kept = [h for h, row in enumerate(old.self_attn.k_proj.weight.view(4, size, -1)) if any(map(row.equal, rows))]
        queries = old.self_attn.q_proj.weight.view(4, readers * size, -1)[kept]
        assert torch.equal(new.self_attn.q_proj.weight, queries.flatten(0, 1))


def test_the_numbers_that_modules_keep_of_their_heads_follow() -> None:
    _, _, small = compressed("bert", HeadPruning)
    for layer in small.bert.encoder.layer:
        attention = layer.attention.self
        assert attention.num_attention_heads * attention.attention_head_size == attention.all_head_size
        assert attention.all_head_size == attention.query.out_features == layer.attention.output.dense.in_features
        assert attention.attention_head_size == 8
    _, _, small = compressed("gpt2", HeadPruning)
    for block in small.transformer.h:
        attention = block.attn
        assert attention.num_heads * attention.head_dim == attention.split_size == attention.c_proj.nx
        assert attention.c_attn.nf == attention.c_attn.weight.shape[1] == 3 * attention.split_size
        assert (attention.head_dim, attention.c_attn.nx) == (8, 32)
    assert small.config.num_attention_heads == 4  # the configuration describes the dense network


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_of_keys_and_values_still_works(name: str) -> None:
    _, _, small = compressed(name, HeadPruning)
    ids = tokens(2, 8)["input_ids"]
    with torch.no_grad():
        whole = small(input_ids=ids).logits
        start = small(input_ids=ids[:, :5], use_cache=True)
        cache = "cache" if "cache" in start else "past_key_values"  # its name from transformers 5.24 on, and before
        rest = small(input_ids=ids[:, 5:], **{cache: start[cache]}).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-4)


def test_heads_and_neurons_leave_one_after_the_other() -> None:
    model, first, smaller = compressed("llama", HeadPruning)
    example = tokens(2, 6)
    second = FilterPruning(0.5).plan(smaller, example)
    smallest = FilterPruning().apply(smaller, second)
    twin = masked_twin(replay(model, first), second)
    assert_same(outputs(smallest, example), outputs(twin, example))
    third = HeadPruning(0.4).plan(smallest, example)
    assert third.params_after < second.params_after < first.params_after
    assert_same(outputs(HeadPruning().apply(smallest, third), example), outputs(masked_twin(smallest, third), example))


def test_tied_embeddings_stay_tied_and_whole() -> None:
    model, plan, small = compressed("gpt2", FilterPruning)
    assert small.lm_head.weight is small.transformer.wte.weight
    assert small.lm_head.weight.shape == model.lm_head.weight.shape
    assert "shares a parameter" in dict(plan.refused)["lm_head"]


def test_frozen_layers_leave_and_stay_frozen() -> None:
    model = lively(bert()).requires_grad_(False)
    example = tokens(2, 6)
    for kind in BOTH:
        plan = kind(0.5).plan(model, example)
        small = kind().apply(model, plan)
        assert_same(outputs(small, example), outputs(masked_twin(model, plan), example))
        assert not any(p.requires_grad for p in small.parameters())


def test_heads_of_blocks_that_share_a_bias_leave_together() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = lively(transformers.T5Model(transformers.T5Config(vocab_size=50, **sizes)))
    inputs = {"input_ids": tokens(2, 6)["input_ids"], "decoder_input_ids": tokens(2, 5)["input_ids"]}
    for kind in BOTH:
        plan = kind(0.5).plan(model, inputs)
        assert_same(outputs(kind().apply(model, plan), inputs), outputs(masked_twin(model, plan), inputs))
    heads = [group for group in coupled_channels(model, inputs).groups if group.kind == "heads"]
    blocks = ["encoder.block.0.layer.0.SelfAttention", "encoder.block.1.layer.0.SelfAttention"]
    assert [slot.module for slot in heads[0].producers[:2]] == blocks  # later blocks add the bias of the first one


def test_heads_with_slopes_from_the_configuration_are_refused_and_neurons_are_not() -> None:
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=4)
    model, inputs = lively(transformers.BloomModel(config)), tokens(2, 6)
    with pytest.raises(Refused, match=r"h.0.self_attention.query_key_value: its heads cannot leave"):
        HeadPruning(0.5).plan(model, inputs)
    plan = FilterPruning(0.5).plan(model, inputs)
    assert_same(outputs(FilterPruning().apply(model, plan), inputs), outputs(masked_twin(model, plan), inputs))


@pytest.mark.parametrize(("name", "kinds"), [("phi3", ["neurons", "heads"]), ("falcon", ["neurons"])])
def test_layouts_that_are_not_known_are_refused_and_end_in_time(name: str, kinds: list[str]) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    if name == "phi3":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))
    else:
        model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    structure = coupled_channels(model, tokens(2, 6))
    assert [group.kind for group in structure.groups] == kinds
    assert all(reason for _, reason in structure.refused)
