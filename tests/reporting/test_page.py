"""Reports: what the table and the page say about records, and that a page is safe, whole and self-contained."""

from __future__ import annotations

import html.parser
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pliant.errors import BadInput, DamagedFile
from pliant.records import LayerCount, Record
from pliant.reporting.page import render, report
from pliant.reporting.tables import comparison_markdown, summary_table
from tests.measurements import HOSTILE, cost, line, sample, sweep, write


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
    views = [view for section in sections for panel in section["panels"] for view in panel["views"].values()]
    return [curve for view in views for curve in view["curves"]]


def counts(layer: LayerCount) -> list[int]:
    return [layer["kept"], layer["total"], layer["params"], layer["params_dense"]]


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
from pliant.reporting.page import report
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


def test_a_comparison_is_printed_and_written_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [*line("sgd", 0, 0.6, cost=cost()), *line("sfw-rank", 0, 0.7, cost=cost(step=1.2))]
    records = write(tmp_path / "records.jsonl", found)
    table = tmp_path / "docs" / "table.md"
    table.parent.mkdir()
    table.write_text("old")
    report(records, tmp_path / "report.html", markdown=table)
    assert table.read_text(encoding="utf-8") == comparison_markdown(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "sfw-rank (ours) 1 70.0 +10.0 70.0" in printed
    with pytest.raises(BadInput, match="--markdown"):
        report(records, tmp_path / "report.html", markdown=tmp_path)


def test_the_commands_name_the_runs_beside_the_records_or_where_one_says(tmp_path: Path) -> None:
    records = write(tmp_path / "records.jsonl", line("sgd", 0, 0.6))

    def named(**options: Any) -> str:
        page = Page(report(records, tmp_path / "report.html", **options).read_text(encoding="utf-8"))
        (view,) = page.data["sections"][0]["panels"][0]["views"].values()
        name: str = view["curves"][0]["networks"][0]["command"][2]
        return name

    assert named() == f"{tmp_path}/runs/sgd-0"
    assert named(runs="elsewhere") == "elsewhere/sgd-0"


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
    (size,) = curve["sizes"]
    assert size["label"] == "50%"
    assert size["top1"] == pytest.approx({"mean": 0.65, "low": 0.5, "high": 0.85})
    assert size["top1_raw"] == pytest.approx({"mean": 0.3, "low": 0.3, "high": 0.3})
    assert "accuracy 65.0 % (50.0 to 85.0, 3 runs)" in size["tip"]


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


def test_sizes_are_ordered_by_ratio_and_shares_are_of_the_dense_network() -> None:
    records = [sample("sgd", "rank", ratio) for ratio in (0.9, 0.1 + 0.2, 0.0)]
    (curve,) = curves(records)
    assert [size["label"] for size in curve["sizes"]] == ["0%", "30%", "90%"]
    last = records[0]
    assert curve["sizes"][-1]["shares"] == pytest.approx([last.params / last.params_dense, last.macs / last.macs_dense])


@pytest.mark.parametrize(
    ("compressor", "ratio", "title", "axes"),
    [
        ("filters", 0.5, "Filters removed", ["parameters left (%)", "MACs left (%)"]),
        ("rank-whitened", 0.0, "Layers factorised to low rank", ["parameters left (%)", "MACs left (%)"]),
        (
            "rank-whitened-spatial",
            0.5,
            "Layers factorised to low rank, whitened, spatial",
            ["parameters left (%)", "MACs left (%)"],
        ),
        (
            "filters-loss-refit",
            0.5,
            "Filters removed, chosen by calibration images, refitted",
            ["parameters left (%)", "MACs left (%)"],
        ),
        ("weights", 0.5, "Single weights zeroed", ["non-zero parameters left (%)"]),
        ("weights", 0.0, "Single weights zeroed", ["non-zero parameters left (%)"]),
        ("nm", 0.5, "N:M patterns", ["non-zero parameters left (%)"]),
        ("heads", 0.5, "Heads removed", ["parameters left (%)", "MACs left (%)"]),
    ],
)
def test_a_family_is_shown_against_what_it_reduces(compressor: str, ratio: float, title: str, axes: list[str]) -> None:
    page = Page(render([sample("sgd", compressor, ratio)]))
    assert page.data["sections"][0]["panels"][0]["axes"] == axes
    assert title in page.text


REFITTED = {"refit": {"result": "refitted"}, "top1": 0.8, "top1_reestimated": 0.7, "top1_raw": 0.6}


def test_refitted_networks_have_three_accuracies() -> None:
    records = [sample("sgd", "filters-loss-refit", ratio, **REFITTED) for ratio in (0.0, 0.5)]
    old = sample("sgd", "filters", 0.5, model="lenet")
    page = Page(render([*records, old]))
    switch = [tag["value"] for name, tag in page.tags if name == "input" and tag.get("name") == "accuracy"]
    assert switch == ["top1", "top1_reestimated", "top1_raw"]
    sections = page.data["sections"]
    for section in sections:  # every section answers the switch
        (panel,) = section["panels"]
        assert set(panel["views"]["epochs"]["standings"]) == set(switch)
    by_title = {section["panels"][0]["compressor"]: section["panels"][0]["views"]["epochs"] for section in sections}
    size = by_title["filters-loss-refit"]["curves"][0]["sizes"][1]
    assert [size[kind]["mean"] for kind in switch] == [0.8, 0.7, 0.6]
    assert "re-estimated 70.0 % · raw 60.0 %" in size["tip"]
    point = by_title["filters"]["curves"][0]["networks"][0]["points"][0]
    assert point["top1_reestimated"] == point["top1"] == old.top1
    areas = [by_title["filters-loss-refit"]["standings"][kind][0]["areas"][0]["mean"] for kind in switch]
    assert areas == sorted(areas, reverse=True)
    numbers = re.search(r"80\.0.*?70\.0.*?60\.0", page.text, re.DOTALL)  # beside each other in the table
    assert numbers is not None
    assert "Re-estimated" in page.text
    assert "Refitted: the weights that are left" in " ".join(page.text.split())
    assert "Refitted: the weights that are left" in comparison_markdown(records)
    assert "Refitted, where the name says so" in str(summary_table(records).caption)


def test_without_a_refit_pages_and_tables_say_what_they_did() -> None:
    records = [sample("sgd", "filters", 0.5)]
    page = Page(render(records))
    assert [tag["value"] for _, tag in page.tags if tag.get("name") == "accuracy"] == ["top1", "top1_raw"]
    assert "Refitted" not in page.text + comparison_markdown(records)
    assert summary_table(records).caption == "BatchNorm re-estimated; mean over the runs."


@pytest.mark.parametrize(
    ("compressor", "flags"),
    [
        ("filters", ["--importance", "l2", "--refit", "false"]),
        ("filters-loss-refit", []),
        ("filters-loss", ["--refit", "false"]),
        ("filters-bn-refit", ["--importance", "bn"]),
        ("rank-whitened-spatial-refit", ["--scheme", "spatial"]),
        ("filters+rank-loss-whitened-spatial-refit", ["--scheme", "spatial"]),
        ("weights", ["--importance", "magnitude", "--refit", "false"]),
        ("weights-loss-refit", []),
        ("filters-mask", None),
    ],
)
def test_the_command_makes_the_same_variant(compressor: str, flags: list[str] | None) -> None:
    (curve,) = curves([sample("sgd", compressor, 0.5)])
    command = curve["networks"][0]["command"]
    assert (command and command[5:]) == flags


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
    assert [training["name"] for training in data["trainings"]] == ["sgd", "sfw-rank", "sfw-filters"]
    assert [training["ours"] for training in data["trainings"]] == [False, True, True]


def test_a_pattern_is_one_size_even_if_it_removed_different_shares() -> None:
    records = [sample("sgd", "nm", ratio, seed=seed, pattern="2:4") for seed, ratio in enumerate((0.5, 0.49))]
    (curve,) = curves(records)
    assert [size["label"] for size in curve["sizes"]] == ["2:4"]


@pytest.mark.parametrize("records", [[sample("sgd", "rank", 0.5)], [sample("sgd", "rank", 0.0)]])
def test_a_single_record_makes_a_page(records: list[Record]) -> None:
    (curve,) = curves(records)
    assert len(curve["sizes"]) == 1


def test_the_page_holds_layers_reasons_settings_and_versions() -> None:
    records = [sample("sfw-rank", "rank", ratio) for ratio in (0.0, 0.3, 0.7)]
    page = Page(render(records))
    (view,) = page.data["sections"][0]["layers"]
    assert view["sizes"] == ["30%", "70%"]
    assert view["layers"][0]["cells"] == [counts(record.layers[0]) for record in records[1:]]
    for text in ("the classifier's outputs are the classes", "optimizer.momentum", "torch 2.13.0", "31.00 ms"):
        assert text in page.text


def test_a_layer_that_a_plan_left_alone_is_an_empty_cell() -> None:
    some, every = sample("sgd", "rank", 0.3), sample("sgd", "rank", 0.7)
    some = replace(some, layers=some.layers[1:])
    (view,) = Page(render([some, every])).data["sections"][0]["layers"]
    cells = {layer["name"]: layer["cells"] for layer in view["layers"]}
    assert cells[every.layers[0]["name"]] == [None, counts(every.layers[0])]


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
    assert [training["name"] for training in page.data["trainings"]] == [HOSTILE]
    (view,) = page.data["sections"][0]["panels"][0]["views"].values()
    tip = view["curves"][0]["sizes"][0]["tip"]
    assert set(re.findall(r"<[^>]*>", tip)) == {"<b>", "</b>", "<br>"}
