"""SFW: Stochastic Frank-Wolfe as a ``torch.optim.Optimizer``.

Per constrained tensor, with gradient g, momentum m and a ball of radius r:

    m ← μ·m + (1 − dampening)·g          (the first step takes m = g, as torch.optim.SGD does)
    v ← r · lmo(m)                       a vertex of the ball
    η ← clamp(lr · factor, 0, 1)
    θ ← (1 − η)·θ + η·v                  a convex combination: inside the ball if θ was

The class keeps the state, ``oracles.py`` finds v, and :func:`sfw_update` holds the last two lines. (Pokutta, Spiegel,
Zimmer 2020, Deep neural network training with Frank-Wolfe, arXiv 2010.07243; Zimmer, Spiegel, Pokutta 2022, arXiv
2205.11921.)

Limiting cases, each one a test: an L2 ball with "fast-gradient" is SGD with weight decay lr·‖m‖/r; ``Lp(inf)`` without
rescaling is sign-SGD with decay; ``Spectral(Lp(inf))`` without rescaling is Muon with an exact polar factor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pliant.linalg import (
    accumulation_dtype,
    common_dtype,
    divide_or_zero,
    is_sharded,
    local_piece,
    readable,
)
from pliant.norms.ball import NormBall
from pliant.norms.lifts import Channels, Rows, Spectral
from pliant.optim import fused
from pliant.optim.vertices import (
    Vertex,
    along,
    keeps_directions,
    leading_vertices,
    persistent,
    rank_of_vertices,
    unit_vertices,
    well_scaled,
)

if TYPE_CHECKING:
    from pliant.optim.sharded import Shards

Rescale = Literal["gradient", "fast-gradient", "diameter"] | None
FAR_OUTSIDE = 2.0  # a first step that shrinks a parameter by more than this factor warns
# The quality of kept singular directions is measured every so many steps, first at this one, by so many iterations
# more; below ENOUGH a tensor gets an iteration more in each step, above PLENTY one less.
MEASURE_EVERY, MEASURE_AT, MEASURE_BY = 64, 8, 4
ENOUGH, PLENTY = 0.98, 0.998
# Tensors up to this size are stacked. Larger ones fill a device by themselves, and would take its memory; on a CPU they
# do better one by one, in the cache, unless the number of operations is what costs: Spectral.
BATCHED, BATCHED_ON_CPU, BATCHED_SPECTRAL = 2**20, 2**15, 2**18
RESCALES: tuple[Rescale, ...] = ("gradient", "fast-gradient", "diameter", None)


class SFW(Optimizer):
    """Stochastic Frank-Wolfe with momentum, one optimizer for a whole model.

    A parameter group may carry a ``"ball"``: a :class:`~pliant.NormBall` or its spec (plain data, which is what the
    group then holds). Each tensor of the group has a ball of its own unless ``"joint"`` is True. A group without a ball
    takes the step of ``torch.optim.SGD``, the limit of the L2 ball with gradient rescaling for radius → ∞.

    Constructing never touches weights. The first step of a constrained parameter scales it radially into its ball and
    warns if that shrinks it by more than a factor of 2. Apart from that first step, and from ``check_finite``, a step
    does not wait for the device; on CUDA, torch's own singular value decompositions do, which ``Spectral`` balls use
    for matrices of up to 16 rows or columns, and for fewer than 32 directions of equal lengths (``KSparse``).

    The state of a parameter is its ``momentum_buffer`` and, under a large ``Spectral`` ball, its ``basis`` of k
    columns. On a CPU the optimizer also keeps memory for one vertex (``scratch``), as large as the largest tensor with
    a ball, or as all tensors of the largest joint ball.

    Parameters may be DTensors, cut by ``fully_shard`` (FSDP2) or by hand: every process then calls ``step`` and
    ``gap``, and all take the steps of one process with the whole tensors. See docs/distributed.md.

    Large entries of bf16 or fp16 *weights* freeze when η is below their resolution; such weights are scaled inside
    after every step, which costs a norm. Better keep float32 weights and use autocast.

    Args:
        params: tensors, (name, tensor) pairs or groups, as for every optimizer; see :func:`pliant.constrain`.
        lr: step size; a number or a scalar tensor. What it means depends on ``rescale``.
        momentum: μ in [0, 1).
        dampening: of the momentum, as in ``torch.optim.SGD``; without momentum it has no effect.
        weight_decay: L2 penalty, for groups without a ball only; a ball is the regulariser of its group.
        rescale: the factor of lr: ``"gradient"`` ‖m‖/‖θ−v‖, so that the step has length lr·‖m‖, as in SGD (default);
            ``"fast-gradient"`` ‖m‖/(D/2), without a pass over θ; ``"diameter"`` 1/D; None for 1, where lr itself is
            the convex weight. D is the L2 diameter of the ball.
        maximize: ascend instead of descend.
        check_finite: before a step changes anything, raise FloatingPointError that names the parameters with a
            NaN or infinite gradient (costs one host synchronisation).
        power_iterations: block power iterations per step of ``Spectral`` balls, which keep their singular directions
            from step to step (small matrices are decomposed exactly). None: 1, and more for a tensor where a
            measurement every 64 steps finds its vertices more than 2 % below what further iterations reach.
        persistence: α ≥ 0, for balls of ``Rows`` and ``Channels`` with ``rescale=None``: the vertex is then that for m
            with each row or channel multiplied by (‖θᵢ‖ / their mean)^α. With 0 the momentum alone chooses the parts of
            a vertex; with 1 it is ‖mᵢ‖·‖θᵢ‖, as in the importance of Molchanov et al. 2017 (arXiv 1611.06440): vertices
            agree more. Still a vertex of the ball, but not the best one for m; :meth:`gap` is that of the ball.
        foreach: None or True: many tensors at a time, those without a ball by ``torch._foreach`` operations and small
            ones with equal balls and shapes in one batch; False: one by one.
        fused: True: C kernels that pass over memory once, for float32 tensors on a CPU with a ball of their own of
            ``Rows``, ``KSparse``, ``KSupport`` or ``Blocks(KSupport(2), 4)``; all others take the usual steps. They are
            compiled at first use, which needs a C compiler with OpenMP; RuntimeError where there is none. A training
            that was stopped and goes on takes the same steps up to the last bit of float32.
        capturable: never look at a value of a tensor, so that a step can be captured in a CUDA graph: no warning in
            the first step, and no measuring for ``power_iterations``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        *,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        rescale: Rescale = "gradient",
        maximize: bool = False,
        check_finite: bool = False,
        power_iterations: int | None = None,
        persistence: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "rescale": rescale,
            "maximize": maximize,
            "check_finite": check_finite,
            "power_iterations": power_iterations,
            "persistence": persistence,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "ball": None,
            "joint": False,
        }
        self._kept_memory: dict[torch.dtype, Tensor] = {}
        self._kept_views: dict[Any, list[Tensor]] = {}
        self._brackets: dict[Tensor, tuple[float, float]] = {}  # of fused steps
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``"ball"``, if any, is checked against its tensors and kept as plain data."""
        group = dict(param_group)
        if isinstance(group["params"], set):
            raise TypeError("optimizer parameters need an order: got a set, give a list")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.pop("param_names", None)
        if names is not None:
            group["params"] = list(zip(names, group["params"], strict=True))
        ball = _as_ball(group.get("ball"))
        group["ball"] = None if ball is None else ball.to_spec()
        _check_options({**self.defaults, **group}, ball)
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        _check_ball_fits(ball, tensors, joint=group.get("joint", False))
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept_memory, self._kept_views, self._brackets = {}, {}, {}
        for group in self.param_groups:  # a state saved by another version, or by SGD, may lack options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by ``state_dict``; singular directions keep their own precision.

        Raises ValueError, before anything changes, for a state of other tensors, of another kind of ball, or of another
        number of processes.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        # torch casts every floating-point state to its parameter's dtype and device.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, parameters, strict=True):
            state = state_dict["state"].get(index, {})
            if "basis" in state:
                self.state[p]["basis"] = state["basis"].to(p.device, copy=True)
            if "quality" in state:
                self.state[p]["quality"] = state["quality"].to("cpu", copy=True)
        for group in self.param_groups:
            _check_ball_fits(_as_ball(group["ball"]), group["params"], joint=group["joint"])

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        sizes = [[len(g["params"]) for g in groups] for groups in (self.param_groups, state_dict["param_groups"])]
        if sizes[0] != sizes[1]:
            return  # which torch refuses in its own words
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            kinds = [_kind(_as_ball(g.get("ball"))) for g in (group, saved)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"the state is one of {kinds[1]}, but the group of {_name(group['params'][0], group)} has "
                    f"{kinds[0]}: make the optimizer with the balls that it was saved with"
                )
            for index, p in zip(saved["params"], group["params"], strict=False):
                buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
                if buffer is not None:
                    _check_buffer(buffer, p, _name(p, group))

    @torch.no_grad()
    def set_ball(self, group: dict[str, Any], ball: NormBall) -> None:
        """Give a group of this optimizer another ball: its weights are scaled inside, its momentum is kept.

        Of singular directions the leading ones are kept, as many as the ball asks for.
        """
        _check_options(group, ball)
        _check_ball_fits(ball, group["params"], joint=group["joint"])
        group["ball"] = ball.to_spec()
        started = [p for p in group["params"] if p in self.state]
        for p in started:
            if "basis" in self.state[p] and isinstance(ball.norm, Spectral):
                self.state[p]["basis"] = self.state[p]["basis"][:, : rank_of_vertices(ball.norm)]
        for members in [started] if group["joint"] else [[p] for p in started]:
            if members:
                _scale_inside(members, ball, group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns the closure's loss if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._start_new_parameters()
        for group in self.param_groups:
            ball = _as_ball(group["ball"])
            if ball is None:
                self._sgd_step([p for p in group["params"] if p.grad is not None], group)
                continue
            for sets in self._batches(group, ball):
                self._constrained_step(sets, ball, group)
        return loss

    @torch.no_grad()
    def gap(self) -> Tensor:
        """Return the Frank-Wolfe gap ⟨θ, m⟩ + r·dual(m), summed over all balls, times (1 − μ)/(1 − dampening).

        A scalar tensor, 0 before the first step. Without momentum, m is the gradient at hand, and the gap is NaN after
        ``zero_grad``. For full gradients and weights inside their balls it is >= 0 and certifies stationarity; with
        stochastic momentum it is an estimate of that. (Jaggi 2013, section 2.)
        """
        total = torch.zeros(())
        for group in self.param_groups:
            ball = _as_ball(group["ball"])
            if ball is None:
                continue
            momentum = group["momentum"]
            factor = (1 - momentum) / (1 - group["dampening"]) if momentum else 1.0
            started = [p for p in group["params"] if p in self.state]
            for members in [started] if group["joint"] and started else [[p] for p in started]:
                directions = [self._direction(p, group) for p in members]
                if is_sharded(members):
                    gap = _shards(members, group).gap(ball, [local_piece(p) for p in members], directions)
                else:
                    gap = ball.gap(members, directions)
                total = total.to(members[0].device) + factor * gap
        return total

    # --- the two kinds of step ---

    def _sgd_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr = group["lr"]
        for some in [parameters] if group["foreach"] is not False else [[p] for p in parameters]:
            if not some:
                return
            directions = self._accumulate(some, group, weight_decay=group["weight_decay"])
            some = [local_piece(p) for p in some]
            if isinstance(lr, Tensor):
                torch._foreach_sub_(some, [m * lr.to(m.device, m.dtype) for m in directions])
            else:
                torch._foreach_add_(some, directions, alpha=-lr)

    def _constrained_step(self, sets: list[list[Tensor]], ball: NormBall, group: dict[str, Any]) -> None:
        """Move tensors with a ball each, all of one shape, or the tensors of one joint ball."""
        p = sets[0][0]
        alone = len(sets) == len(sets[0]) == 1
        fusible = group["fused"] and alone and group["momentum"] and not group["persistence"]
        if fusible and fused.fits(ball.norm, p, self._momentum(p)):
            if self._fused_step(p, ball, group):
                return
            directions = [self._direction(p, group)[None]]
        else:
            parts = (self._accumulate(members, group) for members in sets)
            directions = [_stack(ds) for ds in zip(*parts, strict=True)]
        if is_sharded(sets[0]):
            self._sharded_step(sets[0], directions, ball, group)
            return
        weights = [_stack(ps) for ps in zip(*sets, strict=True)]
        if group["persistence"] and isinstance(ball.norm, Rows | Channels):
            directions = persistent(ball.norm, directions, weights, group["persistence"])
        memory = self._memory(directions) if len(sets) == 1 and readable(directions[0]) else None
        if isinstance(ball.norm, Spectral) and keeps_directions(ball.norm, [p.shape for p in sets[0]]):
            lengths, directions, _ = well_scaled(directions)
            vertices = self._leading_vertices(sets, ball.norm, directions, memory, group)
        else:
            lengths, vertices = unit_vertices(ball.norm, directions, memory)
        diameter = ball.diameter([p.shape for p in sets[0]])
        lr, rescale = group["lr"], group["rescale"]
        sfw_update(weights, lengths, vertices, memory, radius=ball.radius, diameter=diameter, lr=lr, rescale=rescale)
        if len(sets) > 1:
            torch._foreach_copy_([p for (p,) in sets], list(weights[0].unbind(0)))
        for members in sets:
            if any(p.dtype != accumulation_dtype(p) for p in members):
                # A small η leaves large entries as they are, but adds to small ones.
                _scale_inside(members, ball, group)

    def _fused_step(self, p: Tensor, ball: NormBall, group: dict[str, Any]) -> bool:
        """Accumulate the momentum of a tensor and take its step by kernels; False if only the first could be done."""
        m = self.state[p]["momentum_buffer"]
        (scratch,) = self._memory([m])
        return fused.step(
            ball.norm,
            p,
            m,
            radius=ball.radius,
            diameter=ball.diameter(p.shape),
            momentum=group["momentum"],
            weight=(-1 if group["maximize"] else 1) * (1 - group["dampening"]),
            lr=float(group["lr"]),
            rescale=group["rescale"],
            scratch=scratch.as_strided((m.numel(),), (1,)),
            brackets=self._brackets,
        )

    def _sharded_step(
        self, members: list[Tensor], directions: list[Tensor], ball: NormBall, group: dict[str, Any]
    ) -> None:
        """Move the tensors of one ball, of which this process has a piece each."""
        shards = _shards(members, group)
        if group["persistence"] and isinstance(ball.norm, Rows | Channels):
            pieces = [local_piece(p) for p in members]
            directions = shards.persistent(ball.norm, directions, pieces, group["persistence"])
        if isinstance(ball.norm, Spectral) and keeps_directions(ball.norm, [p.shape for p in members]):
            lengths, directions = shards.well_scaled(directions)
            vertices = self._leading_vertices([members], ball.norm, directions, None, group, shards)
        else:
            lengths, vertices = shards.unit_vertices(ball.norm, [d[0] for d in directions])
        sfw_update(
            [local_piece(p)[None] for p in members],
            lengths,
            vertices,
            None,
            radius=ball.radius,
            diameter=ball.diameter([p.shape for p in members]),
            lr=group["lr"],
            rescale=group["rescale"],
            l2_norm=shards.length,
        )
        if any(p.dtype != accumulation_dtype(p) for p in members):
            _scale_inside(members, ball, group)

    def _leading_vertices(
        self,
        sets: list[list[Tensor]],
        norm: Spectral,
        directions: list[Tensor],
        memory: list[Tensor] | None,
        group: dict[str, Any],
        shards: Shards | None = None,
    ) -> list[Vertex]:
        """Return vertices from the singular directions of the last step, and keep those for the next one.

        Every so many steps more iterations are made than usual, and the next time the gain of those is looked at: by
        then it is known, so that looking does not wait for the device.
        """
        states = [self.state[members[0]] for members in sets]
        iterations = group["power_iterations"] or states[0].get("iterations", 1)
        find = leading_vertices if shards is None else shards.leading_vertices
        if shards is not None:
            basis = shards.joined_basis(norm, [self.state[p].get("basis") for p in sets[0]])
        else:
            basis = _stack([state["basis"] for state in states]) if "basis" in states[0] else None
        measured = "steps" in states[0] and states[0]["steps"] % MEASURE_EVERY == MEASURE_AT
        vertices, basis, value = find(norm, directions, basis, iterations, memory)
        if measured:
            vertices, basis, better = find(norm, directions, basis, MEASURE_BY, memory)
            qualities = torch.where(better == 0, 1, value / better)
            for state, quality in zip(states, _to_host(qualities), strict=True):
                if "quality" in state:
                    state["iterations"] = _adapted(state.get("iterations", 1), state["quality"].item())
                state["quality"] = quality
        if shards is not None:
            for p, part in zip(sets[0], shards.parted_basis(norm, basis), strict=True):
                self.state[p]["basis"] = part
        else:
            for state, kept in zip(states, basis, strict=True):
                state["basis"] = kept
        if group["power_iterations"] is None and not group["capturable"]:
            for state in states:
                state["steps"] = state.get("steps", 0) + 1
                # There from the first step on: a distributed checkpoint loads only what it finds in a state.
                state.setdefault("iterations", 1)
                state.setdefault("quality", torch.tensor((ENOUGH + PLENTY) / 2))
        return vertices

    def _memory(self, like: list[Tensor]) -> list[Tensor]:
        """Return tensors like these in memory that is kept from step to step: asking for new pages costs more."""
        dtype = common_dtype(like)
        key = (dtype, *((x.shape, x.stride()) for x in like))
        if key not in self._kept_views:
            sizes = [x.numel() for x in like]
            kept = self._kept_memory.get(dtype)
            if kept is None or len(kept) < sum(sizes):
                kept = self._kept_memory[dtype] = torch.empty(sum(sizes), dtype=dtype)
                self._kept_views = {k: views for k, views in self._kept_views.items() if k[0] != dtype}
            flats = kept[: sum(sizes)].split(sizes)
            strides = [torch.empty_like(x, device="meta").stride() for x in like]
            views = [flat.as_strided(x.shape, s) for flat, x, s in zip(flats, like, strides, strict=True)]
            self._kept_views[key] = views
        return self._kept_views[key]

    @property
    def scratch(self) -> list[Tensor]:
        """The memory that is kept from step to step beside the state, for what it takes; its values mean nothing."""
        return list(self._kept_memory.values())

    # --- state ---

    def _batches(self, group: dict[str, Any], ball: NormBall) -> list[list[list[Tensor]]]:
        """Return the sets of tensors that move together, those that can be handled in one batch side by side."""
        batches: dict[Any, list[list[Tensor]]] = {}
        on_cpu = BATCHED_SPECTRAL if isinstance(ball.norm, Spectral) else BATCHED_ON_CPU
        for index, members in enumerate(self._sets_with_gradient(group)):
            p = members[0]
            most = on_cpu if p.device.type == "cpu" else BATCHED
            alone = group["joint"] or group["foreach"] is False or p.numel() > most or is_sharded(members)
            state = self.state.get(p, {})
            width = state["basis"].shape[-1] if "basis" in state else None
            pace = (width, state.get("iterations"), state.get("steps"))
            key = index if alone else (p.shape, p.stride(), p.dtype, p.device, *pace)
            batches.setdefault(key, []).append(members)
        return list(batches.values())

    def _start_new_parameters(self) -> None:
        """Scale parameters that take their first step into their balls; warn once about those far outside."""
        names, shrinkages = [], []
        for group in self.param_groups:
            if group["ball"] is None or all(p in self.state for p in group["params"]):
                continue
            ball = NormBall.from_spec(group["ball"])
            for members in self._sets_with_gradient(group):
                if any(p not in self.state for p in members):
                    names.append(_name(members[0], group))
                    shrinkages.append(_scale_inside(members, ball, group))
        if not shrinkages or shrinkages[0].is_meta or any(group["capturable"] for group in self.param_groups):
            return
        far = [
            (factor, name)
            for factor, name in zip(_together(shrinkages).tolist(), names, strict=True)
            if factor > FAR_OUTSIDE
        ]
        if far:
            factor, name = max(far)
            warnings.warn(
                f"{len(far)} constrained parameters started outside of their balls and were shrunk, {name} by a factor "
                f"of {factor:.3g}; if they were trained before, a larger radius keeps what they learned",
                stacklevel=5,  # past step() and the wrappers torch puts around it
            )

    def _sets_with_gradient(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """Return the tensors that move together: single ones with a gradient, or all of a joint ball.

        A joint ball whose tensors only partly have gradients moves as a whole, the missing ones counting as 0: moving
        some of its tensors alone would not be a convex combination.
        """
        parameters: list[Tensor] = group["params"]
        if group["ball"] is not None and group["joint"]:
            return [parameters] if any(p.grad is not None for p in parameters) else []
        return [[p] for p in parameters if p.grad is not None]

    def _accumulate(self, parameters: list[Tensor], group: dict[str, Any], weight_decay: float = 0.0) -> list[Tensor]:
        """Fold the gradients into the momenta of the parameters and return the directions of this step."""
        gradients = [_gradient(p) for p in parameters]
        sign = -1 if group["maximize"] else 1
        if weight_decay:
            pieces = [local_piece(p) for p in parameters]
            gradients = list(torch._foreach_add(gradients, pieces, alpha=sign * weight_decay))
        momentum, weight = group["momentum"], sign * (1 - group["dampening"])
        states = [self.state[p] for p in parameters]
        if not momentum:
            for state in states:
                state["momentum_buffer"] = None  # an entry all the same: it marks that p has been scaled inside
            return gradients if sign == 1 else list(torch._foreach_neg(gradients))
        old = [i for i, state in enumerate(states) if state.get("momentum_buffer") is not None]
        buffers, new = [local_piece(states[i]["momentum_buffer"]) for i in old], [gradients[i] for i in old]
        if len(old) == 1 and weight == 1 and buffers[0].dtype == new[0].dtype:
            torch.add(new[0], buffers[0], alpha=momentum, out=buffers[0])  # one pass over memory less
        elif old:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, new, alpha=weight)
        for p, gradient, state in zip(parameters, gradients, states, strict=True):
            if state.get("momentum_buffer") is None:
                first = gradient.clone(memory_format=torch.preserve_format)
                state["momentum_buffer"] = _as_sharded(first if sign == 1 else first.neg_(), p)
        return [local_piece(state["momentum_buffer"]) for state in states]

    def _momentum(self, p: Tensor) -> Tensor | None:
        buffer: Tensor | None = self.state[p].get("momentum_buffer")
        return buffer

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the piece of the momentum that this process has; without momentum, of the gradient."""
        buffer = self._momentum(p)
        if buffer is None:
            if p.grad is None:
                return torch.full_like(local_piece(p), math.nan)
            return -_gradient(p) if group["maximize"] else _gradient(p)
        return local_piece(buffer)

    def _check_gradients(self) -> None:
        """Refuse a gradient that no step can be taken with, before anything has changed."""
        checked: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
                    kind = f"{p.grad.layout} {p.grad.dtype}"
                    raise ValueError(f"SFW needs dense, real gradients, got {kind} in {_name(p, group)}")
                if group["check_finite"]:
                    checked.append((p, group))
        # One reduction per tensor, one transfer for all.
        flags = [torch.isfinite(_gradient(p)).all() for p, _ in checked if p.grad is not None]
        if is_sharded([p for p, _ in checked]):
            finite = self._finite_everywhere(checked, flags)
        elif flags:
            finite = iter(_together(flags).tolist())
        else:
            return
        bad = [_name(p, group) for p, group in checked if p.grad is not None and not next(finite)]
        if bad:
            raise FloatingPointError(
                f"NaN or infinite gradient in {_listed(bad)}; the step was refused, nothing has changed"
            )

    def _finite_everywhere(self, checked: list[tuple[Tensor, dict[str, Any]]], flags: list[Tensor]) -> Iterator[bool]:
        """Yield for each gradient whether its pieces are finite on all processes, which all refuse together."""
        from pliant.optim import sharded as distributed

        present = [p.grad is not None for p, _ in checked]
        finite, differing = distributed.agreed(flags, present, [p for p, _ in checked])
        if any(differing):
            names = [_name(p, group) for (p, group), differs in zip(checked, differing, strict=True) if differs]
            raise RuntimeError(
                f"{_listed(names)} has a gradient on some processes only; the step was refused, nothing has changed: "
                "let every process use the same layers, or none"
            )
        return iter(compress(finite, present))


