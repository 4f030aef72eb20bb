"""What is remembered of each latent while activations stream by: memory depends on latents, never on rows."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 5
BINS = 1 << _BITS


class Kept:
    """Of each latent, the ``k`` entries with the largest keys.

    With values as keys these are its strongest activations; with random keys they are a uniform sample without
    replacement of everything that it did (a reservoir), whatever the pieces in which it came.

    Attributes:
        keys, values, places: [n_latents, k], largest key first; a place is -1, and its key -inf, where a latent has
            had fewer than k entries.
    """

    def __init__(self, n_latents: int, k: int):
        self.k = k
        self.keys = torch.full((n_latents, k), -torch.inf)
        self.values = torch.zeros(n_latents, k)
        self.places = torch.full((n_latents, k), -1)

    def add(self, latents: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
        """Offer entries, [n] each: the latent (int64), its key, its value, and where that was (int64, from 0)."""
        order = keys.argsort(descending=True)
        order = order[latents[order].argsort(stable=True)]
        latents = latents[order]
        rank = torch.arange(len(latents)) - torch.searchsorted(latents, latents)
        order, at = order[rank < self.k], (latents[rank < self.k], rank[rank < self.k])
        columns = (torch.full_like(self.keys, -torch.inf), torch.zeros_like(self.values),
                   torch.full_like(self.places, -1))
        for column, new in zip(columns, (keys, values, places), strict=True):
            column[at] = new[order]
        both = [torch.cat(pair, dim=1) for pair in zip((self.keys, self.values, self.places), columns, strict=True)]
        self.keys, which = both[0].topk(self.k, dim=1)
        self.values, self.places = both[1].gather(1, which), both[2].gather(1, which)

    def of(self, latent: int) -> tuple[list[float], list[int]]:
        """Values and places of one latent, largest key first."""
        there = self.places[latent] >= 0
        return self.values[latent, there].tolist(), self.places[latent, there].tolist()


class Histograms:
    """Of each latent, a histogram of its positive values: ``BINS`` equal bins from 0 to a power of two above them all.

    That end is not known before the last value has come. As bins of a range twice as large are pairs of bins, counts
    move to the larger range when a value asks for it, and the result is that of all values at once.

    Attributes:
        counts: [n_latents, BINS] int64.
        exponents: [n_latents] int32; a latent's range ends at 2**exponent.
    """

    def __init__(self, n_latents: int):
        self.counts = torch.zeros(n_latents, BINS, dtype=torch.int64)
        self.exponents = torch.full((n_latents,), -149, dtype=torch.int32)  # of the smallest float32

    def add(self, latents: Tensor, values: Tensor) -> None:
        """Count ``values`` [n] above zero of ``latents`` [n] int64."""
        grown = self.exponents.scatter_reduce(0, latents, torch.frexp(values).exponent, "amax")
        shift = (grown - self.exponents).clamp(max=_BITS).long()
        self.counts = torch.zeros_like(self.counts).scatter_add_(
            1, torch.arange(BINS) >> shift[:, None], self.counts)
        self.exponents = grown
        bins = torch.ldexp(values, _BITS - grown[latents]).long()
        self.counts.view(-1).index_add_(0, latents * BINS + bins, torch.ones_like(bins))

    def of(self, latent: int) -> tuple[float, list[int]]:
        """Width of a bin, and the counts up to the last that is not empty."""
        counts = self.counts[latent]
        used = counts.nonzero()
        return 2.0 ** (int(self.exponents[latent]) - _BITS), counts[: int(used[-1]) + 1 if len(used) else 0].tolist()
