"""torch-pruning's dependency graph of everything that a forward computes.

torch-pruning reads the autograd graph from the outputs backwards. It would not see what the user's forward computes
without gradients, behind a ``detach``, or without returning it. So the forward runs here under :class:`_Trace`, in
which gradients cannot be switched off, and the graph starts from dropped results as well.

A layer of a class with a forward of its own may do more than its convolution, such as pad, normalise or activate. The
graph should show the convolution where it takes place: the step that reads the layer's weight is recorded as a layer,
the *core*.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pliant.calling import Inputs, call, map_tensors, quiet, run, same_random_state, tensors_of
from pliant.structure.attention import is_conv1d, projections
from pliant.structure.draws import SameDraws, seeded
from pliant.structure.layers import axis_length, own_forward, weighted_layers

_CORE = "pliant_core"
_STEPS = (
    nn.functional.linear,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
_RECURRENT = (nn.GRU, nn.RNN, nn.RNNCellBase)  # torch-pruning knows only the LSTM
_DETACHING = (Tensor.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]


class Traced:
    """The graph of a model.

    Args:
        model: the model, in eval mode; not changed.
        inputs: the inputs to call it on.
        training: further inputs, and seeds of ``SameDraws``, to call it on in training mode.

    Attributes:
        graph: torch-pruning's graph.
        model: the copy that it was made of. Its layers have the names of the model's.
        called: names of the modules that were called.
        names: layer of the copy → its name; a core has the name of its layer.
        mixing: nodes of the autograd graph at which recurrent layers mix channels → type and name of the layer.
        dropped: the nodes of the autograd graph whose results are neither returned nor read by anything in the graph.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, training: Sequence[tuple[Inputs, int]] = ()) -> None:
        # Gradients cannot be forced on a forward that changes its weights, nor can every one be trained.
        attempts = [(True, training)] if training else []
        attempts += [(True, ()), (False, ())]
        for forced, further in attempts:
            try:
                self._trace(model, inputs, further, forced)
            except Exception:
                if not forced:
                    raise
            else:
                return

    def _trace(self, model: nn.Module, inputs: Inputs, training: Sequence[tuple[Inputs, int]], forced: bool) -> None:
        import torch_pruning  # its import takes a second, and only this function needs it

        self.model = _readable(model)
        self.model.requires_grad_(True)  # frozen layers would be invisible
        cores = _add_cores(self.model, inputs)
        self.names = {module: name for name, module in self.model.named_modules()}
        self.names |= {core: self.names[layer] for layer, core in cores.items()}
        trace = _Trace(self.model, cores, training, forced)
        self.called: set[str] = set()
        hidden = [m for m in self.model.modules() if is_opaque(m) or isinstance(m, _RECURRENT)]
        handles = [m.register_forward_pre_hook(trace.enter) for m in hidden]
        handles += [m.register_forward_hook(trace.hide, with_kwargs=True) for m in hidden]
        handles += [m.register_forward_pre_hook(lambda m, _: self.called.add(self.names[m])) for m in self.names]
        try:
            with quiet(), torch.inference_mode(False), torch.enable_grad(), same_random_state(self.model, inputs):
                self.graph: Any = torch_pruning.DependencyGraph().build_dependency(
                    self.model, inputs, trace.roots, ignored_layers=list(cores), verbose=False
                )
        finally:
            for handle in handles:
                handle.remove()
        self.dropped = trace.dropped
        self.mixing = {node: (type(m).__name__, self.names[m]) for node, m in trace.mixing.items()}

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Return (name, layer) of all convolutions and linear layers of the copy, cores in place of their layers."""
        cores = {name: module for module, name in self.names.items() if isinstance(module, _Core)}
        return [(name, cores.get(name, m)) for name, m in weighted_layers(self.model) if not isinstance(m, _Core)]


def is_opaque(module: nn.Module) -> bool:
    """Return whether the graph should not look inside: torch-pruning misreads the many reshapes of attention.

    Only heads can leave attention, and those are found without the graph. The graph does look into a module that holds
    more layers than the projections and the output, such as a whole block.
    """
    attention = projections(module)
    if attention is None or isinstance(module, nn.MultiheadAttention):
        return False
    return sum(1 for _ in weighted_layers(module)) <= len({attention.query, attention.key, attention.value}) + 1


def _readable(model: nn.Module) -> nn.Module:
    """Return a copy in which layers that torch-pruning does not know are linear ones."""
    model = copy.deepcopy(model)
    linear: dict[nn.Module, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_conv1d(module):
            rows, columns = (axis_length(module, axis) for axis in ("outputs", "inputs"))
            if module not in linear:
                linear[module] = nn.Linear(columns, rows).to(module.weight)
            model.set_submodule(name, linear[module])
    return model


# --- layers with a forward of their own -------------------------------------------------------------------------------


class _Core(nn.Module):
    """The step of a layer that reads its weight, as a layer."""

    @staticmethod
    def of(layer: nn.Module) -> _Core:
        """Return the core of a layer, with its weight."""
        base = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.modules"))
        core: _Core = object.__new__(type(base.__name__, (_Core, base), {"forward": _Core.carry_out}))
        core.__dict__.update(vars(nn.Module()))
        core.__dict__ |= {name: value for name, value in vars(layer).items() if name not in core.__dict__}
        core._parameters = dict(layer._parameters)
        return core

    def carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out the step; torch-pruning looks at what a layer returns."""
        return func(*args, **kwargs)


