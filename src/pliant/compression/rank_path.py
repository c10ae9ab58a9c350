"""All ranks of one network as plain data: in which order directions leave, and a basis of them in few bits.

For rank r the factors of a weight W (m × n, one matrix per convolution group) are Q_r and Q_rᵀ W, where Q_r are the
first r columns of an orthonormal basis, leading first, as :class:`~pliant.compression.LowRank` finds it. W is in the
file of the dense network, so only the spans of the first r columns have to be stored, for r up to the largest rank on
the path. They are stored as V, where Q is made orthonormal from F V, column by column, and F depends on W alone. With
S = W Wᵀ or Wᵀ W, whichever is smaller, δ 1e-8 of its mean eigenvalue and S + δ I = L Lᵀ,

    m ≤ n:   F = S (S + δ I)⁻¹, nearly the identity on the columns of W;
    m > n:   F = W L⁻ᵀ, whose columns are nearly orthonormal.

So V has min(m, n) rows, and what is lost in its bits never leaves the columns of W: a weight of rank r is exact at rank
r. Projection onto any span is the best that can be done with it, for weights and for outputs, so the outputs miss a
second-order amount: with eight bits, less than one part in ten thousand of their energy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pliant import measuring
from pliant.compression.base import Analysis, parameter_shapes, with_options
from pliant.compression.corrections import pack, packed_bytes, picked, quantise, restored, unpack
from pliant.compression.costs import Applied
from pliant.compression.factored import Factorable, factored, matrices
from pliant.compression.fields import Fields, fields_of, pair_of
from pliant.compression.path import MOST, compressor_from, ends, latest, steps_from
from pliant.compression.plan import Plan
from pliant.compression.rank import LowRank, Spectra
from pliant.compression.removals import Step
from pliant.compression.spectrum import Outline
from pliant.compressor_names import SCHEMES
from pliant.errors import BadInput, DamagedFile, shown
from pliant.structure import untransposed

BASIS_BITS = (8, 6, 4)
"""Bits per entry of a basis."""
_RIDGE = 1e-8  # δ, as a share of the mean eigenvalue
_WEAKEST = 1e-3  # strength of a direction
_NULL = 1e-6  # singular values of F below which the columns of W span nothing


@dataclass(frozen=True, eq=False)
class RankPath:
    """The ranks of one network, numbered by steps: 0 is dense, and with every further step one layer loses directions.

    Args:
        model: a network of the dense architecture, with any weights; not changed.
        compressor: how directions leave.
        refused: (layer, reason) for each layer that is left alone.
        layers: the layers that may be cut.
        starts: how many of the steps are cuts that the controls ask for in any case: no size ends among them.
        steps: the cuts in order: index of the layer, and its rank afterwards.
        losses: after each step, the sum of the shares of energy that the layers have lost, float32 (steps,).
        bits: bits per entry of the bases.
        codes: the entries of all V as codes, direction by direction, uint8.
        scales: the step of the codes of each direction, float16.
        strengths: for each layer, the roots of the energies of its directions, relative to the largest one, float16.
    """

    model: nn.Module
    compressor: LowRank
    refused: tuple[tuple[str, str], ...]
    layers: Mapping[str, Outline]
    starts: int
    steps: tuple[Step, ...]
    losses: Tensor
    bits: int
    codes: Tensor
    scales: Tensor
    strengths: Tensor

    @classmethod
    def of(cls, model: nn.Module, compressor: LowRank, analysis: Spectra, bits: int = BASIS_BITS[0]) -> RankPath:
        """Return the sizes that a compressor can give a network, with bases in so many bits."""
        ranks = compressor.path(model, analysis)
        kind = with_options(LowRank, {**compressor.plan_options(), "ratio": 0.0, "whiten": analysis.whitened})
        codes, scales = [torch.zeros(0, dtype=torch.uint8)], [torch.zeros(0, dtype=torch.float16)]
        strengths = [torch.zeros(0)]
        for (name, spectrum), most in zip(ranks.layers.items(), _tops(len(ranks.layers), ranks.steps), strict=True):
            basis = spectrum.basis[..., :most].double().cpu()
            weight = matrices(_factorable(model, name), spectrum.scheme).double().cpu()
            code, scale = quantise(_stored(weight, basis).mT.flatten(0, 1), bits)
            codes.append(code.flatten())
            scales.append(scale)
            roots = spectrum.energies[:most].cpu().sqrt()
            strengths.append((roots / roots.amax() if roots.any() else torch.ones_like(roots)).clamp(min=_WEAKEST))
        packed, scale = pack(torch.cat(codes), bits), torch.cat(scales)
        losses = torch.tensor(ranks.losses, dtype=torch.float32).cummax(0).values  # rounding must not turn them around
        layers = {
            name: Outline(x.scheme, x.groups, x.rows, x.columns, x.applied)  # a spectrum holds large tensors
            for name, x in ranks.layers.items()
        }
        strong = torch.cat(strengths).half()
        return cls(model, kind, ranks.refused, layers, ranks.starts, ranks.steps, losses, bits, packed, scale, strong)

    @property
    def counts_macs(self) -> bool:
        """Whether :meth:`macs_removed` counts all that goes."""
        return True

    @cached_property
    def sizes(self) -> list[int]:
        """The numbers of steps at which a size ends, ascending."""
        return ends(self.starts, self.steps)

    @cached_property
    def params(self) -> list[int]:
        """The number of parameters after 0, 1, ... steps."""
        dense = measuring.parameters(self.model)
        return [dense - gone for gone in self._gone("params")]

    @cached_property
    def places(self) -> list[float]:
        """Where the network after 0, 1, ... steps lies between others: how much energy its layers have lost.

        What a refit makes up for grows with that, and not with the parameters: the first directions that go had hardly
        any energy.
        """
        return [0.0, *self.losses.tolist()]

    def macs_removed(self, step: int) -> int:
        """Return how many multiply-accumulates have gone after so many steps, over the whole example."""
        return self._macs[step]

    @cached_property
    def _macs(self) -> list[int]:
        return self._gone("macs")

    def _gone(self, cost: str) -> list[int]:
        """Return how much of a cost has gone after 0, 1, ... steps."""
        layers = list(self.layers.values())
        now = [layer.dense(cost) for layer in layers]
        gone = [0]
        for layer, rank in self.steps:
            after = layers[layer].cost(rank, cost)
            gone.append(gone[-1] + now[layer] - after)
            now[layer] = after
        return gone

    def ranks(self, step: int) -> list[int]:
        """Return the rank of each layer after so many steps, 0 for those that are dense."""
        return latest(self.steps[:step], len(self.layers))

    def plan(self, step: int) -> Plan:
        """Return the plan of the size after so many steps."""
        cost = self.compressor.cost
        total = sum(layer.dense(cost) for layer in self.layers.values())
        gone = self.macs_removed(step) if cost == "macs" else self.params[0] - self.params[step]
        known = Analysis(parameter_shapes(self.model), self.refused)
        ranks = dict(zip(self.layers, zip(self.layers.values(), self.ranks(step), strict=True), strict=True))
        return self.compressor.at(min(gone / max(1, total), MOST)).plan_ranks(self.model, known, ranks)

    def kept(self, step: int) -> dict[str, dict[int, Tensor]]:
        """Return tensor name → dim → the positions of it that are there after so many steps, int64, ascending.

        A layer is either dense or in factors: of its other tensors, no position of dim 0 is there.
        """
        if step not in self._kept:
            nothing = {0: torch.zeros(0, dtype=torch.int64)}
            kept: dict[str, dict[int, Tensor]] = {}
            for (name, layer), rank, most in zip(self.layers.items(), self.ranks(step), self._tops, strict=True):
                dense, thin = _tensors(self.model, name)
                if rank:
                    rows = torch.arange(layer.groups)[:, None] * most + torch.arange(rank)
                    kept |= dict.fromkeys(dense, nothing)
                    kept[_in(name, "reduce.weight")] = {0: rows.flatten()}
                    kept[_in(name, "expand.weight")] = {1: torch.arange(rank)}
                elif most:
                    kept |= dict.fromkeys(thin, nothing)
            self._kept[step] = kept
        return self._kept[step]

    def balance(self, step: int) -> dict[str, Tensor]:
        """Return tensor name → by how much entries count more than others in a correction, float32.

        An error in a column of a second factor counts as much as its direction is strong.
        """
        balance = {}
        parts = zip(self.layers, self.ranks(step), self.strengths.float().split(self._tops), strict=True)
        for name, rank, strengths in parts:
            if rank:
                dims = _factorable(self.model, name).weight.dim()
                balance[_in(name, "expand.weight")] = strengths[:rank].view(-1, *[1] * (dims - 2))
        return balance

    @cached_property
    def _kept(self) -> dict[int, dict[str, dict[int, Tensor]]]:
        return {}

    @cached_property
    def _tops(self) -> list[int]:
        return _tops(len(self.layers), self.steps)

    def template(self) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and types of :meth:`base`."""
        state: dict[str, Tensor] = dict(self.model.state_dict())
        for (name, layer), most in zip(self.layers.items(), self._tops, strict=True):
            zeros = (torch.zeros(layer.groups, layer.rows, most), torch.zeros(layer.groups, most, layer.columns))
            state |= _named(name, self._pair(self.model, name, *zeros)) if most else {}
        return state

    def base(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that all sizes begin with: the dense ones, and the factors of the largest rank.

        Args:
            model: the dense network with its weights.
        """
        state: dict[str, Tensor] = dict(model.state_dict())
        shapes = [
            (layer.groups * most, layer.full) for layer, most in zip(self.layers.values(), self._tops, strict=True)
        ]
        counts = [rows * side for rows, side in shapes]
        codes = unpack(self.codes, sum(counts), self.bits).split(counts)
        scales = self.scales.split([rows for rows, _ in shapes])
        for (name, layer), shape, code, scale in zip(self.layers.items(), shapes, codes, scales, strict=True):
            if shape[0]:
                stored = restored(code.view(shape), scale, self.bits).double().unflatten(0, (layer.groups, -1)).mT
                weight = matrices(_factorable(model, name), layer.scheme).double().cpu()
                basis = _orthonormal(weight, stored)
                state |= _named(name, self._pair(model, name, basis, basis.mT @ weight))
        return state

    def cut(self, model: nn.Module, step: int, base: Mapping[str, Tensor]) -> nn.Module:
        """Return the network of a size without any corrections.

        Args:
            model: the dense network with its weights; not changed.
            step: its number of steps.
            base: the tensors that :meth:`base` returns for it; not needed for the dense network.
        """
        small, kept = self.compressor.skeleton(model, self.plan(step)), self.kept(step)
        if step:
            state = {name: picked(tensor.cpu(), kept.get(name, {})) for name, tensor in base.items()}
            small.load_state_dict(state, strict=False)
        return small

    def _pair(self, model: nn.Module, name: str, expand: Tensor, reduce: Tensor) -> nn.Module:
        return factored(_factorable(model, name), expand, reduce, self.layers[name].scheme)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the path, by names for safetensors."""
        return {
            "basis.codes": self.codes,
            "basis.steps": self.scales,
            "losses": self.losses,
            "strengths": self.strengths,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the path as plain data for JSON, without the model and the tensors."""
        return {
            "compressor": "LowRank",
            "options": self.compressor.plan_options(),
            "parameters": measuring.parameters(self.model),
            "refused": [list(pair) for pair in self.refused],
            "bits": self.bits,
            "layers": [
                {"name": name, "scheme": layer.scheme, "whole": layer.applied.whole, "tall": layer.applied.tall}
                for name, layer in self.layers.items()
            ],
            "starts": self.starts,
            "steps": [list(step) for step in self.steps],
        }

    @classmethod
    def from_fields(cls, fields: Fields, tensors: Mapping[str, Tensor], model: nn.Module) -> RankPath:
        """Return the path that :meth:`to_dict` and :meth:`tensors` described.

        Args:
            fields: the fields, of which those of the path are taken.
            tensors: the tensors, of which those of the path are read.
            model: a network of the dense architecture.

        Raises:
            DamagedFile: a field or tensor is not what it should be.
            BadInput: the path is for another model.
        """
        compressor = compressor_from(fields, {"LowRank": LowRank}, model)
        if compressor.whiten == "auto":
            raise DamagedFile(f"{fields.where}.options.whiten should be true or false, not 'auto'")
        refused = tuple(pair_of(x, f"{fields.where}.refused") for x in fields.items("refused"))
        bits = fields.count("bits")
        if bits not in BASIS_BITS:
            raise DamagedFile(f"{fields.where}.bits should be one of {', '.join(map(str, BASIS_BITS))}, not {bits}")
        layers: dict[str, Outline] = {}
        for i, entry in enumerate(fields.items("layers")):
            name, outline = _layer(fields_of(entry, f"{fields.where}.layers[{i}]"), model)
            if name in layers:
                raise DamagedFile(f"{fields.where}.layers[{i}] names {shown(name)} a second time")
            layers[name] = outline
        starts, steps = _steps(fields, [layer.max_rank for layer in layers.values()])
        tops = _tops(len(layers), steps)
        rows = [layer.groups * most for layer, most in zip(layers.values(), tops, strict=True)]
        entries = sum(count * layer.full for count, layer in zip(rows, layers.values(), strict=True))
        codes = _tensor(tensors, "basis.codes", torch.uint8, packed_bytes(entries, bits))
        scales = _tensor(tensors, "basis.steps", torch.float16, sum(rows))
        losses = _tensor(tensors, "losses", torch.float32, len(steps))
        if bool((losses.diff(prepend=torch.zeros(1)) < 0).any()):
            raise DamagedFile("losses should hold numbers of at least 0 that never fall")
        strengths = _tensor(tensors, "strengths", torch.float16, sum(tops))
        if not bool((strengths > 0).all()):
            raise DamagedFile("strengths should hold positive numbers")
        return cls(model, compressor, refused, layers, starts, steps, losses, bits, codes, scales, strengths)


def _stored(weight: Tensor, basis: Tensor) -> Tensor:
    """Return V, float64 (groups, s, r) with orthonormal columns, for bases (groups, m, r) of weights (groups, m, n)."""
    if weight.shape[1] <= weight.shape[2]:
        return basis
    lower, _ = _lower(weight)
    frame = torch.linalg.solve_triangular(lower.mT, weight, upper=True, left=False)  # W L⁻ᵀ
    stored: Tensor = torch.linalg.qr(torch.linalg.pinv(frame, rtol=_NULL) @ basis).Q
    return stored


def _orthonormal(weight: Tensor, stored: Tensor) -> Tensor:
    """Return Q, float64 (groups, m, r) with orthonormal columns, for V (groups, s, r) and weights (groups, m, n)."""
    lower, ridge = _lower(weight)
    if weight.shape[1] <= weight.shape[2]:
        spanned = stored - ridge * torch.cholesky_solve(stored, lower)
    else:
        spanned = weight @ torch.linalg.solve_triangular(lower.mT, stored, upper=True)
    basis, mixing = torch.linalg.qr(spanned)
    # The signs of a decomposition are up to the library, and corrections are of these columns.
    signs = mixing.diagonal(dim1=1, dim2=2).sign()
    signed: Tensor = basis * torch.where(signs == 0, 1.0, signs).unsqueeze(1)
    return signed


def _lower(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return L, float64 (groups, s, s), and δ, (groups, 1, 1), of weights (groups, m, n)."""
    gram = weight @ weight.mT if weight.shape[1] <= weight.shape[2] else weight.mT @ weight
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    ridge = torch.where(ridge > 0, ridge, 1.0)
    return torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[1], dtype=gram.dtype)), ridge


