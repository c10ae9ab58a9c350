"""Comparisons: the search sees validation images only, what is there is not made again, and every error has a name."""

import dataclasses
import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pliant.errors import BadInput, Busy, DamagedFile
from pliant.experiments import compare as comparing
from pliant.experiments.compare import compare
from pliant.experiments.comparison import workers
from pliant.experiments.comparison.comparison import Comparison
from pliant.experiments.comparison.job import Job, Outcome
from pliant.experiments.comparison.performing import perform
from pliant.experiments.comparison.suite import Suite
from pliant.experiments.training.settings import Settings
from pliant.files import locked
from pliant.jsonl import read_lines
from pliant.records import Record, read_records

CONTENT: dict[str, Any] = {
    "settings": {"data": "digits", "model": "lenet5", "width": 0.5, "epochs": 1, "precision": "fp32"},
    "seeds": [0, 1],
    "families": {
        "filters": [{"compressor": "filters", "ratios": [0, 0.5]}],
        "rank": [
            {"compressor": "rank", "ratios": [0, 0.5]},
            {"compressor": "rank", "whiten": False, "refit": False, "ratios": [0, 0.5]},
        ],
    },
    "methods": {
        "sgd": {"families": ["filters", "rank"], "trials": [{"lr": 0.1}, {"lr": 0.001}]},
        "ours": {"method": "sfw-rank", "families": ["rank"], "trials": [{"k": 0.1}, {"k": 0.5}]},
    },
    "retraining": {"method": "sgd", "schedules": ["LLR"], "epochs": 1, "ratios": [0.5]},
    "calibration": 64,
}

