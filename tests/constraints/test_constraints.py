import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pliant import constrain, filters, l2, rank, semi_structured, weights
from pliant.constraints import resolve_k
from pliant.errors import BadInput
from pliant.norms import Blocks, KSparse, KSupport, Lp, NormBall, Rows, Spectral
from pliant.optim import SFW, KSchedule


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10)
    )


def balls(groups: list[dict]) -> dict[str, NormBall | None]:  # type: ignore[type-arg]
    return {
        name: None if group["ball"] is None else NormBall.from_spec(group["ball"])
        for group in groups
        for name in group["param_names"]
    }


# --- rules ------------------------------------------------------------------------------------------------------------


def test_presets_make_their_norms() -> None:
    rules = [("0.weight", filters(k=3)), ("3.weight", rank(k=0.5)), ("5.weight", weights(k=0.1)), ("*", l2())]
    found = balls(constrain(network(), rules))
    norms = {name: ball.norm for name, ball in found.items() if ball is not None}
    assert norms["0.weight"] == Rows(KSupport(3))
    assert norms["3.weight"] == Spectral(KSupport(4))
    assert norms["5.weight"] == KSupport(8)
    assert norms["1.bias"] == norms["5.bias"] == Lp(2)
    found = balls(constrain(network(), [("[03].weight", semi_structured(2, 4, vertices="sparse"))], default=None))
    assert found["0.weight"] is not None
    assert found["0.weight"].norm == Blocks(KSparse(2), 4)
    assert found["1.weight"] is None


def test_first_match_wins_and_structured_presets_pass_over_what_they_cannot_hold() -> None:
    rules = [("5.*", None), ("*.weight", rank(k=0.5)), (lambda name, p: p.ndim == 1, l2())]
    found = balls(constrain(network(), rules))
    assert found["5.weight"] is found["5.bias"] is None
    assert isinstance(found["0.weight"].norm, Spectral)  # type: ignore[union-attr]
    assert found["1.weight"].norm == Lp(2)  # type: ignore[union-attr]


def test_every_parameter_is_covered_or_named() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "table": nn.Embedding(5, 4)})
    with pytest.raises(BadInput, match=r"attention.in_proj_bias.*table.weight"):
        constrain(model, [("*weight", rank(k=1))])
    found = balls(constrain(model, [("*weight", rank(k=1))], default=None))
    assert found["attention.in_proj_weight"].norm == Spectral(KSupport(1))  # type: ignore[union-attr]
    assert found["table.weight"] is None
    assert set(found) == {name for name, _ in model.named_parameters()}


def test_tied_parameters_match_under_any_name_and_come_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    groups = constrain(model, [("1.weight", rank(k=1))], default=None)
    found = balls(groups)
    assert found["0.weight"] is not None
    assert "1.weight" not in found


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    assert "0.weight" not in balls(constrain(model, [], default=None))
    with pytest.raises(BadInput, match="no trainable parameter"):
        constrain(model.requires_grad_(False), [], default=None)


def test_a_rule_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match=r"rule 1 \('layer9"):
        constrain(network(), [("layer9.*", l2())], default=None)


def test_layouts() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 4, 3), "grouped": nn.Conv2d(8, 4, 3, groups=2)})
    found = balls(constrain(model, [("*.weight", rank(k=1.0))], default=None))
    assert found["up.weight"].norm == Spectral(KSupport(4), dim=1)  # type: ignore[union-attr]
    assert found["grouped.weight"].norm == Spectral(KSupport(4), groups=2)  # type: ignore[union-attr]
    found = balls(constrain(model, [("*.weight", filters(k=1.0))], default=None))
    assert found["up.weight"].norm == Rows(KSupport(4), dim=1)  # type: ignore[union-attr]


