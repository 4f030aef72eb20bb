"""How sure the mean of a few paired numbers is: intervals that hold 95 %, or none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# With fewer numbers nothing can be said of their spread that is worth a verdict.
FEWEST = 3
# A resampled mean never leaves the range of the data, which holds the true mean in 1 - 2^(1 - n) of cases only: 75 %
# for three numbers, 94 % for five. So for fewer than six the bootstrap cannot give 95 %.
FEWEST_FOR_BOOTSTRAP = 6
_RESAMPLES = 9_999


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs (group, seed).

    Attributes:
        effect: the mean of the group means if the interval is over groups, else the mean over pairs.
        interval: (low, high) that holds 95 %; None for fewer than :data:`FEWEST` numbers.
        n_pairs, n_groups: how many.
        method: how the interval was made; None where there is none.
        by_group: the same of each group alone.
    """

    effect: float
    interval: tuple[float, float] | None
    n_pairs: int
    n_groups: int
    method: str | None
    by_group: Mapping[Hashable, Estimate]

    def transformed(self, function: Callable[[float], float]) -> Estimate:
        """The estimate after a rising ``function``: a mean log ratio becomes a geometric mean ratio by ``math.exp``."""
        interval = None if self.interval is None else (function(self.interval[0]), function(self.interval[1]))
        by_group = {group: own.transformed(function) for group, own in self.by_group.items()}
        return replace(self, effect=function(self.effect), interval=interval, by_group=by_group)

    def is_below(self, bound: float) -> bool:
        """Whether the whole interval is; False where there is none."""
        return self.interval is not None and self.interval[1] < bound

    def is_above(self, bound: float) -> bool:
        """Whether the whole interval is; False where there is none."""
        return self.interval is not None and self.interval[0] > bound

    def as_json(self, name_of: Mapping[Hashable, str]) -> dict[str, Any]:
        """Plain values; groups by the names that ``name_of`` gives them."""
        plain = {"effect": self.effect, "interval": None if self.interval is None else list(self.interval),
                 "n_pairs": self.n_pairs, "n_groups": self.n_groups, "method": self.method}
        if self.by_group:
            plain["by_group"] = {name_of[group]: own.as_json(name_of) for group, own in self.by_group.items()}
        return plain


def interval_of_mean(values: Sequence[float]) -> tuple[tuple[float, float] | None, str | None]:
    """The 95 % interval of the mean of independent ``values``, and how it was made.

    Six or more: scipy's bootstrap, percentiles at the level that gives a normal sample the width of Student's t (the
    expanded percentile interval of Hesterberg 2015, arXiv 1411.5279; the plain one is too narrow for few values).
    Three to five: Student's t, see :data:`FEWEST_FOR_BOOTSTRAP`. Fewer: (None, None).
    """
    n = len(values)
    if n < FEWEST:
        return None, None
    method = f"Student's t over {n}" if n < FEWEST_FOR_BOOTSTRAP else f"bootstrap over {n}"
    if min(values) == max(values):
        return (float(values[0]), float(values[0])), method
    if n < FEWEST_FOR_BOOTSTRAP:
        low, high = stats.t.interval(CONFIDENCE, n - 1, loc=np.mean(values), scale=stats.sem(values))
    else:
        level = 1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
        low, high = stats.bootstrap((np.asarray(values),), np.mean, n_resamples=_RESAMPLES, confidence_level=level,
                                    method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return (float(low), float(high)), method


def estimate(units: Mapping[tuple[Hashable, Hashable], float]) -> Estimate:
    """The mean of one number a pair (group, seed), and its interval.

    Groups (site/layer pairs) share what seeds do not: with three or more of them the independent numbers are the group
    means, whose spread holds that of the seeds too, so that the interval speaks of other sites and layers as well. With
    one or two the pairs themselves are, and it speaks of other seeds only.

    Args:
        units: (group, seed) -> number; not empty.
    """
    seeds_of = defaultdict(list)
    for (group, _), value in units.items():
        seeds_of[group].append(value)
    if len(seeds_of) >= FEWEST:
        values, unit = [float(np.mean(own)) for own in seeds_of.values()], "site/layer means"
    else:
        values, unit = list(units.values()), "pairs"
    by_group = {group: _of(own, "seeds", n_groups=1) for group, own in seeds_of.items()}
    return replace(_of(values, unit, n_groups=len(seeds_of)), n_pairs=len(units), by_group=by_group)


def _of(values: Sequence[float], unit: str, *, n_groups: int) -> Estimate:
    interval, method = interval_of_mean(values)
    return Estimate(float(np.mean(values)), interval, len(values), n_groups, method and f"{method} {unit}", {})
