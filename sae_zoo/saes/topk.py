"""TopK SAE (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_zoo.functional.bucketed_topk import buckets_for
from sae_zoo.functional.selection import Largest, LargestOfBuckets, Selection
from sae_zoo.saes.base import SAE


class TopKSAE(SAE):
    """f = ReLU(TopK(W_enc (x - b_dec) + b_enc)), k = ``l0_target``.

    The authors' AuxK loss is every SAE's (:class:`sae_zoo.saes.base.SAE`), and on here by default.

    Args:
        auxk_coefficient: 1/32 in the source; 0 turns AuxK off.
        k: latents a token; default ``l0_target``, which must then be a whole number.
        recall: 1, or the expected share of the k largest that an approximate top-k finds in training (as k others stand
            in for the rest, L0 is the same). It takes the fewest buckets that have it
            (:func:`sae_zoo.functional.bucketed_topk.expected_recall`). The JumpReLU paper's TopK SAEs were trained with
            such a one for speed; its recall, and whether the trained SAE used it too, are not known here. Ours does
            not: outside training the k largest are exact, so that what is scored is what is saved, and what another
            library loads.
    """

    variant = "topk"
    has_coefficient = False
    has_threshold = False
    lr_l0_multiple = 1.5  # TopK tolerates a higher rate: it has no threshold below which a latent is stuck

    def __init__(self, *, auxk_coefficient: float = 1 / 32, k: int | None = None, recall: float = 1.0,
                 l0_target: float | None = None, **common: Any):
        wanted = l0_target if k is None else k
        if wanted is None or wanted != int(wanted) or not 0 < wanted <= common["d_sae"]:
            raise ValueError(f"l0_target is {wanted}; topk needs a whole number from 1 to d_sae = {common['d_sae']}")
        if not 0 < recall <= 1:
            raise ValueError(f"sae.recall is {recall}; it must be above 0 and at most 1 (1: the exact top-k)")
        self.k = int(wanted)
        self.n_buckets = None if recall == 1 else buckets_for(common["d_sae"], self.k, recall)
        super().__init__(l0_target=l0_target, auxk_coefficient=auxk_coefficient, **common)

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def start_at(self, quantiles: Tensor) -> None:
        """TopK has no threshold to start."""

    def selection(self, *, training: bool) -> Selection:
        if training and self.n_buckets is not None:
            return LargestOfBuckets(self.k, self.n_buckets)
        return Largest(self.k)

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return torch.relu(pre_acts)

    def dense_latents(self, pre_acts: Tensor, selection: Selection) -> Tensor:
        return self.latents(pre_acts * selection.mask(pre_acts), None)
