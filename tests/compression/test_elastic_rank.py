"""Every rank from one folder: spans in few bits beside the dense weights, sizes as the compressor plans them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.compression import LowRank, Plan
from pliant.compression.budgets import Budget
from pliant.compression.calibration import Calibration
from pliant.compression.corrections import picked
from pliant.compression.elastic import Elastic
from pliant.compression.factored import matrices
from pliant.compression.ladder import make_elastic
from pliant.compression.rank_path import BASIS_BITS, RankPath, _orthonormal, _stored
from pliant.compression.refit import Refitter
from pliant.errors import BadInput, DamagedFile, Refused
from pliant.storage import ELASTIC, WEIGHTS, read_elastic, rebuild_sized
from tests.compression.test_elastic import DATA, Block, X, images, made, put, put_tensor, tampered, written

LADDER = (0.7, 0.4, 0.2)


class Net(nn.Module):
    """Convolutions with a stride and with groups, and linear layers that are wide, tall and flat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.body = nn.Sequential(
            *(nn.Conv2d(24, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32), nn.ReLU()),
        )
        self.head, self.wide, self.last = nn.Linear(32 * 16, 64), nn.Linear(64, 160), nn.Linear(160, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).flatten(1)
        return self.last(torch.relu(self.wide(torch.relu(self.head(x)))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(Net, X)


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return written(model, LowRank(), tmp_path_factory.mktemp("e") / "out", LADDER)


@pytest.fixture(scope="module")
def elastic(folder: Folder) -> Elastic:
    return read_elastic(Net(), folder)


def path_of(model: nn.Module, x: Tensor = X, bits: int = 8, data: Any = DATA, **options: Any) -> tuple[RankPath, Any]:
    compressor = LowRank(**options)
    analysis = compressor.analyse(model, x, None if data is None else Calibration(data, model, x))
    return RankPath.of(model, compressor, analysis, bits), analysis


def missed(network: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Return the error of a network's outputs, relative to the energy of those of another."""
    with torch.no_grad():
        y = other(x)
        return float((network(x) - y).square().sum() / y.square().sum())


def at(path: RankPath, params: int) -> int:
    (step,) = [n for n, count in enumerate(path.params) if count == params]
    return step


# --- sizes ------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"cost": "macs"},
    {"allocation": "uniform"},
    {"allocation": "energy", "scheme": "channel"},
    {"whiten": False},
    {"scheme": "best"},
    {"multiple_of": 4, "keep": ("head",), "at_least": 8},
    {"at_most": 0.3, "ratios": {"wide": 0.5}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_plans_are_those_of_the_compressor(options: dict[str, Any], model: nn.Module) -> None:
    path, analysis = path_of(model, **options)
    compressor = LowRank(**options)
    for ratio in (0.3, 0.6, 0.85):
        plan = compressor.at(ratio).plan(model, X, analysis=analysis)
        if options.get("scheme") == "best":  # one scheme for all ranks of a layer: other ranks may be offered
            again = min(map(path.plan, path.sizes), key=lambda each: abs(each.params_after - plan.params_after))
            assert again.params_after == pytest.approx(plan.params_after, rel=0.02)
            continue
        again = path.plan(at(path, plan.params_after))
        assert (again.layers, again.refused, again.floored) == (plan.layers, plan.refused, plan.floored)
        assert again.ratio_removed == pytest.approx(plan.ratio_removed)
        assert {**again.options, "ratio": ratio} == plan.options


@pytest.mark.parametrize("options", OPTIONS)
def test_every_size_keeps_a_part_of_the_larger_one(options: dict[str, Any], model: nn.Module) -> None:
    path, _ = path_of(model, **options)
    base, larger = path.base(model), path.plan(0)
    assert larger.params_after == path.params[0] == measuring.parameters(model)
    assert {name: tensor.shape for name, tensor in path.template().items()} == {n: t.shape for n, t in base.items()}
    assert path.sizes[:2] == [0, max(1, path.starts)]
    for step in path.sizes[1 :: max(1, len(path.sizes) // 12)]:
        plan = path.plan(step)
        assert plan.params_after == path.params[step] < path.params[step - 1]
        assert all(a.kept <= b.kept for a, b in zip(plan.layers, larger.layers, strict=True))
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        network = path.cut(model, step, base)
        assert measuring.parameters(network) == path.params[step]
        assert measuring.macs(network, X) == measuring.macs(model, X) - path.macs_removed(step) // len(X)
        state, kept = network.state_dict(), path.kept(step)
        for name, tensor in base.items():
            part = picked(tensor, kept.get(name, {}))
            assert part.shape == state[name].shape if name in state else not part.numel()
        larger = plan


@pytest.mark.parametrize("options", [{"scheme": "spatial"}, {"scheme": "channel"}, {"whiten": False}])
def test_slices_are_the_compressors_own_truncations(options: dict[str, Any], model: nn.Module) -> None:
    path, analysis = path_of(model, **options)
    base, spectra = path.base(model), {name: each[0] for name, each in analysis.layers.items()}
    for ratio in (0.3, 0.6, 0.85):
        plan = LowRank(**options).at(ratio).plan(model, X, analysis=analysis)
        own = LowRank(**options).apply(model, plan, analysis=analysis)
        network = path.cut(model, at(path, plan.params_after), base)
        for layer in plan.layers:
            if layer.params < layer.params_dense:
                spectrum = spectra[layer.name]
                wanted = spectrum.basis[..., : layer.kept] @ spectrum.coordinates[:, : layer.kept]
                pair = network.get_submodule(layer.name)
                weight = matrices(model.get_submodule(layer.name), spectrum.scheme)
                expand = pair.expand.weight if spectrum.scheme == "channel" else pair.expand.weight.movedim(1, -1)
                expand = expand.reshape(spectrum.groups, spectrum.rows, -1)
                reduce = pair.reduce.weight.reshape(spectrum.groups, -1, spectrum.columns)
                error = (expand @ reduce - wanted).norm() / wanted.norm()
                lost, best = (expand @ reduce - weight).norm(), (wanted - weight).norm()
                assert error < 0.02  # of eight bits
                assert lost**2 < best**2 * (1.001 if not analysis.whitened else 1.1) + 1e-4 * weight.norm() ** 2
        assert missed(network, own, images(64, 9)) < 1e-4


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
@pytest.mark.parametrize("whiten", [True, False])
def test_what_is_stored_is_exact_but_for_its_bits(shape: tuple[int, int], whiten: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    stretched = torch.logspace(1, -1, shape[1])
    data = [stretched * torch.randn(64, shape[1], generator=torch.Generator().manual_seed(i)) for i in range(4)]
    _, analysis = path_of(layer, data[0][:2], data=data if whiten else None)
    (spectrum,) = analysis.layers[""]
    assert spectrum.rows, spectrum.columns == shape
    weight = matrices(layer).double()
    basis = _orthonormal(weight, _stored(weight, spectrum.basis[..., : spectrum.max_rank].double()))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[2], dtype=torch.float64)[None])
    for rank in range(1, spectrum.max_rank + 1):
        ours = basis[..., :rank] @ basis[..., :rank].mT @ weight
        own = spectrum.basis[..., :rank].double() @ spectrum.coordinates[:, :rank].double()
        assert (ours - own).norm() < 1e-5 * own.norm()


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("bits", BASIS_BITS)
def test_a_weight_of_a_rank_is_exact_from_there_on(shape: tuple[int, int], bits: int) -> None:
    torch.manual_seed(0)
    layer, rank = nn.Linear(shape[1], shape[0]), 5
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]))
    data = [torch.randn(64, shape[1], generator=torch.Generator().manual_seed(i)) for i in range(4)]
    path, _ = path_of(layer, data[0][:2], bits, data)
    for step in path.sizes:
        error = missed(path.cut(layer, step, path.base(layer)), layer, data[0])
        assert (error < 1e-8) == (path.plan(step).layers[0].kept >= rank)


def test_zero_weights_and_a_model_that_is_a_layer() -> None:
    layer = nn.Linear(32, 24)
    nn.init.zeros_(layer.weight)
    path, _ = path_of(layer, torch.zeros(2, 32), data=None)
    network = path.cut(layer, path.sizes[-1], path.base(layer))
    torch.testing.assert_close(network(torch.ones(1, 32)), layer(torch.ones(1, 32)))


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_largest_is_the_dense_network(model: nn.Module, folder: Folder) -> None:
    for limits in ({}, {"keep_params": 1.0}):
        network = pliant.rebuild(made(Net, X, seed=5), folder, **limits)
        torch.testing.assert_close(network.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_rung_is_what_was_measured(model: nn.Module, folder: Folder, elastic: Elastic) -> None:
    refitter = Refitter(model, X, Calibration(DATA, model, X))
    for point in elastic.points:
        share = elastic.path.params[point.step] / elastic.path.params[0]
        network, plan = rebuild_sized(Net(), folder, Budget("keep_params", share))
        assert plan.params_after == measuring.parameters(network) == elastic.path.params[point.step]
        assert refitter.error(network) == pytest.approx(point.errors["elastic"], rel=1e-3, abs=1e-7)


def test_rungs_are_near_their_own_refits(elastic: Elastic) -> None:
    last = elastic.points[-1].errors
    assert last["refitted"] < 0.8 * last["cut"]
    for point in elastic.points:
        if point.bits:
            assert point.errors["elastic"] < point.errors["refitted"] + 0.2 * point.errors["cut"]


def test_sizes_between_rungs_are_better_than_cuts(model: nn.Module, folder: Folder) -> None:
    compressor = LowRank()
    analysis = compressor.analyse(model, X, Calibration(DATA, model, X))
    refitter = Refitter(model, X, Calibration(DATA, model, X))
    network, plan = rebuild_sized(Net(), folder, Budget("keep_params", 0.25))
    assert plan.params_after <= 0.25 * plan.params_before
    assert refitter.error(network) < 0.9 * refitter.error(compressor.apply(model, plan, analysis=analysis))


def test_the_file_is_small(folder: Folder, model: nn.Module, elastic: Elastic) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1.2 * measuring.file_bytes(model)
    assert (folder / WEIGHTS).stat().st_size == measuring.file_bytes(model)
    assert isinstance(elastic.path, RankPath)


def test_a_long_ladder_takes_fewer_bits(model: nn.Module) -> None:
    ladder = tuple(0.95 - 0.05 * i for i in range(16))
    made = make_elastic(model, LowRank(), X, DATA, ladder)
    assert isinstance(made.path, RankPath)
    assert made.path.bits < BASIS_BITS[0]
    assert {point.bits for point in made.points if point.bits} == {2}


def test_another_process_makes_the_same_network(folder: Folder, tmp_path: Folder) -> None:
    network = pliant.rebuild(Net(), folder, keep_params=0.33)
    program = (
        "import sys, torch, pliant; from tests.compression.test_elastic_rank import Net, X; "
        f"torch.manual_seed(7); net = pliant.rebuild(Net(), {str(folder)!r}, keep_params=0.33); "
        f"torch.save(net(X).detach(), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Folder(__file__).parents[2])
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), network(X).detach())


def test_budgets_give_the_largest_that_meets_them(folder: Folder, model: nn.Module, elastic: Elastic) -> None:
    macs, size = measuring.macs(model, X), measuring.file_bytes(model)
    costs: dict[str, Callable[[nn.Module], float]] = {
        "keep_params": lambda net: measuring.parameters(net) / measuring.parameters(model),
        "keep_macs": lambda net: measuring.macs(net, X) / macs,
        "max_bytes": measuring.file_bytes,
    }
    for kind, limit in {"keep_params": 0.41, "keep_macs": 0.8, "max_bytes": size // 2}.items():
        network = pliant.rebuild(Net(), folder, **{kind: limit})
        step = elastic.step(Budget(kind, limit))
        larger = elastic.path.compressor.skeleton(model, elastic.path.plan(step - 1))
        assert costs[kind](network) <= limit < costs[kind](larger)
    assert measuring.parameters(pliant.rebuild(Net(), folder, max_latency_ms=1e6)) == measuring.parameters(model)


def test_the_smallest_rung_is_the_smallest_size(folder: Folder, model: nn.Module, tmp_path: Folder) -> None:
    with pytest.raises(Refused, match=r"keep_params=0.1 is out of reach: the smallest size .* keep_params=0.1\d"):
        pliant.rebuild(Net(), folder, keep_params=0.1)
    with pytest.raises(Refused, match=r"goes down to 0.001 .* the least that LowRank can reach"):
        pliant.elastic(model, LowRank(), X, tmp_path / "out", DATA, (0.5, 0.001))


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("compressor", value="FilterPruning"), "unknown option"),
        (put("options", "whiten", value="auto"), "options.whiten should be true or false"),
        (put("options", "allocation", value="best"), "options: unknown allocation"),
        (put("parameters", value=7), "another model"),
        (put("refused", value=[1]), "refused"),
        (put("bits", value=5), "elastic.bits should be one of 8, 6, 4, not 5"),
        (put("bits", value=4), "basis.codes should have"),
        (put("layers", value=3), "elastic.layers should be a list"),
        (put("layers", 0, value=3), r"layers\[0\] should be a mapping"),
        (put("layers", 0, "name", value="nowhere"), "another model: it has no layer 'nowhere'"),
        (put("layers", 0, "name", value="stem.1"), "another model: it has no layer 'stem.1'"),
        (put("layers", 0, "name", value="head"), r"layers\[0\].scheme should be|a second time"),
        (put("layers", 0, "scheme", value="deep"), r"layers\[0\].scheme should be one of"),
        (put("layers", -1, "scheme", value="spatial"), r"scheme should be one of"),
        (put("layers", 0, "whole", value=0), "whole should be at least 1"),
        (put("layers", 0, "more", value=0), "'more'"),
        (put("steps", 0, value=[0, 0]), r"steps\[0\] should lower"),
        (put("steps", 0, value=[99, 1]), r"steps\[0\] should lower"),
        (put("steps", 0, 1, value=10**6), r"steps\[0\] should lower"),
        (put("steps", 0, value="x"), r"steps\[0\] should be a layer and a rank"),
        (put("starts", value=10**6), "starts should be at most"),
        (put("weights", 0, value="nowhere"), "no weight 'nowhere'"),
        (put("points", -1, "step", value=10**6), "has a step 1000000"),
        (put_tensor("basis.codes", lambda x: x[:-1]), "basis.codes should have"),
        (put_tensor("basis.codes", lambda x: x.float()), "no basis.codes of type uint8"),
        (put_tensor("basis.steps", lambda x: x.view(1, -1)), "basis.steps should have"),
        (put_tensor("basis.steps", lambda x: x * torch.nan), "basis.steps holds NaN"),
        (lambda _, tensors: tensors.pop("basis.steps"), "no basis.steps"),
        (put_tensor("losses", lambda x: x[:-1]), "losses should have"),
        (put_tensor("losses", lambda x: -x), "losses should hold numbers of at least 0 that never fall"),
        (put_tensor("losses", lambda x: x.flip(0)), "losses should hold numbers of at least 0 that never fall"),
        (put_tensor("strengths", lambda x: x[:-1]), "strengths should have"),
        (put_tensor("strengths", lambda x: x * 0), "strengths should hold positive numbers"),
        (put_tensor("1.codes", lambda x: x[:-1]), "1.codes should have"),
        (put_tensor("0.vectors", lambda x: x[:-1]), "0.vectors should have"),
    ],
)
def test_tampered_folders_are_one_line(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str, folder: Folder, tmp_path: Folder
) -> None:
    out = tampered(folder, tmp_path / "out", change)
    with pytest.raises((DamagedFile, BadInput), match=message) as caught:
        pliant.rebuild(Net(), out, keep_params=0.5)
    assert len(str(caught.value).splitlines()) == 1
    assert ELASTIC in str(caught.value)


def test_another_model(folder: Folder) -> None:
    with pytest.raises(BadInput, match="for another model"):
        pliant.rebuild(Block(), folder, keep_params=0.5)