FILTERS, RANK = "filters-loss-refit", ("rank-whitened-spatial-refit", "rank-spatial")
SEARCHED = [{**CONTENT["families"]["rank"][0], "ratios": [0, 0.7]}, CONTENT["families"]["rank"][1]]
UNIFORM = [{"compressor": "filters", "allocation": "uniform", "ratios": [0, 0.5]}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was stopped after its third training and then went on."""
    folder = tmp_path_factory.mktemp("comparison")
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(CONTENT), encoding="utf-8")
    suite = Suite.open(file)
    (folder / "out").mkdir()

    def stopping(wanted: list[Job], where: Path) -> Iterator[tuple[Job, Any]]:
        for count, job in enumerate(wanted):
            if count == 3:
                raise KeyboardInterrupt
            yield job, perform(job, where)

    with pytest.raises(KeyboardInterrupt):
        Comparison(suite, folder / "out", stopping).run()
    assert compare(str(file), out=str(folder / "out")) == folder / "out" / "report.html"
    return folder / "out"


def outcomes(folder: Path) -> list[Outcome]:
    return read_lines(folder / "trials.jsonl", Outcome.from_dict, "trials")


def records(folder: Path) -> list[Record]:
    return read_records(folder / "records.jsonl")


def test_every_trial_is_searched_once_per_family(finished: Path):
    found = [(outcome.run, outcome.family) for outcome in outcomes(finished)]
    assert sorted(found) == sorted(
        [(f"sgd,lr={lr},seed=0", family) for lr in (0.1, 0.001) for family in ("filters", "rank")]
        + [(f"ours,k={k},seed=0", "rank") for k in (0.1, 0.5)]
    )


def test_the_trial_with_the_largest_validation_area_is_measured(finished: Path):
    for label, family in (("sgd", "filters"), ("sgd", "rank"), ("ours", "rank")):
        found = [o for o in outcomes(finished) if (o.label, o.family) == (label, family)]
        best = max(found, key=lambda outcome: outcome.area)
        others = {o.run for o in found} - {best.run}
        measured = {r.run for r in records(finished) if r.method == label and r.compressor.startswith(family)}
        assert best.run in measured
        assert not others & measured


def test_every_seed_and_size_is_measured_once(finished: Path):
    plain = [r for r in records(finished) if not r.config.get("retraining")]
    points = [(r.method, r.seed, r.compressor, r.ratio) for r in plain]
    assert sorted(points) == sorted(
        (method, seed, compressor, ratio)
        for method, compressors in (("sgd", (FILTERS, *RANK)), ("ours", RANK))
        for seed in (0, 1)
        for compressor in compressors
        for ratio in (0.0, 0.5)
    )


def test_records_tell_what_the_training_cost(finished: Path):
    for record in records(finished):
        assert record.cost is not None
        assert record.cost["equal"] == "epochs"
        assert record.chance == 0.1
    memory = {r.method: r.cost["memory"] / r.cost["memory_sgd"] for r in records(finished) if r.cost}
    assert memory["sgd"] == 1
    assert 1 <= memory["ours"] < 1.5  # the bases of the singular subspaces, where the weights are not tiny


def test_the_reference_with_retraining_is_marked(finished: Path):
    again = [r for r in records(finished) if r.config.get("retraining")]
    assert {r.run.endswith("+LLR") for r in again} == {True}
    assert {(r.method, r.config["retraining"], r.config["retraining_epochs"]) for r in again} == {("sgd", "LLR", 1)}
    assert {(r.compressor, r.ratio, r.seed) for r in again} == {
        (compressor, ratio, seed) for compressor in (FILTERS, RANK[0]) for ratio in (0.0, 0.5) for seed in (0, 1)
    }


def test_a_finished_comparison_is_not_made_again(finished: Path, monkeypatch: pytest.MonkeyPatch):
    before = (finished / "records.jsonl").read_bytes(), (finished / "trials.jsonl").read_bytes()
    monkeypatch.setattr(workers, "perform", lambda *_: pytest.fail("something was made again"))
    compare(str(finished.parent / "small.yaml"), out=str(finished))
    assert before == ((finished / "records.jsonl").read_bytes(), (finished / "trials.jsonl").read_bytes())


def test_a_comparison_goes_on_from_packed_records(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training is missing in a packed file: it is measured, and appended there; nothing else is."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if (json.loads(line)["method"], json.loads(line)["seed"]) != ("ours", 1))
    (out / "records.jsonl").unlink()
    (out / "records.jsonl.gz").write_bytes(gzip.compress(kept))
    compare(str(finished.parent / "small.yaml"), out=str(out))
    assert not (out / "records.jsonl").exists()
    content = gzip.decompress((out / "records.jsonl.gz").read_bytes())
    assert content.startswith(kept)
    found = read_records(out / "records.jsonl.gz")
    assert sorted(record.key() for record in found) == sorted(record.key() for record in records(finished))
    monkeypatch.setattr(workers, "perform", lambda *_: pytest.fail("something was made again"))
    compare(str(finished.parent / "small.yaml"), out=str(out))
    assert gzip.decompress((out / "records.jsonl.gz").read_bytes()) == content


def changed(finished: Path, tmp_path: Path, **changes: Any) -> str:
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump({**CONTENT, **changes}), encoding="utf-8")
    return str(file)


def test_a_suite_may_grow(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    def noted(job: Job, *_: object) -> Iterator[Record]:
        made.append(job.name)
        yield from ()

    monkeypatch.setattr(workers, "perform", noted)
    monkeypatch.setattr(comparing, "write_report", lambda *_, **__: None)
    compare(changed(finished, tmp_path, seeds=[0, 1, 2]), out=str(finished))
    assert made
    assert all("seed=2" in name for name in made)


def test_results_of_other_settings_are_refused(finished: Path, tmp_path: Path):
    other = changed(finished, tmp_path, settings={**CONTENT["settings"], "epochs": 2})
    with pytest.raises(BadInput, match=r"holds .* with epochs 1, the suite says 2: choose another --out"):
        compare(other, out=str(finished))


def test_a_search_by_another_measure_is_refused(finished: Path, tmp_path: Path):
    rank = [{"compressor": "rank", "scheme": "channel", "ratios": [0, 0.5]}]
    other = changed(finished, tmp_path, families={**CONTENT["families"], "rank": rank})
    with pytest.raises(BadInput, match=r"compressor 'rank-whitened-spatial-refit', .* has 'rank-whitened-refit' now"):
        compare(other, out=str(finished))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": 128}, "with calibration 64, the first .* has 128 now"),
        (
            {"retraining": {**CONTENT["retraining"], "schedules": ["LLR"], "epochs": 2}},
            "with retraining_epochs 1, .* 2",
        ),
        ({"families": {**CONTENT["families"], "rank": SEARCHED}}, r"with points .*, the first .* has .*0\.7"),
        (
            {"families": {**CONTENT["families"], "filters": UNIFORM}},
            "allocation 'global', the first .* has 'uniform' now",
        ),
        ({"settings": {**CONTENT["settings"], "precision": "bf16"}}, "with precision 'fp32', the suite says 'bf16'"),
    ],
)
def test_results_measured_otherwise_are_refused(finished: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    names = ("records.jsonl", "trials.jsonl", "suite.yaml")
    before = [(finished / name).read_bytes() for name in names]
    with pytest.raises(BadInput, match=message):
        compare(changed(finished, tmp_path, **changes), out=str(finished))
    assert before == [(finished / name).read_bytes() for name in names]


def test_what_was_chosen_once_and_is_not_any_more_is_not_reported(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    lines = [outcome.to_dict() for outcome in outcomes(finished)]
    areas = [line["area"] for line in lines if line["label"] == "ours"]
    for line in lines:  # now the other trial is the better one
        line["area"] = sum(areas) - line["area"] if line["label"] == "ours" else line["area"]
    (tmp_path / "out" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    comparison = Comparison(Suite.from_dict("small", CONTENT), tmp_path / "out", lambda *_: iter(()))
    assert {record.method for record in comparison.records} == {"sgd", "ours"}
    assert {record.method for record in comparison.current()} == {"sgd"}
    unchanged = Comparison(Suite.from_dict("small", CONTENT), finished, lambda *_: iter(()))
    assert len(unchanged.current()) == len({record.key() for record in unchanged.records})


def test_a_report_tells_what_diverged(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    best, other = sorted((o for o in outcomes(finished) if o.label == "ours"), key=lambda o: -(o.area or 0))
    lost = best.run.replace("seed=0", "seed=1")
    diverged = {lost: dataclasses.replace(best, run=lost), other.run: other}
    kept = [outcome for outcome in outcomes(finished) if outcome is not other and outcome.run not in diverged]
    made = [*kept, *(dataclasses.replace(o, area=None, error="the loss is nan") for o in diverged.values())]
    text = "".join(json.dumps(outcome.to_dict()) + "\n" for outcome in made)
    (tmp_path / "out" / "trials.jsonl").write_text(text, encoding="utf-8")
    compare(str(finished.parent / "small.yaml"), out=str(tmp_path / "out"))
    for name in ("report.html", "report.md"):
        page = (tmp_path / "out" / name).read_text(encoding="utf-8").replace("\\", "")
        assert f"Diverged, so that the means are of the other seeds: {lost}." in page
        assert f"Diverged in the search: {other.run}." in page


def test_without_its_network_a_sweep_is_measured_whole(finished: Path, tmp_path: Path):
    def missing(folder: Path) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []

        def noted(wanted: list[Job], _: Path) -> Iterator[tuple[Job, Any]]:
            found.extend((job.name, sum(len(m.points) for of in job.families.values() for m in of)) for job in wanted)
            yield from ()

        Comparison(Suite.from_dict("small", CONTENT), folder, noted).run()
        return found

    shutil.copytree(finished, tmp_path / "out")
    lines = (finished / "records.jsonl").read_text(encoding="utf-8").splitlines()
    short = [line for line in lines if not (json.loads(line)["method"] == "ours" and json.loads(line)["ratio"])]
    (tmp_path / "out" / "records.jsonl").write_text("".join(line + "\n" for line in short), encoding="utf-8")
    here = missing(tmp_path / "out")
    assert {count for _, count in here} == {2}  # one size of two measures
    shutil.rmtree(tmp_path / "out" / "runs")
    assert missing(tmp_path / "out") == [(name, 4) for name, _ in here]


def test_a_default_turnover_that_has_changed_is_refused(finished: Path):
    outcome = next(o for o in outcomes(finished) if o.label == "ours")
    job = Job(task="", label="ours", trial=outcome.trial, settings=Settings.from_config(outcome.config), families={})
    job.check(outcome.config, finished)
    with pytest.raises(BadInput, match=r"with turnover 8\.0, the suite says 4\.0"):
        job.check({**outcome.config, "turnover": 8.0}, finished)


def test_a_setting_that_did_not_exist_yet_had_no_value(finished: Path):
    outcome = next(o for o in outcomes(finished) if o.label == "ours")
    job = Job(task="", label="ours", trial=outcome.trial, settings=Settings.from_config(outcome.config), families={})
    job.check({name: value for name, value in outcome.config.items() if name != "persistence"}, finished)
    older = {name: value for name, value in outcome.config.items() if name != "strength"}
    with pytest.raises(BadInput, match=r"with strength None, the suite says 0\.06"):
        job.check(older, finished)


def test_trials_from_before_the_measure_was_kept_are_read(finished: Path):
    outcome = outcomes(finished)[0].to_dict()
    del outcome["compressor"], outcome["measure"]
    assert (Outcome.from_dict(outcome).compressor, Outcome.from_dict(outcome).measure) == ("", {})


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("filters", r"has chosen sgd with compressor 'filters', .* has 'filters-loss-refit' now"),
        ("rank", r"has chosen ours with compressor 'rank-whitened', .* has 'rank-whitened-spatial-refit' now"),
    ],
)
def test_trials_from_before_the_measure_was_kept_were_cut_in_the_oldest_way(
    family: str, message: str, finished: Path, tmp_path: Path
):
    out = tmp_path / "out"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("runs"))
    oldest = {"compressor": "", "measure": {}}
    lines = [{**o.to_dict(), **(oldest if o.family == family else {})} for o in outcomes(finished)]
    (out / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        compare(str(finished.parent / "small.yaml"), out=str(out))


def test_a_second_process_is_refused(finished: Path):
    with locked(finished), pytest.raises(Busy):
        compare(str(finished.parent / "small.yaml"), out=str(finished))


def test_some_methods_alone(finished: Path):
    with pytest.raises(BadInput, match="unknown method of this suite 'our': did you mean 'ours'"):
        compare(str(finished.parent / "small.yaml"), out=str(finished), methods="sgd,our")


def test_some_tasks_alone_with_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({**CONTENT, "tasks": {"small": {}, "own": {"data": "image-folder"}}}))
    seen: list[Suite] = []
    monkeypatch.setattr(comparing, "rehearse", seen.append)
    compare(str(file), tasks="own", data_dir=str(tmp_path), dry_run=True)
    assert {name: (task["data"], task["data_dir"]) for name, task in seen[0].tasks.items()} == {
        "own": ("image-folder", str(tmp_path))
    }
    with pytest.raises(BadInput, match="unknown task of this suite 'owl': did you mean 'own'"):
        compare(str(file), tasks="small,owl", dry_run=True)


def test_a_missing_ray_is_said(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'pliant\[ray\]'"):
        compare(str(finished.parent / "small.yaml"), out=str(finished), ray="auto")


def test_a_damaged_line_of_trials_is_named(tmp_path: Path):
    (tmp_path / "trials.jsonl").write_text(json.dumps({"task": "", "label": 3}) + "\n")
    with pytest.raises(DamagedFile, match=r"trials.jsonl:1: a trial needs label, got 3"):
        Comparison(Suite.from_dict("small", CONTENT), tmp_path, lambda *_: iter(()))


def test_with_equal_time_a_slower_step_means_fewer_epochs(finished: Path, tmp_path: Path):
    lines = [json.loads(line) for line in (finished / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["config"]["epochs"] = 7
        line["cost"]["step_s"] = line["cost"]["step_s_sgd"] * (2.0 if line["method"] == "ours" else 1.0)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "trials.jsonl").write_text(
        (finished / "trials.jsonl").read_text(encoding="utf-8").replace('"epochs": 1,', '"epochs": 7,'),
        encoding="utf-8",
    )
    made: list[Job] = []

    def noted(wanted: list[Job], _: Path) -> Iterator[tuple[Job, Any]]:
        made.extend(wanted)
        yield from ()

    content = {**CONTENT, "settings": {**CONTENT["settings"], "epochs": 7}, "equal": ["epochs", "time"]}
    Comparison(Suite.from_dict("small", content), tmp_path, noted).run()
    assert [(job.label, job.equal, job.settings.epochs, job.settings.seed) for job in made] == [
        ("ours", "time", 3, 0),  # 7 epochs in half the steps; with four it would be 8/7 of SGD's time
        ("ours", "time", 3, 1),
    ]
    short = {**next(line for line in lines if line["method"] == "ours"), "run": made[0].name}
    short["config"] = {**short["config"], "epochs": 3}
    short["cost"] = {**short["cost"], "equal": "time"}
    for line in lines:
        line["cost"]["step_s"] *= 1.4  # measured anew, steps take longer
    text = "".join(json.dumps(line) + "\n" for line in [*lines, short])
    (tmp_path / "records.jsonl").write_text(text, encoding="utf-8")
    made.clear()
    Comparison(Suite.from_dict("small", content), tmp_path, noted).run()
    assert {job.settings.epochs for job in made} == {3}


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """Stop Ray after the tests that use it: its processes take longer to start than to work."""
    ray = pytest.importorskip("ray", reason="the extra pliant[ray] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else the other tests on this machine starve them
        yield
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_ray_gives_the_same_records(finished: Path, tmp_path: Path):
    small = {**CONTENT, "seeds": [0], "methods": {"ours": CONTENT["methods"]["ours"]}}
    small.pop("retraining")
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(small), encoding="utf-8")
    compare(str(file), out=str(tmp_path / "out"), ray="local")

    def told(found: list[Record]) -> dict[Any, Any]:
        return {(r.run, r.compressor, r.ratio): (r.top1, r.top1_raw, r.val_top1, r.params, r.weights) for r in found}

    here = told(records(finished))
    there = told(records(tmp_path / "out"))
    assert there
    assert there.items() <= here.items()


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_on_ray_jobs_of_one_training_take_turns(finished: Path, tmp_path: Path):
    file = changed(finished, tmp_path, retraining={**CONTENT["retraining"], "schedules": ["FT", "SLR"]})
    out = tmp_path / "out"
    out.mkdir()
    for name in ("trials.jsonl", "records.jsonl"):  # what is shared of a comparison: the runs stay behind
        shutil.copy(finished / name, out)
    compare(file, out=str(out), methods="sgd", ray="local")
    again = {(r.seed, r.config["retraining"]) for r in records(out) if r.config.get("retraining")}
    assert again == {(seed, schedule) for seed in (0, 1) for schedule in ("LLR", "FT", "SLR")}
