"""How latents are used: L0, firing frequencies, dead latents."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from sae_zoo.functional.sparse_code import SparseCode


class LatentCounts:
    """Adds up sparse codes of any number of tokens.

    Args:
        d_sae: number of latents.
    """

    def __init__(self, d_sae: int):
        self.n_tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.value_sum = torch.zeros(d_sae, dtype=torch.float64)
        self.value_max = torch.zeros(d_sae)

    def add(self, code: SparseCode) -> None:
        """Count the entries of ``code`` that are above zero."""
        ids, values = code.active.latent_ids.cpu(), code.values.float().cpu()
        ids, values = ids[values > 0], values[values > 0]
        self.n_tokens += code.active.batch
        self.fired += torch.bincount(ids, minlength=len(self.fired))
        self.value_sum.index_add_(0, ids, values.double())
        self.value_max.scatter_reduce_(0, ids, values, "amax")

    @property
    def frequency(self) -> Tensor:
        """[d_sae] float64: share of tokens on which each latent fires."""
        return self.fired.double() / self.n_tokens

    def summary(self) -> dict[str, float]:
        """``l0``; ``dead_fraction`` (latents that fired on none of the tokens); shares of latents that fire on more than
        1 % and 10 % of them.
        """
        frequency = self.frequency
        return {
            "l0": float(self.fired.sum()) / self.n_tokens,
            "dead_fraction": float((self.fired == 0).double().mean()),
            "fraction_above_1pct": float((frequency > 0.01).double().mean()),
            "fraction_above_10pct": float((frequency > 0.1).double().mean()),
        }

    def write_csv(self, path: Path) -> None:
        """One row a latent: frequency, mean and largest value where it fires, in raw units."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["latent", "frequency", "mean_active_value", "max_value"])
            mean = self.value_sum / self.fired.clamp_min(1)
            for i, row in enumerate(zip(self.frequency.tolist(), mean.tolist(), self.value_max.tolist(), strict=True)):
                writer.writerow([i, *(f"{value:.6g}" for value in row)])
