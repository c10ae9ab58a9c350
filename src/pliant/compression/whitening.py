"""The second moment of a layer's outputs on real data, which data-aware truncation needs.

Of all matrices of rank r, the W_r with the least mean error ‖(W − W_r)x‖² over inputs x with second moment C is the
truncated singular value decomposition of W·C^½, times C^−½. With W·C^½ = U Σ Vᵀ, it is

    U_r Σ_r V_rᵀ C^−½ = U_r U_rᵀ W,        U Σ² Uᵀ = W C Wᵀ = E[y yᵀ],   y = W x,

so neither the root of C, nor its inverse, nor C itself is needed: the second moment of the layer's *outputs* without
bias is enough. It has one row per filter, whereas C has one per weight of a filter, and it is the same sum whatever the
padding, stride and dilation. The outputs of a layer with more filters m than columns n lie in the span of W; they are
measured in an orthonormal basis of the span, so that no moment has more than min(m, n) rows.

Under the scheme "spatial" (``factored``) W has a row per filter and kernel column, and y are the outputs of its k×1
convolution, before the outputs of a filter's columns are summed. The truncation minimises the error of these. k times
that error bounds the error of the sum (Cauchy-Schwarz), which also depends on the correlation of neighbouring image
columns.

Source: Zhang et al. 2016, "Accelerating very deep convolutional networks for classification and detection", §3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.calling import as_inputs, batch_fault, inputs_of, map_tensors, run
from pliant.compression.factored import Factorable, first_of_spatial
from pliant.errors import BadInput
from pliant.structure import untransposed

Layer = tuple[str, str]  # name and scheme

# A moment of s rows takes 8·s² bytes and its decomposition about 10·s³ operations: 134 MB and minutes at 4096.
MAX_WIDTH = 4096
_CHUNK = 1 << 22  # numbers that are held in float64 at a time while outputs are summed


def output_moments(
    model: nn.Module, spans: Mapping[Layer, Tensor | None], calibration: Iterable[Any]
) -> dict[Layer, Tensor]:
    """Return E[z zᵀ] of each named layer, float64 (groups, s, s), where z = Qᵀy are its outputs without bias.

    The mean is over images, positions and calls; a layer that is not called is left out.

    Args:
        model: the model in eval mode; it is run on every batch.
        spans: name and scheme of a layer → Q, float64 with orthonormal columns, (groups, m, s); None for the identity.
        calibration: a finite iterable of (images, labels) or images alone.

    Raises:
        BadInput: the data is empty, or the model cannot be called on a batch of it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: dict[Layer, Tensor] = {}
    counts = dict.fromkeys(spans, 0)

    def add(layer: Layer, module: nn.Module, output: Tensor) -> None:
        total, count = _second_moment(module, output, spans[layer])
        sums[layer] = sums[layer] + total if layer in sums else total
        counts[layer] += count

    def whole(layer: Layer, module: nn.Module, _: object, output: Tensor) -> None:
        add(layer, module, output)

    def along_one_direction(
        layer: Layer, first: nn.Conv2d, _: object, args: tuple[Any, ...], kwargs: dict[str, Any], __: object
    ) -> None:
        for output in _in_parts(first, args[0] if args else kwargs["input"]):
            add(layer, first, output)

    hooks = []
    for layer in spans:
        name, scheme = layer
        module = model.get_submodule(name)
        hook: Callable[..., None]
        if scheme == "spatial":
            assert isinstance(module, nn.Conv2d)  # only these have the scheme
            hook = partial(along_one_direction, layer, first_of_spatial(module))
        else:
            hook = partial(whole, layer)
        hooks.append(module.register_forward_hook(hook, with_kwargs=scheme == "spatial"))
    batches = 0
    try:
        for batch in calibration:
            run(model, map_tensors(lambda x: x.to(device), as_inputs(inputs_of(batch))))
            batches += 1
    except BadInput:  # of the calibration data
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise BadInput(f"the model cannot be called on calibration batch {batches}: {batch_fault(error)}") from error
    finally:
        for handle in hooks:
            handle.remove()
    if not batches:
        raise BadInput("the calibration data is empty")
    return {layer: total / counts[layer] for layer, total in sums.items() if counts[layer]}


def _in_parts(layer: nn.Conv2d, images: Tensor) -> Iterator[Tensor]:
    """Yield the outputs of a layer with very many channels, for a few images at a time."""
    images = images.detach() if images.dim() == 4 else images.detach().unsqueeze(0)
    if not images.numel():
        return
    numbers = layer.out_channels * images[0, 0].numel()
    for part in images.split(max(1, _CHUNK // numbers)):
        yield layer(part)


def _second_moment(module: nn.Module, output: Tensor, span: Tensor | None) -> tuple[Tensor, int]:
    """Return Σ z zᵀ over all positions of one output, (groups, s, s), and the number of positions."""
    layer = untransposed(module)
    assert isinstance(layer, Factorable)  # callers pass no other layers
    if isinstance(layer, nn.Linear):
        groups, flat = 1, output.detach().flatten(0, -2) if output.dim() > 1 else output.detach().unsqueeze(0)
    else:
        groups, channel = layer.groups, output.dim() - len(layer.kernel_size) - 1
        flat = output.detach().movedim(channel, -1).flatten(0, -2)
    total = 0
    for part in flat.split(max(1, _CHUNK // flat.shape[1])):
        y = part.double()  # (positions, groups · m)
        if layer.bias is not None:
            y = y - layer.bias.detach().double()
        z = y.unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, positions, m)
        if span is not None:
            z = z @ span.to(z.device)  # (groups, positions, s)
        total = total + z.mT @ z
    return total, len(flat)  # type: ignore[return-value]
