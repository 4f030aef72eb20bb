"""ReLU SAE with an L1 penalty (Bricken et al. 2023): the baseline whose shrinkage L0 training avoids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_zoo.functional.selection import Above, Selection
from sae_zoo.saes.base import SAE, Step

FORMS = ("l1", "norm_weighted")


class ReLUSAE(SAE):
    """f = ReLU(W_enc (x - b_dec) + b_enc).

    Args:
        form: ``l1``: lambda * sum_i f_i with unit decoder rows; ``norm_weighted``: lambda * sum_i f_i ||d_i|| with free
            ones (RI-L1, Conerly et al. 2024).
    """

    variant = "relu"
    bias_is_threshold = True

    def __init__(self, *, form: str = "l1", **common: Any):
        if form not in FORMS:
            raise ValueError(f"sae.form is {form!r}; choose from {', '.join(FORMS)}")
        self.form = form
        super().__init__(**common)

    @property
    def options(self) -> dict[str, Any]:
        return {"form": self.form}

    @property
    def unit_norm_decoder(self) -> bool:
        return self.form == "l1"

    def selection(self, *, training: bool) -> Selection:
        return Above(0.0)

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return torch.relu(pre_acts)

    def sums(self, step: Step) -> dict[str, Tensor]:
        weighted = step.latents
        if self.form == "norm_weighted":
            weighted = weighted * step.of_latent(torch.linalg.vector_norm(self.W_dec, dim=1))
        return {"l1": weighted.sum(dtype=torch.float32)}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sparsity": self.coefficient * means["l1"]}
