"""What parameter groups constrain: which weights carry which ball, and what has none.

::

    groups = pliant.constrain(model, rules, default=None)
    print(pliant.coverage(model, groups))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pliant.calling import plain
from pliant.constraints.parameter_groups import owner_of, trainable_parameters
from pliant.errors import BadInput
from pliant.norms import NormBall
from pliant.norms.lifts import Lift

_SHOWN = 6  # names in a line; the attributes have all of them


@dataclass(frozen=True)
class Covered:
    """Weights with one kind of ball.

    Args:
        norm: the kind, such as "Spectral(KSupport)".
        names: the parameters.
        share: of all trainable parameters.
        k: the smallest and the largest k; None if the norm has none.
    """

    norm: str
    names: tuple[str, ...]
    share: float
    k: tuple[int, int] | None

    def __str__(self) -> str:
        if self.k is None:
            return self.norm
        least, most = self.k
        return f"{self.norm}, k = {least}" if least == most else f"{self.norm}, k = {least} to {most}"


@dataclass(frozen=True)
class Uncovered:
    """A weight of at least two dimensions without a ball.

    Args:
        name: the parameter.
        share: of all trainable parameters.
        reason: what it is, and what would give it a ball.
    """

    name: str
    share: float
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Which weights carry which ball; ``print`` shows it in a few lines.

    Args:
        balls: the weights with a ball, by kind, the largest share first.
        without: the weights of at least two dimensions without a ball, the largest first.
        vectors: the names of biases, normalisations and other vectors without a ball.
        share: share of the trainable parameters that have a ball.
        missing: the trainable parameters that are in no group, and that no step changes.
    """

    balls: tuple[Covered, ...]
    without: tuple[Uncovered, ...]
    vectors: tuple[str, ...]
    share: float
    missing: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The same in one line, without reasons."""
        balls = "; ".join(f"{kind} on {_count(kind.names, 'tensor')}" for kind in self.balls)
        rest = [weight.name for weight in self.without] + [_count(self.vectors, "vector")] * bool(self.vectors)
        none = f"; none: {_listed(rest)}" if rest else ""
        return f"{self.share:.1%} of the trainable parameters have a ball: {balls or 'no kind'}{none}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.share:.1%} of the trainable parameters have a ball"
        for kind in self.balls:
            yield f"  {kind.share:6.1%}  {kind}: {_listed(kind.names)}"
        for weight in self.without:
            yield f"  {weight.share:6.1%}  no ball: {weight.name} {weight.reason}"
        if self.vectors:
            yield f"          no ball: {_count(self.vectors, 'vector')}: {_listed(self.vectors)}"
        if self.missing:
            yield f"in no group, so that no step changes them: {_listed(self.missing)}"


def coverage(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> Coverage:
    """Return which weights of a model carry which ball in parameter groups, and what share of them has none.

    Args:
        model: the model.
        groups: what :func:`pliant.constrain` returned, or the ``param_groups`` of an optimizer.

    Raises:
        BadInput: a group holds a parameter that the model does not have (under FSDP2, ``fully_shard`` replaces them).
    """
    model = plain(model)
    trainable = trainable_parameters(model)
    total = sum(p.numel() for p in trainable) or 1
    kinds: dict[str, list[tuple[str, int, int | None]]] = {}
    without: list[Uncovered] = []
    vectors: list[str] = []
    seen: set[Tensor] = set()
    for group in groups:
        ball = _ball(group)
        for p in _members(group):
            if not p.requires_grad and p not in trainable:
                continue
            if p not in trainable:
                raise BadInput(
                    f"a group holds a parameter of shape {tuple(p.shape)} that the model does not have: make the "
                    "groups from this model, after whatever replaces its parameters"
                )
            seen.add(p)
            name = trainable[p][0]
            if ball is not None:
                kinds.setdefault(_kind(ball), []).append((name, p.numel(), ball.norm.k))
            elif p.ndim > 1 and not (_is_computed_from(owner_of(model, name), name) and max(p.shape) == p.numel()):
                without.append(Uncovered(name, p.numel() / total, _reason(model, name)))
            else:
                vectors.append(name)
    balls = [
        Covered(kind, tuple(name for name, _, _ in members), sum(n for _, n, _ in members) / total, _span(members))
        for kind, members in kinds.items()
    ]
    return Coverage(
        tuple(sorted(balls, key=lambda kind: -kind.share)),
        tuple(sorted(without, key=lambda weight: -weight.share)),
        tuple(vectors),
        sum(kind.share for kind in balls),
        tuple(names[0] for p, names in trainable.items() if p not in seen),
    )


def _ball(group: Mapping[str, Any]) -> NormBall | None:
    ball = group.get("ball")
    return ball if ball is None or isinstance(ball, NormBall) else NormBall.from_spec(ball)


def _members(group: Mapping[str, Any]) -> Iterator[Tensor]:
    members = group["params"]
    for member in [members] if isinstance(members, Tensor) else members:
        yield member[1] if isinstance(member, tuple) else member


def _kind(ball: NormBall) -> str:
    """Return the class of a norm, with that of the vector norm that it lifts."""
    norm = ball.norm
    if isinstance(norm, Lift):
        return f"{type(norm).__name__}({type(norm.inner).__name__})"
    return type(norm).__name__


def _span(members: Sequence[tuple[str, int, int | None]]) -> tuple[int, int] | None:
    ks = [k for _, _, k in members if k is not None]
    return (min(ks), max(ks)) if ks else None


def _reason(model: nn.Module, name: str) -> str:
    """Return what a weight without a ball is, and what would give it one."""
    owner, leaf = owner_of(model, name), name.rpartition(".")[2]
    rule = f'a rule for "{name}" gives it one'
    if isinstance(owner, nn.MultiheadAttention):
        packed = f'("{name}", pliant.rank(k, parts=3)) gives it one'
        return f"packs queries, keys and values: the rule {packed}" if leaf == "in_proj_weight" else f"projects: {rule}"
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return f"is recurrent, and its name does not end in .weight: {rule}"
    if _is_computed_from(owner, name):
        return f"is what the weight of a {type(owner).__name__} is computed from, not the weight: {rule}"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "is a table of embeddings, which no compressor cuts"
    return f"in a {type(owner).__name__}: {rule}"


def _is_computed_from(owner: nn.Module, name: str) -> bool:
    """Return whether a layer computes its weight from this parameter, as weight norms and pruning masks let it."""
    leaf = name.rpartition(".")[2]
    weight = leaf.removesuffix("_v").removesuffix("_g").removesuffix("_orig")
    return ".parametrizations." in name or (weight != leaf and isinstance(getattr(owner, weight, None), Tensor))


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}" if len(names) == 1 else f"{len(names)} {what}s"


def _listed(names: Sequence[str]) -> str:
    """Return names with commas, the first of many only, and how many others there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
