"""How a user's model is called on an example.

The forward pass is somebody else's code: it may take a tensor, a tuple of tensors or keyword arguments, return any
container, draw random numbers, print, and raise anything. All code that runs a model in order to inspect it uses this
module, so that examples are checked in one place and the random state does not change::

    inputs = as_inputs(example_inputs)      the example as a tuple of tensors or a dict of arguments
    outputs = run(model, inputs)            the tensors that the model returns for it
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree

from pliant.errors import BadInput, first_line

Example = Tensor | Sequence[Tensor] | Mapping[str, Any]  # for model(x), model(*xs) or model(**xs)
Inputs = tuple[Tensor, ...] | dict[str, Any]
Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)

# The names in transformers for the keys and values that generating networks pass from step to step: before version
# 5.24, and since.
_CACHES = ("past_key_values", "cache")
# Nothing to look into for results.
_PLAIN = (str, bytes, bool, int, float, complex, type, torch.dtype, torch.device, torch.Size, nn.Module)


def as_inputs(example_inputs: Example) -> Inputs:
    """Return the example as a tuple of tensors or a dict of keyword arguments; raise BadInput if it is neither."""
    if isinstance(example_inputs, Mapping):
        named = dict(example_inputs)
        if all(isinstance(name, str) for name in named) and tensors_of(named):
            return named
        raise BadInput("example_inputs as a mapping must go from argument names to values, at least one a tensor")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise BadInput(
            f"example_inputs must be a tensor, a tuple of tensors or a dict of arguments, not {type(inputs).__name__}"
        )
    return tuple(inputs)


def tensors_of(data: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dicts and the output classes of transformers."""
    return [leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)]


def results_of(output: Any) -> list[Tensor]:
    """Return all tensors in what a model returns, as :func:`tensors_of`, and those in data classes and other objects.

    Caches of keys and values of generating networks are left out, see :func:`call`.
    """
    found: list[Tensor] = []
    seen: set[int] = set()  # of the objects on the way, which may refer to each other

    def look(value: Any) -> None:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in seen and not isinstance(leaf, _PLAIN) and not inspect.isroutine(leaf):
                seen.add(id(leaf))
                for part in _parts(leaf):
                    look(part)

    look(output)
    return found


def _parts(leaf: Any) -> list[Any]:
    """Return what a container holds that pytree does not know, or the attributes of an object."""
    if isinstance(leaf, Mapping):
        return [value for name, value in leaf.items() if name not in _CACHES]
    if isinstance(leaf, (Sequence, Set)):
        return list(leaf)
    slots = [name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ())]
    names = dict.fromkeys([*slots, *getattr(leaf, "__dict__", {})])
    return [getattr(leaf, name) for name in names if name not in _CACHES and hasattr(leaf, name)]


def map_tensors(change: Callable[[Tensor], Tensor], data: Item) -> Item:
    """Return nested data with each tensor changed."""
    changed: Item = pytree.tree_map_only(Tensor, change, data)
    return changed


_wraps: Callable[[object], bool] = _python_dispatch.is_traceable_wrapper_subclass


def plain(model: Module) -> Module:
    """Return the module that ``torch.compile(model)`` wraps, or the model itself; raise BadInput if it cannot be used.

    Raises:
        BadInput: a module is lazy and has no parameters yet, or is scripted, or its parameters are tensors of
            another kind, as after quantisation.
    """
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # if it is not loaded, nothing is compiled
    while compiled is not None and isinstance(model, compiled.OptimizedModule):
        model = model._orig_mod
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"{name!r} of the model" if name else "the model"
            raise BadInput(f"{which} is scripted: give the module that torch.jit made it of")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise BadInput(f"{name!r} of the model is not initialised: call the model on an example first")
        if _wraps(tensor) and not hasattr(tensor, "to_local"):  # a DTensor holds plain ones
            kind = type(tensor).__name__
            raise BadInput(f"{name!r} of the model is a {kind}, not a plain tensor: compress before you quantise")
    return model


