"""Low rank: each weight matrix replaced by its best approximation of a smaller rank, stored as two factors.

The truncated singular value decomposition of a weight W (row = filter, m × n, one matrix per convolution group)
is the projection onto its leading singular subspace: W_r = U_r (U_rᵀ W), or (W V_r) V_rᵀ where n < m. Only the
orthonormal basis of the smaller side is needed; it comes with σ² from an eigendecomposition of the Gram matrix,
in float64. Its error in σ² is ε·σ₁² ~ 1e-16·σ₁², below what float32 weights resolve, and a basis of full
rank gives W back to rounding whatever the spectrum; the singular value decomposition itself gains nothing here
and takes many times longer on wide layers. One decomposition serves all ratios.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from pliant.compression.allocation import Options, allocate, greedy_steps, uniform_steps
from pliant.compression.base import ALLOCATIONS, Analysis, Compressor, check_choice, check_ratio, parameter_shapes
from pliant.compression.factored import factored, matrices
from pliant.compression.plan import LayerPlan, Plan, count_parameters, weight_shape
from pliant.errors import BadInput
from pliant.layers import as_inputs, count_calls, largest_sound, line, named_layers, obstacle, run, tied_parameters

Factorable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

# Relative difference between Σσ² of an analysis and ‖W‖² of the model; the analysis works in float64, so anything
# above rounding means that the weights have changed.
_SAME_WEIGHTS = 1e-9


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The decomposition of one layer with matrices of shape (groups, m, n), s = min(m, n).

    ``basis``: float64 (groups, s, s), orthonormal columns, leading first, of the side with s entries.
    ``energies``: float64 (s,), σ² summed over the groups, falling.
    """

    groups: int
    rows: int
    columns: int
    basis: Tensor
    energies: Tensor

    @property
    def dense(self) -> int:
        """Number of entries of the weight."""
        return self.groups * self.rows * self.columns

    def cost(self, rank: int) -> int:
        """Number of entries of the two factors."""
        return self.groups * rank * (self.rows + self.columns)

    @property
    def max_rank(self) -> int:
        """The largest rank that makes the layer smaller."""
        return (self.rows * self.columns - 1) // (self.rows + self.columns)


@dataclass(frozen=True, eq=False)
class Spectra(Analysis):
    """The decompositions of all layers that can be factorised, by name."""

    layers: Mapping[str, Spectrum]


