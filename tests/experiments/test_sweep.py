"""From a trained run to records and to a compressed folder, on small networks and the embedded digits."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pliant
from pliant import measuring
from pliant.compression import FilterPruning, masked_twin
from pliant.compression.refit import Refitter
from pliant.compressor_names import ALONE
from pliant.errors import BadInput, DamagedFile, Refused
from pliant.experiments.compress import compress_run
from pliant.experiments.export import export_run
from pliant.experiments.run_folder import Run
from pliant.experiments.sweep import parse_ratios, sweep
from pliant.experiments.train import train
from pliant.experiments.workbench import Workbench
from pliant.records import read_records

EVERY = [*(name for name in ALONE if name != "heads"), "filters+rank", "rank+int8"]  # LeNet has no heads


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lenet"
    return train(model="lenet5", epochs=20, batch_size=64, precision="fp32", out=str(folder))


@pytest.mark.parametrize("compressor", EVERY)
def test_sweep_writes_true_records(compressor: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "records.jsonl"
    ratios = None if compressor == "nm" else "0,0.5"
    sweep(str(run), compressor, ratios=ratios, calibration=256, out=str(out))
    dense, half = read_records(out)
    assert (dense.run, dense.method, dense.model, dense.data, dense.seed) == ("lenet", "sgd", "lenet5", "digits", 0)
    variant = "" if compressor.startswith("rank") else "-loss"
    variant += "-whitened-spatial-refit" if "rank" in compressor else "-refit"
    assert dense.compressor == half.compressor == compressor + variant
    assert dense.ratio == dense.ratio_removed == 0
    assert dense.params == dense.params_dense == measuring.parameters(pliant.load(run))
    assert dense.bytes_dense == (run / "model.safetensors").stat().st_size
    if "int8" not in compressor:
        assert dense.top1_raw == dense.top1_dense > 0.8
        assert dense.bytes == dense.bytes_dense
    assert half.ratio_removed == pytest.approx(0.5, abs=0.02)
    assert half.nonzero < 0.65 * half.nonzero_dense  # type: ignore[operator]
    if "filters" in compressor or "rank" in compressor:
        assert half.params < half.params_dense
        assert half.macs < half.macs_dense
        assert half.bytes < half.bytes_dense
    else:
        assert (half.params, half.macs) == (half.params_dense, half.macs_dense)
    assert half.pattern == ("2:4" if compressor == "nm" else "")
    assert half.allocation == ("" if compressor == "nm" else "global")
    assert half.refit is not None
    assert (half.refit["samples"], half.refit["result"]) in [(256, result) for result in half.refit["errors"]]
    assert min(half.refit["errors"].values()) == half.refit["errors"][half.refit["result"]]
    assert half.refit["seconds"]["refitting"] > 0
    final = {"cut": "top1_raw", "reestimated": "top1_reestimated"}.get(half.refit["result"], "top1")
    assert half.top1 == getattr(half, final)
    assert half.val_top1_reestimated is not None
    assert half.config["epochs"] == 20
    assert {"pliant", "torch", "python"} <= set(half.versions)
    assert half.layers


def test_a_stopped_sweep_goes_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    sweep([run], "weights", ratios=[0, 0.5], calibration=256, out=str(out))
    before = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"run": "killed in the mid')
    sweep([run], "weights", ratios=[0, 0.5, 0.9], calibration=256, out=str(out))
    assert out.read_bytes().startswith(before)
    assert [record.ratio for record in read_records(out)] == [0, 0.5, 0.9]
    assert "2 records exist already" in capsys.readouterr().err
    sweep([run], "weights", ratios=[0], allocation="uniform", calibration=256, out=str(out))
    assert len(read_records(out)) == 4  # another allocation is another measurement


def test_other_settings_are_another_measurement(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    settings: list[dict[str, Any]] = [
        {"calibration": 64},
        {"calibration": 32},
        {"calibration": 64, "precision": "bf16"},
        {"calibration": 64, "whiten": False},
        {"calibration": 64, "allocation": "energy"},
    ]
    for _ in range(2):
        for options in settings:
            sweep([run], "rank", ratios=[0.5], out=str(out), **options)
    records = read_records(out)
    assert len(records) == len(settings) == capsys.readouterr().err.count("1 records exist already")
    names = ["rank-whitened-spatial-refit"] * 3 + ["rank-spatial-refit", "rank-whitened-spatial-refit"]
    assert [r.compressor for r in records] == names
    assert [r.config["calibration"] for r in records] == [64, 32, 64, 64, 64]
    assert records[2].config["evaluation_precision"] == "bf16"
    for whiten in (True, False):
        _, plan, _ = Workbench(Run.open(run), "rank", whiten=whiten, calibration=64).measure(0.5)
        assert plan.options["whiten"] is whiten


def test_a_scheme_is_another_measurement_with_a_name_of_its_own(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    for scheme, whiten in (("channel", False), ("spatial", False), ("best", False), ("spatial", True)):
        sweep([run], "rank", ratios=[0.5], calibration=64, whiten=whiten, scheme=scheme, refit=False, out=str(out))
    records = read_records(out)
    assert [r.compressor for r in records] == ["rank", "rank-spatial", "rank-best", "rank-whitened-spatial"]
    assert len({r.key() for r in records}) == 4
    layers = [{layer["name"]: (layer["kept"], layer["total"]) for layer in r.layers} for r in records]
    assert layers[0] != layers[1]  # the ranks that fit differ with the shapes of the factors
    options: dict[str, Any] = {"importance": "l2", "refit": False}
    bench = Workbench(Run.open(run), "filters+rank", whiten=False, scheme="spatial", **options)
    assert bench.name == "filters+rank-spatial"


def test_a_choice_and_a_refit_are_other_measurements_with_names_of_their_own(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    every: list[dict[str, Any]] = [
        {},
        {"refit": False},
        {"importance": "l2"},
        {"importance": "l1", "refit": False},
        {"importance": "l2", "refit": False},
    ]
    for options in every:
        sweep([run], "filters", ratios=[0.7], calibration=256, out=str(out), **options)
    sweep([run], "filters", ratios=[0.7], calibration=256, importance="loss", out=str(out))  # is what auto means here
    records = {record.compressor: record for record in read_records(out)}
    assert list(records) == ["filters-loss-refit", "filters-loss", "filters-refit", "filters-l1", "filters"]
    assert len(read_records(out)) == len(records) == len({record.key() for record in records.values()})
    assert records["filters-loss"].refit is None
    assert records["filters-loss"].top1 == records["filters-loss"].top1_reestimated
    kept = {name: [layer["kept"] for layer in record.layers] for name, record in records.items()}
    assert kept["filters-refit"] == kept["filters"] != kept["filters-loss"]
    assert records["filters"].top1_raw == records["filters-refit"].top1_raw
    # What it is for, on a network that has no filters to spare.
    assert records["filters-loss-refit"].val_top1 > records["filters"].val_top1


def test_the_dense_network_is_run_once_for_all_sizes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(Run.open(run), "filters", calibration=256)
    looked: list[int] = []
    original = FilterPruning.analyse

    def counted(self: FilterPruning, *rest: Any) -> Any:
        looked.append(1)
        return original(self, *rest)

    monkeypatch.setattr(FilterPruning, "analyse", counted)
    first = bench.measure(0.3)[1]
    seen = bench._refitter.reference._seen
    assert bench.measure(0.6)[1].refit is not None is not first.refit
    assert bench._refitter.reference._seen is seen
    assert len(looked) == 1


def test_validation_and_measurement_are_of_the_same_network(run: Path) -> None:
    bench = Workbench(Run.open(run), "filters", calibration=256)
    small, _, record = bench.measure(0.6)
    share, accuracy = bench.validate(0.6)
    assert accuracy == record.val_top1
    assert 1 - share == pytest.approx(measuring.parameters(small) / record.params_dense)


def test_a_network_that_is_trained_again_is_not_refitted(run: Path) -> None:
    bench = Workbench(Run.open(run), "filters", calibration=256)
    _, plan, record = bench.measure(0.6, refine=lambda network, _: network)
    assert plan.refit is record.refit is None
    assert record.top1 == record.top1_reestimated
    # Nor is it chosen by images: the references stay what they were.
    by_norms = Workbench(Run.open(run), "filters", calibration=256, importance="l2").measure(0.6)[1]
    assert plan.layers == by_norms.layers != bench.measure(0.6)[1].layers


def test_statistics_that_lag_behind_are_not_brought_back(run: Path, tmp_path: Path) -> None:
    """A faithful refit to a network with such statistics would give its accuracy, that of guessing."""
    stale = tmp_path / "stale"
    shutil.copytree(run, stale)
    state = load_file(stale / "model.safetensors")
    norms = [name for name in state if name.endswith("running_mean")]
    save_file({name: x + 5 if name in norms else x for name, x in state.items()}, stale / "model.safetensors")
    _, _, record = Workbench(Run.open(stale), "filters", calibration=256).measure(0.5)
    assert norms
    assert record.top1_dense < 0.5 < 0.85 < record.top1


def test_a_line_says_what_the_refit_gave(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "records.jsonl")
    sweep([run], "filters", ratios=[0.5], calibration=256, out=out)
    assert re.search(
        r"filters-loss-refit ratio 0.5  top1 .* \(re-estimated .*%, raw .*%, dense", capsys.readouterr().err
    )
    sweep([run], "filters", ratios=[0.5], calibration=256, refit=False, out=out)
    assert "re-estimated" not in capsys.readouterr().err


def test_the_artefact_of_a_refit_needs_no_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compress_run(run, "filters+rank", ratio=0.5, calibration=256, out=str(tmp_path / "small"))
    assert "refit on 256 samples" in capsys.readouterr().out
    plan = pliant.Plan.from_dict(json.loads((out / "plan.json").read_text()))
    assert plan.refit is not None
    x = torch.randn(4, 1, 8, 8)
    expected = pliant.load(out)(x)
    dense = Run.open(run).load()
    torch.testing.assert_close(pliant.rebuild(dense, out).eval()(x), expected)
    exported = export_run(str(out), formats="safetensors", out=str(tmp_path / "exported"))
    torch.testing.assert_close(pliant.rebuild(dense, exported).eval()(x), expected)
    if plan.refit.result != "cut":
        with pytest.raises(BadInput, match="refitted on calibration data"):
            pliant.replay(dense, plan)


def test_spatial_factors_are_written_and_read_again(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "spatial", "allocation": "uniform", "calibration": 64}
    small = pliant.load(compress_run(run, "rank", out=str(tmp_path / "small"), **options))
    kernels = {m.kernel_size for m in small.modules() if isinstance(m, nn.Conv2d)}
    assert {(5, 1), (1, 5)} <= kernels
    record = json.loads((tmp_path / "small" / "record.json").read_text())
    assert (record["compressor"], record["params"]) == ("rank-whitened-spatial-refit", measuring.parameters(small))


@pytest.mark.parametrize(
    ("budget", "share"),
    [
        ({"keep_params": 0.3}, lambda r: r["params"] / r["params_dense"] / 0.3),
        ({"keep_macs": 0.4}, lambda r: r["macs"] / r["macs_dense"] / 0.4),
        ({"max_bytes": 60_000}, lambda r: r["bytes"] / 60_000),
        ({"max_drop": 0.05}, lambda r: (r["val_top1_dense"] - r["val_top1"]) / 0.05),
    ],
)
@pytest.mark.parametrize("compressor", ["filters", "rank"])
def test_a_run_is_compressed_to_a_budget(
    compressor: str, budget: dict[str, Any], share: Any, run: Path, tmp_path: Path
) -> None:
    out = compress_run(run, compressor, calibration=128, out=str(tmp_path / "small"), **budget)
    record = json.loads((out / "record.json").read_text())
    bench = Workbench(Run.open(run), compressor, calibration=128)
    assert share(record | {"val_top1_dense": bench._accuracy(bench.dense, "val")}) <= 1
    assert 0 < record["ratio"] < 1
    ((kind, limit),) = budget.items()
    assert record["config"]["budget"] == f"{kind}={limit}"
    assert measuring.parameters(pliant.load(out)) == record["params"] < record["params_dense"]
    if kind != "max_drop":
        assert share(record) > 0.8  # one channel of this small network is much


@pytest.mark.parametrize("refit", [True, False])
def test_a_chain_that_looks_at_data_is_compressed_to_bytes(refit: bool, run: Path, tmp_path: Path) -> None:
    """The plan that is best is not the last that was tried, for which later links have their analyses."""
    limit = 25_000
    out = compress_run(
        run, "filters+rank+int8", max_bytes=limit, calibration=256, refit=refit, out=str(tmp_path / "small")
    )
    assert 0.5 * limit < (out / "model.safetensors").stat().st_size <= limit


@pytest.fixture
def _not_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the refit to all images, which names of folders do not depend on."""
    monkeypatch.setattr(Refitter, "apply", lambda self, compressor, plan, analysis, small: (small, plan))


