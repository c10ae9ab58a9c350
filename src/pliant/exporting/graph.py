"""A model as a graph that runs without its Python code: ``torch.export`` programs and ONNX models.

Both come from one trace of a copy of the model: in eval mode, in float32, on the CPU, with the batch (the first
dimension of the inputs) left open. The model itself, its mode, its gradients and the random number generator do not
change. The written file is read back and compared with the copy on other batch sizes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.calling import Example, Inputs, as_inputs, call, copied, map_tensors, quiet, run, tensors_of
from pliant.errors import BadInput, first_line
from pliant.files import write_bytes

BATCH = "batch"
OPSET = 20  # the exporter's own default; ONNX Runtime supports it since 1.17 (2024)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Largest difference from the model's own outputs, as a share of their largest magnitude. Another order of float32 sums
# gives 1e-6 in deep networks; a mistake in a graph gives far more than this.
TOLERANCE = 1e-4

# A protobuf message is limited to 2 GiB. Larger weights go to a separate file; the graph also needs some space.
_ONE_FILE = 2**31 - 2**26


class Portable:
    """A copy of a model that can be written as a graph with an open batch dimension.

    Args:
        model: any module; it is copied.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments that the model takes. The batch is
            the first dimension of the first tensor; another one shares it if its first dimension has that length, and
            keeps its shape otherwise. Arguments that are not tensors become part of the graph.
        graph: whether a graph is wanted, which has to return something.

    Raises:
        BadInput: the model cannot be copied, or not called on the example.

    Attributes:
        model: the copy; its outputs are the reference for every format.
        batch: number of samples that the graph is traced with, at least 2, because the tracer treats a dimension of 1
            as a constant.
        given_batch: number of samples in the example.
        names: names of the inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Example, *, graph: bool = True) -> None:
        self.model, self.graph = _portable_copy(model), graph
        self._given = map_tensors(_plain, as_inputs(example_inputs))
        first = tensors_of(self._given)[0]
        if not first.ndim or not len(first):
            raise BadInput(f"the first input must have a batch dimension, got shape {tuple(first.shape)}")
        self.given_batch = len(first)
        self.batch = max(2, self.given_batch)
        self.outputs(self.given_batch)
        args, kwargs = _split(self._given)
        self._bound = dict(inspect.signature(self.model.forward).bind(*args, **kwargs).arguments)
        paths = pytree.tree_leaves_with_path(kwargs or self._bound)
        self.names = [_joined(path) for path, leaf in paths if isinstance(leaf, Tensor)]

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The traced graph; it returns a tensor, or a tuple of tensors in place of any other container.

        Raises:
            BadInput: the model cannot be traced; the message gives the reason in one line.
        """
        args, kwargs = _split(self.arguments(self.batch))
        with _flat_outputs(self.model), _quiet():
            try:
                return torch.export.export(
                    self.model, args, kwargs, dynamic_shapes=self._shapes(torch.export.Dim(BATCH, min=1))
                )
            except Exception as error:  # the tracer runs a user's code
                raise BadInput(
                    f"pt2 and onnx need a graph, and torch.export cannot trace the model: {reason(error)}"
                ) from error

    def arguments(self, batch: int) -> Inputs:
        """Return inputs for ``batch`` samples: the example, repeated or cut."""

        def resized(x: Tensor) -> Tensor:
            return x[torch.arange(batch) % len(x)] if self._batched(x) else x.clone()

        return map_tensors(resized, self._given)

    def outputs(self, batch: int) -> list[Tensor]:
        """Return the tensors that the copied model returns for :meth:`arguments`; raise BadInput if it fails."""
        arguments = self.arguments(batch)
        try:
            outputs = run(self.model, arguments)
        except Exception as error:  # a user's forward may raise anything
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors_of(arguments))
            example = "example" if batch == self.given_batch else "example, resized to another batch,"
            raise BadInput(
                f"the model cannot be called on the {example} of shape {shapes}: {first_line(error)}"
            ) from error
        if not outputs and self.graph:
            raise BadInput("the model returns no tensor: there is nothing to export")
        return outputs

    def describe_inputs(self, *, any_batch: bool) -> list[dict[str, Any]]:
        """Return name, shape and type of each input; with ``any_batch``, "batch" stands for the number of samples."""
        return [
            {
                "name": name,
                "shape": [BATCH, *x.shape[1:]] if any_batch and self._batched(x) else list(x.shape),
                "dtype": _type(x),
            }
            for name, x in zip(self.names, tensors_of(self._given), strict=True)
        ]

    def describe_outputs(self, *, any_batch: bool) -> list[dict[str, Any]]:
        """Return name, shape and type of each output; a length that varies with the batch in another way is "any"."""
        batch = self.batch if any_batch else self.given_batch
        outputs = self.outputs(batch)
        larger = self.outputs(batch + 1) if any_batch else outputs
        described = []
        for name, x, y in zip(_output_names(len(outputs)), outputs, larger, strict=True):
            lengths = zip(x.shape, y.shape, strict=True)
            shape = [a if a == b else BATCH if (a, b) == (batch, batch + 1) else "any" for a, b in lengths]
            described.append({"name": name, "shape": shape, "dtype": _type(x)})
        return described

    def save_program(self, path: Path) -> float:
        """Write the program for ``torch.export.load``, and return its largest difference from the model."""
        buffer = io.BytesIO()
        with _quiet():
            torch.export.save(self.program, buffer)
        write_bytes(path, buffer.getvalue())
        with _quiet():
            loaded = torch.export.load(path).module()
        return self._difference("pt2", lambda arguments: call(loaded, arguments))

    def save_onnx(self, path: Path) -> float:
        """Write the ONNX model, and return its largest difference from the model, in ONNX Runtime."""
        self.write_onnx(path)
        import onnx

        try:
            onnx.checker.check_model(path, full_check=True)
            session = onnx_session(path)
        except Exception as error:  # neither package has a base class for its errors
            raise BadInput(f"onnx: the written model is not valid: {reason(error)}") from error

        def infer(arguments: Inputs) -> list[Tensor]:
            return [torch.as_tensor(y) for y in session.run(None, self.feed(arguments))]

        return self._difference("onnx", infer)

    def feed(self, arguments: Inputs) -> dict[str, Any]:
        """Return the arrays that a session of the ONNX model takes, by name."""
        return {name: x.numpy() for name, x in zip(self.names, tensors_of(arguments), strict=True)}

    def write_onnx(self, path: Path) -> None:
        """Write the ONNX model without checking it; weights beyond 2 GB go to a separate file."""
        require_onnx()
        program = self.program
        count = len(self.outputs(self.batch))
        try:
            with _quiet():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=self.names,
                    output_names=_output_names(count),
                    dynamic_shapes=self._shapes(BATCH),
                    verbose=False,
                )
        except Exception as error:  # the converter's own errors have no common base
            raise BadInput(f"onnx: the graph cannot be converted: {reason(error)}") from error
        assert exported is not None  # only older exporters return None
        tensors = tensors_of([program.state_dict, program.constants])
        size = sum(x.numel() * x.element_size() for x in tensors)
        exported.save(path, external_data=size > _ONE_FILE)

    def _shapes(self, batch: object) -> dict[str, Any]:
        """Return the arguments of the model's forward by name, with ``{0: batch}`` or None for each tensor."""

        def spec(x: object) -> object:
            return {0: batch} if isinstance(x, Tensor) and self._batched(x) else None

        return dict(pytree.tree_map(spec, self._bound))

    def _batched(self, x: Tensor) -> bool:
        return bool(x.ndim) and len(x) == self.given_batch

    def _difference(self, name: str, candidate: Callable[[Inputs], list[Tensor]]) -> float:
        """Return the largest absolute difference over three batch sizes; raise BadInput if it exceeds rounding."""
        largest = 0.0
        for batch in (1, self.batch, self.batch + 1):
            expected = self.outputs(batch)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    got = candidate(self.arguments(batch))
            except Exception as error:
                raise BadInput(f"{name}: the written model fails on a batch of {batch}: {reason(error)}") from error
            shapes, expected_shapes = [tuple(x.shape) for x in got], [tuple(x.shape) for x in expected]
            if shapes != expected_shapes:
                raise BadInput(
                    f"{name}: a batch of {batch} gives outputs of shape {shapes}, the model gives {expected_shapes}"
                )
            for x, y in zip(got, expected, strict=True):
                difference, magnitude = max_difference(x, y)
                if not difference <= TOLERANCE * max(magnitude, 1e-3):
                    raise BadInput(
                        f"{name}: the written model differs from the model by {difference:.1e} on a batch of {batch}, "
                        f"with outputs up to {magnitude:.1e}: is its forward random, or does it change its own state?"
                    )
                largest = max(largest, difference)
        return largest


