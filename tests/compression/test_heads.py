"""Attention heads: cut out of PyTorch's own attention and of home-made ones, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.calling import as_inputs, run
from pliant.compression import FilterPruning, HeadPruning, LowRank, compress, masked_twin, replay
from pliant.errors import BadInput, Refused
from pliant.experiments.models import build_model
from pliant.structure import Proof
from pliant.structure.attention import projections
from pliant.structure.layers import keep_channels
from pliant.structure.thin_attention import ThinAttention
from pliant.structure.verification import coupled_channels
from tests.structure.cutting import half_fault

X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
HEADS, SIZE = 4, 3


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * SIZE**-0.5).softmax(-1)


def by_head(x: Tensor, size: int = SIZE) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


class Fused(nn.Module):
    """The attention of many vision transformers: rows (3, head, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        return self.proj((scores(q, k) @ v).transpose(1, 2).flatten(2))


class Interleaved(Fused):
    """The attention of some language models: rows (head, 3, size)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, SIZE)).transpose(1, 2).unbind(3)
        return self.proj((scores(q, k) @ v).transpose(1, 2).flatten(2))


class FromWidth(Fused):
    """Takes the size of a head from the width of the input: with fewer heads it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // self.num_heads
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj((scores(q, k) @ v).transpose(1, 2).flatten(2))


class Apart(nn.Module):
    """Queries, keys and values from layers of their own; more heads of queries than of keys, and other names."""

    def __init__(self, readers: int = 1, heads: int = HEADS, values: int = SIZE) -> None:
        super().__init__()
        self.n_heads, self.num_kv_heads = heads * readers, heads
        self.inner_dim = heads * readers * SIZE
        self.to_q, self.to_k = nn.Linear(12, self.inner_dim), nn.Linear(12, heads * SIZE)
        self.to_v = nn.Linear(12, heads * values, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * readers * values, 12), nn.Dropout())

    def attend(self, x: Tensor) -> Tensor:
        q = self.to_q(x).view(*x.shape[:2], self.inner_dim).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) for f in (self.to_k, self.to_v))
        k, v = (t.repeat_interleave(self.n_heads // self.num_kv_heads, 1) for t in (k, v))
        return self.mix(scores(q, k)) @ v

    def mix(self, shares: Tensor) -> Tensor:
        return shares

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.attend(x).transpose(1, 2).flatten(2))


class Talking(Apart):
    """Heads that read each other's shares (Shazeer et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS, generator=torch.Generator().manual_seed(1)))

    def mix(self, shares: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", shares, self.talk)


class Normed(Apart):
    """Each head relative to all: what is left depends on what is gone, though every shape fits."""

    def mix(self, shares: Tensor) -> Tensor:
        return shares / shares.sum(1, keepdim=True)


class Transposed(Apart):
    """The output projection reads channel after channel, not head after head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.attend(x).permute(0, 2, 3, 1).flatten(2))


class SharedKeys(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.to_k.weight = self.to_q.weight


class Block(nn.Module):
    """Attention beside a shortcut, between two layers."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm, self.fc = attention, nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.attn(self.norm(x))).mean(1))


class Torch(nn.Module):
    """``nn.MultiheadAttention`` called as ``options`` say."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.core, self.call = nn.MultiheadAttention(12, HEADS, batch_first=True, **options), call or {}

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x, x, x, **self.call)[0]


SOUND: dict[str, Callable[[], nn.Module]] = {
    "fused": Fused,
    "interleaved": Interleaved,
    "apart": Apart,
    "grouped queries": lambda: Apart(readers=2),
    "wide values": lambda: Apart(values=5),
    "channel after channel": Transposed,
    "torch": Torch,
    "torch without bias": lambda: Torch(bias=False),
}


