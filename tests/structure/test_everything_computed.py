"""Results in objects, on modules, behind a detach, or dropped: what is computed counts, not what has a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import FilterPruning, compress, reestimate_batchnorm
from pliant.errors import BadInput
from pliant.exporting import export
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES, Body, cut, pooled, removable


@dataclass
class Scores:
    logits: Tensor
    loss: Tensor | None = None


class Boxes:
    __slots__ = ("scores", "unset")

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, Any]


class InDataclass(Body):
    def forward(self, x: Tensor) -> Any:
        return Scores(self.head(self.features(x)))


class InObject(Body):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.features(x)), name="plain", parent=self)


class InSlots(Body):
    def forward(self, x: Tensor) -> Any:
        return [Boxes(self.head(self.features(x)))]


class Nested(Body):
    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        return Pair(self.head(h), {"more": {"deep": (Scores(self.side(h)),)}})


class Distribution(Body):
    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Normal(self.head(self.features(x)), 1.0)


class OnSelf(Body):
    """Nothing is returned."""

    def forward(self, x: Tensor) -> Any:
        self.logits = self.head(self.features(x))


@pytest.mark.parametrize("kind", [InDataclass, InObject, InSlots, Nested, Distribution, OnSelf])
def test_results_in_any_object_count(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    small, plan = cut(kind())
    assert removable(plan) == {"a", "b"}
    assert "head" in dict(plan.refused)
    assert small.get_submodule("head").out_features == 5


class HiddenInObject(Body):
    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        return SimpleNamespace(parts=[Scores(self.head(h), h)])


class HiddenOnSelf(Body):
    def forward(self, x: Tensor) -> Any:
        self.hidden = {"layers": [self.features(x)]}
        return self.head(self.hidden["layers"][0])


class HiddenOnChild(Body):
    def forward(self, x: Tensor) -> Any:
        self.head._last = self.features(x)
        return self.head(self.head._last)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (HiddenInObject, "outputs of the model"),
        (HiddenOnSelf, "kept as 'hidden'"),
        (HiddenOnChild, "kept as 'head._last'"),
    ],
)
def test_features_that_are_kept_stay_as_they_are(kind: type[nn.Module], reason: str) -> None:
    _, plan = cut(kind())
    assert removable(plan) == {"a"}
    assert reason in dict(plan.refused)["b"]


class NoGrad(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = self.features(x)
        return self.head(h)


class Decorated(Body):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class Inference(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            h = self.features(x)
        return self.head(h.clone())


class InferenceDecorated(Body):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class Detached(Body):
    def forward(self, x: Tensor) -> Any:
        return self.head(pooled(self.b(self.middle(x).detach()).data))


class SwitchedOff(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(False):
            h = self.middle(x)
        return self.head(pooled(self.b(h)))


class Classes(Body):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x)).argmax(1)


class Frozen(Body):
    """A teacher is frozen, and its result detached."""

    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        teacher = self.side(self.features(x)).detach().softmax(1)
        return self.head(self.features(x)) + teacher


@pytest.mark.parametrize(
    "kind", [NoGrad, Decorated, Inference, InferenceDecorated, Detached, SwitchedOff, Classes, Frozen]
)
def test_layers_without_a_gradient_are_cut(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    enter = torch.inference_mode.__enter__
    _, plan = cut(model)
    assert removable(plan) == {"a", "b"}
    assert torch.inference_mode.__enter__ is enter


class Clipped(Body):
    """A forward that changes weights, which only works without gradients."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.head.weight.clamp_(-1, 1)
        return self.head(self.features(x))


def test_a_forward_that_changes_weights_is_traced_as_it_is() -> None:
    assert {group.name for group in coupled_channels(Clipped(), IMAGES).groups} == {"a", "b"}


class Dropped(Body):
    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        self.side(h).softmax(1)
        return self.head(h)


class DroppedFirst(Body):
    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        return [self.head(h), self.side(h)][0]


class DroppedByLoss(Body):
    """Only a number of it is kept."""

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        self.penalty = float(self.side(h).detach().square().mean())
        return self.head(h)


class Stored(Body):
    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        self.aux = self.side(h)
        return self.head(h)


class StoredInList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        self.losses = [self.side(h).mean()]
        return self.head(h)


@pytest.mark.parametrize("kind", [Dropped, DroppedFirst, DroppedByLoss, Stored, StoredInList])
def test_heads_whose_result_is_not_returned_are_cut_along(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    small, plan = cut(kind())
    assert removable(plan) == {"a", "b"}
    assert small.get_submodule("side").in_features == small.get_submodule("b").out_channels < 12
    assert "its outputs are dropped" in dict(plan.refused)["side"]


@pytest.mark.parametrize("kind", [Stored, StoredInList, HiddenOnSelf, HiddenOnChild, OnSelf])
def test_results_of_training_that_modules_still_keep_do_not_stand_in_the_way(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().train()
    model(IMAGES)
    small, _ = cut(model)
    data = [(torch.randn(8, 3, 8, 8), torch.zeros(8)) for _ in range(2)]
    if kind is not OnSelf:
        small.train()(IMAGES)
        reestimate_batchnorm(small, data)
        compress(model, FilterPruning(0.5), IMAGES, data)


@pytest.mark.parametrize("kind", [InDataclass, InObject, Distribution, OnSelf, Classes])
def test_weights_are_exported_whatever_is_returned(kind: type[nn.Module], tmp_path: Path) -> None:
    folder = export(kind().eval(), tmp_path / "weights", IMAGES, ["safetensors"])
    assert (folder / "model.safetensors").is_file()


def test_graphs_return_what_lies_in_objects_and_want_something(tmp_path: Path) -> None:
    export(InDataclass().eval(), tmp_path / "graph", IMAGES, ["pt2"])
    with pytest.raises(BadInput, match="returns no tensor"):
        export(OnSelf().eval(), tmp_path / "none", IMAGES, ["pt2"])
