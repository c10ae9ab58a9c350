"""Eight-bit weights: each filter is stored as integers from −127 to 127 and one scale; computation uses floats.

The layers are plain modules with plain tensors, so that they are counted, saved and exported like any others. The
file shrinks to about a quarter; multiplications and parameters stay the same, and each forward pass multiplies the
weights by their scales. (torchao has a tensor class for this, but only for linear layers, and neither safetensors files
nor ONNX accept it. On linear layers both give the same numbers.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.calling import Example, as_inputs, copied, plain
from pliant.compression.base import Compressor, parameter_shapes
from pliant.compression.calibration import calibration_of
from pliant.compression.compensation import round_to_grid
from pliant.compression.entries import Weights, weight_plan
from pliant.compression.factored import Factorable, convolution_like
from pliant.compression.inputs import LayerInputs, Reading, from_matrices, matrices
from pliant.compression.plan import Plan, weight_shape
from pliant.compression.rewiring import replace_modules, replaceable, unsound
from pliant.errors import BadInput, Refused
from pliant.structure import tied_parameters, untransposed

LEVELS = 127  # −128 is not used: the grid is symmetric, and zero stays zero


class Int8Linear(nn.Linear):
    """A linear layer with ``weight`` int8 (out, in) and ``scale`` (out, 1)."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with weight · scale."""
        return F.linear(input, self.weight.to(self.scale.dtype) * self.scale, self.bias)


class _Int8Conv:
    """The forward pass of an eight-bit convolution; ``scale`` has one entry per filter."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with weight · scale."""
        return self._conv_forward(input, self.weight.to(self.scale.dtype) * self.scale, self.bias)  # type: ignore[attr-defined, no-any-return]


class Int8Conv1d(_Int8Conv, nn.Conv1d):
    """A 1-d convolution with ``weight`` int8 and ``scale`` (filters, 1, 1)."""


class Int8Conv2d(_Int8Conv, nn.Conv2d):
    """A 2-d convolution with ``weight`` int8 and ``scale`` (filters, 1, 1, 1)."""


class Int8Conv3d(_Int8Conv, nn.Conv3d):
    """A 3-d convolution with ``weight`` int8 and ``scale`` (filters, 1, 1, 1, 1)."""


@dataclass(frozen=True)
class Int8(Compressor[Weights]):
    """Store the weights of linear and convolution layers in eight bits: the last link of a chain.

    Each filter w becomes round(w/s) with s = max|w|/127, an error of at most s/2 per entry. Biases and
    normalisations stay. The weights are frozen (requires_grad False), because integers have no gradient.

    With calibration data the errors are made up for, as by GPTQ: the weights are rounded column by column, those of
    later columns make up for the error so far, and the bias for the mean of what is left. Zeros stay zeros. Layers that
    are not applied on the data, or have too many columns (``moments``), are rounded plainly.

    Transposed convolutions and weights that may not be changed are left alone; the plan names them with the reason.

    Source: Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers".

    Args:
        compensate: whether errors are made up for; "auto": if there is calibration data.

    Raises:
        BadInput: ``compensate`` is anything else.
    """

    compensate: bool | str = "auto"

    def __post_init__(self) -> None:
        if self.compensate not in (True, False, "auto"):
            raise BadInput(f"compensate must be True, False or 'auto', got {self.compensate!r}")

    def analyse(self, model: nn.Module, example_inputs: Example, calibration: Iterable[Any] | None = None) -> Weights:
        """List the layers that can be replaced.

        Raises:
            BadInput: the example or the data does not fit, or compensate is True and there is no data.
        """
        if self.compensate is True and calibration is None:
            raise BadInput("compensate=True needs calibration data: give batches of images, or use compensate='auto'")
        model = plain(model)
        probe = copied(model).eval()
        sound, refused = replaceable(probe, as_inputs(example_inputs), _unfit, quantised)
        seen = None
        if calibration is not None and self.compensate is not False:
            seen = LayerInputs(probe, sound, calibration_of(calibration, model, example_inputs))
        return Weights(parameter_shapes(model), refused, tuple(sound), seen)

    def plan_with(self, model: nn.Module, analysis: Weights) -> Plan:
        """Return the plan: all entries stay."""
        if self.compensate is True and analysis.inputs is None:
            raise BadInput("compensate=True needs an analysis with calibration data")
        if not analysis.layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in analysis.refused[:5])
            raise Refused(f"Int8 finds no weight to store in eight bits: {reasons or 'no layers'}")
        kept = [prod(weight_shape(model.get_submodule(name))) for name in analysis.layers]
        decided = replace(self, compensate=self.compensate is not False and analysis.inputs is not None)
        return weight_plan(decided, model, analysis, 0.0, kept)

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Weights | None) -> nn.Module:
        """Replace the layers that the plan names by eight-bit layers."""
        modules = _planned_layers(model, plan)
        new = {}
        if self.compensate is True:  # "auto" is in no plan; plans of versions that only rounded have no such option
            if analysis is None or analysis.inputs is None:
                raise BadInput(
                    "the plan's weights depend on the calibration data: give the analysis it was made with; to load"
                    " stored weights, build its skeleton instead"
                )
            for name, moment in analysis.inputs.moments():
                if name in modules:
                    new[name] = quantised(modules[name], Reading.of(model, name, moment))
        new |= {name: quantised(module) for name, module in modules.items() if name not in new}
        return replace_modules(model, new)

    def skeleton(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Return a new model with the layers of :meth:`apply`, rounded plainly: no data is needed."""
        self.checked(model, plan)
        new = copied(model)
        return replace_modules(new, {name: quantised(module) for name, module in _planned_layers(new, plan).items()})


def quantised(module: nn.Module, reading: Reading | None = None) -> nn.Module:
    """Return a linear or convolution layer with its weight in eight bits and all its other properties.

    Args:
        module: the layer. With a reading its bias is changed.
        reading: what it reads, to make up for the errors; None to round to the nearest numbers.
    """
    module = untransposed(module)
    assert isinstance(module, Factorable)  # _unfit refuses all others
    weight = module.weight.detach()
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)  # (filters, 1, …, 1)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest) / LEVELS  # any scale suits a zero filter
    if reading is None:
        whole = (weight / scale).round().clamp(-LEVELS, LEVELS)
    else:
        steps = matrices(reading.found, scale.expand_as(weight))[:, :, :1]
        rounded = round_to_grid(reading.weight, reading.moment, steps, LEVELS)
        reading.correct_bias(rounded * steps)
        whole = from_matrices(reading.found, rounded)
    whole = whole.to(torch.int8)
    has_bias = module.bias is not None
    new: nn.Module
    if isinstance(module, nn.Linear):
        new = Int8Linear(module.in_features, module.out_features, bias=has_bias, device="meta")
    else:
        kinds = {nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d, nn.Conv3d: Int8Conv3d}
        kind = next(ours for theirs, ours in kinds.items() if isinstance(module, theirs))
        new = convolution_like(module, kind, module.out_channels, bias=has_bias)
    new.weight = nn.Parameter(whole, requires_grad=False)
    new.register_buffer("scale", scale)
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    return new.train(module.training)


def _planned_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return name → layer of every layer that the plan names, checked."""
    tied = tied_parameters(model)
    modules = {}
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        reason = unsound(module, tied) or _unfit(module)
        if reason is not None:
            raise BadInput(f"the plan is for another model: {layer.name!r} {reason}")
        modules[layer.name] = module
    return modules


def _unfit(module: nn.Module) -> str | None:
    return None if isinstance(untransposed(module), Factorable) else "is a transposed convolution"
