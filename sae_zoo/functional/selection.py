"""Rules that say which latents are active on a token, from its pre-activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_zoo.functional.bucketed_topk import largest_of_buckets
from sae_zoo.functional.kernels import kernels_for


class Selection(Protocol):
    """A rule; it looks at each row by itself."""

    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The active entries of pre-activations ``product + bias``, which are not made.

        Args:
            product: [rows, d_sae], contiguous; not kept.
            bias: [d_sae].

        Returns:
            How many each row has [rows]; their latents [n], row after row; their pre-activations [n].
        """

    def mask(self, pre_acts: Tensor) -> Tensor:
        """[rows, d_sae] bool: the same choice, on dense pre-activations."""


@dataclass(frozen=True, eq=False)
class Above:
    """Every entry above ``bound``, a number or [d_sae]."""

    bound: Tensor | float

    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bound = torch.as_tensor(self.bound, dtype=bias.dtype, device=bias.device).expand_as(bias)
        return kernels_for(product).select_above(product, bias, bound)

    def mask(self, pre_acts: Tensor) -> Tensor:
        return pre_acts > self.bound


@dataclass(frozen=True)
class Largest:
    """The ``k`` largest entries of each row. Of equal ones, any."""

    k: int

    def select(self, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _row_after_row(*kernels_for(product).select_largest(product, bias, self.k))

    def mask(self, pre_acts: Tensor) -> Tensor:
        return _mask_of(pre_acts.topk(self.k, dim=1, sorted=False).indices, pre_acts)


@dataclass(frozen=True)
class LargestOfBuckets:
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


def _row_after_row(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :meth:`Selection.select` returns, from k columns and values a row, [rows, k] each."""
    rows, k = ids.shape
    return torch.full((rows,), k, dtype=torch.int64, device=ids.device), ids.reshape(-1), values.reshape(-1)


def _mask_of(ids: Tensor, pre_acts: Tensor) -> Tensor:
    """What :meth:`Selection.mask` returns, from columns [rows, k]."""
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, ids, True)
