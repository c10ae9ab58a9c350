"""Print the tables of docs/scale.md: what a step costs from a million to seven billion parameters, on paper.

    python benchmarks/scale.py

All numbers come from the formulas of costs.py; tests/benchmarks/test_scale.py checks the formulas against counting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import add

from costs import OPTIMIZERS, SHARE, Cost, Shape, counted_step
from notes import table

PROCESSES = 64


@dataclass(frozen=True)
class Model:
    """A network shaped like Llama: attention of four square matrices, a gated MLP of three, two tables of words."""

    name: str
    layers: int
    width: int
    inner: int
    words: int

    def matrices(self) -> list[Shape]:
        """Return the matrices that have a ball: all but the tables of words, which take the step of SGD."""
        square, out, back = (self.width, self.width), (self.inner, self.width), (self.width, self.inner)
        return self.layers * [*4 * [square], out, out, back]

    def parameters(self) -> int:
        return sum(map(math.prod, self.matrices())) + 2 * self.words * self.width


# The last is Llama 7B (Touvron et al. 2023, arXiv 2302.13971, table 2).
MODELS = [
    Model("1M", 4, 128, 344, 1000),
    Model("10M", 6, 320, 864, 4000),
    Model("100M", 12, 768, 2048, 10_000),
    Model("1B", 16, 2048, 5632, 32_000),
    Model("7B", 32, 4096, 11_008, 32_000),
]


def cost(name: str, model: Model) -> Cost:
    return reduce(add, (OPTIMIZERS[name](shape, PROCESSES) for shape in model.matrices()))


def short(value: float) -> str:
    """Return a number with three digits and a power of thousand."""
    if value < 1:
        return "0" if value == 0 else f"{value:.2g}"
    power = min(5, int(math.log10(value) // 3))
    return f"{value / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P'][power]}"


def shapes() -> str:
    rows = [
        [m.name, str(m.layers), str(m.width), str(m.inner), str(m.words), f"{m.parameters() / 1e6:,.1f}"]
        for m in MODELS
    ]
    return table(["model", "layers", "width", "inner width", "words", "parameters, millions"], rows)


def compute() -> str:
    """Return floating-point operations, and how many tokens of training cost the same (6 per parameter and token)."""
    rows = []
    for name in OPTIMIZERS:
        costs = [cost(name, m) for m in MODELS]
        total = [c.products + c.decompositions for c in costs]
        tokens = [t / (6 * m.parameters()) for t, m in zip(total, MODELS, strict=True)]
        rows.append(
            [name, *(f"{short(t)} ({short(round(k))})" if t else "0" for t, k in zip(total, tokens, strict=True))]
        )
    return table(["operations (tokens)", *(m.name for m in MODELS)], rows)


def memory() -> str:
    """Return the numbers of state per parameter with a ball."""
    rows = []
    for name in OPTIMIZERS:
        states = [cost(name, m).state / sum(map(math.prod, m.matrices())) for m in MODELS]
        rows.append([name, *(f"{s:.2f}" for s in states)])
    return table(["numbers of state per parameter", *(m.name for m in MODELS)], rows)


def traffic() -> str:
    """Return the numbers a process receives, and their share of what FSDP2 moves: parameters twice, gradients once."""
    rows = []
    for name in OPTIMIZERS:
        received = [cost(name, m).received for m in MODELS]
        shares = [r / (3 * m.parameters()) for r, m in zip(received, MODELS, strict=True)]
        rows.append(
            [name, *(f"{short(r)} ({100 * s:.2g} %)" if r else "0" for r, s in zip(received, shares, strict=True))]
        )
    return table(["numbers received (share)", *(m.name for m in MODELS)], rows)


def passes() -> str:
    rows = []
    for name in OPTIMIZERS:
        if name != "Shampoo":
            rows.append([name, f"{counted_step(name, (4096, 4096))[1]:.1f}"])
    return table(["optimizer", "numbers read or written per entry"], rows)


def tables() -> dict[str, str]:
    """Return the tables by the names that mark their places in docs/scale.md."""
    return {"shapes": shapes(), "compute": compute(), "memory": memory(), "traffic": traffic(), "passes": passes()}


if __name__ == "__main__":
    print(f"{PROCESSES} processes; k = {SHARE:.0%}\n")
    for name, text in tables().items():
        print(f"<!-- {name} -->\n{text}")
