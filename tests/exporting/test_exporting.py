"""What is exported is what the network computes, for readers that know nothing of pliant."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.compression import (
    Chain,
    Compressor,
    FilterPruning,
    HeadPruning,
    Int8,
    LowRank,
    Magnitude,
    SemiStructured,
)
from pliant.errors import BadInput, DamagedFile
from pliant.experiments.networks import TransformerBlock
from pliant.exporting import graph as tracing

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHIPPED: dict[str, Compressor[Any]] = {
    "filters": FilterPruning(0.5),
    "rank": LowRank(0.5),
    "weights": Magnitude(0.5),
    "nm": SemiStructured(2, 4),
    "chain": Chain(FilterPruning(0.3), LowRank(0.3), Int8()),
}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def build(width: int = 16) -> nn.Module:
    """A network in which every compressor finds something; small, for the tracer takes its time per layer."""
    return nn.Sequential(
        nn.Conv2d(4, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * width, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def manifest(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return result


class Own(nn.Module):
    """A layer and a forward that a test gives."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self.layer, x)


# --- the results of all compressors, read by others -------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    """One export per compressor, and the networks that were exported, in eval mode."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    model = pliant.reestimate_batchnorm(build(), [torch.randn(16, 4, 8, 8)])  # statistics as no new network has them
    small = {}
    for name, compressor in SHIPPED.items():
        plan = compressor.plan(model, X)
        small[name] = compressor.apply(model, plan)
        pliant.export(small[name], folder / name, X, plan=plan)
    np.save(folder / "more.npy", MORE.numpy())
    return folder, {name: network.eval() for name, network in small.items()}


READ_PT2 = """
import sys, pathlib, numpy, torch
folder = pathlib.Path(sys.argv[1])
x = torch.from_numpy(numpy.load(folder / "more.npy"))
for file in folder.glob("*/model.pt2"):
    numpy.save(file.parent / "pt2.npy", torch.export.load(file).module()(x).numpy())
sys.exit("pliant" in sys.modules)
"""

READ_ONNX = """
import sys, pathlib, numpy, onnxruntime
folder = pathlib.Path(sys.argv[1])
x = numpy.load(folder / "more.npy")
for file in folder.glob("*/model.onnx"):
    session = onnxruntime.InferenceSession(file)
    numpy.save(file.parent / "onnx.npy", session.run(["output"], {"input": x})[0])
sys.exit("pliant" in sys.modules or "torch" in sys.modules)
"""


@pytest.mark.parametrize(("kind", "program"), [("pt2", READ_PT2), ("onnx", READ_ONNX)])
def test_a_process_without_pliant_computes_the_same_on_another_batch_size(
    kind: str, program: str, exports: tuple[Path, dict[str, nn.Module]]
) -> None:
    folder, networks = exports
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    for name, network in networks.items():
        with torch.no_grad():
            expected = network(MORE)
        got = torch.from_numpy(np.load(folder / name / f"{kind}.npy"))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))  # measured: 5e-7


