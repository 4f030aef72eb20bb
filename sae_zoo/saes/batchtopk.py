"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_zoo.functional.processes import mean_over_processes
from sae_zoo.functional.selection import Above, LargestOfBatch, Selection
from sae_zoo.saes.base import SAE

_NEWEST = 0.01  # weight of the newest batch in the threshold
_LEAST_THRESHOLD = 1e-6


class BatchTopKSAE(SAE):
    """f = ReLU(pre_acts) of the ``l0_target`` x batch largest entries of a batch: a token takes as many latents as it
    needs.

    Outside training one threshold for all latents takes their place. It is the running mean of the smallest value that
    a batch has kept; calibration then moves it until L0 on held-out tokens is the target. On several devices, each
    takes the largest of its own part of the batch.

    Args:
        auxk_coefficient: 1/32, as TopK's.
    """

    variant = "batchtopk"
    has_coefficient = False
    lr_l0_multiple = 1.5  # as TopK's
    threshold: Tensor

    def __init__(self, *, auxk_coefficient: float = 1 / 32, **common: Any):
        super().__init__(auxk_coefficient=auxk_coefficient, **common)
        self.register_buffer("threshold", torch.zeros(()))

    def selection(self, *, training: bool) -> Selection | LargestOfBatch:
        if not training:
            return Above(self.threshold)
        assert self.l0_target is not None  # nothing else says how sparse to be
        return LargestOfBatch(self.l0_target, self.threshold)

    @torch.no_grad()
    def observe(self, selection: Selection) -> None:
        assert isinstance(selection, Above) and isinstance(selection.bound, Tensor)  # as LargestOfBatch makes it
        smallest = mean_over_processes({"smallest": selection.bound})["smallest"]
        self.threshold.lerp_(smallest, _NEWEST)

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return torch.relu(pre_acts)

    def dense_latents(self, pre_acts: Tensor, selection: Selection) -> Tensor:
        return self.latents(pre_acts * selection.mask(pre_acts), None)

    def start_at(self, quantiles: Tensor) -> None:
        self.threshold.copy_(quantiles.mean())

    def excess(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return pre_acts - self.threshold

    @torch.no_grad()
    def raise_thresholds(self, shift: Tensor) -> None:
        self.threshold.add_(shift.mean()).clamp_min_(_LEAST_THRESHOLD)

    def folded(self) -> dict[str, Tensor]:
        return {**super().folded(), "threshold": (self.input_scale * self.threshold).expand(self.d_sae)}

    def load_folded(self, weights: dict[str, Tensor]) -> None:
        super().load_folded(weights)
        self.threshold.copy_(weights["threshold"][0])
