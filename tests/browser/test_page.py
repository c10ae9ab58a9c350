"""The report page in a browser: what it draws, what moves when one moves something, and for whom it works."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import pytest

from pliant.cli import make_parser
from pliant.records import Record
from pliant.reporting.area import accuracy_at, is_reached
from tests.measurements import HOSTILE, cost, line, point, sweep

from .conftest import RESET, Opener, Tabs

pytestmark = pytest.mark.slow

# Accuracies along the removed shares 0, 0.3, 0.6 and 0.9.
CURVES = {
    "sgd": ((0.92, 0.90, 0.60, 0.20), (0.90, 0.88, 0.58, 0.22)),
    "sfw-rank": ((0.90, 0.89, 0.85, 0.50), (0.91, 0.90, 0.84, 0.52)),
    "cat": ((0.88, 0.87, 0.70, 0.30), (0.87, 0.86, 0.71, 0.31)),
}
SHORT = {"cat": (0.80, 0.79, 0.60, 0.20)}


def comparison() -> list[Record]:
    """Three methods under two compressors, one of them slow, and the reference with retraining."""
    records = []
    for method, seeds in CURVES.items():
        step = 1.5 if method == "cat" else 1.05
        for seed, heights in enumerate(seeds):
            paid: dict[str, Any] = {"chance": 0.1, "cost": cost("epochs", step)}
            records += line(method, seed, *heights, **paid)
            # A little worse by filters, and measured to 0.6 only.
            records += line(method, seed, *(0.9 * height for height in heights), compressor="filters", **paid)[:-1]
    for method, heights in SHORT.items():
        records += line(method, 0, *heights, run=f"{method}-short", weights="x", cost=cost("time", 1.5), chance=0.1)
    again = {"retraining": "LLR", "retraining_epochs": 2}
    return records + line("sgd", 0, 0.92, 0.92, 0.91, 0.90, run="sgd-0+LLR", config=again, chance=0.1)


@pytest.fixture
def compared(tabs: Tabs) -> Iterator[Any]:
    """The page of the comparison as it is when it is opened; it must not complain nor ask for anything."""
    if not tabs.contexts:
        tabs.open(comparison(), runs="some/runs")
    (context,) = tabs.contexts
    (page,) = context.pages
    page.mouse.move(0, 0)
    page.evaluate(RESET)
    yield page
    assert tabs.complaints == []


def expected(method: str, keep: float) -> float:
    """Return the mean accuracy by rank, as the area takes it."""
    shares = (0, 0.3, 0.6, 0.9)
    curves = [list(zip(shares, heights, strict=True)) for heights in CURVES[method]]
    assert all(is_reached(points, 1 - keep) for points in curves)
    return fmean(accuracy_at(points, 1 - keep, 0.1) for points in curves)


def pick(page: Any, option: str) -> None:
    page.get_by_role("radio", name=option, exact=True).check()


def choose(page: Any, keep: int, by: str = "") -> None:
    if by:
        pick(page, by)
    page.locator("#keep-0").fill(str(keep))


def rows(page: Any) -> list[dict[str, str]]:
    """Return what the choice of a size shows: for each row its text parts."""
    script = """items => items.map(item => Object.fromEntries(
        ["rank", "name", "accuracy", "command", "what", "who"].map(
            key => [key, item.querySelector("." + key)?.innerText ?? ""])
    ))"""
    found: list[dict[str, str]] = page.locator("#choices-0 > li").evaluate_all(script)
    return found


def table(page: Any, name: str) -> list[list[str]]:
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    found: list[list[str]] = page.locator(f"#{name} tr").evaluate_all(script)
    return found


def traces(page: Any, figure: str) -> list[dict[str, Any]]:
    """Return the data of a figure, once it is drawn."""
    page.locator(f"#{figure}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{figure}:not([data-stale]) .main-svg")
    found: list[dict[str, Any]] = page.evaluate(
        f"""document.getElementById("{figure}").data.map(({{x, y, mode, marker, line, fill}}) =>
            ({{x: [...x], y: [...y], mode, fill, symbol: marker?.symbol, colour: marker?.color ?? line?.color}}))"""
    )
    return found


def shown(page: Any, figure: str) -> int:
    """Return the number of curves that a figure marks the points of."""
    return sum(trace["mode"] == "markers" for trace in traces(page, figure))


# ----------------------------------------------------------------------------------------------------- figures


def test_curves_are_drawn_as_means_with_bands_over_the_seeds(compared: Any) -> None:
    drawn = traces(compared, "figure-0-1-0")  # rank, by parameters
    points = [trace for trace in drawn if trace["mode"] == "markers"]
    assert len(points) == 4
    assert points[0]["x"] == pytest.approx([100, 70, 40, 10])
    assert points[0]["y"] == pytest.approx([91, 89, 59, 21])
    bands = [trace for trace in drawn if trace["fill"] == "toself"]
    assert len(bands) == 3  # the reference has one seed
    assert bands[0]["y"] == pytest.approx([92, 90, 60, 22, 20, 58, 88, 90])
    (by_macs, *_) = (trace for trace in traces(compared, "figure-0-1-1") if trace["mode"] == "markers")
    assert by_macs["x"] == pytest.approx([100, 85, 70, 55])
    assert compared.locator("#figure-0-1-0 .scatterlayer .trace .points path").count() == 16


def test_hovering_a_point_tells_its_numbers(compared: Any) -> None:
    traces(compared, "figure-0-1-0")
    place = compared.evaluate(
        """() => {
            const figure = document.getElementById("figure-0-1-0");
            const {xaxis, yaxis} = figure._fullLayout;
            const box = figure.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(40), box.top + yaxis._offset + yaxis.d2p(84.5)];
        }"""
    )
    compared.mouse.move(place[0] - 30, place[1] - 30)
    compared.mouse.move(*place)
    text = compared.locator("#figure-0-1-0 .hovertext").text_content()
    for part in ("sfw-rank", "accuracy 84.5 % (84.0 to 85.0, 2 runs)", "parameters 400 (40.0 %)", "raw 42.2 %"):
        assert part in " ".join(text.split()), part


def test_the_legend_isolates_and_adds(compared: Any) -> None:
    assert shown(compared, "figure-0-1-0") == 4
    legend = compared.get_by_role("group", name="Shown trainings")
    legend.get_by_role("button", name="sfw-rank").click()
    assert shown(compared, "figure-0-1-0") == 1
    pressed = legend.locator("[aria-pressed=true]")
    assert pressed.evaluate_all("all => all.map(one => one.dataset.training)") == ["sfw-rank"]
    legend.get_by_role("button", name="cat").click()
    assert shown(compared, "figure-0-1-0") == 2
    assert compared.locator("#means-0-1 tbody tr").count() == 2
    legend.get_by_role("button", name="show all").click()
    assert shown(compared, "figure-0-1-0") == 4


def test_twenty_trainings_all_look_different(open_page: Opener) -> None:
    records = [r for index in range(20) for r in line(f"method-{index}", 0, 0.9, 0.9 - index / 40)]
    page = open_page(records)
    points = [trace for trace in traces(page, "figure-0-0-0") if trace["mode"] == "markers"]
    assert len({(trace["symbol"], trace["colour"]) for trace in points}) == 20
    assert not [trace for trace in traces(page, "figure-0-0-0") if trace["fill"] == "toself"]
    signs = page.locator(".legend [data-training] i").evaluate_all(
        "signs => signs.map(sign => sign.textContent + getComputedStyle(sign).color)"
    )
    assert len(set(signs)) == 20


# ---------------------------------------------------------------------------------------------- choosing a size


def test_the_slider_moves_the_numbers_the_order_and_the_commands(compared: Any) -> None:
    for keep in (70, 55, 30, 10):
        choose(compared, keep, "rank")
        found = rows(compared)
        rivals = found[:3]
        assert [row["rank"] for row in found] == ["1", "2", "3", "–"]
        assert "with retraining" in found[3]["name"]
        assert "pliant" not in found[3]["command"]
        values = {name: 100 * expected(name, keep / 100) for name in CURVES}
        assert [row["name"] for row in rivals] == sorted(values, key=lambda name: -values[name])
        for row in rivals:
            assert float(row["accuracy"].lstrip("≈ ")) == pytest.approx(values[row["name"]], abs=0.051)
            assert row["accuracy"].startswith("≈") == (keep in (55, 30))
            assert f"--keep_params {keep / 100:g} " in row["command"]
    assert compared.locator("#kept-0").inner_text() == "10 %"


def test_the_command_names_the_run_that_validation_prefers_and_pliant_understands_it(open_page: Opener) -> None:
    records = [
        *line("sgd", 0, 0.9, 0.9, val_top1=0.5, allocation="uniform", config={"calibration": 64}),
        *line("sgd", 1, 0.9, 0.1, val_top1=0.6, allocation="uniform", config={"calibration": 64}),
    ]
    page = open_page(records, runs="some where/it's")
    choose(page, 42)
    (row,) = rows(page)
    assert float(row["accuracy"].lstrip("≈ ")) == pytest.approx(100 * (0.9 + 0.9 - 0.8 * 0.58 / 0.9) / 2, abs=0.051)
    words = shlex.split(page.locator("#choices-0 code").inner_text())
    assert words[:3] == ["pliant", "compress", "some where/it's/sgd-1"]
    settings = make_parser("compress").parse_args(words[2:])
    assert (settings.compressor, settings.whiten, settings.allocation) == ("rank", False, "uniform")
    assert (settings.keep_params, settings.calibration, settings.out) == (0.42, 64, "small-sgd-1-rank-42")


NORMS, CUT = ("--importance", "l2"), ("--refit", "false")  # as in records of before there was a choice
# What a choice is called, and the end of its command but for --out.
COMMANDS = {
    "rank-whitened": ["--compressor", "rank", "--scheme", "channel", *CUT, "--keep_params", "0.5"],
    "rank-whitened-spatial": ["--compressor", "rank", "--scheme", "spatial", *CUT, "--keep_params", "0.5"],
    "rank-whitened-spatial-refit": ["--compressor", "rank", "--scheme", "spatial", "--keep_params", "0.5"],
    "filters+rank-best": [
        *("--compressor", "filters+rank", *NORMS, "--whiten", "false"),
        *("--scheme", "best", *CUT, "--keep_params", "0.5"),
    ],
    "filters+rank-whitened": [
        *("--compressor", "filters+rank", *NORMS, "--scheme", "channel", *CUT),
        *("--keep_params", "0.5"),
    ],
    "filters+rank": [
        *("--compressor", "filters+rank", *NORMS, "--whiten", "false"),
        *("--scheme", "channel", *CUT, "--keep_params", "0.5"),
    ],
    "filters-loss-refit": ["--compressor", "filters", "--keep_params", "0.5"],
    "heads": ["--compressor", "heads", *NORMS, *CUT, "--keep_params", "0.5"],
    "weights (zeros)": ["--compressor", "weights", "--importance", "magnitude", *CUT, "--ratio", "0.5"],
    "nm (zeros)": ["--compressor", "nm", "--importance", "magnitude", *CUT, "--pattern", "2:4"],
}


def test_every_compressor_has_its_command(open_page: Opener) -> None:
    records = []
    for choice in COMMANDS:
        compressor = choice.removesuffix(" (zeros)")
        stays: dict[str, Any] = {"params": 1000} if compressor != choice else {}
        pattern = {"pattern": "2:4"} if compressor == "nm" else {}
        records.append(point("sgd", 0, 0, 0.9, compressor=compressor, **stays))
        records.append(point("sgd", 0, 0.5, 0.8, compressor=compressor, **stays, **pattern))
    page = open_page([*records, point("sgd", 0, 0.5, 0.8, compressor="filters-mask")])
    for choice, options in COMMANDS.items():
        choose(page, 50, choice)
        words = shlex.split(page.locator("#choices-0 code").inner_text())
        assert words[3:-2] == options
        make_parser("compress").parse_args(words[2:])
    choose(page, 50, "filters-mask")
    assert page.locator("#choices-0 code").count() == 0  # no command line makes this one


def test_the_compressor_is_chosen_by_validation_and_can_be_chosen_by_hand(open_page: Opener) -> None:
    better = {"sgd": "rank", "cat": "filters"}
    records = [
        record
        for method, wanted in better.items()
        for compressor in ("rank", "filters")
        # By the test images it is the other way round.
        for record in line(
            method,
            0,
            0.8 if compressor == wanted else 0.9,
            compressor=compressor,
            val_top1=0.9 * (compressor == wanted),
        )
    ]
    page = open_page([*records, *line("sgd", 0, 0.99, compressor="weights", params=1000)])
    choose(page, 50)
    assert {row["name"]: row["who"].split()[-2].strip(",") for row in rows(page)} == better
    choose(page, 50, "filters")
    assert {row["name"] for row in rows(page) if "filters, global" in row["who"]} == set(better)
    choose(page, 50, "weights (zeros)")
    assert [row["accuracy"] for row in rows(page)] == ["≈ 99.0"]


def test_a_size_out_of_reach_has_neither_accuracy_nor_command(compared: Any) -> None:
    choose(compared, 20, "filters")
    found = rows(compared)
    assert {row["what"] for row in found} == {"not reached: measured down to 40.0 %"}
    assert {row["command"] for row in found} == {""}
    assert {row["rank"] for row in found} == {"–"}


def test_the_button_copies_the_command(compared: Any) -> None:
    compared.locator("#choices-0 .copy").first.click()
    compared.get_by_role("status").get_by_text("Copied.").wait_for()
    command = compared.locator("#choices-0 code").first.inner_text()
    assert compared.evaluate("navigator.clipboard.readText()") == command


# -------------------------------------------------------------------------------------------- views and tables


def test_raw_and_reestimated_switch_all_numbers(compared: Any) -> None:
    choose(compared, 70, "rank")
    before = table(compared, "standings-0-1")
    pick(compared, "raw")
    after = table(compared, "standings-0-1")
    assert "sfw-rank" in before[1][0]
    assert before[1][0] == after[1][0]
    column = before[0].index("Area, raw")
    assert after[1][1].split()[0] == before[1][column].split()[0]
    assert after[0].index("Area, re-est.") == column
    assert float(rows(compared)[0]["accuracy"].lstrip("≈ ")) == pytest.approx(50 * expected("sfw-rank", 0.7), abs=0.051)
    points = [trace for trace in traces(compared, "figure-0-1-0") if trace["mode"] == "markers"]
    assert points[0]["y"] == pytest.approx([45.5, 44.5, 29.5, 10.5])


def test_equal_time_and_equal_epochs_switch(compared: Any) -> None:
    choose(compared, 70, "rank")
    values = {row["name"]: row["accuracy"] for row in rows(compared)}
    assert values["cat"] == "86.5"
    pick(compared, "same training time")
    values = {row["name"]: row["accuracy"] for row in rows(compared)}
    assert values["cat"] == "79.0"
    assert values["sgd"] == "89.0"  # the same in both
    assert len(traces(compared, "figure-0-1-0")) > 0
    pick(compared, "same number of epochs")
    assert {row["name"]: row["accuracy"] for row in rows(compared)}["cat"] == "86.5"


def test_the_standings_are_sorted_and_retraining_is_marked_and_last(compared: Any) -> None:
    head, *body = table(compared, "standings-0-1")
    names = [row[0].lstrip("●■◆▲\n ") for row in body]
    assert names == ["sfw-rank ours", "cat", "sgd", "sgd with retraining, LLR"]
    assert body[1][head.index("Vs best baseline")] == "best baseline"
    assert "best" in (compared.locator("#standings-0-1 tbody tr").nth(0).get_attribute("class") or "")
    assert "best" not in (compared.locator("#standings-0-1 tbody tr").nth(3).get_attribute("class") or "")
    step = head.index("Step")
    assert [row[step] for row in body] == ["1.05×", "1.50×", "1.05×", "–"]
    best_of = table(compared, "best-of-0")
    assert all("sfw-rank" in row[2] and "cat" in row[5] for row in best_of[1:])


def test_the_numbers_sort_and_the_layers_follow_the_choice(open_page: Opener) -> None:
    page = open_page(sweep(("sgd", "sfw-rank"), seeds=1))
    page.get_by_text("All numbers").click()
    page.get_by_role("button", name="Removed").click()
    first = page.locator(".numbers tbody tr").first.locator("td").nth(2)
    assert first.get_attribute("data-order") == "0.0"
    page.get_by_role("button", name="Removed").click()
    assert first.get_attribute("data-order") == "0.9"
    layers = table(page, "layers-0")
    page.locator("#layers-of-0").select_option(index=4)
    assert table(page, "layers-0") != layers


# -------------------------------------------------------------------------------------------- for everybody


def test_light_and_dark_follow_the_system_and_the_toggle(open_page: Opener) -> None:
    def background(page: Any) -> str:
        found: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return found

    light, dark = "rgb(246, 247, 248)", "rgb(16, 19, 22)"
    page = open_page(comparison())
    assert background(page) == light
    before = traces(page, "figure-0-1-0")[-1]["colour"]
    pick(page, "dark")
    assert background(page) == dark
    assert traces(page, "figure-0-1-0")[-1]["colour"] != before
    pick(page, "system")
    assert background(page) == light
    page = open_page(comparison(), dark=True)
    assert background(page) == dark
    pick(page, "light")
    assert background(page) == light


@pytest.mark.parametrize("width", [390, 768])
def test_a_narrow_screen_needs_no_sideways_scrolling(open_page: Opener, width: int) -> None:
    long = [*line("a-method-with-a-very-long-name-without-any-break-" * 2, 0, 0.8, run="x" * 120)]
    page = open_page([*comparison(), *long], width=width)
    for details in page.locator("details > summary").all():
        details.click()
    traces(page, "figure-0-1-1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#keep-0").bounding_box()["width"] >= 200
    small = page.locator("button:visible, select:visible, input[type=range]:visible").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().right > innerWidth && !one.closest('.scroll')).length"
    )
    assert small == 0


def test_the_keyboard_reaches_and_moves_the_slider_and_the_legend(compared: Any) -> None:

    def focused() -> dict[str, str]:
        found: dict[str, str] = compared.evaluate(
            """(() => {
                const one = document.activeElement;
                const seen = one.type === "radio" ? one.nextElementSibling : one;
                return {id: one.id, text: one.innerText ?? "", outline: getComputedStyle(seen).outlineStyle};
            })()"""
        )
        return found

    def tab_to(wanted: str) -> None:
        for _ in range(60):
            compared.keyboard.press("Tab")
            now = focused()
            assert now["outline"] != "none", now
            if wanted in (now["id"], now["text"]):
                return
        raise AssertionError(f"Tab never reaches {wanted}")

    tab_to("keep-0")
    compared.keyboard.press("End")
    assert compared.locator("#kept-0").inner_text() == "100 %"
    compared.keyboard.press("ArrowLeft")
    assert compared.locator("#kept-0").inner_text() == "99 %"
    compared.keyboard.press("Home")
    assert compared.locator("#kept-0").inner_text() == "10 %"
    assert "--keep_params 0.1 " in rows(compared)[0]["command"]
    tab_to("copy")
    tab_to(compared.locator(".legend [data-training]").first.inner_text())
    compared.keyboard.press("Enter")
    assert shown(compared, "figure-0-1-0") == 1


def test_script_tags_in_names_and_settings_are_inert(open_page: Opener) -> None:
    layer = {"name": HOSTILE, "kind": HOSTILE, "kept": 1, "total": 2, "params": 1, "params_dense": 2}
    names: dict[str, Any] = dict.fromkeys(("model", "data", "allocation", "weights"), HOSTILE)
    records = line(
        HOSTILE,
        0,
        0.9,
        0.5,
        run=f"{HOSTILE}$(touch x)`y`\n",
        config={HOSTILE: HOSTILE, "calibration": HOSTILE},
        versions={HOSTILE: HOSTILE},
        refused=[[HOSTILE, HOSTILE]],
        layers=[layer],
        **names,
    )
    page = open_page([*records, *line(HOSTILE, 0, 0.9, config={"retraining": HOSTILE}), *line("sgd", 0, 0.8)])
    assert page.locator("img, iframe").count() == 0
    assert page.locator("script").count() == 3
    legend = page.get_by_role("group", name="Shown trainings")
    legend.get_by_role("button").first.click()
    traces(page, "figure-0-0-0")
    choose(page, 50)
    command = page.locator("#choices-0 code").first.text_content()
    words = shlex.split(command)
    assert words[2] == f"runs/{HOSTILE}$(touch x)`y`\n"
    assert words[words.index("--calibration") + 1] == HOSTILE
    assert HOSTILE in page.locator("#section-0").inner_text()
