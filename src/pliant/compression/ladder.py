"""Making a network elastic: it is refitted at a few sizes, and what differs is stored in a few bits.

From the largest rung of the ladder to the smallest, the dense network is cut and refitted (``refit``); the difference
of its weights to those of the next larger rung, as they are stored, is quantised, so that errors do not add up; then
the BatchNorm statistics are estimated again. The errors on held-out data are measured on what is stored.

Of low rank, the second factors are refitted; the first ones follow from the dense weights at every size.

The base is the dense network, not one set of weights that serves all sizes: it is there without any loss, and two to
four bits per weight bring each rung nearer to its own refit than joint weights do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant import measuring
from pliant.calling import Example, as_inputs, tensors_of
from pliant.compression.base import Compressor
from pliant.compression.batchnorm import reestimate_batchnorm
from pliant.compression.calibration import Calibration, calibration_of
from pliant.compression.corrections import BITS, pack, packed_bytes, picked, placed, quantise
from pliant.compression.elastic import Elastic, Point, corrected, example_of
from pliant.compression.path import KINDS, Path
from pliant.compression.rank import LowRank
from pliant.compression.rank_path import BASIS_BITS, RankPath
from pliant.compression.refit import Refitter
from pliant.errors import BadInput, Refused

LADDER = (0.7, 0.5, 0.3, 0.2, 0.1)
"""Shares of the parameters at which a network is refitted."""
GROWTH = 0.2
"""How much larger than the dense network's file everything may be; a long ladder in two bits may need more."""

_POINT = 250  # bytes of JSON and of names that a point takes


def make_elastic(
    model: nn.Module,
    compressor: Compressor[Any],
    example_inputs: Example,
    calibration: Iterable[Any],
    ladder: Sequence[float] = LADDER,
) -> Elastic:
    """Return what makes every size of a network from its dense weights.

    Args:
        model: the trained network; not changed.
        compressor: FilterPruning, HeadPruning or LowRank; its ratio is ignored.
        example_inputs: what the model takes.
        calibration: batches of training data without augmentation.
        ladder: shares of the parameters at which the network is refitted, falling. The last one is the smallest size.

    Raises:
        BadInput: the compressor is another one, the ladder is none, or the example or data does not fit.
        Refused: nothing can be removed, or the smallest share is out of reach.
    """
    kept = check_ladder(ladder)
    cuts = type(compressor) in KINDS.values() and compressor.mode == "remove"  # type: ignore[attr-defined]
    if not cuts and type(compressor) is not LowRank:
        raise BadInput(
            "elastic files are for FilterPruning and HeadPruning that remove channels and for LowRank, "
            f"not for {type(compressor).__name__}"
        )
    data = calibration_of(calibration, model, example_inputs)
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        analysis = compressor.analyse(model, example_inputs, data)
        compressor.at(0.5).plan(model, example_inputs, analysis=analysis)  # for its errors
        path: Path | RankPath
        if isinstance(compressor, LowRank):
            path = _rank_path(model, compressor, analysis, kept)
        else:
            path = Path.of(model, compressor, analysis)  # type: ignore[arg-type]
        steps = _steps(path, kept)
        if isinstance(path, Path):
            for step in steps:
                _check(path, step, analysis)
        return _Maker(model, path, example_inputs, data, steps).make()
    finally:
        for module, mode in was:
            module.training = mode


def _check(path: Path, step: int, analysis: Any) -> None:
    """Raise Refused if the network after so many steps does not equal its masked twin."""
    plan = path.plan(step)
    why = path.compressor.fault(plan, analysis)
    if why is not None:
        raise Refused(f"the size of {plan.params_after:,} parameters does not work: {why}")


