"""Second moments of the inputs of linear maps on calibration data: what choosing and compensating need.

For a map y = W x + b with groups of columns (one group, except in a grouped convolution) the moment is H = E[x xᵀ] of
every group, in float64, see :func:`input_moments`. A map with more than :data:`MAX_COLUMNS` columns per group gets the
moment of its input *channels* instead, where all kernel positions are summed: what can be made up for is then the same
at every kernel position. So does a transposed convolution, each of whose inputs goes to several outputs.

Memory: 8 bytes times the square of the columns per map, at most 42 MB for a convolution and 134 MB for a linear layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.calling import batch_fault, run
from pliant.compression.calibration import Calibration
from pliant.compression.observing import LinearMap, applies_plainly, linear_map, observing
from pliant.compression.rows import channel_rows, chosen_rows, grid_of, input_rows
from pliant.errors import BadInput, PliantError

MAX_COLUMNS = {"convolution": 2304, "linear": 4096}
ROWS_PER_COLUMN = 8  # more rows hardly improve a moment; fewer give a noisy one
MANY_COLUMNS = 1152  # from twice as many on half the rows per column do, where a row costs most
LEAST_ROWS = 4096
RIDGE = 1e-3  # share of the mean diagonal that is always added: directions that the data hardly excites count as noise


@dataclass(frozen=True, eq=False)
class Moment:
    """The second moment of the inputs of one map.

    Args:
        second: E[x xᵀ], float64 (groups, n, n).
        mean: E[x], float64 (groups, n).
        rows: how many x were seen.
        by_channel: whether x are input channels, n = channels per group, rather than columns of the weight.
        absorbed: whether a constant added to the outputs makes no difference, because the map has a bias or a
            BatchNorm reads them.
    """

    second: Tensor
    mean: Tensor
    rows: int
    by_channel: bool
    absorbed: bool

    def regularised(self) -> Tensor:
        """Return a positive definite estimate of the moment, (groups, n, n); of the covariance if means are absorbed.

        The estimate is shrunk towards a multiple of the identity, the more, the fewer rows there are for a column:
        Chen et al. 2010, "Shrinkage algorithms for MMSE covariance estimation", equation 23.
        """
        second = self.second
        if self.absorbed:
            second = second - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        n = second.shape[-1]
        trace = second.diagonal(dim1=1, dim2=2).sum(1)  # (groups,)
        squares = second.square().sum((1, 2))
        spread = (squares - trace.square() / n).clamp(min=torch.finfo(trace.dtype).tiny)
        share = (((1 - 2 / n) * squares + trace.square()) / ((self.rows + 1 - 2 / n) * spread)).clamp(max=1.0)
        level = (trace / n).clamp(min=torch.finfo(torch.float32).tiny)  # a map whose inputs are zero
        shrunk = second * (1 - share)[:, None, None]
        shrunk.diagonal(dim1=1, dim2=2).add_(((share + RIDGE) * level).unsqueeze(1))
        return shrunk


def by_channel(layer: nn.Module, weight: Tensor) -> bool:
    """Return whether a map gets the moment of its input channels rather than of its columns."""
    if not isinstance(layer, _ConvNd):
        return False
    return isinstance(layer, _ConvTransposeNd) or weight[0].numel() > MAX_COLUMNS["convolution"]


def too_wide(layer: nn.Module, weight: Tensor) -> bool:
    """Return whether a map has too many columns, or channels, for a moment."""
    return moment_width(layer, weight) > MAX_COLUMNS["linear"]


def moment_width(layer: nn.Module, weight: Tensor) -> int:
    """Return how many columns, or channels, per group the moment of a map has."""
    if isinstance(layer, _ConvTransposeNd):
        return layer.in_channels // layer.groups
    return weight.shape[1] if by_channel(layer, weight) else weight[0].numel()


def moment_bytes(layer: nn.Module, weight: Tensor) -> int:
    """Return the memory that the moment of a map takes."""
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return int(8 * groups * moment_width(layer, weight) ** 2)


def rows_per_piece(columns: int, pieces: int) -> int:
    """Return how many rows of each piece of the calibration data a map with so many columns needs."""
    rows = max(ROWS_PER_COLUMN * min(columns, MANY_COLUMNS), ROWS_PER_COLUMN // 2 * columns)
    return math.ceil(max(LEAST_ROWS, rows) / pieces)


def input_moments(model: nn.Module, names: Iterable[str], calibration: Calibration) -> dict[str, Moment]:
    """Return the moments of the named maps; one that is not applied, is too wide or reads infinity or NaN is left out.

    Args:
        model: a copy of the model in eval mode.
        names: names of maps, see ``observing``.
        calibration: the data.

    Raises:
        BadInput: the model cannot be called on a batch.
    """
    maps: dict[str, LinearMap] = {}
    for name in names:
        found = linear_map(model, name)
        if found is not None and applies_plainly(found.layer) and not too_wide(found.layer, found.weight):
            maps[name] = found
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    counts = dict.fromkeys(maps, 0)
    piece = 0

    def watch(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
        weight = maps[name].weight
        if by_channel(layer, weight):
            assert isinstance(layer, _ConvNd)
            most = rows_per_piece(layer.in_channels // layer.groups, calibration.pieces)
            x = channel_rows(layer, value, most, name, piece)
            x = x.unflatten(2, (layer.groups, -1)).squeeze(0).transpose(0, 1)
        else:
            grid = grid_of(layer, output)
            rows = chosen_rows(grid, rows_per_piece(weight[0].numel(), calibration.pieces), name, piece)
            x = input_rows(layer, value, rows, grid)
        second, total, _ = gram(x, x)
        if name in sums:
            sums[name][0].add_(second)
            sums[name][1].add_(total)
        else:
            sums[name] = (second, total)
        counts[name] += x.shape[1]

    with observing(model, maps, watch) as absorbed:
        for piece, inputs in enumerate(calibration.inputs()):
            call_on(model, inputs, calibration.batch_of[piece])
    sums = {name: both for name, both in sums.items() if bool(both[0].isfinite().all())}
    _warn_of_few({name: (both[0].shape[-1], counts[name]) for name, both in sums.items()}, calibration)
    moments = {}
    for name, (second, total) in sums.items():
        found, n = maps[name], counts[name]
        free = found.bias is not None or name in absorbed
        moments[name] = Moment(second / n, total / n, n, by_channel(found.layer, found.weight), free)
    return moments


def _warn_of_few(sizes: Mapping[str, tuple[int, int]], calibration: Calibration) -> None:
    """Warn, once for the data, if a map has more columns than rows were seen, given name → (columns, rows)."""
    name, (columns, rows) = max(sizes.items(), key=lambda item: item[1][0] / item[1][1], default=("", (0, 1)))
    if columns > rows and not calibration.warned:
        calibration.warned = True
        samples = calibration.samples
        enough = math.ceil(4 * columns / rows * samples)
        warnings.warn(
            f"few calibration samples: {name!r} has {columns} columns and sees {rows} vectors; fits are damped more, "
            f"about {enough} samples in place of {samples} would do",
            stacklevel=3,
        )


def gram(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ x yᵀ, Σ x and Σ y over rows, float64, for x (groups, rows, n) and y (groups, rows, m).

    Products are computed in float32 or wider, exact to 1e-6 for a few thousand rows, far below the noise of the data.
    The means are taken out before: covariances stay as exact where they are small beside the squares of the means.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    about_x, rest_x, sum_x = _centred(x.to(wide))
    about_y, rest_y, sum_y = (about_x, rest_x, sum_x) if y is x else _centred(y.to(wide))
    total = (rest_x.mT @ rest_y).double()
    total += about_x.unsqueeze(2) * sum_y.unsqueeze(1)  # Σ (x − a) yᵀ + Σ a yᵀ, and Σ (x − a) yᵀ in the same way
    total += (sum_x - x.shape[1] * about_x).unsqueeze(2) * about_y.unsqueeze(1)
    return total, sum_x, sum_y


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers a near the means of x, the rows x − a, and Σ x in float64."""
    total = x.sum(1, dtype=torch.float64)
    about = (total / x.shape[1]).to(x.dtype)
    return about.double(), x - about.unsqueeze(1), total


def call_on(model: nn.Module, inputs: object, batch: int) -> list[Tensor]:
    """Return the outputs of a model on calibration data; raise BadInput, with the batch, if it cannot be called."""
    try:
        return run(model, inputs)  # type: ignore[arg-type]
    except PliantError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise BadInput(f"the model cannot be called on calibration batch {batch}: {batch_fault(error)}") from error
