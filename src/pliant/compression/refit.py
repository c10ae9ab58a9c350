"""Refit: after a cut, the remaining weights make up for what has gone. No labels, no gradients, no training.

For every layer of the small network, its outputs are brought back to those of the same layer of the dense network by
least squares (``fitting``), on inputs as they come in the small network. All layers are fitted at once from one pass
over the calibration data, BatchNorm statistics are estimated again, and this is repeated: a few such sweeps do as well
as fitting one layer after the other, at a cost that does not grow with the depth.

Eight-bit weights cannot be fitted. A chain that ends with them is refitted before they are rounded, and the rounding,
which makes up for its own errors, looks at the refitted network.

A part of the data is held out. On it every layer chooses its damping, or to stay as it is, and at last the outputs of
the whole network are compared with those of the dense one: the result is the cut network as it is, the one with new
BatchNorm statistics, or the refitted one, whichever is nearest. The plan records all of this.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.calling import Example, Inputs, as_inputs, eval_mode, tensors_of
from pliant.compression.base import Compressor
from pliant.compression.batchnorm import estimating, normalises
from pliant.compression.calibration import Calibration
from pliant.compression.chain import Chain
from pliant.compression.fitting import Sums, fit
from pliant.compression.moments import LEAST_ROWS, MAX_COLUMNS, ROWS_PER_COLUMN, call_on, rows_per_piece
from pliant.compression.observing import LinearMap, linear_map, map_names, observing, unfused
from pliant.compression.plan import LayerFit, Plan, RefitRecord
from pliant.compression.quantised import Int8
from pliant.compression.rows import chosen_rows, grid_of, input_rows, output_rows
from pliant.compression.sites import WIDE, Site
from pliant.compression.sites import sites as sites_of
from pliant.errors import BadInput

MOST_SWEEPS = 6
_GAIN = 0.1  # share of its error that the network has to lose in a sweep to be worth another one
_UNSEEN = "is not called on the calibration data, or its parent reads its weight without calling it"
_BROKEN = "is hardly called on the calibration data, or reads NaN or infinity there"
_EQUAL = 1e-12  # relative error of outputs below which nothing has been lost: that of float32 is 1e-14


@dataclass(frozen=True, eq=False)
class _Call:
    """What a dense map did in one call.

    Args:
        rows, outputs: rows of the grid of its outputs, and their outputs (rows, filters).
        places, inputs: for a wide convolution, rows of the grid of its inputs, and their channels (rows, channels).
    """

    rows: Tensor
    outputs: Tensor
    places: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the maps of a network have seen in one pass.

    Args:
        sums: for each map, the sums over the rows to fit and over those held out.
        absorbed: map → the BatchNorm that reads its outputs.
    """

    sums: Mapping[str, list[Sums | None]]
    absorbed: Mapping[str, str]