@pytest.mark.parametrize("name", SHIPPED)
def test_a_constructor_and_the_plan_give_the_network_back(
    name: str, exports: tuple[Path, dict[str, nn.Module]]
) -> None:
    folder, networks = exports
    fresh = build()
    network = pliant.rebuild(fresh, folder / name)
    assert not network.training
    torch.testing.assert_close(network.state_dict(), networks[name].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(network(X), networks[name](X), rtol=0, atol=0)
    assert fresh.training


@pytest.mark.parametrize("name", SHIPPED)
def test_the_manifest_says_what_is_there(name: str, exports: tuple[Path, dict[str, nn.Module]]) -> None:
    folder, networks = exports[0] / name, exports[1]
    written = manifest(folder)
    assert written["parameters"] == measuring.parameters(networks[name])
    assert written["inputs"] == [{"name": "input", "shape": ["batch", 4, 8, 8], "dtype": "float32"}]
    assert written["outputs"] == [{"name": "output", "shape": ["batch", 5], "dtype": "float32"}]
    kept = {path.name for path in folder.iterdir()} - {"export.json", "pt2.npy", "onnx.npy"}
    assert set(written["files"]) == kept
    for file, entry in written["files"].items():
        content = (folder / file).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    for file in ("model.pt2", "model.onnx"):
        assert 0 <= written["files"][file]["max_difference"] < 1e-5
    graph = onnx.load(folder / "model.onnx")
    assert written["files"]["model.onnx"]["opset"] == graph.opset_import[0].version
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {"torch", "onnx", "onnxruntime", "onnxscript", "pliant"} <= set(written["versions"])


def test_removed_parameters_are_not_in_the_graphs(exports: tuple[Path, dict[str, nn.Module]]) -> None:
    folder, _ = exports
    sizes = {name: manifest(folder / name)["files"]["model.onnx"]["bytes"] for name in SHIPPED}
    for name in ("filters", "rank"):
        fewer = manifest(folder / "weights")["parameters"] - manifest(folder / name)["parameters"]
        assert sizes["weights"] - sizes[name] > 3 * fewer > 0  # 4 bytes each, less the graph of the added layers


# --- the model stays as it was, whatever it is ------------------------------------------------------------------------


def test_model_and_process_stay_as_they_were(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[2].eval()
    model(torch.randn(3, 4).double()).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    attributes = set(vars(model))
    pliant.export(model, tmp_path / "out", torch.zeros(3, 4).double())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())
    assert set(vars(model)) == attributes
    assert logging.root.manager.disable == 0
    assert torch.is_grad_enabled()


def test_graphs_are_in_float32_and_weights_as_they_are(tmp_path: Path) -> None:
    pliant.export(nn.Linear(4, 2).bfloat16(), tmp_path / "out", torch.zeros(1, 4).bfloat16(), ["safetensors", "pt2"])
    assert manifest(tmp_path / "out")["inputs"][0]["dtype"] == "float32"
    assert pliant.rebuild(nn.Linear(4, 2).bfloat16(), tmp_path / "out").weight.dtype == torch.bfloat16


def test_channels_last_networks(tmp_path: Path) -> None:
    model = build().eval().to(memory_format=torch.channels_last)
    pliant.export(model, tmp_path / "out", X.contiguous(memory_format=torch.channels_last), ["safetensors", "pt2"])
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(MORE), model(MORE), rtol=0, atol=1e-6)
    torch.testing.assert_close(pliant.rebuild(build(), tmp_path / "out")(X), model(X), rtol=0, atol=1e-6)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
        model[1].weight = model[0].weight
        return model

    model = tied().eval()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pliant.export(model, tmp_path / "out", tokens)
    files = manifest(tmp_path / "out")["files"]
    assert all(entry["bytes"] < 2 * 4 * 400 + 20_000 for entry in files.values())
    assert 4 * 400 < files["model.safetensors"]["bytes"] < 2 * 4 * 400
    loaded = pliant.rebuild(tied(), tmp_path / "out")
    assert loaded[0].weight is loaded[1].weight
    assert torch.equal(loaded(tokens), model(tokens))


def test_weights_that_look_into_one_memory_are_written(tmp_path: Path) -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    model.b = nn.Parameter(model.a.detach().view(6))
    model.c = nn.Parameter(model.a.detach().T)
    tensors = measuring.state_tensors(model)
    measuring.file_bytes(model)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [0, 1, 2, 3, 4, 5],
        "c": [[0, 3], [1, 4], [2, 5]],
    }


class Named(nn.Module):
    """Named inputs, one without a batch, one that is no tensor; a dict of outputs, one not led by the batch."""

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor, flip: bool = False) -> dict[str, Any]:
        y = (-x if flip else x) * mask * scale
        return {"whole": y, "parts": [y.sum(1), y.sum(0)]}


def test_inputs_by_name_and_nested_outputs(tmp_path: Path) -> None:
    example = {"mask": torch.ones(3, 4), "scale": torch.arange(4.0), "x": torch.randn(3, 4), "flip": True}
    pliant.export(Named(), tmp_path / "out", example)
    written = manifest(tmp_path / "out")
    assert [(item["name"], item["shape"]) for item in written["inputs"]] == [
        ("mask", ["batch", 4]),
        ("scale", [4]),
        ("x", ["batch", 4]),
    ]
    shapes = [item["shape"] for item in written["outputs"]]
    assert shapes == [["batch", 4], ["batch"], [4]]
    session = tracing.onnx_session(tmp_path / "out" / "model.onnx")
    feed = {name: value.numpy() for name, value in example.items() if isinstance(value, Tensor)}
    expected = -example["x"] * example["mask"] * example["scale"]  # type: ignore[operator]
    np.testing.assert_allclose(session.run(["output_0"], feed)[0], expected, rtol=1e-6)
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    whole, _, columns = loaded(**example)  # a tuple, so that no class of the model's own is needed
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(columns, expected.sum(0))


def test_several_positional_inputs(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] - xs[1]

    pliant.export(Sum(), tmp_path / "out", (torch.ones(1, 3), torch.zeros(1, 3)), ["pt2"])
    assert [item["name"] for item in manifest(tmp_path / "out")["inputs"]] == ["xs_0", "xs_1"]
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert torch.equal(loaded(torch.ones(4, 3), torch.zeros(4, 3)), torch.ones(4, 3))