def sfw_update(
    weights: list[Tensor],
    lengths: Tensor,
    vertices: list[Vertex],
    memory: list[Tensor] | None,
    *,
    radius: float,
    diameter: float,
    lr: float | Tensor,
    rescale: Rescale,
    l2_norm: Callable[[list[Tensor]], Tensor] | None = None,
) -> None:
    """Move weights towards the vertices of their balls in place: θ ← (1 − η)·θ + η·v.

    L balls of one kind over J tensors each; a zero direction leaves θ unchanged, and θ = v takes η = 1 (it is already
    there).

    Args:
        weights: J tensors (L, *shape), changed in place.
        lengths: L2 norm ‖m‖ of the direction of each ball, (L,).
        vertices: of the unit balls, exact or approximate, shaped as the weights.
        memory: J tensors shaped as the weights to write θ − v to, which may be the vertices' own; None: new ones.
        radius: of the balls.
        diameter: L2 diameter of the balls.
        lr: step size before rescaling.
        rescale: as in :class:`SFW`.
        l2_norm: of all J tensors together, for each ball; where they are pieces, that of the whole.
    """
    differences = []
    for index, (w, vertex) in enumerate(zip(weights, vertices, strict=True)):
        start, out = w.to(vertex.carrier.dtype), None if memory is None else memory[index]
        differences.append(torch.addcmul(start, vertex.carrier, radius * vertex.factor, out=out))
    tiny = torch.finfo(lengths.dtype).tiny
    if rescale is None or rescale == "diameter":
        lengths = divide_or_zero(lengths, lengths)  # 1, or 0 for a zero direction, or NaN for NaN
    match rescale:
        case "gradient":
            reference = (well_scaled(differences)[0] if l2_norm is None else l2_norm(differences)).clamp_min(tiny)
        case "fast-gradient":
            reference = torch.full_like(lengths, diameter / 2)
        case "diameter":
            reference = torch.full_like(lengths, diameter)
        case None:
            reference = torch.ones_like(lengths)
    eta = (lengths * lr / reference).clamp(0, 1)
    for w, d in zip(weights, differences, strict=True):
        eta_of_each = along(eta.to(d.dtype), d)
        if w.dtype == d.dtype:
            w.addcmul_(d, eta_of_each, value=-1)
        else:
            w.copy_(torch.addcmul(w.to(d.dtype), d, eta_of_each, value=-1))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return (L, *shape); a single tensor as a view, so that changing it in place changes the tensor."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _together(values: Sequence[Tensor]) -> Tensor:
    """Return scalars as one tensor on the device of the first: a model may lie on several."""
    return torch.stack([value.to(values[0].device) for value in values])


