"""Refit: after a cut, the remaining weights make up for what has gone. No labels, no gradients, no training.

For every layer of the small network, its outputs are brought back to those of the same layer of the dense network by
least squares (``fitting``), on inputs as they come in the small network. All layers are fitted at once from one pass
over the calibration data, BatchNorm statistics are estimated again, and this is repeated: a few such sweeps do as well
as fitting one layer after the other, at a cost that does not grow with the depth.

A part of the data is held out. On it every layer chooses its damping, or to stay as it is, and at last the outputs of
the whole network are compared with those of the dense one: the result is the cut network as it is, the one with new
BatchNorm statistics, or the refitted one, whichever is nearest. The plan records all of this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from pliant.calling import Example
from pliant.compression.batchnorm import reestimate_batchnorm
from pliant.compression.calibration import Calibration
from pliant.compression.factored import FactoredConvolution, FactoredLinear
from pliant.compression.fitting import Sums, fit
from pliant.compression.moments import MAX_COLUMNS, call_on, rows_per_piece
from pliant.compression.observing import LinearMap, linear_map, map_names, observing
from pliant.compression.plan import LayerFit, Plan, RefitRecord
from pliant.compression.rows import chosen_rows, grid_of, input_rows, output_rows
from pliant.structure import tied_parameters

SWEEPS = 3
_EQUAL = 1e-12  # relative error of outputs below which nothing has been lost: that of float32 is 1e-14


@dataclass(frozen=True, eq=False)
class _Site:
    """A map of the small network that can be fitted.

    Args:
        name: its name in the small network.
        source: the name of the dense map whose outputs it has.
        kept: which outputs of the dense map are left, int64; None for all.
    """

    name: str
    source: str
    kept: Tensor | None


@dataclass(frozen=True, eq=False)
class _Target:
    """Outputs of a dense map in one call: rows of the grid and their outputs (rows, filters)."""

    rows: Tensor
    outputs: Tensor


class Refitter:
    """A dense network on calibration data, to which networks cut from it are refitted.

    The dense network is run once, at the first refit; one object serves all sizes.

    Args:
        model: the dense network; not changed.
        example_inputs: inputs that it takes.
        calibration: the data.
    """

    def __init__(self, model: nn.Module, example_inputs: Example, calibration: Calibration) -> None:
        self.model, self.example_inputs, self.calibration = model, example_inputs, calibration

    def refit(self, small: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
        """Return the refitted network, and the plan with the record of the refit.

        Args:
            small: the network that ``plan`` makes of the dense one; not changed.
            plan: the plan.

        Raises:
            BadInput: a network cannot be called on a batch of the data.
        """
        sites, unfitted = _sites(self.model, small, plan)
        errors: dict[str, float] = {"cut": self.error(small)}
        states: dict[str, nn.Module] = {"cut": small}
        if errors["cut"] <= _EQUAL:
            return small, replace(plan, refit=RefitRecord("cut", errors, self.calibration.samples))
        if any(isinstance(module, _BatchNorm) for module in small.modules()):
            states["reestimated"] = reestimate_batchnorm(small, self.calibration)
        network = copy.deepcopy(states.get("reestimated", small))
        fits: dict[str, LayerFit] = {}
        cuts: dict[str, Tensor] = {}
        for sweep in range(SWEEPS):
            sums, absorbed, error = self._observe(network, sites)
            if sweep == 0 and "reestimated" in states:
                errors["reestimated"] = error
            fits = _fit_all(network, sums, absorbed, cuts)
            if not fits:
                break
            network = reestimate_batchnorm(network, self.calibration)
        if fits:
            errors["refitted"], states["refitted"] = self.error(network), network
        best = min(errors, key=errors.__getitem__)
        silent = [(site.name, "is not applied on the calibration data") for site in sites if site.name not in fits]
        record = RefitRecord(best, errors, self.calibration.samples, tuple(fits.values()), (*unfitted, *silent))
        return states[best], replace(plan, refit=record)

    def centre(self, network: nn.Module, plan: Plan) -> nn.Module:
        """Return a copy of a network with biases that give every layer the mean outputs of the dense one.

        Args:
            network: a network of the shapes of ``plan``.
            plan: the plan.
        """
        new = copy.deepcopy(network)
        found = {site.name: (site, linear_map(new, site.name)) for site in _sites(self.model, network, plan)[0]}
        biases = {name: (site, each.bias) for name, (site, each) in found.items() if each and each.bias is not None}
        missed: dict[str, list[Tensor]] = {}
        calls: dict[str, int] = {}
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            site, call = biases[name][0], calls.get(name, 0)
            calls[name] = call + 1
            known = self._reference[0].get((site.source, piece), [])
            if call < len(known) and not self.calibration.held_out(piece):
                y = known[call].outputs
                y = y if site.kept is None else y[:, site.kept.to(y.device)]
                missed.setdefault(name, []).append((y - output_rows(layer, output, known[call].rows)).mean(0))

        probe = copy.deepcopy(network).eval()
        with observing(probe, biases, watch):
            for piece, inputs in enumerate(self.calibration.inputs() if biases else ()):
                calls.clear()
                call_on(probe, inputs, piece)
        for name, means in missed.items():
            bias = biases[name][1]
            assert bias is not None
            bias += torch.stack(means).mean(0)
        return new

    @cached_property
    def _reference(self) -> tuple[dict[tuple[str, int], list[_Target]], dict[int, list[Tensor]]]:
        """The sampled outputs of every map in each piece, and the outputs of the network on pieces held out."""
        dense = copy.deepcopy(self.model).eval()
        maps = {name: found for name in map_names(dense) if (found := linear_map(dense, name)) is not None}
        targets: dict[tuple[str, int], list[_Target]] = {}
        outputs: dict[int, list[Tensor]] = {}
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            if isinstance(layer, _ConvTransposeNd):
                return
            known = targets.setdefault((name, piece), [])
            most = rows_per_piece(maps[name].weight[0].numel(), self.calibration.pieces)
            rows = chosen_rows(grid_of(layer, output), most, f"{name} {len(known)}", piece)
            known.append(_Target(rows, output_rows(layer, output, rows)))

        with observing(dense, maps, watch):
            for piece, inputs in enumerate(self.calibration.inputs()):
                result = call_on(dense, inputs, piece)
                if self.calibration.held_out(piece):
                    outputs[piece] = [x for x in result if x.is_floating_point()]
        return targets, outputs

    def error(self, small: nn.Module) -> float:
        """Return the error of a network's outputs on the held-out pieces, relative to the energy of the dense ones."""
        probe = copy.deepcopy(small).eval()
        results = {
            piece: call_on(probe, inputs, piece)
            for piece, inputs in enumerate(self.calibration.inputs())
            if self.calibration.held_out(piece)
        }
        return self._compare(results)

    def _compare(self, results: Mapping[int, list[Tensor]]) -> float:
        missed = energy = 0.0
        for piece, expected in self._reference[1].items():
            got = [x for x in results[piece] if x.is_floating_point()]
            for x, y in zip(got, expected, strict=True):
                missed += float((x.double() - y.double()).square().sum())
                energy += float((y.double() - y.double().mean(0)).square().sum())
        return missed / energy if energy else missed

    def _observe(self, network: nn.Module, sites: list[_Site]) -> tuple[dict[str, list[Sums | None]], set[str], float]:
        """Run a network; return the sums of each site (to fit, held out), those read by a BatchNorm, and the error."""
        targets, _ = self._reference
        probe = copy.deepcopy(network).eval()
        by_name = {site.name: site for site in sites}
        sums: dict[str, list[Sums | None]] = {}
        calls: dict[str, int] = {}
        results: dict[int, list[Tensor]] = {}
        piece = 0

        def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
            site, call = by_name[name], calls.get(name, 0)
            calls[name] = call + 1
            known = targets.get((site.source, piece), [])
            if call >= len(known):
                return
            target = known[call]
            y = target.outputs if site.kept is None else target.outputs[:, site.kept.to(target.outputs.device)]
            x = input_rows(layer, value, target.rows, grid_of(layer, output))
            both = sums.setdefault(name, [None, None])
            part = int(self.calibration.held_out(piece))
            new = Sums.of(x, y.unflatten(1, (len(x), -1)).transpose(0, 1))
            old = both[part]
            if old is None:
                both[part] = new
            else:
                old.add(new)

        with observing(probe, by_name, watch) as absorbed:
            for piece, inputs in enumerate(self.calibration.inputs()):
                calls.clear()
                result = call_on(probe, inputs, piece)
                if self.calibration.held_out(piece):
                    results[piece] = result
        return sums, absorbed, self._compare(results)


