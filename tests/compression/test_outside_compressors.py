"""Compressors of other packages: offered by an entry point, or named as package.module:name."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pliant
from pliant.cli import main
from pliant.compression import Chain, Compressor, Plan, replay
from pliant.compression.base import plan_names
from pliant.compression.by_name import allocation_of, check_names, class_named, row_of
from pliant.compressor_names import TITLE, record_name
from pliant.errors import BadInput
from pliant.experiments.comparison.suite import Suite
from pliant.experiments.compress import compress_run
from pliant.experiments.run_folder import Run
from pliant.experiments.sweep import sweep
from pliant.experiments.train import train
from pliant.experiments.workbench import Workbench
from pliant.records import read_records
from pliant.reporting.page import render
from tests.test_extensions import install

CODE = '''
"""Whole kernels of convolutions set to zero, and whatever Magnitude does under another name."""

from dataclasses import dataclass

from torch import nn

from pliant.compression import Compressor, Magnitude, Weights, check_ratio, largest, parameter_shapes, weight_plan
from pliant.compression import weight_shape


@dataclass(frozen=True)
class Kernels(Compressor[Weights]):
    ratio: float = 0.5

    unit = "kernels' weights"
    title = "Kernels zeroed"

    def __post_init__(self):
        check_ratio(self.ratio)

    def analyse(self, model, example_inputs, calibration=None):
        LOOKED_AT.append(0 if calibration is None else sum(len(images) for images, _ in calibration))
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        return Weights(parameter_shapes(model), (), tuple(layers))

    def plan_with(self, model, analysis):
        kept = []
        for name in analysis.layers:
            filters, inputs, height, width = weight_shape(model.get_submodule(name))
            kept.append((filters * inputs - round(self.ratio * filters * inputs)) * height * width)
        return weight_plan(self, model, analysis, self.ratio, kept)

    def carry_out(self, model, plan, analysis):
        for layer in plan.layers:
            kernels = model.get_submodule(layer.name).weight.detach().flatten(2)
            stays = largest(kernels.norm(dim=2).flatten(), layer.kept // kernels.shape[2]).view(kernels.shape[:2])
            kernels.mul_(stays[:, :, None])
        return model


@dataclass(frozen=True)
class Entries(Magnitude):
    """Has an allocation and no title."""


@dataclass(frozen=True)
class Fixed(Magnitude):
    """Is not offered."""


LOOKED_AT = []
'''
OFFERS = {"kernels": "outside_kernels:Kernels", "entries": "outside_kernels:Entries"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lenet"
    return train(model="lenet5", epochs=10, batch_size=64, precision="fp32", out=str(folder))


def fresh_modules(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that offers two compressors, and its folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, "outside_kernels", OFFERS, CODE, "pliant.compressors")
    monkeypatch.syspath_prepend(folder)
    fresh_modules(monkeypatch, "outside_kernels")
    return folder


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as a module in the current directory, not installed."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "outside_kernels.py").write_text(CODE, encoding="utf-8")
    monkeypatch.chdir(folder)
    fresh_modules(monkeypatch, "outside_kernels")
    return folder


def zero_kernels(network: nn.Module) -> float:
    kernels = [m.weight.flatten(2).norm(dim=2).flatten() for m in network.modules() if isinstance(m, nn.Conv2d)]
    return float((torch.cat(kernels) == 0).double().mean())


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process that finds packages in these folders."""
    source = str(Path(pliant.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, *map(str, path)])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --- what is known of it -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_a_row_is_made_from_the_class() -> None:
    row = row_of("kernels")
    assert (row.unit, row.removed, row.takes) == ("kernels' weights", "Kernels zeroed", "ratio")
    assert (row_of("entries").unit, row_of("entries").removed) == ("weights", "")
    assert record_name("filters+kernels", whiten=True) == "filters+kernels"
    assert (allocation_of("kernels", "energy"), allocation_of("kernels+filters", "energy")) == ("", "energy")


@pytest.mark.usefixtures("installed")
def test_plans_call_it_as_the_package_offers_it() -> None:
    assert plan_names(class_named("kernels")) == ["kernels", "outside_kernels:Kernels"]
    assert plan_names(class_named("outside_kernels:Fixed")) == ["outside_kernels:Fixed"]


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_tells_those_of_packages_too() -> None:
    with pytest.raises(BadInput, match=r"^unknown compressor 'kernel': did you mean 'kernels'\? .*nm, rank, weights$"):
        check_names("kernel", "global")
    with pytest.raises(BadInput, match=r"^unknown compressor in a chain 'kernel': did you mean 'kernels'\?"):
        check_names("filters+kernel", "global")


