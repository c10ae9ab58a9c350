"""The plan: what a compressor will do to a model, as plain data that can be printed, stored and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from pliant import measuring
from pliant.compression.fields import Fields, count_of, fields_of, number_of, pair_of, text_of
from pliant.errors import BadInput, DamagedFile, shown

FORMAT = "pliant.plan"
VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer.

    Args:
        name: name of the layer in the model.
        kind: name of its class.
        kept: how many filters or channels (FilterPruning), directions (LowRank) or non-zero weights (Magnitude,
            SemiStructured) are kept.
        total: how many the dense layer has; equal to ``kept`` if the layer does not change.
        params: number of its parameters afterwards.
        params_dense: number of its parameters before.
        shape: shape of the dense weight; () without one.
        outputs, inputs: the positions that are kept on the two axes of the layer, ascending; None for all.
        scheme: how the layer is factorised; None if it is not.
        others: (axis, positions that are kept) for its tensors that lie on neither axis; ``"gamma.1"`` is dimension 1
            of the tensor ``gamma``.
    """

    name: str
    kind: str
    kept: int
    total: int
    params: int
    params_dense: int
    shape: tuple[int, ...]
    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None
    scheme: str | None = None
    others: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class LayerFit:
    """How one layer was refitted.

    Args:
        name: name of the layer in the small network.
        damping: the damping that its least squares chose; None if its weights did not change in the last sweep.
        error, error_before: share of the energy of its outputs that it missed on held-out data after the last sweep
            and before it.
    """

    name: str
    damping: float | None
    error: float
    error_before: float


@dataclass(frozen=True)
class RefitRecord:
    """How a network was refitted, and what was decided on held-out data.

    Args:
        result: "cut", "reestimated" (new BatchNorm statistics only) or "refitted".
        errors: for each of these, the error of the network's outputs, relative to the energy of the dense ones; and for
            "rounded", the result in eight bits, if the plan ends with them.
        samples: number of calibration samples.
        layers: the fits of all layers.
        unfitted: (layer, reason) for every layer that stayed as cut.
    """

    result: str
    errors: Mapping[str, float]
    samples: int
    layers: tuple[LayerFit, ...] = ()
    unfitted: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.2%}" for name, error in self.errors.items())
        text = f"refit on {self.samples:,} samples: {self.result} (error of the outputs on held-out data: {errors})"
        if self.result == "refitted":
            changed = sum(layer.damping is not None for layer in self.layers)
            text += f"; {changed} of {len(self.layers)} layers changed in the last sweep"
        lines = [text]
        return "\n".join([*lines, *(f"not refitted: {name}: {reason}" for name, reason in self.unfitted)])


