"""The reasons why layers are left alone: the documentation has all of them, and each says what to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, Int8, LowRank, Magnitude, SemiStructured
from pliant.structure import ADVICE, advice, advised
from tests.structure.cutting import IMAGES, Body, conv, pooled

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "src/pliant/structure").glob("*.py"), *(ROOT / "src/pliant/compression").glob("*.py")]


def test_the_page_has_the_table_of_the_code() -> None:
    page = (ROOT / "docs/own-model.md").read_text(encoding="utf-8")
    table = page.split("| reason | what to do |\n|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == [f"| {part} | {text} |" for part, text in ADVICE]


@pytest.mark.parametrize("part", [part for part, _ in ADVICE])
def test_each_row_is_a_reason_that_the_code_gives(part: str) -> None:
    texts: list[str] = []
    for path in SOURCES:
        if path.name != "reasons.py":
            texts += [
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200
            ]
    assert any(part in text for text in texts)


def test_a_reason_says_what_to_do_unless_that_is_nothing() -> None:
    assert advised("its channels are outputs of the model") == "its channels are outputs of the model"
    assert advised("is not reached through its forward").endswith(
        " (call the layer, self.layer(x), not F.linear(x, self.layer.weight))"
    )
    assert advised("by a reason of a plan from elsewhere") == "by a reason of a plan from elsewhere"


class Reshaped(Body):
    def middle(self, x: Tensor) -> Tensor:
        x = super().middle(x)
        return x.view(len(x), 8, 64).softmax(1).view_as(x)


class Fixed(Body):
    def middle(self, x: Tensor) -> Tensor:
        return super().middle(x).reshape(-1, 8, 8, 8)


class Grouped(Body):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Conv2d(8, 12, 3, padding=1, groups=2), conv(12, 12)

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.c(self.b(self.middle(x))))


class Normed(Body):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.GroupNorm(1, 8)


class Tied(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) @ self.head.weight


MODELS = [Body, Reshaped, Fixed, Grouped, Normed, Tied]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "compressor",
    [FilterPruning(0.5), LowRank(0.5), Int8(), Magnitude(0.5), SemiStructured()],
    ids=lambda c: type(c).__name__,
)
def test_every_reason_is_in_the_table(kind: type[nn.Module], compressor: FilterPruning) -> None:
    torch.manual_seed(0)
    plan = compressor.plan(kind(), IMAGES)
    assert all(advice(reason) is not None for _, reason in plan.refused), plan.refused
    assert all("\n" not in reason for _, reason in plan.refused)
