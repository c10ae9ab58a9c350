"""The norm of weights at initialisation, the unit in which the radius of a ball is given."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pliant.dtensors import is_sharded, whole, whole_copy
from pliant.errors import BadInput
from pliant.linalg import l2_norm


def initial_norm(owner: nn.Module, name: str, parameter: Tensor, pretrained: bool = False, draws: int = 3) -> float:
    """Return E‖θ_init‖₂ of one parameter, the mean over draws from its layer's own initialiser.

    If the layer has no ``reset_parameters`` that sets this parameter, or if ``pretrained``, return its current norm. A
    norm of 0 counts as 1.

    Args:
        owner: the layer.
        name: the full name of the parameter, whose last part is its name in the layer.
        parameter: the parameter.
        pretrained: whether to use the current norm.
        draws: how many times the initialiser is run.

    Raises:
        BadInput: the norm is not finite, or the parameter is on the meta device and cannot be drawn.
    """
    leaf = name.rpartition(".")[2]
    norms = [] if pretrained else _drawn_norms(owner, leaf, draws)
    if not norms:
        if parameter.is_meta:
            raise BadInput(f"{name} is on the meta device and its layer cannot draw it: its radius cannot be measured")
        norms = [l2_norm([whole(parameter).double()]).item()]
    mean = sum(norms) / len(norms)
    if not math.isfinite(mean):
        raise BadInput(f"{name} has NaN or infinite entries: its radius cannot be measured")
    return mean or 1.0


def _drawn_norms(owner: nn.Module, leaf: str, draws: int) -> list[float]:
    """Return the norms of a parameter in ``draws`` runs of its layer's initialiser; [] if that does not set it."""
    reset = getattr(type(owner), "reset_parameters", None) or getattr(type(owner), "_reset_parameters", None)
    if reset is None or not isinstance(getattr(owner, leaf, None), nn.Parameter) or not _callable_alone(reset):
        return []
    # Tensors that are not leaves of autograd cannot be deep-copied; older weight_norm and pruning keep such tensors.
    tensors = [t for module in owner.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors}
    copied = whole_copy(owner, memo) if is_sharded(owner.parameters()) else copy.deepcopy(owner, memo)
    if any(t.is_meta for t in [*copied.parameters(), *copied.buffers()]):
        copied.to_empty(device="cpu")
    copied.cpu()
    norms = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # Every layer gets the same draws: layers of one shape then share one radius, and therefore one group.
        torch.default_generator.manual_seed(0)
        getattr(copied, leaf).fill_(math.nan)  # to see whether it is set
        for _ in range(draws):
            reset(copied)
            norms.append(l2_norm([getattr(copied, leaf).double()]).item())
    return [] if math.isnan(norms[0]) else norms


def _callable_alone(reset: Callable[..., Any]) -> bool:
    _, *others = inspect.signature(reset).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in others)
