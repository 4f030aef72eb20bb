"""The mathematics of a sparsity-fidelity frontier: pure functions of numbers and of records, nothing is read or drawn.

Everywhere a lower L0 (sparser) and a lower loss (more faithful) are better.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def pareto_front(points: Iterable[tuple[float, float]]) -> list[bool]:
    """Mark the points that no other point beats.

    A point is beaten by another that is at least as low in both coordinates and lower in one. Of points with equal L0
    only those of lowest loss are on the front, and the other way round; copies of a point on the front all are.

    Args:
        points: (l0, loss) pairs.

    Returns:
        One bool a point, in the order given.

    Raises:
        ValueError: if a coordinate is None, NaN or infinite.
    """
    points = [(l0, loss) for l0, loss in points]
    for point in points:
        if not all(value is not None and math.isfinite(value) for value in point):
            raise ValueError(f"{point} is not a point of a frontier: give two finite numbers, or leave it out")
    on_front = [False] * len(points)
    last = None  # the lowest loss so far, walking from the sparsest point on
    for i in sorted(range(len(points)), key=points.__getitem__):
        if last is None or points[i][1] < last[1] or points[i] == last:
            on_front[i] = True
            last = points[i]
    return on_front


def interpolate_at(l0s: Sequence[float], values: Sequence[float], at: float, *, log_values: bool = True) -> float:
    """The value of a curve at L0 ``at``: straight lines between its points on log-log axes, as it is drawn.

    Args:
        l0s: measured L0 of the curve's points, in any order.
        values: a loss at each of them.
        at: an L0 between the lowest and the highest of ``l0s``.
        log_values: False for what may be zero, a share of latents say: the lines are then straight on a log L0 axis and
            a linear one.

    Raises:
        ValueError: if ``at`` is outside the curve (it is never extrapolated), an L0 (or with ``log_values`` a value) is
            not positive and finite, two points have the same L0, or the lengths differ or are zero.
    """
    if len(l0s) != len(values) or not len(l0s):
        raise ValueError(f"a curve needs as many values as L0s and at least one; got {len(values)} and {len(l0s)}")
    for number in (*l0s, *values, at) if log_values else (*l0s, at):
        if number is None or not 0 < number < math.inf:
            raise ValueError(f"{number} cannot be interpolated in log-log; L0s and values must be positive and finite")
    if not all(value is not None and math.isfinite(value) for value in values):
        raise ValueError(f"{list(values)} cannot be interpolated; values must be finite")
    if len(set(l0s)) < len(l0s):
        raise ValueError(f"two points of a curve have the same L0 ({sorted(l0s)}); average them over seeds first")
    low, high = min(l0s), max(l0s)
    if at < low * (1 - 1e-9) or at > high * (1 + 1e-9):  # rounding of an end point is not extrapolation
        raise ValueError(f"L0 {at:g} is outside the curve, which was measured from {low:g} to {high:g}; "
                         "choose an L0 inside it, or train at a target beyond it")
    l0s, values = zip(*sorted(zip(l0s, values, strict=True)), strict=True)
    if not log_values:
        return float(np.interp(np.log(at), np.log(l0s), values))
    return float(np.exp(np.interp(np.log(at), np.log(l0s), np.log(values))))


def front_of_curves(curves: Iterable[Sequence[tuple[float, float]]], n: int = 300) -> list[tuple[float, float]]:
    """The Pareto front of several curves, each taken as the lines that :func:`interpolate_at` draws.

    The front of the measured points alone would let a worse curve in wherever it happens to have been measured at a
    slightly lower L0 than the better one.

    Args:
        curves: each a sequence of (l0, value) with different L0s; a curve of one point is that point.
        n: points at which each curve is sampled, evenly in log L0, besides its own.

    Returns:
        The (l0, value) points on the front, by rising L0.

    Raises:
        ValueError: as :func:`interpolate_at`.
    """
    points = []
    for curve in curves:
        l0s, values = zip(*curve, strict=True)
        sampled = np.geomspace(min(l0s), max(l0s), n).tolist() if len(curve) > 1 else []
        points += [*curve, *((l0, interpolate_at(l0s, values, l0)) for l0 in sampled)]
    return sorted({point for point, is_on in zip(points, pareto_front(points), strict=True) if is_on})


def label_of(record: Mapping[str, Any]) -> str:
    """The curve a run belongs to: its ``label``, or its ``variant`` where it has none.

    Raises:
        ValueError: if the record has neither.
    """
    label = record.get("label") or record.get("variant")
    if not label:
        raise ValueError(f"the record of {record.get('run_dir')} has neither a label nor a variant; run that job again")
    return label


def _setting(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return record.get("l0_target"), record.get("sparsity_coefficient")


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but their seed: one point of a curve."""

    label: str
    runs: tuple[Mapping[str, Any], ...]

    @property
    def l0_target(self) -> float | None:
        """The L0 that the runs were trained towards; None where an explicit coefficient was given."""
        return self.runs[0].get("l0_target")

    @property
    def setting(self) -> tuple[float | None, float | None]:
        """The pair that decides the sparsity: (L0 target, explicit coefficient)."""
        return _setting(self.runs[0])

    def mean(self, key: str) -> float | None:
        """The mean of a metric over seeds; None where a seed has no value, since a mean of the rest would mislead."""
        values: list[Any] = [run.get(key) for run in self.runs]
        return None if None in values else statistics.fmean(values)

    def spread(self, key: str) -> float | None:
        """The sample standard deviation of a metric over seeds; None for one seed or where a seed has no value."""
        values: list[Any] = [run.get(key) for run in self.runs]
        return None if None in values or len(values) < 2 else statistics.stdev(values)


def group_seeds(records: Iterable[Mapping[str, Any]]) -> list[SeedGroup]:
    """Group runs by label and L0 target (or explicit coefficient), ordered by label, then target, then L0.

    Runs are averaged only if they are repeats with different seeds. A run whose record tells neither target nor
    coefficient stands alone, and so does each run of a (label, target) in which a seed occurs twice: such runs differ
    in more than their seed, and their mean would mean nothing.

    Args:
        records: finished runs.

    Raises:
        ValueError: if a record has neither a label nor a variant.
    """
    together = defaultdict(list)
    for record in records:
        together[label_of(record), _setting(record)].append(record)
    groups = []
    for (label, setting), runs in together.items():
        are_repeats = setting != (None, None) and len({run.get("seed") for run in runs}) == len(runs)
        groups += [SeedGroup(label, tuple(part)) for part in ([runs] if are_repeats else [[run] for run in runs])]

    def position(group: SeedGroup) -> tuple:
        l0 = group.mean("l0") or 0.0
        return group.label, l0 if group.l0_target is None else group.l0_target, l0

    return sorted(groups, key=position)


def is_curve(groups: Iterable[SeedGroup]) -> bool:
    """Whether a line may join the points of a label: one point a setting, no two of them at the same L0."""
    groups = list(groups)
    settings = [group.setting for group in groups if group.setting != (None, None)]
    l0s = [group.mean("l0") for group in groups]
    return len(set(settings)) == len(settings) and len(set(l0s)) == len(l0s)