def _to_host(values: Tensor) -> list[Tensor]:
    """Return the entries as tensors on the host that are filled when the device gets there, without waiting for it."""
    if values.device.type == "cuda":
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        return list(host.copy_(values, non_blocking=True).unbind())
    return list(values.cpu().unbind())


def _adapted(iterations: int, quality: float) -> int:
    """Return how many power iterations to take after a measured quality."""
    if quality < ENOUGH:
        return min(iterations + 1, MEASURE_BY)
    return max(iterations - 1, 1) if quality > PLENTY else iterations


def _scale_inside(members: list[Tensor], ball: NormBall, group: dict[str, Any]) -> Tensor:
    if is_sharded(members):
        shrinkage = _shards(members, group).shrinkage(ball, [local_piece(p) for p in members])
    else:
        shrinkage = ball.shrinkage(members)
    for p in members:
        local_piece(p).div_(shrinkage.to(p.dtype))
    return shrinkage


# --- tensors in pieces on many processes ------------------------------------------------------------------------------


def _gradient(p: Tensor) -> Tensor:
    """Return the gradient of p, 0 where there is none; of a DTensor, this process's piece."""
    if p.grad is None:
        return torch.zeros_like(local_piece(p))
    if not is_sharded([p]):
        return p.grad
    from pliant.optim import sharded as distributed

    return distributed.gradient_piece(p)


