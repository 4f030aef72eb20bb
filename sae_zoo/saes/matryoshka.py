"""Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547), on BatchTopK."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae_zoo.saes.base import Step
from sae_zoo.saes.batchtopk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """A BatchTopK SAE whose first latents have to reconstruct by themselves too: the loss is the sum, over nested
    prefixes of the latents and all of them, of ||x - x_hat_m||^2 with x_hat_m = b_dec + sum of f_i d_i over i < m.

    Args:
        prefixes: of all latents, the shares that the nested prefixes have, rising; all of them come last by themselves.
    """

    variant = "matryoshka"

    def __init__(self, *, prefixes: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2), **common: Any):
        if not prefixes or list(prefixes) != sorted(set(prefixes)) or not 0 < prefixes[0] <= prefixes[-1] < 1:
            raise ValueError(f"sae.prefixes is {list(prefixes)}; give rising shares of the latents between 0 and 1")
        super().__init__(**common)
        self.sizes = sorted({max(1, round(share * self.d_sae)) for share in prefixes} - {self.d_sae})
        if not self.sizes:
            raise ValueError(f"d_sae is {self.d_sae}; matryoshka needs at least 2 latents, to have a prefix of them")

    def sums(self, step: Step) -> dict[str, Tensor]:
        ids = torch.arange(self.d_sae, device=step.latents.device) if step.latent_ids is None else step.latent_ids
        errors = [step.squared_error(step.latents * (ids < size), self.W_dec, self.b_dec)[0] for size in self.sizes]
        return {"prefixes": torch.stack(errors).sum()}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prefixes": means["prefixes"]}
