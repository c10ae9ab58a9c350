"""Parts of the graphs; models and examples that no graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.compression import (
    FilterPruning,
)
from pliant.errors import BadInput
from pliant.exporting import graph as tracing
from pliant.exporting.folder import FORMATS
from pliant.exporting.graph import Portable, max_difference
from tests.exporting.test_exporting import Own, X, build, manifest

# --- what cannot be exported ------------------------------------------------------------------------------------------


def branches(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if x.sum() > 0 else x


def fixed(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).reshape(2, 2, 2)


def counts(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if len(x) == 2 else x


def pairs(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if len(x) % 2 else x


def singular(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.linalg.svdvals(layer(x))


def noisy(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) + torch.rand(())


def nothing(layer: nn.Module, x: Tensor) -> str:
    return "no tensor"


@pytest.mark.parametrize(
    ("forward", "formats", "message"),
    [
        (branches, ["pt2"], r"pt2 and onnx .* cannot trace the model: its forward decides by the values of a tensor"),
        (fixed, ["onnx"], r"resized to another batch, of shape \(3, 4\)|a batch of 2 only"),
        (counts, ["pt2"], r"pt2 and onnx .* a batch of 2 only"),
        (pairs, ["pt2"], r"pt2 and onnx .* batch"),
        (singular, ["onnx"], r"^onnx: the graph cannot be converted: .*svd"),
        (noisy, ["onnx"], r"^onnx: .*differs from the model by .* is its forward random"),
        (nothing, ["pt2"], r"returns no tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_that_a_format_cannot_hold_is_told_in_one_line_and_leaves_nothing(
    forward: Callable[..., Any], formats: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    with pytest.raises(BadInput, match=message) as caught:
        pliant.export(Own(forward), tmp_path / "new" / "out", torch.ones(2, 4), formats)
    assert len(str(caught.value).splitlines()) == 1
    assert not any(tmp_path.glob("new/*"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("forward", [branches, fixed])
def test_weights_alone_need_no_graph(forward: Callable[..., Any], tmp_path: Path) -> None:
    pliant.export(Own(forward), tmp_path / "out", torch.ones(2, 4), ["safetensors"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "export.json"}
    assert manifest(tmp_path / "out")["inputs"][0]["shape"] == [2, 4]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.ones(2, 3), r"cannot be called on the example of shape \(2, 3\)"),
        (torch.ones(()), "batch dimension"),
        (torch.ones(0, 4), "batch dimension"),
        ({"y": torch.ones(2, 4)}, "cannot be called"),
        ("x", "tensor or a tuple|tensor, a tuple"),
        ((), "tensor or a tuple|tensor, a tuple"),
    ],
)
def test_an_example_that_does_not_fit(example: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        pliant.export(nn.Linear(4, 2), tmp_path / "out", example)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_is_not_the_models(tmp_path: Path) -> None:
    plan = FilterPruning(0.5).plan(build(), X)
    with pytest.raises(BadInput, match="plan is for another model"):
        pliant.export(build(), tmp_path / "out", X, ["safetensors"], plan=plan)


@pytest.mark.parametrize(
    ("formats", "message"),
    [(["onx"], "did you mean 'onnx'"), ([], "at least one of"), ("onnx", "a list"), ([3], "unknown format")],
)
def test_formats_that_are_unknown(formats: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        pliant.export(nn.Linear(4, 2), tmp_path / "out", torch.ones(2, 4), formats)


def test_a_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PACKAGES", ("onnx", "package_that_nobody_has"))
    with pytest.raises(BadInput, match=r"package_that_nobody_has: pip install 'pliant\[export\]'"):
        pliant.export(nn.Linear(4, 2), tmp_path / "out", torch.ones(2, 4))
    pliant.export(nn.Linear(4, 2), tmp_path / "out", torch.ones(2, 4), ["safetensors", "pt2"])


# --- the parts --------------------------------------------------------------------------------------------------------


def test_difference_by_hand() -> None:
    inf, nan = torch.inf, torch.nan
    assert max_difference(torch.tensor([1.0, -3.0]), torch.tensor([1.5, -3.0])) == (0.5, 3.0)
    assert max_difference(torch.tensor([inf, nan, 1.0]), torch.tensor([inf, nan, 1.0])) == (0.0, 1.0)
    assert max_difference(torch.tensor([nan]), torch.tensor([1.0]))[0] == inf
    assert max_difference(torch.tensor([inf]), torch.tensor([-inf]))[0] == inf
    assert max_difference(torch.tensor([True, False]), torch.tensor([True, True])) == (1.0, 1.0)
    assert max_difference(torch.empty(0), torch.empty(0)) == (0.0, 0.0)


def test_a_batch_of_one_is_no_constant() -> None:
    portable = Portable(nn.Linear(4, 2), torch.ones(1, 4))
    assert portable.batch == 2
    for batch in (1, 2, 7):
        assert portable.program.module()(torch.ones(batch, 4)).shape == (batch, 2)


def test_formats_are_those_of_the_documentation() -> None:
    assert FORMATS == ("safetensors", "pt2", "onnx")


def test_a_failed_export_leaves_the_former_one(tmp_path: Path) -> None:
    pliant.export(nn.Linear(4, 2), tmp_path / "out", torch.ones(2, 4), ["safetensors"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(BadInput):
        pliant.export(Own(branches), tmp_path / "out", torch.ones(2, 4), ["safetensors", "pt2"], overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