def _as_sharded(piece: Tensor, p: Tensor) -> Tensor:
    """Return the DTensor that lies on processes as p does, or the tensor itself where p is whole."""
    if not is_sharded([p]):
        return piece
    from pliant.optim import sharded as distributed

    return distributed.wrap(piece, p)


def _shards(members: list[Tensor], group: dict[str, Any]) -> Shards:
    from pliant.optim import sharded as distributed

    return distributed.Shards(members, [_name(p, group) for p in members])


def _as_ball(ball: NormBall | dict[str, Any] | None) -> NormBall | None:
    if not isinstance(ball, NormBall | dict | None):
        raise ValueError(f"'ball' must be a NormBall, its spec or None, got {ball!r}")
    return NormBall.from_spec(ball) if isinstance(ball, dict) else ball


def _name(parameter: Tensor, group: dict[str, Any]) -> str:
    for name, p in zip(group.get("param_names", []), group["params"], strict=False):
        if p is parameter:
            return str(name)
    return f"an unnamed parameter of shape {tuple(parameter.shape)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _kind(ball: NormBall | None) -> str:
    """Return what a schedule of k does not change: the norms, without k and radius."""
    if ball is None:
        return "no ball"
    lift, inner = type(ball.norm).__name__, getattr(ball.norm, "inner", None)
    lift = f"spatial {lift}" if getattr(ball.norm, "spatial", False) else lift
    return f"a {lift} ball" if inner is None else f"a {lift}({type(inner).__name__}) ball"


