"""Which ball for which parameter: rules, presets, radii from the initialisation, schedules of k.

:func:`constrain` turns a model and a list of rules into the parameter groups of :class:`~pliant.SFW`:

    groups = pliant.constrain(model, [("*.weight", pliant.rank(k=0.1, radius=10))], default=None)
    opt = pliant.SFW(groups, lr=0.1)

A preset (:func:`filters`, :func:`rank`, :func:`weights`, :func:`semi_structured`, :func:`l2`) says what a ball is made
of in relative terms: k as a count or a fraction, the radius relative to the size of the weights at initialisation.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pliant.errors import BadInput
from pliant.linalg import is_sharded, l2_norm
from pliant.norms.ball import NormBall
from pliant.norms.lifts import Blocks, Channels, KSparse, KSupport, Lp, Norm, Rows, Spectral, VectorNorm
from pliant.optim.sfw import SFW

Vertices = Literal["support", "sparse", "orthogonal"]
Rule = tuple[str | Callable[[str, Tensor], bool], "Preset | None"]

_UNMATCHED: Any = object()


# --- presets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a weight is read as a matrix: ``dim`` counts its rows (outputs), in ``groups`` blocks of rows."""

    dim: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Preset:
    """A ball in relative terms; made by the functions below.

    Args:
        norm: from the parameter's shape and layout to its norm; raises ValueError where there is none.
        radius: w, the radius in units of the expected L2 norm at initialisation: the ball gets the L2 diameter
            2·w·E‖θ_init‖₂, whatever its norm.
        structured: only for weights of at least two dimensions that are not an embedding or a normalisation.
        coupled: from a number of channels to the vector norm of their lengths, where the preset can constrain channels
            that several tensors share.
        orthogonal: whether the vertices of such a ball have orthogonal rows.
    """

    norm: Callable[[torch.Size, Layout], Norm]
    radius: float
    structured: bool = True
    coupled: Callable[[int], VectorNorm] | None = None
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise BadInput(f"radius must be positive and finite, got {self.radius}")


def filters(k: float, radius: float = 10.0, *, vertices: Vertices = "support") -> Preset:
    """Constrain to few filters (rows): ``Rows(KSupport(k))``.

    Args:
        k: filters per vertex; an int is a count, a float in (0, 1] a fraction of the layer's filters.
        radius: relative to the initialisation, see :class:`~pliant.constraints.Preset`.
        vertices: "support" scales the filters of a vertex along the gradient (k-support norm), "sparse" gives each
            the same length (k-sparse norm), "orthogonal" also turns them away from each other
            (:class:`~pliant.Rows`).
    """
    check_k(k)
    _check_vertices(vertices, "support", "sparse", "orthogonal")
    orthogonal = vertices == "orthogonal"

    def norm(shape: torch.Size, layout: Layout) -> Norm:
        n = Rows(Lp(2), layout.dim).length(shape)
        return Rows(_vector_norm(k, n, vertices), layout.dim, orthogonal)

    return Preset(norm, radius, coupled=lambda channels: _vector_norm(k, channels, vertices), orthogonal=orthogonal)


def rank(k: float, radius: float = 10.0, *, vertices: Vertices = "support", spatial: bool = False) -> Preset:
    """Constrain to low rank: ``Spectral(KSupport(k))``.

    Args:
        k: singular directions per vertex; a count or a fraction as in :func:`filters`.
        radius: as there.
        vertices: "support" or "sparse", as there.
        spatial: read 2-d convolutions for k×1 then 1×k layers, not for k×k then 1×1 (:class:`~pliant.Spectral`);
            those with kernels of one row or column have no choice.
    """
    check_k(k)
    _check_vertices(vertices)
    if not isinstance(spatial, bool):
        raise BadInput(f"spatial must be True or False, got {spatial!r}")

    def norm(shape: torch.Size, layout: Layout) -> Norm:
        both_ways = len(shape) == 4 and min(shape[2:]) > 1
        whole = Spectral(Lp(2), layout.dim, layout.groups, spatial and both_ways)
        return replace(whole, inner=_vector_norm(k, whole.length(shape), vertices))

    return Preset(norm, radius)


def weights(k: float, radius: float = 10.0, *, vertices: Vertices = "support") -> Preset:
    """Constrain to few entries: ``KSupport(k)``; k counts entries, else as :func:`filters`."""
    check_k(k)
    _check_vertices(vertices)
    return Preset(lambda shape, layout: _vector_norm(k, math.prod(shape), vertices), radius)


