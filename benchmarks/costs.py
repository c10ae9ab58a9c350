"""Compute what a step of an optimizer costs for one matrix: formulas, and the counting that checks them.

A matrix has m rows and n columns; r = min(m, n), c = max(m, n). The costs are floating-point operations of matrix
products (a product and a sum are two), numbers of state, and numbers that a process receives in a step beyond what
FSDP2 itself moves (parameters and gradients). P processes hold m/P rows each.

Sources: SFW: this package. Muon: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks, five
iterations of X ← aX + (bA + cA²)X with A = XXᵀ on the wide side. Shampoo: Gupta, Koren, Singer 2018, arXiv 1802.09568,
algorithm 1, L ← L + GGᵀ, R ← R + GᵀG, L^(−1/4)·G·R^(−1/4); a symmetric eigendecomposition takes about 9·n³ operations
(Golub, Van Loan, Matrix Computations, section 8.3) and comes every EIGEN_EVERY steps. QR of r×b with its orthogonal
factor: 4·r·b² − 4/3·b³ (section 5.2).

Counting computes nothing: tensors are on the meta device, and the processes belong to torch's fake group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.norms import Blocks, KSupport, Norm, Rows, Spectral

Shape = tuple[int, int]
SHARE = 0.1  # of filters, directions or entries in a vertex
EIGEN_EVERY = 100  # steps between two eigendecompositions of Shampoo


@dataclass(frozen=True)
class Cost:
    """The cost of one step for one matrix.

    Args:
        products: floating-point operations of matrix products.
        decompositions: operations of QR and eigendecompositions, which torch does not count.
        state: numbers kept from step to step.
        received: numbers a process receives from the others.
    """

    products: float
    decompositions: float
    state: float
    received: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.decompositions + other.decompositions,
            self.state + other.state,
            self.received + other.received,
        )


# --- formulas ---------------------------------------------------------------------------------------------------------


def sgd(shape: Shape, processes: int) -> Cost:
    return Cost(0, 0, math.prod(shape), 0)


def sfw_filters(shape: Shape, processes: int) -> Cost:
    """Receive one number per filter, padded to pieces of equal size, and two norms with their scales."""
    return Cost(0, 0, math.prod(shape), processes * (math.ceil(shape[0] / processes) + 1 + 2))


def sfw_blocks(shape: Shape, processes: int) -> Cost:
    """Receive norms of the direction, of the vertex and of θ − v, each with a scale."""
    return Cost(0, 0, math.prod(shape), processes * 6)


def sfw_entries(shape: Shape, processes: int) -> Cost:
    """Receive counts for the 31 bits of a magnitude (11, 10 and 10 at a time) through a ring, ties and three norms."""
    counts = 2**11 + 2**10 + 2**10
    return Cost(0, 0, math.prod(shape), ring(counts, processes) + processes * (1 + 6))


def sfw_rank(shape: Shape, processes: int) -> Cost:
    """Add up one power iteration with k directions (two products of b columns), its shift and a vertex of rank k."""
    m, n = shape
    r, c = min(shape), max(shape)
    k, b = directions(shape), columns_in_a_product(shape)
    products = 4 * m * n * b + 2 * m * n * k + 2 * c * k**2
    decompositions = 4 * r * k**2 - 4 / 3 * k**3 + k**3 / 3  # QR, and the inverse of a triangle
    norms = 4 if m > n else 3
    little = k if m > n else min(math.ceil(m / processes), k) * k
    received = ring(n * k, processes) + processes * (little + 2 * norms)
    return Cost(products, decompositions, m * n + c * k, received)


def muon(shape: Shape, processes: int) -> Cost:
    """Five Newton-Schulz iterations; every process needs the whole matrix, or one needs it and sends its result."""
    r, c = min(shape), max(shape)
    return Cost(5 * (4 * r**2 * c + 2 * r**3), 0, r * c, r * c)


def shampoo(shape: Shape, processes: int) -> Cost:
    """Two statistics, two roots, and the products with them; Shampoo needs the whole matrix, as Muon does."""
    m, n = shape
    products = 4 * (m**2 * n + m * n**2)
    return Cost(products, 9 * (m**3 + n**3) / EIGEN_EVERY, m * n + 2 * (m**2 + n**2), m * n)


OPTIMIZERS: dict[str, Callable[[Shape, int], Cost]] = {
    "SGD": sgd,
    "SFW, filters": sfw_filters,
    "SFW, entries": sfw_entries,
    "SFW, 2:4": sfw_blocks,
    "SFW, rank": sfw_rank,
    "Muon": muon,
    "Shampoo": shampoo,
}


def directions(shape: Shape) -> int:
    return max(1, round(SHARE * min(shape)))


def columns_in_a_product(shape: Shape) -> int:
    """Return the number of directions rounded up to a multiple of 16; zeros fill the other columns."""
    return 16 * math.ceil(directions(shape) / 16)


def ring(count: float, processes: int) -> float:
    """Return what a process receives when ``count`` numbers are summed over processes through a ring."""
    return 2 * count * (processes - 1) / processes


# --- counting ---------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Records each collective operation, and how many numbers this process gives to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        # c10d: in a gather the input follows the output; an operation in place takes its input in a list.
        if name.startswith("c10d."):
            given = args[1] if "gather" in name else args[0][0]
            self.sent.append(("gather" if "gather" in name else "reduce", given.numel()))
        elif name.startswith("_c10d_functional.") and "wait_tensor" not in name:
            self.sent.append(("gather" if "gather" in name else "reduce", args[0].numel()))
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """The numbers that this process gave."""
        return sum(count for _, count in self.sent)

    def received(self, processes: int) -> float:
        """Return the numbers that this process received: with its own in a gather, through a ring in a sum."""
        return sum(processes * n if kind == "gather" else ring(n, processes) for kind, n in self.sent)


class Passes(TorchDispatchMode):
    """Counts the numbers that operations read and write, without views and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            tensors = tree_leaves((args, kwargs, result))
            self.moved += sum(x.numel() for x in tensors if isinstance(x, Tensor))
        return result


