"""The base of most baselines: SGD that changes the gradients before a step, or the weights after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD

from pliant.experiments.baselines.matrices import as_matrices, write_matrices


class MatrixSGD(SGD):
    """SGD with momentum and weight decay, and two methods that a subclass may override.

    A group with a ``"row_dim"`` holds the weights that the method acts on, each read as matrices (blocks, rows,
    columns), one row per output; all other groups take plain SGD steps. :meth:`before` adds the gradient of a penalty
    directly: the step is the same as with a penalty in the loss, without a graph or automatic differentiation of a
    decomposition.

    Args:
        params: parameter groups; groups of matrices have ``"row_dim"`` and ``"blocks"``.
        lr: learning rate.
        momentum: as in ``torch.optim.SGD``.
        weight_decay: as in ``torch.optim.SGD``.
        options: values for :attr:`options`; a group may have its own.

    Raises:
        TypeError: the method has no such option.
    """

    options: ClassVar[dict[str, Any]] = {}
    """The method's own settings, with their defaults."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, **options: Any
    ) -> None:
        strange = options.keys() - self.options.keys()
        if strange:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(strange))}")
        self._chosen = {**self.options, **options}
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one with a ``"row_dim"`` gets the options of the method."""
        if param_group.get("row_dim") is None:
            super().add_param_group({"row_dim": None, **param_group})
        else:
            super().add_param_group({"blocks": 1, **self._chosen, **param_group})

    def before(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        """Return the gradient to use instead of ``g``; None to keep ``g``.

        Args:
            w: the weight, (blocks, rows, columns).
            g: its gradient, (blocks, rows, columns).
            state: the optimizer's state of the parameter.
            group: its parameter group.

        Returns:
            A tensor (blocks, rows, columns), or None.
        """
        return None

    def after(self, w: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        """Return the weights to use instead of ``w`` after the step; None to keep ``w``.

        Args:
            w: the weight after the step, (blocks, rows, columns).
            state: the optimizer's state of the parameter.
            group: its parameter group.

        Returns:
            A tensor (blocks, rows, columns), or None.
        """
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step and return the closure's loss, None without a closure.

        Raises:
            FloatingPointError: a gradient is NaN or infinite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_finite()
        for p, group in self._weights():
            assert p.grad is not None
            w, g = (as_matrices(x, group["row_dim"], group["blocks"]) for x in (p, p.grad))
            new = self.before(w, g, self.state[p], group)
            if new is not None:
                write_matrices(new, p.grad, group["row_dim"])
        super().step()
        for p, group in self._weights():
            new = self.after(as_matrices(p, group["row_dim"], group["blocks"]), self.state[p], group)
            if new is not None:
                write_matrices(new, p, group["row_dim"])
        return loss

    def _weights(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            if group["row_dim"] is not None:
                yield from ((p, group) for p in group["params"] if p.grad is not None)

    def _check_finite(self) -> None:
        # One reduction per tensor, but a single transfer to the host.
        named = [
            (name, p.grad)
            for group in self.param_groups
            for name, p in zip(_names(group), group["params"], strict=True)
            if p.grad is not None
        ]
        finite = torch.stack([g.isfinite().all().to(named[0][1].device) for _, g in named]).tolist() if named else []
        bad = [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
        if bad:
            raise FloatingPointError(f"NaN or infinite gradient in {', '.join(bad[:5])}; the step was refused")


def _names(group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [f"a tensor of shape {tuple(p.shape)}" for p in group["params"]]
