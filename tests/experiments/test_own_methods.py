"""Methods of other packages: trained with, helped with, compared, and what is said of broken ones."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import pliant
from pliant.cli import main
from pliant.errors import BadInput, DamagedFile
from pliant.experiments.comparison.joining import join, joined_before, trials_of
from pliant.experiments.comparison.suite import Suite
from pliant.experiments.methods import METHODS, Method, find_method, resolved, settings_from
from pliant.experiments.training.settings import Settings
from tests.test_extensions import install

L1 = '''
from pliant.experiments.baselines import MatrixSGD

class L1(MatrixSGD):
    """Soft threshold on single weights.

    More about it.
    """

    options = {"strength": 1e-4}

    def after(self, w, state, group):
        return w.sign() * (w.abs() - group["lr"] * group["strength"]).clamp_min(0)
'''
NOISY = """
import torch
from pliant.experiments.methods import Method
from pliant.experiments.training.settings import SHARE, Setting

def build(model, settings, images):
    assert 0 <= settings["noise"] < 1 and settings["steps"] >= 0 and isinstance(settings["often"], bool)
    return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings["noise"])

noisy = Method(
    "SGD with other words",
    build,
    lr=0.05,
    own={"noise": Setting(0.5, "share of the noise.", float, SHARE), "steps": 3, "often": False, "strength": 0.25},
    docs={"steps": "how many steps.", "strength": "how strong."},
    cut_by=("weights",),
)
"""
QUICK = {"model": "mlp", "width": 0.05, "epochs": 2, "batch_size": 256, "precision": "fp32"}
FLAGS = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in; modules that lie in it are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def write(name: str, code: str) -> None:
    Path(f"{name}.py").write_text(code, encoding="utf-8")


def config_of(run: Path | str) -> dict[str, Any]:
    return yaml.safe_load(Path(run, "config.yaml").read_text())


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured
    (line,) = captured.err.strip().splitlines()
    return line


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_subclass_of_matrix_sgd_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    write("my_l1", L1)
    assert main(["train", *FLAGS, "--method", "my_l1:L1", "--strength", "0.5"]) == 0
    (run,) = Path("runs").iterdir()
    assert run.name == "digits-mlp-my_l1-L1-seed0"
    assert (config_of(run)["method"], config_of(run)["strength"], config_of(run)["lr"]) == ("my_l1:L1", 0.5, 0.1)
    first, *_ = (p for p in pliant.load(run).parameters() if p.ndim > 1)
    assert (first == 0).float().mean() > 0.5  # what a strong threshold does
    capsys.readouterr()
    text = " ".join(help_of(["train", "--method", "my_l1:L1"], capsys).split("settings of my_l1:L1:")[1].split())
    assert "--strength STRENGTH factor of the penalty" in text
    assert "default: 0.0001" in text
    assert "--k is not a setting of --method my_l1:L1; its own settings: --strength" in fails(
        ["train", *FLAGS, "--method", "my_l1:L1", "--k", "3", "--out", "other"], capsys
    )


def test_a_run_goes_on_with_the_method_and_is_cut_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from pliant.experiments.training.session import Session

    write("my_l1", L1)
    options = {**QUICK, "method": "my_l1:L1", "strength": 0.01}
    whole = pliant.train(**options, out="whole")
    save = Session.save

    def save_then_die(self: Session, path: Path) -> None:
        save(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            pliant.train(**options, out="stopped")
    with pytest.raises(BadInput, match=r"--strength 0\.5 contradicts 0\.01"):
        pliant.train(out="stopped", resume=True, method="my_l1:L1", strength=0.5)
    pliant.train(out="stopped", resume=True)
    assert Path("stopped/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    del sys.modules["my_l1"]
    Path("my_l1.py").unlink()
    records = pliant.sweep(["stopped"], "weights", ratios=[0, 0.5], out="records.jsonl")
    assert [record.method for record in pliant.read_records(records)] == ["my_l1:L1"] * 2
    assert main(["compress", "stopped", "--compressor", "weights", "--out", "small"]) == 0
    with pytest.raises(BadInput, match=r"^stopped/config\.yaml: method 'my_l1:L1': import failed with ModuleNotFound"):
        pliant.train(out="stopped", resume=True)


def test_settings_that_no_other_method_has(capsys: pytest.CaptureFixture[str]) -> None:
    write("my_noisy", NOISY)
    method = ["--method", "my_noisy:noisy"]
    assert main(["train", *FLAGS, *method, "--noise", "0.25", "--often", "true", "--out", "run"]) == 0
    config = config_of("run")
    assert list(config)[-3:] == ["noise", "steps", "often"]  # behind those of all runs
    assert (config["noise"], config["steps"], config["often"], config["strength"]) == (0.25, 3, True, 0.25)
    capsys.readouterr()
    assert main(["train", "--config", "run/config.yaml", "--seed", "1", "--out", "other"]) == 0
    assert config_of("other") == {**config, "seed": 1}
    pliant.train(**QUICK, method="my_noisy:noisy", noise=0.25, often=True, steps=None, out="third")
    assert config_of("third") == config
    capsys.readouterr()
    text = " ".join(help_of(["train", *method], capsys).split())
    assert "--noise NOISE share of the noise. (type: float | null, default: 0.5)" in text
    assert "--steps STEPS how many steps. (type: int | null, default: 3)" in text
    assert "--strength STRENGTH how strong. (type: float | null, default: 0.25)" in text
    for flags, message in (
        ([*method, "--noise", "1.5"], "--noise must lie in [0, 1), got 1.5"),
        ([*method, "--steps", "some"], "--steps expects an integer"),
        (["--noise", "0.1"], "unknown flag --noise"),
        (["--resume", "--out", "run", *method, "--steps", "4"], "--steps 4 contradicts 3"),
    ):
        assert message in fails(["train", *FLAGS[:2], *flags], capsys)
    for given, message in (
        ({"method": "my_noisy:noisy", "noisi": 0.1}, "unknown setting 'noisi': did you mean 'noise'"),
        ({"noise": 0.1}, "unknown setting 'noise'"),
        ({"method": "my_noisy:noisy", "steps": 1.5}, "--steps expects int or null, got 1.5"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            pliant.train(**QUICK, **given, out="fourth")
    assert not Path("fourth").exists()


def test_settings_of_its_own_travel_with_the_settings() -> None:
    write("my_noisy", NOISY)
    settings = resolved(settings_from({"method": "my_noisy:noisy", "noise": 0.125}))
    assert (settings["noise"], settings["steps"], settings["epochs"], settings.lr) == (0.125, 3, 30, 0.05)
    assert resolved(settings) == settings
    assert Settings.from_config(settings.to_config(), find_method("my_noisy:noisy").others) == settings_from(
        settings.to_config()
    )
    assert resolved(settings.by("sgd")) == resolved(Settings())
    with pytest.raises(BadInput, match="--nois is not a setting of --method my_noisy:noisy"):
        resolved(Settings(method="my_noisy:noisy", others={"nois": 3}))
    with pytest.raises(BadInput, match=re.escape("--noise must lie in [0, 1), got 2")):
        resolved(Settings(method="my_noisy:noisy", others={"noise": 2}))


def test_an_installed_package_offers_a_method_by_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(place)
    install(place, "package_of_l1", {"l1": "package_of_l1:L1", "sgd": "package_of_l1:L1"}, L1)
    assert find_method("l1").summary == "Soft threshold on single weights"
    assert find_method("sgd") is METHODS["sgd"]
    assert pliant.train(**QUICK, method="l1", seed=3).name == "digits-mlp-l1-seed3"
    text = help_of(["train"], capsys)
    assert re.search(r"^  l1 +from package_of_l1:L1$", text, re.MULTILINE)
    assert len(re.findall(r"^  sgd ", text, re.MULTILINE)) == 1
    assert "did you mean 'l1'?" in fails(["train", "--method", "l2"], capsys)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("m = 3", "expected a Method or a subclass of MatrixSGD, got 3"),
        (
            "from torch.optim import SGD as m",
            "expected a Method or a subclass of MatrixSGD, got <class 'torch",
        ),
        ("{M}m = Method('m', None)", "build is a callable, got None"),
        ("{M}m = Method('m', print, cut_by='rank')", "cut_by is a tuple, got 'rank'"),
        ("{M}m = Method('m', print, lr=None)", "lr is None, and there is no turnover that it follows from"),
        ("{M}m = Method('m', print, lr=-1.0)", "its default of --lr must be positive and finite, got -1.0"),
        ("{M}m = Method('m', print, own={'epochs': 3})", "'epochs' cannot be a setting of its own"),
        ("{M}m = Method('m', print, own={'out': 3})", "'out' cannot be a setting of its own"),
        ("{M}m = Method('m', print, own={'a b': 3})", "'a b' cannot be a setting of its own"),
        ("{M}m = Method('m', print, own={'beta': None})", "its setting beta has neither a default nor a kind"),
        ("{M}m = Method('m', print, own={'strength': -3.0})", "its default of --strength must be >= 0 and finite"),
        ("{M}m = Method('m', print, own={'strength': 'x'})", "its default of --strength expects float or null"),
        ("{M}m = Method('m', print, own={3: 3})", "3 cannot be a setting of its own"),
        ("{M}m = Method('m', print, own={'beta': [1]})", "its setting beta should be text, a number, true or false"),
        (
            "{M}m = Method('m', print, own={'beta': Setting(1, kind='int')})",
            "its setting beta should be text, a number",
        ),
        ("{M}m = Method('m', print, own={'beta': Setting(1, rule=3)})", "its settings cannot be checked: TypeError"),
        ("{M}m = Method('m', print, passes=3)", "passes is 1 or 2, got 3"),
        ("{M}m = Method('m', print, trials=('lr',))", "trials are settings by name, got ('lr',)"),
        (
            "from pliant.experiments.baselines import MatrixSGD\nclass m(MatrixSGD): options = 3",
            "its options should be",
        ),
    ],
)
@pytest.mark.parametrize("installed", [False, True])
def test_a_broken_method_is_named_and_all_else_works(
    code: str,
    reason: str,
    installed: bool,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = code.replace(
        "{M}",
        "from pliant.experiments.methods import Method\nfrom pliant.experiments.training.settings import Setting\n",
    )
    if installed:
        monkeypatch.syspath_prepend(place)
        install(place, "broken_methods", {"m": "broken_methods:m"}, code)
        name, culprit = "m", "method 'm' of the package broken_methods (broken_methods:m)"
    else:
        write("broken_methods", code)
        name, culprit = "broken_methods:m", "method 'broken_methods:m'"
    before = set(place.iterdir())
    for command in (
        ["train", *FLAGS, "--method", name],
        ["train", "--method", name, "--help"],
        ["compare", "tiny", "--methods", f"sgd,{name}"],
    ):
        line = fails(command, capsys)
        assert culprit in line
        assert reason in line
    assert {path for path in place.iterdir() if path.name != "__pycache__"} == before
    assert "sfw-rank" in help_of(["train"], capsys)
    assert resolved(Settings(method="sfw-rank")).turnover == 4.0
    assert len(Suite.open("tiny").methods) == 25


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("lambda *_: 1 / 0", "its build raised ZeroDivisionError: division by zero"),
        ("lambda *_: exit(3)", "its build raised SystemExit: 3"),
        ("lambda: None", "its build raised TypeError"),
        ("lambda *_: None", "expected a torch.optim.Optimizer from its build, got None"),
    ],
)
def test_a_method_that_builds_no_optimizer_is_named(
    build: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("builds_nothing", f"from pliant.experiments.methods import Method\nm = Method('m', {build})")
    line = fails(["train", *FLAGS, "--method", "builds_nothing:m", "--out", "run"], capsys)
    assert f"method 'builds_nothing:m': {reason}" in line
    assert not Path("run").exists()


def test_turnover_decides_the_steps_of_an_optimizer_of_ones_own() -> None:
    write("my_noisy", NOISY + "turning = Method('t', build, lr=None, own={'turnover': 3.0, **noisy.own})")
    pliant.train(**QUICK, method="my_noisy:turning", out="run")
    assert config_of("run")["lr"] > 0


# --- comparing --------------------------------------------------------------------------------------------------------


CONTENT: dict[str, Any] = {
    "settings": {"data": "digits", "model": "mlp", "width": 0.05, "epochs": 1, "batch_size": 512, "precision": "fp32"},
    "seeds": [0, 1],
    "families": {
        "filters": [{"compressor": "filters", "ratios": [0, 0.5]}],
        "entries": [{"compressor": "weights", "ratios": [0, 0.5]}],
    },
    "methods": {"sgd": {"families": ["filters", "entries"], "trials": [{"lr": 0.1}, {"lr": 0.05}]}},
    "calibration": 128,
}


def suite_file() -> str:
    Path("small.yaml").write_text(yaml.safe_dump(CONTENT), encoding="utf-8")
    return "small.yaml"


def trained(folder: str) -> set[str]:
    return {path.name for path in Path(folder, "runs").iterdir()}


def test_a_method_joins_a_comparison_that_does_not_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write("my_noisy", NOISY)
    suite = suite_file()
    pliant.compare(suite, out="out", methods="sgd,my_noisy:noisy")
    label = "my_noisy:noisy"
    searched = [json.loads(line) for line in Path("out/trials.jsonl").read_text().splitlines()]
    own = [line for line in searched if line["label"] == label]
    assert [(line["family"], line["trial"]) for line in own] == [("entries", {"lr": 0.05}), ("entries", {"lr": 0.025})]
    assert len([line for line in searched if line["label"] == "sgd"]) == 4
    records = pliant.read_records("out/records.jsonl")
    own_records = [record for record in records if record.method == label]
    assert {record.seed for record in own_records} == {0, 1}
    assert {record.compressor for record in own_records} == {"weights-loss-refit"}
    assert all(record.config["noise"] == 0.5 for record in own_records)
    assert label in Path("out/report.md").read_text().replace("\\", "")
    assert {name for name in trained("out") if name.startswith("my_noisy_noisy,lr=")}

    content = yaml.safe_load(Path("out/suite.yaml").read_text())
    assert content["methods"][label] == {"families": ["entries"], "trials": [{"lr": 0.05}, {"lr": 0.025}]}
    assert content["joined"] == [label]
    before = Path("out/records.jsonl").read_bytes()
    for again in (  # it has joined: by whatever name the comparison is called, nothing is made anew, and all reported
        lambda: pliant.compare(suite, out="out"),
        lambda: pliant.compare(suite, out="out", methods="sgd"),
        lambda: pliant.compare(suite, out="out", methods=f"{label},sgd"),
        lambda: pliant.compare("out/suite.yaml", out="out"),
    ):
        Path("out/report.md").unlink()
        again()
        assert Path("out/records.jsonl").read_bytes() == before
        assert label in Path("out/report.md").read_text().replace("\\", "")
        assert yaml.safe_load(Path("out/suite.yaml").read_text()) == content

    del sys.modules["my_noisy"]
    Path("my_noisy.py").unlink()
    with pytest.warns(UserWarning, match="left out of the comparison: method 'my_noisy:noisy': import failed"):
        pliant.compare(suite, out="out")
    assert Path("out/records.jsonl").read_bytes() == before
    assert label not in Path("out/report.md").read_text().replace("\\", "")


def test_a_method_of_ours_joins_too_and_a_rehearsal_tries_it(capsys: pytest.CaptureFixture[str]) -> None:
    suite = suite_file()
    assert pliant.compare(suite, methods="sgd,sfw-weights,muon", dry_run=True) is None
    told = capsys.readouterr().err
    assert "sfw-weights,lr=0.1,seed=0: trained" in told
    assert "muon,lr=0.02,seed=0: trained" in told
    with pytest.raises(BadInput, match="method sfw-rank is made for rank; this suite compresses by weights, filters"):
        pliant.compare(suite, methods="sfw-rank", dry_run=True)
    with pytest.raises(BadInput, match="unknown method of this suite 'sgdd': did you mean 'sgd'"):
        pliant.compare(suite, methods="sgdd", dry_run=True)


def test_suites_name_methods_of_other_packages() -> None:
    write("my_noisy", NOISY)
    entry = {"method": "my_noisy:noisy", "families": ["entries"], "trials": {"noise": [0.1, 0.2]}}
    suite = Suite.from_dict("own", {**CONTENT, "methods": {**CONTENT["methods"], "ours": entry}})
    settings = suite.settings("", suite.methods[1], suite.methods[1].trials[1], seed=1)
    assert (settings.method, settings["noise"], settings.seed) == ("my_noisy:noisy", 0.2, 1)
    for trials, message in (
        ({"nois": [1, 2]}, "unknown setting in methods.ours.trials 'nois': did you mean 'noise'"),
        ({"noise": [0.1, 3]}, re.escape("methods.ours: --noise must lie in [0, 1), got 3")),
    ):
        wrong = {**CONTENT, "methods": {**CONTENT["methods"], "ours": {**entry, "trials": trials}}}
        with pytest.raises(BadInput, match=message):
            Suite.from_dict("own", wrong)
    missing = {**CONTENT, "methods": {"ours": {**entry, "method": "nowhere_at_all:x"}}}
    with pytest.raises(BadInput, match=r"^methods\.ours: method 'nowhere_at_all:x': import failed"):
        Suite.from_dict("own", missing)


def test_trials_are_a_grid_around_the_default() -> None:
    build = METHODS["sgd"].build
    assert trials_of(Method("m", build), 5) == [{"lr": lr} for lr in (0.1, 0.05, 0.2, 0.025, 0.4)]
    own = Method("m", build, trials=({"lr": 0.05}, {"lr": 1.0, "k": 3}))
    assert trials_of(own, 4) == [{"lr": 0.05}, {"lr": 1.0, "k": 3}, {"lr": 0.1}, {"lr": 0.2}]
    assert trials_of(own, 1) == [{"lr": 0.05}]
    assert trials_of(METHODS["sfw-rank"], 3) == [{"turnover": turnover} for turnover in (4.0, 2.0, 8.0)]


def test_what_joined_is_read_from_the_folder(place: Path) -> None:
    assert joined_before(place) == []
    suite = Suite.from_dict("small", CONTENT)
    assert join(suite, ["sgd"]) is suite
    (place / "suite.yaml").write_text(join(suite, ["ssl", "sgd"]).text)
    assert joined_before(place) == ["ssl"]
    for text in ("[", "3", "joined: 5"):
        (place / "suite.yaml").write_text(text)
        with pytest.raises(DamagedFile, match=r"suite\.yaml is damaged"):
            joined_before(place)
    with pytest.raises(BadInput, match="method in joined 'muon'"):
        Suite.from_dict("small", {**CONTENT, "joined": ["muon"]})