@pytest.mark.usefixtures("_not_refitted")
def test_default_folder_is_named_after_the_size(run: Path) -> None:
    for options, name in (
        ({"compressor": "rank", "keep_macs": 0.9}, "lenet-rank-keep_macs0.9"),
        ({"compressor": "nm", "allocation": "uniform"}, "lenet-nm-2of4"),
        ({"compressor": "rank+int8"}, "lenet-rank+int8-0.5"),
        ({"compressor": "filters", "whiten": False}, "lenet-filters-0.5"),
    ):
        out = compress_run(run, **options)
        assert out == run.resolve().with_name(name)


@pytest.mark.usefixtures("_not_refitted")
def test_default_folder_tells_apart_all_options_that_make_another_network(run: Path) -> None:
    for options, name in (
        ({}, "lenet-rank-0.25"),
        ({"whiten": False}, "lenet-rank-plain-0.25"),
        ({"scheme": "best"}, "lenet-rank-best-0.25"),
        ({"whiten": False, "scheme": "channel", "allocation": "energy"}, "lenet-rank-plain-channel-energy-0.25"),
        ({"calibration": 64, "scheme": "spatial"}, "lenet-rank-calibration64-0.25"),
        ({"allocation": "uniform"}, "lenet-rank-uniform-0.25"),
        ({"calibration": 128}, "lenet-rank-calibration128-0.25"),
        ({"refit": False}, "lenet-rank-cut-0.25"),
    ):
        assert compress_run(run, "rank", 0.25, **options) == run.resolve().with_name(name)
    for options, name in (
        ({}, "lenet-filters-0.25"),
        ({"importance": "l2"}, "lenet-filters-l2-0.25"),
        ({"importance": "l1", "refit": False}, "lenet-filters-l1-cut-0.25"),
    ):
        assert compress_run(run, "filters", 0.25, **options) == run.resolve().with_name(name)
    out = compress_run(run, max_drop=0.5, precision="fp32")
    assert out == run.resolve().with_name("lenet-filters-fp32-max_drop0.5")
    with pytest.raises(BadInput, match=r"lenet-rank-plain-0\.25 exists"):
        compress_run(run, "rank", 0.25, whiten=False, precision="fp32")  # the same network, measured in another way


