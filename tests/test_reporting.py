"""Reports: what the table and the page say about records, and that a page is safe, whole and self-contained."""

from __future__ import annotations

import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pliant.errors import BadInput, DamagedFile
from pliant.records import Record
from pliant.reporting import render, report, summary_table

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
# Where a method's accuracy has fallen halfway to chance, as a removed share; and its dense accuracy.
METHODS = {"sgd": (0.45, 0.921), "sfw-rank": (0.93, 0.906), "sfw-filters": (0.85, 0.898)}
EASE = {"rank": 1.0, "rank-whitened": 1.1, "filters": 0.85, "weights": 1.05}
SIZES = {"resnet20": (272_474, 40_813_184), "lenet": (61_706, 416_520)}


def sample(method: str, compressor: str, ratio: float, *, seed: int = 0, pattern: str = "", **changes: Any) -> Record:
    """Return a record as a sweep makes it: SGD falls off early, the constrained trainings late."""
    model = changes.get("model", "resnet20")
    params, macs = SIZES[model]
    half, dense = METHODS[method]
    dense += 0.003 * (seed - 1)
    half *= EASE.get(compressor, 1.0)
    fall = 1 / (1 + math.exp(14 * (ratio - half))) * (1 + math.exp(-14 * half))
    top1 = 0.1 + (dense - 0.1) * min(1.0, fall) + 0.03 * ratio * math.sin(7 * seed + 9 * ratio)
    raw = 0.1 + (top1 - 0.1) * (1 - ratio) ** 0.5
    stays = compressor in ("weights", "nm")
    left = params if stays else round(params * (1 - 0.97 * ratio))
    values: dict[str, Any] = {
        "run": f"{method}-{model}-{seed}",
        "method": method,
        "model": model,
        "data": "cifar10",
        "seed": seed,
        "compressor": compressor,
        "allocation": "" if compressor == "nm" else "global",
        "pattern": pattern,
        "ratio": ratio,
        "ratio_removed": ratio,
        "top1": top1,
        "top1_raw": raw,
        "top1_dense": dense,
        "val_top1": top1,
        "params": left,
        "params_dense": params,
        "nonzero": round(params * (1 - 0.97 * ratio)),
        "nonzero_dense": params,
        "macs": macs if stays else round(macs * (1 - 0.9 * ratio)),
        "macs_dense": macs,
        "bytes": 4 * left + 9_000,
        "bytes_dense": 4 * params + 9_000,
        "latency_s": 0.031 if stays else 0.031 * (1 - 0.6 * ratio),
        "latency_dense_s": 0.031,
        "latency_batch": 64,
        "versions": {"torch": "2.13.0", "numpy": "2.4.6", "pliant": "0.1.0"},
        "weights": f"{sum(map(ord, method)) + seed:064x}",
        "config": {"epochs": 60, "seed": seed, "optimizer": {"lr": 0.1, "momentum": 0.9, "radius": 10}},
        "created": "2026-01-02T03:04:05+00:00",
    }
    if ratio and not stays:
        values["layers"] = [
            {
                "name": f"stage{1 + index // 3}.block{index % 3}.conv1",
                "kind": "filters" if compressor == "filters" else "rank",
                "kept": max(1, round(16 * 2 ** (index // 3) * (1 - ratio) ** (0.4 + 0.15 * index))),
                "total": 16 * 2 ** (index // 3),
                "params": round(2304 * 4 ** (index // 3) * (1 - ratio)),
                "params_dense": 2304 * 4 ** (index // 3),
            }
            for index in range(9)
        ]
        values["refused"] = [["fc", "the classifier's outputs are the classes"]]
    return Record(**(values | changes))


def sweep(methods: tuple[str, ...] = tuple(METHODS), seeds: int = 3, **changes: Any) -> list[Record]:
    """Return the records of a whole benchmark."""
    runs = [(method, seed) for method in methods for seed in range(seeds)]
    records = [
        sample(method, compressor, ratio, seed=seed, **changes)
        for method, seed in runs
        for compressor in EASE
        for ratio in RATIOS
    ]
    patterns = (("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75))
    return records + [
        sample(method, "nm", ratio, seed=seed, pattern=pattern, **changes)
        for method, seed in runs
        for pattern, ratio in patterns
    ]


def write(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record.to_dict()) + "\n" for record in records), encoding="utf-8")
    return path


class Page(html.parser.HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.json = ""
        self._inside = ""
        self.feed(text)
        self.close()
        self.data = json.loads(self.json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = "json" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.json += data
        elif not self._inside:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def curves(records: list[Record]) -> list[dict[str, Any]]:
    sections = Page(render(records)).data["sections"]
    return [curve for section in sections for panel in section["panels"] for curve in panel["curves"]]


def printed(records: list[Record], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(records))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ------------------------------------------------------------------------------------------------------ report


def test_report_writes_a_page_and_prints_the_table_and_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = write(tmp_path / "records.jsonl", sweep(seeds=1))
    out = tmp_path / "new" / "page.html"
    assert report(records, out) == out
    page = Page(out.read_text(encoding="utf-8"))
    assert "resnet20 on cifar10" in " ".join(page.text.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Report: {out}"
    assert any(re.match(r" +sfw-rank +1 +90\.3 ", line) for line in lines)
    assert max(len(line) for line in lines[:-1]) <= 100
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_an_existing_report_is_replaced(tmp_path: Path) -> None:
    records = write(tmp_path / "records.jsonl", [sample("sgd", "rank", 0.5)])
    out = tmp_path / "report.html"
    out.write_text("old")
    report([records], out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    records = write(tmp_path / "records.jsonl", [sample("sgd", "rank", 0.5)])
    out = tmp_path / "report.html"
    out.write_text("old")
    program = f"""
import resource, signal
from pliant.reporting import report
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    report({str(records)!r}, {str(out)!r})
except OSError:
    print("failed")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "failed"
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl", "report.html"]


def test_of_equal_keys_the_last_record_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.jsonl", [sample("sgd", "rank", 0.5, top1=0.111)])
    second = write(tmp_path / "b.jsonl", [sample("sgd", "rank", 0.5, top1=0.222)])
    report([first, second], tmp_path / "report.html")
    table = capsys.readouterr().out
    assert "22.2" in table
    assert "11.1" not in table


def test_nothing_to_report_is_an_error_that_says_how_to_make_records(tmp_path: Path) -> None:
    empty = write(tmp_path / "records.jsonl", [])
    for records in (empty, [empty, empty], []):
        with pytest.raises(BadInput, match="pliant sweep"):
            report(records, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"none\.jsonl"):
        report(tmp_path / "none.jsonl", tmp_path / "report.html")
    records = write(tmp_path / "records.jsonl", [sample("sgd", "rank", 0.5)])
    with pytest.raises(BadInput, match="folder"):
        report(records, tmp_path)


# --------------------------------------------------------------------------------------------------- the table


def test_the_table_holds_the_means_and_fits_into_100_columns() -> None:
    records = [
        sample("sgd", "rank", 0.5, seed=0, top1=0.40, top1_dense=0.90),
        sample("sgd", "rank", 0.5, seed=1, top1=0.50, top1_dense=0.92),
        sample("sgd", "rank", 0.9, seed=0, top1=0.10, top1_dense=0.90),
    ]
    lines = printed(records).splitlines()
    assert "runs  dense   50%   90%" in lines[2]
    assert any(re.fullmatch(r" +sgd +2 +91\.0 +45\.0 +10\.0 *", line) for line in lines)
    assert all(len(line.rstrip()) <= 100 for line in printed(sweep()).splitlines())
    assert "…" not in printed(sweep())


def test_user_text_is_not_read_as_markup() -> None:
    assert "[red]sgd" in printed([replace(sample("sgd", "rank", 0.5), method="[red]sgd")])


def test_records_of_dense_networks_only_give_a_table_without_ratios() -> None:
    assert re.search(r"runs +dense *\n", printed([sample("sgd", "rank", 0.0)]))


# ------------------------------------------------------------------------------------- what the page compares


def test_seeds_make_one_curve_with_mean_and_spread() -> None:
    tops = [0.5, 0.6, 0.85]
    records = [sample("sgd", "rank", 0.5, seed=seed, top1=top, top1_raw=0.3) for seed, top in enumerate(tops)]
    (curve,) = curves(records)
    assert curve["runs"] == 3
    (step,) = curve["steps"]
    assert step["label"] == "50%"
    assert step["top1"] == pytest.approx({"mean": 0.65, "low": 0.5, "high": 0.85})
    assert step["top1_raw"] == pytest.approx({"mean": 0.3, "low": 0.3, "high": 0.3})
    assert [record["top1"] for record in step["records"]] == tops


def test_a_run_counts_once_in_the_dense_accuracy() -> None:
    records = [sample("sgd", "rank", ratio, seed=0, top1_dense=0.8) for ratio in (0.1, 0.2, 0.3)]
    (curve,) = curves([*records, sample("sgd", "rank", 0.1, seed=1, top1_dense=0.9)])
    assert curve["dense"] == pytest.approx(0.85)


def test_settings_that_differ_split_a_method_and_name_its_trainings() -> None:
    records = [
        sample("sgd", "rank", 0.5, run=f"{k}-{seed}", config={"k": k, "seed": seed, "sfw": {"radius": 10}})
        for k in (0.1, 0.2)
        for seed in (0, 1)
    ]
    assert [(curve["training"], curve["runs"]) for curve in curves(records)] == [
        ("sgd (k=0.1)", 2),
        ("sgd (k=0.2)", 2),
    ]


def test_steps_are_ordered_by_ratio_and_shares_are_of_the_dense_network() -> None:
    records = [sample("sgd", "rank", ratio) for ratio in (0.9, 0.1 + 0.2, 0.0)]
    (curve,) = curves(records)
    assert [step["label"] for step in curve["steps"]] == ["0%", "30%", "90%"]
    last = records[0]
    assert curve["steps"][-1]["shares"] == pytest.approx([last.params / last.params_dense, last.macs / last.macs_dense])


@pytest.mark.parametrize(
    ("compressor", "ratio", "title", "axes"),
    [
        ("filters", 0.5, "Filters removed", ["parameters left (%)", "MACs left (%)"]),
        ("rank-whitened", 0.0, "Layers factorised to low rank", ["parameters left (%)", "MACs left (%)"]),
        ("weights", 0.5, "Single weights zeroed", ["non-zero parameters left (%)"]),
        ("weights", 0.0, "Single weights zeroed", ["non-zero parameters left (%)"]),
        ("nm", 0.5, "N:M patterns", ["non-zero parameters left (%)"]),
        ("heads", 0.5, "heads", ["parameters left (%)", "MACs left (%)"]),
    ],
)
def test_a_family_is_shown_against_what_it_reduces(compressor: str, ratio: float, title: str, axes: list[str]) -> None:
    page = Page(render([sample("sgd", compressor, ratio)]))
    assert page.data["sections"][0]["panels"][0]["axes"] == axes
    assert title in page.text


def test_zeroed_filters_are_not_mixed_with_removed_ones() -> None:
    removed = sample("sgd", "filters", 0.5)
    zeroed = sample("sgd", "filters-mask", 0.5, params=removed.params_dense, macs=removed.macs_dense)
    page = Page(render([removed, zeroed]))
    assert len(page.data["sections"][0]["panels"]) == 2
    assert "Filters zeroed" in page.text


def test_a_ratio_too_small_to_remove_anything_is_no_zeroing() -> None:
    dense = sample("sgd", "filters", 0.0)
    assert "Filters removed" in Page(render([replace(dense, ratio=0.01, ratio_removed=0.0)])).text


def test_models_and_data_sets_stand_in_sections_and_trainings_keep_their_colour() -> None:
    records = sweep(("sfw-rank",), seeds=1, model="lenet", data="digits") + sweep(seeds=1)
    data = Page(render(records)).data
    assert len(data["sections"]) == 2
    assert data["trainings"] == ["sgd", "sfw-rank", "sfw-filters"]


def test_a_pattern_is_one_step_even_if_it_removed_different_shares() -> None:
    records = [sample("sgd", "nm", ratio, seed=seed, pattern="2:4") for seed, ratio in enumerate((0.5, 0.49))]
    (curve,) = curves(records)
    assert [(step["label"], len(step["records"])) for step in curve["steps"]] == [("2:4", 2)]


@pytest.mark.parametrize("records", [[sample("sgd", "rank", 0.5)], [sample("sgd", "rank", 0.0)]])
def test_a_single_record_makes_a_page(records: list[Record]) -> None:
    (curve,) = curves(records)
    assert len(curve["steps"]) == 1


def test_the_page_holds_layers_reasons_settings_and_versions() -> None:
    records = [sample("sfw-rank", "rank", ratio) for ratio in (0.0, 0.3, 0.7)]
    page = Page(render(records))
    (view,) = page.data["sections"][0]["layers"]
    assert view["steps"] == ["30%", "70%"]
    assert view["layers"][0]["cells"] == [record.layers[0] for record in records[1:]]
    for text in ("the classifier's outputs are the classes", "optimizer.momentum", "torch 2.13.0", "31.00 ms"):
        assert text in page.text


def test_a_layer_that_a_plan_left_alone_is_an_empty_cell() -> None:
    some, every = sample("sgd", "rank", 0.3), sample("sgd", "rank", 0.7)
    some = replace(some, layers=some.layers[1:])
    (view,) = Page(render([some, every])).data["sections"][0]["layers"]
    cells = {layer["name"]: layer["cells"] for layer in view["layers"]}
    assert cells[every.layers[0]["name"]] == [None, every.layers[0]]


# ---------------------------------------------------------------------------------------- the page as a file


def test_the_page_loads_nothing_from_anywhere() -> None:
    page = Page(render(sweep(seeds=1)))
    policies = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv")]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
    ]
    links = [attrs.get("src") or attrs.get("href") for _, attrs in page.tags]
    assert [link for link in links if link] == ["data:,"]
    assert page.count("script") == 3


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&<!--"


def test_hostile_text_stays_text() -> None:
    layer = sample("sgd", "rank", 0.5).layers[0]
    plain = replace(sample("sgd", "rank", 0.5), config={"epochs": 60}, layers=[layer])
    harmless = Page(render([plain]))
    names = ("run", "method", "model", "data", "compressor", "allocation", "weights")
    hostile: dict[str, Any] = dict.fromkeys(names, HOSTILE)
    hostile["config"] = {HOSTILE: HOSTILE}
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["refused"] = [[HOSTILE, HOSTILE]]
    hostile["layers"] = [{**layer, "name": HOSTILE, "kind": HOSTILE}]
    page = Page(render([replace(plain, **hostile)]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert page.data["trainings"] == [HOSTILE]
    tip = page.data["sections"][0]["panels"][0]["curves"][0]["steps"][0]["records"][0]["tip"]
    assert set(re.findall(r"<[^>]*>", tip)) == {"<b>", "</b>", "<br>"}


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_draws_the_page_without_errors(tmp_path: Path) -> None:
    assert BROWSER is not None
    out = tmp_path / "report.html"
    # After the page: choose the raw accuracies, hide one training, sort by the third column.
    clicks = """<script>
document.querySelector("input[value=top1_raw]").click();
document.querySelector("[data-training=sgd]").click();
document.querySelectorAll(".numbers th button")[2].click();
</script>"""
    out.write_text(render(sweep(seeds=2)).replace("</body>", f"{clicks}</body>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", out.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [line for line in result.stderr.splitlines() if ":CONSOLE" in line] == []
    page = Page(result.stdout)
    assert sum("main-svg" in (attrs.get("class") or "") for _, attrs in page.tags) >= 6
    raw = sample("sfw-rank", "rank", 0.5, seed=0).top1_raw, sample("sfw-rank", "rank", 0.5, seed=1).top1_raw
    means = re.search(r'<table class="means" id="means-0-1">.*?</table>', result.stdout, re.DOTALL)
    assert means is not None
    assert f">{50 * sum(raw):.1f}<" in means[0]
    assert "sgd" not in means[0]
    assert page.count("select") == 1
    order = re.search(r"<tbody>\s*<tr>(.*?)</tr>", result.stdout.partition('class="numbers"')[2], re.DOTALL)
    assert order is not None
    assert 'data-order="0.0"' in order[1]