def copied(model: Module, known: Mapping[int, Tensor] | None = None) -> Module:
    """Return a copy of a model; results that its modules keep with their graph of gradients are detached in it.

    Args:
        model: the model.
        known: id of a tensor → what the copy has in its place.

    Raises:
        BadInput: as for :func:`plain`.
    """
    model = plain(model)
    kept = [x for module in model.modules() for x in kept_results(module) if x.grad_fn is not None]
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in kept}
    return duplicate(model, memo | dict(known or {}))


def duplicate(model: Module, known: Mapping[int, Any] | None = None) -> Module:
    """Return a deep copy of a model that :func:`copied` has made, in about half the time of a plain one.

    Args:
        model: the model.
        known: id of an object → what the copy has in its place.
    """
    memo = dict(known or {})
    for module in model.modules():  # each has a dozen empty containers for hooks, each of them a slow copy
        empty = (value for value in vars(module).values() if type(value) in (dict, OrderedDict, set) and not value)
        memo |= {id(value): type(value)() for value in empty}
    return copy.deepcopy(model, memo)


_MACHINERY = frozenset(vars(nn.Module()))
"""The attributes of every module: parameters and buffers are no results, and hooks hold none."""


def kept_results(module: nn.Module, attribute: str | None = None) -> list[Tensor]:
    """Return the tensors that a module keeps besides parameters and buffers, in all attributes or in one.

    They may be attributes themselves, or lie in containers or in the attributes of an object.
    """
    names = vars(module).keys() - _MACHINERY if attribute is None else {attribute} - _MACHINERY
    found: list[Tensor] = []
    for value in (value for name, value in vars(module).items() if name in names):
        if not isinstance(value, _PLAIN) and value is not None:
            known = isinstance(value, (Tensor, list, tuple, dict)) or not hasattr(value, "__dict__")
            found += tensors_of(value if known else list(vars(value).values()))
    return [x for x in found if not isinstance(x, nn.Parameter)]


def count_calls(model: nn.Module, inputs: Inputs) -> Counter[nn.Module]:
    """Run ``model`` in its current mode, and count the calls of each module.

    Raises:
        BadInput: the model cannot be called on the inputs.
    """
    calls: Counter[nn.Module] = Counter()
    handles = [m.register_forward_hook(lambda m, args, out: calls.update([m])) for m in model.modules()]
    try:
        run(model, inputs)
    except Exception as error:  # a user's forward may raise anything
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors_of(inputs))
        raise BadInput(f"the model cannot be called on the example of shape {shapes}: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Call ``model`` and list the tensors that it returns, without the cache of keys and values of generating networks.

    The cache holds earlier results of attention. Its shape depends on the heads, and only the same attention reads it.
    """
    with eager():
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if isinstance(output, Mapping):
        output = {name: value for name, value in output.items() if name not in _CACHES}
    return results_of(output)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Call ``model`` without gradients and list its tensors; the random number generators do not change."""
    with torch.no_grad(), same_random_state(model, inputs):
        return call(model, inputs)


def same_random_state(model: nn.Module, inputs: Inputs) -> contextlib.AbstractContextManager[None]:
    """Return a context after which PyTorch's generators are as before, on the devices of a model and its inputs."""
    devices = sorted({x.device.index or 0 for x in [*model.parameters(), *tensors_of(inputs)] if x.is_cuda})
    return torch.random.fork_rng(devices)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled modules run as they were written, and call the layers inside."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and the printed text of a library."""
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Return a context in which a model is in eval mode; on exit each module returns to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def batch_fault(error: Exception) -> str:
    """Return in one line why a model cannot be called on a batch."""
    text = first_line(error)
    if isinstance(error, TypeError) and "missing" in text:
        text += "; a batch of several inputs is ((a, b), labels) or a dict"
    return text


def inputs_of(batch: Any) -> Any:
    """Return the model's inputs in a batch: the first of a tuple or list (images, labels), or the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch
