"""The proof that channels can leave: in float64, a network without them equals its masked twin.

The *masked twin* has the dense shapes, and only the input columns that read removed channels are zero. Both networks
are copies of one that has random weights and BatchNorm statistics, because zeros in trained ones would hide a mistake.
They are compared in eval mode and in training mode, where branches may run that eval mode does not know, on everything
that they return or keep on their modules. Nothing of the user's model changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pliant.calling import Inputs, duplicate, kept_results, map_tensors, results_of, run, tensors_of
from pliant.errors import first_line
from pliant.structure.attention import is_conv1d
from pliant.structure.draws import SameDraws, differing, in_double, seeded
from pliant.structure.layers import AxisName, complement, keep_channels, weighted_layers, zero_channels

Removed = Mapping[tuple[str, AxisName], Tensor]
"""(layer, axis) → int64 (n,), the positions that leave."""

_TOLERANCE = 1e-8  # relative; float64 networks of a hundred layers agree to about 1e-13
_SEEDS = 5  # how often training mode is tried with other draws if some parameters are not read yet
_SPREAD = 0.3  # of weights that are kept but for noise


@dataclass(frozen=True)
class _Trial:
    """A way to run both networks: the mode, and the seed of their draws, None if there are none."""

    inputs: Inputs
    training: bool
    seed: int | None


class Proof:
    """Compares networks without some channels with their masked twins.

    Args:
        model: the network, on whose architecture everything depends; not changed.
        inputs: inputs that it takes in eval mode.

    Attributes:
        model: the copy with random weights.
        problem: why nothing can be compared, or None.
        untrained: why training mode cannot be compared, or None.
        training_only: inputs and seeds of :class:`SameDraws` for which training mode reads parameters that eval mode
            does not.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.problem: str | None = None
        self.untrained: str | None = None
        self.training_only: list[tuple[Inputs, int]] = []
        self._read: set[str] = set()
        self._draws = False
        self.model, given, self._everything = self._start(model, inputs)
        _drop_nothing(self.model)
        self._eval = _Trial(given, training=False, seed=0 if self._draws else None)
        self._train: list[_Trial] = []
        if self.problem is None:
            self._try_training(given)

    @property
    def unread(self) -> list[str]:
        """The names of the parameters that no trial reads."""
        return sorted({name for name, _ in self.model.named_parameters()} - self._read)

    def attempt(self, small: nn.Module) -> None:
        """Run a network that is part of the model in both modes, and raise what its forward raises."""
        for trial in (self._eval, *self._train):
            with self._conditions():
                self._trial_run(small, trial, {})

    def fault(self, removed: Removed, *, training: bool | None = None) -> str | None:
        """Remove positions and return None if the network equals its masked twin, else why not.

        Args:
            removed: what leaves.
            training: whether to compare in training mode only, or in eval mode only; None for both.
        """
        if self.problem is not None:
            return self.problem
        trials = [*([self._eval] if training is not True else []), *(self._train if training is not False else [])]
        if not trials:
            return None
        twin, small = duplicate(self.model), duplicate(self.model)
        for (name, axis), gone in removed.items():
            if axis == "inputs":
                zero_channels(twin.get_submodule(name), axis, gone)
        try:
            for (name, axis), gone in removed.items():
                module = small.get_submodule(name)
                keep_channels(module, axis, complement(module, axis, gone))
        except Exception as error:  # a user's class may refuse what its base class allows
            return f"its layers cannot be made smaller: {first_line(error)}"
        changed = {name for name, axis in removed if axis == "outputs"}
        return next((why for trial in trials if (why := self._compare(twin, small, trial, changed))), None)

    # --- the start ----------------------------------------------------------------------------------------------------

    def _start(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, bool]:
        """Return the copy to compare, the inputs for it, and whether all float32 has to be turned to float64.

        Noise shows more than an example, but a forward may take only some values, such as those between 0 and 1. Random
        weights show more than trained ones, but may give NaN.
        """
        first: tuple[nn.Module, Inputs] | None = None
        for everything in (False, True):
            for redraw, given in ((True, _noise(inputs)), (True, _double(inputs)), (False, _double(inputs))):
                probe = duplicate(model).eval().double()
                (_randomise if redraw else _shake)(probe)
                first = first or (probe, given)
                try:
                    with in_double(everything=everything), seeded(0), SameDraws(0, {}) as draws:
                        outputs, read = _reading(duplicate(probe), lambda tried: _run(tried, given))  # noqa: B023
                except Exception as error:  # a user's forward may raise anything
                    text = f"cannot be verified, the network does not run in float64: {first_line(error)}"
                    self.problem = self.problem or text
                    continue
                if any(bool(x.isnan().any()) for _, x in outputs):
                    self.problem = self.problem or "cannot be verified, the network gives NaN on the example in float64"
                    continue
                self.problem, self._read, self._draws = None, read, bool(draws.shapes)
                return probe, given, everything
        assert first is not None
        return *first, False

    def _try_training(self, inputs: Inputs) -> None:
        """Find out whether the network runs in training mode, and with which draws it reads further parameters."""
        names = {name for name, _ in self.model.named_parameters()}
        in_eval = self._read
        for given in (_two(inputs), inputs):  # BatchNorm needs more than one value in training mode
            for seed in range(_SEEDS) if given is not None else ():
                assert given is not None
                trial = _Trial(given, training=True, seed=seed)
                try:
                    read = self._parameters_read(trial)
                except Exception as error:  # its forward may want labels, or raise anything else
                    self.untrained = self.untrained or first_line(error)
                    break
                if not seed or read - self._read:
                    self._train.append(trial)
                    if read - in_eval:
                        self.training_only.append((given, seed))
                self._read = self._read | read
                if not names - self._read:
                    break
            if self._train:
                self.untrained = None
                return

    def _parameters_read(self, trial: _Trial) -> set[str]:
        with self._conditions():
            return _reading(duplicate(self.model), lambda tried: self._trial_run(tried, trial, {}))[1]

    def repeats(self) -> bool:
        """Return whether the network computes the same in training mode twice; if not, that mode tells nothing."""
        for trial in self._train:
            runs = []
            for _ in range(2):
                with self._conditions():
                    runs.append(self._trial_run(duplicate(self.model), trial, {})[0])
            if _difference(*runs, whole=True) is not None:
                self.untrained, self._train = "two passes in it differ", []
                return False
        return True

    # --- comparing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _conditions(self) -> Iterator[None]:
        with in_double(everything=self._everything), seeded(0):
            yield

    def _trial_run(
        self, model: nn.Module, trial: _Trial, constant: Mapping[int, Sequence[int]], layers: Sequence[str] = ()
    ) -> tuple[_Results, list[tuple[int, ...]]]:
        """Run a model, and return its results and the shapes of its draws."""
        model.train(trial.training)
        if trial.seed is None:
            return _run(model, trial.inputs, layers), []
        with SameDraws(trial.seed, constant) as draws, seeded(trial.seed):
            return _run(model, trial.inputs, layers), draws.shapes

    def _both(
        self, twin: nn.Module, small: nn.Module, trial: _Trial, layers: Sequence[str]
    ) -> tuple[_Results, _Results]:
        """Return the results of the small network and of its twin; raise _Failed if the small one cannot run."""
        constant: dict[int, list[int]] = {}
        while True:  # at most twice: the shapes of the draws do not depend on what is drawn
            with self._conditions():
                got, narrow = _small(small, lambda: self._trial_run(small, trial, constant, layers))  # noqa: B023
            with self._conditions():
                expected, wide = self._trial_run(twin, trial, constant, layers)
            differ = differing(narrow, wide)
            if not differ or constant:
                return got, expected
            constant = differ

    def _compare(self, twin: nn.Module, small: nn.Module, trial: _Trial, changed: set[str]) -> str | None:
        """Return why the networks differ in a trial, or None.

        Args:
            twin, small: the networks.
            trial: how to run them.
            changed: names of the layers that have lost outputs.
        """
        mode = "in training mode " if trial.training else ""
        layers: list[str] = []
        try:
            got, expected = self._both(twin, small, trial, layers)
            if not any(x.is_floating_point() for _, x in expected):  # compare what the whole numbers are made of
                layers = [name for name, _ in weighted_layers(twin) if name not in changed]
                got, expected = self._both(twin, small, trial, layers)
        except _Failed as error:
            return f"{mode}the network cannot run without some of its channels: {error}"
        except Exception as error:  # see above
            return f"cannot be verified, {mode}the network does not run in float64: {first_line(error)}"
        why = _difference(got, expected)
        return why if why is None else mode + why


class _Failed(Exception):
    """The small network cannot run."""


def _small(small: nn.Module, compute: Any) -> Any:
    """Return what a function returns that runs a small network; raise _Failed, which names the layer, if it cannot."""
    running: list[str] = []

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in small.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        return compute()
    except Exception as error:  # a user's forward may raise anything
        where = f", in {running[-1]!r}" if running and running[-1] else ""
        raise _Failed(f"{first_line(error)}{where}") from error
    finally:
        for handle in handles:
            handle.remove()


class _Reads(TorchFunctionMode):
    """Notes the ids of all parameters that tensors are computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation; PyTorch calls this for each one."""
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):  # shapes and devices do not count
            self.ids.update(id(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter))
        return result


def _reading(model: nn.Module, compute: Callable[[nn.Module], Any]) -> tuple[Any, set[str]]:
    """Return what a function of a model returns, and the names of the parameters that operations get meanwhile."""
    with _Reads() as seen:
        result = compute(model)
    return result, {name for name, p in model.named_parameters() if id(p) in seen.ids}


_Results = list[tuple[str, Tensor]]
"""(where it is kept, tensor) for each result; "" for those that are returned."""


def _run(model: nn.Module, inputs: Inputs, layers: Sequence[str] = ()) -> _Results:
    """Run a model and return what it returns, what its modules keep, and the outputs of some layers."""
    results: _Results = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: results.extend((f"output of {name!r}", x) for x in results_of(out))
        )
        for name in layers
    ]
    try:
        results = [("", x) for x in run(model, inputs)] + results
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        for attribute in vars(module):
            results += [(f"{name}.{attribute}".lstrip("."), x) for x in kept_results(module, attribute)]
    return results


