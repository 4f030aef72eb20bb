"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sae_zoo.functional.activations import heaviside, jumprelu, kernel_half_width
from sae_zoo.functional.selection import Above, Selection
from sae_zoo.saes.base import SAE, Step, at_latents

# Below it a threshold does nothing, and its logarithm would run away; in units of E||x||^2 = 1.
_LEAST_THRESHOLD = 1e-6

LOSSES = ("l0", "l0_target", "l0_target_gemma_scope_2")
PENALTIES = ("l0", "l1")


class JumpReLUSAE(SAE):
    """f = pi * H(pi - theta), one threshold theta_i > 0 a latent, trained by straight-through estimators.

    Args:
        sparsity_loss: ``l0``: lambda * L0; ``l0_target``: lambda * (L0 / target - 1)^2, L0 of the batch (per example or
            batch mean is not settled by the paper's text; the batch mean is the common reading);
            ``l0_target_gemma_scope_2``: lambda * 2 / target * (L0 - target)^2. The latter two are the published losses
            and need an explicit ``sparsity_coefficient``.
        penalty: ``l0``, or ``l1`` (an ablation: claim C13): lambda * sum_i f_i, whose derivative goes into the
            pre-activations of active entries alone. Thresholds are then trained by the reconstruction: the
            pseudo-derivative of f would turn the penalty into an L0 one of weight lambda * theta_i, which is what that
            arm has to be without.
        kernel, bandwidth: of the pseudo-derivatives; 0.001 and the rectangle in the paper, in units of E||x||^2 = 1.
        initial_threshold: where no data-dependent start is on; 0.001 in the paper.
        threshold_as: ``log`` (trained as its logarithm) or ``raw``.
        ste_into_pre_acts: also send the window's gradient into the pre-activations (an ablation: claim C13).
    """

    variant = "jumprelu"
    lr_l0_multiple = 1.0

    def __init__(self, *, sparsity_loss: str = "l0", penalty: str = "l0", kernel: str = "rectangle",
                 bandwidth: float = 0.001, initial_threshold: float = 0.001, threshold_as: str = "log",
                 ste_into_pre_acts: bool = False, **common: Any):
        if sparsity_loss not in LOSSES:
            raise ValueError(f"sae.sparsity_loss is {sparsity_loss!r}; choose from {', '.join(LOSSES)}")
        if penalty not in PENALTIES:
            raise ValueError(f"sae.penalty is {penalty!r}; choose from {', '.join(PENALTIES)}")
        if penalty == "l1" and sparsity_loss != "l0":
            raise ValueError(f"sae.sparsity_loss={sparsity_loss} is a loss of L0, and sae.penalty is l1; use "
                             "sae.penalty=l0")
        if threshold_as not in ("log", "raw"):
            raise ValueError(f"sae.threshold_as is {threshold_as!r}; choose log or raw")
        if not initial_threshold > 0:
            raise ValueError(f"sae.initial_threshold is {initial_threshold}; it must be positive")
        if sparsity_loss != "l0" and (common.get("sparsity_coefficient") is None or common.get("l0_target") is None):
            raise ValueError(f"sae.sparsity_loss={sparsity_loss} needs both l0_target and sae.sparsity_coefficient; "
                             "give them, or use sae.sparsity_loss=l0")
        self.half_width = kernel_half_width(kernel, bandwidth)
        self.sparsity_loss, self.penalty, self.threshold_as = sparsity_loss, penalty, threshold_as
        self.window: dict[str, Any] = {"kernel": kernel, "bandwidth": bandwidth, "ste_into_pre_acts": ste_into_pre_acts}
        super().__init__(**common)
        start = math.log(initial_threshold) if threshold_as == "log" else initial_threshold
        self.threshold_parameter = nn.Parameter(torch.full((self.d_sae,), start))

    @property
    def threshold(self) -> Tensor:
        """[d_sae], in normalised units."""
        return self.threshold_parameter.exp() if self.threshold_as == "log" else self.threshold_parameter

    @property
    def options(self) -> dict[str, Any]:
        return {"threshold_as": "raw"}  # as exported

    @torch.no_grad()
    def start_at(self, quantiles: Tensor) -> None:
        self.threshold_parameter.copy_(quantiles.log() if self.threshold_as == "log" else quantiles)

    def excess(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return pre_acts - at_latents(self.threshold.detach(), ids)

    @torch.no_grad()
    def raise_thresholds(self, shift: Tensor) -> None:
        old = self.threshold.clamp_min(_LEAST_THRESHOLD)
        # Downwards by a share, so that a threshold stays above 0; the two meet without a kink.
        lower = old * torch.exp((shift / old).clamp_max(0))
        self.start_at(torch.where(shift > 0, old + shift, lower).clamp_min(_LEAST_THRESHOLD))

    @torch.no_grad()
    def constrain(self) -> None:
        if self.threshold_as == "raw":
            self.threshold_parameter.clamp_min_(0.0)

    def selection(self, *, training: bool) -> Selection:
        return Above(self.threshold.detach() - (self.half_width if training else 0.0))

    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        return jumprelu(pre_acts, self.threshold, ids=ids, **self.window)

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        return {**super().folded(), "threshold": self.input_scale * self.threshold}

    @torch.no_grad()
    def load_folded(self, weights: dict[str, Tensor]) -> None:
        super().load_folded(weights)
        self.start_at(weights["threshold"])

    def sums(self, step: Step) -> dict[str, Tensor]:
        if self.penalty == "l1":
            active = step.pre_acts > step.of_latent(self.threshold.detach())
            return {"l1": (step.pre_acts * active).sum(dtype=torch.float32)}
        return {"l0": heaviside(step.pre_acts, self.threshold, ids=step.latent_ids, **self.window).sum()}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.penalty == "l1":
            return {"sparsity": self.coefficient * means["l1"]}
        l0, target = means["l0"], self.l0_target
        if self.sparsity_loss == "l0_target":
            assert target is not None  # without one __init__ refuses this loss
            l0 = (l0 / target - 1).square()
        elif self.sparsity_loss == "l0_target_gemma_scope_2":
            assert target is not None  # as above
            l0 = 2 / target * (l0 - target).square()
        return {"sparsity": self.coefficient * l0}