def assert_pruned(model: nn.Module, example: Any, ratio: float = 0.5) -> nn.Module:
    plan = HeadPruning(ratio).plan(model.eval(), example)
    small = HeadPruning().apply(model, plan)
    inputs = as_inputs(example)
    dense, expected = run(model, inputs), run(masked_twin(model, plan), inputs)
    for tested in (small, replay(copy.deepcopy(model), plan)):
        for x, y in zip(run(tested, inputs), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert any((x - y).abs().max() > 1e-3 for x, y in zip(dense, expected, strict=True)), "the test is blind"
    assert sum(p.numel() for p in small.parameters()) == plan.params_after < plan.params_before
    assert sum(layer.params_dense - layer.params for layer in plan.layers) == plan.params_before - plan.params_after
    return small


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_heads_leave_and_what_stays_computes_the_same(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    small = assert_pruned(Block(SOUND[name]()), X, ratio)
    left = {0.25: 3, 0.5: 2, 0.75: 1}[ratio]
    found = next(p for p in map(projections, small.modules()) if p)
    assert found.heads == left
    small.train()(X).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


UNSOUND: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "talking heads": (Talking, "to_q", "'attn' does not treat its channels one by one"),
    "heads relative to each other": (Normed, "to_q", "masked twin"),
    "size from the width": (FromWidth, "qkv", "cannot run"),
    "tied": (SharedKeys, "to_k", "shares a parameter"),
    "one head": (lambda: Apart(heads=1), "to_v", "single head"),
    "keys added": (lambda: Torch(add_bias_kv=True), "core", "adds keys of its own"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_attention_that_cannot_lose_heads_is_refused_by_name(name: str) -> None:
    build, layer, reason = UNSOUND[name]
    model = Block(build())
    structure = coupled_channels(model, X)
    assert "heads" not in {group.kind for group in structure.groups}
    assert reason in dict(structure.refused)[f"attn.{layer}"]
    with pytest.raises(Refused, match=f"attn.{layer}.*{reason}"):
        HeadPruning(0.5).plan(model, X)


def test_attention_with_keys_of_another_width_is_refused() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.MultiheadAttention(12, HEADS, kdim=6, vdim=6, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.core(x, y, y)[0]

    with pytest.raises(Refused, match=r"core: keeps its projections apart"):
        HeadPruning(0.5).plan(Cross(), (X, X[..., :6]))


def test_attention_that_is_not_called_is_refused() -> None:
    model = Block(Apart())
    model.spare = Apart()
    structure = coupled_channels(model, X)
    assert "not called" in dict(structure.refused)["spare.to_q"]
    assert [group.name for group in structure.groups if group.kind == "heads"] == ["attn"]


def test_attention_used_twice_leaves_both_places() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.attn(x))

    torch.manual_seed(0)
    assert_pruned(Twice(Apart()), X)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # transformers before and from 5.24
def test_the_cache_beside_the_outputs_may_follow_the_heads(name: str) -> None:
    class Caching(Block):
        def __init__(self, name: str) -> None:
            super().__init__(Apart())
            self.name = name

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x), self.name: self.attn.to_k(x)}

    torch.manual_seed(0)
    assert_pruned(Caching(name), X)
    with pytest.raises(Refused, match="outputs of the model"):
        HeadPruning(0.5).plan(Caching("keys"), X)


def test_float_masks_keep_their_values_in_the_verification() -> None:
    class Masked(Block):
        def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
            if not ((attn_mask == 0) | (attn_mask == 1)).all():
                raise ValueError("a mask of zeros and ones")
            return super().forward(x * attn_mask)

    torch.manual_seed(0)
    assert_pruned(Masked(Apart()), {"x": X, "attn_mask": torch.tensor([0.0, 1, 1, 1, 1]).unsqueeze(1)})


def test_a_block_in_one_module_loses_heads_and_neurons() -> None:
    class Whole(Apart):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = x + super().forward(x)
            return x + self.fc2(self.fc1(x).relu())

    torch.manual_seed(0)
    model = Block(Whole())
    assert {(g.name, g.kind) for g in coupled_channels(model, X).groups} == {("attn", "heads"), ("attn.fc1", "neurons")}
    assert_pruned(model, X)


def test_attention_in_a_deep_network_is_found_and_its_block_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, HEADS, 16, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(60, 5))
    structure = coupled_channels(model, X)
    assert sorted(g.kind for g in structure.groups) == ["heads", "heads", "neurons", "neurons"]
    assert_pruned(model, X)
    assert_pruned(compress(model, FilterPruning(0.5), X), X)


def test_encoder_and_decoder_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(12, HEADS, 1, 1, 16, batch_first=True)
    small = assert_pruned(model, (X, X[:, :4] + 1))
    assert sum(isinstance(m, ThinAttention) for m in small.modules()) > 1


