"""Rehearsals of comparisons."""

from pathlib import Path

import pytest
import yaml

from pliant.errors import BadInput, Diverged
from pliant.experiments.baselines.retraining import SCHEDULES
from pliant.experiments.compare import compare
from pliant.experiments.comparison.suite import SHIPPED, Suite
from tests.experiments.test_compare import CONTENT


def test_a_rehearsal_tries_every_method_and_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # A folder that is not there: noise stands in for the images.
    tasks = {"many": {"data": "cifar100", "image_size": 8}}
    settings = {key: value for key, value in CONTENT["settings"].items() if key != "data"}
    file = tmp_path / "small.yaml"
    methods = {**CONTENT["methods"], "third": {"method": "muon", "families": ["rank"], "trials": {"lr": [0.01, 0.02]}}}
    content = {**CONTENT, "settings": settings, "tasks": tasks, "methods": methods}
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert compare(str(file), out=str(tmp_path / "out"), data_dir=str(tmp_path / "nowhere"), dry_run=True) is None
    assert list(tmp_path.iterdir()) == [file]
    told = capsys.readouterr().err
    assert "many-sgd,lr=0.1,seed=0: 2 measurements, search" in told
    assert "many-sgd,lr=0.1,seed=0: 6 measurements\n" in told
    assert "many-sgd,lr=0.1,seed=0+LLR: 4 measurements\n" in told
    for name in ("many-ours,k=0.1,seed=0", "many-third,lr=0.01,seed=0"):  # of a family that has been measured
        assert f"{name}: trained\n" in told


@pytest.mark.slow
def test_the_suite_tiny_runs_with_all_its_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torchao.prototype.pat")
    content = yaml.safe_load((SHIPPED / "tiny.yaml").read_text(encoding="utf-8"))
    content["settings"]["width"] = 0.25  # a network of a sixteenth of the weights: nothing depends on it but the time
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert compare(str(file), out=str(tmp_path / "out"), dry_run=True) is None
    told = capsys.readouterr().err
    suite = Suite.open("tiny")
    labels = [entrant.label for entrant in suite.methods]
    assert len(labels) == 25
    for label in labels:
        assert f"\n{label}," in f"\n{told}", label
    assert suite.retraining is not None
    assert suite.retraining.schedules == SCHEDULES
    for schedule in SCHEDULES:
        assert f"+{schedule}: " in told
        assert f"+{schedule}x3: " in told


def test_a_rehearsal_meets_the_errors_of_the_comparison(tmp_path: Path):
    file = tmp_path / "small.yaml"
    methods = {"ours": {"method": "sfw-rank", "families": ["rank"], "trials": [{"k": -0.1}]}}
    file.write_text(yaml.safe_dump({**CONTENT, "methods": methods, "retraining": None}), encoding="utf-8")
    with pytest.raises(BadInput, match="--k"):
        compare(str(file), out=str(tmp_path / "out"), dry_run=True)


@pytest.mark.parametrize("families", [["filters"], []])
def test_a_rehearsal_says_what_diverges(families: list[str], tmp_path: Path):
    file = tmp_path / "small.yaml"
    exploding = {"method": "sgd", "families": ["filters"], "trials": [{"lr": 1e30}]}
    methods = {"fine": {**exploding, "trials": [{"lr": 0.1}]}, "sgd": exploding}
    content = {**CONTENT, "methods": methods if not families else {"sgd": exploding}, "retraining": None}
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with pytest.raises(Diverged, match=r"sgd,lr=1e\+30,seed=0"):
        compare(str(file), dry_run=True)
