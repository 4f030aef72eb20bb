"""ReLU SAE with an L1 penalty (Bricken et al. 2023): the baseline whose shrinkage L0 training avoids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_zoo.functional.activations import heaviside, kernel_half_width
from sae_zoo.functional.selection import Above, Selection
from sae_zoo.saes.base import SAE, Step

FORMS = ("l1", "norm_weighted")
PENALTIES = ("l1", "l0")


class ReLUSAE(SAE):
    """f = ReLU(W_enc (x - b_dec) + b_enc).

    Args:
        form: ``l1``: lambda * sum_i f_i with unit decoder rows; ``norm_weighted``: lambda * sum_i f_i ||d_i|| with free
            ones (RI-L1, Conerly et al. 2024).
        penalty: ``l1``, or ``l0`` (an ablation: claim C13): lambda * ||f||_0, which is lambda * sum_i H(pi_i) of the
            pre-activations pi. There is no threshold that the straight-through estimator could train, so it trains what
            decides instead: d/dpi H(pi) := (1 / eps) K(pi / eps), the pseudo-derivative that the JumpReLU paper gives
            H(pi - theta) for theta, at theta = 0 and with the sign of pi. By it the penalty reaches W_enc, b_enc and
            b_dec, of entries within the window around 0; d/dpi of f stays ReLU's own.
        kernel, bandwidth: K and eps, as JumpReLU's; they are used by the ``l0`` penalty alone.
    """

    variant = "relu"
    bias_is_threshold = True

    def __init__(self, *, form: str = "l1", penalty: str = "l1", kernel: str = "rectangle", bandwidth: float = 0.001,
                 **common: Any):
        if form not in FORMS:
            raise ValueError(f"sae.form is {form!r}; choose from {', '.join(FORMS)}")
        if penalty not in PENALTIES:
            raise ValueError(f"sae.penalty is {penalty!r}; choose from {', '.join(PENALTIES)}")
        if penalty == "l0" and form != "l1":
            raise ValueError(f"sae.form={form} weights the L1 penalty, and sae.penalty is l0; leave sae.form at l1")
        half_width = kernel_half_width(kernel, bandwidth)
        self.lowest_with_gradient = -half_width if penalty == "l0" else 0.0
        self.form, self.penalty = form, penalty
        self.window: dict[str, Any] = {"kernel": kernel, "bandwidth": bandwidth, "ste_into_pre_acts": True}
        super().__init__(**common)

    @property
    def options(self) -> dict[str, Any]:
        return {"form": self.form}

    @property
    def unit_norm_decoder(self) -> bool:
        return self.form == "l1"

    def selection(self, *, training: bool) -> Selection:
        return Above(self.lowest_with_gradient if training else 0.0)

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return torch.relu(pre_acts)

    def sums(self, step: Step) -> dict[str, Tensor]:
        if self.penalty == "l0":
            return {"l0": heaviside(step.pre_acts, step.pre_acts.new_zeros(()), **self.window).sum()}
        weighted = step.latents
        if self.form == "norm_weighted":
            weighted = weighted * step.of_latent(torch.linalg.vector_norm(self.W_dec, dim=1))
        return {"l1": weighted.sum(dtype=torch.float32)}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sparsity": self.coefficient * means[self.penalty]}