def test_shipped_vision_transformer_loses_heads() -> None:
    torch.manual_seed(0)
    model = build_model("vit_tiny", num_classes=5, image_shape=(3, 8, 8), width=0.67)
    small = assert_pruned(model, torch.randn(2, 3, 8, 8))
    assert {block.attn.num_heads for block in small.blocks} == {1}


def test_wrong_heads_are_seen_by_the_verification() -> None:
    model = Block(Interleaved()).eval()
    (group,) = [g for g in coupled_channels(model, X).groups if g.kind == "heads"]
    proof = Proof(model, (X,))
    assert half_fault(proof, [group]) is None
    counter, rows = group.producers
    stacked = dataclasses.replace(rows, indices=torch.arange(36).view(3, HEADS, SIZE).transpose(0, 1).flatten(1))
    (columns,) = group.consumers
    rolled = dataclasses.replace(columns, indices=columns.indices.roll(1, 0))
    for wrong in (
        dataclasses.replace(group, producers=(counter, stacked)),
        dataclasses.replace(group, producers=(rows,)),
        dataclasses.replace(group, consumers=(rolled,)),
        dataclasses.replace(group, consumers=()),
    ):
        assert half_fault(proof, [wrong]) is not None


def test_filter_pruning_leaves_heads_alone_and_says_so() -> None:
    plan = FilterPruning(0.5).plan(nn.TransformerEncoderLayer(12, HEADS, 16, batch_first=True), X)
    assert "HeadPruning" in dict(plan.refused)["self_attn"]
    assert {layer.name for layer in plan.layers} == {"linear1", "linear2"}


# --- which heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global", "energy"])
@pytest.mark.parametrize("importance", ["l2", "l1"])
def test_the_weakest_heads_leave(allocation: str, importance: str) -> None:
    model = Block(Apart())
    with torch.no_grad():
        for layer in (model.attn.to_q, model.attn.to_k, model.attn.to_v):
            layer.weight.copy_(torch.tensor([3.0, 1, 4, 2]).repeat_interleave(SIZE).unsqueeze(1).expand(12, 12))
    plan = HeadPruning(0.5, allocation, importance).plan(model, X)
    counts = {layer.name: layer for layer in plan.layers}
    assert counts["attn"].outputs == (0, 2)
    assert (counts["attn"].kept, counts["attn"].total) == (2, 4)
    assert counts["attn.to_out.0"].inputs == (0, 1, 2, 6, 7, 8)


@pytest.mark.parametrize("name", ["fused", "grouped queries", "torch"])
def test_multiply_accumulates_of_heads_count_each_projection_per_token(name: str) -> None:
    torch.manual_seed(0)
    model = Block(SOUND[name]())
    pruning = HeadPruning(0.5, cost="macs")
    analysis = pruning.analyse(model, X)
    weights = {n: p for n, p in model.named_parameters() if n.startswith("attn.") and p.dim() == 2}
    assert {n: analysis.applied[n] for n in weights} == dict.fromkeys(weights, 15)  # 3 sequences of 5 tokens
    plan = pruning.plan(model, X, analysis=analysis)
    assert set(plan.compressible) == set(weights)
    assert plan.ratio_removed == 0.5


def test_masked_heads_compute_the_same_as_removed_ones() -> None:
    model = Block(Torch()).eval()
    plan = HeadPruning(0.5, mode="mask").plan(model, X)
    masked = HeadPruning().apply(model, plan)
    assert plan.params_after == plan.params_before
    torch.testing.assert_close(masked(X), masked_twin(model, plan)(X))


def test_one_head_of_every_attention_stays() -> None:
    small = compress(nn.Sequential(Block(Torch())), HeadPruning(0.99, at_least=1), X)
    assert small[0].attn.core.num_heads == 1


def test_bad_options_and_foreign_plans() -> None:
    with pytest.raises(BadInput, match="importance"):
        HeadPruning(importance="bn")
    plan = HeadPruning(0.5).plan(Block(Apart()), X)
    with pytest.raises(BadInput, match="another model"):
        replay(Block(Fused()), plan)


# --- ThinAttention ------------------------------------------------------------------------------------------