def _difference(got: _Results, expected: _Results, *, whole: bool = False) -> str | None:
    """Return how results differ, or None; results of whole numbers alone prove nothing, unless ``whole``."""
    if [where for where, _ in got] != [where for where, _ in expected]:
        return "without it the network returns or keeps other tensors"
    for (where, x), (_, y) in zip(got, expected, strict=True):
        if x.shape != y.shape:
            return f"its channels are kept as {where!r}" if where else "its channels are outputs of the model"
    if not whole and not any(x.is_floating_point() or x.is_complex() for _, x in expected):
        return "the model has no floating-point output to check the removal on"
    for (_, x), (_, y) in zip(got, expected, strict=True):
        if not x.is_floating_point() and not x.is_complex():
            if not torch.equal(x, y):
                return "without it an output of whole numbers differs from that of its masked twin"
        elif y.numel():
            error = torch.where(x == y, 0.0, x - y).abs().max()  # both may be infinite, as masked logits are
            scale = torch.where(y.isfinite(), y, 0.0).abs().max()
            if not error <= _TOLERANCE * scale:  # written so that NaN fails
                return f"without it the network differs from its masked twin (by {error / scale:.0e})"
    return None


# --- inputs and weights -----------------------------------------------------------------------------------------------


def _two(inputs: Inputs) -> Inputs | None:
    """Return inputs of a single sample with a second one; None for others."""
    tensors = tensors_of(inputs)
    if any(x.dim() == 0 or len(x) != 1 for x in tensors):
        return None

    def pair(x: Tensor) -> Tensor:
        other = x.flip(-1) if x.is_floating_point() and x.dim() > 1 else x
        return torch.cat([x, other])

    return map_tensors(pair, inputs)


def _double(inputs: Inputs) -> Inputs:
    """Return the inputs, floating-point ones in float64."""
    return map_tensors(lambda x: x.detach().double() if x.is_floating_point() else x, inputs)


def _noise(inputs: Inputs) -> Inputs:
    """Return float64 noise for every floating-point input; integers and inputs named as masks keep their values."""

    def noise(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        generator = torch.Generator().manual_seed(1)
        return torch.empty(x.shape, dtype=torch.float64).normal_(generator=generator).to(x.device)

    if isinstance(inputs, tuple):
        return map_tensors(noise, inputs)
    masks = _double({name: value for name, value in inputs.items() if "mask" in name})
    assert isinstance(masks, dict)
    return {name: masks[name] if name in masks else map_tensors(noise, value) for name, value in inputs.items()}


def _drop_nothing(model: nn.Module) -> None:
    """Switch the dropout of PyTorch's modules off, in place: attention without some heads draws in another order."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0


def _shake(model: nn.Module) -> None:
    """Add noise to the weights of a float64 model, and a little to those that are zero, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel():
                noise = torch.empty(p.shape, dtype=torch.float64).uniform_(-_SPREAD, _SPREAD, generator=generator)
                typical = p.abs().mean() if bool(p.any()) else 0.1
                p.add_(torch.where(p == 0, noise.to(p.device) * typical, noise.to(p.device) * p))


def _randomise(model: nn.Module) -> None:
    """Convert ``model`` to float64 and redraw the weights of its known layers, in place.

    Trained weights may be sparse, and zeros would hide a mistake.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).normal_(0.0, std, generator=generator))

    def positive(t: Tensor) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).uniform_(0.5, 1.5, generator=generator))

    model.double()
    with torch.no_grad():
        for module in model.modules():
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module):
                if weight is not None:  # None if a parametrisation computes it
                    fan_in = weight.numel() // max(1, len(weight.T if is_conv1d(module) else weight))
                    normal(weight, (2.0 / max(1, fan_in)) ** 0.5)
                if bias is not None:
                    normal(bias, 0.1)
            elif isinstance(module, nn.MultiheadAttention):
                packed = module._parameters.get("in_proj_weight")
                if packed is not None:
                    normal(packed, packed.shape[1] ** -0.5)
                if module.in_proj_bias is not None:
                    normal(module.in_proj_bias, 0.1)
            elif isinstance(module, _NormBase):
                for scale in (weight, module.running_var):
                    if scale is not None:
                        positive(scale)
                for shift in (bias, module.running_mean):
                    if shift is not None:
                        normal(shift, 0.5)
