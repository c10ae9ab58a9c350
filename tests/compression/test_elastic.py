"""Elastic networks: every size from one folder, without data; what is stored is what was measured."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path as Folder
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.compression import Chain, Compressor, FilterPruning, HeadPruning, LowRank, Magnitude, Plan, skeleton
from pliant.compression.batchnorm import reestimate_batchnorm
from pliant.compression.budgets import Budget
from pliant.compression.calibration import Calibration
from pliant.compression.corrections import BITS, pack, packed_bytes, picked, placed, quantise, restored, unpack
from pliant.compression.elastic import Elastic
from pliant.compression.path import Path
from pliant.compression.refit import Refitter
from pliant.errors import BadInput, DamagedFile, PliantError, Refused
from pliant.files import sha256
from pliant.storage import CORRECTIONS, ELASTIC, WEIGHTS, read_elastic, rebuild_sized

LADDER = (0.7, 0.4, 0.2)


class Block(nn.Module):
    """A small residual network: channels are coupled over the sum, and a linear layer reads a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            *(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16)),
        )
        self.pool, self.head, self.last = nn.AvgPool2d(2), nn.Linear(16 * 16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(torch.relu(x + self.body(x)))
        return self.last(torch.relu(self.head(x.flatten(1))))


class Attention(nn.Module):
    """Attention without BatchNorm, with PyTorch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 8, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(x + self.attention(y, y, y, need_weights=False)[0])


def made(kind: Callable[[], nn.Module], x: Tensor, seed: int = 0) -> nn.Module:
    """Return a network that was trained for a moment."""
    torch.manual_seed(seed)
    model = kind().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for turn in range(60):
        batch = images(64, turn) if x.dim() == 4 else torch.randn(64, *x.shape[1:])
        sizes = batch.flatten(1)[:, :96].unflatten(1, (3, 32)).square().mean(2)
        loss = nn.functional.cross_entropy(model(batch).flatten(1)[:, :3], sizes.argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def images(count: int, seed: int = 1) -> Tensor:
    """Return images with a structure: mixtures of ten patterns, with some noise."""
    patterns = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.einsum("np,pcij->ncij", torch.randn(count, 10, generator=generator), patterns)
    return mixed / 3 + 0.05 * torch.randn(count, 3, 8, 8, generator=generator)


X = images(2)
DATA = [images(64, seed) for seed in range(4)]
TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
SENTENCES = [torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def written(model: nn.Module, compressor: Compressor[Any], out: Folder, ladder: tuple[float, ...]) -> Folder:
    """Return the folder of a model, which must not change."""
    before, mode = copy.deepcopy(model.state_dict()), model.training
    folder = pliant.elastic(model, compressor, X, out, DATA, ladder)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training == mode
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(Block, X)


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return written(model, FilterPruning(), tmp_path_factory.mktemp("e") / "out", LADDER)


@pytest.fixture(scope="module")
def elastic(model: nn.Module, folder: Folder) -> Elastic:
    return read_elastic(Block(), folder)


def parts(plan: Plan) -> dict[tuple[str, str], set[int]]:
    return {
        (layer.name, axis): set(positions if positions is not None else range(1000))
        for layer in plan.layers
        for axis, positions in (("outputs", layer.outputs), ("inputs", layer.inputs))
    }


# --- corrections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, count, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_corrections_are_near(bits: int) -> None:
    correction = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, 8)[:, None]
    correction[3] = 0
    codes, steps = quantise(correction, bits)
    missed = (restored(codes, steps, bits) - correction).square().sum(1)
    share = missed[4:] / correction[4:].square().sum(1)
    assert share.max() < {4: 0.03, 3: 0.08, 2: 0.2}[bits]  # the best uniform steps for a normal: 0.0115, 0.037, 0.119
    assert missed[3] == 0
    assert (missed <= correction.square().sum(1)).all()  # of what is too small for a float16: nothing


def test_parts_are_placed_where_they_were_picked() -> None:
    whole = torch.arange(24.0).view(4, 6)
    kept = {0: torch.tensor([1, 3]), 1: torch.tensor([0, 2, 5])}
    part = picked(whole, kept)
    assert torch.equal(part, whole[[1, 3]][:, [0, 2, 5]])
    assert torch.equal(
        placed(torch.zeros(4, 6), kept, part).nonzero(), (placed(whole * 0, kept, part + 1) > 1).nonzero()
    )
    assert torch.equal(placed(whole, kept, part), whole)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_every_size_keeps_a_part_of_the_larger_one(elastic: Elastic) -> None:
    path = elastic.path
    larger = parts(path.plan(0))
    for step in path.sizes[1:]:
        plan = path.plan(step)
        assert plan.params_after == path.params[step] < path.params[step - 1]
        assert all(kept <= larger[place] for place, kept in parts(plan).items())
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        larger = parts(plan)


@pytest.mark.parametrize("options", [{}, {"cost": "macs"}, {"allocation": "uniform"}, {"importance": "l1"}])
def test_plans_are_those_of_the_compressor(options: dict[str, Any], model: nn.Module) -> None:
    compressor = FilterPruning(**options)
    analysis = compressor.analyse(model, X, Calibration(DATA, model, X))
    path = Path.of(model, compressor, analysis)
    for ratio in (0.2, 0.5, 0.8):
        plan = compressor.at(ratio).plan(model, X, analysis=analysis)
        (step,) = [n for n, params in enumerate(path.params) if params == plan.params_after]
        again = path.plan(step)
        assert again.layers == plan.layers
        assert again.refused == plan.refused
        assert again.ratio_removed == pytest.approx(plan.ratio_removed)
        network = compressor.apply(model, again)
        assert measuring.parameters(network) == path.params[step]
        assert measuring.macs(network, X) == measuring.macs(model, X) - path.macs_removed(step) // len(X)


def test_kept_positions_are_those_of_the_plan(elastic: Elastic) -> None:
    step = elastic.path.sizes[-1] // 2
    small = skeleton(elastic.path.model, elastic.path.plan(step)).state_dict()
    kept = elastic.path.kept(step)
    for name, tensor in elastic.path.model.state_dict().items():
        assert picked(tensor, kept.get(name, {})).shape == small[name].shape


def test_controls_hold_at_every_size_but_the_dense_one(model: nn.Module) -> None:
    compressor = FilterPruning(multiple_of=4, at_most=0.5, keep=("head",))
    analysis = compressor.analyse(model, X, Calibration(DATA, model, X))
    path = Path.of(model, compressor, analysis)
    assert path.starts
    assert path.sizes[:2] == [0, path.starts]
    for step in path.sizes[1:]:
        for layer in path.plan(step).layers:
            if layer.outputs is not None:
                assert len(layer.outputs) % 4 == 0
                assert len(layer.outputs) <= layer.total / 2


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_largest_is_the_dense_network(model: nn.Module, folder: Folder) -> None:
    for limits in ({}, {"keep_params": 1.0}):
        network = pliant.rebuild(made(Block, X, seed=5), folder, **limits)
        torch.testing.assert_close(network.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_rung_is_what_was_measured(model: nn.Module, folder: Folder, elastic: Elastic) -> None:
    refitter = Refitter(model, X, Calibration(DATA, model, X))
    for point in elastic.points:
        share = elastic.path.params[point.step] / elastic.path.params[0]
        network, plan = rebuild_sized(Block(), folder, Budget("keep_params", share))
        assert plan.params_after == measuring.parameters(network) == elastic.path.params[point.step]
        assert refitter.error(network) == pytest.approx(point.errors["elastic"], rel=1e-3)
        assert plan.refit is not None
        assert plan.refit.errors["elastic"] == pytest.approx(point.errors["elastic"], rel=1e-12)
        renewed = reestimate_batchnorm(network, Calibration(DATA, model, X))
        assert refitter.error(network) <= refitter.error(renewed) * (1 + 1e-3)


def test_rungs_are_near_their_own_refits(elastic: Elastic) -> None:
    for point in elastic.points:
        if point.bits:
            assert point.errors["refitted"] < 0.8 * point.errors["cut"]
            assert point.errors["elastic"] < point.errors["refitted"] + 0.2 * point.errors["cut"]


def test_sizes_between_rungs_are_better_than_cuts(model: nn.Module, folder: Folder, elastic: Elastic) -> None:
    refitter = Refitter(model, X, Calibration(DATA, model, X))
    for share in (0.55, 0.3):
        network, plan = rebuild_sized(Block(), folder, Budget("keep_params", share))
        assert plan.params_after <= share * plan.params_before
        cut = FilterPruning().apply(model, plan)
        assert refitter.error(network) < 0.7 * refitter.error(cut)


def test_the_file_is_small(folder: Folder, model: nn.Module) -> None:
    size = sum(file.stat().st_size for file in folder.iterdir())
    # A network this small consists of names and plans; docs/budgets.md has the figure of a real one.
    assert (folder / CORRECTIONS).stat().st_size < 0.5 * (folder / WEIGHTS).stat().st_size
    assert size < 2 * measuring.file_bytes(model)


def test_another_process_makes_the_same_network(folder: Folder, tmp_path: Folder) -> None:
    network = pliant.rebuild(Block(), folder, keep_params=0.33)
    program = (
        "import sys, torch, pliant; from tests.compression.test_elastic import Block, X; "
        f"torch.manual_seed(7); net = pliant.rebuild(Block(), {str(folder)!r}, keep_params=0.33); "
        f"torch.save(net(X).detach(), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Folder(__file__).parents[2])
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), network(X).detach())


def test_masks_survive(tmp_path: Folder, model: nn.Module) -> None:
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        sparse.body[0].weight.mul_(torch.rand_like(sparse.body[0].weight) > 0.5)  # type: ignore[index]
    pliant.elastic(sparse, FilterPruning(), X, tmp_path / "out", DATA, (0.5,))
    network = pliant.rebuild(Block(), tmp_path / "out", keep_params=0.5)
    zeros = (network.body[0].weight == 0).float().mean()  # type: ignore[index]
    assert zeros > 0.4


def test_heads(tmp_path: Folder) -> None:
    dense = made(Attention, TOKENS)
    pliant.elastic(dense, HeadPruning(), TOKENS, tmp_path / "out", SENTENCES, (0.8, 0.5))
    elastic = read_elastic(Attention(), tmp_path / "out")
    assert all(point.bits for point in elastic.points)  # no BatchNorm: nothing between the rungs
    refitter = Refitter(dense, TOKENS, Calibration(SENTENCES, dense, TOKENS))
    for point in elastic.points:
        share = elastic.path.params[point.step] / elastic.path.params[0]
        network = pliant.rebuild(Attention(), tmp_path / "out", keep_params=share)
        assert refitter.error(network) == pytest.approx(point.errors["elastic"], rel=1e-3)
    small, plan = rebuild_sized(Attention(), tmp_path / "out", Budget("keep_macs", 0.6))
    share = measuring.macs(small, TOKENS) / measuring.macs(dense, TOKENS)
    assert 0.4 < share <= 0.6
    assert plan.compressor == "HeadPruning"


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_budgets_give_the_largest_that_meets_them(folder: Folder, model: nn.Module, elastic: Elastic) -> None:
    macs, size = measuring.macs(model, X), measuring.file_bytes(model)
    costs: dict[str, Callable[[nn.Module], float]] = {
        "keep_params": lambda net: measuring.parameters(net) / measuring.parameters(model),
        "keep_macs": lambda net: measuring.macs(net, X) / macs,
        "max_bytes": measuring.file_bytes,
    }
    for kind, limit in {"keep_params": 0.41, "keep_macs": 0.5, "max_bytes": size // 2}.items():
        budget = Budget(kind, limit)
        network = pliant.rebuild(Block(), folder, **{kind: limit})
        step = elastic.step(budget)
        larger = elastic.path.compressor.skeleton(model, elastic.path.plan(step - 1))
        assert costs[kind](network) <= limit < costs[kind](larger)


def test_a_latency_is_measured(folder: Folder) -> None:
    assert measuring.parameters(pliant.rebuild(Block(), folder, max_latency_ms=1e6)) == measuring.parameters(Block())
    with pytest.raises(Refused, match="max_latency_ms=1e-06 is out of reach: the smallest size in the file has"):
        pliant.rebuild(Block(), folder, max_latency_ms=1e-6)


def test_the_smallest_rung_is_the_smallest_size(folder: Folder) -> None:
    with pytest.raises(Refused, match=r"keep_params=0.1 is out of reach: the smallest size .* keep_params=0.1\d"):
        pliant.rebuild(Block(), folder, keep_params=0.1)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", [Magnitude(), Chain(FilterPruning(), LowRank()), FilterPruning(mode="mask")])
def test_other_compressors_are_refused(compressor: Any, model: nn.Module, tmp_path: Folder) -> None:
    with pytest.raises(BadInput, match="elastic files are for FilterPruning and HeadPruning"):
        pliant.elastic(model, compressor, X, tmp_path / "out", DATA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ladder", [(), (0.5, 0.7), (0.5, 0.5), (1.0, 0.5), (0.5, 0.0), ("0.5",), 0.5])
def test_bad_ladders(ladder: Any, model: nn.Module, tmp_path: Folder) -> None:
    with pytest.raises(BadInput, match="ladder holds falling shares"):
        pliant.elastic(model, FilterPruning(), X, tmp_path / "out", DATA, ladder)


def test_a_ladder_out_of_reach(model: nn.Module, tmp_path: Folder) -> None:
    with pytest.raises(Refused, match=r"goes down to 0.001 .* the least that FilterPruning can reach"):
        pliant.elastic(model, FilterPruning(), X, tmp_path / "out", DATA, (0.5, 0.001))


def test_an_existing_folder_stays(model: nn.Module, tmp_path: Folder) -> None:
    with pytest.raises(BadInput, match="exists"):
        pliant.elastic(model, FilterPruning(), X, tmp_path, DATA)


def test_sizes_of_other_folders_and_several_limits(model: nn.Module, folder: Folder, tmp_path: Folder) -> None:
    pliant.export(model, tmp_path / "one", X, formats=["safetensors"])
    with pytest.raises(BadInput, match=r"keep_params=0.5: .* holds a network of one size"):
        pliant.rebuild(Block(), tmp_path / "one", keep_params=0.5)
    with pytest.raises(BadInput, match="expected one budget"):
        pliant.rebuild(Block(), folder, keep_params=0.5, keep_macs=0.5)
    with pytest.raises(BadInput, match="0 < keep_params <= 1"):
        pliant.rebuild(Block(), folder, keep_params=1.5)


# --- damaged files ----------------------------------------------------------------------------------------------------


def tampered(folder: Folder, out: Folder, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Folder:
    """Copy a folder with other fields or tensors, and with the right hashes."""
    out.mkdir()
    (out / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    data, tensors = json.loads((folder / ELASTIC).read_text()), safetensors.torch.load_file(folder / CORRECTIONS)
    change(data, tensors)
    safetensors.torch.save_file(tensors, out / CORRECTIONS)
    data["files"] = {name: sha256(out / name) for name in (WEIGHTS, CORRECTIONS)}
    (out / ELASTIC).write_text(json.dumps(data))
    return out


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(data: Any, tensors: dict[str, Tensor]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def put_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def tamper(data: Any, tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return tamper


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value="other"), "not an elastic network"),
        (put("version", value=2), "version 2"),
        (put("more", value=2), "'more'"),
        (put("compressor", value="Magnitude"), r"elastic.compressor should be one of"),
        (put("options", "mode", value="mask"), "options.mode"),
        (put("options", "allocation", value="best"), "options: unknown allocation"),
        (put("options", "banana", value=1), "options: unknown option"),
        (put("parameters", value=7), "another model"),
        (put("applied", "stem.0.weight", value="x"), "applied"),
        (put("refused", value=[1]), "refused"),
        (put("groups", value=3), "elastic.groups should be a list"),
        (put("groups", 0, value=3), r"groups\[0\] should be a mapping"),
        (put("groups", 0, "order", 0, value=1000), r"groups\[0\].order"),
        (put("groups", 0, "channels", value=10**9), r"groups\[0\]"),
        (put("groups", 0, "producers", value=[]), "producers should not be empty"),
        (put("groups", 0, "producers", 0, "module", value="nowhere"), "another model: it has no layer 'nowhere'"),
        (put("groups", 0, "producers", 0, "axis", value="up"), "'up'"),
        (put("groups", 0, "producers", 0, "first", value=9), r"producers\[0\] should hold"),
        (put("groups", 0, "producers", 0, "width", value=0), r"producers\[0\] should hold"),
        (put("steps", 0, value=[0, -1]), r"steps\[0\] should remove"),
        (put("steps", 0, value=[99, 1]), r"steps\[0\] should remove"),
        (put("steps", 0, value="x"), r"steps\[0\] should be"),
        (put("starts", value=10**6), "starts should be at most"),
        (put("weights", 0, value="nowhere"), "no weight 'nowhere'"),
        (put("weights", 0, value="stem.1.weight"), "no weight"),
        (put("vectors", 0, value="stem.1.num_batches_tracked"), "no vector"),
        (put("points", value=[]), "points should hold steps"),
        (put("points", 0, "step", value=10**6), "points should hold steps"),
        (put("points", -1, "step", value=10**6), "has a step 1000000"),
        (put("points", -1, "bits", value=5), "bits should be"),
        (put("points", -1, "errors", value={}), r"errors has no field 'cut'"),
        (put("example", value=[["", [10**9, 10**9], "float32"]]), "elastic.example"),
        (put("example", value=4), "elastic.example"),
        (put("macs", value=0), "elastic.macs should be at least 1"),
        (put("batch", value=0), "elastic.batch should be at least 1"),
        (put("samples", value=-4), "elastic.samples should be a count"),
        (put_tensor("0.vectors", lambda x: x[:-1]), "0.vectors should have"),
        (put_tensor("0.vectors", lambda x: x.double()), "no 0.vectors of type float32"),
        (put_tensor("0.vectors", lambda x: x * torch.nan), "0.vectors holds NaN"),
        (put_tensor("1.codes", lambda x: x[:-1]), "1.codes should have"),
        (put_tensor("1.steps", lambda x: x.view(1, -1)), "1.steps should have"),
    ],
)
def test_tampered_folders_are_one_line(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str, folder: Folder, tmp_path: Folder
) -> None:
    out = tampered(folder, tmp_path / "out", change)
    with pytest.raises((DamagedFile, BadInput), match=message) as caught:
        pliant.rebuild(Block(), out, keep_params=0.5)
    assert len(str(caught.value).splitlines()) == 1
    assert ELASTIC in str(caught.value)


def test_an_untouched_copy_is_fine(folder: Folder, tmp_path: Folder) -> None:
    out = tampered(folder, tmp_path / "out", lambda data, tensors: None)
    pliant.rebuild(Block(), out, keep_params=0.5)


@pytest.mark.parametrize("name", [WEIGHTS, CORRECTIONS, ELASTIC])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damaged_files_are_one_line(name: str, damage: str, folder: Folder, tmp_path: Folder) -> None:
    out = tampered(folder, tmp_path / "out", lambda data, tensors: None)
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1 if name != ELASTIC else 0x80
    (out / name).write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(damage, bytes(content)))
    if damage == "missing":
        (out / name).unlink()
    with pytest.raises(PliantError) as caught:
        pliant.rebuild(Block(), out, keep_params=0.5)
    assert isinstance(caught.value, BadInput if (name, damage) == (ELASTIC, "missing") else DamagedFile)
    assert len(str(caught.value).splitlines()) == 1


def test_another_model(folder: Folder) -> None:
    with pytest.raises(BadInput, match="for another model"):
        pliant.rebuild(nn.Linear(3, 4), folder, keep_params=0.5)


def test_weights_of_another_training_are_noticed(folder: Folder, tmp_path: Folder) -> None:
    out = tampered(folder, tmp_path / "out", lambda data, tensors: None)
    safetensors.torch.save_file(made(Block, X, seed=3).state_dict(), out / WEIGHTS)
    with pytest.raises(DamagedFile, match="does not belong to the elastic"):
        pliant.rebuild(Block(), out, keep_params=0.5)