def pair(keep: Tensor, **options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Return attention whose other heads do not reach the output, and the one without them."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, HEADS, **options).double().eval()
    if dense.in_proj_bias is not None:
        nn.init.normal_(dense.in_proj_bias)
    positions = torch.arange(36).view(3, HEADS, SIZE)[:, keep].flatten()
    thin = copy.deepcopy(dense)
    keep_channels(thin, "outputs", positions)
    keep_channels(thin.out_proj, "inputs", positions[: len(keep) * SIZE])
    with torch.no_grad():
        for head in set(range(HEADS)) - set(keep.tolist()):
            dense.out_proj.weight[:, head * SIZE : (head + 1) * SIZE] = 0
    return dense, thin


KEEP = torch.tensor([0, 2, 3])
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = torch.ones(5, 5).triu(1).bool()
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding without weights": {"key_padding_mask": PADDING, "need_weights": False},
    "added mask": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()},
    "causal and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}])
def test_thin_attention_is_called_as_the_dense_one(call: str, options: dict[str, Any]) -> None:
    dense, thin = pair(KEEP, **options)
    x = X.double() if options.get("batch_first") else X.double().transpose(0, 1)
    y = x.flip(0)
    for q, k, v in ((x, x, x), (x, y, y), (x, y, x)):
        expected, _ = dense(q, k, v, **CALLS[call])
        got, weights = thin(q, k, v, **CALLS[call])
        torch.testing.assert_close(got, expected)
        assert (weights is None) == (CALLS[call].get("need_weights") is False)


def test_thin_attention_gives_the_weights_of_its_heads() -> None:
    dense, thin = pair(KEEP, batch_first=True)
    x = X.double()
    _, expected = dense(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(thin(x, x, x, average_attn_weights=False)[1], expected[:, KEEP])
    torch.testing.assert_close(thin(x, x, x)[1], expected[:, KEEP].mean(1))


def test_thin_attention_takes_one_sequence_and_a_mask_per_head() -> None:
    dense, thin = pair(KEEP)
    x = X[0].double()
    padding = PADDING[1]
    for options in ({}, {"key_padding_mask": padding}):
        expected, shares = dense(x, x, x, average_attn_weights=False, **options)
        got, thin_shares = thin(x, x, x, average_attn_weights=False, **options)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(thin_shares, shares[KEEP])
    masks = torch.randn(HEADS, 5, 5, generator=torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(thin(x, x, x, attn_mask=masks[KEEP])[0], dense(x, x, x, attn_mask=masks)[0])


def test_thin_attention_drops_shares_in_training_and_wants_a_mask_with_the_causal_hint() -> None:
    _, thin = pair(KEEP, batch_first=True, dropout=0.5)
    x = X.double()
    for need_weights in (True, False):
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(thin.train()(x, x, x, need_weights=need_weights)[0])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="attn_mask"):
        thin(x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_thin_attention_works_on_the_nested_batches_of_an_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    plan = HeadPruning(0.5).plan(model, X)
    small, twin = HeadPruning().apply(model, plan), masked_twin(model, plan)
    with torch.no_grad():
        expected, got = (m(X, src_key_padding_mask=PADDING) for m in (twin, small))
    torch.testing.assert_close(got, expected)
    assert (expected[1, 3:] == 0).all(), "the encoder did not make a nested batch: the test is blind"


def test_the_output_layer_of_a_thin_attention_can_be_replaced() -> None:
    small = compress(Block(Torch()), HeadPruning(0.5), X)
    plan = LowRank(0.5, allocation="uniform").plan(small, X)
    assert "attn.core.out_proj" in {layer.name for layer in plan.layers if layer.kept < layer.total}
    with torch.no_grad():
        assert LowRank().apply(small, plan).eval()(X).isfinite().all()


def test_thin_attention_keeps_names_frozen_weights_and_hooks() -> None:
    model = Torch()
    model.core.in_proj_weight.requires_grad_(False)
    called = []
    model.core.register_forward_hook(lambda module, args, output: called.append(module))
    small = compress(model, HeadPruning(0.5), X)
    assert set(small.state_dict()) == set(model.state_dict())
    assert not small.core.in_proj_weight.requires_grad
    assert small.core.in_proj_bias.requires_grad
    called.clear()
    small(X)
    assert len(called) == 1
    assert type(model.core) is nn.MultiheadAttention
    assert F.mse_loss(copy.deepcopy(small)(X), small(X)) == 0