class Refitter:
    """A dense network on calibration data, to which networks cut from it are refitted.

    The dense network is run once, at the first refit; one object serves all sizes.

    Args:
        model: the dense network; not changed.
        example_inputs: inputs that it takes.
        calibration: the data.

    Raises:
        BadInput: the data is a single piece.
    """

    def __init__(self, model: nn.Module, example_inputs: Example, calibration: Calibration) -> None:
        if calibration.pieces < 2:
            raise BadInput(
                "the calibration data is a single sample, or one batch that cannot be split: a part is held out to "
                "compare fits, so give at least two batches, or refit=False"
            )
        self.model, self.example_inputs, self.calibration = model, example_inputs, calibration

    def apply(
        self, compressor: Compressor[Any], plan: Plan, analysis: Any, small: nn.Module | None = None
    ) -> tuple[nn.Module, Plan]:
        """Return the network that a plan makes of the dense one, refitted, and the plan with the record of the refit.

        Args:
            compressor, plan, analysis: as in ``compressor.apply(model, plan, analysis=analysis)``.
            small: the network that this returns, if it is known.

        Raises:
            BadInput: as there, or a network cannot be called on a batch of the data.
        """
        last = compressor.links[-1] if isinstance(compressor, Chain) else None
        if not isinstance(compressor, Chain) or not isinstance(last, Int8) or len(compressor.links) == 1:
            if small is None:
                small = compressor.apply(self.model, plan, analysis=analysis)
            return self.refit(small, plan)
        before = replace(plan, links=plan.links[:-1])
        network = Chain(*compressor.links[:-1]).apply(self.model, before, analysis=analysis)
        network, refitted = self.refit(network, before)
        seen = last.analyse(network, self.example_inputs, self.calibration)
        small = last.apply(network, plan.links[-1], analysis=seen)
        assert refitted.refit is not None
        record = replace(refitted.refit, errors={**refitted.refit.errors, "rounded": self.error(small)})
        return small, replace(plan, refit=record)

    def refit(self, small: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
        """Return the refitted network, and the plan with the record of the refit.

        Args:
            small: the network that ``plan`` makes of the dense one; not changed.
            plan: the plan.

        Raises:
            BadInput: a network cannot be called on a batch of the data.
        """
        sites, unfitted = sites_of(self.model, small, plan)
        errors: dict[str, float] = {"cut": self.error(small)}
        if errors["cut"] <= _EQUAL:
            return small, replace(plan, refit=RefitRecord("cut", errors, self.calibration.samples))
        states: dict[str, nn.Module] = {"cut": small}
        network, seen = self._observe(small, sites, estimate=normalises(small))
        if normalises(small):
            states["reestimated"], errors["reestimated"] = network, self.error(network)
        # Where little was cut, the dense statistics are better than any estimate, and stay.
        dense = None if errors.get("reestimated", math.inf) < errors["cut"] else small
        if normalises(small) and dense is not None:
            network, seen = self._observe(small, sites, estimate=False)
        network, error, fits = self._sweeps(network, seen, sites, dense)
        if fits:
            errors["refitted"], states["refitted"] = error, network
        best = min(errors, key=errors.__getitem__)
        silent = [
            (site.name, _BROKEN if site.name in seen.sums else _UNSEEN) for site in sites if site.name not in fits
        ]
        record = RefitRecord(best, errors, self.calibration.samples, tuple(fits.values()), (*unfitted, *silent))
        return states[best], replace(plan, refit=record)

    def _sweeps(
        self, network: nn.Module, seen: _Seen, sites: list[Site], dense: nn.Module | None
    ) -> tuple[nn.Module, float, dict[str, LayerFit]]:
        """Fit all maps, again and again while the outputs of the network get better.

        The first sweep fits only the maps that have lost something themselves. The others see wrong inputs only because
        of these; fitted at once, all layers of a deep network would make up for the same error.

        Args:
            network: the network; not changed.
            seen: what its maps have seen.
            sites: the maps.
            dense: a network with the dense BatchNorm statistics, if these stay; None if they are estimated.

        Returns:
            The best network, its error, and how its maps were fitted.
        """
        cuts: dict[str, Tensor] = {}
        best, least = network, math.inf
        fits: dict[str, LayerFit] = {}
        touched = [site for site in sites if self._is_cut(network, site)]
        for sweep in range(MOST_SWEEPS):
            fresh = copy.deepcopy(network)
            fits |= _fit_all(fresh, seen, touched if sweep == 0 and touched else sites, cuts, dense)
            if not fits:
                break
            network, seen = self._observe(fresh, sites, estimate=dense is None)
            error = self.error(network)
            if error > least:  # the layers have made up for too much together: go half of the way
                network, seen = self._observe(_between(best, network), sites, estimate=dense is None)
                error = self.error(network)
            if error > (1 - _GAIN) * least:
                if error < least:
                    best, least = network, error
                break
            best, least = network, error
        return best, least, {site.name: fits[site.name] for site in sites if site.name in fits}

    def _is_cut(self, small: nn.Module, site: Site) -> bool:
        """Return whether the weight of a map is another one than in the dense network, apart from lost outputs."""
        now, before = linear_map(small, site.name), linear_map(self.model, site.source)
        if now is None or before is None or site.name != site.source or now.weight.dim() != before.weight.dim():
            return True
        weight = before.weight if site.kept is None else before.weight[site.kept.to(before.weight.device)]
        if now.weight.shape != weight.shape:
            return True
        left = (now.weight != 0).flatten(1).any(1)  # a mask removes filters by zeros
        return not torch.equal(now.weight[left], weight[left])

    def centre(self, network: nn.Module, plan: Plan) -> nn.Module:
        """Return a copy of a network with biases that give every layer the mean outputs of the dense one.

        Args:
            network: a network of the shapes of ``plan``.
            plan: the plan.
        """
        new = copy.deepcopy(network)
        found = {site.name: (site, linear_map(new, site.name)) for site in sites_of(self.model, network, plan)[0]}
        biases = {name: (site, each.bias) for name, (site, each) in found.items() if each and each.bias is not None}
        missed: dict[str, list[Tensor]] = {}
        calls: dict[str, int] = {}
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            site = biases[name][0]
            dense = self._call(site, piece, calls)
            if dense is not None and not self.calibration.held_out(piece):
                got = output_rows(layer, output, dense.rows)
                missed.setdefault(name, []).append((_left(dense.outputs, site) - got).mean(0))

        probe = copy.deepcopy(network).eval()
        with observing(probe, biases, watch):
            for piece, inputs in self._pieces() if biases else ():
                calls.clear()
                call_on(probe, inputs, self.calibration.batch_of[piece])
        for name, means in missed.items():
            bias = biases[name][1]
            assert bias is not None
            shift = torch.stack(means).mean(0)
            bias += torch.where(shift.isfinite(), shift, 0.0)
        return new

    @cached_property
    def share(self) -> float:
        """The share of each piece that is read: as much as gives every map of the dense network enough rows.

        A map has a row for every position of every sample. One with a single position would want all of the data
        whatever the others need, at the cost of the whole network: it gets a row for each of its columns.
        """
        maps = _maps(probe := copy.deepcopy(self.model).eval())
        samples = len(tensors_of(as_inputs(self.example_inputs))[0])
        several: list[float] = []  # the shares that maps of several positions need
        single = [0.0]  # and those of one position

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            positions = math.prod(grid_of(layer, output)) / samples
            columns = maps[name].weight[0].numel()
            if isinstance(layer, _ConvNd) and columns > WIDE:
                columns = maps[name].weight.shape[1]
            rows = max(LEAST_ROWS, ROWS_PER_COLUMN * columns) if positions > 1 else columns
            (several if positions > 1 else single).append(rows / (positions * self.calibration.samples))

        with observing(probe, maps, watch):
            call_on(probe, as_inputs(self.example_inputs), 0)
        return min(1.0, max(*several, *single)) if several else 1.0

    def _pieces(self) -> Iterator[tuple[int, Inputs]]:
        """Yield the number and the inputs of each piece."""
        yield from enumerate(self.calibration.inputs(self.share))

    @cached_property
    def _reference(self) -> tuple[dict[tuple[str, int], list[_Call]], dict[int, list[Tensor]]]:
        """What every map did in each piece, sampled, and the outputs of the network on pieces held out."""
        dense = copy.deepcopy(self.model).eval()
        maps = _maps(dense)
        calls: dict[tuple[str, int], list[_Call]] = {}
        outputs: dict[int, list[Tensor]] = {}
        piece = 0

        def chosen(layer: nn.Module, value: Tensor, columns: int, name: str) -> tuple[Tensor, Tensor]:
            rows = chosen_rows(grid_of(layer, value), rows_per_piece(columns, self.calibration.pieces), name, piece)
            return rows, output_rows(layer, value, rows)

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            if isinstance(layer, _ConvTransposeNd):
                return
            known = calls.setdefault((name, piece), [])
            columns = min(maps[name].weight[0].numel(), max(MAX_COLUMNS.values()))
            call = _Call(*chosen(layer, output, columns, f"{name} {len(known)}"))
            if isinstance(layer, _ConvNd) and layer.groups == 1 and columns > WIDE:
                places, inputs = chosen(layer, value, layer.in_channels, f"{name} {len(known)} inputs")
                call = replace(call, places=places, inputs=inputs)
            known.append(call)

        with observing(dense, maps, watch):
            for piece, inputs in self._pieces():
                result = call_on(dense, inputs, self.calibration.batch_of[piece])
                if self.calibration.held_out(piece):
                    outputs[piece] = [x for x in result if x.is_floating_point()]
        return calls, outputs

    def _call(self, site: Site, piece: int, counts: dict[str, int]) -> _Call | None:
        """Return what the dense network did in the next call of a site in a piece; None if it made no such call.

        Args:
            site: the site.
            piece: number of the piece.
            counts: site → its calls in this piece so far; this one is added.
        """
        call = counts.get(site.name, 0)
        counts[site.name] = call + 1
        known = self._reference[0].get((site.source, piece), [])
        return known[call] if call < len(known) else None

    def error(self, small: nn.Module) -> float:
        """Return the error of a network's outputs on the held-out pieces, relative to the energy of the dense ones."""
        probe = copy.deepcopy(small).eval()
        missed = 0.0
        with unfused():
            for piece, inputs in self._pieces():
                if not self.calibration.held_out(piece):
                    continue
                got = [x for x in call_on(probe, inputs, self.calibration.batch_of[piece]) if x.is_floating_point()]
                for x, y in zip(got, self._reference[1][piece], strict=True):
                    rest = torch.where(x == y, 0.0, x.double() - y.double())  # both are infinite in masked logits
                    missed += float(rest.square().sum())
        error = missed / self._energy if self._energy else missed
        return error if math.isfinite(error) else sys.float_info.max

    @cached_property
    def _energy(self) -> float:
        """The energy of the dense outputs on the held-out pieces."""
        energy = sum(_energy(outputs) for outputs in zip(*self._reference[1].values(), strict=True))
        if not math.isfinite(energy):
            raise BadInput("the outputs of the dense network on the calibration data hold NaN")
        return energy

    def _observe(self, network: nn.Module, sites: list[Site], *, estimate: bool) -> tuple[nn.Module, _Seen]:
        """Run a network on all pieces, and return what its sites have seen.

        Args:
            network: the small network; not changed.
            sites: the maps to observe.
            estimate: whether its BatchNorm statistics are estimated in the same pass: each piece is normalised by its
                own, and the returned network has the means.
        """
        probe = copy.deepcopy(network)
        by_name = {site.name: site for site in sites}
        sums: dict[str, list[Sums | None]] = {}
        calls: dict[str, int] = {}
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            site = by_name[name]
            dense = self._call(site, piece, calls)
            if dense is None:
                return
            if site.frame is not None and dense.places is not None and dense.inputs is not None:
                x = output_rows(layer, value, dense.places).unsqueeze(0)
                y = dense.inputs @ site.frame.root.to(dense.inputs.dtype)
            else:
                x = input_rows(layer, value, dense.rows, grid_of(layer, output))
                y = _left(dense.outputs, site)
            both = sums.setdefault(name, [None, None])
            part = int(self.calibration.held_out(piece))
            new = Sums.of(x, y.unflatten(1, (len(x), -1)).transpose(0, 1))
            old = both[part]
            if old is None:
                both[part] = new
            else:
                old.add(new)

        with observing(probe, by_name, watch) as absorbed, estimating(probe) if estimate else eval_mode(probe):
            for piece, inputs in self._pieces():
                calls.clear()
                call_on(probe, inputs, self.calibration.batch_of[piece])
        return probe, _Seen(sums, absorbed)


def _energy(outputs: Sequence[Tensor]) -> float:
    """Return Σ (y − ȳ)² over one output in several pieces, Σ y² if that is zero; infinite numbers do not count."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}  # sequences may differ in length
    for y in outputs:
        groups.setdefault(tuple(y.shape[1:]), []).append(y.double().masked_fill(y.isinf(), 0.0).flatten(0, 0))
    joined = [torch.cat(pieces) for pieces in groups.values()]
    centred = sum(float((y - y.mean(0)).square().sum()) for y in joined if len(y))
    return centred or sum(float(y.square().sum()) for y in joined)


def _between(a: nn.Module, b: nn.Module) -> nn.Module:
    """Return a network with the means of the parameters and floating-point buffers of two of the same shapes."""
    middle = copy.deepcopy(b)
    state, other = middle.state_dict(), a.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.lerp_(other[name], 0.5)
    return middle


def _fit_all(
    network: nn.Module,
    seen: _Seen,
    sites: Collection[Site],
    cuts: dict[str, Tensor],
    dense: nn.Module | None,
) -> dict[str, LayerFit]:
    """Fit observed maps of a network in place.

    Args:
        network: the network.
        seen: what its maps have seen.
        sites: the maps to fit.
        cuts: the weights that the first sweep found, which all sweeps are damped towards; filled by the first one.
        dense: a network with the dense BatchNorm statistics, if those stay: a mean that a layer without bias misses is
            then made up for in the statistics of the BatchNorm behind it.
    """
    fits: dict[str, LayerFit] = {}
    for site in sites:
        name, frame = site.name, site.frame
        fitted, held = seen.sums.get(name, (None, None))
        found = linear_map(network, name)
        if fitted is None or held is None or found is None or not (fitted.finite and held.finite):
            continue
        groups = len(fitted.xx)
        now = _matrices(found, groups) if frame is None else frame.estimate(found.weight)
        bias = None if found.bias is None or frame is not None else found.bias.double().unflatten(0, (groups, -1))
        centred = name in seen.absorbed or found.bias is not None
        result = fit(fitted, held, cuts.setdefault(name, now), now, bias, centred=centred)
        missing = fitted.mean_y - (result.weight @ fitted.mean_x.unsqueeze(2)).squeeze(2)  # (groups, filters)
        missing = missing.flatten() if frame is None else frame.outputs(missing)
        if result.damping is not None:
            shape = found.weight.shape
            weight = (
                result.weight.flatten(0, 1).reshape(shape) if frame is None else frame.weights(result.weight, shape)
            )
            found.weight.copy_(weight)
            if found.bias is not None and result.bias is not None:
                found.bias.copy_(result.bias.flatten())
            elif found.bias is not None and frame is not None and frame.bias is not None:
                found.bias.copy_(frame.bias + missing)
        if dense is not None and found.bias is None and name in seen.absorbed:
            norm, before = network.get_submodule(seen.absorbed[name]), dense.get_submodule(seen.absorbed[name])
            if isinstance(norm.running_mean, Tensor) and isinstance(before.running_mean, Tensor):  # else of each batch
                norm.running_mean.copy_(before.running_mean - missing)
        fits[name] = LayerFit(name, result.damping, result.error, result.error_before)
    return fits


def _matrices(found: LinearMap, groups: int) -> Tensor:
    matrices: Tensor = found.weight.double().flatten(1).unflatten(0, (groups, -1))
    return matrices


def _maps(model: nn.Module) -> dict[str, LinearMap]:
    """Return all maps of a network by name."""
    return {name: found for name in map_names(model) if (found := linear_map(model, name)) is not None}


def _left(outputs: Tensor, site: Site) -> Tensor:
    """Return those outputs of a dense map that a site has, (rows, filters)."""
    return outputs if site.kept is None else outputs[:, site.kept.to(outputs.device)]
