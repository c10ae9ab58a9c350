"""PyTorch's transformer layers: every compressor reaches the layers in them, which fused kernels read uncalled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.calling import as_inputs, run
from pliant.compression import Compressor, Int8, LowRank, Magnitude, Plan, SemiStructured, replay, skeleton
from pliant.compression.calibration import calibration_of
from pliant.compression.quantised import Int8Linear
from pliant.compression.refit import Refitter

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

WIDTH, HEADS, TOKENS = 16, 2, 5
HIDDEN = torch.tensor([[False] * TOKENS, [False] * 3 + [True] * 2])


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, **options)


class Attending(nn.Module):
    """Attention between layers of its own, without weights of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.last = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.core(x, x, x, need_weights=False)[0])


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "relu": (lambda: layer(batch_first=True), tokens()),
    "gelu": (lambda: layer(batch_first=True, activation="gelu", norm_first=True), tokens()),
    "tokens first": (layer, tokens().transpose(0, 1)),
    "encoder": (lambda: nn.TransformerEncoder(layer(batch_first=True), 2, nn.LayerNorm(WIDTH)), tokens()),
    "not nested": (
        lambda: nn.TransformerEncoder(layer(batch_first=True), 1, enable_nested_tensor=False),
        {"src": tokens(), "src_key_padding_mask": HIDDEN},
    ),
    "nested": (
        lambda: nn.TransformerEncoder(layer(batch_first=True), 2),
        {"src": tokens(), "src_key_padding_mask": HIDDEN},
    ),
    "causal": (
        lambda: nn.TransformerEncoder(layer(batch_first=True), 1),
        {"src": tokens(), "mask": nn.Transformer.generate_square_subsequent_mask(TOKENS)},
    ),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True),
        (tokens(), tokens(1)),
    ),
    "attention": (Attending, tokens()),
}
cases = pytest.mark.parametrize("name", CASES)


def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, example = CASES[name]
    return build().eval(), example


def linear(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def outputs(model: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        (result,) = run(model, as_inputs(example))
    return result


def visible(result: Tensor, example: Any) -> Tensor:
    """Return the results at positions that no padding mask hides."""
    hidden = isinstance(example, dict) and "src_key_padding_mask" in example
    return result[~HIDDEN] if hidden else result


def checked(name: str, compressor: Compressor[Any], dense: Callable[[nn.Module, nn.Module], None]) -> tuple[Plan, Any]:
    """Compress a case; compare with a dense network of the same weights, in both modes; train a step; load again."""
    model, example = built(name)
    plan = compressor.plan(model, example)
    small = compressor.apply(model, plan)
    twin = copy.deepcopy(model)
    dense(twin, small)
    expected = outputs(twin, example)
    assert (visible(expected - outputs(model, example), example)).abs().max() > 1e-3
    for mode in (False, True):
        torch.testing.assert_close(
            visible(outputs(small.train(mode), example), example),
            visible(outputs(twin.train(mode), example), example),
            rtol=1e-4,
            atol=1e-5,
        )
    again = skeleton(built(name)[0], Plan.from_dict(plan.to_dict()))
    again.load_state_dict(small.state_dict())
    assert torch.equal(outputs(again.eval(), example), outputs(small.eval(), example))
    trained = copy.deepcopy(small).train()
    inputs = as_inputs(example)
    result = trained(**inputs) if isinstance(inputs, dict) else trained(*inputs)
    visible(result, example).square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    return plan, small


@cases
def test_low_rank_reaches_every_linear_layer(name: str) -> None:
    def dense(twin: nn.Module, small: nn.Module) -> None:
        for path in linear(twin):
            thin: Any = small.get_submodule(path)
            twin.get_submodule(path).weight.data = thin.expand.weight.detach() @ thin.reduce.weight.detach()

    plan, _ = checked(name, LowRank(0.4, allocation="uniform"), dense)
    model = built(name)[0]
    assert {x.name for x in plan.layers if x.kept < x.total} == linear(model)
    attention = {n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert set(dict(plan.refused)) == attention
    assert all("holds in_proj_weight" in reason for _, reason in plan.refused)


@cases
def test_eight_bits_reach_every_linear_layer(name: str) -> None:
    def dense(twin: nn.Module, small: nn.Module) -> None:
        for path in linear(twin):
            rounded: Any = small.get_submodule(path)
            assert isinstance(rounded, Int8Linear)
            twin.get_submodule(path).weight.data = rounded.weight.float() * rounded.scale

    plan, _ = checked(name, Int8(), dense)
    assert {x.name for x in plan.layers} == linear(built(name)[0])


@cases
@pytest.mark.parametrize("compressor", [Magnitude(0.5, allocation="uniform"), SemiStructured(2, 4)], ids=["half", "nm"])
def test_zeros_reach_the_packed_projections_too(name: str, compressor: Compressor[Any]) -> None:
    plan, small = checked(name, compressor, lambda twin, small: twin.load_state_dict(small.state_dict()) and None)
    matrices = {n: p for n, p in small.named_parameters() if p.dim() > 1}
    assert set(plan.compressible) == set(matrices)
    assert not plan.refused
    assert {n: int((p == 0).sum()) for n, p in matrices.items()} == {n: p.numel() // 2 for n, p in matrices.items()}
    model = built(name)[0]
    again = replay(model, Plan.from_dict(plan.to_dict()))
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in small.named_parameters())


@pytest.mark.parametrize("name", ["relu", "nested", "attention"])
@pytest.mark.parametrize(
    "compressor", [LowRank(0.4), Int8(), Magnitude(0.5), SemiStructured()], ids=lambda x: type(x).__name__
)
def test_data_reach_the_layers_as_well(name: str, compressor: Compressor[Any]) -> None:
    model, example = built(name)
    batches = []
    for seed in range(4):
        batch = {**example, "src": tokens(seed)} if isinstance(example, dict) else (tokens(seed), torch.zeros(2))
        batches.append(batch)
    analysis: Any = compressor.analyse(model, example, batches)
    if isinstance(compressor, LowRank):
        changed = compressor.analyse(model, example)
        for path, (spectrum, *_) in analysis.layers.items():
            assert not torch.equal(spectrum.energies, changed.layers[path][0].energies), path
    else:
        assert set(analysis.layers) == {path for path, _ in analysis.inputs.moments()}
    small = compressor.apply(model, compressor.plan(model, example, analysis=analysis), analysis=analysis)
    assert visible(outputs(small.eval(), example), example).isfinite().all()


def test_the_refit_sees_every_layer() -> None:
    model, example = built("encoder")
    batches = [(tokens(seed), torch.zeros(2)) for seed in range(8)]
    data = calibration_of(batches, model, example)
    compressor = LowRank(0.5)
    analysis = compressor.analyse(model, example, data)
    small, plan = Refitter(model, example, data).apply(
        compressor, compressor.plan(model, example, analysis=analysis), analysis
    )
    assert plan.refit is not None
    assert not plan.refit.unfitted
    fitted = {layer.name.removesuffix(".expand") for layer in plan.refit.layers}
    assert linear(model) <= fitted
    assert outputs(small.eval(), example).isfinite().all()
