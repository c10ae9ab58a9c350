"""The cost model of docs/scale.md: formulas agree with counts, up to the matrices of a 7B Llama, without computing."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from benchmarks.costs import OPTIMIZERS, counted_step, counted_traffic, directions, fake_processes

ROOT = Path(__file__).parents[2]
# Square, wide and tall; the last three are Llama 7B's.
SHAPES = [(128, 128), (344, 128), (320, 864), (2048, 5632), (4096, 4096), (11_008, 4096), (4096, 11_008)]
SFW_NAMES = [name for name in OPTIMIZERS if name.startswith("SFW")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_formula_counts_the_products_of_a_step(name: str, shape: tuple[int, int]) -> None:
    products, _, state = counted_step(name, shape)
    formula = OPTIMIZERS[name](shape, 1)
    assert products == formula.products
    if name != "Shampoo":  # its state is not that of an optimizer at hand
        assert state == formula.state


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Shampoo"])
def test_other_work_grows_with_the_entries(name: str) -> None:
    (_, one, _), (_, other, _) = (counted_step(name, shape) for shape in [(2048, 5632), (4096, 11_008)])
    assert one == pytest.approx(other, rel=0.05)


@pytest.fixture(params=[8, 64])
def processes(request: pytest.FixtureRequest) -> Iterator[int]:
    with fake_processes(request.param):
        yield request.param
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", SFW_NAMES)
def test_the_formula_counts_the_traffic_of_a_step(name: str, processes: int) -> None:
    for shape in SHAPES:
        assert counted_traffic(name, shape, processes) == pytest.approx(OPTIMIZERS[name](shape, processes).received)


def test_rank_sends_little_more_than_its_directions() -> None:
    for shape in SHAPES:
        k = directions(shape)
        least = 2 * shape[1] * k * 63 / 64  # columns × directions, through a ring
        assert least < OPTIMIZERS["SFW, rank"](shape, 64).received < least + max(shape[0], 64 * k) * k + 64 * 8


def test_the_page_shows_the_tables_that_the_command_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, table in importlib.import_module("scale").tables().items():
        assert f"<!-- {name} -->\n{table}" in page, name
