"""Replacing modules of a model by others, and which ones can be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from pliant.calling import Inputs, copied, count_calls, run
from pliant.errors import first_line
from pliant.structure import (
    advised,
    call_layers,
    largest_sound,
    named_layers,
    obstacle,
    other_matrices,
    tied_parameters,
)


def replaceable(
    model: nn.Module,
    inputs: Inputs,
    unfit: Callable[[nn.Module], str | None],
    substitute: Callable[[nn.Module], nn.Module],
) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Find out which convolution and linear layers can be replaced.

    Args:
        model: a copy of the model, in the mode to try it in; its layers are called as those of the result will be, see
            ``call_layers``.
        inputs: the inputs to call it on.
        unfit: maps a layer of a known type to the reason why it cannot be replaced, or None.
        substitute: maps a layer to one with the shapes of the replacement and arbitrary values. All substitutes are
            tried together on a copy, because a parent that reads the weights itself cannot run with them.

    Returns:
        The names of the layers that can be replaced, and (name, reason) of all others, including every other module
        that holds matrices.

    Raises:
        BadInput: the model cannot be called on the inputs.
    """
    call_layers(model)
    calls = count_calls(model, inputs)
    tied = tied_parameters(model)
    reasons: dict[str, str] = {}
    candidates: list[str] = []
    for name, module in named_layers(model):
        reason = unsound(module, tied) or unfit(module)
        if reason is None and not calls[module]:
            reason = "is not called through its forward: its parent reads the weight"
        if reason is None:
            candidates.append(name)
        else:
            reasons[name] = reason

    def fault(names: list[str]) -> str | None:
        probe = copied(model)
        try:
            run(replace_modules(probe, {name: substitute(probe.get_submodule(name)) for name in names}), inputs)
        except Exception as error:  # a user's forward may raise anything
            return f"cannot be replaced: {first_line(error)}"
        return None

    sound, failed = largest_sound(candidates, fault)
    reasons.update(failed)
    refused = [(name, advised(reasons[name])) for name, _ in named_layers(model) if name in reasons]
    return sound, (*refused, *other_matrices(model))


def unsound(module: nn.Module, tied: frozenset[int]) -> str | None:
    """Return why ``module`` cannot be replaced by layers that compute something else, or None."""
    reason = obstacle(module, tied)
    if reason is None and (module._forward_hooks or module._forward_pre_hooks):
        return "has forward hooks, which a replacement would lose"
    return reason


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put each replacement at every place of the named module, where it is called, and return the model."""
    if "" in replacements:  # the model is itself a layer
        return replacements[""]
    by_module = {model.get_submodule(name): new for name, new in replacements.items()}
    call_layers(model, by_module)
    parents: Iterable[nn.Module] = list(model.modules())
    for parent in parents:
        for child_name, child in parent._modules.items():
            if child in by_module:
                parent._modules[child_name] = by_module[child]
    return model
