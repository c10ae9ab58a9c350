"""Balls over what leaves a network together: the norm, and the groups that ``constrain`` makes of coupled channels."""

import json

import pytest
import torch
from torch import Tensor, nn

from pliant.constraints import constrain, filters, initial_norm, rank
from pliant.errors import BadInput
from pliant.experiments.models import build_model
from pliant.norms import Channels, KSparse, KSupport, Lp, Norm, NormBall, Rows, VectorNorm
from pliant.optim import SFW, KSchedule
from pliant.structure.verification import coupled_channels

INNER = [Lp(1), Lp(2), KSparse(2), KSupport(2)]
every_inner = pytest.mark.parametrize("inner", INNER, ids=str)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(norm: Norm, x: list[Tensor], other: Norm, y: Tensor) -> Tensor:
    """Assert that two norms agree in value and dual; return the other one's vertex."""
    torch.testing.assert_close(norm(x), other(y))
    torch.testing.assert_close(norm.dual(x), other.dual(y))
    return other.lmo(y)


# --- the norm ---------------------------------------------------------------------------------------------------------


@every_inner
def test_channels_of_single_rows_are_rows(inner: VectorNorm) -> None:
    x = gaussian(5, 3, 2)
    vertex = agree(Channels(inner, 5), [x], Rows(inner), x)
    torch.testing.assert_close(Channels(inner, 5).lmo(x), vertex)
    assert Channels(inner, 5).diameter(x.shape) == Rows(inner).diameter(x.shape)


@every_inner
def test_tensors_share_their_channels(inner: VectorNorm) -> None:
    weight, bias, other = gaussian(4, 3, 2, seed=1), gaussian(4, seed=2), gaussian(4, 5, seed=3)
    whole = torch.cat([weight.flatten(1), bias[:, None], other], dim=1)
    norm, tensors = Channels(inner, 4), [weight, bias, other]
    vertex = agree(norm, tensors, Rows(inner), whole)
    vertices = norm.lmo(tensors)
    torch.testing.assert_close(torch.cat([v.reshape(4, -1) for v in vertices], dim=1), vertex)
    assert norm.diameter([t.shape for t in tensors]) == Rows(inner).diameter(whole.shape)
    assert norm.length([t.shape for t in tensors]) == 4


@every_inner
def test_channels_of_several_rows_and_packed_parts(inner: VectorNorm) -> None:
    heads, size, columns = 3, 2, 4
    packed = gaussian(3 * heads * size, columns)  # query, key, value, each of 3 heads of 2 rows
    by_head = packed.view(3, heads, size, columns).transpose(0, 1).reshape(heads, -1)
    norm = Channels(inner, heads, parts=3)
    vertex = agree(norm, [packed], Rows(inner), by_head)
    unpacked = norm.lmo(packed).view(3, heads, size, columns).transpose(0, 1).reshape(heads, -1)
    torch.testing.assert_close(unpacked, vertex)
    transposed = Channels(inner, heads, dim=1, parts=3)
    torch.testing.assert_close(transposed.lmo(packed.T), norm.lmo(packed).T)


def test_a_vertex_is_non_zero_in_k_channels_the_same_in_all_tensors() -> None:
    queries, keys = gaussian(8, 4, seed=1), gaussian(4, 4, seed=2)  # grouped-query: two query heads for each key head
    v = Channels(KSupport(1), 2).lmo([queries, keys])
    alive = [t.reshape(2, -1).any(dim=1).tolist() for t in v]
    assert alive[0] == alive[1]
    assert sum(alive[0]) == 1


