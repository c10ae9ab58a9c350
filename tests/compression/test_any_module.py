"""Models in the states in which users have them: masked, kept results, lazy, scripted, compiled, quantised, wrapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pliant
from pliant.compression import (
    FilterPruning,
    Int8,
    LowRank,
    Magnitude,
    SemiStructured,
    compress,
    compress_to,
    reestimate_batchnorm,
)
from pliant.errors import BadInput
from pliant.structure import coupled_channels
from tests.structure.cutting import IMAGES

BATCHES = [
    (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.zeros(8)) for seed in range(2)
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


class Keeps(nn.Module):
    """Keeps what it has computed last, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network()[:3], network()[3:]
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        self.kept["last"] = self.last
        return self.head(self.last)


def run_once(model: nn.Module) -> nn.Module:
    model(IMAGES)
    return model


def a_compiled_layer() -> nn.Module:
    model = network()
    model[3] = torch.compile(model[3], backend="eager")  # type: ignore[call-overload]
    with torch.no_grad():
        return run_once(model)


def with_layer(change: Callable[[Any], Any]) -> nn.Module:
    model = network()
    change(model)
    return run_once(model)


def hooked(model: nn.Sequential) -> None:
    model[3].register_forward_hook(lambda m, args, out: setattr(m, "seen", out))


def replaced(layer: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Sequential], None]:
    def change(model: nn.Sequential) -> None:
        model[3] = layer(model[3])

    return change


WORKING: dict[str, Callable[[], nn.Module]] = {
    "masked weights": lambda: with_layer(lambda m: prune.l1_unstructured(m[3], "weight", 0.5)),
    "masked filters": lambda: with_layer(lambda m: prune.ln_structured(m[3], "weight", 0.5, n=2, dim=0)),
    "old weight_norm": lambda: with_layer(replaced(nn.utils.weight_norm)),
    "old spectral_norm": lambda: with_layer(replaced(nn.utils.spectral_norm)),
    "kept results": lambda: run_once(Keeps()),
    "results kept by a hook": lambda: with_layer(hooked),
    "lazy, run once": lambda: with_layer(replaced(lambda _: nn.LazyConv2d(12, 3, padding=1))),
    "DataParallel": lambda: nn.DataParallel(network()),
    "made in inference mode": lambda: torch.inference_mode()(network)(),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(network()),
    "compiled in place": lambda: with_layer(lambda m: m.compile(backend="eager")),
    "a compiled layer": a_compiled_layer,
}
COMPRESSORS = [FilterPruning(0.4), LowRank(0.3), Int8(), Magnitude(0.5), SemiStructured()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("data", [None, BATCHES], ids=["weights", "data"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("case", WORKING)
def test_compressors_work_and_leave_the_model_alone(case: str, compressor: Any, data: Any) -> None:
    model = WORKING[case]()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    small = compress(model, compressor, IMAGES, data)
    with torch.no_grad():
        assert small(IMAGES).isfinite().all()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", WORKING)
def test_statistics_are_measured_anew(case: str) -> None:
    model = reestimate_batchnorm(WORKING[case](), BATCHES)
    with torch.no_grad():
        assert model(IMAGES).isfinite().all()


def int8_weights() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = network().eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def lazy() -> nn.Module:
    model = network()
    model[3] = nn.LazyConv2d(12, 3, padding=1)
    return model


def partly_scripted() -> nn.Module:
    model = network()
    model[3] = torch.jit.script(model[3])
    return model


FAULTY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lazy, r"'3.weight' of the model is not initialised: call the model"),
    "scripted": (lambda: torch.jit.script(network()), r"the model is scripted: give the module"),
    "traced": (lambda: torch.jit.trace(network().eval(), IMAGES), r"the model is scripted: give the module"),
    "a scripted layer": (partly_scripted, r"'3' of the model is scripted: give the module"),
    "quantised": (int8_weights, r"'7.weight' of the model is a Int8Tensor, not a plain tensor: compress before"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", FAULTY)
def test_models_that_cannot_be_read_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    build, message = FAULTY[case]
    model = build()
    uses: list[Callable[[], Any]] = [
        lambda: coupled_channels(model, IMAGES),
        lambda: reestimate_batchnorm(model, BATCHES),
        lambda: pliant.constrain(model, [], default=None),
        lambda: pliant.export(model, tmp_path / "out", IMAGES, ["safetensors"]),
        lambda: compress_to(model, LowRank(), IMAGES, keep_params=0.5),
        *(lambda c=c: compress(model, c, IMAGES, BATCHES) for c in COMPRESSORS),
        *(lambda c=c: c.plan(model, IMAGES) for c in COMPRESSORS),
    ]
    for use in uses:
        with pytest.raises(BadInput, match=message):
            use()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
def test_a_compiled_model_is_the_module_inside_it(compressor: Any, tmp_path: Path) -> None:
    compiled: Any = run_once(torch.compile(network().eval(), backend="eager"))  # type: ignore[arg-type]
    analysis = compressor.analyse(compiled, IMAGES)
    plan = compressor.plan(compiled, IMAGES, analysis=analysis)
    assert plan == compressor.plan(network().eval(), IMAGES)
    small = compressor.apply(compiled, plan)
    assert not any("_orig_mod" in name for name in small.state_dict())
    torch.testing.assert_close(small(IMAGES), compressor.apply(network().eval(), plan)(IMAGES))
    pliant.export(compiled, tmp_path / "out", IMAGES, ["safetensors"])
    assert set(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")) == set(network().state_dict())
    groups = pliant.constrain(compiled, [("0.weight", pliant.filters(k=0.5))], default=None)
    assert any(group["ball"] is not None for group in groups)


class Two(nn.Module):
    """Takes an image and its depth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.n, self.c, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.head(self.c(self.n(self.a(rgb) + self.b(depth)).relu()).relu().mean((2, 3)))


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), torch.randn(6, 1, 8, 8)


SEVERAL: dict[str, Callable[[], Any]] = {
    "((a, b), labels)": lambda: (pairs(), torch.zeros(6)),
    "[[a, b], labels]": lambda: [list(pairs()), torch.zeros(6)],
    "dict": lambda: dict(zip(("rgb", "depth"), pairs(), strict=True)),
    "(dict, labels)": lambda: (dict(zip(("rgb", "depth"), pairs(), strict=True)), torch.zeros(6)),
}


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("batch", SEVERAL)
def test_batches_of_several_inputs(batch: str, compressor: Any) -> None:
    torch.manual_seed(0)
    data = [SEVERAL[batch]() for _ in range(3)]
    small = compress(Two(), compressor, pairs(), data)
    assert small(*pairs()).isfinite().all()
    assert reestimate_batchnorm(small, data)(*pairs()).isfinite().all()


@pytest.mark.parametrize(
    "use",
    [
        lambda data: compress(Two(), FilterPruning(0.4), pairs(), data),
        lambda data: compress(Two(), LowRank(0.4), pairs(), data),
        lambda data: reestimate_batchnorm(Two(), data),
    ],
)
def test_a_flat_batch_of_several_inputs_says_how_to_write_it(use: Callable[[Any], Any]) -> None:
    with pytest.raises(BadInput, match=r"\(\(a, b\), labels\)"):
        use([(*pairs(), torch.zeros(6))])
