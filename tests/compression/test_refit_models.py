"""The refit on all networks that the structure tests know: as planned, stored and loaded, and no worse than the cut."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.calling import as_inputs, run, tensors_of
from pliant.compression import Compressor, FilterPruning, HeadPruning, Plan, skeleton
from pliant.compression.calibration import Calibration
from pliant.compression.refit import Refitter
from pliant.experiments.models import MODELS, build_model
from tests.compression.test_heads import SOUND, Block
from tests.structure import test_verification as zoo

pytestmark = pytest.mark.filterwarnings("ignore:few calibration")

SAMPLES, BATCH, FRESH = 96, 12, 96


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(side: int = 8) -> Callable[[int, int], Tensor]:
    return lambda count, seed: drawn(count, 3, side, side, seed=seed)


def norms_of(model: nn.Module, inputs: Any) -> nn.Module:
    """Return a copy whose BatchNorm statistics are those of its inputs, as after training."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    run(model, as_inputs(inputs))
    return model.eval()


def missed(dense: list[Tensor], small: list[Tensor]) -> float:
    """Return the share of the energy of all outputs that is missed."""
    pairs = [(x.double(), y.double()) for x, y in zip(dense, small, strict=True) if x.is_floating_point()]
    lost = sum(float((x - y).square().sum()) for x, y in pairs)
    return lost / sum(float((x - x.mean(0)).square().sum()) for x, _ in pairs)