@every_inner
def test_zeros_ties_scale_and_gradients(inner: VectorNorm) -> None:
    norm, zero = Channels(inner, 4), [torch.zeros(4, 3), torch.zeros(4)]
    assert norm(zero) == norm.dual(zero) == 0
    assert all(v.count_nonzero() == 0 for v in norm.lmo(zero))
    ones = [torch.ones(4, 3), torch.ones(4)]
    if isinstance(inner, KSparse | KSupport):
        assert norm.lmo(ones)[0].any(dim=1).tolist() == norm.lmo(ones)[1].bool().tolist() == [True, True, False, False]
    tensors = [gaussian(4, 3).float(), gaussian(4).float()]
    for v, w in zip(norm.lmo(tensors), norm.lmo([t * 2.0**100 for t in tensors]), strict=True):
        assert torch.equal(v, w)
    x = [gaussian(4, 3).requires_grad_(), gaussian(4, seed=1).requires_grad_()]
    y = torch.autograd.grad(norm(x), x)
    assert norm.dual(y).item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Channels(Lp(2), 0), "count"),
        (lambda: Channels(Lp(2), 4, parts=0), "parts"),
        (lambda: Channels(KSupport(5), 4), "k <= 4"),
        (lambda: Channels(Lp(2), 4).lmo(torch.ones(6, 2)), "6 rows"),
        (lambda: Channels(Lp(2), 2, parts=2).lmo(torch.ones(6, 2)), "2 x 2 equal runs"),
    ],
)
def test_bad_channels(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_spec_survives_json() -> None:
    norm = Channels(KSupport(2), 4, dim=1, parts=3)
    assert Norm.from_spec(json.loads(json.dumps(norm.to_spec()))) == norm


# --- from a model's coupled channels to groups ------------------------------------------------------------------------


def residual_network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build_model("resnet8", num_classes=10, image_shape=(3, 8, 8), width=0.5), torch.randn(4, 3, 8, 8)


def test_coupled_channels_get_one_ball_and_everything_is_covered_once() -> None:
    model, images = residual_network()
    structure = coupled_channels(model, images)
    rules = [("fc.*", None), ("*.weight", filters(0.25, radius=3))]
    groups = constrain(model, rules, default=None, coupled=structure.groups)
    covered = [p for group in groups for p in group["params"]]
    assert len(covered) == len(set(covered)) == len(list(model.parameters()))
    joint = [group for group in groups if group.get("joint")]
    assert len(joint) == len(structure.groups)
    stream = next(group for group in joint if "conv1.weight" in group["param_names"])
    # The first residual stream: two convolutions and their normalisations share its channels.
    assert {"bn1.weight", "bn1.bias", "layer1.0.conv2.weight", "layer1.0.bn2.bias"} < set(stream["param_names"])
    ball = NormBall.from_spec(stream["ball"])
    assert ball.norm == Channels(KSupport(2), 8)
    owners = [(model.get_submodule(name.rpartition(".")[0]), name, p) for name, p in model.named_parameters()]
    lengths = [initial_norm(owner, name, p) for owner, name, p in owners if name in stream["param_names"]]
    assert ball.diameter([p.shape for p in stream["params"]]) == pytest.approx(
        2 * 3 * torch.tensor(lengths).norm().item()
    )


def test_steps_move_towards_the_same_few_channels_of_all_tensors() -> None:
    model, images = residual_network()
    rules = [("fc.*", None), ("*.weight", filters(2, radius=1))]
    opt = SFW(constrain(model, rules, None, coupled=coupled_channels(model, images).groups), lr=0.5)
    schedule = KSchedule(opt, start=1.0, steps=4)
    joint = [group for group in opt.param_groups if group["joint"]]
    assert {NormBall.from_spec(group["ball"]).norm.inner.k for group in joint} == {8, 16, 32}
    for step in range(6):
        if step == 5:
            for group in joint:
                group.update(lr=1.0, rescale=None)  # all the way to the vertex
        opt.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        opt.step()
        schedule.step()
        for group in joint:
            ball = NormBall.from_spec(group["ball"])
            assert ball.norm(group["params"]) <= ball.radius * (1 + 1e-5)
    for group in joint:
        count = NormBall.from_spec(group["ball"]).norm.count
        alive = torch.stack([p.detach().reshape(count, -1).any(dim=1) for p in group["params"]])
        assert alive.any(dim=0).sum() == 2


def test_other_presets_and_no_ball_leave_coupled_channels_alone() -> None:
    model, images = residual_network()
    channels = coupled_channels(model, images).groups
    for preset in (rank(0.5), None):
        groups = constrain(model, [("fc.*", None), ("*.weight", preset)], default=None, coupled=channels)
        assert not any(group.get("joint") for group in groups)


def test_too_many_channels_are_named() -> None:
    model, images = residual_network()
    with pytest.raises(BadInput, match=r"the channels of \S+: k=9"):
        constrain(model, [("*.weight", filters(9))], None, coupled=coupled_channels(model, images).groups)


class Concatenated(nn.Module):
    """Two layers whose channels lie side by side in a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(torch.cat([self.a(x), self.b(x)], 1)).relu())


def test_channels_that_are_only_some_rows_of_a_tensor_are_refused_by_name() -> None:
    model = Concatenated()
    groups = coupled_channels(model, torch.randn(2, 3, 5, 5)).groups
    assert [group.name for group in groups] == ["a", "b"]
    for group in groups:  # the first has rows from the start, 4 of them, and 4 divides 12
        with pytest.raises(BadInput, match=rf"the channels of {group.name} are not all rows of depthwise.weight"):
            constrain(model, [("*.weight", filters(1))], None, coupled=[group])


def test_heads_and_gated_neurons_of_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    structure = coupled_channels(model, {"input_ids": torch.randint(64, (2, 7))})
    groups = constrain(model, [("*proj.weight", filters(0.5))], default=None, coupled=structure.groups)
    balls = {
        tuple(name.split(".")[-2] for name in group["param_names"]): NormBall.from_spec(group["ball"]).norm
        for group in groups
        if group.get("joint")
    }
    assert balls == {
        ("gate_proj", "up_proj"): Channels(KSupport(24), 48),
        ("q_proj", "k_proj", "v_proj"): Channels(KSupport(1), 2),  # a key head with the two query heads that read it
    }


def test_heads_of_a_packed_projection() -> None:
    model = build_model("vit_tiny", num_classes=10, image_shape=(3, 32, 32))
    heads = [g for g in coupled_channels(model, torch.randn(2, 3, 32, 32)).groups if g.kind == "heads"]
    groups = constrain(model, [("head.*", None), ("*weight", filters(1))], default=None, coupled=heads)
    joint = [group for group in groups if group.get("joint")]
    assert len(joint) == 6
    assert joint[0]["param_names"] == ["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]
    assert NormBall.from_spec(joint[0]["ball"]).norm == Channels(KSupport(1), 3, parts=3)
