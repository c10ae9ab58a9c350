"""One network in every size: the dense weights, and what small corrections make of them at a few sizes.

The sizes follow each other on a :class:`~pliant.compression.path.Path` for channels and heads, or on a
:class:`~pliant.compression.rank_path.RankPath` for directions. At some of them, the *rungs*, the network was
refitted on data when it was made elastic (``ladder``), and the difference to the next larger rung is stored in a few
bits per weight. Vectors, which are biases and the statistics of BatchNorm, are stored as they are, at the rungs and
halfway between. Between two rungs weights and vectors are interpolated, by the number of parameters for channels and by
the energy that layers have lost for directions; channels or directions that the smaller one has lost are those of the
larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.calling import Example, as_inputs
from pliant.compression.budgets import Budget
from pliant.compression.corrections import BITS, packed_bytes, picked, placed, restored, unpack
from pliant.compression.fields import Fields, fields_of
from pliant.compression.path import Path
from pliant.compression.plan import Plan, RefitRecord
from pliant.compression.rank_path import RankPath
from pliant.errors import BadInput, DamagedFile, Refused, shown

FORMAT, VERSION = "pliant.elastic", 1
_MOST = 2**28  # entries of an input
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.int64)}
_DTYPES |= {"bool": torch.bool, "int32": torch.int32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Point:
    """A size at which something is stored.

    Args:
        step: its number of steps on the path.
        bits: bits per corrected weight of a rung; 0 between rungs, where only vectors are stored.
        errors: errors of the network's outputs on held-out data, relative to the energy of the dense ones: "elastic" is
            that of the network that is stored; for rungs "refitted" and "cut" are those of a network that was refitted
            at this size alone, and of the one that was not.
        codes: for rungs, the codes of all corrections, uint8.
        steps: for rungs, the steps of all filters, float16.
        vectors: all vectors in a row, float32.
    """

    step: int
    bits: int
    errors: Mapping[str, float]
    codes: Tensor | None
    steps: Tensor | None
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class Elastic:
    """A network that can be made in every size, without its dense weights.

    Args:
        path: its sizes.
        weights: names of the tensors that are corrected.
        vectors: names of the tensors that are stored.
        points: what is stored, from the largest size to the smallest; the last one is a rung.
        samples: number of calibration samples.
        macs, batch: multiply-accumulates of the dense network for a sample of the example, and how many samples it has.
        example: name, shape and type of each input of the example; None if the example holds other things.
    """

    path: Path | RankPath
    weights: tuple[str, ...]
    vectors: tuple[str, ...]
    points: tuple[Point, ...]
    samples: int
    macs: int
    batch: int
    example: tuple[tuple[str, tuple[int, ...], str], ...] | None
    _plans: dict[int, Plan] = field(default_factory=dict, init=False, repr=False)

    def plan(self, step: int) -> Plan:
        """Return the plan of a size, without the record of a refit."""
        if step not in self._plans:
            self._plans[step] = self.path.plan(step)
        return self._plans[step]

    def network(self, model: nn.Module, budget: Budget | None) -> tuple[nn.Module, Plan]:
        """Return the largest network that meets a budget, and its plan; the dense network without a budget.

        The plan's ``refit`` has the result "elastic", with the error of the network's outputs, which is interpolated
        where none was measured.

        Args:
            model: the dense network with its weights; not changed.
            budget: the limit, of any kind but that of accuracy.

        Raises:
            Refused: the budget is out of reach.
            BadInput: it cannot be counted or measured on this network.
        """
        return self.sized(model, 0 if budget is None else self.step(budget))

    def sized(self, model: nn.Module, step: int) -> tuple[nn.Module, Plan]:
        """Return the network of a size, and its plan."""
        plan = self.plan(step)
        if not step:
            return self.path.cut(model, 0, {}), plan
        dense = self.path.base(model)
        small = self.path.cut(model, step, dense)
        rungs = [point for point in self.points if point.bits]
        values = self._between(step, rungs, {name: _wide(dense[name]) for name in self.weights}, self._corrected)
        values |= self._between(step, self.points, {name: _wide(dense[name]) for name in self.vectors}, self._replaced)
        kept = self.path.kept(step)
        small.load_state_dict({name: picked(value, kept.get(name, {})) for name, value in values.items()}, strict=False)
        record = RefitRecord("elastic", {"elastic": self._error(step)}, self.samples)
        return small, Plan(**{**vars(plan), "refit": record})

    def step(self, budget: Budget) -> int:
        """Return the step of the largest size that meets a budget.

        Raises:
            Refused, BadInput: as for :meth:`network`.
        """
        cost = self._meter(budget)
        sizes = [step for step in self.path.sizes if step <= self.points[-1].step]
        low, high = -1, len(sizes) - 1  # the costs of sizes up to low are too large
        least = cost(sizes[high])
        if least > budget.limit:
            text = f"{least:.0f}" if budget.kind == "max_bytes" else f"{least:.4g}"
            raise Refused(f"{budget} is out of reach: the smallest size in the file has {budget.kind}={text}")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cost(sizes[middle]) <= budget.limit else (middle, high)
        return sizes[high]

    def _meter(self, budget: Budget) -> Callable[[int], float]:
        """Return a function from a step to the cost of its network, in the unit of the budget."""
        params, model = self.path.params, self.path.model
        if budget.kind == "keep_params":
            return lambda step: params[step] / params[0]

        def skeleton(step: int) -> nn.Module:
            return self.path.compressor.skeleton(model, self.plan(step))

        if budget.kind == "max_bytes":
            return lambda step: measuring.file_bytes(skeleton(step))
        if budget.kind == "max_drop":
            raise BadInput("max_drop needs data: give keep_params, keep_macs, max_bytes or max_latency_ms")
        if budget.kind == "keep_macs" and self.path.counts_macs:
            return lambda step: 1 - self.path.macs_removed(step) // self.batch / self.macs
        example = self._inputs(budget)
        if budget.kind == "max_latency_ms":
            return lambda step: 1e3 * measuring.latencies([skeleton(step)], example)[0]
        return lambda step: measuring.macs(skeleton(step), example) / self.macs

    def _inputs(self, budget: Budget) -> Example:
        """Return an example like that which the network was made elastic with."""
        if self.example is None:
            raise BadInput(
                f"{budget} needs an example of tensors, and the file has none: give keep_params or max_bytes"
            )
        values = [torch.zeros(shape, dtype=_DTYPES[dtype]) for _, shape, dtype in self.example]
        named = {name: value for (name, _, _), value in zip(self.example, values, strict=True)}
        return named if all(named) else tuple(values)

    def _between(
        self,
        step: int,
        points: Sequence[Point],
        values: dict[str, Tensor],
        change: Callable[[dict[str, Tensor], Point], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return tensors of dense shapes at a size, given those of the dense network and how they change at a point."""
        last = 0
        for point in points:
            smaller = change(values, point)
            if point.step >= step:
                if point.step == step:
                    return smaller
                share = self._share(last, step, point.step)
                return {name: torch.lerp(value, smaller[name], share) for name, value in values.items()}
            values, last = smaller, point.step
        return values

    def _share(self, above: int, step: int, below: int) -> float:
        """Return how far a size lies on the way from one to another."""
        places = self.path.places
        whole = places[below] - places[above]
        return (places[step] - places[above]) / whole if whole else float(step == below)

    def _corrected(self, values: dict[str, Tensor], point: Point) -> dict[str, Tensor]:
        """Return the weights of a rung, given those of the next larger one."""
        assert point.codes is not None
        assert point.steps is not None
        kept, balance = self.path.kept(point.step), self.path.balance(point.step)
        shapes = {name: picked(value, kept.get(name, {})).shape for name, value in values.items()}
        codes = unpack(point.codes, sum(shape.numel() for shape in shapes.values()), point.bits)
        parts = codes.split([shape.numel() for shape in shapes.values()])
        steps = point.steps.split([shape[0] for shape in shapes.values()])
        result = {}
        for (name, shape), part, scale in zip(shapes.items(), parts, steps, strict=True):
            base = picked(values[name], kept.get(name, {}))
            fixed = corrected(base, part.view(shape), scale, point.bits, balance.get(name))
            result[name] = placed(values[name], kept.get(name, {}), fixed)
        return result

    def _replaced(self, values: dict[str, Tensor], point: Point) -> dict[str, Tensor]:
        """Return the vectors of a point, given those of the next larger one."""
        kept = self.path.kept(point.step)
        shapes = {name: picked(value, kept.get(name, {})).shape for name, value in values.items()}
        parts = point.vectors.split([shape.numel() for shape in shapes.values()])
        return {
            name: placed(values[name], kept.get(name, {}), part.view(shape).to(values[name].dtype))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _error(self, step: int) -> float:
        """Return the error of the outputs at a size, interpolated."""
        last, error = 0, 0.0
        for point in self.points:
            if point.step >= step:
                share = self._share(last, step, point.step)
                return error + share * (point.errors["elastic"] - error)
            last, error = point.step, point.errors["elastic"]
        return error

    def __str__(self) -> str:
        params = self.path.params
        lines = [
            f"elastic on {self.samples:,} samples: {len(self.path.sizes):,} sizes; error of the outputs, held out:"
        ]
        lines.append("  keep_params  bits  refitted at this size  elastic")
        for point in self.points:
            own = f"{point.errors['refitted']:.2%}" if point.bits else "-"
            lines.append(
                f"  {params[point.step] / params[0]:>11.4f}  {point.bits or '-':>4}  {own:>21}  "
                f"{point.errors['elastic']:>7.2%}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain data for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **self.path.to_dict(),
            "weights": list(self.weights),
            "vectors": list(self.vectors),
            "points": [{"step": point.step, "bits": point.bits, "errors": dict(point.errors)} for point in self.points],
            "samples": self.samples,
            "macs": self.macs,
            "batch": self.batch,
            "example": None
            if self.example is None
            else [[name, list(shape), kind] for name, shape, kind in self.example],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the path and of all points, by names for safetensors."""
        result = self.path.tensors()
        for i, point in enumerate(self.points):
            result[f"{i}.vectors"] = point.vectors
            if point.codes is not None and point.steps is not None:
                result |= {f"{i}.codes": point.codes, f"{i}.steps": point.steps}
        return result

    @classmethod
    def from_dict(cls, data: object, tensors: Mapping[str, Tensor], model: nn.Module) -> Elastic:
        """Return what :meth:`to_dict` and :meth:`tensors` described.

        Args:
            data: plain data from JSON.
            tensors: the tensors.
            model: a network of the dense architecture, with any weights.

        Raises:
            DamagedFile: a field or tensor is not what it should be.
            BadInput: the data is for another model.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise DamagedFile(f"not an elastic network: expected a mapping with 'format': {FORMAT!r}")
        if data.get("version") != VERSION:
            raise DamagedFile(f"it has version {shown(data.get('version'))}, this program reads {VERSION}")
        fields = Fields(data, "elastic")
        ranks = fields.data.get("compressor") == "LowRank"
        path = RankPath.from_fields(fields, tensors, model) if ranks else Path.from_fields(fields, model)
        state = path.template()
        names = {kind: tuple(fields.texts(kind)) for kind in ("weights", "vectors")}
        for kind, listed in names.items():
            for name in listed:
                if (
                    name not in state
                    or not state[name].is_floating_point()
                    or (kind == "weights") != (state[name].dim() > 1)
                ):
                    raise BadInput(f"the file is for another model: it has no {kind[:-1]} {shown(name)}")
        points = tuple(_point(x, f"elastic.points[{i}]", tensors, i) for i, x in enumerate(fields.items("points")))
        samples, macs, batch = fields.count("samples"), fields.count("macs"), fields.count("batch")
        example = _example(fields.take("example"))
        fields.end()
        if not macs or not batch:
            raise DamagedFile(f"elastic.{'batch' if macs else 'macs'} should be at least 1")
        steps = [point.step for point in points]
        if not points or not points[-1].bits or any(a >= b for a, b in zip([0, *steps], steps, strict=False)):
            raise DamagedFile("elastic.points should hold steps in ascending order, and end with a rung")
        if steps[-1] > len(path.steps):
            raise DamagedFile(f"elastic.points has a step {steps[-1]}, and there are {len(path.steps)}")
        elastic = cls(path, names["weights"], names["vectors"], points, samples, macs, batch, example)
        elastic.check(state)
        return elastic

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise DamagedFile unless the tensors of all points have the right sizes and hold numbers."""
        for i, point in enumerate(self.points):
            kept = self.path.kept(point.step)
            shapes = {name: _shape(state[name], kept.get(name, {})) for name in (*self.weights, *self.vectors)}
            entries = sum(shapes[name].numel() for name in self.weights)
            expected = {"vectors": sum(shapes[name].numel() for name in self.vectors)}
            if point.bits:
                expected |= {
                    "codes": packed_bytes(entries, point.bits),
                    "steps": sum(shapes[name][0] for name in self.weights),
                }
            for kind, count in expected.items():
                values = getattr(point, kind)
                if values.shape != (count,):
                    raise DamagedFile(f"{i}.{kind} should have {count} entries, not {tuple(values.shape)}")
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    raise DamagedFile(f"{i}.{kind} holds NaN or infinity")


def corrected(base: Tensor, codes: Tensor, steps: Tensor, bits: int, balance: Tensor | None = None) -> Tensor:
    """Return weights with their correction; those that are zero stay zero, so masks survive.

    Args:
        base: the weights (filters, ...).
        codes, steps, bits: what ``quantise`` made of the correction, or of its product with ``balance``.
        balance: how much the entries of a filter count; None for all the same.
    """
    correction = restored(codes, steps, bits)
    return torch.where(base == 0, base, base + (correction if balance is None else correction / balance))


def example_of(example_inputs: Example) -> tuple[tuple[str, tuple[int, ...], str], ...] | None:
    """Return name ("" without one), shape and type of each input; None if an input is no tensor of a usual type."""
    inputs = as_inputs(example_inputs)
    pairs = list(inputs.items()) if isinstance(inputs, dict) else [("", x) for x in inputs]
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if not all(isinstance(x, Tensor) and x.dtype in names for _, x in pairs):
        return None
    return tuple((name, tuple(x.shape), names[x.dtype]) for name, x in pairs)


def _shape(tensor: Tensor, kept: Mapping[int, Tensor]) -> torch.Size:
    return torch.Size([len(kept[dim]) if dim in kept else size for dim, size in enumerate(tensor.shape)])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))


def _point(data: object, where: str, tensors: Mapping[str, Tensor], index: int) -> Point:
    fields = fields_of(data, where)
    step, bits, errors = fields.count("step"), fields.count("bits"), fields_of(fields.take("errors"), f"{where}.errors")
    fields.end()
    if bits and bits not in BITS:
        raise DamagedFile(f"{where}.bits should be 0 or one of {', '.join(map(str, BITS))}, not {bits}")
    numbers = {name: errors.number(name) for name in (("cut", "refitted", "elastic") if bits else ("elastic",))}
    errors.end()
    found = {}
    for kind, dtype in {"vectors": torch.float32, "codes": torch.uint8, "steps": torch.float16}.items():
        value = tensors.get(f"{index}.{kind}")
        if bits or kind == "vectors":
            if value is None or value.dtype != dtype:
                raise DamagedFile(f"it has no {index}.{kind} of type {str(dtype).removeprefix('torch.')}")
            found[kind] = value
    return Point(step, bits, numbers, found.get("codes"), found.get("steps"), found["vectors"])


def _example(data: object) -> tuple[tuple[str, tuple[int, ...], str], ...] | None:
    if data is None:
        return None
    try:
        entries = tuple((name, tuple(shape), kind) for name, shape, kind in data)  # type: ignore[attr-defined]
        good = all(
            isinstance(name, str)
            and kind in _DTYPES
            and all(type(n) is int and 0 <= n < _MOST for n in shape)
            and math.prod(shape) < _MOST
            for name, shape, kind in entries
        )
    except (TypeError, ValueError):
        good = False
    if not good:
        raise DamagedFile(f"elastic.example should hold (name, shape, type) of each input, not {shown(data)}")
    return entries