@pytest.mark.usefixtures("installed")
def test_it_works_in_python_as_ours_do() -> None:
    torch.manual_seed(0)
    network = pliant.build_model("resnet8", num_classes=5, image_shape=(1, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 8)
    kernels: Any = class_named("kernels")
    small = pliant.compress(network, kernels(ratio=0.5), x)
    assert zero_kernels(small) == pytest.approx(0.5, abs=0.01)
    chain = Chain(pliant.FilterPruning(0.3), kernels(0.5))
    plan = Plan.from_dict(json.loads(json.dumps(chain.plan(network, x).to_dict())))
    assert [step.compressor for step in plan.links] == ["FilterPruning", "kernels"]
    assert zero_kernels(replay(network, plan)) == zero_kernels(chain.apply(network, plan)) > 0.4
    with pytest.raises(BadInput, match="this is a chain of"):
        Chain(kernels(), pliant.FilterPruning()).apply(network, plan)


# --- from the shell ------------------------------------------------------------------------------------------------


def test_a_sweep_by_its_name_and_the_report(installed: Path, run: Path, tmp_path: Path) -> None:
    out, kernels = tmp_path / "records.jsonl", ["--compressor", "kernels", "--ratios", "0,0.5"]
    for _ in range(2):
        assert main(["sweep", str(run), *kernels, "--calibration", "128", "--out", str(out)]) == 0
    dense, half = read_records(out)
    assert (half.compressor, half.allocation, half.ratio) == ("kernels-refit", "", 0.5)
    assert dense.nonzero == dense.nonzero_dense > half.nonzero
    assert {layer["kind"] for layer in half.layers} == {"kernels' weights"}
    looked_at = sys.modules["outside_kernels"].LOOKED_AT
    assert looked_at == [128]
    # The report needs neither the package nor torch.
    report = f"from pliant.reporting.page import report; import sys; report({str(out)!r}, {str(tmp_path / 'r.html')!r})"
    assert python(report + "; sys.exit('torch' in sys.modules)").returncode == 0
    assert "Kernels zeroed" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_report_without_a_title_has_the_name(installed: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    sweep(run, "entries", [0, 0.5], allocation="uniform", calibration=128, out=str(out))
    records = read_records(out)
    assert {record.allocation for record in records} == {"uniform"}
    assert all(TITLE not in record.extra for record in records)
    assert "entries, zeroed" in render(records)


@pytest.mark.slow
def test_a_compressed_folder_is_read_in_another_process(installed: Path, run: Path, tmp_path: Path) -> None:
    folders = [
        str(compress_run(run, name, ratio=0.6, calibration=128, out=str(tmp_path / name)))
        for name in ("kernels", "filters+kernels+int8")
    ]
    load = f"""
import pliant
for folder in {folders}:
    try:
        print(sum(p.count_nonzero() for p in pliant.load(folder).parameters()).item())
    except pliant.BadInput as error:
        print(error)
"""
    done = python(load, installed)
    assert done.returncode == 0, done.stderr
    expected = [sum(int(p.count_nonzero()) for p in pliant.load(folder).parameters()) for folder in folders]
    assert done.stdout.splitlines() == [str(count) for count in expected]
    missing = python(load)
    assert len(missing.stdout.splitlines()) == len(folders), missing.stderr
    for line in missing.stdout.splitlines():
        assert line.endswith("one of another package needs that package to be installed")
        assert "unknown compressor 'kernels'" in line


def test_a_budget_is_met(installed: Path, run: Path, tmp_path: Path) -> None:
    folder = compress_run(run, "filters+kernels", keep_macs=0.5, calibration=128, out=str(tmp_path / "small"))
    record = json.loads((folder / "record.json").read_text())
    assert 0.4 < record["macs"] / record["macs_dense"] <= 0.5


@pytest.mark.slow
def test_a_module_beside_is_named_with_a_colon(beside: Path, run: Path, tmp_path: Path) -> None:
    name, out = "outside_kernels:Kernels", tmp_path / "records.jsonl"
    few = ["--calibration", "128"]
    assert main(["sweep", str(run), "--compressor", name, "--ratios", "0,0.5", "--out", str(out), *few]) == 0
    assert [record.compressor for record in read_records(out)] == [f"{name}-refit"] * 2
    assert main(["compress", str(run), "--compressor", f"filters+{name}", "--ratio", "0.5", *few]) == 0
    folder = run.with_name("lenet-filters+outside_kernels.Kernels-calibration128-0.5")
    assert zero_kernels(pliant.load(folder)) > 0.2  # its module is imported here
    # A file does not decide what is imported, even where it could be.
    load = f"import sys, pliant; print(pliant.load({str(folder)!r}))"
    missing = python(load, beside)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].endswith(
        "plan.json: the plan needs the compressor 'outside_kernels:Kernels' of another package: install the package, "
        "with an entry point for it in the group pliant.compressors, or in Python import 'outside_kernels' first"
    )
    assert python(f"import outside_kernels; {load}", beside).returncode == 0


@pytest.mark.slow
def test_a_plan_made_before_the_package_was_installed(beside: Path, run: Path, tmp_path: Path) -> None:
    folder = compress_run(run, "outside_kernels:Kernels", ratio=0.5, calibration=128, out=str(tmp_path / "small"))
    site = tmp_path / "site"
    site.mkdir()
    install(site, "outside_kernels", OFFERS, CODE, "pliant.compressors")
    assert python(f"import pliant; pliant.load({str(folder)!r})", site).returncode == 0


def test_a_suite_compares_it(installed: Path, run: Path) -> None:
    content = {
        "families": {"kernels": [{"compressor": "kernels", "ratios": [0, 0.5]}]},
        "methods": {"sgd": {"families": ["kernels"], "trials": [{"lr": 0.1}]}},
    }
    (measure,) = Suite.from_dict("suite", content).families["kernels"]
    _, _, record = Workbench(Run.open(run), measure.compressor, calibration=128).measure(0.5)
    assert measure.key(0.5, "") == (record.compressor, record.allocation, record.ratio, record.pattern)


# --- broken packages -----------------------------------------------------------------------------------------------

HEAD = (
    "from dataclasses import dataclass\nfrom pliant.compression import Magnitude, Compressor\n@dataclass(frozen=True)\n"
)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import nowhere_to_be_found",
            "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("class Broken: pass", "expected a subclass of pliant.compression.Compressor, got the class Broken"),
        ("Broken = 3", "expected a subclass of pliant.compression.Compressor, got a int"),
        (f"{HEAD}class Broken(Compressor): pass", "it cannot be made with its defaults: TypeError: Can't instantiate"),
        (f"{HEAD}class Broken(Magnitude): n: int = None\n", None),
        (
            f"{HEAD}class M(Magnitude): pass\nclass Broken(M): pass",
            "expected a dataclass, whose fields are the options",
        ),
        (f"{HEAD}class Broken(Magnitude): unit = 3", "its unit is expected to be text, got 3"),
        (
            f"{HEAD}class Broken(Magnitude): ratio: float = 2.0",
            "it cannot be made with its defaults: BadInput: ratio is",
        ),
    ],
)
def test_a_broken_package_is_named_with_the_reason(
    code: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "broken_compressors", {"broken": "broken_compressors:Broken"}, code, "pliant.compressors")
    monkeypatch.syspath_prepend(tmp_path)
    fresh_modules(monkeypatch, "broken_compressors")
    if reason is None:
        return check_names("broken", "global")
    assert main(["sweep", str(tmp_path), "--compressor", "broken"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    where = "compressor 'broken' of the package broken_compressors (broken_compressors:Broken)"
    assert line.startswith(f"pliant: error: {where}")
    assert reason in line
    with pytest.raises(BadInput, match="of the package broken_compressors"):
        check_names("filters+broken", "global")
    check_names("filters+rank", "global")  # the others do not suffer
    return None


def test_one_size_only_is_for_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"{HEAD}class Fixed(Compressor): analyse = plan_with = carry_out = lambda self, *_: None"
    install(tmp_path, "one_size", {"fixed": "one_size:Fixed"}, code, "pliant.compressors")
    monkeypatch.syspath_prepend(tmp_path)
    fresh_modules(monkeypatch, "one_size")
    with pytest.raises(
        BadInput, match=r"^fixed has no ratio: it can only be a link of a chain, such as filters\+fixed$"
    ):
        check_names("fixed", "global")
    check_names("filters+fixed", "global")


def test_a_name_with_a_dash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "dashed", {"my-kernels": "dashed:Kernels"}, CODE, "pliant.compressors")
    monkeypatch.syspath_prepend(tmp_path)
    fresh_modules(monkeypatch, "dashed")
    with pytest.raises(BadInput, match=r"^compressor 'my-kernels' of another package: its name must not contain '-'$"):
        check_names("my-kernels", "global")


@pytest.mark.parametrize(
    "name", ["os:system", "pliant.compression:compress", "a:b:c", ":", "nowhere.at.all:X", "x:__doc__"]
)
def test_a_plan_imports_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4))
    plan = pliant.Magnitude(0.5).plan(network, torch.zeros(2, 4)).to_dict() | {"compressor": name}
    before = set(sys.modules)
    with pytest.raises(BadInput, match="the plan needs the compressor"):
        replay(network, Plan.from_dict(plan))
    assert set(sys.modules) == before


def test_only_installed_compressors_are_listed(installed: Path) -> None:
    assert issubclass(class_named("kernels"), Compressor)
    with pytest.raises(BadInput, match="unknown compressor"):
        class_named("fixed")
