"""Suites: what is read, what is refused, and that the shipped ones are sound."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pliant.errors import BadInput, DamagedFile
from pliant.experiments.comparison.comparison import Comparison
from pliant.experiments.comparison.suite import SHIPPED, Suite
from pliant.experiments.comparison.workers import here
from pliant.experiments.methods import find_method
from pliant.reporting.tables import comparison_markdown


def content(**changes: Any) -> dict[str, Any]:
    return {
        "settings": {"data": "digits", "epochs": 2},
        "seeds": [0, 1],
        "families": {"rank": [{"compressor": "rank", "ratios": [0, 0.5]}]},
        "methods": {
            "sgd": {"families": ["rank"], "trials": [{"lr": 0.1}, {"lr": 0.05}]},
            "ours": {"method": "sfw-rank", "families": ["rank"], "trials": {"k": [0.1, 0.2]}},
        },
        **changes,
    }


def read(**changes: Any) -> Suite:
    return Suite.from_dict("small", content(**changes))


def test_settings_come_from_the_suite_then_the_task_then_the_trial():
    suite = read(tasks={"a": {"epochs": 3}, "b": {}})
    settings = suite.settings("a", suite.methods[0], {"lr": 0.7}, seed=5)
    assert (settings.epochs, settings.data, settings.lr) == (3, "digits", 0.7)
    assert (settings.method, settings.seed) == ("sgd", 5)
    assert suite.settings("b", suite.methods[1], {}, seed=5).epochs == 2


def test_a_mapping_of_lists_is_a_grid():
    grid = {"families": ["rank"], "trials": {"lr": [0.1, 0.2], "weight_decay": [0.0, 0.1]}}
    assert read(methods={"sgd": grid}).methods[0].trials == (
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.2, "weight_decay": 0.0},
        {"lr": 0.2, "weight_decay": 0.1},
    )


def test_patterns_stand_beside_the_dense_network():
    families = {"nm": [{"compressor": "nm", "patterns": ["2:4", "1:4"]}]}
    suite = read(families=families, methods={"sgd": {"families": ["nm"]}})
    assert suite.families["nm"][0].points == ((0.0, ""), (0.0, "2:4"), (0.0, "1:4"))


METHODS = content()["methods"]
RANK = content()["families"]["rank"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "tasks": {"a": {}, "a-b": {}},
                "methods": {"c": {**METHODS["sgd"], "method": "sgd"}, "b-c": METHODS["ours"]},
            },
            "same name, TASK-METHOD",
        ),
        (
            {"retraining": {"method": "sgd", "schedules": ["FT", "LRW"], "epochs": 3, "ratios": [0.5]}},
            "LRW goes back at most the 2 epochs of the training, got 3",
        ),
        ({"tusks": {}}, "unknown entry of a suite 'tusks': did you mean 'tasks'"),
        ({"methods": {**METHODS, "muon": {"families": ["rank"]}}}, "number of trials; here: sgd 2, ours 2, muon 1"),
        ({"methods": {"sdg": {"families": ["rank"]}}}, "unknown method of methods.sdg 'sdg': did you mean 'sgd'"),
        ({"methods": {"sgd": {"families": ["rang"]}}}, "family of methods.sgd .*'rang'"),
        ({"methods": {"sgd": {}}}, "methods.sgd lacks families"),
        ({"methods": {"sgd": {"families": ["rank"], "trials": [{"lr": 1}, {"lr": 1}]}}}, "the same settings twice"),
        ({"methods": {"sgd": {"families": ["rank"], "trials": [{"k": 3}]}}}, "methods.sgd: --k is not a setting"),
        ({"methods": {"sgd": {"families": ["rank"], "trials": [{"lr": -1}]}}}, "methods.sgd: --lr must be positive"),
        ({"methods": {"sgd": {"families": ["rank"], "trials": [{"lr": "x"}]}}}, "methods.sgd: --lr expects"),
        ({"methods": {"sgd": {"families": ["rank"], "trials": [{"seed": 1}]}}}, "may not set seed"),
        ({"methods": {"s/d": {"method": "sgd", "families": ["rank"]}}}, "name of a method has letters"),
        ({"settings": {"epoch": 3}}, "unknown setting in settings 'epoch': did you mean 'epochs'"),
        ({"tasks": []}, "expected names and values for tasks"),
        ({"seeds": []}, "at least one entry for seeds"),
        ({"seeds": [0, 0]}, "different integers"),
        ({"seeds": [True]}, "different integers"),
        ({"families": {"rank": [{"compressor": "rang", "ratios": [0]}]}}, "'rang'"),
        ({"families": {"rank": [{"compressor": "rank"}]}}, "nm takes patterns"),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0.5]}]}}, "starts with 0"),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0, 2]}]}}, "ratio"),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0], "whiten": "no"}]}}, "true or false"),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0], "scheme": "space"}]}}, "scheme 'space'"),
        ({"families": {"rank": [{"compressor": "filters", "ratios": [0], "scheme": "spatial"}]}}, "for the compressor"),
        ({"families": {"rank": [{"compressor": "nm", "patterns": ["5:4"]}]}}, "N:M"),
        (
            {"families": {"rank": [{"compressor": "rank", "ratios": [0], "multiple_of": 0}]}},
            r"families.rank: multiple_of must be an int of at least 1, got 0",
        ),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0], "keep": 3}]}}, "families.rank: keep"),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0], "layer_ratios": {"fc": 2}}]}}, "share < 1"),
        ({"families": {"rank": [{"compressor": "weights", "ratios": [0], "at_least": 1}]}}, "for filters, heads and"),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0], "refit": "no"}]}}, "refit is true or false"),
        (
            {"families": {"rank": [{"compressor": "rank", "ratios": [0], "importance": "l2"}]}},
            "families.rank: --importance 'l2': rank has no importance",
        ),
        ({"families": {"rank": [{"compressor": "rank", "ratios": [0], "importance": 2}]}}, "importance is text"),
        ({"equal": ["time"]}, "starts with epochs"),
        ({"equal": ["epochs", "money"]}, "'money'"),
        ({"calibration": 1}, "at least 2 images"),
        ({"retraining": {"method": "sgd", "schedules": ["LLR"], "epochs": 0, "ratios": [0.5]}}, "retraining.epochs"),
        ({"retraining": {"method": "muon", "schedules": ["LLR"], "epochs": 1, "ratios": [0.5]}}, "'muon'"),
        ({"retraining": {"method": "sgd", "schedules": ["XYZ"], "epochs": 1, "ratios": [0.5]}}, "'XYZ'"),
        (
            {"retraining": {"method": "sgd", "schedules": ["FT"], "epochs": 1, "ratios": [0.5], "rounds": [1, 0]}},
            r"retraining.rounds must be integers of at least 1, got \[1, 0\]",
        ),
    ],
)
def test_what_is_wrong_is_said(changes, message):
    with pytest.raises(BadInput, match=message):
        read(**changes)


def test_controls_make_a_measure_of_their_own():
    entry = {"compressor": "filters", "ratios": [0, 0.5]}
    controls = {"multiple_of": 8, "keep": ["fc"], "at_least": 1, "at_most": 1.0, "layer_ratios": {"conv1": 0.5}}
    suite = read(families={"rank": [entry, {**entry, **controls}, {**entry, "keep": "fc,a.*", "at_least": 0.05}]})
    plain, controlled, kept = suite.families["rank"]
    assert plain.controls == {}
    assert controlled.controls == {"multiple_of": 8, "keep": ["fc"], "at_least": 1, "ratios": {"conv1": 0.5}}
    assert kept.controls == {"keep": ["fc", "a.*"]}
    assert plain.name == "filters-loss-refit"
    assert len({measure.key(0.5, "") for measure in (plain, controlled, kept)}) == 3


def test_a_choice_and_a_refit_make_measures_of_their_own():
    entry = {"compressor": "filters", "ratios": [0, 0.5]}
    every = [entry, {**entry, "importance": "l2"}, {**entry, "importance": "l2", "refit": False}]
    suite = read(families={"rank": every})
    names = ["filters-loss-refit", "filters-refit", "filters"]
    assert [measure.name for measure in suite.families["rank"]] == names


@pytest.mark.parametrize("value", [None, 3, [], "text", {1: 2}])
def test_what_is_no_suite_is_refused(value):
    with pytest.raises(BadInput, match="expected names and values"):
        Suite.from_dict("small", value)


def test_files_that_are_no_suites(tmp_path: Path):
    with pytest.raises(BadInput, match="unknown suite 'tinny': did you mean 'tiny'"):
        Suite.open("tinny")
    with pytest.raises(DamagedFile, match="expected a suite"):
        Suite.open(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(DamagedFile, match="damaged"):
        Suite.open(tmp_path / "broken.yaml")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content(seeds=[])))
    with pytest.raises(BadInput, match=r"wrong.yaml: .*seeds"):
        Suite.open(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_suites_are_sound(name):
    suite = Suite.open(name)
    assert suite.text == (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    assert "sgd" in {entrant.label for entrant in suite.methods}  # the anchor
    assert len(suite.seeds) >= 3


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_methods_are_measured_in_the_families_that_they_are_made_for(name):
    for entrant in Suite.open(name).methods:
        cut_by = find_method(entrant.method).cut_by
        assert not cut_by or set(entrant.families) <= set(cut_by), entrant.label


RECORDED = Path(__file__).parents[3] / "comparisons"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RECORDED.glob("*/suite.yaml")))
def test_recorded_comparisons_are_what_their_suites_ask_for(name):
    folder = RECORDED / name
    suite = Suite.open(folder / "suite.yaml")
    measures = {measure.name for family in suite.families.values() for measure in family}
    comparison = Comparison(suite, folder, here)
    records = comparison.current()
    assert len(records) == len(comparison.records)
    assert {record.compressor for record in records} == measures
    report = comparison_markdown(records, comparison.diverged())
    assert report == (folder / "report.md").read_text(encoding="utf-8")


def test_five_suites_are_shipped():
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"tiny", "fashion", "cifar16", "cifar", "paper"}
