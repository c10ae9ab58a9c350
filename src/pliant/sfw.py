"""SFW: Stochastic Frank-Wolfe as a ``torch.optim.Optimizer``.

Per constrained tensor, with gradient g, momentum m and a ball of radius r:

    m ← μ·m + (1 − dampening)·g          (the first step takes m = g, as torch.optim.SGD does)
    v ← r · lmo(m)                       a vertex of the ball
    η ← clamp(lr · factor, 0, 1)
    θ ← (1 − η)·θ + η·v                  a convex combination: inside the ball if θ was

The class keeps the state; :func:`sfw_update` holds the last two lines. (Pokutta, Spiegel, Zimmer 2020, Deep neural
network training with Frank-Wolfe, arXiv 2010.07243; Zimmer, Spiegel, Pokutta 2022, arXiv 2205.11921.)

Limiting cases, each one a test: an L2 ball with "fast-gradient" is SGD with weight decay lr·‖m‖/r; ``Lp(inf)`` without
rescaling is sign-SGD with decay; ``Spectral(Lp(inf))`` without rescaling is Muon with an exact polar factor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pliant.ball import NormBall
from pliant.linalg import accumulation_dtype, divide_or_zero, l2_norm
from pliant.norms import Spectral

Rescale = Literal["gradient", "fast-gradient", "diameter"] | None
FAR_OUTSIDE = 2.0  # a first step that shrinks a parameter by more than this factor warns
RESCALES: tuple[Rescale, ...] = ("gradient", "fast-gradient", "diameter", None)


class SFW(Optimizer):
    """Stochastic Frank-Wolfe with momentum, one optimizer for a whole model.

    A parameter group may carry a ``"ball"``: a :class:`~pliant.NormBall` or its spec (plain data, which is what the
    group then holds). Each tensor of the group has a ball of its own unless ``"joint"`` is True. A group without a ball
    takes the step of ``torch.optim.SGD``, the limit of the L2 ball with gradient rescaling for radius → ∞.

    Constructing never touches weights. The first step of a constrained parameter scales it radially into its ball and
    warns if that shrinks it by more than a factor of 2. Apart from that first step, and from ``check_finite``, a step
    asks for no value of a tensor, so it does not wait for the device; on CUDA, torch's own singular value
    decompositions do, which small ``Spectral`` balls use.

    bf16 or fp16 *weights* freeze when η is below their resolution; keep float32 weights and use autocast.

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
        power_iterations: block power iterations per step for large ``Spectral`` balls, which keep their singular basis
            from step to step; small ones use an exact decomposition.
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
        power_iterations: int = 1,
    ) -> None:
        if not isinstance(power_iterations, int) or power_iterations < 1:
            raise ValueError(f"power_iterations must be an integer >= 1, got {power_iterations!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "rescale": rescale,
            "maximize": maximize,
            "check_finite": check_finite,
            "power_iterations": power_iterations,
            "ball": None,
            "joint": False,
        }
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
        for group in self.param_groups:  # a state saved by another version, or by SGD, may lack options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by ``state_dict``; the singular bases keep their own precision."""
        super().load_state_dict(state_dict)
        # torch casts every floating-point state to its parameter's dtype; a basis in bf16 would not be orthonormal.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, parameters, strict=True):
            basis = state_dict["state"].get(index, {}).get("basis")
            if basis is not None:
                self.state[p]["basis"] = basis.to(p.device, copy=True)
        for group in self.param_groups:
            _check_ball_fits(_as_ball(group["ball"]), group["params"], joint=group["joint"])

    @torch.no_grad()
    def set_ball(self, group: dict[str, Any], ball: NormBall) -> None:
        """Give a group of this optimizer another ball: its weights are scaled inside, its momentum is kept."""
        _check_options(group, ball)
        _check_ball_fits(ball, group["params"], joint=group["joint"])
        group["ball"] = ball.to_spec()
        started = [p for p in group["params"] if p in self.state]
        for members in [started] if group["joint"] else [[p] for p in started]:
            if members:
                _scale_inside(members, ball)

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
            for members in self._sets_with_gradient(group):
                if ball is None:
                    self._sgd_step(members, group)
                else:
                    self._constrained_step(members, ball, group)
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
                total = total.to(members[0].device) + factor * ball.gap(members, directions)
        return total

    # --- the two kinds of step ---

    def _sgd_step(self, members: list[Tensor], group: dict[str, Any]) -> None:
        (p,) = members
        gradient = _signed_gradient(p, group)
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        m, lr = self._accumulate(p, gradient, group), group["lr"]
        if isinstance(lr, Tensor):
            p.addcmul_(m, lr.to(p.device, p.dtype), value=-1)
        else:
            p.add_(m, alpha=-lr)

    def _constrained_step(self, members: list[Tensor], ball: NormBall, group: dict[str, Any]) -> None:
        directions = [self._accumulate(p, _signed_gradient(p, group), group) for p in members]
        vertices = self._vertices(members, directions, ball, group["power_iterations"])
        sfw_update(members, directions, vertices, ball, lr=group["lr"], rescale=group["rescale"])

    def _vertices(
        self, members: list[Tensor], directions: list[Tensor], ball: NormBall, iterations: int
    ) -> list[Tensor]:
        p, norm = members[0], ball.norm
        if len(members) > 1 or not isinstance(norm, Spectral) or not norm.uses_warm_start(p.shape):
            return ball.lmo(directions)
        vertex, basis = norm.lmo_warm(directions[0], self.state[p].get("basis"), iterations)
        self.state[p]["basis"] = basis
        return [ball.radius * vertex]

    # --- state ---

    def _start_new_parameters(self) -> None:
        """Scale parameters that take their first step into their balls; warn once about those far outside."""
        names, shrinkages = [], []
        for group in self.param_groups:
            ball = _as_ball(group["ball"])
            if ball is None:
                continue
            name_of = dict(zip(group["params"], _names(group), strict=True))
            for members in self._sets_with_gradient(group):
                if any(p not in self.state for p in members):
                    names.append(name_of[members[0]])
                    shrinkages.append(_scale_inside(members, ball))
        if not shrinkages or shrinkages[0].is_meta:
            return
        far = [
            (factor, name)
            for factor, name in zip(torch.stack(shrinkages).tolist(), names, strict=True)
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

    def _accumulate(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Fold the gradient into the momentum of p and return the direction of this step."""
        state, momentum = self.state[p], group["momentum"]
        if not momentum:
            state["momentum_buffer"] = None  # an entry all the same: it marks that p has been scaled inside
            return gradient
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = gradient.clone(memory_format=torch.preserve_format)
        else:
            buffer.mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        return buffer

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        buffer: Tensor | None = self.state[p].get("momentum_buffer")
        if buffer is None:
            return torch.full_like(p, math.nan) if p.grad is None else _signed_gradient(p, group)
        return buffer

    def _check_gradients(self) -> None:
        """Refuse a gradient that no step can be taken with, before anything has changed."""
        checked: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            for name, p in zip(_names(group), group["params"], strict=True):
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    raise ValueError(f"SFW needs dense, real gradients, got {p.grad.layout} {p.grad.dtype} in {name}")
                if group["check_finite"]:
                    checked.append((name, p.grad))
        if not checked:
            return
        # One reduction per tensor, one transfer for all.
        finite = torch.stack([torch.isfinite(gradient).all() for _, gradient in checked]).tolist()
        bad = [name for (name, _), ok in zip(checked, finite, strict=True) if not ok]
        if bad:
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise FloatingPointError(f"NaN or infinite gradient in {shown}; the step was refused, nothing has changed")


def sfw_update(
    weights: list[Tensor],
    directions: list[Tensor],
    vertices: list[Tensor],
    ball: NormBall,
    *,
    lr: float | Tensor,
    rescale: Rescale,
) -> None:
    """Move the weights of one ball towards its vertices in place: θ ← (1 − η)·θ + η·v.

    A zero direction leaves θ unchanged, and θ = v takes η = 1 (it is already there).

    Args:
        weights: the tensors of one ball, changed in place.
        directions: momentum or gradient, of the same shapes.
        vertices: ``ball.lmo(directions)``, exact or approximate.
        ball: the ball.
        lr: step size before rescaling.
        rescale: as in :class:`SFW`.
    """
    length = l2_norm(directions)
    if rescale is None or rescale == "diameter":
        length = divide_or_zero(length, length)  # 1, or 0 for a zero direction, or NaN for NaN
    match rescale:
        case "gradient":
            reference = l2_norm([w - v for w, v in zip(weights, vertices, strict=True)])
        case "fast-gradient":
            reference = torch.full_like(length, ball.diameter([w.shape for w in weights]) / 2)
        case "diameter":
            reference = torch.full_like(length, ball.diameter([w.shape for w in weights]))
        case None:
            reference = torch.ones_like(length)
    travel = length * lr
    eta = torch.where(travel == 0, travel, (travel / reference).clamp(0, 1))
    for w, v in zip(weights, vertices, strict=True):
        if w.dtype == accumulation_dtype(w):
            w.lerp_(v, eta.to(w.dtype))
        else:
            w.copy_(w.to(eta.dtype).lerp(v.to(eta.dtype), eta))


def _signed_gradient(p: Tensor, group: dict[str, Any]) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    return -p.grad if group["maximize"] else p.grad


def _scale_inside(members: list[Tensor], ball: NormBall) -> Tensor:
    shrinkage = ball.shrinkage(members)
    for p in members:
        p.div_(shrinkage.to(p.dtype))
    return shrinkage


def _as_ball(ball: NormBall | dict[str, Any] | None) -> NormBall | None:
    if not isinstance(ball, NormBall | dict | None):
        raise ValueError(f"'ball' must be a NormBall, its spec or None, got {ball!r}")
    return NormBall.from_spec(ball) if isinstance(ball, dict) else ball


def _names(group: dict[str, Any]) -> list[str]:
    shapes = [f"an unnamed parameter of shape {tuple(p.shape)}" for p in group["params"]]
    return list(group.get("param_names", shapes))


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
    if group["rescale"] not in RESCALES:
        raise ValueError(f"rescale must be one of {RESCALES}, got {group['rescale']!r}")


def _check_ball_fits(ball: NormBall | None, tensors: list[Tensor], *, joint: bool) -> None:
    if ball is None:
        return
    shapes = [p.shape for p in tensors]
    for members in [shapes] if joint else [[shape] for shape in shapes]:
        ball.norm.length(members)
