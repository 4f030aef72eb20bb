"""How well activations are reconstructed: float64 sums over all rows, divided once.

FVU is about the mean over the **whole** evaluation set: 1 for the mean predictor, 0 for the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    mse: squared error, mean over rows and over dimensions, in raw units squared.
    fvu: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2.
    relative_reconstruction_bias: E||x_hat||^2 / E[x_hat . x]; below 1 is shrinkage.
    cosine: mean cosine of x and x_hat over rows.
    n_rows: rows seen.
    """

    mse: float
    fvu: float
    relative_reconstruction_bias: float
    cosine: float
    n_rows: int


class ReconstructionSums:
    """Adds up rows, in pieces of any size, and gives the metrics of all of them."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._pivot: Tensor | None = None  # near the mean: sums about it do not cancel when the mean is large
        self._sums = torch.zeros(5, dtype=torch.float64)  # error, x_hat^2, x_hat.x, cosine, (x - pivot)^2
        self._centred_sum: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add rows ``x`` [n, d] and their reconstructions, of any float dtype.

        Raises:
            ValueError: if the shapes differ.
        """
        if x.shape != x_hat.shape or x.ndim != 2:
            raise ValueError(f"x has shape {list(x.shape)} and x_hat {list(x_hat.shape)}; both must be [n, d_in]")
        x, x_hat = x.double(), x_hat.double()
        if self._pivot is None or self._centred_sum is None:
            self._pivot = x.mean(0)
            self._centred_sum = torch.zeros_like(self._pivot)
        centred = x - self._pivot
        self.n_rows += len(x)
        self._centred_sum += centred.sum(0)
        self._sums += torch.stack([
            (x - x_hat).square().sum(), x_hat.square().sum(), (x_hat * x).sum(),
            torch.nn.functional.cosine_similarity(x, x_hat, dim=1).sum(), centred.square().sum(),
        ]).cpu()

    @property
    def variance(self) -> float:
        """Sum of ||x - mean(x)||^2 over the rows so far."""
        if not self.n_rows or self._centred_sum is None:
            return 0.0
        return float(self._sums[-1]) - float(self._centred_sum.square().sum()) / self.n_rows

    def result(self) -> Reconstruction:
        """The metrics so far.

        Raises:
            ValueError: if no row was added.
        """
        if not self.n_rows or self._pivot is None:
            raise ValueError("no row was added; evaluation needs at least one")
        error, norm, inner, cosine, _ = self._sums.tolist()
        variance = self.variance
        return Reconstruction(
            mse=error / (self.n_rows * len(self._pivot)), fvu=error / variance if variance > 0 else float("nan"),
            relative_reconstruction_bias=norm / inner if inner else float("nan"), cosine=cosine / self.n_rows,
            n_rows=self.n_rows,
        )