def test_spatial_matrices_are_for_kernels_with_rows_and_columns() -> None:
    model = nn.ModuleDict(
        {
            "square": nn.Conv2d(6, 4, 3),
            "grouped": nn.Conv2d(8, 4, 3, groups=2),
            "pointwise": nn.Conv2d(6, 4, 1),
            "row": nn.Conv2d(6, 4, (1, 3)),
            "sequence": nn.Conv1d(6, 4, 3),
            "linear": nn.Linear(6, 4),
        }
    )
    found = balls(constrain(model, [("*.weight", rank(k=1.0, spatial=True))], default=None))
    norms = {name.removesuffix(".weight"): ball.norm for name, ball in found.items() if ball}
    assert norms.pop("square") == Spectral(KSupport(12), spatial=True)  # 4 filters · 3 columns, 6 channels · 3 rows
    assert norms.pop("grouped") == Spectral(KSupport(12), groups=2, spatial=True)
    assert norms == dict.fromkeys(["pointwise", "row", "sequence", "linear"], Spectral(KSupport(4)))
    with pytest.raises(BadInput, match="spatial must be True or False, got 'yes'"):
        rank(k=1.0, spatial="yes")  # type: ignore[arg-type]


def test_groups_train_a_network_and_take_a_weight_decay_for_the_rest() -> None:
    model = network()
    opt = SFW(constrain(model, [("*.weight", filters(k=0.5))], default=None), lr=0.1, weight_decay=0.01)
    model(torch.randn(2, 4, 5, 5)).sum().backward()
    opt.step()
    for opt_group in opt.param_groups:
        assert opt_group["weight_decay"] == (0.01 if opt_group["ball"] is None else 0)
        if opt_group["ball"] is not None:
            for p in opt_group["params"]:
                assert NormBall.from_spec(opt_group["ball"]).contains(p.detach())


# --- radius -----------------------------------------------------------------------------------------------------------


def test_radius_follows_the_initialiser_not_the_weights_at_hand() -> None:
    model = network()
    rules = [("*.weight", filters(k=2, radius=5)), ("*", l2(radius=5))]
    first = balls(constrain(model, rules))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100)
    assert balls(constrain(model, rules)) == first
    # PyTorch's default for a convolution is uniform with variance 1/(3·fan_in): E‖W‖² = out/3.
    ball = first["3.weight"]
    assert ball is not None
    assert ball.diameter((8, 8, 3, 3)) == pytest.approx(2 * 5 * math.sqrt(8 / 3), rel=0.05)
    assert first["1.weight"].radius == pytest.approx(5 * math.sqrt(8))  # type: ignore[union-attr]
    assert first["1.bias"].radius == pytest.approx(5)  # type: ignore[union-attr]  # norm 0 counts as 1


def test_radius_of_pretrained_weights_is_their_own() -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(2)
    found = balls(constrain(model, [("weight", l2(radius=3))], default=None, pretrained=True))
    assert found["weight"].radius == pytest.approx(3 * 6)  # type: ignore[union-attr]


