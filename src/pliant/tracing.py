"""A model as a graph that runs without its Python code: ``torch.export`` programs and ONNX models.

Both come from one trace of a copy of the model: in eval mode, in float32, on the CPU, with the batch (the first
dimension of the inputs) left open. The model, its mode and gradients and the random number generator stay as they are.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.errors import BadInput
from pliant.layers import as_inputs, line, run

BATCH = "batch"
OPSET = 20  # the exporter's own default; ONNX Runtime has run it since 1.17 (2024)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_PROTOBUF_LIMIT = 2**31 - 2**24  # bytes; protobuf messages end at 2 GiB, the graph needs some room beside the weights


class Traced:
    """A model's graph with an open batch dimension.

    Args:
        model: any module; it is copied.
        example_inputs: a tensor or tuple of tensors that ``model(*example_inputs)`` takes, with the batch as first
            dimension; an input whose first dimension differs from that of the first input keeps its shape.

    Raises:
        BadInput: the model cannot be called on the example, or cannot be traced; the reason stands in one line.

    Attributes:
        model: the copy that was traced; its outputs are the reference for every format.
        program: the ``torch.export.ExportedProgram``.
        inputs: the example with at least two samples, since a dimension of one is taken for a constant.
        batched: for each input, whether its first dimension is the batch.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> None:
        inputs = tuple(_plain(x) for x in as_inputs(example_inputs))
        if not inputs[0].ndim or not len(inputs[0]):
            raise BadInput(f"the first input must have a batch dimension, got shape {tuple(inputs[0].shape)}")
        self.batched = tuple(bool(x.ndim) and len(x) == len(inputs[0]) for x in inputs)
        self.inputs = inputs if len(inputs[0]) > 1 else self.example(2, inputs)
        self.model = _portable_copy(model)
        try:
            self.outputs = run(self.model, self.inputs)
        except Exception as error:  # whatever a user's forward may raise
            shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
            raise BadInput(f"the model cannot be called on the example of shape {shapes}: {line(error)}") from error
        if not self.outputs:
            raise BadInput("the model returns no tensor: there is nothing to export")
        self.program = self._trace()

    def example(self, batch: int, inputs: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Return the inputs with ``batch`` samples, the example's own again and again."""
        inputs = self.inputs if inputs is None else inputs
        return tuple(
            x[torch.arange(batch) % len(x)] if batched else x for x, batched in zip(inputs, self.batched, strict=True)
        )

    def _trace(self) -> torch.export.ExportedProgram:
        batch = torch.export.Dim(BATCH, min=1)
        shapes = tuple({0: batch} if batched else None for batched in self.batched)
        traced: nn.Module = self.model
        with torch.no_grad():
            output = self.model(*self.inputs)
        if not isinstance(output, Tensor):
            # Containers of a user's own could not be read without their class: the graph returns a plain tuple.
            traced = _Flat(self.model)
        try:
            with _undisturbed():
                return torch.export.export(traced, self.inputs, dynamic_shapes=_by_position(traced, shapes))
        except Exception as error:  # the tracer runs a user's code
            raise BadInput(f"torch.export cannot trace the model: {_reason(error)}") from error
