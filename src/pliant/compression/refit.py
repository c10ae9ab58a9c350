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
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pliant.calling import Example, copied, eval_mode
from pliant.compression.base import Compressor
from pliant.compression.batchnorm import estimating, normalises
from pliant.compression.calibration import Calibration
from pliant.compression.chain import Chain
from pliant.compression.fitting import Sums, fit
from pliant.compression.moments import call_on
from pliant.compression.observing import LinearMap, linear_map, observing
from pliant.compression.plan import LayerFit, Plan, RefitRecord
from pliant.compression.quantised import Int8
from pliant.compression.reference import Reference
from pliant.compression.rows import grid_of, input_rows, output_rows
from pliant.compression.sites import Site
from pliant.compression.sites import sites as sites_of
from pliant.errors import BadInput

MOST_SWEEPS = 4  # measured on trained networks: further ones take up to a tenth off the error, and no wrong answers
MEMORY = 1 << 29  # bytes of sums; where all maps need more, a sweep fits one part of them after the other
_GAIN = 0.1  # share of its error that the network has to lose in a sweep to be worth another one
_UNSEEN = "is not called on the calibration data, or its parent reads its weight without calling it"
_BROKEN = "is hardly called on the calibration data, or reads NaN or infinity there"
_EQUAL = 1e-12  # relative error of outputs below which nothing has been lost: that of float32 is 1e-14


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
        self.reference = Reference(model, example_inputs, calibration)

    def error(self, network: nn.Module) -> float:
        """Return the error of a network's outputs on held-out data, relative to the energy of the dense ones."""
        return self.reference.error(network)

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
        sites, unfitted = sites_of(self.model, small, plan, self.reference.most)
        errors: dict[str, float] = {"cut": self.error(small)}
        if errors["cut"] <= _EQUAL:
            return small, replace(plan, refit=RefitRecord("cut", errors, self.reference.samples))
        states: dict[str, nn.Module] = {"cut": small}
        parts = parts_of(small, sites)
        network, seen = self._observe(small, parts[0], estimate=normalises(small))
        if normalises(small):
            states["reestimated"], errors["reestimated"] = network, self.error(network)
        # Where little was cut, the dense statistics are better than any estimate, and stay.
        dense = None if errors.get("reestimated", math.inf) < errors["cut"] else small
        if normalises(small) and dense is not None:
            network, seen = self._observe(small, parts[0], estimate=False)
        heard = set(seen.sums)
        network, error, fits = self._sweeps(network, seen, parts, dense, heard)
        if fits:
            errors["refitted"], states["refitted"] = error, network
        best = min(errors, key=errors.__getitem__)
        silent = [(site.name, _BROKEN if site.name in heard else _UNSEEN) for site in sites if site.name not in fits]
        record = RefitRecord(best, errors, self.reference.samples, tuple(fits.values()), (*unfitted, *silent))
        return states[best], replace(plan, refit=record)

    def _sweeps(
        self, network: nn.Module, seen: _Seen, parts: list[list[Site]], dense: nn.Module | None, heard: set[str]
    ) -> tuple[nn.Module, float, dict[str, LayerFit]]:
        """Fit all maps, again and again while the outputs of the network get better.

        The first sweep fits only the maps that have lost something themselves. The others see wrong inputs only because
        of these; fitted at once, all layers of a deep network would make up for the same error.

        Args:
            network: the network; not changed.
            seen: what the maps of the first part have seen.
            parts: the maps.
            dense: a network with the dense BatchNorm statistics, if these stay; None if they are estimated.
            heard: the names of all maps that have seen anything, which are added to it.

        Returns:
            The best network, its error, and how its maps were fitted.
        """
        cuts: dict[str, Tensor] = {}
        best, least = network, math.inf
        fits: dict[str, LayerFit] = {}
        touched = {site.name for part in parts for site in part if self._is_cut(network, site)}
        for sweep in range(MOST_SWEEPS):
            fresh = copied(network)
            for index, part in enumerate(parts):
                wanted = [site for site in part if sweep or not touched or site.name in touched]
                if index and wanted:  # these maps see what the fits of the parts before have made of their inputs
                    fresh, seen = self._observe(fresh, part, estimate=dense is None)
                    heard |= set(seen.sums)
                fits |= _fit_all(fresh, seen, wanted, cuts, dense)
            if not fits:
                break
            network, seen = self._observe(fresh, parts[0], estimate=dense is None)
            error = self.error(network)
            if error > least:  # the layers have made up for too much together: go half of the way
                network, seen = self._observe(_between(best, network), parts[0], estimate=dense is None)
                error = self.error(network)
            if error > (1 - _GAIN) * least:
                if error < least:
                    best, least = network, error
                break
            best, least = network, error
        return best, least, {site.name: fits[site.name] for part in parts for site in part if site.name in fits}

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
        new = copied(network)
        found = {
            site.name: (site, linear_map(new, site.name))
            for site in sites_of(self.model, network, plan, self.reference.most)[0]
        }
        biases = {name: (site, each.bias) for name, (site, each) in found.items() if each and each.bias is not None}
        missed: dict[str, list[Tensor]] = {}
        calls: Counter[str] = Counter()
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            site = biases[name][0]
            dense = self.reference.call(site.source, piece, calls[name])
            calls[name] += 1
            if dense is not None and not self.calibration.held_out(piece):
                got = output_rows(layer, output, dense.rows)
                missed.setdefault(name, []).append((_left(dense.outputs, site) - got).mean(0))

        probe = copied(network).eval()
        with observing(probe, biases, watch):
            for piece, inputs in self.reference.pieces() if biases else ():
                calls.clear()
                call_on(probe, inputs, self.calibration.batch_of[piece])
        for name, means in missed.items():
            bias = biases[name][1]
            assert bias is not None
            shift = torch.stack(means).mean(0)
            bias += torch.where(shift.isfinite(), shift, 0.0)
        return new

    def _observe(self, network: nn.Module, sites: list[Site], *, estimate: bool) -> tuple[nn.Module, _Seen]:
        """Run a network on all pieces, and return what its sites have seen.

        Args:
            network: the small network; not changed.
            sites: the maps to observe.
            estimate: whether its BatchNorm statistics are estimated in the same pass: each piece is normalised by its
                own, and the returned network has the means.
        """
        probe = copied(network)
        by_name = {site.name: site for site in sites}
        sums: dict[str, list[Sums | None]] = {}
        calls: Counter[str] = Counter()
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            site = by_name[name]
            dense = self.reference.call(site.source, piece, calls[name])
            calls[name] += 1
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
            for piece, inputs in self.reference.pieces():
                calls.clear()
                call_on(probe, inputs, self.calibration.batch_of[piece])
        return probe, _Seen(sums, absorbed)


def parts_of(network: nn.Module, sites: list[Site]) -> list[list[Site]]:
    """Return the maps in parts whose sums fit into the memory, one of them at least."""
    parts: list[list[Site]] = [[]]
    used = 0
    for site in sites:
        found = linear_map(network, site.name)
        assert found is not None  # sites_of has looked
        needed = sum_bytes(found, site)
        if parts[-1] and used + needed > MEMORY:
            parts.append([])
            used = 0
        parts[-1].append(site)
        used += needed
    return parts


def sum_bytes(found: LinearMap, site: Site) -> int:
    """Return the memory that the sums of a map take, over the rows to fit and over those held out."""
    filters, columns = found.weight.flatten(1).shape
    groups = found.layer.groups if isinstance(found.layer, _ConvNd) else 1
    if site.frame is not None:
        filters, columns = len(site.frame.root), found.weight.shape[1]
    return 2 * 8 * (columns + 1) * (groups * (columns + 1) + filters)


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


def _left(outputs: Tensor, site: Site) -> Tensor:
    """Return those outputs of a dense map that a site has, (rows, filters)."""
    return outputs if site.kept is None else outputs[:, site.kept.to(outputs.device)]