def semi_structured(n: int = 2, m: int = 4, radius: float = 10.0, *, vertices: Vertices = "support") -> Preset:
    """Constrain to n of m consecutive input channels: ``Blocks(KSupport(n), m)``, the N:M pattern of hardware.

    A layer whose input channels m does not divide is an error that names it: give it another rule before this one.
    """
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m):
        raise BadInput(f"an N:M pattern needs integers 1 <= n <= m, got {n}:{m}")
    _check_vertices(vertices)

    def norm(shape: torch.Size, layout: Layout) -> Norm:
        inputs = 1 if layout.dim == 0 else 0
        pattern = Blocks(_vector_norm(n, m, vertices), m, inputs)
        pattern.length(shape)
        return pattern

    return Preset(norm, radius)


def l2(radius: float = 10.0) -> Preset:
    """Constrain to an L2 ball, for any tensor: bounded, but nothing made sparse."""
    return Preset(lambda shape, layout: Lp(2), radius, structured=False)


def resolve_k(k: float, n: int) -> int:
    """Return k as a count: an int is one already, a float f is the fraction max(1, floor(f·n + ½)).

    Raises BadInput where k is below 1, above n, or a fraction outside of (0, 1].
    """
    check_k(k)
    count = k if isinstance(k, int) else max(1, math.floor(k * n + 0.5))
    if count > n:
        raise BadInput(f"k={k} is more than there are ({n}): give at most {n}, or a fraction such as 0.1")
    return count


def check_k(k: float) -> None:
    """Raise BadInput unless k is an int >= 1 (count) or a float in (0, 1] (fraction)."""
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise BadInput(f"k must be an int (count) or a float (fraction), got {k!r}")
    if isinstance(k, int) and k < 1:
        raise BadInput(f"k as a count must be at least 1, got {k}")
    if isinstance(k, float) and not 0 < k <= 1:
        raise BadInput(f"k as a fraction must lie in (0, 1], got {k}; a count is written without a point")


def _check_vertices(vertices: Vertices, *known: Vertices) -> None:
    known = known or ("support", "sparse")
    if vertices not in known:
        raise BadInput(f"vertices must be one of {', '.join(map(repr, known))}, got {vertices!r}")


def _vector_norm(k: float, n: int, vertices: Vertices) -> VectorNorm:
    return (KSupport if vertices == "support" else KSparse)(resolve_k(k, n))


# --- from rules to groups ---------------------------------------------------------------------------------------------


