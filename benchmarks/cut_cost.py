"""Measure what cuts by calibration data cost, in forward passes of the dense network over the data, and in memory.

    python benchmarks/cut_cost.py                                                  # ResNet-18, 32×32 pixels
    python benchmarks/cut_cost.py --model resnet8 --width 2 --side 16

The network is not trained and the images are smooth noise: what is measured hardly depends on either, but a trained
network needs fewer sweeps. Memory is what the process has taken at most since the first forward pass.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.compression.budgets import Budget, fit
from pliant.compression.calibration import Calibration
from pliant.compression.refit import Refitter

T = TypeVar("T")
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--shares", type=lambda text: [float(s) for s in text.split(",")], default=[0.5, 0.3, 0.1])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batches = images(arguments.images, arguments.side).split(128)
    model = network(arguments.model, arguments.width, arguments.side, batches)
    passes = [spent(lambda: forward(model, batches))[1] for _ in range(3)]
    unit, before = statistics.median(passes), peak()
    print(f"{arguments.model}, width {arguments.width}, {arguments.images} images of {arguments.side}×{arguments.side}")
    print(f"a forward pass: {unit:.1f} s ({min(passes):.1f} to {max(passes):.1f}), {arguments.threads} threads")

    def tell(name: str, run: Callable[[], T]) -> T:
        result, seconds = spent(run)
        print(f"{name}: {seconds:.1f} s = {seconds / unit:.1f} passes, +{peak() - before:.2f} GiB", flush=True)
        return result

    example, compressor = batches[0][:2], pliant.FilterPruning()
    calibration = Calibration(batches, model, example)
    analysis = tell("choosing, for all sizes", lambda: compressor.analyse(model, example, calibration))
    refitter = Refitter(model, example, calibration)
    for share in arguments.shares:
        plan = fit(model, compressor, example, Budget("keep_params", share), analysis)
        small = compressor.apply(model, plan, analysis=analysis)
        tell(f"{share:.0%} of the parameters: a pass of the small network", lambda s=small: forward(s, batches))
        tell(f"{share:.0%} of the parameters: refit", lambda s=small, p=plan: refitter.refit(s, p))


def images(count: int, side: int) -> Tensor:
    """Return smooth noise, (count, 3, side, side)."""
    coarse = F.interpolate(torch.randn(count, 3, 8, 8), size=(side, side), mode="bicubic")
    return coarse + 0.2 * torch.randn(count, 3, side, side)


def network(name: str, width: float, side: int, batches: tuple[Tensor, ...]) -> nn.Module:
    """Return a network with scattered BatchNorm scales, and statistics of the data."""
    model = pliant.build_model(name, num_classes=10, image_shape=(3, side, side), width=width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    forward(model.train(), batches[:4])
    return model.eval()


@torch.no_grad()
def forward(model: nn.Module, batches: tuple[Tensor, ...]) -> None:
    for batch in batches:
        model(batch)


def spent(run: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def peak() -> float:
    """Return the most memory that the process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


if __name__ == "__main__":
    main()
