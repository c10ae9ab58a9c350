"""The norms against independent solvers: linear programs, enumerated supports, cone programs.

Each ball is written down once more, straight from its definition, and handed to a solver that knows nothing of
sorting, thresholds or closed forms.
"""

import math
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from pliant.norms import Blocks, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm

Constraints = list[Any]
# cvxpy learns the shape of a sum by summing memory that nobody has written to.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in reduce:RuntimeWarning")


def example(shape: tuple[int, ...], seed: int) -> Tensor:
    """Gaussian entries; every third one with ties and zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.round() if seed % 3 == 2 else x


def supports(n: int, k: int) -> Iterator[list[int]]:
    return (list(s) for s in combinations(range(n), k))


# --- linear programs --------------------------------------------------------------------------------------------------


def atoms(norm: Norm, n: int) -> np.ndarray[Any, Any]:
    """Return the extreme points of a polyhedral unit ball, one a column."""
    match norm:
        case Lp(p) if p == 1:
            return np.concatenate([np.eye(n), -np.eye(n)], axis=1)
        case Lp(p) if p == math.inf:
            return np.array(list(product([-1.0, 1.0], repeat=n))).T
        case KSparse(k):
            points = np.zeros((n, math.comb(n, k) * 2**k))
            for column, (support, signs) in enumerate(product(supports(n, k), product([-1.0, 1.0], repeat=k))):
                points[support, column] = signs
            return points
    raise AssertionError(f"{norm} is not polyhedral")


POLYHEDRAL = [Lp(1), Lp(math.inf), *(KSparse(k) for k in range(1, 7))]
over_polyhedra = pytest.mark.parametrize("norm", POLYHEDRAL, ids=str)


@over_polyhedra
def test_norm_is_the_gauge_of_the_hull_of_its_atoms(norm: Norm) -> None:
    points = atoms(norm, 6)
    for seed in range(6):
        x = example((6,), seed)
        solution = linprog(np.ones(points.shape[1]), A_eq=points, b_eq=x.numpy(), bounds=(0, None))
        assert norm(x).item() == pytest.approx(solution.fun, abs=1e-9)


@over_polyhedra
def test_oracle_and_dual_solve_the_linear_program_over_the_ball(norm: Lp | KSparse) -> None:
    # Inequalities this time, not vertices: minimise ⟨g, v⟩ over −t <= v <= t, t <= 1, Σt <= total.
    n = 6
    total = norm.k if isinstance(norm, KSparse) else {1: 1, math.inf: n}[norm.p]
    rows = np.block([[np.eye(n), -np.eye(n)], [-np.eye(n), -np.eye(n)], [np.zeros((1, n)), np.ones((1, n))]])
    limits = np.concatenate([np.zeros(2 * n), [total]])
    for seed in range(6):
        g = example((n,), seed)
        cost = np.concatenate([g.numpy(), np.zeros(n)])
        solution = linprog(cost, A_ub=rows, b_ub=limits, bounds=[(None, None)] * n + [(0, 1)] * n)
        assert norm.dual(g).item() == pytest.approx(-solution.fun, abs=1e-9)
        v = norm.lmo(g)
        assert torch.dot(g, v).item() == pytest.approx(solution.fun, abs=1e-9)
        assert v.abs().max() <= 1
        assert v.abs().sum() <= total


# --- enumerated supports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 8))
def test_k_support_oracle_beats_every_support(k: int) -> None:
    for seed in range(6):
        g = example((7,), seed)
        best = max(g[s].norm().item() for s in supports(7, k))
        v = KSupport(k).lmo(g)
        assert KSupport(k).dual(g).item() == pytest.approx(best, rel=1e-12)
        assert torch.dot(g, v).item() == pytest.approx(-best, rel=1e-12)
        assert v.count_nonzero() <= k
        assert v.norm().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("k", range(1, 6))
def test_filter_oracle_beats_every_choice_of_filters(k: int) -> None:
    for seed in range(6):
        g = example((5, 3, 2), seed)
        best = max(g[s].norm().item() for s in supports(5, k))
        v = Rows(KSupport(k)).lmo(g)
        assert Rows(KSupport(k)).dual(g).item() == pytest.approx(best, rel=1e-12)
        assert torch.sum(g * v).item() == pytest.approx(-best, rel=1e-12)
        assert v.flatten(1).any(dim=1).sum() <= k
        best = max(sum(g[i].norm().item() for i in s) for s in supports(5, k))
        assert Rows(KSparse(k)).dual(g).item() == pytest.approx(best, rel=1e-12)
        assert torch.sum(g * Rows(KSparse(k)).lmo(g)).item() == pytest.approx(-best, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_block_oracle_beats_every_pattern(n: int) -> None:
    # All patterns of the whole tensor at once: n entries in each of its three blocks of 4.
    norm, blocks = Blocks(KSupport(n), 4), [range(b, b + 4) for b in (0, 4, 8)]
    patterns = [sum(choice, ()) for choice in product(*(list(combinations(b, n)) for b in blocks))]
    for seed in range(3):
        g = example((1, 12), seed)
        best = max(g[0, list(pattern)].norm().item() for pattern in patterns)
        v = norm.lmo(g)
        assert norm.dual(g).item() == pytest.approx(best, rel=1e-12)
        assert torch.sum(g * v).item() == pytest.approx(-best, rel=1e-12)
        assert v.norm().item() == pytest.approx(1, rel=1e-12)
        assert (v.reshape(3, 4).count_nonzero(dim=1) <= n).all()


# --- cone programs ----------------------------------------------------------------------------------------------------


def at_most(norm: Norm, x: Any, bound: Any) -> Constraints:
    """Return cone constraints that say norm(x) <= bound, for a vector or a matrix x and an affine bound."""
    match norm:
        case Lp(p):
            return [cp.pnorm(cp.vec(x, order="C"), p) <= bound]
        case KSparse():
            weights = cp.Variable(atoms(norm, x.size).shape[1], nonneg=True)
            return [cp.vec(x, order="C") == atoms(norm, x.size) @ weights, cp.sum(weights) <= bound]
        case KSupport(k):
            # The gauge of the hull: x is a sum of vectors with k entries, whose lengths sum to the norm.
            parts = [(np.eye(x.size)[:, s], cp.Variable(k)) for s in supports(x.size, k)]
            total = sum(columns @ part for columns, part in parts)
            return [cp.vec(x, order="C") == total, sum(cp.norm(part) for _, part in parts) <= bound]
        case Rows(inner):
            lengths = cp.Variable(x.shape[0])
            return [cp.norm(x, axis=1) <= lengths, *at_most(inner, lengths, bound)]
        case Blocks(inner, size):
            blocks = [cp.vec(x, order="C")[i : i + size] for i in range(0, x.size, size)]
            norms = cp.Variable(len(blocks))
            each = [c for b, block in enumerate(blocks) for c in at_most(inner, block, norms[b])]
            return [*each, cp.norm(norms) <= bound]
        case Spectral(inner):
            return _spectrum_at_most(inner, x, bound)
    raise AssertionError(f"no constraints for {norm}")


def _spectrum_at_most(inner: VectorNorm, x: Any, bound: Any) -> Constraints:
    match inner:
        case Lp(p) if p == 1:
            return [cp.normNuc(x) <= bound]
        case Lp(p) if p == 2:
            return [cp.norm(x, "fro") <= bound]
        case Lp(p) if p == math.inf:
            return [cp.sigma_max(x) <= bound]
        case KSparse(k):
            return [cp.sigma_max(x) <= bound, cp.normNuc(x) <= k * bound]
        case KSupport(k):
            # ‖X‖² = min tr(XᵀΘ⁻¹X) over 0 <= Θ <= 1, tr Θ <= k (McDonald, Pontil, Stamos 2014); here Θ·bound.
            weight = cp.Variable((x.shape[0], x.shape[0]), PSD=True)
            return [
                cp.matrix_frac(x, weight) <= bound,
                bound * np.eye(x.shape[0]) - weight >> 0,
                cp.trace(weight) <= k * bound,
            ]
    raise AssertionError(f"no constraints for the spectral {inner}")


CONES: list[tuple[Norm, tuple[int, ...]]] = [
    *((Lp(p), (6,)) for p in (1, 1.5, 2, 3, math.inf)),
    *((KSparse(k), (5,)) for k in (1, 2, 3)),
    *((KSupport(k), (6,)) for k in (1, 2, 3, 5, 6)),
    *((Rows(inner), (5, 3)) for inner in (Lp(1), Lp(math.inf), KSparse(2), KSupport(2), KSupport(3))),
    *((Blocks(inner, 4), (2, 8)) for inner in (Lp(1), KSupport(1), KSupport(2), KSupport(3), KSparse(2))),
    *((Spectral(inner), (4, 3)) for inner in (Lp(1), Lp(2), Lp(math.inf), KSparse(2), KSupport(1), KSupport(2))),
    (Spectral(KSupport(3)), (5, 4)),
]
every_cone = pytest.mark.parametrize(("norm", "shape"), CONES, ids=str)


def solve(objective: Any, constraints: Constraints) -> float:
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver=cp.CLARABEL)
    assert problem.status == cp.OPTIMAL
    return float(problem.value)


@every_cone
def test_norm_is_the_least_bound(norm: Norm, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        x, bound = example(shape, seed), cp.Variable()
        assert norm(x).item() == pytest.approx(solve(bound, at_most(norm, cp.Constant(x.numpy()), bound)), rel=1e-6)


@every_cone
def test_oracle_and_dual_solve_the_cone_program(norm: Norm, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        g, v = example(shape, seed), cp.Variable(shape)
        least = solve(cp.sum(cp.multiply(g.numpy(), v)), at_most(norm, v, 1.0))
        assert norm.dual(g).item() == pytest.approx(-least, rel=1e-6)
        assert torch.sum(g * norm.lmo(g)).item() == pytest.approx(least, rel=1e-6)


PROJECTED = [(n, s) for n, s in CONES if n not in (Lp(1.5), Lp(3), Blocks(KSparse(2), 4), Blocks(Lp(1), 4))]


@pytest.mark.parametrize(("norm", "shape"), PROJECTED, ids=str)
def test_projection_solves_the_cone_program(norm: Norm, shape: tuple[int, ...]) -> None:
    for seed, share in enumerate([0.2, 0.6, 0.9]):
        x, v = example(shape, seed), cp.Variable(shape)
        radius = share * norm(x).item()
        p = norm.project(x, radius)
        solve(cp.sum_squares(v - x.numpy()), at_most(norm, v, radius))
        torch.testing.assert_close(p, torch.from_numpy(v.value), rtol=0, atol=1e-4)
        # The optimal value is known better than the point.
        best = (torch.from_numpy(v.value) - x).norm().item()
        assert (p - x).norm().item() == pytest.approx(best, rel=1e-6)