def constrain(
    model: nn.Module,
    rules: Sequence[Rule],
    default: Preset | None = _UNMATCHED,
    *,
    pretrained: bool = False,
    coupled: Sequence[CoupledChannels] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for :class:`~pliant.SFW` that cover every trainable parameter of ``model``.

    A rule is a pair of a name pattern (as for file names: ``"*.weight"``, ``"layer1.*"``) or a predicate
    ``f(name, parameter)``, and a preset, or None for "no ball". The first rule that matches a parameter decides; a
    structured preset only matches weights it can hold, so ``"*.weight"`` does not catch those of a BatchNorm. A tied
    parameter matches under any of its names.

    With FSDP2, call it after ``fully_shard``, which puts new parameters in the place of the old ones; balls and radii
    are the same before and after.

    Neither weights nor buffers nor the random state are touched. Radii are measured on draws of each layer's own
    initialiser; a layer without one, and every layer if ``pretrained``, is measured by the norm at hand.

    Args:
        model: any module.
        rules: first match wins.
        default: the preset, or None for no ball, of all other parameters; without it each one must match a rule.
        pretrained: the weights are trained ones; take the radius from their own norm.
        coupled: channels that leave the network together, ``pliant.coupled_channels(model, example_inputs).groups``.
            Where :func:`filters` is decided for the first weight of one, its ball holds the channels of the whole
            group: all filters that are tied to it with their biases and normalisations (not the layers that read
            them), jointly.

    Raises:
        BadInput: a parameter that no rule matches, a k above what a layer has, or a pattern that does not fit a
            layer: each by name.

    Warns about a rule that matches nothing.
    """
    for rule in rules:
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[1], Preset | None)):
            raise BadInput(f"a rule is a pair of a pattern or predicate and a preset or None, got {rule!r}")
    groups: dict[str, dict[str, Any]] = {}
    unmatched, misfit, used = [], [], set()
    trainable = _trainable(model)
    joint = {}
    for channels in coupled:
        members = _members(channels, {name: p for p, names in trainable.items() for name in names})
        decision = _choose(model, rules, [members[0][0]], members[0][1]) if members else None
        preset = rules[decision[0]][1] if decision else None
        if decision and preset and preset.coupled:
            used.add(decision[0])
            joint[channels.name] = _coupled_group(model, preset, channels, members, pretrained)
    taken = {p for group in joint.values() for p in group["params"]}
    for parameter, names in trainable.items():
        if parameter in taken:
            continue
        choice = _choose(model, rules, names, parameter)
        name, preset = names[0], default
        if choice is not None:
            used.add(choice[0])
            name, preset = choice[1], rules[choice[0]][1]
        elif default is _UNMATCHED:
            unmatched.append(name)
            continue
        elif default is not None and default.structured and not _is_matrix(_owner(model, name), parameter):
            misfit.append(name)
            continue
        ball = None if preset is None else _make_ball(preset, name, parameter, _owner(model, name), pretrained)
        group = groups.setdefault(repr(ball), {"params": [], "param_names": [], "ball": ball, "weight_decay": 0.0})
        if ball is None:
            group.pop("weight_decay", None)  # the optimizer's default holds where no ball does
        group["params"].append(parameter)
        group["param_names"].append(names[0])
    if unmatched:
        raise BadInput(
            f"no rule matches {', '.join(unmatched)}: add a rule, or default=None to train them without a ball"
        )
    if misfit:
        raise BadInput(
            f"the default preset is for weight matrices, not for {', '.join(misfit)}: make it a rule ('*', preset), "
            "and the default None or pliant.l2()"
        )
    for index, (selector, _) in enumerate(rules):
        if index not in used:
            warnings.warn(f"rule {index + 1} ({selector!r}) decides for no parameter of this model", stacklevel=2)
    if not groups and not joint:
        raise BadInput("this model has no trainable parameter")
    result = [*joint.values(), *groups.values()]
    for group in result:
        group["ball"] = None if group["ball"] is None else group["ball"].to_spec()
    return result


def _members(channels: CoupledChannels, parameters: dict[str, Tensor]) -> list[tuple[str, Tensor, int, Tensor]]:
    """Return (name, parameter, dimension, positions) of all trainable tensors that make the channels."""
    return [
        (name, parameters[name], dim, slot.indices)
        for slot in channels.producers
        for name, dim in slot.tensors
        if name in parameters
    ]


def _coupled_group(
    model: nn.Module,
    preset: Preset,
    channels: CoupledChannels,
    members: list[tuple[str, Tensor, int, Tensor]],
    pretrained: bool,
) -> dict[str, Any]:
    assert preset.coupled is not None
    try:
        inner = preset.coupled(channels.channels)
    except BadInput as error:
        raise BadInput(f"the channels of {channels.name}: {error}") from None
    dims = {dim for _, p, dim, _ in members if p.ndim > 1} or {0}
    parts = {_parts(channels.name, name, p.shape[dim], positions) for name, p, dim, positions in members}
    if len(dims) > 1 or len(parts) > 1:
        raise BadInput(
            f"the tensors that share the channels of {channels.name} lay them out differently: leave this group out of "
            "coupled, so that its layers get balls of their own"
        )
    norm = Channels(inner, channels.channels, dims.pop(), parts.pop(), preset.orthogonal)
    lengths = [initial_norm(_owner(model, name), name, p, pretrained) for name, p, _, _ in members]
    diameter = 2 * preset.radius * math.hypot(*lengths)
    parameters = [p for _, p, _, _ in members]
    ball = NormBall(norm, diameter / norm.diameter([p.shape for p in parameters]))
    names = [name for name, _, _, _ in members]
    return {"params": parameters, "param_names": names, "ball": ball, "weight_decay": 0.0, "joint": True}


def _parts(group: str, name: str, rows: int, positions: Tensor) -> int:
    """Return in how many equal parts of the rows each channel has an equal run; BadInput where it is not so."""
    count, width = positions.shape
    for parts in range(1, width + 1 if count * width == rows else 1):
        runs = torch.arange(count * width).reshape(parts, count, -1) if width % parts == 0 else None
        if runs is not None and torch.equal(runs.transpose(0, 1).flatten(1), positions):
            return parts
    raise BadInput(
        f"the channels of {group} are not all rows of {name} in order: leave the group of {group} out of coupled, "
        "so that its layers get balls of their own"
    )


def _choose(model: nn.Module, rules: Sequence[Rule], names: list[str], parameter: Tensor) -> tuple[int, str] | None:
    """Return the index of the rule that decides for a parameter, and the name that it matched; None without one."""
    for index, (selector, preset) in enumerate(rules):
        for name in names:
            matches = selector(name, parameter) if callable(selector) else fnmatch.fnmatchcase(name, selector)
            if matches and (preset is None or not preset.structured or _is_matrix(_owner(model, name), parameter)):
                return index, name
    return None


def _trainable(model: nn.Module) -> dict[Tensor, list[str]]:
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return names


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the layer a parameter belongs to; parametrisations stand between the two."""
    return model.get_submodule(
        name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    )


def _is_matrix(owner: nn.Module, parameter: Tensor) -> bool:
    vectors = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return parameter.ndim >= 2 and not isinstance(owner, vectors)


class CoupledChannels(Protocol):
    """What :func:`constrain` reads of a group of coupled channels; see :class:`pliant.structure.ChannelGroup`."""

    @property
    def name(self) -> str:
        """The layer that names the group."""

    @property
    def channels(self) -> int:
        """How many channels there are."""

    @property
    def producers(self) -> Sequence[Any]:
        """The places, with ``tensors`` (name, dimension) and ``indices`` (channels, width), that make the channels."""


def layout_of(owner: nn.Module) -> Layout:
    """Return how the weight of a layer is read as a matrix."""
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        if owner.groups > 1:
            raise BadInput("grouped transposed convolutions have no layout yet: give them the rule (name, None)")
        return Layout(dim=1)
    if isinstance(owner, nn.modules.conv._ConvNd):
        return Layout(groups=owner.groups)
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):
        return Layout(dim=1)  # GPT-2's linear layer in transformers stores its weight as (in, out)
    return Layout()


