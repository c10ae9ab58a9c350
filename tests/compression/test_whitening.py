"""Whitened truncation: the least mean error of the outputs that a rank allows, from one decomposition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compression import LowRank, compress, replay, skeleton
from pliant.compression.factored import factored, first_of_spatial, matrices
from pliant.compression.rank import _decompose, _span, _truncate
from pliant.compression.whitening import output_moments
from pliant.errors import BadInput
from pliant.experiments.models import build_model

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "more columns than rows": (nn.Conv2d(6, 8, 3, padding=1), (6, 7, 7)),
    "more rows than columns": (nn.Conv2d(2, 30, 3, bias=False), (2, 7, 7)),
    "stride, dilation": (nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2), (6, 9, 8)),
    "groups, reflected": (nn.Conv2d(6, 8, 3, groups=2, padding=1, padding_mode="reflect"), (6, 7, 7)),
    "many rows per group": (nn.Conv2d(4, 40, 3, groups=2), (4, 7, 7)),
    "1-d": (nn.Conv1d(4, 6, 5, padding=2), (4, 12)),
    "linear": (nn.Linear(9, 7), (9,)),
    "linear on sequences": (nn.Linear(7, 9), (5, 7)),
}
each = pytest.mark.parametrize("name", LAYERS)
SPATIAL = [name for name, (layer, _) in LAYERS.items() if isinstance(layer, nn.Conv2d)]
each_scheme = pytest.mark.parametrize(
    ("name", "scheme"), [(name, "channel") for name in LAYERS] + [(name, "spatial") for name in SPATIAL]
)


def case(name: str, samples: int = 200) -> tuple[Any, Tensor]:
    """Return a layer in float64 and inputs whose directions differ much in size."""
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    channel = -1 if isinstance(layer, nn.Linear) else 0
    scale = torch.logspace(0, -3, shape[channel], dtype=torch.float64)
    x = torch.randn(samples, *shape, dtype=torch.float64)
    return layer, x * (scale if channel else scale.view(-1, *[1] * (len(shape) - 1)))


def whitened(layer: Any, x: Tensor, scheme: str = "channel") -> Any:
    span = _span(matrices(layer, scheme).double())
    key = ("0", scheme)
    moments = output_moments(nn.Sequential(layer), {key: span}, [x[:50], (x[50:], torch.zeros(len(x) - 50))])
    return _decompose(layer, scheme, moment=moments[key], span=span)


@torch.no_grad()
def error(layer: Any, thin: nn.Module, x: Tensor) -> float:
    """Return the squared error of the outputs, mean over all positions."""
    difference = thin(x) - layer(x)
    filters = layer.weight.shape[0]
    return float(difference.square().sum() / (difference.numel() // filters))


def columns(layer: Any, x: Tensor) -> Tensor:
    """Return what the weight is multiplied with, (groups, columns, positions), by sending unit filters through."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).T.unsqueeze(0)
    probe = copy.deepcopy(layer)
    n = probe.weight[0].numel()
    probe.weight = nn.Parameter(
        torch.eye(n).double().reshape(n, *probe.weight.shape[1:]).repeat(probe.groups, *[1] * (layer.weight.dim() - 1))
    )
    probe.bias = None
    probe.out_channels = n * probe.groups
    y = probe(x).detach().movedim(1, 0).flatten(1)
    return y.unflatten(0, (probe.groups, n))


def product(thin: Any, scheme: str) -> Tensor:
    """Return the matrix that two layers have in place of the weight, (groups, m, n)."""
    expand = matrices(thin.expand)
    if scheme == "spatial":  # (groups, filters, r·width), where the matrix has a row per filter and column
        expand = expand.unflatten(2, (-1, thin.kernel_size[1])).transpose(2, 3).flatten(1, 2)
    return expand @ matrices(thin.reduce)


@each_scheme
def test_every_rank_gives_the_truncation_of_the_weight_times_the_root_of_the_second_moment(
    name: str, scheme: str
) -> None:
    layer, x = case(name)
    spectrum = whitened(layer, x, scheme)
    unfolded = columns(first_of_spatial(layer) if scheme == "spatial" else layer, x)
    moment = unfolded @ unfolded.mT / unfolded.shape[2]
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1) @ vectors.mT
    inverse = vectors / values.sqrt().unsqueeze(1) @ vectors.mT  # all directions are excited
    weights = matrices(layer, scheme)
    u, s, vh = torch.linalg.svd(weights @ root, full_matrices=False)
    for rank in range(1, s.shape[1] + 1):
        expected = u[..., :rank] * s[:, None, :rank] @ vh[:, :rank] @ inverse
        thin: Any = _truncate(layer, spectrum, rank)
        got = product(thin, scheme)
        torch.testing.assert_close((got - expected) @ root, torch.zeros_like(got), rtol=0, atol=1e-7 * float(s.max()))
        lost = float(s[:, rank:].square().sum())
        if scheme == "channel":
            assert error(layer, thin, x) == pytest.approx(lost, rel=1e-6, abs=1e-9)
        else:  # the error of the sum over k columns is at most k times the sum of their errors
            total = (thin(x) - layer(x)).square().sum().item()
            assert total <= layer.kernel_size[1] * lost * unfolded.shape[2] * (1 + 1e-6) + 1e-9
    torch.testing.assert_close(spectrum.energies, s.square().sum(0), rtol=1e-6, atol=1e-9 * float(s.max()) ** 2)