def _check_buffer(buffer: Tensor, p: Tensor, name: str) -> None:
    kept, kinds = (is_sharded([buffer]), is_sharded([p])), "torch.distributed.checkpoint.state_dict"
    if kept == (True, False):
        raise ValueError(
            f"the state of {name} lies on many processes, the parameter does not: save it with {kinds}."
            "get_optimizer_state_dict and the option full_state_dict=True"
        )
    if buffer.shape != p.shape:
        hint = f", as a state of another number of processes is: save and load with {kinds}" if any(kept) else ""
        raise ValueError(f"the state of {name} has shape {tuple(buffer.shape)}, not {tuple(p.shape)}{hint}")
    if kept == (False, True):
        raise ValueError(
            f"the state of {name} is whole, the parameter lies on many processes: load it with {kinds}."
            "set_optimizer_state_dict and the option full_state_dict=True"
        )
    if kept == (True, True) and buffer.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(f"the state of {name} lies on other processes than the parameter: save and load with {kinds}")


def _check_options(group: dict[str, Any], ball: NormBall | None) -> None:
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr must be >= 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if not 0 <= group["dampening"] < 1:
        raise ValueError(f"dampening must lie in [0, 1), got {group['dampening']}")
    if not decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {decay}")
    if decay and ball is not None:
        raise ValueError(
            f"weight_decay={decay} on a group with a ball: the ball is its regulariser; "
            "set weight_decay in the groups without a ball"
        )
    iterations = group["power_iterations"]
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        raise ValueError(f"power_iterations must be None or an integer >= 1, got {iterations!r}")
    if not group["persistence"] >= 0:
        raise ValueError(f"persistence must be >= 0, got {group['persistence']}")
    if group["persistence"] and ball is not None:
        if not isinstance(ball.norm, Rows | Channels):
            raise ValueError(
                f"persistence={group['persistence']} is for balls of rows or channels, got {ball.norm}: "
                "set it in their groups alone"
            )
        if group["rescale"] is not None:
            raise ValueError(f"persistence needs rescale=None, got {group['rescale']!r}")
    if group["fused"]:
        fused.library()  # its errors belong here
    if group["rescale"] not in RESCALES:
        raise ValueError(f"rescale must be one of {RESCALES}, got {group['rescale']!r}")


def _check_ball_fits(ball: NormBall | None, tensors: list[Tensor], *, joint: bool) -> None:
    if ball is None:
        return
    shapes = [p.shape for p in tensors]
    for members in [shapes] if joint else [[shape] for shape in shapes]:
        ball.norm.length(members)
