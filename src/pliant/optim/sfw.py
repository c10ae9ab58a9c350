"""SFW: Stochastic Frank-Wolfe as a ``torch.optim.Optimizer``.

Per constrained tensor, with gradient g, momentum m and a ball of radius r:

    m ← μ·m + (1 − dampening)·g          (the first step takes m = g, as torch.optim.SGD does)
    v ← r · lmo(m)                       a vertex of the ball
    η ← clamp(lr · factor, 0, 1)
    θ ← (1 − η)·θ + η·v                  a convex combination: inside the ball if θ was

The class holds options, groups and state; ``moves.py`` takes the steps. ``momentum.py`` computes the first line; an
oracle (``oracle.py``) finds v, for tensors that are whole on this process (``local.py``) or in pieces on many
(``sharded.py``); ``update.py`` computes the last two. (Pokutta, Spiegel, Zimmer 2020, Deep neural network training with
Frank-Wolfe, arXiv 2010.07243; Zimmer, Spiegel, Pokutta 2022, arXiv 2205.11921.)

Limiting cases, each of them tested: an L2 ball with "fast-gradient" is SGD with weight decay lr·‖m‖/r; ``Lp(inf)``
without rescaling is sign-SGD with decay; ``Spectral(Lp(inf))`` without rescaling is Muon, with the polar factor itself
where ``exact`` asks for it and for matrices of fewer than 32 directions, otherwise with Newton-Schulz steps as Muon's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pliant.norms import NormBall
from pliant.optim import annealing, thresholding
from pliant.optim.annealing import COURSE
from pliant.optim.balls import Group, ParsedBalls, as_ball, balls_over
from pliant.optim.checks import Rescale, check_ball_fits, check_gradients, check_options
from pliant.optim.feasibility import (
    Scaled,
    bring_all_inside,
    bring_moving_tensors_inside,
    warn_if_far,
    which_are_inside,
)
from pliant.optim.kept_directions import fit_directions
from pliant.optim.loading import after_hooks, check_state, entries, keep_formats, only_makes_states, with_schedules
from pliant.optim.moves import (
    constrained_step,
    gap_of,
    scale_inside,
    sets_with_gradient,
    settle,
    sgd_step,
    side_by_side,
)
from pliant.optim.scratch import Scratch
from pliant.optim.thresholding import DEBT


class SFW(Optimizer):
    """Stochastic Frank-Wolfe with momentum, one optimizer for a whole model.

    A parameter group may carry a ``"ball"``: a :class:`~pliant.NormBall` or its spec; the group keeps the spec, plain
    data. Each tensor of the group has a ball of its own unless ``"joint"`` is True. A group without a ball takes the
    step of ``torch.optim.SGD``, the limit of the L2 ball with gradient rescaling for radius → ∞.

    The constructor never touches weights. The first step of a constrained parameter scales it radially into its ball
    and warns if that shrinks it by more than a factor of 2. So does the first step after a state was loaded, or after
    the ball of a group has changed. Weights that you change yourself, as by ``model.load_state_dict`` after a step, are
    not looked at again: call :meth:`bring_inside`. Apart from those first steps, and from ``check_finite``, a step does
    not wait for the device. On CUDA, torch's own singular value decompositions do wait; ``Spectral`` balls use them for
    matrices of up to 16 rows or columns, and for fewer than 32 directions of equal lengths (``KSparse``).

    The state of a parameter is its ``momentum_buffer`` and, under a large ``Spectral`` ball, its ``basis`` of k
    columns. On a CPU the optimizer also keeps memory for one vertex (``scratch``), as large as the largest tensor with
    a ball, or as all tensors of the largest joint ball.

    Parameters may be DTensors, cut by ``fully_shard`` (FSDP2) or by hand: every process then calls ``step`` and
    ``gap``, and the results equal those of one process with the whole tensors. See docs/distributed.md.

    Large entries of bf16 or fp16 *weights* freeze when η is below their resolution; such weights are scaled inside
    after every step, which costs a norm. Prefer float32 weights with autocast.

    Args:
        params: tensors, (name, tensor) pairs or groups, as for every optimizer; see :func:`pliant.constrain`.
        lr: step size, a finite number >= 0 or a tensor with one element; ``rescale`` determines its meaning.
        momentum: μ in [0, 1).
        dampening: of the momentum, as in ``torch.optim.SGD``; without momentum it has no effect.
        weight_decay: L2 penalty, for groups without a ball only; a ball is the regulariser of its group.
        rescale: the factor of lr: ``"gradient"`` ‖m‖/‖θ−v‖, so that the step has length lr·‖m‖, as in SGD (default);
            ``"fast-gradient"`` ‖m‖/(D/2), without a pass over θ; ``"diameter"`` 1/D; None for 1, where lr itself is
            the convex weight. D is the L2 diameter of the ball.
        maximize: ascend instead of descend.
        check_finite: before a step changes anything, raise a FloatingPointError that names the parameters with a
            NaN or infinite gradient (costs one host synchronisation). Where it costs none, gradients of tensors with a
            ball are always checked: on a CPU, and where the vertex is found by a decomposition, which waits.
        power_iterations: block power iterations per step of ``Spectral`` balls, which keep their singular directions
            from step to step (small matrices are decomposed exactly). None: start with 1, and take more for a tensor if
            a measurement every 64 steps finds its vertices more than 2 % below what further iterations reach.
        persistence: α ≥ 0, for balls of ``Rows`` and ``Channels`` with ``rescale=None``: the oracle sees m with each
            row or channel multiplied by (‖θᵢ‖ / their mean)^α. With 0, the momentum alone determines the parts of a
            vertex; with 1, it is ‖mᵢ‖·‖θᵢ‖, the importance of Molchanov et al. 2017 (arXiv 1611.06440), and successive
            vertices agree more. The result is a vertex of the ball, but not the best one for m; :meth:`gap` ignores α.
        exact: find the vertices of ``Spectral`` balls by decompositions in float32 or wider, whatever the size of the
            matrices. Without it, matrices of more than 16 rows and columns have approximate ones: kept directions, see
            ``power_iterations``; and for balls whose vertices have full rank, from 32 directions on, seven
            Newton-Schulz steps, which miss singular values far below the largest (docs/constraints.md has figures).
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
        exact: bool = False,
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
            "exact": exact,
            "foreach": foreach,
            "capturable": capturable,
            "ball": None,
            "joint": False,
        }
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop what can be rebuilt: memory for vertices, balls parsed from specs, which tensors are in their balls."""
        self._scratch = Scratch()
        self._balls = ParsedBalls()
        self._scaled = Scaled()
        self._unclaimed: set[str] = set()

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
        check_options({**self.defaults, **group}, ball)
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        check_ball_fits(ball, tensors, joint=group.get("joint", False))
        whole = {**self.defaults, **group, "params": tensors, **({} if names is None else {"param_names": names})}
        if COURSE not in group:
            course = annealing.course_for_a_late_group(ball, whole, self.param_groups)
            if ball is not None and course is not None:
                group[COURSE] = course
                ball = annealing.annealed(ball, {**whole, COURSE: course}) or ball
        if DEBT not in group:
            debt = thresholding.debt_of_a_late_group(ball, whole, self.param_groups)
            group |= {} if debt is None else {DEBT: debt}
        group["ball"] = None if ball is None else ball.to_spec()
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        # An option of torch's own optimizers that torch adds to all when it loads: no group must get it from here.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:  # a state saved by another version, or by SGD, may lack options
            group.pop("differentiable", None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._unclaimed |= {COURSE, DEBT} & set(group)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that ``state_dict`` returned; what schedules have counted is part of it.

        Hooks see it first, and what they make of it is checked. Singular directions keep their own precision, and so
        does a float32 momentum of weights in half precision. The next step scales weights into the loaded balls.

        Raises:
            ValueError: the state belongs to other tensors, to a ball that differs in more than k and radius, or to
                another number of processes. It is raised before anything changes.
        """
        state_dict = after_hooks(self._optimizer_load_state_dict_pre_hooks.values(), self, state_dict)
        check_state(self.param_groups, self.defaults, state_dict)
        state_dict = with_schedules(self.param_groups, state_dict)
        claimed = {key: entries(self.param_groups, key) for key in (COURSE, DEBT) if key not in self._unclaimed}
        names = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"
        hooks = {name: getattr(self, name) for name in names}
        vars(self).update({name: OrderedDict() for name in names})  # they run once, around all of this
        try:
            super().load_state_dict(state_dict)
        finally:
            vars(self).update(hooks)
        keep_formats(self.param_groups, self.state, state_dict)
        # What has gone out and in again, as when Accelerate prepares an optimizer, is still its schedule's.
        self._unclaimed -= {key for key, old in claimed.items() if old == entries(self.param_groups, key)}
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def claim(self, key: str) -> bool:
        """Return whether a loaded state has something under a key that no schedule has taken over; that ends here."""
        found = key in self._unclaimed
        self._unclaimed.discard(key)
        return found

    @torch.no_grad()
    def set_ball(self, group: Group, ball: NormBall | dict[str, Any] | None) -> None:
        """Give a group of this optimizer another ball: its weights are scaled inside, its momentum is kept.

        The leading singular directions are kept, up to the number that the new ball needs. A :class:`~pliant.KSchedule`
        goes on with the new ball if all its k fit there; else it ends for this group.

        Args:
            group: one of ``param_groups``.
            ball: the ball or its spec; None for no ball.

        Raises:
            ValueError: the group is not one of this optimizer; else as in the constructor. Nothing has changed then.
        """
        if not any(group is own for own in self.param_groups):
            raise ValueError(
                "set_ball needs a group of this optimizer, got another dict: take it from param_groups, in which "
                "load_state_dict puts new ones"
            )
        ball = as_ball(ball)
        check_options(group, ball)
        check_ball_fits(ball, group["params"], joint=group["joint"])
        if COURSE in group and not annealing.suits(group, ball):
            del group[COURSE]
        self._change_ball(group, ball)

    def _change_ball(self, group: Group, ball: NormBall | None) -> None:
        group["ball"] = None if ball is None else ball.to_spec()
        started = [p for p in group["params"] if p in self.state]
        for p in started:
            fit_directions(self.state[p], ball)
        if ball is None:
            return
        for members in balls_over(started, group):
            scale_inside(members, ball, group)
            self._scaled.note(members, ball, group)

    def inside(self) -> dict[str, bool]:
        """Return for each tensor with a ball, by name, whether it is in its ball; on many processes, all must ask.

        Tensors of a joint ball are inside together. A tensor with NaN or infinite entries is not inside.
        """
        with torch.no_grad():
            return which_are_inside(self.param_groups, self._balls)

    def bring_inside(self) -> dict[str, float]:
        """Scale all tensors with a ball into it now; on many processes, all must call it.

        Steps keep weights inside, and cannot see when others change them: call this after ``model.load_state_dict`` or
        another change of weights that have taken steps. It warns as the first step does.

        Returns:
            The factor by which each tensor was shrunk, by name, for those that were outside.
        """
        with torch.no_grad():
            shrunk = bring_all_inside(self.param_groups, self._balls, self._scaled)
        warn_if_far(shrunk, stacklevel=3)
        return shrunk

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step and return the closure's loss, None without a closure.

        Raises:
            ValueError: a gradient is sparse or complex, or an lr is NaN or infinite.
            FloatingPointError: a gradient is NaN or infinite, in a group with ``check_finite``, or of a tensor with a
                ball where it costs no wait to know.
            RuntimeError: under ``check_finite``, a DTensor has a gradient on some processes only.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups, self._balls)
        counts = not only_makes_states(self.param_groups, self.state)
        if counts:
            bring_moving_tensors_inside(self.param_groups, self._balls, self.state, self._scaled)
        for group in self.param_groups:
            ball = self._balls.of(group)
            if ball is None:
                sgd_step([p for p in group["params"] if p.grad is not None], group, self.state)
                continue
            for sets in side_by_side(sets_with_gradient(group), ball, group, self.state):
                constrained_step(sets, ball, group, self.state, self._scratch)
                if counts:
                    settle(sets, ball, group)
        if counts and any(key in group for key in (COURSE, DEBT) for group in self.param_groups):
            self._count_step()
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _count_step(self) -> None:
        """Let what schedules keep in the groups count a step; replays of CUDA graphs are counted by the schedules."""
        groups = [group for group in self.param_groups if not group["capturable"]]
        for group in groups:
            if DEBT in group:
                thresholding.count_step(self._balls.of(group), group, self.state)
        for group in groups:
            if COURSE in group:
                ball = annealing.count_step(self._balls.of(group), group)
                if ball is not None:
                    self._change_ball(group, ball)

    @torch.no_grad()
    def gap(self) -> Tensor:
        """Return the Frank-Wolfe gap ⟨θ, m⟩ + r·dual(m), summed over all balls, times (1 − μ)/(1 − dampening).

        The result is a scalar tensor, 0 before the first step. Without momentum, m is the current gradient, and the gap
        is NaN after ``zero_grad``. For full gradients and weights inside their balls the gap is >= 0 and certifies
        stationarity; with stochastic momentum it is an estimate. (Jaggi 2013, section 2.)
        """
        total = torch.zeros((), device="cpu")
        for group in self.param_groups:
            ball = self._balls.of(group)
            if ball is None:
                continue
            for members in balls_over([p for p in group["params"] if p in self.state], group):
                total = total.to(members[0].device) + gap_of(members, ball, group, self.state)
        return total

    @property
    def scratch(self) -> list[Tensor]:
        """The memory that is kept from step to step in addition to the state; its values are meaningless."""
        return self._scratch.kept
