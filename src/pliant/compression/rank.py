"""Low rank: each weight matrix replaced by its best approximation of a smaller rank, stored as two factors.

The truncated singular value decomposition of a weight W (row = filter, m × n, one matrix per convolution group)
is the projection onto its leading left singular subspace: W_r = U_r (U_rᵀ W). U and σ² come from an eigendecomposition
of the Gram matrix W Wᵀ in float64; if n < m, inside the span of W. The error in σ² is ε·σ₁² ~ 1e-16·σ₁², below the
resolution of float32 weights, and a basis of full rank reproduces W up to rounding, whatever the spectrum. The singular
value decomposition itself is no more exact here and takes many times longer on wide layers.

*Whitened* truncation replaces W Wᵀ by the second moment of the layer's outputs on training images: the resulting
subspace minimises the mean error of the outputs, see ``whitening``. Either way one decomposition serves all ratios.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.calling import Example, as_inputs, copied, plain
from pliant.compression.allocation import ORDERS, Options, Reduction, allocate
from pliant.compression.base import COSTS, Analysis, check_ratio, parameter_shapes
from pliant.compression.controls import KEPT, Controlled, layer_names, with_reasons
from pliant.compression.costs import ONCE, Applied, applications
from pliant.compression.factored import Factorable, factored, matrices
from pliant.compression.plan import LayerPlan, Plan, weight_shape
from pliant.compression.rewiring import replace_modules, replaceable, unsound
from pliant.compression.spectrum import Cut, Outline, Spectrum, cuts_of, dense_cut, ranks_of
from pliant.compression.whitening import MAX_WIDTH, output_moments
from pliant.compressor_names import ALLOCATIONS, SCHEME, SCHEMES
from pliant.errors import BadInput, check_choice
from pliant.structure import tied_parameters, untransposed

# Largest relative difference between ‖W‖ at the analysis and now. Both are summed in float64, so anything above
# rounding means that the weights have changed.
_SAME_WEIGHTS = 1e-9

# Share of W Wᵀ that is added to a whitened moment, to order the directions that the images never excite. It is
# negligible compared with float32 outputs, whose energies have an error of 1e-14.
_RIDGE = 1e-12


@dataclass(frozen=True, eq=False)
class Spectra(Analysis):
    """The decompositions of all layers that can be factorised.

    Args:
        layers: by name, one decomposition for each scheme that is considered.
        scheme: the option of the compressor.
        whitened: whether the decompositions are by outputs rather than weights.
    """

    layers: Mapping[str, tuple[Spectrum, ...]]
    scheme: str
    whitened: bool
    _curves: dict[str, _Curves] = field(default_factory=dict, init=False, repr=False)

    def curves_of(self, low: LowRank, left: Collection[str], own: Mapping[str, float]) -> _Curves:
        """Return the options of each layer, which are the same for all ratios and computed once.

        Args:
            low: the compressor, with any ratio.
            left: names of the layers to keep.
            own: layer → its own ratio.
        """
        key = low.options_key()
        if key not in self._curves:
            cuts = {
                name: cuts_of(spectra, low.cost, low.allowed, own.get(name))
                for name, spectra in self.layers.items()
                if name not in left
            }
            options = [
                Options(
                    tuple(cut.cost for cut in offer),
                    tuple(cut.loss for cut in offer),
                    offer[0].spectrum.dense(low.cost),
                )
                for offer in cuts.values()
            ]
            self._curves[key] = _Curves(cuts, options, ORDERS[low.allocation](options))
        return self._curves[key]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of all ratios as one path: from one step to the next, a single layer loses directions.

    Args:
        refused: (layer, reason) for each layer that is left alone.
        layers: the decomposition of each layer that may be cut.
        starts: how many of the steps are cuts that the controls ask for in any case.
        steps: the cuts in order: index of the layer, and its rank afterwards.
        losses: after each step, the sum of the shares of energy that the layers have lost.
    """

    refused: tuple[tuple[str, str], ...]
    layers: Mapping[str, Spectrum]
    starts: int
    steps: tuple[tuple[int, int], ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class LowRank(Controlled[Spectra]):
    """Factorise linear and convolution layers to low rank.

    No layer ever grows: a rank is used only if it saves parameters and multiply-accumulates. The ``Conv1D`` of
    transformers is a linear layer too, and is replaced by two of PyTorch's.

    A plan with whitened factors holds the ranks, not the data, so it can be applied only with its analysis. Layers with
    more than 4096 rows and columns, and those that the data does not reach, are truncated without whitening. The
    whitened energy of "spatial" factors is that of the outputs of a k×1 convolution, an estimate for the layer itself:
    see ``whitening``.

    Depthwise and transposed convolutions, layers too small to gain, and layers that cannot be replaced safely
    (parametrised or tied weights, a forward of their own, weights read by the parent module) are left alone; the plan
    names them with the reason. It also names all other modules that hold matrices, such as embeddings.

    Source: Eckart and Young 1936; for convolutions Zhang et al. 2016, "Accelerating very deep convolutional
    networks", and Jaderberg et al. 2014, "Speeding up convolutional neural networks with low rank expansions".

    Args:
        ratio: share of the cost of all factorable layers to remove, in [0, 1).
        allocation: "uniform" removes the same share from every layer; "global" keeps the directions with the most
            relative energy σ²/Σσ² per cost over all layers, and may leave a layer dense; "energy" keeps the same share
            of Σσ² in every layer.
        whiten: True truncates, and measures energies, by the error of each layer's outputs on the calibration data of
            ``analyse``; False by the error of its weights; "auto" by the outputs if there is such data.
        scheme: the two layers that replace a 2-d convolution, with r filters in between: "spatial" is k×1 then 1×k;
            "channel" is k×k then 1×1, which all other convolutions and kernels with one row or column always get;
            "best" is, for each layer, the scheme that loses less energy at the same cost.
        cost: the cost that the ratio counts and the allocation economises: the "params" of the weights or their "macs"
            (multiply-accumulates).
        multiple_of, keep, at_least, at_most, ratios: what every layer keeps of its rank, see
            :class:`~pliant.compression.Controlled`. Every layer keeps 5 % of its full rank by default. A
            layer whose smallest allowed rank would save nothing stays dense.

    Raises:
        BadInput: the ratio is out of range, or an option is unknown.
    """

    ratio: float = 0.5
    allocation: str = "global"
    whiten: bool | str = "auto"
    scheme: str = SCHEME
    cost: str = "params"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("scheme", self.scheme, (*SCHEMES, "best"))
        check_choice("cost", self.cost, COSTS)
        if self.whiten not in (True, False, "auto"):
            raise BadInput(f"whiten must be True, False or 'auto', got {self.whiten!r}")
        self.check_controls()

    def analyse(
        self,
        model: nn.Module,
        example_inputs: Example,
        calibration: Iterable[Any] | None = None,
    ) -> Spectra:
        """Decompose every layer that can be replaced.

        Args:
            model: any module; not changed.
            example_inputs: inputs that it takes.
            calibration: batches of training data without augmentation, (images, labels) or images alone; a few hundred
                images are enough.

        Raises:
            BadInput: the example does not fit, or the data is missing, empty or does not fit.
        """
        if self.whiten is True and calibration is None:
            raise BadInput("whiten=True needs calibration data: give batches of images, or use whiten='auto'")
        inputs = as_inputs(example_inputs)
        probe = copied(model := plain(model)).eval()

        def thinnest(module: nn.Module) -> nn.Module:
            layer = _as_factorable(module)
            return _empty(layer, 1, self._schemes(layer)[0])

        sound, refused = replaceable(probe, inputs, _unfit, thinnest)
        applied = applications(probe, sound, inputs)
        whitened = calibration is not None and self.whiten is not False
        spans: dict[tuple[str, str], Tensor | None] = {}
        moments: dict[tuple[str, str], Tensor] = {}
        if calibration is not None and whitened:
            for name in sound:
                module = _factorable(probe, name)
                weights = {scheme: matrices(module, scheme) for scheme in self._schemes(module)}
                # Whiten all schemes or none: energies of outputs and of weights cannot be compared.
                if max(min(w.shape[1:]) for w in weights.values()) <= MAX_WIDTH:
                    spans |= {(name, scheme): _span(w.double()) for scheme, w in weights.items()}
            moments = output_moments(probe, spans, calibration)
        layers = {}
        for name in sound:
            module = _factorable(probe, name)
            decompositions = (
                _decompose(module, scheme, applied[name], moments.get((name, scheme)), spans.get((name, scheme)))
                for scheme in self._schemes(module)
            )
            spectra = tuple(spectrum for spectrum in decompositions if spectrum.max_rank)
            if spectra:
                layers[name] = spectra
            else:
                refused += ((name, "is too small: even rank 1 would not save multiply-accumulates"),)
        return Spectra(parameter_shapes(model), refused, layers, self.scheme, whitened)

    def _schemes(self, module: Factorable) -> tuple[str, ...]:
        """Return the schemes that are considered for a layer."""
        both_ways = isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1
        if self.scheme == "channel" or not both_ways:
            return ("channel",)
        return SCHEMES if self.scheme == "best" else ("spatial",)

    def plan_with(self, model: nn.Module, analysis: Spectra) -> Plan:
        """Allocate the ratio to the layers, and return the plan with the rank of each."""
        self._check_analysis(analysis)
        modules = {name: _factorable(model, name) for name in analysis.layers}
        for name, spectra in analysis.layers.items():
            _check_weights(name, modules[name], spectra[0])
        left, own = self.named(names := layer_names(model))
        curves = analysis.curves_of(self, left, own)
        compressible = {name: analysis.layers[name][0].dense(self.cost) for name in curves.cuts}
        target = (1 - self.ratio) * sum(compressible.values())
        chosen = allocate(curves.options, curves.reductions, target)
        cuts = {}
        for (name, offer), option in zip(curves.cuts.items(), chosen, strict=True):
            cut = offer[option] if self.ratio else dense_cut(analysis.layers[name], self.cost)
            cuts[name] = (cut.spectrum, cut.rank)
        return replace(self, whiten=analysis.whitened).plan_ranks(
            model, Analysis(analysis.shapes, _refused(analysis, left, names)), cuts
        )

    def path(self, model: nn.Module, analysis: Spectra) -> Ranks:
        """Return the ranks of all ratios as one path.

        A layer for which several schemes are considered gets the one that suits most of its ranks.
        """
        self._check_analysis(analysis)
        left, own = self.named(names := layer_names(model))
        offered = analysis.curves_of(self, left, own).cuts
        settled = {}
        for name, spectra in analysis.layers.items():
            counts = Counter(cut.spectrum.scheme for cut in offered.get(name, ()) if cut.rank)
            scheme = max(spectra, key=lambda spectrum: counts[spectrum.scheme]).scheme
            settled[name] = tuple(spectrum for spectrum in spectra if spectrum.scheme == scheme)
        curves = replace(analysis, layers=settled).curves_of(self, left, own)
        offers = list(curves.cuts.values())
        steps = [(layer, offer[0]) for layer, offer in enumerate(offers) if offer[0].rank]
        starts, at = len(steps), [0] * len(offers)
        for reduction in curves.reductions:
            # Where a reduction skips options of its layer, a ratio may end at one of them.
            skipped = range(at[reduction.layer] + 1, reduction.option + 1)
            steps += [(reduction.layer, offers[reduction.layer][option]) for option in skipped]
            at[reduction.layer] = reduction.option
        lost, losses = [0.0] * len(offers), []
        for layer, cut in steps:
            lost[layer] = cut.loss
            losses.append(sum(lost))
        return Ranks(
            _refused(analysis, left, names),
            {name: settled[name][0] for name in curves.cuts},
            starts,
            tuple((layer, cut.rank) for layer, cut in steps),
            tuple(losses),
        )

    def plan_ranks(self, model: nn.Module, known: Analysis, ranks: Mapping[str, tuple[Outline, int]]) -> Plan:
        """Return the plan of these ranks.

        Args:
            model: the model.
            known: shapes of its parameters, and layers that are left alone.
            ranks: layer → its outline, and its rank or 0 to leave it dense.
        """
        layers, floored = [], []
        removed = saved = 0
        for name, (outline, rank) in ranks.items():
            if self.ratio and rank == min(ranks_of(outline, self.allowed), default=0):
                floored.append(name)
            module = model.get_submodule(name)
            dense = measuring.parameters(module)
            gone = {cost: outline.dense(cost) - outline.cost(rank, cost) if rank else 0 for cost in COSTS}
            layers.append(
                LayerPlan(
                    name=name,
                    kind=type(module).__name__,
                    kept=rank or outline.full,
                    total=outline.full,
                    params=dense - gone["params"],
                    params_dense=dense,
                    shape=weight_shape(module),
                    scheme=outline.scheme if rank else None,
                )
            )
            removed += gone[self.cost]
            saved += gone["params"]
        return self.assemble(
            model,
            known,
            ratio=self.ratio,
            removed=removed,
            compressible={
                f"{name}.weight" if name else "weight": outline.dense(self.cost) for name, (outline, _) in ranks.items()
            },
            layers=layers,
            params_after=measuring.parameters(model) - saved,
            floored=floored,
        )

    def carry_out(self, model: nn.Module, plan: Plan, analysis: Spectra | None) -> nn.Module:
        """Replace the layers that the plan names by factors."""
        if analysis is not None:
            self._check_analysis(analysis)
        elif self.whiten is True and any(layer.params < layer.params_dense for layer in plan.layers):
            raise BadInput(
                "the plan is of whitened factors, which depend on the calibration data: give the analysis it was"
                " made with; to load stored weights, build its skeleton instead"
            )
        thin = {}
        for name, module, rank, scheme in _factorised(model, plan):
            known = () if analysis is None else analysis.layers.get(name, ())
            spectrum = next((s for s in known if s.scheme == scheme), None)
            if spectrum is None:
                spectrum = _decompose(module, scheme)
            else:
                _check_weights(name, module, spectrum)
            thin[name] = _truncate(module, spectrum, rank)
        return replace_modules(model, thin)

    def skeleton(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Return a new model with factors of the plan's shapes, all zero: no decomposition and no data is needed."""
        self.checked(model, plan)
        new = copied(model)
        return replace_modules(
            new, {name: _empty(layer, rank, scheme) for name, layer, rank, scheme in _factorised(new, plan)}
        )

    def _check_analysis(self, analysis: Spectra) -> None:
        if analysis.scheme != self.scheme:
            raise BadInput(f"the analysis was made with scheme={analysis.scheme!r}, not {self.scheme!r}")
        if self.whiten != "auto" and analysis.whitened != self.whiten:
            raise BadInput(f"the analysis was made with whiten={analysis.whitened}, not {self.whiten}")


@dataclass(frozen=True, eq=False)
class _Curves:
    """The options of each layer by name, their costs and losses, and the order of the reductions."""

    cuts: Mapping[str, list[Cut]]
    options: Sequence[Options]
    reductions: Sequence[Reduction]


def _refused(analysis: Spectra, left: Collection[str], names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return (layer, reason) for each layer that is left alone, those that are kept by name among them."""
    return with_reasons(analysis.refused, {name: KEPT for name in names if name in left})


def _factorised(model: nn.Module, plan: Plan) -> list[tuple[str, Factorable, int, str]]:
    """Return (name, layer, rank, scheme) of every layer that the plan factorises, checked."""
    tied = tied_parameters(model)
    factorised = []
    for layer in plan.layers:
        if layer.params == layer.params_dense:
            continue
        module = model.get_submodule(layer.name)
        reason = unsound(module, tied) or _unfit(module)
        if reason is not None:
            raise BadInput(f"the plan is for another model: {layer.name!r} {reason}")
        factorable = _as_factorable(module)
        scheme = layer.scheme or "channel"  # older plans do not name it
        if scheme not in SCHEMES or (scheme == "spatial" and not isinstance(factorable, nn.Conv2d)):
            raise BadInput(f"the plan is for another model: {layer.name!r} has no scheme {scheme!r}")
        _, rows, columns = matrices(factorable, scheme).shape
        most = (rows * columns - 1) // (rows + columns)
        if not 1 <= layer.kept <= most:
            raise BadInput(f"the plan asks for rank {layer.kept} of {layer.name!r}: at most {most}")
        factorised.append((layer.name, factorable, layer.kept, scheme))
    return factorised


def _unfit(module: nn.Module) -> str | None:
    """Return why a layer of a known type cannot be factorised, or None."""
    module = untransposed(module)
    if not isinstance(module, Factorable):
        return "is a transposed convolution"
    if not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1:
        return "is a depthwise convolution"
    _, rows, columns = matrices(module).shape
    if rows + columns >= rows * columns:
        return "is too small: even rank 1 would not save parameters"
    return None


def _factorable(model: nn.Module, name: str) -> Factorable:
    return _as_factorable(model.get_submodule(name))


def _as_factorable(module: nn.Module) -> Factorable:
    layer = untransposed(module)
    assert isinstance(layer, Factorable)  # _unfit refuses all others
    return layer


def _span(weights: Tensor) -> Tensor | None:
    """Return an orthonormal basis (groups, m, n) of the columns of W if m > n, else None: they span everything."""
    return torch.linalg.qr(weights).Q if weights.shape[1] > weights.shape[2] else None


def _decompose(
    module: Factorable,
    scheme: str = "channel",
    applied: Applied = ONCE,
    moment: Tensor | None = None,
    span: Tensor | None = None,
) -> Spectrum:
    """Decompose a layer: by the ``moment`` (groups, s, s) of its outputs in ``span`` if given, else by its weights."""
    weights = matrices(module, scheme).double()  # (groups, m, n)
    groups, rows, columns = weights.shape
    if moment is None:
        span = _span(weights)
    inner = weights if span is None else span.mT @ weights  # (groups, s, n)
    gram = inner @ inner.mT  # (groups, s, s)
    if moment is not None and moment.any():
        energy, size = moment.diagonal(dim1=1, dim2=2).sum(), gram.diagonal(dim1=1, dim2=2).sum()
        gram = moment.to(gram.device) + (_RIDGE * energy / size if size else 0.0) * gram
    energies, basis = torch.linalg.eigh(gram)  # ascending; tiny negative values are rounding
    basis = basis.flip(-1)
    coordinates = basis.mT @ inner
    return Spectrum(
        scheme=scheme,
        groups=groups,
        rows=rows,
        columns=columns,
        basis=(basis if span is None else span @ basis).to(module.weight.dtype),
        coordinates=coordinates.to(module.weight.dtype),
        energies=energies.flip(-1).clamp(min=0).sum(0),
        norm=_norm(module),
        applied=applied,
    )


def _truncate(module: Factorable, spectrum: Spectrum, rank: int) -> nn.Sequential:
    return factored(module, spectrum.basis[..., :rank], spectrum.coordinates[:, :rank], spectrum.scheme)


def _empty(module: Factorable, rank: int, scheme: str) -> nn.Sequential:
    """Return factors of the layer's shapes, all zero."""
    groups, rows, columns = matrices(module, scheme).shape
    zeros = module.weight.new_zeros
    return factored(module, zeros(groups, rows, rank), zeros(groups, rank, columns), scheme)


def _norm(module: Factorable) -> float:
    """Return ‖W‖, summed in float64."""
    return float(torch.linalg.vector_norm(module.weight.detach(), dtype=torch.float64))


def _check_weights(name: str, module: Factorable, spectrum: Spectrum) -> None:
    norm = _norm(module)
    if abs(norm - spectrum.norm) > _SAME_WEIGHTS * norm:
        raise BadInput(f"the analysis is of other weights: {name!r} has changed since, analyse the model again")
