"""Norms of other packages: the balls that they make, and what is said of broken ones."""

import json
import re
import sys
from pathlib import Path

import pytest

import pliant
from pliant.errors import BadInput
from pliant.experiments.training.settings import Settings
from tests.experiments.test_own_methods import QUICK, config_of, write
from tests.experiments.test_own_methods import place as place
from tests.test_extensions import install

NORMS = """
from dataclasses import dataclass
import torch
from pliant.norms import KNorm, VectorNorm

@dataclass(frozen=True)
class Largest{n}(KNorm):
    def norm_of(self, a):
        return torch.maximum(a.amax(dim=-1), a.sum(dim=-1) / self.k)
    def dual_of(self, a):
        return a.topk(self.k, dim=-1).values.sum(dim=-1)
    def align(self, a):
        return torch.zeros_like(a).scatter(-1, a.topk(self.k, dim=-1).indices, 1.0) * (a > 0)
    def diameter_of(self, n):
        return 2 * self.k**0.5

@dataclass(frozen=True)
class Round{n}(VectorNorm):
    def norm_of(self, a):
        return a.square().sum(dim=-1).sqrt()
    def dual_of(self, a):
        return self.norm_of(a)
    def align(self, a):
        return a / self.norm_of(a)[..., None].clamp_min(1e-30)
    def diameter_of(self, n):
        return 2.0

@dataclass(frozen=True)
class Scaled{n}(Round{n}):
    scale: float
"""


@pytest.mark.parametrize("method", ["sfw-filters", "sfw-rank", "sfw-weights", "sfw-nm"])
def test_a_norm_of_another_package_makes_the_balls(method: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    unique = method.replace("-", "_")
    entries = {f"largest-{method}": f"norms_{unique}:Largest{unique}"}
    install(place, f"norms_{unique}", entries, NORMS.replace("{n}", unique), "pliant.norms")
    options = {**QUICK, "width": 0.25, "method": method, "deterministic": True}
    named = pliant.train(**options, vertices=f"norms_{unique}:Largest{unique}", out="named")
    installed = pliant.train(**options, vertices=f"largest-{method}", out="installed")
    assert config_of(named)["vertices"] == f"norms_{unique}:Largest{unique}"
    assert (named / "model.safetensors").read_bytes() == (installed / "model.safetensors").read_bytes()
    if method == "sfw-weights":  # its ball and its vertices are those of "sparse"
        ours = pliant.train(**options, vertices="sparse", out="ours")
        log = [json.loads(line)["loss"] for line in (ours / "train.jsonl").read_text().splitlines()]
        own = [json.loads(line)["loss"] for line in (named / "train.jsonl").read_text().splitlines()]
        assert own == pytest.approx(log, rel=1e-3)
    round_ = pliant.train(**options, vertices=f"norms_{unique}:Round{unique}", out="round")
    config = config_of(round_)
    assert (config["k"], config["k_start"]) == (None, None)
    assert pliant.train(out="round", resume=True) == round_
    with pytest.raises(BadInput, match=rf"--k is for norms that have a k, unlike --vertices norms_{unique}:Round"):
        pliant.train(**options, vertices=f"norms_{unique}:Round{unique}", k=0.5, out="other")
    with pytest.raises(BadInput, match=r"--vertices: norm .*Scaled.* can be made with k alone, but needs scale"):
        pliant.train(**options, vertices=f"norms_{unique}:Scaled{unique}", out="other")
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("supports", "unknown vertices 'supports': did you mean 'support'"),
        ("json:loads", "--vertices: norm 'json:loads': expected a subclass of pliant.Norm"),
        (
            "pliant:Rows",
            "--vertices: norm 'pliant:Rows': expected a norm of vectors, a subclass of VectorNorm, got",
        ),
        ("nowhere_at_all:Norm", "--vertices: norm 'nowhere_at_all:Norm': import failed"),
    ],
)
def test_vertices_that_are_no_norm_are_named(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        Settings(method="sfw-rank", vertices=name)


def test_a_run_whose_norm_is_gone_is_not_damaged() -> None:
    write("my_norm", "from pliant.norms import KSupport\nclass Vanishing(KSupport): pass\n")
    pliant.train(**QUICK, method="sfw-weights", vertices="my_norm:Vanishing", out="run")
    del sys.modules["my_norm"]
    Path("my_norm.py").unlink()
    with pytest.raises(BadInput, match=r"^run/config\.yaml: --vertices: norm 'my_norm:Vanishing': import failed"):
        pliant.train(out="run", resume=True)
