"""The tables of docs/models.md: what the command makes is on the page, and says the truth."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
COSTS = 4  # the first columns: the network, parameters, MACs, bytes


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("models")


def rows(text: str) -> dict[str, dict[str, list[str]]]:
    """Return network → row's name → cells of all tables in a text."""
    found: dict[str, dict[str, list[str]]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
        found[section.splitlines()[0]] = {line[0]: line for line in cells[2:]}
    return found


def test_the_quick_tables_are_exact_and_stand_on_the_page(
    models: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    models.main(["--quick"])
    made, shown = rows(capsys.readouterr().out), rows(PAGE.read_text(encoding="utf-8"))
    assert set(made) == set(models.QUICK)
    for name, table in made.items():
        assert set(table) == {"dense", *models.COMPRESSORS} - ({"heads"} if name == "resnet" else set())
        for kind, row in table.items():
            assert row[:COSTS] == shown[name][kind][:COSTS], (name, kind)
            assert kind == "dense" or float(row[COSTS]) < 1e-12  # 2e-15 measured; float32 would give 1e-7


def test_the_page_has_every_network_and_compressor_or_the_reason(models: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = rows(page)
    assert list(shown) == list(models.CASES)
    for name, table in shown.items():
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        for kind in models.COMPRESSORS:
            assert (kind in table) != (f"* {kind} was refused:" in section), (name, kind)
        for row in table.values():
            assert len(row) == COSTS + 1 + 4
            assert "skipped" not in " ".join(row)


def test_a_wrong_network_differs_from_its_twin(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import pliant

    case = models.CASES["resnet"]
    model = models.drawn(case)
    replay = pliant.replay

    def spoilt(network: torch.nn.Module, plan: pliant.Plan) -> torch.nn.Module:
        small = replay(network, plan)
        with torch.no_grad():
            small.get_parameter("classifier.1.bias")[0] += 1e-3
        return small

    plan = models.COMPRESSORS["filters"].plan(model, case.example)
    assert models.twin_difference(model, plan, case.example) < 1e-12
    monkeypatch.setattr(pliant, "replay", spoilt)
    assert models.twin_difference(model, plan, case.example) > 1e-6
