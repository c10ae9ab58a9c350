"""Standings and their tables, on accuracies whose areas are known by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from pliant.records import Record
from pliant.reporting.curves import panels_of, sections_of
from pliant.reporting.ranking import Standing, standings
from pliant.reporting.tables import comparison_markdown, comparison_table
from tests.measurements import HOSTILE, cost, line, point


def stand(records: list[Record], view: str = "epochs", accuracy: str = "top1") -> list[Standing]:
    (section,) = sections_of(records)
    (panel,) = panels_of(section)
    return standings(panel, view, section.chance, accuracy)


def by_name(records: list[Record], **options: Any) -> dict[str, Standing]:
    return {standing.curve.training: standing for standing in stand(records, **options)}


# ------------------------------------------------------------------------------------------------------- areas


def test_the_area_is_the_mean_over_seeds_with_students_interval() -> None:
    (standing,) = stand([r for seed, top in enumerate((0.7, 0.8, 0.9)) for r in line("sgd", seed, top)])
    mean, half, n = standing.areas[0]
    assert (mean, n) == (pytest.approx(0.8), 3)
    assert half == pytest.approx(4.302652729911275 * 0.1 / 3**0.5)


def test_one_seed_has_no_interval() -> None:
    (standing,) = stand(line("sgd", 0, 0.8, 0.4))
    assert standing.areas[0] == (pytest.approx(0.6), None, 1)


def test_the_area_against_macs_and_with_raw_batchnorm_stand_beside() -> None:
    # 0.9 of the parameters removed is 0.45 of the MACs: from there on, guessing (0.1) counts. On the grid of MACs:
    # 0.8 at 0 … 0.4, then 0.1: trapezoids 4·0.8 + 0.45 + 4·0.1 of nine.
    (standing,) = stand(line("sgd", 0, 0.8, chance=0.1))
    assert standing.areas[1].mean == pytest.approx((4 * 0.8 + 0.45 + 4 * 0.1) / 9)
    assert standing.other.mean == pytest.approx(0.4)


def test_raw_accuracies_have_standings_of_their_own() -> None:
    weak_raw = [*line("sgd", 0, 0.8), *line("ssl", 0, 0.7, top1_raw=0.6)]
    assert [s.curve.training for s in stand(weak_raw)] == ["sgd", "ssl"]
    raw = stand(weak_raw, accuracy="top1_raw")
    assert [s.curve.training for s in raw] == ["ssl", "sgd"]
    assert (raw[0].areas[0].mean, raw[0].other.mean) == (pytest.approx(0.6), pytest.approx(0.7))


def test_a_size_out_of_reach_counts_as_guessing_and_has_no_accuracy() -> None:
    (standing,) = stand([point("sgd", 0, 0, 0.8, chance=0.1), point("sgd", 0, 0.5, 0.8, chance=0.1)])
    assert standing.areas[0].mean == pytest.approx((5 * 0.8 + 0.45 + 0.3) / 9)
    assert standing.kept == (pytest.approx(0.8), None, None, None)


def test_accuracies_at_four_sizes_are_interpolated_means_over_the_runs() -> None:
    # From 0.9 to 0 along a line, and from 0.7 to 0.7: at 0.5 removed 0.4 and 0.7.
    (standing,) = stand([*line("sgd", 0, 0.9, 0.0), *line("sgd", 1, 0.7)])
    assert standing.kept == pytest.approx((0.55, (0.2 + 0.7) / 2, (0.1 + 0.7) / 2, 0.35))


def test_without_a_dense_record_the_dense_accuracy_begins_the_curve() -> None:
    (standing,) = stand([point("sgd", 0, 0.9, 0.2, top1_dense=0.8)])
    assert standing.areas[0].mean == pytest.approx(0.5)


def test_a_sweep_that_is_under_way_does_not_count_yet() -> None:
    (standing,) = stand([*line("sgd", 0, 0.8, 0.8, 0.8), point("sgd", 1, 0, 0.5)])
    assert standing.areas[0] == (pytest.approx(0.8), None, 1)


def test_two_runs_of_one_seed_are_one_value() -> None:
    (standing,) = stand([*line("sgd", 0, 0.8), *line("sgd", 0, 0.6, run="again"), *line("sgd", 1, 0.5)])
    assert standing.areas[0].mean == pytest.approx(0.6)
    assert standing.areas[0].n == 2


# ------------------------------------------------------------------------------------------------ who is best


def test_the_best_is_first_and_the_difference_is_paired_by_seed() -> None:
    # The seeds differ by 20 points, the methods always by 5: the interval of the difference is narrow.
    tops = (0.4, 0.6, 0.8)
    records = [r for seed, top in enumerate(tops) for r in line("sgd", seed, top)]
    records += [r for seed, top in enumerate(tops) for r in line("ssl", seed, top - 0.1)]
    records += [r for seed, top in enumerate(tops) for r in line("sfw-rank", seed, top + 0.05 + 0.01 * (seed - 1))]
    ours, sgd, ssl = stand(records)
    assert [s.curve.training for s in (ours, sgd, ssl)] == ["sfw-rank", "sgd", "ssl"]
    assert [s.is_best for s in (ours, sgd, ssl)] == [True, False, False]
    assert [s.is_baseline for s in (ours, sgd, ssl)] == [False, True, False]
    assert ours.versus is not None
    assert ours.versus.mean == pytest.approx(0.05)
    assert ours.versus.half == pytest.approx(4.302652729911275 * 0.01 / 3**0.5)
    assert ssl.versus is not None
    assert ssl.versus.mean == pytest.approx(-0.1)


def test_seeds_that_do_not_agree_give_a_difference_of_means() -> None:
    found = by_name([*line("sgd", 0, 0.5), *line("sgd", 1, 0.7), *line("sfw-rank", 2, 0.8), *line("sfw-rank", 3, 0.8)])
    assert found["sfw-rank"].versus == (pytest.approx(0.2), None, 0)


def test_ours_are_marked_but_get_no_favour() -> None:
    best, other = stand([*line("sgd", 0, 0.8), *line("sfw-rank", 0, 0.7)])
    assert (best.curve.training, best.is_best, best.curve.ours) == ("sgd", True, False)
    assert (other.is_best, other.curve.ours) == (False, True)


def test_networks_with_retraining_never_win_nor_are_the_baseline() -> None:
    again = {"retraining": "LLR", "retraining_epochs": 2}
    records = [*line("sgd", 0, 0.6), *line("sfw-rank", 0, 0.7), *line("sgd", 0, 0.9, run="sgd-0+LLR", config=again)]
    standing = stand(records)
    assert [s.curve.training for s in standing] == ["sfw-rank", "sgd", "sgd with retraining, LLR"]
    assert [s.is_best for s in standing] == [True, False, False]
    assert [s.is_baseline for s in standing] == [False, True, False]
    assert standing[2].curve.retrained
    assert standing[0].versus is not None
    assert standing[0].versus.mean == pytest.approx(0.1)


def test_rounds_of_retraining_are_told_apart() -> None:
    again = [
        line("sgd", 0, accuracy, config={"retraining": "FT"} | rounds, run=f"again {accuracy}")
        for accuracy, rounds in ((0.8, {}), (0.9, {"retraining_rounds": 3}))
    ]
    found = [s.curve.training for s in stand([*line("sgd", 0, 0.6), *again[0], *again[1]])]
    assert found == ["sgd", "sgd with retraining, FT, 3 rounds", "sgd with retraining, FT"]


def test_alone_with_ours_a_network_with_retraining_is_no_baseline() -> None:
    again = line("sgd", 0, 0.9, config={"retraining": "FT"})
    ours, reference = stand([*line("sfw-rank", 0, 0.7), *again])
    assert (ours.versus, ours.is_best, reference.is_baseline) == (None, True, False)
    (alone,) = stand(again)
    assert (alone.is_best, alone.is_baseline) == (False, False)


def test_without_a_baseline_there_is_no_difference() -> None:
    (standing,) = stand(line("sfw-rank", 0, 0.7))
    assert standing.versus is None


def test_the_cost_is_relative_to_sgd_and_a_mean_over_the_runs() -> None:
    records = [
        r for seed, step in enumerate((1.1, 1.3)) for r in line("cat", seed, 0.8, cost=cost("epochs", step, 2.5))
    ]
    (standing,) = stand(records)
    assert standing.cost == pytest.approx((1.2, 2.5, 10.0))
    assert stand(line("cat", 0, 0.8))[0].cost is None


def test_patterns_are_compared_by_the_mean_of_those_that_all_have() -> None:
    pattern: dict[str, Any] = {"compressor": "nm", "allocation": "", "params": 1000}

    def run(method: str, **tops: float) -> list[Record]:
        found = [point(method, 0, 0, 0.9, **pattern)]
        return found + [
            point(method, 0, 0.5, top, pattern=name.replace("of", ":")[1:], nonzero=500, **pattern)
            for name, top in tops.items()
        ]

    found = by_name([*run("sgd", _2of4=0.8, _1of4=0.4, _1of8=0.1), *run("ssl", _2of4=0.6, _1of4=0.5)])
    assert found["sgd"].areas == ((pytest.approx(0.6), None, 1),)
    assert found["ssl"].areas == ((pytest.approx(0.55), None, 1),)
    assert found["sgd"].kept == (None,) * 4


# ------------------------------------------------------------------------------------------------------- views

SGD = [r for seed in (0, 1) for r in line("sgd", seed, 0.6, cost=cost("epochs", 1.0))]
CHEAP = line("ssl", 0, 0.65, cost=cost("epochs", 1.06))
DEAR = line("cram", 0, 0.8, cost=cost("epochs", 2.0), config={"epochs": 8})
IN_TIME = line("cram", 0, 0.5, run="cram-short", weights="x", cost=cost("time", 2.0), config={"epochs": 4})


def test_equal_time_has_sgd_and_what_is_as_fast_and_the_shortened_runs() -> None:
    records = [*SGD, *CHEAP, *DEAR, *IN_TIME]
    assert [(s.curve.training, round(s.areas[0].mean, 3)) for s in stand(records)] == [
        ("cram", 0.8),
        ("ssl", 0.65),
        ("sgd", 0.6),
    ]
    assert [(s.curve.training, round(s.areas[0].mean, 3)) for s in stand(records, "time")] == [
        ("ssl", 0.65),
        ("sgd", 0.6),
        ("cram", 0.5),
    ]


def test_a_slow_method_without_a_shortened_run_has_no_place_in_equal_time() -> None:
    other = line("numuon", 0, 0.9, cost=cost("epochs", 1.2))
    assert "numuon" not in by_name([*SGD, *other, *IN_TIME], view="time")


def test_a_run_that_was_shortened_stands_in_for_its_own_longer_one() -> None:
    # Timed again, its step is as fast as SGD's.
    longer = line("cram", 0, 0.8, cost=cost("epochs", 1.09), config={"epochs": 8})
    found = by_name([*SGD, *longer, *IN_TIME], view="time")
    assert found["cram"].areas[0] == (pytest.approx(0.5), None, 1)


def test_a_run_that_was_timed_twice_is_in_equal_time_whole_or_not_at_all() -> None:
    paid = [cost("epochs", step) for step in (1.05, 1.08, 1.2)]
    run = [replace(record, cost=c) for record, c in zip(line("glt", 0, 0.8, 0.8, 0.8), paid, strict=True)]
    assert by_name([*SGD, *run, *IN_TIME], view="time")["glt"].areas[0].mean == pytest.approx(0.8)


def test_seeds_with_different_epochs_are_one_training_in_equal_time() -> None:
    longer = line("cram", 1, 0.6, run="cram-1", weights="y", cost=cost("time", 1.8), config={"epochs": 5})
    found = by_name([*SGD, *IN_TIME, *longer], view="time")
    assert found["cram"].areas[0].n == 2


def test_the_seeds_of_a_training_are_in_equal_time_all_or_none() -> None:
    runs = [(seed, 0.6 + 0.1 * seed, cost("epochs", step)) for seed, step in enumerate((1.04, 1.0, 1.16))]
    other = [r for seed, top, c in runs for r in line("numuon", seed, top, cost=c)]
    noisy = [r for seed in (0, 1) for r in line("sgd", seed, 0.5, cost=cost("epochs", 0.9 + 0.4 * seed))]
    found = by_name([*noisy, *other, *IN_TIME], view="time")
    assert {name: found[name].areas[0].n for name in ("sgd", "numuon")} == {"sgd": 2, "numuon": 3}


def test_one_kind_of_records_is_one_view() -> None:
    (section,) = sections_of([*SGD, *CHEAP])
    assert list(section.views) == ["epochs"]


@pytest.mark.parametrize("difference", [{"config": {"image_size": 64}}, {"chance": 0.005}])
def test_other_images_of_the_same_reader_are_a_section_of_their_own(difference: dict[str, Any]) -> None:
    records = [
        *line("sgd", 0, 0.6, data="image-folder", config={"image_size": 224}, chance=0.001),
        *line("sgd", 0, 0.8, **{"data": "image-folder", "config": {"image_size": 224}, "chance": 0.001, **difference}),
    ]
    sections = sections_of(records)
    assert sorted(curve.dense for section in sections for curve in section.curves) == [0.6, 0.8]
    assert all(len(section.curves) == 1 for section in sections)
    assert "image-folder at 224×224" in [section.data for section in sections]


def test_ours_are_known_by_their_method_whatever_they_are_called() -> None:
    records = [
        *line("mine", 0, 0.6, config={"method": "sfw-rank", "recipe": "default"}),
        *line("sfw-imitation", 0, 0.5, config={"method": "sgd"}),
        *line("theirs", 0, 0.4, config={"method": "sfw-rank", "recipe": "paper"}),
    ]
    found = by_name(records)
    assert [name for name, standing in found.items() if standing.curve.ours] == ["mine"]
    assert [name for name, standing in found.items() if standing.is_baseline] == ["sfw-imitation"]


# ------------------------------------------------------------------------------------------------------ names


def test_settings_chosen_for_each_compressor_make_one_training() -> None:
    (section,) = sections_of(
        [
            *line("sgd", 0, 0.6, config={"lr": 0.1}),
            *line("sgd", 0, 0.6, run="other", compressor="filters", config={"lr": 0.3}),
        ]
    )
    assert {curve.training for curve in section.curves} == {"sgd"}
    assert [panel.title for panel in panels_of(section)] == ["Filters removed", "Layers factorised to low rank"]


def test_settings_that_an_older_version_did_not_have_split_no_training() -> None:
    configs = ({"lr": 0.1}, {"lr": 0.1, "scheme": None})
    (section,) = sections_of([r for seed, config in enumerate(configs) for r in line("sgd", seed, 0.6, config=config)])
    assert [curve.training for curve in section.curves] == ["sgd"]


def test_settings_that_compete_under_one_compressor_are_told_everywhere() -> None:
    (section,) = sections_of(
        [
            *line("sgd", 0, 0.6, config={"lr": 0.1}),
            *line("sgd", 0, 0.6, run="other", config={"lr": 0.3}),
            *line("sgd", 0, 0.6, compressor="filters", config={"lr": 0.1}),
        ]
    )
    assert [(curve.compressor, curve.training) for curve in section.curves] == [
        ("filters", "sgd (lr=0.1)"),
        ("rank", "sgd (lr=0.1)"),
        ("rank", "sgd (lr=0.3)"),
    ]


def test_plain_and_whitened_truncation_are_compared_apart() -> None:
    (section,) = sections_of([*line("sgd", 0, 0.6), *line("sgd", 0, 0.8, compressor="rank-whitened")])
    assert [panel.title for panel in panels_of(section)] == [
        "Layers factorised to low rank",
        "Layers factorised to low rank, whitened",
    ]


# ----------------------------------------------------------------------------------------------------- tables


def printed(records: list[Record]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(comparison_table(records))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_markdown_table_by_hand() -> None:
    records = [r for seed, top in enumerate((0.7, 0.8)) for r in line("sgd", seed, top, chance=0.1)]
    records += [
        r
        for seed, top in enumerate((0.72, 0.84))
        for r in line("sfw-rank", seed, top, chance=0.1, cost=cost("epochs", 1.25, 1.5, 75))
    ]
    lines = comparison_markdown(records).splitlines()
    assert lines[0] == "**small on digits: Layers factorised to low rank**"
    head, rule, ours, sgd = lines[2:6]
    assert cells(head)[:9] == [
        "trained by",
        "seeds",
        "area",
        "vs best baseline",
        "dense",
        "50 %",
        "30 %",
        "20 %",
        "10 %",
    ]
    assert len(cells(head)) == len(cells(rule)) == len(cells(ours)) == len(cells(sgd))
    # Areas 0.72, 0.84: ± t(1)·0.0849/√2 = 12.706·0.06; differences 0.02, 0.04: ± 12.706·0.01.
    assert cells(ours)[:5] == ["**sfw-rank (ours)**", "2", "78.0 ± 76.2", "+3.0 ± 12.7", "78.0"]
    assert cells(ours)[-3:] == ["1.25", "1.50", "75"]
    assert cells(sgd)[:4] == ["sgd", "2", "75.0 ± 63.5", "best baseline"]
    assert cells(sgd)[-3:] == ["-", "-", "-"]


def test_both_views_are_in_both_tables() -> None:
    records = [*SGD, *CHEAP, *DEAR, *IN_TIME]
    for text in (comparison_markdown(records), printed(records)):
        assert text.index("same number of epochs") < text.index("same training time")
        assert text.count("cram") == 2


def test_retraining_is_told_in_the_tables_and_not_bold() -> None:
    records = [*line("sgd", 0, 0.6), *line("sgd", 0, 0.9, run="again", config={"retraining": "FT"})]
    rows = comparison_markdown(records).splitlines()[4:6]
    assert [cells(row)[0] for row in rows] == ["**sgd**", "sgd with retraining, FT"]
    assert "sgd with retraining, FT" in printed(records)


def test_hostile_names_stay_in_their_cell() -> None:
    records = line(f"{HOSTILE}|`x`\n# y", 0, 0.6, model="a|b", data="<b>")
    title, _, head, _, row = comparison_markdown(records).splitlines()[:5]
    assert title.startswith(r"**a\|b on \<b\>")
    assert row.replace(r"\|", "").count("|") == head.count("|")
    assert "<script" not in row.replace(r"\<", "")
    assert "[red]" in printed(line("[red]", 0, 0.6))
