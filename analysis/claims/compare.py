"""Curves at matched L0: one number for each pair (group, seed), from which :mod:`intervals` makes an effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from analysis.claims.evidence import Arm, Curve, Evidence, Pair, Record
from analysis.claims.intervals import Estimate, estimate
from sae_zoo.frontier.pareto import interpolate_at

# L0s at which curves are compared, evenly in log L0 over the range that all of them were measured in.
GRID = 25
# Single L0s for the table by sparsity. A curve counts at one if it ends at most 5 % short of it.
LADDER, NEAR = tuple(5 * 2**k for k in range(9)), 0.05
# Points of two curves that far apart in L0 are at the same place of them.
SAME_PLACE = 0.1


@dataclass
class Units:
    """One number a pair, and what is behind them.

    Attributes:
        values: (group, seed) -> number.
        runs: the runs of the curves, by folder.
        l0: the lowest and the highest L0 of any pair's grid; None where there is no pair.
        left_out: pairs without a number, and why; lines.
    """

    values: dict[Pair, float] = field(default_factory=dict)
    runs: dict[str, Record] = field(default_factory=dict)
    l0: tuple[float, float] | None = None
    left_out: list[str] = field(default_factory=list)

    def add(self, pair: Pair, value: float, curves: Iterable[Curve], grid: np.ndarray) -> None:
        self.values[pair] = float(value)
        self.runs |= {run["run_dir"]: run for curve in curves for run in curve.runs}
        low, high = self.l0 or (math.inf, 0.0)
        self.l0 = (min(low, float(grid[0])), max(high, float(grid[-1])))

    def estimate(self) -> Estimate | None:
        """The mean over pairs and its interval; None where there is no pair."""
        return estimate(self.values) if self.values else None

    def ratio(self) -> Estimate | None:
        """Where the numbers are mean log ratios: the geometric mean ratio and its interval."""
        mean = self.estimate()
        return mean and mean.transformed(math.exp)


def on_grid(curves: Sequence[Curve], metric: str, *, log: bool,
            at: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``metric`` of several curves at the same L0s, evenly in log L0 over the range that all of them were measured in.

    Curves bend, so that a line over a place where one was not measured lies below it, by 9 % of FVU from 20 to 80: the
    curve with fewer points would look better. So where curves share two places and more, they go through these alone.

    Args:
        log: interpolate the logarithm of the metric and give that; else the metric itself (shares, which may be zero).
        at: this L0 alone.

    Returns:
        The L0s [GRID] and the values [curves, GRID].

    Raises:
        ValueError: if a curve has not two usable points, or the ranges do not overlap, or are not about ``at``.
    """
    points = _at_shared_places([curve.points(metric, log=log) for curve in curves])
    low, high = max(min(l0s) for l0s, _ in points), min(max(l0s) for l0s, _ in points)
    if not low < high:
        raise ValueError(f"no L0 was measured by all: the ranges are "
                         f"{', '.join(f'{min(l0s):.4g} to {max(l0s):.4g}' for l0s, _ in points)}")
    grid = np.geomspace(low, high, GRID)
    if at is not None:
        if not low * (1 - NEAR) <= at <= high * (1 + NEAR):
            raise ValueError(f"L0 {at:g} was not measured by all")
        grid = np.clip([at], low, high)
    values = np.array([[interpolate_at(l0s, own, at, log_values=log) for at in grid] for l0s, own in points])
    return grid, np.log(values) if log else values


def _at_shared_places(points: list[tuple[list[float], list[float]]]) -> list[tuple[list[float], list[float]]]:
    """Of several curves the points near which all have one; all points, if that leaves a curve fewer than two."""
    shared = []
    for l0s, values in points:
        near = [all(any(abs(math.log(other / l0)) < SAME_PLACE for other in others) for others, _ in points)
                for l0 in l0s]
        shared.append(tuple([value for value, is_near in zip(column, near, strict=True) if is_near]
                            for column in (l0s, values)))
    return shared if min(len(l0s) for l0s, _ in shared) > 1 else points


def mean_difference(evidence: Evidence, arm: Arm, references: Sequence[Arm], metric: str, *, log: bool = True,
                    best: Callable = np.minimum, at: float | None = None) -> Units:
    """For each pair the mean over its grid of ``arm`` minus the best of ``references`` at each L0; with ``log`` of the
    logarithms, so a mean log ratio.

    Args:
        references: where a pair has several of them, ``best`` (np.minimum or np.maximum) chooses at each L0.
        at: at this L0 alone.
    """
    units = Units(left_out=[*arm.left_out, *(line for reference in references for line in reference.left_out)])
    missing: dict[str, list[str]] = {}
    for pair in _pairs([arm, *references]):
        curves = [reference.curves[pair] for reference in references if pair in reference.curves]
        if pair not in arm.curves or not curves:
            absent = arm.name if pair not in arm.curves else " and ".join(reference.name for reference in references)
            missing.setdefault(absent, []).append(evidence.where(pair))
            continue
        curves.insert(0, arm.curves[pair])
        try:
            grid, values = on_grid(curves, metric, log=log, at=at)
        except ValueError as error:
            units.left_out.append(f"{evidence.where(pair)}: {arm.name} against "
                                  f"{' and '.join(reference.name for reference in references)}: {error}")
        else:
            units.add(pair, (values[0] - best.reduce(values[1:])).mean(), curves, grid)
    units.left_out += [f"no curve of {name} at {'; '.join(places)}" for name, places in missing.items()
                       if arm.curves and any(reference.curves for reference in references)]
    return units


def ratios_by_l0(evidence: Evidence, arm: Arm, references: Sequence[Arm], metric: str) -> dict[int, Estimate]:
    """The geometric mean ratio of ``arm`` to the best of ``references`` at each L0 of the ladder that was measured."""
    found = {at: mean_difference(evidence, arm, references, metric, at=at).ratio() for at in LADDER}
    return {at: ratio for at, ratio in found.items() if ratio is not None}


def mean_level(evidence: Evidence, arms: Sequence[Arm], metric: str) -> Units:
    """For each pair the mean of ``metric`` of the first of ``arms`` over the L0s that all of them were measured at,
    evenly in log L0 and linear in the metric.
    """
    units = Units(left_out=list(arms[0].left_out))
    for pair, curve in arms[0].curves.items():
        if not all(pair in arm.curves for arm in arms):
            continue
        curves = [curve, *(arm.curves[pair] for arm in arms[1:])]
        try:
            grid, values = on_grid(curves, metric, log=False)
        except ValueError as error:
            units.left_out.append(f"{evidence.where(pair)}: {arms[0].name}: {error}")
        else:
            units.add(pair, values[0].mean(), curves[:1], grid)
    return units


def slopes(evidence: Evidence, arm: Arm, metric: str) -> Units:
    """For each pair the slope of log ``metric`` against log L0 (least squares)."""
    units = Units(left_out=list(arm.left_out))
    for pair, curve in arm.curves.items():
        try:
            l0s, values = curve.points(metric, log=True)
        except ValueError as error:
            units.left_out.append(f"{evidence.where(pair)}: {arm.name}: {error}")
        else:
            units.add(pair, stats.linregress(np.log(l0s), np.log(values)).slope, [curve], np.sort(l0s))
    return units


def _pairs(arms: Iterable[Arm]) -> list[Pair]:
    return sorted({pair for arm in arms for pair in arm.curves}, key=str)