class Gain(nn.Linear):
    """A layer whose initialiser leaves one parameter alone, and needs a buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.ones(16))
        self.register_buffer("scale", torch.full((4, 4), 3.0))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "scale"):
            with torch.no_grad():
                self.weight.copy_(self.scale)


def test_initialisers_that_set_only_some_parameters() -> None:
    found = balls(constrain(Gain(), [("*", l2(radius=1))]))
    assert found["gain"].radius == pytest.approx(4)  # type: ignore[union-attr]
    assert found["weight"].radius == pytest.approx(12)  # type: ignore[union-attr]


def test_initialisers_that_cannot_be_called_alone() -> None:
    class Needy(nn.Linear):
        def reset_parameters(self, std: float = 0.0, *rest: int) -> None:
            super().reset_parameters()

    class Needier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 2.0))

        def reset_parameters(self, std: float) -> None:
            raise AssertionError

    assert balls(constrain(Needy(2, 2), [("*", l2())]))["weight"] is not None
    assert balls(constrain(Needier(), [("*", l2(radius=1))]))["weight"].radius == pytest.approx(4)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrised_and_pruned_layers_are_measured() -> None:
    old = nn.utils.weight_norm(nn.Conv2d(4, 4, 3, groups=2))
    old(torch.ones(1, 4, 3, 3))
    pruned = nn.Linear(4, 4)
    prune.l1_unstructured(pruned, "weight", 0.5)
    new = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=2))
    model = nn.ModuleDict({"old": old, "pruned": pruned, "new": new})
    found = balls(constrain(model, [("*_v", rank(k=1)), ("*original1", rank(k=1))], default=l2()))
    assert found["old.weight_v"].norm == found["new.parametrizations.weight.original1"].norm  # type: ignore[union-attr]
    assert found["new.parametrizations.weight.original1"].norm == Spectral(KSupport(1), groups=2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "rules", "options", "message"),
    [
        (network(), [("*", "rank")], {"default": None}, "a rule is a pair"),
        (network(), ["*"], {"default": None}, "a rule is a pair"),
        (network(), [], {"default": rank(k=1)}, r"default preset.*1\.weight"),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), [("weight", rank(k=1))], {"default": None}, "grouped transposed"),
        (nn.LazyLinear(3), [("weight", rank(k=1))], {"default": l2()}, "not initialised"),
        (nn.Linear(2, 2, device="meta"), [("*", l2())], {"pretrained": True}, "meta"),
    ],
    ids=["no preset", "no pair", "default", "grouped transposed", "lazy", "meta"],
)
def test_what_cannot_be_constrained_is_named(  # type: ignore[no-untyped-def]
    model: nn.Module, rules, options, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        constrain(model, rules, **options)


def test_a_tied_embedding_is_constrained_under_its_linear_name() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    assert balls(constrain(model, [("head.weight", rank(k=1))], default=None))["table.weight"] is not None


def test_a_structured_rule_on_a_vector_warns_that_it_decides_nothing() -> None:
    with pytest.warns(UserWarning, match="decides for no parameter"):
        constrain(nn.Linear(3, 3), [("bias", rank(k=1))], default=None)


def test_radii_are_kept_by_name_not_by_shape() -> None:
    model = nn.BatchNorm1d(16)  # scale and shift have one shape, but their norms are 4 and 0
    found = balls(constrain(model, [("*", l2(radius=1))]))
    assert found["weight"].radius == pytest.approx(4)  # type: ignore[union-attr]
    assert found["bias"].radius == pytest.approx(1)  # type: ignore[union-attr]


def test_neither_weights_nor_random_state_are_touched() -> None:
    model = network()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    constrain(model, [("*.weight", rank(k=0.5))], default=l2())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_one_shape_share_a_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert len(constrain(model, [("*.weight", rank(k=1))], default=None)) == 2


def test_meta_models_have_radii() -> None:
    with torch.device("meta"):
        model = network()
    assert balls(constrain(model, [("*.weight", rank(k=0.5))], default=None)) == balls(
        constrain(network(), [("*.weight", rank(k=0.5))], default=None)
    )


# --- k ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "expected"), [(1, 10, 1), (1.0, 10, 10), (0.1, 10, 1), (1 - 0.8, 10, 2), (0.01, 10, 1), (0.25, 10, 3)]
)
def test_resolve_k(k: float, n: int, expected: int) -> None:
    assert resolve_k(k, n) == expected


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, math.nan, True, "3"])
def test_bad_k(k: float) -> None:
    for preset in (filters, rank, weights):
        with pytest.raises(BadInput, match="k "):
            preset(k=k)


def test_k_above_the_layer_names_it() -> None:
    with pytest.raises(BadInput, match=r"0\.weight.*k=9.*8"):
        constrain(network(), [("*.weight", filters(k=9))], default=None)


def test_a_pattern_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(BadInput, match=r"weight of shape \(3, 6\)"):
        constrain(nn.Linear(6, 3), [("weight", semi_structured(2, 4))], default=None)


@pytest.mark.parametrize("radius", [0, -1, math.nan, math.inf])
def test_bad_radius(radius: float) -> None:
    with pytest.raises(BadInput, match="radius"):
        filters(k=1, radius=radius)


# --- schedules of k ---------------------------------------------------------------------------------------------------


def test_schedule_anneals_k_keeps_the_diameter_and_the_momentum() -> None:
    model = nn.Linear(20, 20, bias=False)
    opt = SFW(constrain(model, [("weight", rank(k=0.1, radius=2, vertices="sparse"))], default=None), lr=0.1)
    diameter = NormBall.from_spec(opt.param_groups[0]["ball"]).diameter((20, 20))
    anneal = KSchedule(opt, start=1.0, steps=10)
    seen = []
    for _ in range(12):
        ball = NormBall.from_spec(opt.param_groups[0]["ball"])
        seen.append(ball.norm.k)
        assert ball.diameter((20, 20)) == pytest.approx(diameter)
        model.weight.grad = torch.randn(20, 20)
        opt.step()
        momentum = opt.state[model.weight]["momentum_buffer"].clone()
        anneal.step()
        assert torch.equal(opt.state[model.weight]["momentum_buffer"], momentum)
        assert NormBall.from_spec(opt.param_groups[0]["ball"]).contains(model.weight.detach() * (1 - 1e-6))
    assert seen == [20, 18, 16, 15, 13, 11, 9, 7, 6, 4, 2, 2]


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("done", [4, 10, 15])
def test_schedule_resumes(optimizer_first: bool, done: int) -> None:
    def fresh() -> tuple[nn.Linear, SFW]:
        torch.manual_seed(0)
        model = nn.Linear(20, 20)
        return model, SFW(constrain(model, [("weight", rank(k=0.1, radius=1, vertices="sparse"))], default=None))

    model, opt = fresh()
    anneal = KSchedule(opt, start=1.0, end=0.3, steps=10)
    for _ in range(done):
        model.weight.grad = torch.ones(20, 20)
        opt.step()
        anneal.step()
    weight = model.weight.detach().clone()
    resumed_model, again = fresh()
    resumed_model.load_state_dict(model.state_dict())
    if optimizer_first:
        again.load_state_dict(opt.state_dict())
        resumed = KSchedule(again, start=1.0, end=0.3, steps=10)
    else:
        resumed = KSchedule(again, start=1.0, end=0.3, steps=10)
        again.load_state_dict(opt.state_dict())
    resumed.load_state_dict(anneal.state_dict())
    assert torch.equal(resumed_model.weight, weight)
    for m, o, schedule in ((model, opt, anneal), (resumed_model, again, resumed)):
        m.weight.grad = torch.ones(20, 20)
        o.step()
        schedule.step()
    k, resumed_k = (NormBall.from_spec(o.param_groups[0]["ball"]).norm.k for o in (opt, again))
    assert k == resumed_k == {4: 13, 10: 6, 15: 6}[done]


def test_schedules_need_something_to_anneal() -> None:
    opt = SFW([nn.Parameter(torch.ones(2))])
    with pytest.raises(BadInput, match="no group"):
        KSchedule(opt, steps=3)
    opt = SFW(constrain(nn.Linear(4, 4), [("weight", rank(k=1))], default=None))
    with pytest.raises(BadInput, match="steps"):
        KSchedule(opt, steps=0)
    with pytest.raises(BadInput, match="weight: k=5"):
        KSchedule(opt, start=5, steps=3)


def test_with_k() -> None:
    assert Blocks(KSparse(2), 4).with_k(3) == Blocks(KSparse(3), 4)
    assert KSupport(2).with_k(1) == KSupport(1)
    with pytest.raises(BadInput, match="no k"):
        Rows(Lp(1)).with_k(1)
