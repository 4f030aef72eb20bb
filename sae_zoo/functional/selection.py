"""Rules that say which latents are active on a token, from its pre-activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_zoo.functional.bucketed_topk import largest_of_buckets
from sae_zoo.functional.kernels import kernels_for


class Selection(ABC):
    """A rule that looks at each row by itself."""

    def of_batch(self, products: Callable[[], Iterable[Tensor]], bias: Tensor, n_rows: int) -> Selection:
        """The rule for all rows of a training batch; a rule that looks at each row by itself is that already.

        Args:
            products: gives the pre-activations without ``bias``, [rows, d_sae] at a time; each is gone with the next.
            bias: [d_sae].
            n_rows: of all of them.
        """
        return self

    @abstractmethod
    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The active entries of pre-activations ``product + bias``, which are not made.

        Args:
            product: [rows, d_sae], contiguous; not kept.
            bias: [d_sae].

        Returns:
            How many each row has [rows]; their latents [n], row after row; their pre-activations [n].
        """

    @abstractmethod
    def mask(self, pre_acts: Tensor) -> Tensor:
        """[rows, d_sae] bool: the same choice, on dense pre-activations."""


@dataclass(frozen=True, eq=False)
class Above(Selection):
    """Every entry above ``bound``, a number or [d_sae]."""

    bound: Tensor | float

    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bound = torch.as_tensor(self.bound, dtype=bias.dtype, device=bias.device).expand_as(bias)
        return kernels_for(product).select_above(product, bias, bound)

    def mask(self, pre_acts: Tensor) -> Tensor:
        return pre_acts > self.bound


@dataclass(frozen=True)
class Largest(Selection):
    """The ``k`` largest entries of each row. Of equal ones, any."""

    k: int

    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _row_after_row(*kernels_for(product).select_largest(product, bias, self.k))

    def mask(self, pre_acts: Tensor) -> Tensor:
        return _mask_of(pre_acts.topk(self.k, dim=1, sorted=False).indices, pre_acts)


@dataclass(frozen=True)
class LargestOfBuckets(Selection):
    """The ``k`` largest of the largest entries of ``n_buckets`` buckets of each row: an approximation of
    :class:`Largest` (:mod:`sae_zoo.functional.bucketed_topk`). Of equal ones, any.
    """

    k: int
    n_buckets: int

    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernels = kernels_for(product)
        return _row_after_row(*kernels.select_largest_of_buckets(product, bias, self.k, self.n_buckets))

    def mask(self, pre_acts: Tensor) -> Tensor:
        return _mask_of(largest_of_buckets(pre_acts, self.k, self.n_buckets), pre_acts)


@dataclass(frozen=True, eq=False)
class LargestOfBatch:
    """The ``k`` largest entries for each row of a batch, anywhere in it, as far as they are above 0: no rule before it
    has seen the batch. Of equal ones at the edge, all.

    Attributes:
        k: entries a row, on average.
        guess: [], about where the smallest of them lies; it saves work, and decides nothing.
    """

    k: float
    guess: Tensor

    def of_batch(self, products: Callable[[], Iterable[Tensor]], bias: Tensor, n_rows: int) -> Above:
        """See :meth:`Selection.of_batch`."""
        n = max(1, round(self.k * n_rows))
        largest = self._largest(products(), bias, n, self.guess.clamp_min(0) / 2)
        if len(largest) < n:  # the guess was too high
            largest = self._largest(products(), bias, n, torch.zeros_like(self.guess))
        if len(largest) < n:
            return Above(torch.zeros_like(self.guess))
        # Above has it: the next number below.
        return Above(torch.nextafter(largest.min(), -torch.ones_like(self.guess)).clamp_min(0))

    @staticmethod
    def _largest(products: Iterable[Tensor], bias: Tensor, n: int, floor: Tensor) -> Tensor:
        """The ``n`` largest entries above ``floor``, or all of them where there are fewer."""
        kept = floor.new_empty(0)
        for product in products:
            *_, values = Above(floor).select(product, bias)
            kept = torch.cat([kept, values.to(kept.dtype)])
            if len(kept) > 4 * n:  # what is below the n-th of some is below that of all
                kept = kept.topk(n, sorted=False).values
                floor = kept.min()
        return kept.topk(min(n, len(kept)), sorted=False).values


def _row_after_row(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of :meth:`Selection.select`, from k columns and values a row, [rows, k] each."""
    rows, k = ids.shape
    return torch.full((rows,), k, dtype=torch.int64, device=ids.device), ids.reshape(-1), values.reshape(-1)


def _mask_of(ids: Tensor, pre_acts: Tensor) -> Tensor:
    """The result of :meth:`Selection.mask`, from columns [rows, k]."""
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, ids, True)
