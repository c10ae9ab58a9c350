"""How often each weight is applied in a forward pass: the factor from entries to multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.calling import Inputs, run


@dataclass(frozen=True)
class Applied:
    """How often the weight of one layer is applied in a forward pass.

    Args:
        whole: the number of positions of its output.
        tall: the number of positions of a grid as high as the output and as wide as the input, where a convolution
            along the height alone would be applied; equal to ``whole`` except for 2-d convolutions.
    """

    whole: int
    tall: int


ONCE = Applied(1, 1)


def applications(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, Applied]:
    """Run ``model`` once and count how often the weight of each named layer is applied.

    The count covers the whole batch and all calls; multiplied by the number of entries it gives multiply-accumulates.

    Args:
        model: the model, in the mode to run it in.
        names: names of linear, convolution or attention layers.
        inputs: the inputs to call the model on.
    """
    whole: Counter[str] = Counter()
    tall: Counter[str] = Counter()

    def count(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            output = output[0]  # the second result is the attention weights
        if isinstance(module, _ConvTransposeNd):
            grid = args[0].numel() // module.in_channels
        else:
            features = module.out_channels if isinstance(module, _ConvNd) else output.shape[-1]
            grid = output.numel() // features
        whole[name] += grid
        plane = isinstance(module, nn.Conv2d)
        tall[name] += grid // output.shape[-1] * args[0].shape[-1] if plane else grid

    handles = [model.get_submodule(name).register_forward_hook(partial(count, name)) for name in names]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Applied(whole[name], tall[name]) for name in names}
