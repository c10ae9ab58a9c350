"""The reference that may train again: prune, then retrain with one of five learning rate schedules.

With the learning rates of the training, lr(t) for t < T, and R steps of retraining:

    FT     lr(T − 1)                                          fine-tuning: the last one
    LRW    lr(T − R + t)                                      rewinding: the last R steps again
    SLR    lr from its maximum on, compressed in time         scaled restarting; after a warm-up
    CLR    from max lr to min lr along half a cosine wave     cyclic restarting; after a warm-up
    LLR    from max lr to 0 along a line                      linear restarting; after a warm-up

The warm-up rises linearly to the first value over a tenth of the steps.

FT: Han et al. 2015, arXiv 1506.02626. LRW: Renda, Frankle, Carbin 2020, arXiv 2003.02389. SLR, CLR: Le, Hua 2021,
Network pruning that matters, ICLR. LLR: Zimmer, Spiegel, Pokutta 2023, How I learned to stop worrying and love
retraining, ICLR, arXiv 2111.00843.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pliant.errors import BadInput, unknown

SCHEDULES = ("FT", "LRW", "SLR", "CLR", "LLR")
WARMUP = 0.1


def rates(schedule: str, original: Sequence[float], steps: int) -> list[float]:
    """Return the learning rate of each step of a retraining.

    Args:
        schedule: one of :data:`SCHEDULES`.
        original: the learning rate of each step of the training.
        steps: number of steps of the retraining; for LRW at most that of the training.

    Raises:
        BadInput: the schedule is unknown, or the number of steps is out of range.
    """
    if schedule not in SCHEDULES:
        raise unknown("retraining schedule", schedule, SCHEDULES)
    if steps < 1 or not original or (schedule == "LRW" and steps > len(original)):
        raise BadInput(f"{schedule} cannot retrain for {steps} steps after a training of {len(original)}")
    if schedule == "FT":
        return [original[-1]] * steps
    if schedule == "LRW":
        return list(original[len(original) - steps :])
    high, low = max(original), min(original)
    falling = original[original.index(high) :]  # without the training's own warm-up
    warm = math.floor(WARMUP * steps + 0.5)
    rest = steps - warm
    shapes: dict[str, Callable[[float], float]] = {
        "SLR": lambda t: falling[int(t * len(falling))],
        "CLR": lambda t: low + (high - low) * (1 + math.cos(math.pi * t)) / 2,
        "LLR": lambda t: high * (1 - t),
    }
    after = [shapes[schedule](t / rest) for t in range(rest)]
    return [after[0] * (t + 1) / (warm + 1) for t in range(warm)] + after


def retrain(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    lrs: Sequence[float],
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> None:
    """Retrain a compressed network, in place, with SGD; zero entries of weights stay zero.

    Args:
        model: a network that a compressor returned, on the device of the batches.
        batches: images and labels of each step, as many as ``lrs``.
        lrs: learning rates, see :func:`rates`.
        momentum: of SGD.
        weight_decay: of SGD.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lrs[0], momentum=momentum, weight_decay=weight_decay)
    masks = [(p, p != 0) for p in model.parameters() if p.ndim > 1 and not p.all()]
    training = model.training
    model.train()
    for (images, labels), lr in zip(batches, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for p, mask in masks:
                p.mul_(mask)
    model.train(training)


def cycles(ratio: float, count: int) -> list[float]:
    """Return the ratio after each of ``count`` rounds of pruning, each of which removes the same share of the rest.

    Iterative magnitude pruning (Han et al. 2015) compresses to the first ratio, retrains, and repeats with the next.
    """
    return [1 - (1 - ratio) ** (i / count) for i in range(1, count + 1)]
