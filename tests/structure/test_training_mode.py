"""What only training mode computes reads channels as well: it is cut along, or the channels stay."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.compression import FilterPruning, HeadPruning, reestimate_batchnorm
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES, Body, conv, cut, pooled, removable, train_step


class Aux(Body):
    """A second classifier in training mode."""

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        return (self.head(h), self.side(h)) if self.training else self.head(h)


class Supervised(Body):
    """Deep supervision: a convolution reads the middle, and its outputs are a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = conv(8, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        logits = self.head(pooled(self.b(h)))
        return {"logits": logits, "deep": self.deep(h)} if self.training else logits


class Inception(Body):
    """As GoogLeNet: an auxiliary classifier of several layers, whose result is None in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.aux: nn.Module = nn.Sequential(
            conv(8, 6),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 64, 7),
            nn.Dropout(0.7),
            nn.Linear(7, 5),
        )

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        aux = self.aux(h) if self.training else None
        return self.head(pooled(self.b(h))), aux


class Sometimes(Supervised):
    """A branch that only some draws take."""

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        extra = [self.deep(h)] if self.training and random.random() < 0.4 else []
        return [self.head(pooled(self.b(h))), *extra]


class Contrastive(Body):
    """A projection of features for another loss, behind a no_grad."""

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        if not self.training:
            return self.head(h)
        with torch.no_grad():
            target = self.side(h)
        return self.head(h), F.mse_loss(self.side(h), target + 1)


@pytest.mark.parametrize("kind", [Aux, Supervised, Inception, Sometimes, Contrastive])
def test_layers_that_only_training_mode_calls_are_cut_along(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    small, plan = cut(model)
    assert {"a", "b"} <= removable(plan)
    reestimate_batchnorm(small, [IMAGES])


class Centred(Body):
    """A loss by distances to centres, which are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.randn(5, 8))

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        logits = self.head(pooled(self.b(h)))
        return (logits, torch.cdist(pooled(h), self.centres)) if self.training else logits


class Returned(Body):
    """Features are an output in training mode."""

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        logits = self.head(pooled(self.b(h)))
        return (logits, h) if self.training else logits


class Normed(Body):
    """A normalisation over all channels in training mode."""

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        return self.head(pooled(self.b(F.group_norm(h, 1) if self.training else h)))


class Kept(Body):
    """Features are kept for a loss outside."""

    def forward(self, x: Tensor) -> Any:
        h = self.middle(x)
        if self.training:
            self.hidden = h
        return self.head(pooled(self.b(h)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Centred, "in training mode without it"),
        (Returned, "outputs of the model"),
        (Normed, "in training mode without it"),
        (Kept, "in training mode its channels are kept as 'hidden'"),
    ],
)
def test_channels_that_training_mode_needs_stay(kind: type[nn.Module], reason: str) -> None:
    _, plan = cut(kind())
    assert reason in dict(plan.refused)["a"]
    assert removable(plan) == {"b"}


class Labels(Supervised):
    """Training mode wants labels, which the example does not have."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.middle(x)
        logits = self.head(pooled(self.b(h)))
        if not self.training:
            return logits
        assert labels is not None, "labels are missing"
        return F.cross_entropy(logits, labels) + self.deep(h).mean()


class LabelledTokens(Labels):
    """The same, with a parameter in place of the layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.deep, self.side
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def deep(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return h * self.scale


@pytest.mark.parametrize(("kind", "layer"), [(Labels, "deep"), (LabelledTokens, "scale")])
def test_where_training_mode_cannot_be_tried_an_uncalled_layer_may_read(kind: type[nn.Module], layer: str) -> None:
    structure = coupled_channels(kind(), IMAGES)
    reason = dict(structure.refused)["a"]
    assert f"{layer!r}, which eval mode does not call" in reason
    assert "labels are missing" in reason
    if kind is LabelledTokens:
        assert [group.name for group in structure.groups] == ["b"]


class Drawing(Body):
    """Everything that networks draw in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.r = nn.Dropout2d(0.4), nn.RReLU()
        self.alpha = nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Any:
        h = self.drop(self.middle(x))
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
            h = F.dropout(h, 0.3) * torch.empty(len(h), 1, 1, 1).bernoulli_(0.8)
        h = self.r(self.b(h))
        return self.head(self.alpha(pooled(h)))


class Deep(Body):
    """Stochastic depth by a draw of Python, of NumPy's kind, and by one for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.more = conv(12, 12)

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.middle(x))
        if not self.training or random.random() < 0.5:
            h = h + self.more(h)
        if self.training:
            h = h * (torch.rand(len(h), 1, 1, 1) < 0.9) / 0.9
        return self.head(pooled(h))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(3, 6), nn.LSTM(6, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.gelu(self.b(self.rnn(self.a(x.flatten(2).mT))[0])))


@pytest.mark.parametrize(("kind", "names"), [(Drawing, {"a", "b"}), (Deep, {"a", "b", "more"}), (Recurrent, {"b"})])
def test_random_draws_do_not_stand_in_the_way(kind: type[nn.Module], names: set[str]) -> None:
    _, plan = cut(kind())
    assert removable(plan) == names
    model, python, torch_ = kind(), random.getstate(), torch.get_rng_state()
    coupled_channels(model, IMAGES)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_)


class AlwaysDrawing(Body):
    """Dropout in eval mode, too, as for estimates of uncertainty; and a choice by Python."""

    def forward(self, x: Tensor) -> Any:
        h = F.dropout(self.features(x), 0.3, training=True)
        return self.head(h) * random.random()


class Sampled(nn.Module):
    """As a variational autoencoder that samples in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mean, self.width = nn.Linear(192, 16), nn.Linear(16, 6), nn.Linear(16, 6)
        self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 192)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x.flatten(1)))
        z = self.mean(h) + torch.randn_like(self.mean(h)) * torch.exp(self.width(h) / 2)
        return self.head(F.relu(self.b(z)))


@pytest.mark.parametrize(("kind", "count"), [(AlwaysDrawing, 2), (Sampled, 3)])
def test_draws_in_eval_mode_do_not_stand_in_the_way(kind: type[nn.Module], count: int) -> None:
    structure = coupled_channels(kind(), IMAGES)
    assert len(structure.groups) == count
    small = FilterPruning(0.5).apply(model := kind(), FilterPruning(0.5).plan(model, IMAGES))
    train_step(small, IMAGES)


def test_dropout_in_attention_does_not_stand_in_the_way() -> None:
    model = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.3, batch_first=True)
    x = torch.randn(2, 5, 12)
    assert HeadPruning(0.5).plan(model, x).params_after < FilterPruning(0.0).plan(model, x).params_before
    assert removable(FilterPruning(0.5).plan(model, x)) == {"linear1"}


def test_a_network_that_never_computes_the_same_is_judged_by_eval_mode() -> None:
    class Own(Body):
        generator = torch.Generator()

        def __init__(self) -> None:
            super().__init__()
            del self.side

        def forward(self, x: Tensor) -> Any:
            noise = torch.randn(len(x), 1, 1, 1, generator=self.generator) if self.training else 0.0
            return super().forward(x + noise)

    assert {group.name for group in coupled_channels(Own(), IMAGES).groups} == {"a", "b"}


@pytest.mark.parametrize("samples", [1, 2])
def test_batchnorm_over_vectors_trains_on_two_samples(samples: int) -> None:
    layers = [nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6)]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    structure = coupled_channels(model, IMAGES[:samples])
    assert structure.proof is not None
    assert structure.proof.untrained is None
    assert len(structure.groups) == 2
