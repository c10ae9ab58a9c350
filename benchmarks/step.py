"""Measure what a step of SFW costs against SGD, Muon and exact decompositions, always as ratios within one process.

    python benchmarks/step.py --out benchmarks/results

Machines are shared and noisy, so the candidates of a table take turns, round after round. A ratio is the median over
rounds of (candidate / reference in the same round), with its quartiles. Writes a dated note and a chart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
from notes import processor, spread, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

import pliant
from pliant.measuring import resolve_precision
from pliant.norms import KSupport, Spectral
from pliant.optim.kept_directions import leading_vertices
from pliant.optim.sfw import BATCHED_SPECTRAL

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRESETS: dict[str, Any] = {
    "filters, k = 10 %": pliant.filters(0.1),
    "entries, k = 10 %": pliant.weights(0.1),
    "2:4": pliant.semi_structured(2, 4),
    "spectral, k = 10 %": pliant.rank(0.1),
    "spectral, k = 2 %": pliant.rank(0.02),
}
CANDIDATES = ["SGD", *PRESETS]
NATIVE_BF16 = resolve_precision("auto", torch.device("cpu")) == "bf16"  # emulated bf16 is ten times slower than float32
WARM = 40  # steps after which a momentum hardly grows


# --- measuring --------------------------------------------------------------------------------------------------------


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each candidate took in each round."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in candidates.items()
    }
    for timer in timers.values():
        timer.timeit(2)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).mean)
    return times


def ratio(times: list[float], reference: list[float]) -> str:
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    return spread(statistics.quantiles(ratios, n=4))


def milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.1f}"


# --- the steps of one model -------------------------------------------------------------------------------------------


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    model = pliant.build_model("resnet18", num_classes=10, image_shape=(3, 32, 32))
    for p in model.parameters():
        p.grad = 0.01 * torch.randn_like(p)
    return model


def optimizer(model: nn.Module, name: str, lr: float = 1e-6) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)
    # The classifier and everything but matrices take the step of SGD, and so does a first layer that 2:4 cannot hold.
    rules = [("fc.*", None), *([("conv1.*", None)] if name == "2:4" else []), ("*.weight", PRESETS[name])]
    groups = pliant.constrain(model, rules, default=None)
    return pliant.SFW(groups, lr=lr, momentum=0.9)


def step_times(rounds: int) -> str:
    model = resnet18()
    optimizers = {name: optimizer(model, name) for name in CANDIDATES}
    for opt in optimizers.values():
        for _ in range(WARM):
            opt.step()
    times = take_turns({name: opt.step for name, opt in optimizers.items()}, rounds)
    memory = {name: peak_memory(name) for name in CANDIDATES}
    rows = [
        [
            name,
            milliseconds(times[name]),
            ratio(times[name], times["SGD"]),
            f"{memory[name] / 2**20:.0f}",
            f"{memory[name] / memory['SGD']:.2f}",
        ]
        for name in CANDIDATES
    ]
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"## One step on all tensors of ResNet-18 ({parameters / 1e6:.1f}M parameters)\n\n"
        f"`optimizer.step()` alone, after {WARM} steps. Reference: `torch.optim.SGD(foreach=True, momentum=0.9)`. "
        "Memory is that of weights, gradients and all that torch allocates, at the peak of a step.\n\n"
        + table(["optimizer", "ms", "time / SGD", "memory, MiB", "memory / SGD"], rows)
    )


def peak_memory(name: str) -> int:
    """Return the bytes of weights, gradients and all that torch allocates for a step, at its peak."""
    model = resnet18()
    opt = optimizer(model, name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        opt.step()  # the first step scales weights into their balls
        with record_function("steady"):
            for _ in range(10):  # one of these steps measures the quality of singular directions
                opt.step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    start = next(e["ts"] for e in events if e.get("name") == "steady")
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held, peak = sum(2 * p.numel() * p.element_size() for p in model.parameters()), 0
    for moment, size in allocations:
        held += size
        peak = max(peak, held if moment >= start else 0)
    return peak


# --- the spectral oracle ----------------------------------------------------------------------------------------------


def spectral(rounds: int) -> str:
    shapes = [tuple(p.shape) for p in resnet18().parameters() if p.ndim == 4]
    rows = []
    for rho in (0.99, 1.0):
        shares = [reached(shape, rho) for shape in sorted(set(shapes))]
        rows.append([str(rho), f"{100 * min(shares):.2f} %", f"{100 * statistics.mean(shares):.2f} %"])
    quality = table(["ρ", "worst layer", "mean over shapes"], rows)

    matrices = [decaying(shape) for shape in shapes]
    ranks = [max(1, round(0.1 * min(a.flatten(1).shape))) for a in matrices]
    # As in the optimizer, small layers of one shape go together.
    stacks: dict[Any, list[Tensor]] = {}
    for i, a in enumerate(matrices):
        stacks.setdefault(a.shape if a.numel() <= BATCHED_SPECTRAL else i, []).append(a)
    batches = [torch.stack(members) for members in stacks.values()]
    norms = [Spectral(KSupport(max(1, round(0.1 * min(b[0].flatten(1).shape))))) for b in batches]
    bases = [leading_vertices(norm, [b], None, 1)[1] for norm, b in zip(norms, batches, strict=True)]
    kept = torch.empty(max(b.numel() for b in batches))  # all batches share it, as in the optimizer
    memory = [kept[: b.numel()].view(b.shape) for b in batches]

    def ours() -> None:
        for i, (norm, b) in enumerate(zip(norms, batches, strict=True)):
            _, bases[i], _ = leading_vertices(norm, [b], bases[i], 1, [memory[i]])

    weights = [nn.Parameter(a.flatten(1).clone()) for a in matrices]
    for w in weights:
        w.grad = w.detach().clone()
    muon = torch.optim.Muon(weights, lr=1e-6)
    model = resnet18()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 4)
    sfw = pliant.SFW(pliant.constrain(model, [("*", pliant.rank(0.1))]), lr=1e-6)
    candidates = {
        "kept directions, 1 iteration (ours)": ours,
        "ten block power iterations from a random start": lambda: [
            ten(a, k) for a, k in zip(matrices, ranks, strict=True)
        ],
        "full SVD": lambda: [Spectral(KSupport(k)).lmo(a) for a, k in zip(matrices, ranks, strict=True)],
    }
    vertex_times = take_turns(candidates, max(3, rounds // 6))
    steps = {"SFW, spectral, k = 10 %": sfw.step}
    if NATIVE_BF16:
        steps["torch.optim.Muon"] = muon.step
    else:
        steps["torch.optim.Muon, multiplying in float32"] = lambda: in_float32(muon.step)
    step_times = take_turns(steps, max(3, rounds // 3))
    rows = []
    for times in (vertex_times, step_times):
        first = next(iter(times.values()))
        rows += [[name, milliseconds(t), ratio(t, first)] for name, t in times.items()]
    return (
        f"## The spectral oracle on the {len(shapes)} convolutions of ResNet-18, k = 10 %\n\n"
        "Gradients G_t = ρ·G_{t−1} + √(1−ρ²)·N, N Gaussian with columns scaled by linspace(1, 0.01). Value of the "
        "vertex after ten steps as a share of the exact one:\n\n"
        + quality
        + "\nTime for all layers, vertices first, then whole steps:\n\n"
        + table(["oracle or step", "ms", "time / ours"], rows)
    )


def in_float32(step: Callable[[], Any]) -> None:
    """Run a step of Muon without its cast to bf16, for machines that only emulate bf16."""
    with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
        step()


def decaying(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    columns = math.prod(shape[1:])
    noise = torch.randn(shape[0], columns, generator=generator) * torch.linspace(1, 0.01, columns)
    return noise.reshape(shape)


def reached(shape: tuple[int, ...], rho: float) -> float:
    """Return the value of the vertex after ten steps as a share of the dual norm."""
    generator = torch.Generator().manual_seed(0)
    norm = Spectral(KSupport(max(1, round(0.1 * min(shape[0], math.prod(shape[1:]))))))
    g, basis = decaying(shape, generator), None
    for step in range(10):
        if step:
            g = rho * g + math.sqrt(1 - rho**2) * decaying(shape, generator)
        _, basis, value = leading_vertices(norm, [g[None]], basis, 1)
    return (value / norm.dual(g)).item()


def ten(a: Tensor, k: int) -> Tensor:
    matrix = a.flatten(1)
    matrix = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    basis = torch.linalg.qr(torch.randn(matrix.shape[1], k)).Q
    for _ in range(10):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    image = matrix @ basis
    return (-image / image.norm()) @ basis.T


# --- a whole training step --------------------------------------------------------------------------------------------


def training(rounds: int) -> str:
    """Time the passes and the step apart: the passes are the same for all, and their noise would hide the step."""
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    text = (
        "## A whole training step of ResNet-18, 32×32 images, batch 128\n\n"
        "Forward and backward pass, then the step of one optimizer; they take turns on one network with lr = 0, so "
        "that all see the same weights. The passes are the same for all: their median is that over all optimizers.\n\n"
    )
    precisions = ["float32"]
    if NATIVE_BF16:
        precisions.append("bf16 autocast, channels last")
    for precision in precisions:
        half = precision != "float32"
        model, inputs = resnet18(), images
        if half:
            model, inputs = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        optimizers = {name: optimizer(model, name, lr=0.0) for name in CANDIDATES}
        passes: list[float] = []
        steps: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for turn in range(1 + max(3, rounds // 4)):
            for name, opt in optimizers.items():
                started = time.perf_counter()
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                passed = time.perf_counter()
                opt.step()
                steps[name].append(time.perf_counter() - passed)
                passes.append(passed - started)
                for _ in range(WARM if turn == 0 else 0):
                    opt.step()
        passes = passes[len(CANDIDATES) :]  # the first round warms up
        both = statistics.median(passes)
        step = {name: statistics.median(values[1:]) for name, values in steps.items()}
        rows = [
            [name, milliseconds(steps[name][1:]), f"{(both + seconds) / (both + step['SGD']):.3f}"]
            for name, seconds in step.items()
        ]
        quartiles = ", ".join(f"{1e3 * q:.0f}" for q in statistics.quantiles(passes, n=4))
        text += f"{precision}; passes {quartiles} ms (quartiles):\n\n"
        text += table(["optimizer", "step, ms", "whole / SGD"], rows) + "\n"
    return text


# --- growth -----------------------------------------------------------------------------------------------------------


def growth(rounds: int, chart: Path) -> str:
    """Measure stacks of 1 to 100 equal layers of 1024×1024."""
    counts = [1, 3, 10, 30, 100]
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for count in counts:
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(count)))
        for p in model.parameters():
            p.grad = 0.01 * torch.randn_like(p)
        times = take_turns(
            {name: optimizer_of_stack(model, name).step for name in CANDIDATES}, max(3, rounds // (2 + count // 4))
        )
        for name, values in times.items():
            seconds[name].append(statistics.median(values))
    figure, axes = plt.subplots(figsize=(8.5, 4.5), dpi=120, layout="constrained")
    sizes = [count * 1024**2 for count in counts]
    for name, values in seconds.items():
        axes.loglog(sizes, values, marker="o", label=name)
    axes.set(xlabel="parameters", ylabel="seconds per step", title="A step grows linearly with the parameters")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside center right", frameon=False)
    figure.savefig(chart)
    rows = [
        [name, *(f"{1e9 * s / n:.2f}" for s, n in zip(values, sizes, strict=True))] for name, values in seconds.items()
    ]
    return (
        "## Growth with the number of parameters\n\n"
        "Nanoseconds per parameter and step, stacks of 1024×1024 layers; a constant row "
        "is linear growth.\n\n"
        + table(["optimizer", *(f"{n / 1e6:.0f}M" for n in sizes)], rows)
        + f"\n![Seconds per step]({chart.name})\n"
    )


def optimizer_of_stack(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    groups = pliant.constrain(model, [("*", PRESETS[name])])
    return pliant.SFW(groups, lr=1e-6, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="one of: steps, spectral, training, growth")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"step-{datetime.date.today()}"
    parts = {
        "steps": lambda: step_times(arguments.rounds),
        "spectral": lambda: spectral(arguments.rounds),
        "training": lambda: training(arguments.rounds),
        "growth": lambda: growth(arguments.rounds, arguments.out / f"{name}.png"),
    }
    text = (
        f"# The cost of a step, {datetime.date.today()}\n\n`python benchmarks/step.py --rounds {arguments.rounds}`; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}. Ratios are medians over rounds "
        "that the candidates took in turn, with quartiles.\n"
    )
    for part, run in parts.items():
        if arguments.only in ("", part):
            text += "\n" + run()
            print(text.rpartition("\n## ")[2], flush=True)
    (arguments.out / f"{name}{'-' + arguments.only if arguments.only else ''}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
