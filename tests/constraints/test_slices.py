"""Weights that hold a matrix in each slice (experts of mixtures, heads, bilinear layers), or several in their rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.constraints import Preset
from pliant.errors import BadInput
from pliant.norms import Blocks, KSupport, Lp, Norm, NormBall, Rows, Spectral
from pliant.optim import SFW


class Slices(nn.Module):
    """Matrices in the slices of one parameter, (slices, rows, columns), or (slices, columns, rows) if transposed."""

    def __init__(self, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.is_transposed = is_transposed


# What a network may hold, and its matrices with outputs as rows.
HOLDERS: dict[str, tuple[nn.Module, bool]] = {
    "experts": (Slices(4, 6, 5), False),
    "transposed experts": (Slices(4, 5, 6, is_transposed=True), True),
    "many small heads": (Slices(12, 4, 8), False),
    "one slice": (Slices(1, 7, 5), False),
    "bilinear": (nn.Bilinear(6, 5, 4), False),
    "slices that lie apart in memory": (Slices(6, 5, 4), False),
}
HOLDERS["slices that lie apart in memory"][0].weight.data = torch.randn(5, 6, 4).transpose(0, 1)


def matrices(holder: nn.Module, transposed: bool) -> list[Tensor]:
    assert isinstance(holder.weight, Tensor)
    return [x.T if transposed else x for x in holder.weight.detach().unbind()]


def only_ball(holder: nn.Module, preset: Preset) -> NormBall:
    (group, *_) = pliant.constrain(holder, [("weight", preset)], default=None)
    return NormBall.from_spec(json.loads(json.dumps(group["ball"])))


@pytest.mark.parametrize("name", HOLDERS)
def test_directions_of_all_slices_are_counted_together(name: str) -> None:
    holder, transposed = HOLDERS[name]
    ball, own = only_ball(holder, pliant.rank(3)), matrices(holder, transposed)
    several = Spectral(KSupport(3))
    assert isinstance(ball.norm, Spectral)
    assert ball.norm.groups == len(own)
    torch.testing.assert_close(ball.norm(holder.weight), several(own))
    torch.testing.assert_close(ball.norm.dual(holder.weight), several.dual(own))
    vertex = ball.norm.lmo(holder.weight)
    expected = several.lmo(own)
    torch.testing.assert_close([x.T if transposed else x for x in vertex.unbind()], expected)
    assert sum(int(torch.linalg.matrix_rank(x)) for x in expected) == 3
    assert ball.norm.diameter(vertex.shape) == several.diameter([x.shape for x in own])


@pytest.mark.parametrize("name", HOLDERS)
def test_filters_are_the_outputs_of_all_slices(name: str) -> None:
    holder, transposed = HOLDERS[name]
    ball, own = only_ball(holder, pliant.filters(3)), matrices(holder, transposed)
    vertex = ball.norm.lmo(holder.weight)
    torch.testing.assert_close(
        torch.cat([x.T if transposed else x for x in vertex]), Rows(KSupport(3)).lmo(torch.cat(own))
    )


@pytest.mark.parametrize("name", ["experts", "transposed experts", "many small heads"])
def test_patterns_lie_along_the_inputs(name: str) -> None:
    shape = {"experts": (3, 6, 8), "transposed experts": (3, 8, 6), "many small heads": (12, 2, 4)}[name]
    ball = only_ball(Slices(*shape, is_transposed="transposed" in name), pliant.semi_structured(2, 4))
    assert isinstance(ball.norm, Blocks)
    assert ball.norm.dim == (1 if "transposed" in name else 2)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize(
    ("shape", "transposed"), [((3, 8, 6), False), ((3, 40, 36), False), ((3, 36, 40), True)], ids=str
)
def test_a_step_is_that_of_the_slices_in_a_joint_ball(shape: tuple[int, ...], transposed: bool, k: int) -> None:
    holder = Slices(*shape, is_transposed=transposed)
    separate = [nn.Parameter(x.clone().contiguous()) for x in matrices(holder, transposed)]
    one = SFW(pliant.constrain(holder, [("weight", pliant.rank(k))]), lr=0.1, rescale=None)
    ball = NormBall(Spectral(KSupport(k)), NormBall.from_spec(one.param_groups[0]["ball"]).radius)
    other = SFW([{"params": separate, "ball": ball, "joint": True}], lr=0.1, rescale=None)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(shape, generator=generator)
    for _ in range(4):
        holder.weight.grad = holder.weight.detach() - target
        for p, goal in zip(separate, target.unbind(), strict=True):
            p.grad = p.detach() - (goal.T if transposed else goal)
        one.step()
        other.step()
    torch.testing.assert_close(matrices(holder, transposed), [p.detach() for p in separate], rtol=2e-2, atol=2e-3)


def test_convolutions_and_tables_are_read_as_before() -> None:
    for layer, dim, groups in (
        (nn.Conv1d(4, 6, 3), 0, 1),
        (nn.Conv1d(4, 6, 3, groups=2), 0, 2),
        (nn.ConvTranspose1d(4, 6, 3), 1, 1),
        (nn.Linear(4, 6), 0, 1),
    ):
        ball = only_ball(layer, pliant.rank(1))
        assert isinstance(ball.norm, Spectral)
        assert (ball.norm.dim, ball.norm.groups) == (dim, groups)


# --- parts of packed weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_packed_weight_are_matrices_of_their_own(parts: int) -> None:
    layer = nn.Linear(5, 12)
    ball = only_ball(layer, pliant.rank(2, parts=parts))
    own = list(layer.weight.detach().chunk(parts))
    torch.testing.assert_close(ball.norm(layer.weight), Spectral(KSupport(2))(own))
    torch.testing.assert_close(list(ball.norm.lmo(layer.weight).chunk(parts)), Spectral(KSupport(2)).lmo(own))


def test_queries_keys_and_values_of_pytorchs_attention_can_be_separated() -> None:
    attention = nn.MultiheadAttention(6, 2)
    groups = pliant.constrain(attention, [("in_proj_weight", pliant.rank(0.5, parts=3))], default=None)
    ball = NormBall.from_spec(next(g["ball"] for g in groups if g["ball"]))
    assert ball.norm == Spectral(KSupport(9), groups=3)


def test_parts_that_do_not_divide_the_rows_name_the_layer() -> None:
    with pytest.raises(BadInput, match=r"weight of shape \(7, 4\).*7 rows do not split into 3 groups"):
        pliant.constrain(nn.Linear(4, 7), [("weight", pliant.rank(1, parts=3))], default=None)


@pytest.mark.parametrize("parts", [0, -1, 1.5, True, "3"])
def test_bad_parts(parts: Any) -> None:
    with pytest.raises(BadInput, match="parts must be an integer >= 1"):
        pliant.rank(1, parts=parts)


@pytest.mark.parametrize("dim", [-1, (0, 0), (), (0, -1), 1.5, True, "0"])
def test_bad_dimensions_of_rows(dim: Any) -> None:
    for lift in (Rows, Spectral):
        with pytest.raises(ValueError, match="needs dim to be a dimension >= 0 or a tuple of different ones"):
            lift(Lp(2), dim)


def test_dimensions_that_a_tensor_lacks() -> None:
    with pytest.raises(ValueError, match=r"rows are counted by dimensions 0, 2, but the tensor has shape \(4, 3\)"):
        Spectral(Lp(1), (0, 2))(torch.ones(4, 3))


def test_a_spatial_matrix_has_one_dimension_of_filters() -> None:
    with pytest.raises(ValueError, match="single dimension of filters"):
        Spectral(Lp(1), (0, 1), spatial=True)


def test_specs_hold_lists_and_norms_tuples() -> None:
    norm = Spectral(KSupport(2), (0, 1), 4)
    assert norm.to_spec()["dim"] == [0, 1]
    assert Norm.from_spec(norm.to_spec()) == norm
    assert hash(Norm.from_spec(norm.to_spec())) == hash(norm)


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_get_the_ball_of_linear_layers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 4}
    sizes |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rules = pliant.transformer_rules(model, linear=pliant.rank(0.25, 3))
    groups = pliant.constrain(model, rules, default=None)
    balls = {name: NormBall.from_spec(g["ball"]).norm for g in groups if g["ball"] for name in g["param_names"]}
    rows = 2 if family == "gpt_oss" else 1
    for block in (0, 1):
        for part in ("gate_up_proj", "down_proj"):
            norm = balls[f"model.layers.{block}.mlp.experts.{part}"]
            assert isinstance(norm, Spectral)
            assert (norm.dim, norm.groups) == ((0, rows), 4)
        assert f"model.layers.{block}.self_attn.o_proj.weight" in balls
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in balls)
    optimizer = SFW(groups, lr=0.02, rescale=None)
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