@dataclass(frozen=True)
class Plan:
    """What a compressor does to one architecture. ``str(plan)`` is a table.

    Args:
        compressor: name of the compressor: its class if it is one of this package; for others see
            ``pliant.compression.base.plan_names``.
        options: its options by name.
        ratio: the requested share of the compressible parameters. (With the option ``cost="macs"``, this and the next
            are shares of their multiply-accumulates.)
        ratio_removed: the nearest possible share: removed, or zeroed by compressors that keep the shapes.
        params_before, params_after: number of all parameters of the model.
        compressible: names of the compressible parameters.
        layers: the plan for each layer that the compressor acts on.
        refused: (layer, reason) for every layer that is left alone.
        links: the plans of a chain, in order; a chain has no layers of its own.
        refit: how the weights were refitted to calibration data; None if they were not.
        floored: names of the layers that keep as little as the compressor's options allow, such as ``at_least``.
        limited: (layer, reason) for every layer that the network does not let keep just any number of channels.
    """

    compressor: str
    options: Mapping[str, Any]
    ratio: float
    ratio_removed: float
    params_before: int
    params_after: int
    compressible: tuple[str, ...]
    layers: tuple[LayerPlan, ...]
    refused: tuple[tuple[str, str], ...] = ()
    links: tuple[Plan, ...] = ()
    refit: RefitRecord | None = None
    floored: tuple[str, ...] = ()
    limited: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        own = {"format": FORMAT, "version": VERSION, **asdict(self), "links": [link.to_dict() for link in self.links]}
        for name in ("refit", "floored", "limited"):
            if not own[name]:  # as in plans of earlier versions, which can read this one then
                del own[name]
        for layer in own["layers"]:
            if not layer["others"]:
                del layer["others"]
        return own

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Return the plan that :meth:`to_dict` described.

        Raises:
            DamagedFile: ``data`` is anything else.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise DamagedFile(f"not a compression plan: expected a mapping with 'format': {FORMAT!r}")
        if data.get("version") != VERSION:
            raise DamagedFile(f"the plan has version {shown(data.get('version'))}, this program reads {VERSION}")
        fields = Fields(data, "plan")
        plan = cls(
            compressor=fields.text("compressor"),
            options=dict(fields.mapping("options")),
            ratio=fields.share("ratio"),
            ratio_removed=fields.share("ratio_removed"),
            params_before=fields.count("params_before"),
            params_after=fields.count("params_after"),
            compressible=tuple(text_of(x, "plan.compressible") for x in fields.items("compressible")),
            layers=tuple(_layer(x, i) for i, x in enumerate(fields.items("layers"))),
            refused=tuple(pair_of(x, "plan.refused") for x in fields.items("refused")),
            links=tuple(cls.from_dict(x) for x in fields.items("links", default=())),
            refit=_refit(fields.data.pop("refit", None)),
            floored=tuple(text_of(x, "plan.floored") for x in fields.items("floored", default=())),
            limited=tuple(pair_of(x, "plan.limited") for x in fields.items("limited", default=())),
        )
        fields.end()
        return plan

    def check(self, model: nn.Module) -> None:
        """Raise BadInput unless every layer of the plan is in ``model`` with its shape."""
        modules = dict(model.named_modules())
        for layer in self.layers:
            module = modules.get(layer.name)
            if module is None:
                raise BadInput(f"the plan is for another model: it has no layer {shown(layer.name)}")
            if weight_shape(module) != layer.shape or type(module).__name__ != layer.kind:
                raise BadInput(
                    f"the plan is for another model: {layer.name!r} should be a {layer.kind} with weight"
                    f" {layer.shape}, not a {type(module).__name__} with {weight_shape(module)}"
                )
        count = measuring.parameters(model)
        if count != self.params_before:
            raise BadInput(
                f"the plan is for another model: it should have {self.params_before} parameters, not {count}"
            )

    def __str__(self) -> str:
        if self.refit is not None:
            return f"{replace(self, refit=None)}\n{self.refit}"
        if self.links:
            parts = [f"step {i} of {len(self.links)}: {link}" for i, link in enumerate(self.links, 1)]
            return "\n".join([f"{self.compressor}: {self.params_before:,} → {self.params_after:,} parameters", *parts])
        head = f"{self.compressor}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"
        rows = [("layer", "kind", "kept", "parameters")]
        rows += [
            (
                x.name,
                f"{x.kind}, spatial" if x.scheme == "spatial" else x.kind,
                f"{x.kept:,} / {x.total:,}",
                f"{x.params_dense:,} → {x.params:,}",
            )
            for x in self.layers
        ]
        rows.append(("model", "", "", f"{self.params_before:,} → {self.params_after:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
        verb = "removes" if self.params_after < self.params_before else "zeroes"
        what = "multiply-accumulates" if self.options.get("cost") == "macs" else "parameters"
        asked = f"{verb} {self.ratio_removed:.2%} of the compressible {what} ({self.ratio:.2%} asked)"
        left = [f"left alone: {name}: {reason}" for name, reason in self.refused]
        floors = [f"at the floor: {', '.join(self.floored)}"] if self.floored else []
        limits = [f"limited: {name}: {reason}" for name, reason in self.limited]
        return "\n".join([head, asked, *(x.rstrip() for x in lines), *floors, *limits, *left])


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the layer's weight, () if it has none."""
    weight = module._parameters.get("weight")
    return () if weight is None else tuple(weight.shape)


def _layer(data: object, i: int) -> LayerPlan:
    where = f"plan.layers[{i}]"
    fields = fields_of(data, where)
    layer = LayerPlan(
        name=fields.text("name"),
        kind=fields.text("kind"),
        kept=fields.count("kept"),
        total=fields.count("total"),
        params=fields.count("params"),
        params_dense=fields.count("params_dense"),
        shape=tuple(count_of(x, f"{where}.shape") for x in fields.items("shape")),
        outputs=fields.positions("outputs"),
        inputs=fields.positions("inputs"),
        scheme=fields.optional_text("scheme"),
        others=tuple(_other(x, f"{where}.others") for x in fields.items("others", default=())),
    )
    fields.end()
    if layer.kept > layer.total:
        raise DamagedFile(f"{where} keeps {layer.kept} of {layer.total}")
    return layer


def _other(data: object, where: str) -> tuple[str, tuple[int, ...]]:
    if not isinstance(data, (list, tuple)) or len(data) != 2:
        raise DamagedFile(f"{where} should hold (axis, positions) pairs, not {shown(data)}")
    kept = Fields({"positions": data[1]}, where).positions("positions")
    if kept is None:
        raise DamagedFile(f"{where} should hold positions")
    return text_of(data[0], where), kept


def _refit(data: object) -> RefitRecord | None:
    if data is None:
        return None
    fields = fields_of(data, "plan.refit")
    errors = fields.mapping("errors")
    record = RefitRecord(
        result=fields.text("result"),
        errors={name: number_of(value, "plan.refit.errors") for name, value in errors.items()},
        samples=fields.count("samples"),
        layers=tuple(_layer_fit(x, i) for i, x in enumerate(fields.items("layers"))),
        unfitted=tuple(pair_of(x, "plan.refit.unfitted") for x in fields.items("unfitted")),
    )
    fields.end()
    if record.result not in record.errors:
        raise DamagedFile(f"plan.refit.result should be one of {', '.join(record.errors)}, not {shown(record.result)}")
    return record


def _layer_fit(data: object, i: int) -> LayerFit:
    where = f"plan.refit.layers[{i}]"
    fields = fields_of(data, where)
    damping = fields.take("damping")
    fit = LayerFit(
        name=fields.text("name"),
        damping=None if damping is None else number_of(damping, f"{where}.damping"),
        error=number_of(fields.take("error"), f"{where}.error"),
        error_before=number_of(fields.take("error_before"), f"{where}.error_before"),
    )
    fields.end()
    return fit
