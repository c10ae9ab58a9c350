"""Which channels every number of a forward pass belongs to, and which layers read them.

The forward runs once, on a copy, under two modes of PyTorch: one sees the functions that layers call
(:mod:`layer_functions`), the other every single operation (:mod:`operations`). No gradient is needed, so that what is
detached, dropped or made of indices counts, too. What is found is a proposal, which a proof has to confirm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pliant.calling import Inputs, call, duplicate, quiet, same_random_state, tensors_of
from pliant.structure.attention import is_conv1d
from pliant.structure.draws import SameDraws, seeded
from pliant.structure.labelled import Labelled
from pliant.structure.layer_functions import LayerFunctions
from pliant.structure.layers import axis_length
from pliant.structure.operations import Operations

_OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def flow(model: nn.Module, inputs: Inputs, training: Sequence[tuple[Inputs, int]] = (), split: str = "") -> Labelled:
    """Return what is known of the channels of a model after it has run.

    Args:
        model: the model, in eval mode; not changed.
        inputs: the inputs to call it on.
        training: further inputs, and seeds of ``SameDraws``, to call it on in training mode.
        split: as for :class:`Labelled`.
    """
    model = _readable(model)
    known = Labelled(model, split)
    with _watched(known), quiet(), torch.no_grad(), _no_inference_mode(), same_random_state(model, inputs):
        _run(known, inputs)
        for further, seed in training:
            model.train()
            with SameDraws(seed, {}), seeded(seed):
                _run(known, further)
    known.forget()
    return known


def _run(known: Labelled, inputs: Inputs) -> None:
    with Operations(known), LayerFunctions(known):
        results = call(known.model, inputs)
    for result in results:
        labels = known.of(result)
        if labels is not None and (result.is_floating_point() or result.is_complex()):
            known.labels.fix(labels, "its channels are outputs of the model")


@contextlib.contextmanager
def _watched(known: Labelled) -> Iterator[None]:
    """Return a context in which it is known which modules run; what recurrent layers and attention do is hidden."""

    def enter(name: str) -> None:
        known.running.append(name)
        known.called.add(name)
        known.paused = known.paused or isinstance(known.modules[name], _OPAQUE)

    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if isinstance(module, _OPAQUE):
            known.paused = False
            known.mix(tensors_of((args, kwargs)))
        known.running.pop()

    handles: list[Any] = []
    for name, module in known.model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: enter(name)))
        handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _readable(model: nn.Module) -> nn.Module:
    """Return a copy in which a ``Conv1D`` is a linear layer."""
    model = duplicate(model)
    linear: dict[nn.Module, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_conv1d(module):
            rows, columns = (axis_length(module, axis) for axis in ("outputs", "inputs"))
            if module not in linear:
                linear[module] = nn.Linear(columns, rows).to(module.weight)
            model.set_submodule(name, linear[module])
    return model


@contextlib.contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Return a context in which ``torch.inference_mode`` does nothing: operations would come undivided in it."""
    kind = torch.inference_mode
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__ = lambda self: None  # type: ignore[method-assign]
    kind.__exit__ = lambda self, *error: None  # type: ignore[method-assign]
    try:
        with torch.inference_mode(False):
            yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
