"""benchmarks/reach.py: the table of docs/own-model.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.reach import CASES, row

PAGE = Path(__file__).parents[2] / "docs" / "own-model.md"


def test_the_page_has_all_networks() -> None:
    table = PAGE.read_text(encoding="utf-8").split("| network | least |")[1].split("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == list(CASES)


@pytest.mark.parametrize("name", ["detector with C2f blocks", "U-Net", "GAN generator", "CRNN"])
def test_the_page_says_what_is_reached(name: str) -> None:
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()
