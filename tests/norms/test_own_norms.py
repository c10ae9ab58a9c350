"""A norm from outside: found by its name in specs, held by presets and lifts, annealed, stepped with."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.constraints import Preset
from pliant.errors import BadInput
from pliant.norms import KNorm, NormBall, Rows, Spectral, VectorNorm
from tests.test_extensions import install


@dataclass(frozen=True)
class Flat(VectorNorm):
    """The norm of docs/extending.md, whose vertices have as many entries as the direction asks for."""

    def norm_of(self, a: Tensor) -> Tensor:
        return (self._roots(a).diff(prepend=a.new_zeros(1)) * a.sort(dim=-1, descending=True).values).sum(dim=-1)

    def dual_of(self, a: Tensor) -> Tensor:
        return (a.sort(dim=-1, descending=True).values.cumsum(dim=-1) / self._roots(a)).amax(dim=-1)

    def align(self, a: Tensor) -> Tensor:
        z, order = a.sort(dim=-1, descending=True, stable=True)
        roots = self._roots(a)
        last = (z.cumsum(dim=-1) / roots).argmax(dim=-1, keepdim=True)
        flat = (z > 0) * (torch.arange(len(roots), device=a.device) <= last) / roots[last]
        return torch.zeros_like(a).scatter(-1, order, flat)

    def diameter_of(self, n: int) -> float:
        return 2.0

    def _roots(self, a: Tensor) -> Tensor:
        return torch.arange(1, a.shape[-1] + 1, dtype=a.dtype, device=a.device).sqrt()


@dataclass(frozen=True)
class Largest(KNorm):
    """KSparse's ball, written by somebody else."""

    def norm_of(self, a: Tensor) -> Tensor:
        return torch.maximum(a.amax(dim=-1), a.sum(dim=-1) / self.k)

    def dual_of(self, a: Tensor) -> Tensor:
        return a.topk(self.k, dim=-1).values.sum(dim=-1)

    def align(self, a: Tensor) -> Tensor:
        return torch.zeros_like(a).scatter(-1, a.topk(self.k, dim=-1).indices, 1.0) * (a > 0)

    def diameter_of(self, n: int) -> float:
        return 2 * self.k**0.5


def trained(preset: Preset, steps: int = 6) -> tuple[pliant.SFW, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 24))
    optimizer = pliant.SFW(pliant.constrain(model, [("*.weight", preset)], default=None), lr=0.1)
    schedule = pliant.KSchedule(optimizer, 1.0, steps=steps) if "k=" in str(optimizer.param_groups[0]["ball"]) else None
    x = torch.randn(8, 40)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if schedule:
            schedule.step()
    return optimizer, [model[0].weight.detach(), model[2].weight.detach()]


@pytest.mark.parametrize("preset", [pliant.filters, pliant.rank, pliant.weights, pliant.semi_structured])
def test_presets_hold_a_norm_without_k(preset) -> None:
    made = preset(2, 4, 3.0, vertices=Flat) if preset is pliant.semi_structured else preset(0.5, 3.0, vertices=Flat)
    optimizer, weights = trained(made)
    constrained = [group for group in optimizer.param_groups if group["ball"]]
    for group in constrained:
        ball = NormBall.from_spec(group["ball"])
        assert getattr(ball.norm, "inner", ball.norm) == Flat()
        assert ball.contains(group["params"][0])
    assert constrained
    assert all(w.isfinite().all() for w in weights)


@pytest.mark.parametrize("preset", [pliant.filters, pliant.weights])
def test_an_equal_norm_of_ones_own_trains_the_same_network(preset) -> None:
    _, own = trained(preset(0.2, 3.0, vertices=Largest))
    _, expected = trained(preset(0.2, 3.0, vertices="sparse"))
    for w, e in zip(own, expected, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-4, atol=1e-5)


def test_low_rank_by_a_norm_of_ones_own_takes_the_exact_vertices() -> None:
    # Ours of low rank are approximate: what is kept of the last step's directions is known for our norms only.
    optimizer, _ = trained(pliant.rank(2, 3.0, vertices=Largest))
    assert all("basis" not in state for state in optimizer.state.values())


def test_a_norm_owns_its_k() -> None:
    assert Rows(Largest(3)).with_k(2) == Rows(Largest(2))
    assert (Rows(Largest(3)).k, Rows(Flat()).k, Largest(3).k) == (3, None, 3)
    assert Spectral(Largest(3)).rank_of_vertices == 3
    assert Spectral(Flat()).rank_of_vertices is None
    with pytest.raises(BadInput, match="has no k"):
        Rows(Flat()).with_k(2)


def test_the_name_of_a_class_is_its_own() -> None:
    with pytest.raises(TypeError, match=r"a norm named Rows exists in pliant\.norms\.lifts"):
        type("Rows", (VectorNorm,), {"__module__": "elsewhere"})


@pytest.mark.parametrize("value", [3, "flat", nn.Linear, VectorNorm])
def test_what_is_no_norm_cannot_be_vertices(value: object) -> None:
    with pytest.raises(BadInput, match="vertices"):
        pliant.filters(0.5, vertices=value)  # type: ignore[arg-type]


def test_a_spec_finds_the_norm_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = "from pliant.norms import Lp\n\nclass Mine(Lp):\n    pass\n"
    install(tmp_path, "package_with_a_norm", {"mine": "package_with_a_norm:Mine"}, code, "pliant.norms")
    ball = NormBall.from_spec({"norm": {"norm": "Rows", "inner": {"norm": "Mine", "p": 2.0}}, "radius": 1.0})
    assert type(ball.norm.inner).__name__ == "Mine"
    assert NormBall.from_spec(ball.to_spec()) == ball


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("Broken = 3", "expected a subclass of pliant.Norm, got 3"),
        (
            "class R:\n    def __repr__(self): raise ValueError\nBroken = R()",
            "expected a subclass of pliant.Norm, got an object of the class R",
        ),
        (
            "from pliant.norms import VectorNorm as V\nclass Broken(V): pass",
            "Broken does not define align, diameter_of",
        ),
    ],
)
def test_a_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pliant.Norm, "known", dict(pliant.Norm.known))
    package = f"broken_norms_{abs(hash(code))}"
    install(tmp_path, package, {"broken": f"{package}:Broken"}, code, "pliant.norms")
    with pytest.raises(BadInput, match=rf"norm 'broken' of the package {package}.*{reason}"):
        NormBall.from_spec({"norm": {"norm": "Broken"}, "radius": 1.0})
    assert NormBall.from_spec({"norm": {"norm": "Lp", "p": 2.0}, "radius": 1.0}).radius == 1
    with pytest.raises(ValueError, match="'norm' as one of Lp, KSparse, KSupport, Rows"):
        NormBall.from_spec({"norm": {"norm": "Nobody"}, "radius": 1.0})
