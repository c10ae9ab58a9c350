"""GPT-2's ``Conv1D``, a linear layer whose weight is (in, out): compressed as the linear layer that it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.calling import as_inputs, run
from pliant.compression import Int8, LowRank, Magnitude, Plan, SemiStructured, compress, replay
from pliant.compression.base import Compressor

transformers = pytest.importorskip("transformers")

LAYERS = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model


def logits(model: nn.Module) -> Tensor:
    return run(model, as_inputs(EXAMPLE))[0]


def with_weights(model: nn.Module, change: Any) -> nn.Module:
    """Return a copy in which each Conv1D's weight, turned to row = neuron, is changed."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in LAYERS:
            weight = twin.get_submodule(name).weight
            weight.copy_(change(weight.T.contiguous()).T)
    return twin


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(weight.dtype)


def test_low_rank_is_the_truncated_svd_in_two_plain_layers() -> None:
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    plan = LowRank(0.6, allocation="uniform").plan(model, EXAMPLE)
    small: Any = LowRank().apply(model, plan)
    ranks = {layer.name: layer.kept for layer in plan.layers}
    assert list(ranks) == LAYERS
    assert {layer.kind for layer in plan.layers} == {"Conv1D"}
    assert all(ranks[name] < layer.total for name, layer in zip(LAYERS, plan.layers, strict=True))
    for name in LAYERS:
        layer, dense = small.get_submodule(name), model.get_submodule(name)
        assert [type(part) for part in layer] == [nn.Linear, nn.Linear]
        product = layer.expand.weight @ layer.reduce.weight
        torch.testing.assert_close(product, truncated(dense.weight.T, ranks[name]), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.expand.bias, dense.bias)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name in LAYERS:
            weight = by_hand.get_submodule(name).weight
            weight.copy_(truncated(weight, ranks[name]))
    torch.testing.assert_close(logits(small), logits(by_hand), rtol=1e-4, atol=1e-4)
    assert (logits(small) - logits(model)).abs().max() > 0.1
    assert sum(p.numel() for p in small.parameters()) == plan.params_after < plan.params_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_whitened_factors_lose_less_on_the_data_than_plain_ones() -> None:
    model = gpt2()
    batches = [{"input_ids": torch.randint(0, 50, (8, 7), generator=torch.Generator().manual_seed(i))} for i in (1, 2)]
    for name in LAYERS:
        only = copy.deepcopy(model)
        inputs: list[Tensor] = []
        only.get_submodule(name).register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        for batch in batches:
            run(only, as_inputs(batch))
        x = torch.cat([i.flatten(0, -2) for i in inputs])
        dense, errors = model.get_submodule(name), []
        for whiten in (True, False):
            compressor = LowRank(0.6, allocation="uniform", whiten=whiten)
            analysis = compressor.analyse(model, EXAMPLE, batches)
            plan = compressor.plan(model, EXAMPLE, analysis=analysis)
            small = compressor.apply(model, plan, analysis=analysis)
            with torch.no_grad():
                errors.append((small.get_submodule(name)(x) - dense(x)).norm().item())
        assert errors[0] < 0.999 * errors[1]


def test_factors_are_replayed_on_a_fresh_network_and_take_part_in_training() -> None:
    model = gpt2()
    plan = LowRank(0.5).plan(model, EXAMPLE)
    small = LowRank().apply(model, plan)
    again = replay(gpt2(), Plan.from_dict(plan.to_dict()))
    again.load_state_dict(small.state_dict())
    assert torch.equal(logits(again), logits(small))
    small(**EXAMPLE).logits.square().mean().backward()
    factors = [p for name in LAYERS for p in small.get_submodule(name).parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)
    again = LowRank().apply(model.requires_grad_(False), plan)
    assert not any(p.requires_grad for p in again.parameters())


def test_the_smallest_weights_become_zero() -> None:
    model = gpt2()
    small = compress(model, Magnitude(0.7, "uniform"), EXAMPLE)

    def change(weight: Tensor) -> Tensor:
        order = weight.abs().flatten().argsort()
        weight.view(-1)[order[: round(0.7 * weight.numel())]] = 0
        return weight

    twin = with_weights(model, change)
    for name in LAYERS:
        assert torch.equal(small.get_submodule(name).weight, twin.get_submodule(name).weight)
    assert torch.equal(logits(small), logits(twin))


def test_patterns_run_along_the_inputs() -> None:
    model = gpt2()
    small = compress(model, SemiStructured(1, 4), EXAMPLE)

    def change(weight: Tensor) -> Tensor:
        for row in weight:
            for block in row.split(4):
                block[block.abs().argsort()[:-1]] = 0
        return weight

    twin = with_weights(model, change)
    for name in LAYERS:
        assert torch.equal(small.get_submodule(name).weight, twin.get_submodule(name).weight)


def test_eight_bits_have_a_scale_for_each_neuron() -> None:
    model = gpt2()
    small: Any = compress(model, Int8(), EXAMPLE)
    for name in LAYERS:
        layer, weight = small.get_submodule(name), model.get_submodule(name).weight.T
        assert layer.weight.dtype == torch.int8
        scale = weight.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(layer.scale, scale)
        assert ((layer.weight * layer.scale - weight).abs() <= 0.501 * scale).all()
    assert (logits(small) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()


@pytest.mark.parametrize("compressor", [LowRank(0.5), Magnitude(0.5), SemiStructured(2, 4), Int8()], ids=str)
def test_matrices_outside_of_linear_and_convolution_layers_are_named(compressor: Compressor[Any]) -> None:
    reasons = dict(compressor.plan(gpt2(), EXAMPLE).refused)
    assert "Embedding" in reasons["transformer.wte"]
    assert "Embedding" in reasons["transformer.wpe"]
    assert "shares a parameter" in reasons["lm_head"]
    attention = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), attention, nn.LSTM(16, 16))
    reasons = dict(compressor.plan(model, torch.randn(2, 5, 16)).refused)
    if isinstance(compressor, LowRank | Int8):  # the others zero entries of any matrix of an attention
        assert "in_proj_weight as a MultiheadAttention" in reasons["1.self_attn"]
    assert "weight_hh_l0 as a LSTM" in reasons["2"]
    weighted = nn.Sequential(nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    reasons = dict(compressor.plan(weighted, torch.randn(2, 16)).refused)
    assert list(reasons) == ["1"]