@each
def test_no_rank_has_a_larger_output_error_than_plain_truncation(name: str) -> None:
    layer, x = case(name)
    ours, plain = whitened(layer, x), _decompose(layer)
    ranks = range(1, ours.basis.shape[2])
    errors = [(error(layer, _truncate(layer, ours, r), x), error(layer, _truncate(layer, plain, r), x)) for r in ranks]
    assert all(white <= other * (1 + 1e-9) for white, other in errors)
    assert errors[0][0] < 0.99 * errors[0][1]


@pytest.mark.parametrize("name", SPATIAL)
def test_the_first_of_two_directions_at_full_rank_loses_nothing(name: str) -> None:
    layer, x = case(name)
    weights = matrices(layer, "spatial")
    second: Any = factored(layer, torch.eye(weights.shape[1]).double().expand(len(weights), -1, -1), weights, "spatial")
    with torch.no_grad():
        torch.testing.assert_close(second.expand(first_of_spatial(layer)(x)), layer(x))


@each_scheme
@pytest.mark.parametrize("images", ["few", "zero"])
def test_full_rank_is_exact_even_where_the_images_excite_next_to_nothing(name: str, scheme: str, images: str) -> None:
    layer, x = case(name, samples=51)
    seen = torch.zeros_like(x) if images == "zero" else x[:1].expand_as(x)
    spectrum = whitened(layer, seen, scheme)
    thin = _truncate(layer, spectrum, spectrum.basis.shape[2])
    with torch.no_grad():
        torch.testing.assert_close(thin(x), layer(x), rtol=1e-9, atol=1e-9)


def test_directions_that_no_image_excites_are_ordered_by_the_weight() -> None:
    layer = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 2, 6, 3, 5, 4])))
    x = torch.zeros(60, 6, dtype=torch.float64)
    x[:, 0] = 1.0  # only the weakest row is ever used
    thin: Any = _truncate(layer, whitened(layer, x), 3)
    kept = (thin.expand.weight @ thin.reduce.weight).diag()
    torch.testing.assert_close(kept, torch.tensor([1.0, 0, 6, 0, 5, 0], dtype=torch.float64))


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_layer_may_be_called_by_keyword_and_with_one_image(scheme: str) -> None:
    class Odd(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(input=one) for one in x])

    layer, x = case("more columns than rows")
    spans: dict[Any, Any] = {("layer", scheme): None}
    moments = output_moments(Odd(layer), spans, [x])
    expected = output_moments(nn.Sequential(layer), {("0", scheme): None}, [x])
    torch.testing.assert_close(moments["layer", scheme], expected["0", scheme])


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_batch_without_images_counts_for_nothing(scheme: str) -> None:
    layer, x = case("more columns than rows")
    key = ("0", scheme)
    some, all_ = (output_moments(nn.Sequential(layer), {key: None}, data) for data in ([x, x[:0]], [x]))
    torch.testing.assert_close(some[key], all_[key])
    assert output_moments(nn.Sequential(layer), {key: None}, [x[:0]]) == {}


# --- the compressor -----------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=5, image_shape=(3, 8, 8), width=0.5).eval()
    return model, torch.randn(64, 3, 8, 8) * torch.tensor([3.0, 1.0, 0.1]).view(3, 1, 1)


def batches(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part))) for part in x.split(24)]


def test_data_makes_whitened_the_default_and_the_plan_says_so() -> None:
    model, x = network()
    for whiten, data, expected in [("auto", batches(x), True), ("auto", None, False), (False, batches(x), False)]:
        low = LowRank(0.5, whiten=whiten)
        analysis = low.analyse(model, x[:2], data)
        assert low.plan(model, x, analysis=analysis).options["whiten"] is expected
    for scheme in ("channel", "spatial", "best"):
        small, plain = (compress(model, LowRank(0.6, scheme=scheme), x[:2], data) for data in (batches(x), None))
        with torch.no_grad():
            close, far = ((net(x) - model(x)).square().mean() for net in (small, plain))
        assert close < far


def test_layers_that_the_data_does_not_reach_are_truncated_plainly() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if len(x) == 2 else self.a(x)

    torch.manual_seed(0)
    model = Branch()
    low = LowRank(0.5, "uniform")
    analysis = low.analyse(model, torch.randn(2, 8), [torch.randn(5, 8)])
    torch.testing.assert_close(analysis.layers["b"][0].energies, torch.linalg.svdvals(model.b.weight.double()) ** 2)


def test_whitened_plan_needs_its_analysis_but_its_skeleton_does_not() -> None:
    model, x = network()
    low = LowRank(0.5)
    analysis = low.analyse(model, x[:2], batches(x))
    plan = low.plan(model, x[:2], analysis=analysis)
    for attempt in (lambda: replay(model, plan), lambda: low.apply(model, plan)):
        with pytest.raises(BadInput, match="calibration data"):
            attempt()
    with pytest.raises(BadInput, match="whiten=False, not True"):
        low.apply(model, plan, analysis=low.analyse(model, x[:2]))
    small = low.apply(model, plan, analysis=analysis)
    empty = skeleton(network()[0], plan)
    empty.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(empty.eval()(x), small(x))


def test_analysing_changes_nothing() -> None:
    model, x = network()
    model.train()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    LowRank().analyse(model, x[:2], batches(x))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"whiten": True}, None, "needs calibration data"),
        ({"whiten": True}, [], "is empty"),
        ({}, [torch.randn(2, 4, 8, 8)], "calibration batch 0"),
        ({}, [torch.randn(2, 3, 8, 8), torch.randn(2, 3)], "calibration batch 1"),
        ({"whiten": "yes"}, None, "True, False or 'auto'"),
    ],
)
def test_bad_options_and_data(options: dict[str, Any], data: Any, message: str) -> None:
    model, x = network()
    with pytest.raises(BadInput, match=message):
        LowRank(**options).analyse(model, x[:2], data)