def max_difference(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest |x − y| and the largest finite |y|; equal infinities and pairs of NaN count as equal."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, (x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
    magnitude = torch.where(y.isfinite(), y.abs(), 0.0)
    return (float(difference.max()), float(magnitude.max())) if y.numel() else (0.0, 0.0)


def require_onnx() -> None:
    """Raise BadInput if a package that ONNX needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"onnx needs {' and '.join(missing)}: pip install 'pliant[export]'")


def onnx_session(path: Path, threads: int | None = None) -> Any:
    """Return an ONNX Runtime session on the CPU.

    Args:
        path: the ONNX model.
        threads: number of threads per operation; None leaves it to the runtime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _output_names(count: int) -> list[str]:
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _plain(x: Tensor) -> Tensor:
    """Return an input as a graph in float32 on the CPU takes it."""
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).contiguous()


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments."""
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def _joined(path: tuple[Any, ...]) -> str:
    """Return a name for a tensor among the arguments: "x", or "xs_0" in a tuple or dict."""
    return "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _portable_copy(model: nn.Module) -> nn.Module:
    try:
        twin: nn.Module = copied(model).cpu().float()
        twin = twin.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    except Exception as error:  # deepcopy and tensor subclasses raise what they like
        raise BadInput(f"the model cannot be copied as float32 to the CPU: {first_line(error)}") from error
    return twin.eval().requires_grad_(False)


@contextlib.contextmanager
def _flat_outputs(model: nn.Module) -> Iterator[None]:
    """Return a context in which ``model`` returns a tensor or a tuple of tensors, with the same signature."""
    forward, own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        tensors = call(forward, kwargs or args)  # type: ignore[arg-type]  # any callable does
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    model.forward = flat
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress gradients and the messages of the exporters, and keep the random state.

    The exporters warn about their own deprecations and print the graphs that they fail on. Here only one thing matters,
    whether the result equals the model, and that is measured.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.disable(disabled)


def reason(error: BaseException) -> str:
    """Return the first cause of an error in one line, without the tracer's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if fixed := re.search(r"specialized it to be a constant \((\d+)\)", text):
        return f"its forward holds for a batch of {fixed[1]} only, write it for any batch size"
    if guard := re.search(r"^\s*- (Not all values of .*)$", text, re.MULTILINE):
        return " ".join(guard[1].split())
    if "data-dependent" in text:
        return f"its forward decides by the values of a tensor: {first_line(error).partition(' (unhinted')[0]}"
    return f"{type(error).__name__}: {first_line(error)}"