def _sites(model: nn.Module, small: nn.Module, plan: Plan) -> tuple[list[_Site], list[tuple[str, str]]]:
    """Return the maps that can be fitted, and (name, reason) for the others."""
    kept = kept_outputs(plan)
    tied = tied_parameters(small)
    modules = dict(small.named_modules())
    sites: list[_Site] = []
    unfitted: list[tuple[str, str]] = []
    for source in map_names(model):
        module = modules.get(source)
        name = source
        if isinstance(module, (FactoredLinear, FactoredConvolution)):
            name = f"{source}.expand".lstrip(".")
        found = None if module is None else linear_map(small, name)
        reason = None
        if found is None:
            reason = "has no weights that can be fitted"
        elif isinstance(found.layer, _ConvTransposeNd):
            reason = "is a transposed convolution"
        elif any(id(p) in tied for p in found.layer.parameters(recurse=False)):
            reason = "shares a parameter with another layer"
        elif found.weight[0].numel() > MAX_COLUMNS["linear"]:
            reason = f"has {found.weight[0].numel()} columns, more than {MAX_COLUMNS['linear']}"
        if reason is None:
            sites.append(_Site(name, source, kept.get(source)))
        else:
            unfitted.append((source, reason))
    return sites, unfitted


def kept_outputs(plan: Plan) -> dict[str, Tensor]:
    """Return which outputs of each dense layer are left after a plan, for layers that lose some; int64 (n,)."""
    kept: dict[str, Tensor] = {}
    for link in plan.links or (plan,):
        for layer in link.layers:
            if layer.outputs is not None:
                positions = torch.tensor(layer.outputs)
                kept[layer.name] = kept[layer.name][positions] if layer.name in kept else positions
    return kept


def _fit_all(
    network: nn.Module, sums: Mapping[str, list[Sums | None]], absorbed: set[str], cuts: dict[str, Tensor]
) -> dict[str, LayerFit]:
    """Fit all observed maps of a network in place; ``cuts`` keeps the weights that the first sweep found."""
    fits: dict[str, LayerFit] = {}
    for name, (fitted, held) in sums.items():
        found = linear_map(network, name)
        if fitted is None or held is None or found is None:
            continue
        groups = len(fitted.xx)
        now = _matrices(found, groups)
        bias = None if found.bias is None else found.bias.double().unflatten(0, (groups, -1))
        cut = cuts.setdefault(name, now)
        result = fit(fitted, held, cut, now, bias, centred=name in absorbed)
        if result.damping is not None:
            found.weight.copy_(result.weight.flatten(0, 1).reshape(found.weight.shape))
            if found.bias is not None and result.bias is not None:
                found.bias.copy_(result.bias.flatten())
        fits[name] = LayerFit(name, result.damping, result.error, result.error_before)
    return fits


def _matrices(found: LinearMap, groups: int) -> Tensor:
    matrices: Tensor = found.weight.double().flatten(1).unflatten(0, (groups, -1))
    return matrices