def test_permissions_follow_the_umask(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = compress_run(run, "weights", calibration=256, out=str(tmp_path / "small"))
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.name != "shape.json"} == {0o640}


@pytest.mark.parametrize("verb", [lambda run, out: sweep([run], out=out), lambda run, out: compress_run(run, out=out)])
def test_a_place_that_cannot_be_written_to_is_noticed_before_measuring(
    verb: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(Workbench, "measure", lambda *_: pytest.fail("measured first"))
    with pytest.raises(OSError, match="file"):
        verb(run, str(tmp_path / "file" / "out"))


def test_compressing_leaves_the_run_as_it_was(run: Path) -> None:
    bench = Workbench(Run.open(run), "rank", calibration=64)
    before = {name: tensor.clone() for name, tensor in bench.dense.state_dict().items()}
    bench.measure(0.7)
    torch.testing.assert_close(bench.dense.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("compressor", EVERY)
def test_compressed_folder_is_loaded_again(compressor: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    compress_run(run, compressor, ratio=None if compressor == "nm" else 0.6, calibration=256, out=str(out))
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "shape.json",
        "model.safetensors",
        "plan.json",
        "record.json",
    }
    small, record = pliant.load(out), json.loads((out / "record.json").read_text())
    assert measuring.parameters(small) == record["params"]
    assert (out / "model.safetensors").stat().st_size == record["bytes"]
    bench = Workbench(Run.open(run), compressor, calibration=256)
    assert bench._accuracy(small, "test") == record["top1"]
    with pytest.raises(BadInput, match="exists"):
        compress_run(run, compressor, out=str(out))


def test_removed_filters_equal_their_masked_twin(run: Path, tmp_path: Path) -> None:
    out = compress_run(run, "filters", ratio=0.6, calibration=256, refit=False, out=str(tmp_path / "small"))
    dense = Run.open(run).load()
    plan = pliant.Plan.from_dict(json.loads((out / "plan.json").read_text()))
    small, twin = pliant.replay(dense, plan).eval(), masked_twin(dense, plan).eval()
    x = torch.randn(16, 1, 8, 8)
    torch.testing.assert_close(small(x), twin(x), atol=1e-5, rtol=1e-5)
    assert (out / "model.safetensors").stat().st_size < (run / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"plan.json": b"{"}, "plan.json is damaged"),
        ({"plan.json": b"[]"}, "plan.json: not a compression plan"),
        ({"model.safetensors": b"\0" * 9}, "model.safetensors is damaged"),
    ],
)
def test_damaged_artefacts(damage: dict[str, bytes], message: str, run: Path, tmp_path: Path) -> None:
    out = compress_run(run, "rank", ratio=0.5, calibration=2, out=str(tmp_path / "small"))
    for name, content in damage.items():
        (out / name).write_bytes(content)
    with pytest.raises(DamagedFile, match=message):
        pliant.load(out)


