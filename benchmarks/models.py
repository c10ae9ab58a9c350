"""Compress many networks: parameters, MACs, bytes, latency, and how far the outputs are from those of a twin.

    python benchmarks/models.py                  writes docs/models.md; minutes, on an idle machine
    python benchmarks/models.py --quick          prints two of the tables, without latencies; seconds

Networks have random weights, so nothing has to be downloaded. Their accuracy means nothing, but they cost the same as
trained networks. Every compact network is compared with its twin, a network of the old shape that should compute the
same. Both run in float64, where any difference beyond rounding is a mistake. The page lists what a compressor left
alone, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from backends import Latency, backend_latencies
from latency import share
from notes import processor, spread, table
from torch import Tensor, nn

import pliant
from pliant import measuring
from pliant.calling import as_inputs, map_tensors, run
from pliant.compression import Compressor, Plan, masked_twin
from pliant.exporting.graph import max_difference
from pliant.structure.attention import is_conv1d

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PACKAGES = ("torch", "transformers", "onnxruntime")
QUICK = ("resnet", "gpt2")
BACKENDS = ("eager", "onnx")
RATIO = 0.5

RANK = pliant.LowRank(scheme="channel")  # a twin's weight is a product of two matrices
COMPRESSORS: dict[str, Compressor[Any]] = {
    "filters": pliant.FilterPruning(RATIO),
    "heads": pliant.HeadPruning(RATIO),
    "rank": RANK.at(RATIO),
    "filters+rank": pliant.Chain(pliant.FilterPruning(), RANK).at(RATIO),
    "filters+rank+int8": pliant.Chain(pliant.FilterPruning(), RANK, pliant.Int8()).at(RATIO),
}


# --- networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network for images or texts, an example of one, and a description of how it was built."""

    build: Callable[[], nn.Module]
    example: Any
    text: str


def shipped(name: str, width: float = 1.0) -> Case:
    build = functools.partial(pliant.build_model, name, num_classes=10, image_shape=(3, 32, 32), width=width)
    narrow = f", width {width:g}" if width != 1 else ""
    return Case(build, images(32), f"pliant's `{name}`{narrow}; one image of 32×32")


def hub(model: str, config: str, example: Any, **sizes: Any) -> Case:
    def build() -> nn.Module:
        network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return network

    settings = ", ".join(f"{name}={value}" for name, value in sizes.items())
    what = (
        "one text of 64 tokens"
        if isinstance(example, dict)
        else f"one image of {example.shape[-1]}×{example.shape[-1]}"
    )
    return Case(build, example, f"transformers' `{model}`, `{config}({settings})`; {what}")


def images(side: int) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


VOCABULARY = 1000
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY}
BLOCKS: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
GROUPED: dict[str, Any] = BLOCKS | {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 384}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
CASES = {
    "resnet18": shipped("resnet18"),
    "vgg16": shipped("vgg16"),
    "wrn28_10": shipped("wrn28_10", width=0.2),
    "vit_tiny": shipped("vit_tiny"),
    "resnet": hub(
        "ResNetForImageClassification",
        "ResNetConfig",
        images(64),
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
    ),
    "mobilenet": hub("MobileNetV2ForImageClassification", "MobileNetV2Config", images(64), depth_multiplier=0.5),
    "convnext": hub(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        images(64),
        hidden_sizes=[48, 96, 192],
        depths=[2, 2, 2],
        num_stages=3,
    ),
    "vit": hub("ViTForImageClassification", "ViTConfig", images(32), **BLOCKS, image_size=32, patch_size=4),
    "bert": hub("BertForSequenceClassification", "BertConfig", tokens(), **TEXT, **BLOCKS, max_position_embeddings=64),
    "gpt2": hub("GPT2LMHeadModel", "GPT2Config", tokens(), **TEXT, n_embd=128, n_layer=4, n_head=4, **ENDS),
    "llama": hub("LlamaForCausalLM", "LlamaConfig", tokens(), **TEXT, **GROUPED),
}


def drawn(case: Case) -> nn.Module:
    """Return the network with its vectors drawn too.

    Biases of zero and untouched running statistics would hide a mistake: removed values must be non-zero.
    """
    torch.manual_seed(0)
    model = case.build().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.2, 1.2)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model


# --- twins ------------------------------------------------------------------------------------------------------------


def twin_difference(model: nn.Module, plan: Plan, example: Any) -> float:
    """Return how far the outputs are from the twin's in float64, as a share of the largest output.

    Each link of a chain is compared on the network that the links before it left; the largest difference counts.
    """
    largest = 0.0
    inputs = map_tensors(lambda x: x.double() if x.is_floating_point() else x, as_inputs(example))
    for step in plan.links or (plan,):
        small = pliant.replay(model, step)
        twin = merged(model, small, step) if step.compressor in ("LowRank", "Int8") else masked_twin(model, step)
        got, expected = (run(copy.deepcopy(network).double(), inputs) for network in (small, twin))
        for x, y in zip(got, expected, strict=True):
            difference, magnitude = max_difference(x, y)
            largest = max(largest, difference / magnitude)
        model = small
    return largest


def merged(model: nn.Module, small: nn.Module, step: Plan) -> nn.Module:
    """Return ``model`` in float64 with the matrices that the factors or eight-bit weights of ``small`` represent."""
    twin = copy.deepcopy(model).double()
    for layer in step.layers:
        new: Any = small.get_submodule(layer.name)
        if isinstance(new, nn.Sequential):
            weight = new.expand.weight.double().flatten(1) @ new.reduce.weight.double().flatten(1)
        elif hasattr(new, "scale"):
            weight = new.weight.double() * new.scale.double()
        else:
            continue  # left whole
        old: Any = twin.get_submodule(layer.name)
        with torch.no_grad():
            old.weight.copy_(weight.T if is_conv1d(old) else weight.reshape(old.weight.shape))
    return twin