class _Weights(TorchFunctionMode):
    """Notes which weights are read by the step of a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        if func in _STEPS:
            self.read.add(id(_weight(args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _weight(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("weight")


def _add_cores(model: nn.Module, inputs: Inputs) -> dict[nn.Module, _Core]:
    """Add a core to every layer with a forward of its own whose weight goes to a plain step as it is."""
    own = [m for _, m in weighted_layers(model) if isinstance(m, (nn.Linear, _ConvNd)) and own_forward(m)]
    if not own:
        return {}
    weights = _Weights()
    with weights, quiet():
        run(copy_of := copy.deepcopy(model), inputs)
    names = {id(m): name for name, m in model.named_modules()}
    cores: dict[nn.Module, _Core] = {}
    for layer in own:
        weight = copy_of.get_submodule(names[id(layer)])._parameters.get("weight")
        if weight is not None and id(weight) in weights.read:
            cores[layer] = _Core.of(layer)
            layer.add_module(_CORE, cores[layer])
    return cores


# --- everything that is computed --------------------------------------------------------------------------------------


class _Opaque(torch.autograd.Function):
    """A function that shows the graph which tensors a result depends on, but not how."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()


class _Trace(TorchFunctionMode):
    """A context in which gradients cannot be switched off, if they are forced, and all results are known."""

    def __init__(
        self, model: nn.Module, cores: dict[nn.Module, _Core], training: Sequence[tuple[Inputs, int]], forced: bool
    ) -> None:
        super().__init__()
        self.training, self.forced = training, forced
        self.cores = {id(layer._parameters["weight"]): core for layer, core in cores.items()}
        self.parameters = {id(p) for p in model.parameters()}
        self.results: list[Tensor] = []
        self.marks: list[int] = []
        self.dropped: set[Any] = set()
        self.mixing: dict[Any, nn.Module] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        if func is torch._C._set_grad_enabled and self.forced:
            return None
        if func in _DETACHING and self.forced and args[0].grad_fn is not None:
            return args[0]
        core = self.cores.get(id(_weight(args, kwargs or {}))) if func in _STEPS else None
        result = func(*args, **(kwargs or {})) if core is None else core(func, args, kwargs or {})
        leaves = pytree.tree_leaves(result) if isinstance(result, (tuple, list)) else [result]
        self.results += [x for x in leaves if isinstance(x, Tensor) and x.grad_fn is not None]
        return result

    def roots(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        """Call the model, and return its results and those that it computes by further parameters, but drops."""
        with self, _no_inference_mode() if self.forced else contextlib.nullcontext():
            roots = [x for x in call(model, inputs) if x.requires_grad]
            for further, seed in self.training:
                with SameDraws(seed, {}), seeded(seed):
                    roots += [x for x in call(model.train(), further) if x.requires_grad]
        model.eval()
        seen: set[Any] = set()
        for root in roots:
            _reach(root.grad_fn, seen)
        for result in reversed(self.results):  # what comes later is made of what came before
            if result.grad_fn not in seen:
                new = _reach(result.grad_fn, seen)
                if any(id(getattr(node, "variable", None)) in self.parameters for node in new):
                    roots.append(result)
                    self.dropped.add(result.grad_fn)
        return roots

    def enter(self, module: nn.Module, args: Any) -> None:
        """Note where an opaque module begins."""
        self.marks.append(len(self.results))

    def hide(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """Return the results of an opaque module as if a single function made them, and forget how they came about."""
        del self.results[self.marks.pop() :]
        opaque: Any = _Opaque.apply
        with torch._C.DisableTorchFunction():
            sources = [x for x in tensors_of((args, kwargs)) if x.requires_grad]
            hidden = map_tensors(lambda x: opaque(x.detach(), *sources), result)
            if isinstance(module, _RECURRENT):
                self.mixing |= {x.grad_fn: module for x in tensors_of(hidden)}
            return hidden


def _reach(start: Any, seen: set[Any]) -> set[Any]:
    """Add all nodes of the autograd graph that a node depends on to ``seen``, and return the new ones."""
    new: set[Any] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            new.add(node)
            stack += [following for following, _ in node.next_functions]
    return new


@contextlib.contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Return a context in which ``torch.inference_mode`` does nothing."""
    kind = torch.inference_mode
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__ = lambda self: None  # type: ignore[method-assign]
    kind.__exit__ = lambda self, *error: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
