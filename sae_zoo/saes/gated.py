"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_zoo.functional.selection import Above, Selection
from sae_zoo.saes.base import SAE, Step, at_latents

FORMS = ("original", "ri_l1")


class GatedSAE(SAE):
    """pi_gate = W_gate (x - b_dec) + b_gate; f = 1[pi_gate > 0] * ReLU(W_mag (x - b_dec) + b_mag), with the rows tied
    by W_mag[i] = exp(r_mag[i]) * W_gate[i]. ``W_enc`` is W_gate.

    Since the magnitude path is exp(r_mag) * (pi_gate - b_gate) + b_mag, both paths are elementwise on one
    pre-activation, and share one active set. The loss adds lambda * ||ReLU(pi_gate)||_1 and, with weight 1, the error
    of a reconstruction from ReLU(pi_gate) through a **frozen** decoder.

    Args:
        form: ``original`` (unit decoder rows) or ``ri_l1`` (sum_i ReLU(pi_gate,i) ||d_i||, free decoder rows, whose
            norms the penalty takes as they are: trained by it, rows shrink faster than r_mag can make up for in a short
            run, FVU 0.53 instead of 0.15; the paper does not say).
    """

    variant = "gated"
    encoder_bias = "b_gate"
    bias_is_threshold = True
    b_gate: nn.Parameter

    def __init__(self, *, form: str = "original", **common: Any):
        if form not in FORMS:
            raise ValueError(f"sae.form is {form!r}; choose from {', '.join(FORMS)}")
        self.form = form
        super().__init__(**common)
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def options(self) -> dict[str, Any]:
        return {"form": self.form}

    @property
    def unit_norm_decoder(self) -> bool:
        return self.form == "original"

    def selection(self, *, training: bool) -> Selection:
        return Above(0.0)

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        b_gate, b_mag, r_mag = (at_latents(p, ids) for p in (self.b_gate, self.b_mag, self.r_mag))
        return torch.relu(r_mag.exp() * (pre_acts - b_gate) + b_mag) * (pre_acts > 0)

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        # The magnitude path sees the encoder through exp(r_mag).
        b_mag = self.input_scale * (self.b_mag - self.encoded_b_dec * self.r_mag.exp())
        return {**super().folded(), "b_mag": b_mag, "r_mag": self.r_mag}

    @torch.no_grad()
    def load_folded(self, weights: dict[str, Tensor]) -> None:
        super().load_folded(weights)
        self.b_mag.copy_(weights["b_mag"])
        self.r_mag.copy_(weights["r_mag"])

    def sums(self, step: Step) -> dict[str, Tensor]:
        gate = torch.relu(step.pre_acts)
        error, *_ = step.squared_error(gate, self.W_dec.detach(), None)
        weighted = gate
        if self.form == "ri_l1":
            weighted = gate * step.of_latent(torch.linalg.vector_norm(self.W_dec.detach(), dim=1))
        return {"l1": weighted.sum(dtype=torch.float32), "auxiliary": error}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sparsity": self.coefficient * means["l1"], "auxiliary": means["auxiliary"]}