@dataclass(frozen=True)
class LowRank(Compressor[Spectra]):
    """Factorise linear and convolution layers to low rank.

    ``ratio``: share of the weights of all factorable layers to remove, in [0, 1). ``allocation``: ``"uniform"``
    removes the same share from every layer; ``"global"`` keeps the singular directions with the most relative
    energy σ²/Σσ² per parameter over all layers, where a layer may also stay dense. No layer ever grows: a
    rank is used only if r(m + n) < mn, which holds for multiplications as for parameters.

    Left alone, with the reason in the plan: depthwise and transposed convolutions, layers too small to gain, and
    what cannot be replaced safely (parametrised or tied weights, a forward of its own, weights read by the
    parent module). Raises BadInput for a ratio out of range or an unknown allocation.

    Source: Eckart and Young 1936; for convolutions Zhang et al. 2016, "Accelerating very deep convolutional
    networks", the k×k then 1×1 scheme.
    """

    ratio: float = 0.5
    allocation: str = "global"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("allocation", self.allocation, ALLOCATIONS)

    def analyse(self, model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Spectra:
        """Decompose every layer that can be replaced."""
        inputs = as_inputs(example_inputs)
        probe = copy.deepcopy(model).eval()
        calls = count_calls(probe, inputs)
        tied = tied_parameters(probe)
        reasons: dict[str, str] = {}
        candidates: list[str] = []
        for name, module in named_layers(probe):
            reason = _unfit(module, tied)
            if reason is None and not calls[module]:
                reason = "is not called through its forward: its parent reads the weight"
            if reason is None:
                candidates.append(name)
            else:
                reasons[name] = reason

        def fault(names: list[str]) -> str | None:
            """Try the thinnest factors: a parent that reads the weights itself cannot run with them."""
            trial = copy.deepcopy(probe)
            thin = {name: _thin(_factorable(trial, name)) for name in names}
            try:
                run(_replace(trial, thin), inputs)
            except Exception as error:  # whatever a user's forward may raise
                return f"cannot be replaced: {line(error)}"
            return None

        sound, failed = largest_sound(candidates, fault)
        reasons.update(failed)
        layers = {name: _decompose(name, _factorable(probe, name)) for name in sound}
        refused = tuple((name, reasons[name]) for name, _ in named_layers(probe) if name in reasons)
        return Spectra(parameter_shapes(model), refused, layers)

    def _plan(self, model: nn.Module, analysis: Spectra) -> Plan:
        modules = {name: _factorable(model, name) for name in analysis.layers}
        for name, spectrum in analysis.layers.items():
            _check_weights(name, modules[name], spectrum)
        spectra = list(analysis.layers.values())
        options = [_options(spectrum) for spectrum in spectra]
        steps = (uniform_steps if self.allocation == "uniform" else greedy_steps)(options)
        total = sum(spectrum.dense for spectrum in spectra)
        chosen = allocate(options, steps, (1 - self.ratio) * total)
        layers = []
        removed = 0
        for (name, spectrum), option, offer in zip(analysis.layers.items(), chosen, options, strict=True):
            full = min(spectrum.rows, spectrum.columns)
            saved = spectrum.dense - offer.costs[option]
            dense = count_parameters(modules[name])
            layers.append(
                LayerPlan(
                    name=name,
                    kind=type(modules[name]).__name__,
                    kept=spectrum.max_rank + 1 - option if option else full,
                    total=full,
                    params=dense - saved,
                    params_dense=dense,
                    shape=weight_shape(modules[name]),
                )
            )
            removed += saved
        return self._make_plan(
            model,
            analysis,
            ratio=self.ratio,
            removed=removed,
            compressible={f"{name}.weight" if name else "weight": s.dense for name, s in analysis.layers.items()},
            layers=layers,
            params_after=count_parameters(model) - removed,
        )

    def _apply(self, model: nn.Module, plan: Plan, analysis: Spectra | None) -> nn.Module:
        tied = tied_parameters(model)
        thin = {}
        for layer in plan.layers:
            if layer.params == layer.params_dense:
                continue
            module = model.get_submodule(layer.name)
            reason = _unfit(module, tied)
            if reason is not None:
                raise BadInput(f"the plan is for another model: {layer.name!r} {reason}")
            factorable = _factorable(model, layer.name)
            if analysis is not None and layer.name in analysis.layers:
                spectrum = analysis.layers[layer.name]
                _check_weights(layer.name, factorable, spectrum)
            else:
                spectrum = _decompose(layer.name, factorable)
            if not 1 <= layer.kept <= spectrum.max_rank:
                raise BadInput(f"the plan asks for rank {layer.kept} of {layer.name!r}: at most {spectrum.max_rank}")
            thin[layer.name] = _truncate(factorable, spectrum, layer.kept)
        return _replace(model, thin)


def _unfit(module: nn.Module, tied: frozenset[int]) -> str | None:
    """Return why ``module`` cannot be factorised, or None."""
    reason = obstacle(module, tied)
    if reason is not None:
        return reason
    if not isinstance(module, Factorable):
        return "is a transposed convolution"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a replacement would lose"
    if not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1:
        return "is a depthwise convolution"
    _, rows, columns = matrices(module).shape
    if rows + columns >= rows * columns:
        return "is too small: even rank 1 would not save parameters"
    return None


def _factorable(model: nn.Module, name: str) -> Factorable:
    module = model.get_submodule(name)
    assert isinstance(module, Factorable)  # _unfit has seen to it
    return module


def _decompose(name: str, module: Factorable) -> Spectrum:
    weights = matrices(module).double()
    groups, rows, columns = weights.shape
    gram = weights @ weights.mT if rows <= columns else weights.mT @ weights
    energies, basis = torch.linalg.eigh(gram)  # ascending; tiny negative values are rounding
    return Spectrum(groups, rows, columns, basis.flip(-1), energies.flip(-1).clamp(min=0).sum(0))


def _truncate(module: Factorable, spectrum: Spectrum, rank: int) -> nn.Sequential:
    weights = matrices(module).double()
    leading = spectrum.basis[..., :rank].to(weights.device)
    if spectrum.rows <= spectrum.columns:
        return factored(module, leading, leading.mT @ weights)
    return factored(module, weights @ leading, leading.mT)


def _thin(module: Factorable) -> nn.Sequential:
    """Return factors of rank 1 that have the layer's shapes and nothing of its function."""
    weights = matrices(module)
    return factored(module, weights[..., :1], weights[:, :1])


def _options(spectrum: Spectrum) -> Options:
    """Return dense, then every rank that saves parameters, the largest first."""
    ranks = range(spectrum.max_rank, 0, -1)
    kept = list(accumulate(spectrum.energies.tolist()))
    total = kept[-1] or 1.0  # a zero weight loses nothing
    losses = [0.0]
    losses += [max(0.0, 1.0 - kept[rank - 1] / total) if kept[-1] else 0.0 for rank in ranks]
    return Options((spectrum.dense, *(spectrum.cost(rank) for rank in ranks)), tuple(losses))


def _check_weights(name: str, module: Factorable, spectrum: Spectrum) -> None:
    energy = float(module.weight.detach().double().square().sum())
    if abs(energy - float(spectrum.energies.sum())) > _SAME_WEIGHTS * energy:
        raise BadInput(f"the analysis is of other weights: {name!r} has changed since, analyse the model again")


def _replace(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put each replacement at every place where the named module is, and return the model."""
    if "" in replacements:  # the model is itself a layer
        return replacements[""]
    by_module = {model.get_submodule(name): new for name, new in replacements.items()}
    parents: Iterable[nn.Module] = list(model.modules())
    for parent in parents:
        for child_name, child in parent._modules.items():
            if child in by_module:
                parent._modules[child_name] = by_module[child]
    return model