# --- tables -----------------------------------------------------------------------------------------------------------


def measure(name: str, threads: list[int], rounds: int) -> str:
    """Return the section of one network, without latencies if ``rounds`` is 0."""
    case = CASES[name]
    model = drawn(case)
    models: dict[str, nn.Module] = {"dense": model}
    plans: dict[str, Plan] = {}
    refusals: dict[str, str] = {}
    for kind, compressor in COMPRESSORS.items():
        try:
            plans[kind] = compressor.plan(model, case.example)
        except pliant.Refused as error:
            refusals[kind] = str(error)
        else:
            models[kind] = compressor.apply(model, plans[kind])
    rows = backend_latencies(models, case.example, backends=BACKENDS, threads=threads, rounds=rounds) if rounds else []
    lines = []
    for kind, small in models.items():
        line = [kind, *costs(small, model, case.example)]
        line.append(f"{twin_difference(model, plans[kind], case.example):.0e}" if kind in plans else "")
        lines.append([*line, *(milliseconds(row) for row in rows if row.model == kind)])
    header = ["", "parameters", "MACs", "bytes", "to the twin"]
    if rounds:
        header += [
            f"{row.backend}, {row.threads} thread{'s' * (row.threads > 1)}" for row in rows if row.model == "dense"
        ]
    notes = [f"* {kind}: {kept(plan)}" for kind, plan in plans.items() if plan.refused and not plan.links]
    notes += [f"* {kind} was refused: {shortened(text)}" for kind, text in refusals.items()]
    return "\n".join([f"## {name}\n\n{case.text}.\n\n{table(header, lines)}", *notes, ""])


def costs(small: nn.Module, dense: nn.Module, example: Any) -> list[str]:
    return [
        share(measuring.parameters(small), measuring.parameters(dense), 1e6, "M"),
        share(measuring.macs(small, example), measuring.macs(dense, example), 1e6, "M"),
        share(measuring.file_bytes(small), measuring.file_bytes(dense), 2**20, "MiB"),
    ]


def milliseconds(row: Latency) -> str:
    return f"skipped: {row.skipped}" if row.skipped else spread([1e3 * t for t in row.quartiles()])


def kept(plan: Plan) -> str:
    """Say what a compressor left alone and why, with one clause for all layers that share a reason."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, why in plan.refused:
        groups.setdefault(re.sub(r"'[^']*'|\d+", "…", why), []).append((name, why))
    clauses = []
    for found in groups.values():
        name, why = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        clauses.append(f"`{name}`{more}: {why}")
    return f"{len(plan.refused)} left alone. " + "; ".join(clauses) + "."


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most].rpartition(' ')[0]} …"


def page(names: list[str], threads: list[int], rounds: int, command: str) -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    made = f"Made by `{command}` on {datetime.date.today()}: {packages}; {processor()}."
    sections = []
    for name in names:
        sections.append(measure(name, threads, rounds))
        print(sections[-1], flush=True)
    introduction = INTRODUCTION.format(rounds=rounds, ratio=RATIO)
    return "\n".join([f"# Models and compressors\n\n{made}\n\n{introduction}", *sections])


INTRODUCTION = """\
Networks of random weights, compressed without any training: the costs are those of trained networks. Each compressor
removes {ratio:.0%} of the parameters that *it can remove*, allocated globally; under each table stands what it had to
leave alone, and why. The links of a chain share the work, and one that finds nothing to remove leaves it to the others.
`rank` factorises convolutions by channels (`--scheme channel`: k×k, then 1×1), not in space, as is the default.

* **parameters, MACs, bytes**: what the compact network stores, what it multiplies in one forward pass, the size of its
  safetensors file; in brackets as a share of the dense network's.
* **to the twin**: the largest difference between the outputs of the compact network and of its twin, both in float64,
  as a share of the largest output. The twin of removed filters and heads is the network before, with zeros in the
  columns that read them; that of factors and of eight-bit weights has the matrices that they stand for. Links of a
  chain are compared one by one. The difference is rounding, or a mistake; it is not what compression costs in accuracy.
* **eager, onnx**: milliseconds of a forward pass in torch and in ONNX Runtime, the median of {rounds} rounds that all
  networks and backends of a table took in turn, with quartiles. Every ONNX graph was first compared with torch in
  float32, on batches of one, two and three: its outputs differ by less than 1e-4 of the largest one.

Small networks are quick whatever leaves them: calling an operation then costs more than its multiplications, and two
thin layers take longer than a wide one. Eight-bit weights are multiplied out in each forward pass: they save bytes, not
time.
"""


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="", help=f"names of {', '.join(CASES)}, separated by commas")
    parser.add_argument("--quick", action="store_true", help=f"print the tables of {' and '.join(QUICK)}, unmeasured")
    arguments = parser.parse_args(given)
    threads = [int(count) for count in arguments.threads.split(",")]
    names = arguments.only.split(",") if arguments.only else list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"unknown networks {', '.join(sorted(unknown))}: known are {', '.join(CASES)}")
    if arguments.quick:
        print("\n".join(measure(name, threads, 0) for name in QUICK))
        return
    command = f"python benchmarks/models.py --rounds {arguments.rounds} --threads {arguments.threads}"
    arguments.out.write_text(page(names, threads, arguments.rounds, command), encoding="utf-8")


if __name__ == "__main__":
    main()