def norm_of(name: str, shape: Shape) -> Norm:
    return {
        "SFW, filters": Rows(KSupport(max(1, round(SHARE * shape[0])))),
        "SFW, entries": KSupport(max(1, round(SHARE * math.prod(shape)))),
        "SFW, 2:4": Blocks(KSupport(2), 4),
        "SFW, rank": Spectral(KSupport(directions(shape))),
    }[name]


def optimizer_of(name: str, p: Tensor) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD([p], lr=0.1, momentum=0.9)
    if name == "Muon":
        return torch.optim.Muon([p], lr=0.1)
    shape = (p.shape[0], p.shape[1])
    return pliant.SFW([{"params": [p], "ball": pliant.NormBall(norm_of(name, shape), 1.0)}], lr=0.1)


def counted_step(name: str, shape: Shape) -> tuple[int, float, int]:
    """Return a step's products, passes over the matrix (numbers read or written per entry) and numbers of state."""
    p = nn.Parameter(torch.empty(shape, device="meta"))
    if name == "Shampoo":
        with FlopCounterMode(display=False) as products:
            products_of_shampoo(torch.empty(shape, device="meta"))
        return products.get_total_flops(), math.nan, 0
    opt = optimizer_of(name, p)
    for _ in range(2):  # the first step differs: it starts the state
        p.grad = torch.empty_like(p)
        with FlopCounterMode(display=False) as products, Passes() as passes:
            opt.step()
    state = sum(x.numel() for s in opt.state.values() for x in s.values() if isinstance(x, Tensor) and x.ndim)
    return products.get_total_flops(), passes.moved / p.numel(), state


def products_of_shampoo(g: Tensor) -> Tensor:
    left, right = g @ g.T, g.T @ g
    return left @ g @ right  # as large as their roots


def counted_traffic(name: str, shape: Shape, processes: int) -> float:
    """Return the numbers that one of the processes receives in a step; needs :func:`fake_processes`."""
    mesh = init_device_mesh("cpu", (processes,))

    def piece() -> DTensor:
        rows = min(math.ceil(shape[0] / processes), shape[0])
        local = torch.empty(rows, shape[1], device="meta")
        size, stride = torch.Size(shape), (shape[1], 1)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)

    p = nn.Parameter(piece())
    opt = optimizer_of(name, p)
    for _ in range(2):
        p.grad = piece()
        with Traffic() as traffic:
            opt.step()
    return traffic.received(processes)


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """Be the first of ``count`` processes; the others do not exist and send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
