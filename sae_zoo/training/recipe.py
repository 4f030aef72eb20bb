"""The recipe: everything about training that the variants share."""

from __future__ import annotations

from dataclasses import dataclass

from sae_zoo.training.adam import SECOND_MOMENTS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an SAE is trained; the values stand in ``conf/recipe/*.yaml``, each with its reason.

    Attributes:
        n_steps: optimiser steps.
        batch_size: activations a step, over all devices.
        lr: peak learning rate of Adam: of W_enc and b_dec.
        decoder_lr, free_decoder_lr: peak learning rate of W_dec, where its rows have norm 1 and where they are free.
        threshold_lr: peak learning rate of thresholds (JumpReLU).
        bias_lr: peak learning rate of whatever else is one number a latent: encoder biases, Gated's magnitudes.
        beta1, beta2, adam_eps: Adam's.
        second_moment: of Adam, for matrices: of each ``element``, or one for the ``row`` of a latent.
        lr_l0: None, or the L0 above which JumpReLU's rates, but that of thresholds, fall in proportion (TopK's above
            1.5 times it). One step changes the reconstruction by the sum of the changes of all active latents, so at a
            high L0 it overshoots; a latent pushed below its threshold then gets no gradient.
        lr_warmup_steps, lr_start_factor, lr_decay_fraction: see :func:`sae_zoo.training.schedules.lr_factor`.
        coefficient_warmup_steps: linear warm-up of the sparsity coefficient.
        b_dec_start: ``zero`` (the paper) or ``mean`` (of the first activations).
        decoder_start: ``random`` directions (the paper), or ``data``: see
            :meth:`sae_zoo.saes.lightning.LightningSAE.initialise`.
        threshold_start: ``fixed`` (the paper: thresholds and biases as the variant's yaml says), or ``quantile``: of
            each latent's first pre-activations, so that it is active on ``l0_target / d_sae`` of the tokens.
        l0_control: whether a measured L0 drives thresholds and coefficient; without it variants that have a coefficient
            need an explicit one.
        control_shift: see :func:`sae_zoo.training.control.threshold_shift`.
        control_proportional, control_integral: see :func:`sae_zoo.training.control.next_log_coefficient`.
        error_bound: None, or the multiple of the mean length of a token's error above which it pulls no harder (Huber
            1964): one row of a huge norm else moves most latents the same way in a single step.
        dead_after_tokens: a latent that was silent for so many tokens counts as dead in training (AuxK); None: see
            :attr:`sae_zoo.saes.lightning.LightningSAE.dead_after_tokens`.
        auxk_full_steps: None, or see :func:`sae_zoo.training.schedules.auxk_factor`.

    Raises:
        ValueError: if a value is out of bounds.
    """

    n_steps: int
    batch_size: int
    lr: float
    decoder_lr: float
    free_decoder_lr: float
    threshold_lr: float
    bias_lr: float
    lr_l0: float | None
    beta1: float
    beta2: float
    adam_eps: float
    second_moment: str
    lr_warmup_steps: int
    lr_start_factor: float
    lr_decay_fraction: float
    coefficient_warmup_steps: int
    b_dec_start: str
    decoder_start: str
    threshold_start: str
    l0_control: bool
    control_shift: float
    control_proportional: float
    control_integral: float
    error_bound: float | None
    dead_after_tokens: int | None
    auxk_full_steps: int | None

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_size", "lr", "decoder_lr", "free_decoder_lr", "threshold_lr", "bias_lr",
                     "adam_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name in ("lr_start_factor", "lr_decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("lr_warmup_steps", "coefficient_warmup_steps", "control_shift", "control_proportional",
                     "control_integral"):
            if getattr(self, name) < 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must not be negative")
        if self.second_moment not in SECOND_MOMENTS:
            raise ValueError(f"recipe.second_moment is {self.second_moment!r}; choose {' or '.join(SECOND_MOMENTS)}")
        if self.b_dec_start not in ("zero", "mean"):
            raise ValueError(f"recipe.b_dec_start is {self.b_dec_start!r}; choose zero or mean")
        if self.decoder_start not in ("random", "data"):
            raise ValueError(f"recipe.decoder_start is {self.decoder_start!r}; choose random or data")
        if self.threshold_start not in ("fixed", "quantile"):
            raise ValueError(f"recipe.threshold_start is {self.threshold_start!r}; choose fixed or quantile")
        for name in ("lr_l0", "error_bound", "dead_after_tokens", "auxk_full_steps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must be positive or null")
