"""SFW: Stochastic Frank-Wolfe as a ``torch.optim.Optimizer``.

Per constrained tensor, with gradient g, momentum m and a ball of radius r:

    m ← μ·m + (1 − dampening)·g          (the first step takes m = g, as torch.optim.SGD does)
    v ← r · lmo(m)                       a vertex of the ball
    η ← clamp(lr · factor, 0, 1)
    θ ← (1 − η)·θ + η·v                  a convex combination: inside the ball if θ was

The class holds options, groups and state. ``momentum.py`` computes the first line; an oracle (``oracle.py``) finds v,
for tensors that are whole on this process (``local.py``) or in pieces on many (``sharded.py``); ``update.py`` computes
the last two. (Pokutta, Spiegel, Zimmer 2020, Deep neural network training with Frank-Wolfe, arXiv 2010.07243; Zimmer,
Spiegel, Pokutta 2022, arXiv 2205.11921.)

Limiting cases, each of them tested: an L2 ball with "fast-gradient" is SGD with weight decay lr·‖m‖/r; ``Lp(inf)``
without rescaling is sign-SGD with decay; ``Spectral(Lp(inf))`` without rescaling is Muon, whose polar factor is exact
for small matrices and within about 1 % from 32 directions on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pliant.dtensors import is_sharded, local_piece
from pliant.linalg import accumulation_dtype
from pliant.norms import Channels, NormBall, Rows, Spectral
from pliant.optim.balls import Group, ParsedBalls, as_ball, balls_over
from pliant.optim.checks import (
    Rescale,
    check_ball_fits,
    check_gradients,
    check_options,
    check_state,
    name_of,
    on_one_device,
)
from pliant.optim.kept_directions import keeps_directions, vertices_from_last_step
from pliant.optim.local import Local
from pliant.optim.momentum import accumulate, direction
from pliant.optim.oracle import Oracle
from pliant.optim.scratch import Scratch
from pliant.optim.update import step_towards

FAR_OUTSIDE = 2.0  # a first step that shrinks a parameter by more than this factor warns
# Tensors of up to this many entries are stacked. A larger one keeps a device busy alone, and a stack would need memory;
# on a CPU large tensors are faster one by one, in the cache, unless the number of operations dominates (Spectral).
BATCHED, BATCHED_ON_CPU, BATCHED_SPECTRAL = 2**20, 2**15, 2**18


class SFW(Optimizer):
    """Stochastic Frank-Wolfe with momentum, one optimizer for a whole model.

    A parameter group may carry a ``"ball"``: a :class:`~pliant.NormBall` or its spec; the group keeps the spec, plain
    data. Each tensor of the group has a ball of its own unless ``"joint"`` is True. A group without a ball takes the
    step of ``torch.optim.SGD``, the limit of the L2 ball with gradient rescaling for radius → ∞.

    The constructor never touches weights. The first step of a constrained parameter scales it radially into its ball
    and warns if that shrinks it by more than a factor of 2. Apart from that first step, and from ``check_finite``, a
    step does not wait for the device. On CUDA, torch's own singular value decompositions do wait; ``Spectral`` balls
    use them for matrices of up to 16 rows or columns, and for fewer than 32 directions of equal lengths (``KSparse``).

    The state of a parameter is its ``momentum_buffer`` and, under a large ``Spectral`` ball, its ``basis`` of k
    columns. On a CPU the optimizer also keeps memory for one vertex (``scratch``), as large as the largest tensor with
    a ball, or as all tensors of the largest joint ball.

    Parameters may be DTensors, cut by ``fully_shard`` (FSDP2) or by hand: every process then calls ``step`` and
    ``gap``, and the results equal those of one process with the whole tensors. See docs/distributed.md.

    Large entries of bf16 or fp16 *weights* freeze when η is below their resolution; such weights are scaled inside
    after every step, which costs a norm. Prefer float32 weights with autocast.

    Args:
        params: tensors, (name, tensor) pairs or groups, as for every optimizer; see :func:`pliant.constrain`.
        lr: step size, a number or a scalar tensor; ``rescale`` determines its meaning.
        momentum: μ in [0, 1).
        dampening: of the momentum, as in ``torch.optim.SGD``; without momentum it has no effect.
        weight_decay: L2 penalty, for groups without a ball only; a ball is the regulariser of its group.
        rescale: the factor of lr: ``"gradient"`` ‖m‖/‖θ−v‖, so that the step has length lr·‖m‖, as in SGD (default);
            ``"fast-gradient"`` ‖m‖/(D/2), without a pass over θ; ``"diameter"`` 1/D; None for 1, where lr itself is
            the convex weight. D is the L2 diameter of the ball.
        maximize: ascend instead of descend.
        check_finite: before a step changes anything, raise a FloatingPointError that names the parameters with a
            NaN or infinite gradient (costs one host synchronisation).
        power_iterations: block power iterations per step of ``Spectral`` balls, which keep their singular directions
            from step to step (small matrices are decomposed exactly). None: start with 1, and take more for a tensor if
            a measurement every 64 steps finds its vertices more than 2 % below what further iterations reach.
        persistence: α ≥ 0, for balls of ``Rows`` and ``Channels`` with ``rescale=None``: the oracle sees m with each
            row or channel multiplied by (‖θᵢ‖ / their mean)^α. With 0, the momentum alone determines the parts of a
            vertex; with 1, it is ‖mᵢ‖·‖θᵢ‖, the importance of Molchanov et al. 2017 (arXiv 1611.06440), and successive
            vertices agree more. The result is a vertex of the ball, but not the best one for m; :meth:`gap` ignores α.
        foreach: None or True: many tensors at a time, with ``torch._foreach`` operations for tensors without a ball,
            and one batch for small tensors with equal balls and shapes; False: one by one.
        capturable: never read a value of a tensor, so that a step can be captured in a CUDA graph; this turns off the
            warning in the first step, and the measurements for ``power_iterations``.

    Raises:
        ValueError: an option is out of range or does not suit the ball of its group, or a ball does not fit a tensor.
        TypeError: the parameters are a set, which has no order.
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
            "capturable": capturable,
            "ball": None,
            "joint": False,
        }
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop what can be rebuilt: memory for vertices, and the balls parsed from specs."""
        self._scratch = Scratch()
        self._balls = ParsedBalls()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; its ``"ball"`` is checked, with errors as in the constructor, and kept as plain data."""
        group = dict(param_group)
        if isinstance(group["params"], set):
            raise TypeError("optimizer parameters need an order: got a set, give a list")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.pop("param_names", None)
        if names is not None:
            group["params"] = list(zip(names, group["params"], strict=True))
        ball = as_ball(group.get("ball"))
        group["ball"] = None if ball is None else ball.to_spec()
        check_options({**self.defaults, **group}, ball)
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        check_ball_fits(ball, tensors, joint=group.get("joint", False))
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:  # a state saved by another version, or by SGD, may lack options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that ``state_dict`` returned; singular directions keep their own precision.

        Raises:
            ValueError: the state belongs to other tensors, another kind of ball or another number of processes. It is
                raised before anything changes.
        """
        check_state(self.param_groups, state_dict)
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
            check_ball_fits(self._balls.of(group), group["params"], joint=group["joint"])

    @torch.no_grad()
    def set_ball(self, group: Group, ball: NormBall) -> None:
        """Give a group of this optimizer another ball: its weights are scaled inside, its momentum is kept.

        The leading singular directions are kept, up to the number that the new ball needs. Errors are those of the
        constructor.
        """
        check_options(group, ball)
        check_ball_fits(ball, group["params"], joint=group["joint"])
        group["ball"] = ball.to_spec()
        started = [p for p in group["params"] if p in self.state]
        for p in started:
            if "basis" in self.state[p] and isinstance(ball.norm, Spectral):
                self.state[p]["basis"] = self.state[p]["basis"][:, : ball.norm.rank_of_vertices]
        for members in balls_over(started, group):
            self._scale_inside(members, ball, group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step and return the closure's loss, None without a closure.

        Raises:
            ValueError: a gradient is sparse or complex.
            FloatingPointError: a gradient is NaN or infinite, in a group with ``check_finite``.
            RuntimeError: likewise, a DTensor has a gradient on some processes only.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        self._start_new_parameters()
        for group in self.param_groups:
            ball = self._balls.of(group)
            if ball is None:
                self._sgd_step([p for p in group["params"] if p.grad is not None], group)
                continue
            for sets in _side_by_side(_sets_with_gradient(group), ball, group, self.state):
                self._constrained_step(sets, ball, group)
        return loss

    @torch.no_grad()
    def gap(self) -> Tensor:
        """Return the Frank-Wolfe gap ⟨θ, m⟩ + r·dual(m), summed over all balls, times (1 − μ)/(1 − dampening).

        The result is a scalar tensor, 0 before the first step. Without momentum, m is the current gradient, and the gap
        is NaN after ``zero_grad``. For full gradients and weights inside their balls the gap is >= 0 and certifies
        stationarity; with stochastic momentum it is an estimate. (Jaggi 2013, section 2.)
        """
        total = torch.zeros(())
        for group in self.param_groups:
            ball = self._balls.of(group)
            if ball is None:
                continue
            momentum = group["momentum"]
            factor = (1 - momentum) / (1 - group["dampening"]) if momentum else 1.0
            for members in balls_over([p for p in group["params"] if p in self.state], group):
                directions = [direction(p, self.state[p], group) for p in members]
                pieces = [local_piece(p) for p in members]
                gap = self._oracle([members], group).gap(ball, pieces, directions)
                total = total.to(members[0].device) + factor * gap
        return total

    @property
    def scratch(self) -> list[Tensor]:
        """The memory that is kept from step to step in addition to the state; its values are meaningless."""
        return self._scratch.kept

    # --- the two kinds of step ---

    def _sgd_step(self, parameters: list[Tensor], group: Group) -> None:
        lr = group["lr"]
        for batch in [parameters] if group["foreach"] is not False else [[p] for p in parameters]:
            if not batch:
                return
            states = [self.state[p] for p in batch]
            directions = accumulate(batch, states, group, weight_decay=group["weight_decay"])
            pieces = [local_piece(p) for p in batch]
            if isinstance(lr, Tensor):
                torch._foreach_sub_(pieces, [m * lr.to(m.device, m.dtype) for m in directions])
            else:
                torch._foreach_add_(pieces, directions, alpha=-lr)

    def _constrained_step(self, sets: list[list[Tensor]], ball: NormBall, group: Group) -> None:
        """Move the tensors of equal balls: L lists of J tensors, where L or J is 1, of equal shapes if L > 1."""
        norm, oracle = ball.norm, self._oracle(sets, group)
        states = [[self.state[p] for p in members] for members in sets]
        momenta = [accumulate(members, own, group) for members, own in zip(sets, states, strict=True)]
        # Both are J stacks (L, *shape).
        directions, weights = oracle.stacks(momenta), oracle.stacks([[local_piece(p) for p in ps] for ps in sets])
        if group["persistence"] and isinstance(norm, Rows | Channels):
            directions = oracle.persistent(norm, directions, weights, group["persistence"])
        memory = self._scratch.like(directions) if oracle.takes_memory(directions) else None
        if isinstance(norm, Spectral) and keeps_directions(norm, oracle.shapes):
            lengths, directions = oracle.well_scaled(directions)
            vertices = vertices_from_last_step(oracle, norm, directions, states, group, memory)
        else:
            lengths, vertices = oracle.vertices(norm, directions, memory)
        step_towards(
            weights,
            lengths,
            vertices,
            memory,
            radius=ball.radius,
            diameter=ball.diameter(oracle.shapes),
            lr=group["lr"],
            rescale=group["rescale"],
            l2_norm=oracle.length,
        )
        if len(sets) > 1:
            torch._foreach_copy_([p for (p,) in sets], list(weights[0].unbind(0)))
        for members in sets:
            if any(p.dtype != accumulation_dtype(p) for p in members):
                # With a small η, large entries in half precision do not shrink, but small ones grow.
                self._scale_inside(members, ball, group)

    def _oracle(self, sets: Sequence[Sequence[Tensor]], group: Group) -> Oracle:
        """Return the oracle over tensors, whole or sharded."""
        members = sets[0]
        if not is_sharded(members):
            return Local([p.shape for p in members])
        from pliant.optim.sharded import Sharded  # imported here: whole tensors need no torch.distributed

        return Sharded(members, [name_of(p, group) for p in members])

    def _scale_inside(self, members: Sequence[Tensor], ball: NormBall, group: Group) -> Tensor:
        """Scale the tensors of one ball into it; return the factor that they were divided by, a scalar tensor."""
        pieces = [local_piece(p) for p in members]
        shrinkage = self._oracle([members], group).shrinkage(ball, pieces)
        for piece in pieces:
            piece.div_(shrinkage.to(piece.dtype))
        return shrinkage

    def _start_new_parameters(self) -> None:
        """Scale parameters into their balls before their first step; warn once about those far outside."""
        names, shrinkages = [], []
        for group in self.param_groups:
            ball = self._balls.of(group)
            if ball is None or all(p in self.state for p in group["params"]):
                continue
            for members in _sets_with_gradient(group):
                if any(p not in self.state for p in members):
                    names.append(name_of(members[0], group))
                    shrinkages.append(self._scale_inside(members, ball, group))
        if not shrinkages or shrinkages[0].is_meta or any(group["capturable"] for group in self.param_groups):
            return
        factors = on_one_device(shrinkages).tolist()
        far = [(factor, name) for factor, name in zip(factors, names, strict=True) if factor > FAR_OUTSIDE]
        if far:
            factor, name = max(far)
            warnings.warn(
                f"{len(far)} constrained parameters started outside of their balls and were shrunk, {name} by a factor "
                f"of {factor:.3g}; if they were trained before, a larger radius keeps what they learned",
                stacklevel=5,  # past step() and the wrappers torch puts around it
            )


def _side_by_side(
    sets: Sequence[list[Tensor]], ball: NormBall, group: Group, states: Mapping[Tensor, Any]
) -> list[list[list[Tensor]]]:
    """Return the sets in batches: one batch for all sets that a step can handle side by side, in one stack."""
    batches: dict[Any, list[list[Tensor]]] = {}
    on_cpu = BATCHED_SPECTRAL if isinstance(ball.norm, Spectral) else BATCHED_ON_CPU
    for index, members in enumerate(sets):
        p = members[0]
        most = on_cpu if p.device.type == "cpu" else BATCHED
        alone = group["joint"] or group["foreach"] is False or p.numel() > most or is_sharded(members)
        state = states.get(p, {})
        width = state["basis"].shape[-1] if "basis" in state else None
        pace = (width, state.get("iterations"), state.get("steps"))
        key = index if alone else (p.shape, p.stride(), p.dtype, p.device, *pace)
        batches.setdefault(key, []).append(members)
    return list(batches.values())


def _sets_with_gradient(group: Group) -> list[list[Tensor]]:
    """Return the tensors that move together: single ones with a gradient, or all of a joint ball.

    If only some tensors of a joint ball have gradients, all of them move, with missing gradients counting as 0: moving
    only some would not be a convex combination.
    """
    parameters: list[Tensor] = group["params"]
    if group["ball"] is not None and group["joint"]:
        return [parameters] if any(p.grad is not None for p in parameters) else []
    return [[p] for p in parameters if p.grad is not None]
