"""TopK SAE (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_zoo.functional.selection import Largest, Selection
from sae_zoo.saes.base import SAE, Step


class TopKSAE(SAE):
    """f = ReLU(TopK(W_enc (x - b_dec) + b_enc)), k = ``l0_target``.

    The authors' AuxK loss is every SAE's (:class:`sae_zoo.saes.base.SAE`), and on here by default.

    Args:
        auxk_coefficient: 1/32 in the source; 0 turns AuxK off.
        k: latents a token; default ``l0_target``, which must then be a whole number.
    """

    variant = "topk"
    has_coefficient = False

    def __init__(self, *, auxk_coefficient: float = 1 / 32, k: int | None = None, l0_target: float | None = None,
                 **common: Any):
        if common.get("sparsity_coefficient") is not None:
            raise ValueError(f"sae.sparsity_coefficient is {common['sparsity_coefficient']}; topk has no sparsity "
                             "coefficient, give l0_target instead")
        k = l0_target if k is None else k
        if k is None or k != int(k) or not 0 < k <= common["d_sae"]:
            raise ValueError(f"l0_target is {k}; topk needs a whole number from 1 to d_sae = {common['d_sae']}")
        self.k = int(k)
        super().__init__(l0_target=l0_target, auxk_coefficient=auxk_coefficient, **common)

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def start_at(self, quantiles: Tensor) -> None:
        """TopK has no threshold to start."""

    def selection(self, *, training: bool) -> Selection:
        return Largest(self.k)

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        if ids is None:
            pre_acts = pre_acts * Largest(self.k).mask(pre_acts)
        return torch.relu(pre_acts)

    def sums(self, step: Step) -> dict[str, Tensor]:
        return {}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}