class PaddedByStride(nn.Module):
    """A convolution whose padding depends on the stride of whatever computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.conv.stride
        return self.conv(nn.functional.pad(x, (0, width - 1, 0, height - 1)))


def test_factors_that_are_asked_for_their_stride(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PaddedByStride()
    plan = LowRank(0.5).plan(model, X)
    small = LowRank(0.5).apply(model, plan)
    pliant.export(small, tmp_path / "out", X, plan=plan)
    graph = torch.export.load(tmp_path / "out" / "model.pt2").module()
    again = pliant.rebuild(PaddedByStride(), tmp_path / "out")
    with torch.no_grad():
        for network in (graph, again):
            torch.testing.assert_close(network(MORE), small(MORE))


def test_fused_attention_of_torch(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    pliant.export(model, tmp_path / "out", torch.randn(2, 5, 8), ["onnx"])
    assert manifest(tmp_path / "out")["outputs"][0]["shape"] == ["batch", 5, 8]


def test_a_transformer_that_lost_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(TransformerBlock(32, 4)), torch.randn(2, 5, 32)
    small = pliant.compress(model, HeadPruning(0.5), x)
    pliant.export(small, tmp_path / "out", x)
    assert manifest(tmp_path / "out")["parameters"] < measuring.parameters(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_language_models_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=100, pad_token_id=0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    tokens = torch.randint(1, 100, (2, 7))
    pliant.export(model, tmp_path / "out", {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    written = manifest(tmp_path / "out")
    assert [(x["name"], x["shape"], x["dtype"]) for x in written["inputs"]] == [
        ("input_ids", ["batch", 7], "int64"),
        ("attention_mask", ["batch", 7], "int64"),
    ]
    assert written["outputs"] == [{"name": "output", "shape": ["batch", 2], "dtype": "float32"}]


def test_weights_too_large_for_one_file_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_ONE_FILE", 1000)
    pliant.export(nn.Linear(64, 64), tmp_path / "out", torch.zeros(2, 64), ["onnx"])
    files = manifest(tmp_path / "out")["files"]
    assert files.keys() == {"model.onnx", "model.onnx.data"}
    assert files["model.onnx"]["bytes"] < 4 * 64 * 64 <= files["model.onnx.data"]["bytes"]
    (tmp_path / "out").rename(tmp_path / "moved")
    session = tracing.onnx_session(tmp_path / "moved" / "model.onnx")
    assert session.run(None, {"input": np.zeros((3, 64), np.float32)})[0].shape == (3, 64)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_export_is_replaced_only_when_asked_and_anything_else_never(tmp_path: Path) -> None:
    out, weights = tmp_path / "out", ["safetensors"]
    out.mkdir()  # empty: nothing to lose
    pliant.export(nn.Linear(4, 2), out, torch.ones(2, 4), weights)
    with pytest.raises(BadInput, match="overwrite"):
        pliant.export(nn.Linear(4, 3), out, torch.ones(2, 4), weights)
    assert manifest(out)["parameters"] == 10
    (out / "left over").write_text("")
    pliant.export(nn.Linear(4, 3), out, torch.ones(2, 4), weights, overwrite=True)
    assert manifest(out)["parameters"] == 15
    assert not (out / "left over").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("")
    for target in (precious, precious / "thesis.tex"):
        with pytest.raises(BadInput, match="no export"):
            pliant.export(nn.Linear(4, 2), target, torch.ones(2, 4), weights, overwrite=True)
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "precious"}


# --- damaged and foreign folders --------------------------------------------------------------------------------------


def test_rebuilding_from_what_is_no_export_of_this_model(
    tmp_path: Path, exports: tuple[Path, dict[str, nn.Module]]
) -> None:
    source, _ = exports
    wide = build(32)
    with pytest.raises(BadInput, match="another model"):
        pliant.rebuild(wide, source / "filters")
    pliant.export(build(), tmp_path / "dense", X, ["safetensors"])
    assert not (tmp_path / "dense" / "plan.json").exists()
    with pytest.raises(DamagedFile, match="another model"):
        pliant.rebuild(wide, tmp_path / "dense")
    with pytest.raises(DamagedFile, match=r"has no model\.safetensors"):
        pliant.rebuild(build(), tmp_path)
    for name in ("plan.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(source / "rank", folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DamagedFile, match=name):
            pliant.rebuild(build(), folder)
