"""Inputs that have a domain, and states of another type: the proof uses the example, in float64 throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.structure import coupled_channels
from tests.structure.cutting import Body, cut, removable

PICTURES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05


class Logarithm(Body):
    """As a log-mel front end."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.log(x))


class Root(Body):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sqrt())


class Power(Body):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x**0.3)


class Range(Body):
    def forward(self, x: Tensor) -> Any:
        if x.min() < 0 or x.max() > 1:
            raise ValueError("expected an image in [0, 1]")
        return super().forward(x)


class Angle(Body):
    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.acos(2 * x - 1))


class Index(Body):
    """Colours by their numbers, as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Embedding(4, 3)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.colours((4 * x[:, 0]).long()).permute(0, 3, 1, 2))


class Positive(Body):
    """Weights have a domain, too: random ones give NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = nn.Linear(3, 3)
        nn.init.constant_(self.widths.weight, 0.5)
        nn.init.constant_(self.widths.bias, 0.5)

    def forward(self, x: Tensor) -> Any:
        return super().forward(
            x * self.widths(x.mean((2, 3))).log()[:, :, None, None] * self.widths.weight.sqrt().sum()
        )


@pytest.mark.parametrize("kind", [Logarithm, Root, Power, Range, Angle, Index, Positive])
def test_inputs_with_a_domain_are_tried_as_they_are(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    _, plan = cut(kind(), PICTURES)
    assert removable(plan) >= {"a", "b"}


def test_an_example_outside_of_the_domain_is_named() -> None:
    structure = coupled_channels(Logarithm(), PICTURES - 0.5)
    assert "gives NaN on the example" in dict(structure.refused)["a"]


class State(nn.Module):
    """An LSTM whose first state is made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(8, 6), nn.LSTM(6, 5, batch_first=True)
        self.b, self.c, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def state(self, x: Tensor) -> Tensor:
        return torch.zeros(1, len(x), 5)

    def forward(self, x: Tensor) -> Any:
        state = self.state(x)
        y, _ = self.rnn(self.a(x.mean(1)), (state, state))
        return self.head(F.relu(self.c(F.relu(self.b(y)))))


class NamedType(State):
    def state(self, x: Tensor) -> Tensor:
        return torch.zeros(1, len(x), 5, dtype=torch.float32)


class Cast(State):
    def state(self, x: Tensor) -> Tensor:
        return torch.arange(5).float().expand(1, len(x), 5).contiguous()


class FromNumPy(State):
    def state(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.ones((1, len(x), 5), dtype=np.float32))


class Attribute(State):
    """A tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.ones(1, 1, 5)

    def state(self, x: Tensor) -> Tensor:
        return self.first.expand(1, len(x), 5).contiguous()


class Listed(State):
    def state(self, x: Tensor) -> Tensor:
        return torch.tensor([[[0.5] * 5] * len(x)])


class Gated(State):
    """A GRU, of which the layer before is refused by name."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 5, batch_first=True)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        y, _ = self.rnn(self.a(x.mean(1)), self.state(x))
        return self.head(F.relu(self.c(F.relu(self.b(y)))))


@pytest.mark.parametrize("kind", [State, NamedType, Cast, FromNumPy, Attribute, Listed, Gated])
def test_states_made_in_the_forward_do_not_stand_in_the_way(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    structure = coupled_channels(model, PICTURES)
    assert {group.name for group in structure.groups} == {"b", "c"}
    assert "'rnn'" in dict(structure.refused)["a"]
    assert torch.get_default_dtype() == torch.float32


class Positions(Body):
    """A table of positions, computed in float32, is added to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.eye(12))

    def forward(self, x: Tensor) -> Any:
        table = torch.sin(torch.arange(12, dtype=torch.float32) / 3)
        return self.head((self.features(x) + table) @ self.kernel)


def test_tables_of_fixed_width_keep_their_layer_only() -> None:
    structure = coupled_channels(Positions(), PICTURES)
    assert [group.name for group in structure.groups] == ["a"]
    assert "b" in dict(structure.refused)
