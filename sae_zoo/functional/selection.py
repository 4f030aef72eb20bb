"""Rules that say which latents are active on a token, from its pre-activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
        ids, values = kernels_for(product).select_largest(product, bias, self.k)
        counts = torch.full((len(product),), self.k, dtype=torch.int64, device=product.device)
        return counts, ids.reshape(-1), values.reshape(-1)

    def mask(self, pre_acts: Tensor) -> Tensor:
        ids = pre_acts.topk(self.k, dim=1, sorted=False).indices
        return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, ids, True)