def check_ladder(ladder: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of a ladder; raise BadInput unless they fall and lie between 0 and 1."""
    shares = tuple(ladder) if isinstance(ladder, list | tuple) else ()
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
    if not shares or not numbers or not all(a > b for a, b in zip((1, *shares), (*shares, 0), strict=True)):
        raise BadInput(
            f"ladder holds falling shares of the parameters between 1 and 0, such as 0.5, 0.2; got {ladder!r}"
        )
    return shares


def _steps(path: Path | RankPath, ladder: Sequence[float]) -> list[int]:
    """Return the steps of the rungs: the largest sizes that do not have more than these shares of the parameters."""
    params = path.params
    least = params[path.sizes[-1]] / params[0]
    if least > ladder[-1]:
        raise Refused(
            f"the ladder goes down to {ladder[-1]:g} of the parameters, out of reach: the least that "
            f"{type(path.compressor).__name__} can reach is {least:.4g}"
        )
    return sorted({next(n for n in path.sizes if n and params[n] <= share * params[0]) for share in ladder})


def _rank_path(model: nn.Module, compressor: LowRank, analysis: Any, ladder: Sequence[float]) -> RankPath:
    """Return the path of a network with bases in as many bits as leave room for the least corrections."""
    room = GROWTH * measuring.file_bytes(model)
    for bits in BASIS_BITS:
        path = RankPath.of(model, compressor, analysis, bits)
        if _path_bytes(path) + sum(_rung_bytes(path, step) for step in _steps(path, ladder)) <= room:
            break
    return path


def _path_bytes(path: Path | RankPath) -> int:
    return len(json.dumps(path.to_dict(), separators=(",", ":"))) + sum(x.nbytes for x in path.tensors().values())


def _rung_bytes(path: RankPath, step: int) -> int:
    """Return how many bytes a rung and the vectors before it take at most in the fewest bits."""
    kept, count = path.kept(step), 2 * _POINT
    for name, tensor in path.template().items():
        part = picked(tensor, kept.get(name, {}))
        if part.dim() <= 1:
            count += 2 * 4 * part.numel()
        elif not name.endswith("reduce.weight"):
            count += packed_bytes(part.numel(), BITS[-1]) + 2 * len(part)
    return count


class _Maker:
    """Makes an elastic network, from the largest rung to the smallest."""

    def __init__(
        self, model: nn.Module, path: Path | RankPath, example_inputs: Example, data: Calibration, steps: Sequence[int]
    ) -> None:
        self.model, self.path, self.data, self.steps = model, path, data, steps
        self.refitter = Refitter(model, example_inputs, data)
        self.example = example_of(example_inputs)
        self.batch = len(tensors_of(as_inputs(example_inputs))[0])
        self.macs = max(1, measuring.macs(model, example_inputs))
        tied = model.state_dict().keys() - measuring.state_tensors(model).keys()
        self.dense = {name: tensor.cpu() for name, tensor in path.base(model).items() if name not in tied}
        normed = any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
        self.halves = self._halves() if normed else {}

    def make(self) -> Elastic:
        """Refit all rungs, and store what differs."""
        fitted = {}
        for step in self.steps:
            plan = self.path.plan(step)
            fitted[step] = self.refitter.refit(self.path.cut(self.model, step, self.dense), plan)
        differing = self._differing({step: network for step, (network, _) in fitted.items()})
        weights = tuple(name for name in differing if self.dense[name].dim() > 1)
        vectors = tuple(name for name in differing if self.dense[name].dim() <= 1)
        elastic = Elastic(self.path, weights, vectors, (), self.data.samples, self.macs, self.batch, self.example)
        values = {
            name: self.dense[name].to(torch.promote_types(self.dense[name].dtype, torch.float32)) for name in weights
        }
        for step, bits in zip(self.steps, self._bits(elastic), strict=True):
            network, plan = fitted.pop(step)
            assert plan.refit is not None
            errors = plan.refit.errors
            state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
            kept, balance = self.path.kept(step), self.path.balance(step)
            codes: list[Tensor] = []
            scales: list[Tensor] = []
            for name in weights:
                base = picked(values[name], kept.get(name, {}))
                change = state[name].to(base.dtype) - base if name in state else base
                code, scale = quantise(change * balance.get(name, 1.0), bits)
                fixed = corrected(base, code, scale, bits, balance.get(name))
                values[name] = placed(values[name], kept.get(name, {}), fixed)
                codes.append(code.flatten())
                scales.append(scale)
            own = {"cut": errors["cut"], "refitted": errors[plan.refit.result], "elastic": 0.0}  # measured below
            no_codes = torch.zeros(0, dtype=torch.uint8)
            point = Point(
                step,
                bits,
                own,
                pack(torch.cat([no_codes, *codes]), bits),
                torch.cat([torch.zeros(0, dtype=torch.float16), *scales]),
                _flat(state, vectors),
            )
            elastic = self._settled(replace(elastic, points=(*elastic.points, point)))
            if step in self.halves:
                elastic = self._with_half(elastic, self.halves[step])
        return elastic

    def _settled(self, elastic: Elastic, index: int = -1) -> Elastic:
        """Return an elastic network whose point has the vectors that suit its weights best, and its error.

        These are the vectors that it has, the same with BatchNorm statistics of the calibration data, or these and
        biases that give every layer its mean outputs, whichever makes the least error on data that was held out.
        """
        point = elastic.points[index]
        network, plan = elastic.sized(self.model, point.step)
        network = network.to(self.data.device)
        renewed = reestimate_batchnorm(network, self.data)
        centred = reestimate_batchnorm(self.refitter.centre(renewed, plan), self.data)
        candidates = [(self.refitter.error(each), each) for each in (network, renewed, centred)]
        error, best = min(candidates, key=lambda each: each[0])
        state = {name: tensor.detach().cpu() for name, tensor in best.state_dict().items()}
        point = replace(point, vectors=_flat(state, elastic.vectors), errors={**point.errors, "elastic": error})
        points = list(elastic.points)
        points[index] = point
        return replace(elastic, points=tuple(points))

    def _with_half(self, elastic: Elastic, step: int) -> Elastic:
        """Return an elastic network with a point before the last rung, where only vectors are stored."""
        *former, last = elastic.points
        network = elastic.sized(self.model, step)[0]
        state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        half = Point(step, 0, {"elastic": 0.0}, None, None, _flat(state, elastic.vectors))
        return self._settled(replace(elastic, points=(*former, half, last)), -2)

    def _halves(self) -> dict[int, int]:
        """Return rung → the step halfway between it and the next larger rung, by parameters, where there is one."""
        params, halves = self.path.params, {}
        for above, below in zip([0, *self.steps], self.steps, strict=False):
            between = [n for n in self.path.sizes if above < n < below]
            middle = (params[above] + params[below]) / 2
            if between:
                halves[below] = min(between, key=lambda n: abs(params[n] - middle))
        return halves

    def _differing(self, networks: dict[int, nn.Module]) -> list[str]:
        """Return the names of the tensors that differ from those of the dense network in some refitted one."""
        differing = []
        for name, dense in self.dense.items():
            for step, network in networks.items():
                value = network.state_dict().get(name)  # a layer has other tensors when it is in factors
                kept = self.path.kept(step).get(name, {})
                if (
                    value is not None
                    and dense.is_floating_point()
                    and not torch.equal(value.detach().cpu(), picked(dense, kept))
                ):
                    differing.append(name)
                    break
        return differing

    def _bits(self, elastic: Elastic) -> list[int]:
        """Return how many bits a weight takes at each rung: fewer at the larger ones, until all fits the growth."""
        counts = []
        fixed = len(json.dumps(elastic.to_dict(), separators=(",", ":"))) + _POINT * (
            len(self.steps) + len(self.halves)
        )
        fixed += sum(tensor.nbytes for tensor in elastic.tensors().values())
        for step in (*self.steps, *self.halves.values()):
            kept = self.path.kept(step)
            shapes = {name: picked(self.dense[name], kept.get(name, {})).shape for name in self.dense}
            fixed += 4 * sum(shapes[name].numel() for name in elastic.vectors)
            if step in self.steps:
                fixed += 2 * sum(shapes[name][0] for name in elastic.weights)
                counts.append(sum(shapes[name].numel() for name in elastic.weights))
        left = math.floor(GROWTH * measuring.file_bytes(self.model)) - fixed
        bits = [BITS[0]] * len(counts)
        for fewer in ((i, b) for i in range(len(bits)) for b in BITS[1:]):
            if sum(map(packed_bytes, counts, bits)) <= left:
                break
            bits[fewer[0]] = fewer[1]
        return bits


def _flat(state: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return those tensors that a state has in a row, float32."""
    return torch.cat([torch.zeros(0), *(state[name].float().flatten() for name in names if name in state)])
