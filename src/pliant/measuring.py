"""Measurements of a network: accuracy, parameters, MACs, bytes, latency.

MACs (multiply-accumulates) and latency are those of dense computation: zeros count like any other number.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from pliant.calling import Example, Inputs, as_inputs, call, copied, eval_mode, map_tensors, plain, tensors_of
from pliant.errors import BadInput
from pliant.version import __version__

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16"; "auto" is bf16 if the hardware multiplies it natively, else fp32.

    Raises:
        BadInput: the precision is unknown.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            raise BadInput(f"precision must be auto, {' or '.join(PRECISIONS)}, got {precision!r}")
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.backends.mkldnn.is_available() and _cpu_has_bf16()
    return "bf16" if native else "fp32"


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, precision: str = "fp32"
) -> float:
    """Return the top-1 accuracy, a fraction in [0, 1], in eval mode; the model's own modes are restored.

    Args:
        model: a network on ``device`` that maps (B, C, H, W) to (B, classes).
        batches: pairs of images (B, C, H, W) and labels (B,).
        device: the device to evaluate on.
        precision: "fp32", or "bf16" / "fp16" for autocast.

    Raises:
        BadInput: there is no batch.
    """
    correct, total = torch.zeros((), dtype=torch.int64, device=device), 0
    dtype = PRECISIONS[precision]
    with eval_mode(model), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for images, labels in batches:
            predicted = model(images.to(device)).argmax(dim=1)
            correct += (predicted == labels.to(device)).sum()
            total += len(labels)
    if not total:
        raise BadInput("accuracy needs at least one image, got none")
    return correct.item() / total


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def nonzero(model: nn.Module) -> int:
    """Return the number of parameters that are not zero, shared ones once."""
    return int(sum(torch.count_nonzero(p) for p in model.parameters()))


def file_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the network's safetensors file: parameters, buffers and the header."""
    return len(safetensors.torch.save(state_tensors(model)))


def macs(model: nn.Module, example_inputs: Example) -> int:
    """Return the multiply-accumulates of one forward pass, per sample of the example.

    Convolutions, matrix products and attention are counted, on a copy without data, which takes almost no time; only a
    network whose forward needs real values is run once.

    Args:
        model: any module; not changed.
        example_inputs: a tensor, a tuple of tensors or a dict of keyword arguments that the model takes; the number of
            samples is the first dimension of the first tensor.
    """
    inputs = as_inputs(example_inputs)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see the encoder's fused kernels
    try:
        try:
            with torch.device("meta"):
                flops = _flops(_without_data(model), map_tensors(lambda x: x.to("meta"), inputs))
        except (RuntimeError, NotImplementedError):
            # oneDNN's fused LSTM is one operation that the counter does not know.
            with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
                flops = _flops(copied(model), inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return flops // 2 // len(tensors_of(inputs)[0])


def _without_data(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the meta device, without copying its data on the way."""
    hollow: dict[int, Any] = {}
    for p in plain(model).parameters():
        hollow[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for buffer in model.buffers():
        hollow[id(buffer)] = buffer.to("meta")
    return copied(model, hollow)


def _flops(model: nn.Module, inputs: Inputs) -> int:
    counter = FlopCounterMode(display=False)
    # It has hooks on all modules, of which a compiled one warns.
    with warnings.catch_warnings(action="ignore"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model.eval(), inputs)
    return int(counter.get_total_flops())


def latencies(
    models: Sequence[nn.Module], example_inputs: Example, *, seconds: float = 0.05, rounds: int = 3
) -> list[float]:
    """Return the seconds per forward pass of each model, the median over ``rounds`` in which all models take turns.

    Because the models take turns, the ratio of two of them is reliable even if a shared machine gets slower or faster.

    Args:
        models: networks on the example's device.
        example_inputs: one batch: a tensor, a tuple of tensors or a dict of keyword arguments.
        seconds: minimum time per measurement.
        rounds: number of measurements per model.
    """
    inputs = as_inputs(example_inputs)
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models:
            stack.enter_context(eval_mode(model))
        calls = [bound_call(model, inputs) for model in models]
        times = take_turns(calls, seconds=seconds, rounds=rounds, threads=threads)
    return [statistics.median(series) for series in times]


def bound_call(model: Callable[..., object], inputs: Inputs) -> Callable[[], object]:
    """Return a function without arguments that calls ``model`` on ``inputs``."""
    return functools.partial(model, **inputs) if isinstance(inputs, dict) else functools.partial(model, *inputs)


def take_turns(
    calls: Sequence[Callable[[], object]], *, seconds: float, rounds: int, threads: int
) -> list[list[float]]:
    """Return the seconds that each call takes in each of the rounds, each the median over at least ``seconds``."""
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for timer, series in zip(timers, times, strict=True):
            series.append(timer.blocked_autorange(min_run_time=seconds).median)
    return times


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict in the form for safetensors: contiguous, each tied tensor once, under its first name.

    A tensor that shares the memory of another one, but not its shape, is copied.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    memories: set[int] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if memory in memories else plain
        memories.add(memory)
    return tensors


def versions() -> dict[str, str]:
    """Return the versions that a measurement depends on."""
    return {
        "pliant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