def _tops(count: int, steps: tuple[Step, ...]) -> list[int]:
    """Return the largest rank of each layer on a path, 0 for layers that stay dense."""
    first: dict[int, int] = {}
    for layer, rank in steps:
        first.setdefault(layer, rank)
    return [first.get(layer, 0) for layer in range(count)]


def _factorable(model: nn.Module, name: str) -> Factorable:
    layer = untransposed(model.get_submodule(name))
    assert isinstance(layer, Factorable)  # LowRank takes no others, and neither does from_fields
    return layer


def _in(name: str, tensor: str) -> str:
    return f"{name}.{tensor}".lstrip(".")


def _named(name: str, pair: nn.Module) -> dict[str, Tensor]:
    return {_in(name, key): tensor for key, tensor in pair.state_dict().items()}


def _tensors(model: nn.Module, name: str) -> tuple[list[str], list[str]]:
    """Return the names of the tensors that a layer has when it is dense, and when it is in factors."""
    bias = model.get_submodule(name).bias is not None
    dense = ["weight", *(["bias"] if bias else [])]
    thin = ["reduce.weight", "expand.weight", *(["expand.bias"] if bias else [])]
    return [_in(name, key) for key in dense], [_in(name, key) for key in thin]


def _layer(fields: Fields, model: nn.Module) -> tuple[str, Outline]:
    """Return the name of a layer and what it costs."""
    name, scheme, whole, tall = fields.text("name"), fields.text("scheme"), fields.count("whole"), fields.count("tall")
    fields.end()
    module = untransposed(found) if (found := dict(model.named_modules()).get(name)) is not None else None
    if not isinstance(module, Factorable):
        raise BadInput(f"the file is for another model: it has no layer {shown(name)} that can be factorised")
    if scheme not in SCHEMES or (scheme == "spatial" and not isinstance(module, nn.Conv2d)):
        raise DamagedFile(f"{fields.where}.scheme should be one of {', '.join(SCHEMES)} that suits the layer")
    if not whole or not tall:
        raise DamagedFile(f"{fields.where}.{'tall' if whole else 'whole'} should be at least 1")
    groups, rows, columns = matrices(module, scheme).shape
    return name, Outline(scheme, groups, rows, columns, Applied(whole, tall))


def _steps(fields: Fields, most: list[int]) -> tuple[int, tuple[Step, ...]]:
    starts, steps = steps_from(fields, "a layer and a rank")
    least = [rank + 1 for rank in most]
    for i, (layer, rank) in enumerate(steps):
        if not 0 <= layer < len(most) or not 0 < rank < least[layer]:
            raise DamagedFile(f"{fields.where}.steps[{i}] should lower the rank of a layer, not {shown([layer, rank])}")
        least[layer] = rank
    return starts, tuple(steps)


def _tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, count: int) -> Tensor:
    value = tensors.get(name)
    if value is None or value.dtype != dtype:
        raise DamagedFile(f"it has no {name} of type {str(dtype).removeprefix('torch.')}")
    if value.shape != (count,):
        raise DamagedFile(f"{name} should have {count} entries, not {tuple(value.shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise DamagedFile(f"{name} holds NaN or infinity")
    return value
