"""TopK SAE with the AuxK loss (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sae_zoo.functional.encoder import chunk_rows
from sae_zoo.functional.selection import Largest, Selection
from sae_zoo.saes.base import SAE, Step, squared_error


class TopKSAE(SAE):
    """f = ReLU(TopK(W_enc (x - b_dec) + b_enc)), k = ``l0_target``.

    AuxK: the k_aux largest **dead** latents reconstruct the residual e = x - x_hat, without ``b_dec``; the loss is
    auxk_coefficient * ||e - e_hat||^2 / ||e||^2 (normalised by the residual, as in the authors' code).

    Args:
        auxk_coefficient: alpha; 1/32 in the source, 0 turns AuxK off.
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
        if not auxk_coefficient >= 0:
            raise ValueError(f"sae.auxk_coefficient is {auxk_coefficient}; it must not be negative")
        self.k, self.auxk_coefficient = int(k), auxk_coefficient
        super().__init__(l0_target=l0_target, **common)

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
        if not self.auxk_coefficient:
            return {}
        dead = self.dead.nonzero().squeeze(1)
        if not len(dead):
            return {}
        residual = (step.x - step.x_hat).detach()
        weights = [self.W_enc.index_select(1, dead), self.b_enc.index_select(0, dead), self.W_dec.index_select(0, dead)]
        rows = chunk_rows(residual, len(dead))
        errors = [checkpoint(self._auxk_error, *pieces, *weights, use_reentrant=False)
                  for pieces in zip(self._centre(step.x).detach().split(rows), residual.split(rows), strict=True)]
        return {"auxk_error": sum(errors), "residual": residual.square().sum()}

    def _auxk_error(self, x_centred: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        pre_acts = torch.addmm(b_enc, x_centred, W_enc)
        largest = pre_acts.topk(min(self.d_in // 2, len(b_enc)), dim=1, sorted=False)
        latents = torch.zeros_like(pre_acts).scatter(1, largest.indices, torch.relu(largest.values))
        return squared_error(latents @ W_dec, residual)

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        if not means:
            return {}
        return {"auxk": self.auxk_coefficient * means["auxk_error"] / means["residual"].clamp_min(1e-12)}