def _make_ball(preset: Preset, name: str, parameter: Tensor, owner: nn.Module, pretrained: bool) -> NormBall:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise BadInput(f"{name} has no shape yet: run the model once on an example before constraining it")
    try:
        norm = preset.norm(parameter.shape, layout_of(owner) if preset.structured else Layout())
    except ValueError as error:
        raise BadInput(f"{name} of shape {tuple(parameter.shape)}: {error}") from None
    diameter = 2 * preset.radius * initial_norm(owner, name, parameter, pretrained)
    return NormBall(norm, diameter / norm.diameter(parameter.shape))


def initial_norm(owner: nn.Module, name: str, parameter: Tensor, pretrained: bool = False, draws: int = 3) -> float:
    """Return E‖θ_init‖₂ of one parameter, the mean over draws of its layer's own initialiser.

    Where the layer has no ``reset_parameters`` that sets this parameter, or for ``pretrained`` weights, it is the norm
    at hand; 0 counts as 1. Raises BadInput for a norm that is not finite, or that a meta tensor does not have.
    """
    leaf = name.rpartition(".")[2]
    norms = [] if pretrained else _drawn_norms(owner, leaf, draws)
    if not norms:
        if parameter.is_meta:
            raise BadInput(f"{name} is on the meta device and its layer cannot draw it: its radius cannot be measured")
        whole = parameter.full_tensor() if is_sharded([parameter]) else parameter  # type: ignore[attr-defined]
        norms = [l2_norm([whole.detach().double()]).item()]
    mean = sum(norms) / len(norms)
    if not math.isfinite(mean):
        raise BadInput(f"{name} has NaN or infinite entries: its radius cannot be measured")
    return mean or 1.0


def _drawn_norms(owner: nn.Module, leaf: str, draws: int) -> list[float]:
    """Return the norms of a parameter in some draws of its layer's initialiser, none if that does not set it."""
    reset = getattr(type(owner), "reset_parameters", None) or getattr(type(owner), "_reset_parameters", None)
    if reset is None or not isinstance(getattr(owner, leaf, None), nn.Parameter) or not _callable_alone(reset):
        return []
    # Tensors that are not leaves of autograd cannot be deep-copied; older weight_norm and pruning keep such ones.
    tensors = [t for module in owner.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors}
    if is_sharded(owner.parameters()):
        from pliant.optim import sharded as distributed

        copied = distributed.whole_copy(owner, memo)
    else:
        copied = copy.deepcopy(owner, memo)
    if any(t.is_meta for t in [*copied.parameters(), *copied.buffers()]):
        copied.to_empty(device="cpu")
    copied.cpu()
    norms = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # The same draws for every layer: layers of one shape then share one radius, and so one group.
        torch.default_generator.manual_seed(0)
        getattr(copied, leaf).fill_(math.nan)  # to see whether it is set
        for _ in range(draws):
            reset(copied)
            norms.append(l2_norm([getattr(copied, leaf).double()]).item())
    return [] if math.isnan(norms[0]) else norms