def assert_refitted(
    model: nn.Module,
    compressor: Compressor[Any],
    inputs: Callable[[int, int], Any],
    wrap: Callable[[Any], Any] = lambda x: (x, None),
) -> Plan:
    model = norms_of(model.eval(), inputs(64, 100))
    example = inputs(2, 0)
    data = Calibration([wrap(inputs(BATCH, seed)) for seed in range(1, 1 + SAMPLES // BATCH)], model, example)
    analysis = compressor.analyse(model, example, data)
    plan = compressor.plan(model, example, analysis=analysis)
    cut = compressor.apply(model, plan, analysis=analysis)
    small, plan = Refitter(model, example, data).refit(cut, plan)

    fresh = as_inputs(inputs(FRESH, 99))
    expected, rough, got = (run(net.eval(), fresh) for net in (model, cut, small))
    assert [x.shape for x in got] == [x.shape for x in expected]
    assert all(x.isfinite().all() for x in got if x.is_floating_point())
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    record = plan.refit
    assert record is not None
    assert record.errors[record.result] == min(record.errors.values())
    assert {fit.name.removesuffix(".expand") for fit in record.layers}.isdisjoint(name for name, _ in record.unfitted)

    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    network = skeleton(model, again)
    network.load_state_dict(small.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(run(network.eval(), fresh), got, strict=True))

    # The best of three was chosen on 24 samples: its mean error there has a standard error of about a fifth of it.
    before, after = missed(expected, rough), missed(expected, got)
    assert after <= 1.3 * before + 1e-9, f"{before:.4f} → {after:.4f}"
    return plan


SLOW = {"wrn28_10", "resnet50", "vgg16", "resnet56", "resnet18", "mobilenet", "bert"}


def some_slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


# The widest networks are made as narrow as the others: how layers are refitted depends on how they are connected.
WIDTHS = {"wrn28_10": 0.04, "resnet18": 0.06, "vgg16": 0.06}


@pytest.mark.parametrize("name", some_slow(*MODELS))
def test_shipped_networks(name: str) -> None:
    side = 32 if name == "vgg16" else 8
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_shape=(3, side, side), width=WIDTHS.get(name, 0.125))
    assert_refitted(model, FilterPruning(0.5), images(side))


UNUSUAL = (
    {
        f.__name__: f
        for f in (zoo.densenet, zoo.gated, zoo.separable, zoo.transposed, zoo.frozen, zoo.tied, zoo.parametrised)
    }
    | {f.__name__: f for f in (zoo.free_parameter, zoo.free_kernel)}
    | {"group_norm": lambda: zoo.group_norm(2)}
)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_networks(name: str) -> None:
    torch.manual_seed(0)
    plan = assert_refitted(UNUSUAL[name](), FilterPruning(0.5), images())
    reasons = dict(plan.refit.unfitted) if plan.refit else {}
    expected = {"transposed": {"a"}, "tied": {"b", "c"}, "parametrised": {"b"}}.get(name, set())
    assert expected <= set(reasons)


@pytest.mark.parametrize("name", zoo.NASTY)
def test_networks_that_are_refused_in_part(name: str) -> None:
    torch.manual_seed(0)
    assert_refitted(zoo.NASTY[name][0](), FilterPruning(0.5), images())


def test_recurrent_and_gated_networks() -> None:
    torch.manual_seed(0)
    assert_refitted(zoo.LSTMNet(), FilterPruning(0.4), lambda count, seed: drawn(count, 3, 4, seed=seed))
    assert_refitted(zoo.swiglu(), FilterPruning(0.5), lambda count, seed: drawn(count, 4, seed=seed))


@pytest.mark.parametrize("labels", [False, True])
def test_inputs_by_keyword_and_nested_outputs(labels: bool) -> None:
    torch.manual_seed(0)

    def inputs(count: int, seed: int) -> dict[str, Tensor]:
        return {"x": drawn(count, 4, seed=seed), "scale": torch.full((count, 1), 2.0)}

    assert_refitted(zoo.Named(), FilterPruning(0.5), inputs, lambda x: (x, 3) if labels else {**x, "labels": x["x"]})


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("kind", [HeadPruning, FilterPruning])
def test_attention(name: str, kind: type[FilterPruning]) -> None:
    torch.manual_seed(0)
    attention = nn.Sequential(Block(SOUND[name]()), nn.ReLU(), nn.Linear(5, 4))
    assert_refitted(attention, kind(0.5), lambda count, seed: drawn(count, 5, 12, seed=seed))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", [HeadPruning, FilterPruning])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_with_padding(kind: type[FilterPruning], norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=norm_first)

    def inputs(count: int, seed: int) -> dict[str, Tensor]:
        lengths = torch.randint(2, 6, (count, 1), generator=torch.Generator().manual_seed(seed))
        return {"src": drawn(count, 5, 12, seed=seed), "src_key_padding_mask": torch.arange(5) >= lengths}

    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert_refitted(model, kind(0.5), inputs, lambda x: x)


def test_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(12, 4, 1, 1, 16, batch_first=True)

    def inputs(count: int, seed: int) -> tuple[Tensor, Tensor]:
        return drawn(count, 5, 12, seed=seed), drawn(count, 4, 12, seed=seed + 50)

    plan = assert_refitted(model, HeadPruning(0.5), inputs)
    assert plan.refit is not None
    assert "decoder.layers.0.multihead_attn" in dict(plan.refit.unfitted)


@pytest.mark.parametrize("kind", [HeadPruning, FilterPruning])
@pytest.mark.parametrize("name", some_slow("bert", "gpt2", "llama", "vit", "resnet", "mobilenet", "convnext"))
def test_networks_of_transformers(name: str, kind: type[FilterPruning]) -> None:
    pytest.importorskip("transformers")
    from tests.structure.test_transformers import CASES, lively

    case = CASES[name]
    if kind is HeadPruning and not case.heads:
        return
    torch.manual_seed(0)

    def inputs(count: int, seed: int) -> Any:
        example = case.inputs(count + seed, 6)  # its seed is the number of samples
        return {k: x[-count:] for k, x in example.items()} if isinstance(example, dict) else example[-count:]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        assert_refitted(lively(case.build()), kind(0.4), inputs)
    assert tensors_of(inputs(3, 1))[0].shape[0] == 3