def test_controls_reach_the_links_that_have_them_and_their_records(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    for controls in ({}, {"at_least": 1}, {"at_least": 0.3}, {"multiple_of": 2}, {"at_least": 0.3, "at_most": 1.0}):
        sweep([run], "filters+int8", ratios=[0.9], calibration=256, out=str(out), **controls)  # type: ignore[arg-type]
    records = read_records(out)
    assert [r.compressor for r in records] == [
        "filters+int8-loss-refit",
        *(f"filters+int8-loss-{word}-refit" for word in ("at_least=1", "at_least=0.3", "multiple_of=2")),
    ]
    assert len({r.key() for r in records}) == 4
    assert records[2].params > records[0].params
    least = [min(layer["kept"] / layer["total"] for layer in r.layers) for r in records]
    assert least[2] >= 0.3
    bench = Workbench(Run.open(run), "filters+int8", calibration=256, controls={"at_least": 0.3})
    assert bench.key(0.9) == records[2].key()


def test_a_run_with_other_weights_is_another_run(run: Path, tmp_path: Path) -> None:
    ours, theirs = Workbench(Run.open(run), "rank"), Workbench(Run.open(run), "rank")
    assert ours.key(0.5) == theirs.key(0.5)
    other = train(model="lenet5", epochs=1, out=str(tmp_path / "lenet"))
    assert Workbench(Run.open(other), "rank").key(0.5) != ours.key(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressor": "filter"}, "did you mean 'filters'"),
        ({"allocation": "globl"}, "did you mean 'global'"),
        ({"ratios": "0,1"}, "0 <= ratio < 1"),
        ({"ratios": "-0.1"}, "0 <= ratio < 1"),
        ({"ratios": "nan"}, "0 <= ratio < 1"),
        ({"ratios": "a"}, "separated by commas"),
        ({"ratios": []}, "at least one of the ratios"),
        ({"compressor": "nm", "pattern": "4:2"}, "N:M"),
        ({"compressor": "nm", "pattern": "2:4,4:4"}, "1 <= n < m"),
        ({"compressor": "filters+rnk"}, "compressor in a chain 'rnk': did you mean 'rank'"),
        ({"compressor": "int8+rank"}, "int8 is the last compressor"),
        ({"compressor": "int8"}, "unknown compressor 'int8'"),
        ({"calibration": 1}, "--calibration"),
        ({"runs": []}, "at least one run"),
        ({"precision": "fp8"}, "precision"),
        ({"compressor": "rank", "scheme": "spatially", "whiten": False}, "scheme 'spatially': did you mean 'spatial'"),
        ({"compressor": "filters", "scheme": "best"}, "--scheme best is for the compressor rank; filters has"),
        ({"compressor": "nm", "scheme": "channel"}, "--scheme channel is for the compressor rank; nm has"),
        ({"importance": "l3"}, "--importance 'l3': filters does not take it"),
        ({"compressor": "rank", "importance": "l2"}, "--importance 'l2': rank has no importance to choose"),
    ],
)
def test_bad_sweeps(options: dict[str, Any], message: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with pytest.raises(BadInput, match=message):
        sweep(**{"runs": [run], "out": str(out)} | options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "keep_params": 0.5}, "--ratio and --keep_params exclude each other"),
        ({"keep_macs": 0.5, "keep_params": 0.5}, "expected one budget"),
        ({"keep_macs": 0.5, "compressor": "nm"}, "a pattern and --keep_macs"),
        ({"keep_macs": 2}, "keep_macs <= 1"),
        ({"compressor": "nm", "pattern": "4:4"}, "1 <= n < m"),
        ({"compressor": "rank", "keep_params": 0.001}, "keep_params=0.001 is out of reach: the least that LowRank"),
    ],
)
def test_bad_compressions(options: dict[str, Any], message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises((BadInput, Refused), match=message):
        compress_run(run, calibration=2, **options, out=str(tmp_path / "small"))
    assert not list(tmp_path.iterdir())


def test_ratios_may_be_text_or_numbers() -> None:
    assert parse_ratios("0,0.5,0.5,.9") == parse_ratios([0, 0.5, 0.9]) == [0, 0.5, 0.9]


def test_the_users_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes, image_shape):\n"
        "    c = image_shape[0]\n"
        "    return nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(8 * 36, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    own = train(model="their_nets:tiny", method="sfw-filters", epochs=1)
    out = sweep([own], "filters", ratios="0.5", calibration=512)
    (record,) = read_records(out)
    assert own == Path("runs/digits-their_nets-tiny-sfw-filters-seed0")
    assert record.params < record.params_dense
    assert isinstance(pliant.load(own), nn.Sequential)