def _callable_alone(reset: Callable[..., Any]) -> bool:
    _, *others = inspect.signature(reset).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in others)


# --- schedules of k ---------------------------------------------------------------------------------------------------


class KSchedule:
    """Anneal k of every ball that has one, linearly from ``start`` to ``end`` over ``steps`` steps.

    The L2 diameter of each ball is kept, so the radius follows k; the weights are scaled inside the new ball and the
    momentum is kept. Constructing sets the start value but touches no weights; call :meth:`step` after each optimizer
    step. To resume, load the optimizer's state and the schedule's, in any order.

    Args:
        optimizer: an :class:`~pliant.SFW`.
        start: k at the first step: a count or a fraction, as in the presets.
        end: k at the last step; None for the k that each group has now.
        steps: number of steps from start to end, at least 1.
    """

    def __init__(self, optimizer: SFW, start: float = 1.0, end: float | None = None, *, steps: int) -> None:
        if steps < 1:
            raise BadInput(f"a schedule of k needs steps >= 1, got {steps}")
        self.optimizer = optimizer
        self.steps = steps
        self.last_step = 0
        self._spans: list[tuple[int, int] | None] = []
        for group in optimizer.param_groups:
            ball = None if group["ball"] is None else NormBall.from_spec(group["ball"])
            current = None if ball is None else norm_k(ball.norm)
            if ball is None or current is None:
                self._spans.append(None)
                continue
            n = self._length(ball, group)
            try:
                self._spans.append((resolve_k(start, n), current if end is None else resolve_k(end, n)))
            except BadInput as error:
                names = ", ".join(group.get("param_names", ["a group without names"]))
                raise BadInput(f"{names}: {error}") from None
        if not any(self._spans):
            raise BadInput("no group of this optimizer has a ball with a k to anneal")
        self._apply(started=False)

    def step(self) -> None:
        """Go one step further; after ``steps`` steps k stays at its end."""
        self.last_step += 1
        if self.last_step <= self.steps:
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "last_step": self.last_step,
            "steps": self.steps,
            "spans": [list(s) if s else None for s in self._spans],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state: every ball gets the k of that step."""
        if len(state["spans"]) != len(self._spans):
            raise BadInput(f"a schedule of {len(state['spans'])} groups cannot go on with {len(self._spans)} groups")
        self.last_step, self.steps = state["last_step"], state["steps"]
        self._spans = [tuple(s) if s else None for s in state["spans"]]
        self._apply()

    def _apply(self, *, started: bool = True) -> None:
        progress = min(1.0, self.last_step / self.steps)
        for group, span in zip(self.optimizer.param_groups, self._spans, strict=True):
            if span is None:
                continue
            ball = NormBall.from_spec(group["ball"])
            k = math.floor(span[0] + (span[1] - span[0]) * progress + 0.5)
            if k != norm_k(ball.norm):
                shapes = ball_shapes(group)
                norm = with_k(ball.norm, k)
                ball = NormBall(norm, ball.diameter(shapes) / norm.diameter(shapes))
                if started:
                    self.optimizer.set_ball(group, ball)
                else:
                    group["ball"] = ball.to_spec()

    def _length(self, ball: NormBall, group: dict[str, Any]) -> int:
        lengths = {with_k(ball.norm, 1).length(p.shape) for p in group["params"]}
        if group["joint"]:
            return with_k(ball.norm, 1).length(ball_shapes(group))
        if len(lengths) > 1:
            raise BadInput(f"a group with one ball has tensors with {sorted(lengths)} places for k: split the group")
        return lengths.pop()


def ball_shapes(group: dict[str, Any]) -> list[torch.Size]:
    """Return the shapes that a ball of a parameter group is over: of all its tensors jointly, or of each, all alike."""
    return [p.shape for p in (group["params"] if group["joint"] else group["params"][:1])]


def norm_k(norm: Norm) -> int | None:
    """Return the k of a norm or of what it lifts, None where it has none."""
    inner = getattr(norm, "inner", norm)
    return inner.k if isinstance(inner, KSparse | KSupport) else None


def with_k(norm: Norm, k: int) -> Norm:
    """Return the same norm with another k; the norm must have one."""
    if isinstance(norm, KSparse | KSupport):
        return replace(norm, k=k)
    if isinstance(norm, Rows | Channels | Spectral | Blocks) and isinstance(norm.inner, KSparse | KSupport):
        return replace(norm, inner=replace(norm.inner, k=k))
    raise BadInput(f"{norm} has no k")
