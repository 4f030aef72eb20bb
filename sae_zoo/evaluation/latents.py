"""How latents are used: L0, firing frequencies, dead latents."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from sae_zoo.functional.sparse_code import SparseCode

# Tokens in a row that count as one observation where the error of a mean is estimated: neighbours are alike.
_BLOCK = 256


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
        self._l0_of_tokens: list[Tensor] = []

    def add(self, code: SparseCode) -> None:
        """Count the entries of ``code`` that are above zero."""
        ids, values = code.active.latent_ids.cpu(), code.values.float().cpu()
        active = values > 0
        self._l0_of_tokens.append(torch.bincount(code.active.rows.cpu()[active], minlength=code.active.batch))
        ids, values = ids[active], values[active]
        self.n_tokens += code.active.batch
        self.fired += torch.bincount(ids, minlength=len(self.fired))
        self.value_sum.index_add_(0, ids, values.double())
        self.value_max.scatter_reduce_(0, ids, values, "amax")

    @property
    def frequency(self) -> Tensor:
        """[d_sae] float64: share of tokens on which each latent fires."""
        return self.fired.double() / self.n_tokens

    @property
    def l0_standard_error(self) -> float:
        """Standard error of ``l0`` as a mean over tokens, by batch means: blocks of 256 tokens in a row count as
        independent, tokens of a block do not. NaN for less than two blocks.
        """
        l0 = torch.cat(self._l0_of_tokens).double()
        blocks = l0[: len(l0) // _BLOCK * _BLOCK].view(-1, _BLOCK).mean(1)
        return float(blocks.std() / len(blocks) ** 0.5) if len(blocks) > 1 else math.nan

    def summary(self) -> dict[str, float]:
        """Sum up ``l0`` and its standard error, ``dead_fraction`` (latents that fired on none of the tokens), and the
        shares of latents that fire on more than 1 % and 10 % of them.
        """
        frequency = self.frequency
        return {
            "l0": float(self.fired.sum()) / self.n_tokens,
            "l0_standard_error": self.l0_standard_error,
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
