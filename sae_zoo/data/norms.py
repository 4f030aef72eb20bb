"""Lengths of rows: a histogram of their norms, and which of them are too long to train on.

Many language models have rows whose norm is ten to a hundred times that of the others, at the first positions or at one
frequent token, and they are no special tokens. A few hold most of the variance: an SAE that is fitted to them has
nothing left for the rest, and one that meets them now and then loses its latents to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_zoo.functional.norms import squared_norms

_BINS_PER_OCTAVE = 32  # a bin is 2.2 % wide
_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 0.9999, 1.0)
# Of the longest rows, so many are remembered with their token and position, and so many of either are named.
_REMEMBERED, _NAMED = 4096, 5
_ROWS_AT_ONCE = 4096
# A multiple of the median above which rows are told of: what cuts the latents of a default run is cut there too.
TOLD_ABOVE = 4.0


class Norms:
    """A histogram of ||x|| on a logarithmic scale, whose sums are exact at the edges of its bins.

    Attributes:
        bins: rows and their summed ||x||^2, by the number of the bin: bin ``i`` holds the norms from 2^(i / 32) up to
            2^((i + 1) / 32); rows of norm 0 are in that of the smallest positive float.
    """

    def __init__(self, bins: Mapping[int, tuple[int, float]] | None = None):
        self.bins: dict[int, tuple[int, float]] = dict(bins or {})

    @classmethod
    def of(cls, rows: Tensor) -> Norms:
        """The histogram of ``rows`` [n, d_in]."""
        norms = cls()
        norms.add(squared_norms(rows))
        return norms

    def add(self, squares: Tensor) -> None:
        """Count rows whose ||x||^2 are ``squares`` [n] float64."""
        values = squares.cpu().numpy()
        logs = np.log2(np.maximum(values, np.finfo(np.float64).tiny))
        bins = np.floor(logs * (_BINS_PER_OCTAVE / 2)).astype(np.int64)
        found, which = np.unique(bins, return_inverse=True)
        # One after the other: always the same sum.
        counts, sums = np.bincount(which), np.bincount(which, weights=values)
        for i, n, total in zip(found.tolist(), counts.tolist(), sums.tolist(), strict=True):
            before = self.bins.get(i, (0, 0.0))
            self.bins[i] = before[0] + n, before[1] + total

    def __add__(self, other: Norms) -> Norms:
        both = Norms(self.bins)
        for i, (n, total) in other.bins.items():
            before = both.bins.get(i, (0, 0.0))
            both.bins[i] = before[0] + n, before[1] + total
        return both

    @property
    def n_rows(self) -> int:
        return sum(n for n, _ in self.bins.values())

    def quantile(self, share: float) -> float:
        """The norm that ``share`` of the rows do not exceed: the upper edge of a bin, so up to 2.2 % too large."""
        below, wanted = 0, math.ceil(share * self.n_rows)
        for i in sorted(self.bins):
            below += self.bins[i][0]
            if below >= wanted:
                return _edge(i + 1)
        raise ValueError("no row was counted; norms have no quantile")

    @property
    def median(self) -> float:
        """Median norm of the rows that are not 0, if there are any: where more than half are, nothing is long beside
        the median.
        """
        longer = {i: (n, total) for i, (n, total) in self.bins.items() if total > 0}
        return Norms(longer or self.bins).quantile(0.5)

    def bound(self, multiple: float | None) -> float:
        """The edge of a bin at about ``multiple`` times the median; infinite for None.

        Raises:
            ValueError: if the multiple is not above 1.
        """
        if multiple is None:
            return math.inf
        if not multiple > 1:
            raise ValueError(f"data.max_norm is {multiple}; it is a multiple of the median norm and must be above 1, "
                             "or null to leave no row out")
        if not math.isfinite(multiple):
            return math.inf
        return _edge(round(math.log2(multiple * self.median) * _BINS_PER_OCTAVE))

    def above(self, bound: float) -> int:
        """Rows whose norm is at least ``bound``, an edge."""
        return sum(n for i, (n, _) in self.bins.items() if _edge(i) >= bound)

    def mean_square(self, below: float = math.inf) -> float:
        """Mean of ||x||^2 over the rows whose norm is below ``below``, an edge."""
        inside = [pair for i, pair in self.bins.items() if _edge(i) < below]
        return math.fsum(total for _, total in inside) / sum(n for n, _ in inside)

    def square_share_above(self, bound: float) -> float:
        """Share of the sum of ||x||^2 that is in rows whose norm is at least ``bound``, an edge."""
        total = math.fsum(total for _, total in self.bins.values())
        return math.fsum(square for i, (_, square) in self.bins.items() if _edge(i) >= bound) / total if total else 0.0

    def to_json(self) -> list[list[float]]:
        """Bins as [number, rows, summed ||x||^2], by number."""
        return [[i, *self.bins[i]] for i in sorted(self.bins)]

    @classmethod
    def from_json(cls, bins: Sequence[Sequence[float]]) -> Norms:
        return cls({int(i): (int(n), float(total)) for i, n, total in bins})


def _edge(i: int) -> float:
    return 2.0 ** (i / _BINS_PER_OCTAVE)


class LongRows:
    """The longest rows seen, with their token and position, for a summary of where they are."""

    def __init__(self) -> None:
        self.norms = Norms()
        self._kept = torch.empty(3, 0, dtype=torch.float64)

    def add(self, rows: Tensor, token_ids: Tensor, positions: Tensor) -> None:
        """Count ``rows`` [n, d_in], the tokens [n] at which they stand, and the positions [n] of these."""
        squares = torch.cat([squared_norms(part) for part in rows.split(_ROWS_AT_ONCE)])  # float64 of all is large
        self.norms.add(squares)
        kept = torch.cat([self._kept, torch.stack([squares, token_ids.double(), positions.double()])], dim=1)
        self._kept = kept[:, kept[0].argsort(descending=True, stable=True)[:_REMEMBERED]]

    def summary(self) -> dict[str, Any]:
        """Plain values: the histogram, quantiles of the norm by their share, and of the rows above ``TOLD_ABOVE`` times
        the median their number, their share of the summed ||x||^2, and their most frequent positions and tokens (of the
        4,096 longest) with how many there are.
        """
        bound = self.norms.bound(TOLD_ABOVE)
        longest = self._kept[1:, self._kept[0] >= bound**2].long()
        return {
            "histogram": self.norms.to_json(),
            "quantiles": {f"{q:g}": self.norms.quantile(q) for q in _QUANTILES},
            "long": {"multiple_of_median": TOLD_ABOVE, "rows": self.norms.above(bound),
                     "square_share": self.norms.square_share_above(bound),
                     "tokens": _most_frequent(longest[0].tolist()), "positions": _most_frequent(longest[1].tolist())},
        }


def _most_frequent(values: Iterable[int]) -> list[list[int]]:
    found, counts = np.unique(np.asarray(list(values), dtype=np.int64), return_counts=True)
    order = np.lexsort((found, -counts))[:_NAMED]
    return [[int(found[i]), int(counts[i])] for i in order]


def describe(norms: Mapping[str, Any], n_rows: int, tokenizer: Any = None) -> str | None:
    """One line about the long rows of a cache, from the ``norms`` of its manifest; None where there are none."""
    long = norms["long"]
    if not long["rows"]:
        return None
    (token, _), (position, at_it) = long["tokens"][0], long["positions"][0]
    named = f"token {token}" if tokenizer is None else repr(tokenizer.decode([token]))
    return (f"{long['rows']:,} of {n_rows:,} rows ({long['rows'] / n_rows:.2%}) have more than "
            f"{long['multiple_of_median']:g} times the median norm, up to "
            f"{norms['quantiles']['1'] / Norms.from_json(norms['histogram']).median:.0f} times, and "
            f"{long['square_share']:.0%} of the sum of ||x||^2; most frequent: {named}, position {position} "
            f"({at_it} rows)")
