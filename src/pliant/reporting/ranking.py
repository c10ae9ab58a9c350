"""Standings: how the curves of a panel compare, the best first. Plain data, computed from records alone.

A standing has the area under the curve (``area``) with its confidence interval over the seeds, the difference from the
best *baseline* (a method that is neither ours nor retrained), and context for the area: the dense accuracy, the
accuracy at four sizes, the area by another accuracy and the cost of the training. Networks with
retraining come last and are never the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from pliant.records import Record
from pliant.reporting.area import accuracy_at, area, is_reached
from pliant.reporting.curves import Axis, Curve, Panel, points_of
from pliant.reporting.grouping import accuracy_of, grouped, sizes_of
from pliant.reporting.intervals import Estimate, difference, estimate

KEPT = (0.5, 0.3, 0.2, 0.1)
"""The shares of the parameters at which accuracies are shown."""
ACCURACIES = ("top1", "top1_raw")
"""The accuracies of a record: of the network as it is delivered, and as it was cut."""
REESTIMATED = "top1_reestimated"
"""Another one, where networks were refitted: with re-estimated BatchNorm statistics only."""


class MeanCost(NamedTuple):
    """The cost of a training, mean over the runs."""

    step: float
    """Time of a step, in units of SGD's."""
    memory: float
    """Memory in use, in units of SGD's."""
    seconds: float
    """Duration of the whole training."""


@dataclass(frozen=True)
class Standing:
    """A curve compared with the others of its panel and view."""

    curve: Curve
    areas: tuple[Estimate, ...]
    """Areas along each axis of the panel; the first decides. For patterns, mean accuracy over the common patterns."""
    other: Estimate
    """The first of the areas, by the raw accuracy; if the areas themselves are by another than ``top1``, by that."""
    versus: Estimate | None
    """The first area minus that of the best baseline, by pairs of equal seeds; None if there is no baseline."""
    is_baseline: bool
    """Whether this is the best baseline."""
    is_best: bool
    """Whether its area is the largest among curves without retraining."""
    kept: tuple[float | None, ...]
    """Accuracy at each size of :data:`KEPT`, mean over the runs; None if a run does not reach it."""
    cost: MeanCost | None


def standings(panel: Panel, view: str, chance: float | None, accuracy: str = "top1") -> list[Standing]:
    """Return the standings of a view of a panel; those with retraining last, then by falling area.

    Args:
        panel: the panel that holds the curves.
        view: one of its views.
        chance: accuracy of guessing, which counts at sizes that a curve does not reach; None counts as 0.
        accuracy: one of :data:`ACCURACIES`, or :data:`REESTIMATED`.
    """
    curves = panel.views[view]
    other = next(kind for kind in ACCURACIES if kind != accuracy)
    kinds = (accuracy, other)
    scores = {kind: [_scores(panel, curves, curve, chance or 0.0, kind) for curve in curves] for kind in kinds}
    first = [axes[0] for axes in scores[accuracy]]
    means = [fmean(values.values()) for values in first]
    order = sorted(range(len(curves)), key=lambda index: (curves[index].retrained, -means[index]))
    rivals = [index for index in order if not curves[index].retrained]
    baseline = next((index for index in rivals if not curves[index].ours), None)
    return [
        Standing(
            curve=curves[index],
            areas=tuple(estimate(list(values.values())) for values in scores[accuracy][index]),
            other=estimate(list(scores[other][index][0].values())),
            versus=None if baseline is None else difference(first[index], first[baseline]),
            is_baseline=index == baseline,
            is_best=index in rivals[:1],
            kept=tuple(_at(panel, curves[index], share, accuracy) for share in KEPT),
            cost=_cost(curves[index]),
        )
        for index in order
    ]


def _scores(
    panel: Panel, curves: Sequence[Curve], curve: Curve, chance: float, accuracy: str
) -> list[dict[int, float]]:
    """Return the area along each axis by seed; a seed's value is the mean of its runs."""
    if panel.patterned:
        common = set.intersection(
            *({record.pattern for record in run if record.pattern} for other in curves for run in _whole_runs(other))
        )
        return [_by_seed(curve, lambda run: _mean(run, common, accuracy))]

    def along(axis: Axis) -> dict[int, float]:
        return _by_seed(curve, lambda run: area(points_of(run, axis, accuracy), chance))

    return [along(axis) for axis in panel.axes]


def _by_seed(curve: Curve, score: Callable[[list[Record]], float]) -> dict[int, float]:
    scored = [(run[0].seed, score(run)) for run in _whole_runs(curve)]
    return {seed: fmean(value for _, value in pairs) for seed, pairs in grouped(scored, lambda pair: pair[0]).items()}


def _whole_runs(curve: Curve) -> list[list[Record]]:
    """Return the runs with the most sizes of the curve: a run with an incomplete sweep would look weak."""
    sizes = {key: len(sizes_of(run)) for key, run in curve.runs.items()}
    return [run for key, run in curve.runs.items() if sizes[key] == max(sizes.values())]


def _mean(run: list[Record], patterns: set[str], accuracy: str) -> float:
    """Return the mean accuracy of a run over these patterns; if it has none of them, over all its records."""
    counted = [record for record in run if record.pattern in patterns] or run
    return fmean(accuracy_of(record, accuracy) for record in counted)


def _at(panel: Panel, curve: Curve, kept: float, accuracy: str) -> float | None:
    if panel.patterned:
        return None
    runs = [points_of(run, panel.axes[0], accuracy) for run in _whole_runs(curve)]
    if not all(is_reached(points, 1 - kept) for points in runs):
        return None
    return fmean(accuracy_at(points, 1 - kept, 0.0) for points in runs)


def _cost(curve: Curve) -> MeanCost | None:
    costs = [run[0].cost for run in curve.runs.values() if run[0].cost is not None]
    if not costs:
        return None
    return MeanCost(
        fmean(cost["step_s"] / cost["step_s_sgd"] for cost in costs),
        fmean(cost["memory"] / cost["memory_sgd"] for cost in costs),
        fmean(cost["seconds"] for cost in costs),
    )
