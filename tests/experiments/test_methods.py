"""Every ``--method`` as users meet it: its settings, a short training, resuming, compressing what it leaves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pliant import BadInput, Diverged, FilterPruning, LowRank, Magnitude, compress, load
from pliant.cli import main
from pliant.experiments import baselines
from pliant.experiments.baselines.numuon import k_of_step
from pliant.experiments.methods import METHODS, make_optimizer, resolved
from pliant.experiments.models import build_model
from pliant.experiments.run_folder import Run
from pliant.experiments.train import train
from pliant.experiments.training.checkpoint import CHECKPOINT
from pliant.experiments.training.optimizers import make_k_schedule, matrix_layers
from pliant.experiments.training.session import Session
from pliant.experiments.training.settings import OWN, Resolved, Settings
from pliant.norms import KSupport, Lp, NormBall, Rows

OTHERS = [name for name in METHODS if name != "sgd" and not name.startswith("sfw")]


def settings(method: str, **changes: Any) -> Resolved:
    return resolved(Settings(method=method, **changes))


def quick(method: str, out: Path, **options: Any) -> Path:
    if method.startswith("pat"):
        pytest.importorskip("torchao.prototype.pat")
    options = {"model": "lenet5", "width": 0.5, "epochs": 3, "precision": "fp32", **options}
    return train(method=method, out=str(out), **options)


def log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "train.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_learns_and_its_network_is_compressed_as_any(method: str, tmp_path: Path) -> None:
    # scion's radius is for networks with normalisation; lenet5 has none
    run = quick(method, tmp_path / "run", **({"radius": 5.0} if method == "scion" else {}))
    first, *_, last = log(run)
    assert last["loss"] < first["loss"] - 0.05
    model = load(run)
    plain = build_model("lenet5", num_classes=10, image_shape=(1, 8, 8), width=0.5)
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in plain.state_dict().items()
    }
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))
    x = torch.randn(2, 1, 8, 8)
    for compressor in (FilterPruning(ratio=0.5), LowRank(ratio=0.3), Magnitude(ratio=0.5)):
        assert compress(model, compressor, example_inputs=x)(x).isfinite().all()


# What a checkpoint must hold: counts of steps, the state of the random numbers, factors, k, what torchao keeps.
STATEFUL = {"trp": {"every": 4}, "cram-rank": {}, "lorita": {}, "condlr": {}, "numuon": {}, "pat-rank": {}}


@pytest.mark.parametrize("method", STATEFUL)
def test_resumed_training_is_bitwise_the_same(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch_size": 256, "epochs": 2, **STATEFUL[method]}
    whole = quick(method, tmp_path / "whole", **options)
    save, stopped = Session.save, tmp_path / "stopped"

    def save_then_die(self: Session, path: Path) -> None:
        save(self, path)
        if self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            quick(method, stopped, **options)
    torch.manual_seed(99)  # another process would start from another random state
    train(out=str(stopped), resume=True)
    a, b = (Run.open(run).load().state_dict() for run in (whole, stopped))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert log(stopped) == log(whole)


def test_a_finished_training_of_factors_can_be_resumed(tmp_path: Path) -> None:
    run = quick("lorita", tmp_path / "run", epochs=1)
    before = load(run).state_dict()
    train(out=str(run), resume=True)
    torch.testing.assert_close(load(run).state_dict(), before, rtol=0, atol=0)


def test_what_is_validated_is_what_is_saved(tmp_path: Path) -> None:
    run = quick("condlr", tmp_path / "run", k=0.3)
    session = Session(Settings.from_config(Run.open(run).config))
    session.restore(run / CHECKPOINT)
    merged, x = load(run), torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(merged(x), session.model.eval()(x))
    values = torch.linalg.svdvals(merged.conv2.weight.detach().flatten(1))
    assert values[round(0.3 * len(values)) :].max() < 1e-6 * values[0]  # float32


def test_a_second_pass_leaves_batchnorms_statistics_alone(tmp_path: Path) -> None:
    run = quick("cram-weights", tmp_path / "run", model="resnet8", epochs=1, strength=1e3, lr=1e-30)
    other = quick("sgd", tmp_path / "sgd", model="resnet8", epochs=1, lr=1e-30)
    (cram, sgd) = ({k: v for k, v in load(r).state_dict().items() if "running" in k} for r in (run, other))
    assert cram
    torch.testing.assert_close(cram, sgd)


def test_accumulation_serves_both_passes(tmp_path: Path) -> None:
    options = {"model": "mlp", "epochs": 1}
    whole = load(quick("cram-weights", tmp_path / "whole", **options)).state_dict()
    parts = load(quick("cram-weights", tmp_path / "parts", accumulate=4, **options)).state_dict()
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["glt", "nuc", "cat", "q3r", "cram-rank", "pat-rank", "lorita"])
def test_an_exploding_learning_rate_is_a_divergence(method: str, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="train with a smaller --lr"):
        quick(method, tmp_path / "run", model="mlp", lr=1e15, warmup=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_a_method_does_not_have_is_an_error(method: str) -> None:
    values = {
        "recipe": "paper",
        "k": 0.2,
        "coupled": True,
        "condition": 2.0,
        "vertices": "sparse",
        "rescale": "none",
        "pattern": "1:4",
        "every": 3,
        "factors": 2,
        "scheme": "spatial",
    }
    for name in OWN:
        given = {name: values.get(name, 0.5)}
        if name in METHODS[method].own:
            if name == "strength" and "rescale" in METHODS[method].own:  # of SFW: for convex steps
                given["rescale"] = "none"
            assert settings(method, **given)[name] == given[name]
        else:
            with pytest.raises(BadInput, match=rf"^--{name} is not a setting of --method {method}; its own settings: "):
                settings(method, **given)


def test_the_command_line_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "sgd", "--k", "0.1", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == ("pliant: error: --k is not a setting of --method sgd; its own settings: none\n")
    assert main(["train", "--method", "glt", "--radius", "3", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("--radius is not a setting of --method glt; its own settings: --strength\n")
    assert not (tmp_path / "run").exists()


def test_a_scheme_reaches_the_balls_of_convolutions() -> None:
    for scheme, spatial in ((None, 0), ("channel", 0), ("spatial", 7)):  # as many convolutions are 3×3
        model = build_model("resnet8", num_classes=10, image_shape=(1, 8, 8), width=0.25)
        groups = make_optimizer(model, settings("sfw-rank", scheme=scheme, lr=0.1)).param_groups
        norms = [group["ball"]["norm"] for group in groups if group["ball"] for _ in group["params"]]
        assert sum(norm["spatial"] for norm in norms) == spatial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "glt", "strength": -1.0}, "--strength must be >= 0"),
        ({"method": "trp", "energy": 1.0}, r"--energy must lie in \[0, 1\)"),
        ({"method": "trp", "every": 0}, "--every must be at least 1"),
        ({"method": "lorita", "factors": 1}, "--factors must be at least 2"),
        ({"method": "condlr", "condition": 0.5}, "--condition must be >= 1"),
        ({"method": "muon", "other_lr": 0.0}, "--other_lr must be positive"),
        ({"method": "sfw-rank", "vertices": "spars"}, "did you mean 'sparse'"),
        ({"method": "sfw-rank", "scheme": "best"}, "unknown scheme 'best'"),
        ({"method": "numuon", "k": 500}, r"conv1\.weight of shape .*k=500"),
        ({"method": "condlr", "k": 500}, r"conv1\.weight of shape .*k=500"),
    ],
)
def test_values_out_of_range_leave_nothing_behind(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        quick(out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )


@pytest.mark.parametrize("method", [name for name in OTHERS if name not in ("lorita", "condlr")])
def test_all_methods_are_about_the_same_weights(method: str) -> None:
    if method.startswith("pat"):
        pytest.importorskip("torchao.prototype.pat")
    model = net()
    optimizer = make_optimizer(model, settings(method))
    marks = {"row_dim": 0, "ball": None}
    chosen = {
        name
        for group in optimizer.param_groups
        for name in group["param_names"]
        if group.get("row_dim") == marks["row_dim"] or group.get("ball") is not None
    }
    assert chosen == {"0.weight", "3.weight"} == {f"{name}.weight" for name in matrix_layers(model)}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("method", ["lorita", "condlr"])
def test_products_leave_tied_and_parametrised_weights_alone(method: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[2])
    make_optimizer(model, settings(method))
    made = {name.partition(".")[0] for name, m in model.named_modules() if isinstance(m, baselines.Product)}
    assert made == {"3"}
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sgd"])
def test_a_model_without_a_matrix_is_refused(method: str) -> None:
    if method.startswith("pat"):
        pytest.importorskip("torchao.prototype.pat")
    with pytest.raises(BadInput, match=f"{method} finds no weight"):
        make_optimizer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), settings(method))


@pytest.mark.parametrize("method", ["muon", "numuon", "scion", "sfw-rank"])
def test_other_parameters_may_have_a_learning_rate_of_their_own(method: str) -> None:
    optimizer = make_optimizer(net(), settings(method, lr=0.01, other_lr=0.3))
    lrs = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert lrs["0.weight"] == lrs["3.weight"] == 0.01
    assert lrs["0.bias"] == lrs["5.weight"] == 0.3


def test_k_of_numuon_is_a_share_of_each_matrix_and_falls() -> None:
    chosen = settings("numuon", k=0.25, k_start=1.0)
    optimizer = make_optimizer(net(), chosen)
    assert make_k_schedule(optimizer, chosen, steps=4) is None  # the optimizer does it by itself
    seen = [[k_of_step(group, done) for group in optimizer.param_groups[:2]] for done in range(3)]
    assert seen == [[8, 6], [5, 4], [2, 2]]


def test_k_sparse_is_sfw_with_sparse_vertices() -> None:
    balls = [
        [group["ball"] for group in make_optimizer(net(), chosen).param_groups]
        for chosen in (settings("k-sparse"), settings("sfw-weights", vertices="sparse"), settings("sfw-weights"))
    ]
    assert balls[0] == balls[1] != balls[2]


def test_the_paper_has_balls_on_all_parameters_and_steps_as_long_as_the_gradient() -> None:
    chosen = settings("sfw-filters", recipe="paper", k=0.25, radius=3.0)
    optimizer = make_optimizer(net(), chosen, torch.zeros(1, 3, 3, 3))
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    balls = {name: NormBall.from_spec(group["ball"]) for name, group in groups.items()}
    assert balls.keys() == dict(net().named_parameters()).keys()
    assert {name: ball.norm for name, ball in balls.items()} == {
        **dict.fromkeys(["0.weight", "3.weight"], Rows(KSupport(2))),  # a quarter of 8 and of 6 filters
        **dict.fromkeys(["0.bias", "1.weight", "1.bias", "3.bias", "5.weight", "5.bias"], Lp(2)),
    }
    assert all(group["rescale"] == "gradient" for group in groups.values())
    assert not any(group["persistence"] for group in groups.values())
    # The L2 diameter is 2·w·E‖θ‖₂, and as PyTorch draws weights, uniformly in ±1/√fan_in, E‖θ‖² is size/(3·fan_in).
    for name, fan_in in (("0.weight", 3 * 9), ("3.weight", 8)):
        p = net().get_parameter(name)
        expected = 2 * 3.0 * math.sqrt(p.numel() / (3 * fan_in))
        assert balls[name].diameter(p.shape) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("recipe", ["gradient", "paper"])
def test_a_recipe_leaves_k_of_n_to_m_to_the_pattern(recipe: str) -> None:
    def norm(**changes: Any) -> object:
        groups = make_optimizer(net(), settings("sfw-nm", pattern="2:4", **changes)).param_groups
        return next(NormBall.from_spec(g["ball"]).norm for g in groups if "3.weight" in g["param_names"])

    assert norm(recipe=recipe) == norm() != norm(recipe=recipe, k=0.25)


@pytest.mark.parametrize("recipe", ["gradient", "paper"])
@pytest.mark.parametrize("method", ["sfw-filters", "sfw-rank", "sfw-weights"])
def test_k_can_be_annealed_under_a_recipe_that_does_not(method: str, recipe: str) -> None:
    constant, annealed = (settings(method, recipe=recipe, lr=0.1, k_start=start) for start in (None, 1.0))
    assert make_k_schedule(make_optimizer(net(), constant, torch.zeros(1, 3, 8, 8)), constant, steps=10) is None
    assert make_k_schedule(make_optimizer(net(), annealed, torch.zeros(1, 3, 8, 8)), annealed, steps=10) is not None
