"""The Lightning side of every SAE: data-dependent start, optimiser and schedules, L0 control, counters, logging.

Glue around the pure functions of ``training`` and ``functional``; whatever must survive a resume is a buffer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_zoo.functional.processes import sum_over_processes
from sae_zoo.saes.attributes import SAEAttributes
from sae_zoo.training.adam import Adam
from sae_zoo.training.control import (
    LARGEST_BESIDE_SHIFTS,
    LARGEST_ERROR,
    l0_error,
    next_log_coefficient,
    threshold_shift,
)
from sae_zoo.training.recipe import Recipe
from sae_zoo.training.schedules import decays, lr_factor, warmup_factor
from sae_zoo.training.watch import collapse

log = logging.getLogger(__name__)

# Weight of the newest batch in the running L0 that control looks at, and of the newest held-out measurement.
_L0_WEIGHT, _RATIO_WEIGHT = 0.05, 0.5
_START_CHUNK_ELEMENTS = 1 << 22
# The most by which calibration moves thresholds, in mean excesses; how near to the target, as a logarithm, it is
# content; how often it looks; rows encoded at a time.
_LARGEST_SHIFT = 0.5
_CALIBRATED_WITHIN = 5e-4
_CALIBRATION_LOOKS = 10
_CALIBRATION_ROWS = 4096
# A latent's mean excess is one over about so many of the last tokens on which it was active.
_EXCESS_TOKENS = 20.0
# See LightningSAE.dead_after_tokens.
_DEAD_AFTER_TOKENS, _DEAD_AFTER_GAPS, _DEAD_AFTER_SHARE = 2500, 50, 0.01
# What a random direction weighs beside that of a row of data in a latent's start. It tells apart latents that start at
# the same row, and leaves fewer silent than rows alone, at the same FVU: of TopK's at L0 20, mlp.15 of SmolLM2 0.5
# instead of 2.8 %, attention.15 6 instead of 10 %, attention.2 14 instead of 15 % (analysis/LOG.md).
_RANDOM_SHARE = 0.5


@dataclass(frozen=True)
class Calibration:
    """Result of the calibration at the end of L0 control.

    Attributes:
        shift: by how many of its own mean excesses every threshold was raised; at most a half.
        l0_before, l0_after, fvu_before, fvu_after: on the rows that it looked at.
    """

    shift: float
    l0_before: float
    l0_after: float
    fvu_before: float
    fvu_after: float


class LightningSAE(SAEAttributes):
    """Training of an SAE whose maths (``loss``, ``encode_sparse``, ...) a subclass gives.

    Args:
        d_sae: number of latents.
        recipe, l0_target, sparsity_coefficient, initial_coefficient: see :class:`sae_zoo.saes.base.SAE`.

    Raises:
        ValueError: if a value is out of bounds.
    """

    has_coefficient: ClassVar[bool] = True  # of a sparsity term; False where the equation fixes L0 in training
    has_threshold: ClassVar[bool] = True  # whether raising what latents have to exceed lowers L0 outside training
    lr_l0_multiple: ClassVar[float | None] = None  # of recipe.lr_l0, above which rates fall; None where they do not

    def __init__(self, *, d_sae: int, recipe: Recipe | None, l0_target: float | None,
                 sparsity_coefficient: float | None, initial_coefficient: float):
        super().__init__()
        if l0_target is not None and not 0 < l0_target <= d_sae:
            raise ValueError(f"l0_target is {l0_target}; it must be above 0 and at most d_sae = {d_sae}")
        if sparsity_coefficient is not None and not sparsity_coefficient >= 0:
            raise ValueError(f"sparsity_coefficient is {sparsity_coefficient}; it must not be negative")
        if not initial_coefficient > 0:
            raise ValueError(f"initial_coefficient is {initial_coefficient}; it must be positive")
        if sparsity_coefficient is not None and not self.has_coefficient:
            raise ValueError(f"sae.sparsity_coefficient is {sparsity_coefficient}; {self.variant} has no sparsity "
                             "coefficient, give l0_target instead")
        if recipe is not None and l0_target is None and sparsity_coefficient is None:
            raise ValueError("l0_target is null and sae.sparsity_coefficient too; give one, to say how sparse to be")
        if recipe is not None and self.has_coefficient and sparsity_coefficient is None and not recipe.l0_control:
            raise ValueError("recipe.l0_control is false, and sae.sparsity_coefficient is null; give a coefficient, as "
                             "the paper does, or recipe.l0_control=true to reach an l0_target")
        self.d_sae, self.recipe = d_sae, recipe
        self.l0_target, self.sparsity_coefficient = l0_target, sparsity_coefficient
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("density", torch.ones(()))  # share of entries in the last step's active set
        self.register_buffer("log_coefficient", torch.tensor(math.log(initial_coefficient), dtype=torch.float64))
        self.register_buffer("control_error", torch.tensor(math.nan, dtype=torch.float64))
        # Of each latent: by how much a pre-activation exceeds what makes it active, on average where it does.
        self.register_buffer("mean_excess", torch.zeros(d_sae))
        self.register_buffer("shifted", torch.zeros((), dtype=torch.float64))  # by L0 control, in mean excesses, so far
        self.register_buffer("error_bound", torch.tensor(math.inf))
        self.register_buffer("least_dead", torch.ones((), dtype=torch.float64))
        self.register_buffer("last_fvu", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("l0_average", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("heldout_l0_ratio", torch.ones((), dtype=torch.float64))
        self._heldout: list[tuple[float, int]] = []
        self._shift = 0.0  # of this step
        self.notes: list[str] = []  # what somebody who reads the result must know
        self.likely_cause = "rates that are too high for this place: try half of recipe.lr and the other rates"

    # Start.

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Start from raw activations ``x`` [n, d_in], as far as the recipe says so.

        Where ``b_dec`` starts at the mean, the unit of length is the root mean square of ||x - mean||, so that nothing
        depends on where the origin is. Where directions start at data, as dictionaries do in K-SVD (Aharon et al.
        2006), each is that of a row of ``x`` about ``b_dec`` and half as much of a random one. Where thresholds (or
        biases) start at a quantile, it is the one of the latent's pre-activations that makes it active on
        :attr:`start_density` of the tokens; the tied encoder is then scaled to the least-squares multiple of its
        reconstruction, which it overshoots.
        """
        if self._recipe.b_dec_start == "mean":
            mean = x.double().mean(0)
            self.input_scale.copy_((x - mean).square().sum(1).mean().sqrt())
            self.b_dec.copy_(mean / self.input_scale)
        x = self._normalise(x)
        centred = x - self.b_dec
        if self._recipe.decoder_start == "data":
            self._start_at_rows(centred)
        if self.start_density is None:
            return
        rank = max(1, round(self.start_density * len(x)))
        x_hat, (quantiles, excess) = torch.zeros_like(x), x.new_empty(2, self.d_sae)
        for ids in torch.arange(self.d_sae, device=x.device).split(max(1, _START_CHUNK_ELEMENTS // len(x))):
            pre_acts = centred @ self.W_enc[:, ids]
            largest = pre_acts.topk(rank, dim=0).values
            quantiles[ids] = largest[-1].clamp_min_(1e-4)
            excess[ids] = largest.mean(0) - largest[-1]
            x_hat += (pre_acts * (pre_acts >= quantiles[ids])) @ self.W_dec[ids]
        scale = float((x_hat * centred).sum() / x_hat.square().sum())
        self.W_enc.mul_(scale)
        self.start_at(quantiles * scale)
        self.mean_excess.copy_(excess * scale)
        self.density.fill_(self.start_density)  # where it is low, the first step need not be dense, with its memory

    def _start_at_rows(self, centred: Tensor) -> None:
        """Turn all directions towards rows of ``centred`` [n, d_in], in an order that the seed gives."""
        order = torch.randperm(len(centred), generator=torch.Generator().manual_seed(self.seed)).to(centred.device)
        for ids in torch.arange(self.d_sae, device=centred.device).split(max(1, _START_CHUNK_ELEMENTS // self.d_in)):
            rows = F.normalize(centred[order[ids % len(order)]])
            self.W_dec[ids] = F.normalize(rows + _RANDOM_SHARE * self.W_dec[ids])
        self.W_enc.copy_(self.W_dec.T)

    @property
    def start_density(self) -> float | None:
        """Share of tokens on which each latent is active at a data-dependent start; None where the recipe has none."""
        if self._recipe.threshold_start == "fixed" or self.l0_target is None:
            return None
        return min(0.5, self.l0_target / self.d_sae)

    # End.

    @property
    def controlled(self) -> bool:
        """Whether L0 control drives this SAE's coefficient."""
        return self.has_coefficient and self._aims_at_l0

    @property
    def calibrated(self) -> bool:
        """Whether L0 control ends with :meth:`calibrate`."""
        return self.has_threshold and self._aims_at_l0

    @property
    def _aims_at_l0(self) -> bool:
        return (self.l0_target is not None and self.sparsity_coefficient is None
                and (self.recipe is None or self.recipe.l0_control))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> Calibration | None:
        """Raise all thresholds by the same multiple of their mean excess, half of it at most, so that L0 on held-out
        raw activations ``x`` [n, d_in] is the target. Training ends within a few percent of it; this takes the rest.

        Returns:
            None without L0 control, or a threshold.
        """
        if not self.calibrated:
            return None
        assert self.l0_target is not None  # of what is calibrated
        start = {k: v.clone() for k, v in self.state_dict().items()}

        before = after = self._l0_and_error(x)
        shift, low, high = 0.0, -_LARGEST_SHIFT, _LARGEST_SHIFT
        for _ in range(_CALIBRATION_LOOKS):
            error = math.log(max(after[0], 1e-9) / self.l0_target)
            if abs(error) < _CALIBRATED_WITHIN:
                break
            low, high = (shift, high) if error > 0 else (low, shift)
            # An excess divides L0 by about e (see sae_zoo.training.control.threshold_shift); where that leads out,
            # halve.
            guess = shift + error
            shift = guess if low < guess < high else (low + high) / 2
            self.load_state_dict(start)
            self.raise_thresholds(shift * self.mean_excess)
            after = self._l0_and_error(x)
        variance = float((x.double() - x.double().mean(0)).square().sum())
        return Calibration(shift, before[0], after[0], before[1] / variance, after[1] / variance)

    def _l0_and_error(self, x: Tensor) -> tuple[float, float]:
        """L0, and the summed squared error, of raw activations [n, d_in]."""
        n_active, error = 0, 0.0
        for rows in x.split(_CALIBRATION_ROWS):
            rows = rows.to(self.device)
            code = self.encode_sparse(rows)
            n_active += int((code.values > 0).sum())
            error += float((self.decode(code) - rows).square().sum(1).double().sum())
        return n_active / len(x), error

    # Optimiser and schedules.

    def configure_optimizers(self):
        recipe = self._recipe
        parameters = dict(self.named_parameters())
        decoder_lr = recipe.decoder_lr if self.unit_norm_decoder else recipe.free_decoder_lr
        groups = [{"params": [parameters.pop("W_dec")], "lr": decoder_lr, "unit_rows": self.unit_norm_decoder}]
        if thresholds := [parameters.pop(name) for name in list(parameters) if "threshold" in name]:
            groups.append({"params": thresholds, "lr": recipe.threshold_lr, "is_threshold": True})
        biases = [parameters.pop(name) for name in list(parameters) if name not in ("W_enc", "b_dec")]
        groups += [{"params": biases, "lr": recipe.bias_lr}, {"params": list(parameters.values())}]
        optimizer = Adam(groups, lr=recipe.lr, beta1=recipe.beta1, beta2=recipe.beta2, eps=recipe.adam_eps,
                         second_moment=recipe.second_moment)
        factors: list[Callable[[int], float]] = [
            self.schedule if "is_threshold" in group else self.lr_factor for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def schedule(self, step: int) -> float:
        """Share of its peak that the rate of thresholds has at ``step``."""
        recipe = self._recipe
        return lr_factor(step, n_steps=recipe.n_steps, warmup_steps=recipe.lr_warmup_steps,
                         start_factor=recipe.lr_start_factor, decay_fraction=recipe.lr_decay_fraction)

    def lr_factor(self, step: int) -> float:
        """Share of their peak that all other rates have at ``step``; above an L0 it falls in proportion."""
        if self.lr_l0_multiple is None or self._recipe.lr_l0 is None or self.l0_target is None:
            return self.schedule(step)
        return self.schedule(step) * min(1.0, self.lr_l0_multiple * self._recipe.lr_l0 / self.l0_target)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, *args, **kwargs) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        # Now: Lightning would keep gradients until the next forward pass has taken its memory too.
        optimizer.zero_grad()
        self.constrain()
        if self._shift:
            self.raise_thresholds(self._shift * self.mean_excess)
            self.shifted += self._shift

    def constrain(self) -> None:
        """Enforce what a variant asks for after every step, beside unit decoder rows, which the optimiser keeps."""

    @property
    def coefficient(self) -> float:
        """The sparsity coefficient in force at this step."""
        fixed = self.sparsity_coefficient
        value = float(self.log_coefficient.exp()) if fixed is None else fixed
        return value * warmup_factor(self.global_step, self._recipe.coefficient_warmup_steps)

    @property
    def dead_after_tokens(self) -> float:
        """Tokens of silence after which a latent counts as dead: the recipe's, or, where that is null, 50 times as many
        as a latent of mean frequency is silent for, but at least 2,500 and a hundredth of the run, and beyond that at
        most a tenth of it.
        """
        recipe = self._recipe
        if recipe.dead_after_tokens is not None:
            return recipe.dead_after_tokens
        l0 = self.l0_target or float(self.density) * self.d_sae
        gap = self.d_sae / max(l0, 1.0)
        n_tokens = recipe.n_steps * recipe.batch_size
        return max(_DEAD_AFTER_TOKENS, _DEAD_AFTER_SHARE * n_tokens, min(_DEAD_AFTER_GAPS * gap, n_tokens / 10))

    @property
    def dead(self) -> Tensor:
        """[d_sae] bool: silent for at least :attr:`dead_after_tokens` training tokens."""
        return self.tokens_since_fired >= self.dead_after_tokens

    # Steps.

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not torch.isfinite(loss.total):
            raise ValueError(f"loss is {loss.total.item()} at step {self.global_step}; lower recipe.lr "
                             f"({self._recipe.lr}) or check the activations")
        self.observe(loss.selection)
        l0, error = self._count(loss.counts)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            # Now Lightning hands it to the loggers.
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            x = self._normalise(batch)
            n = sum_over_processes(torch.tensor(float(len(x)), device=x.device))
            mean = sum_over_processes(x.sum(0)) / n
            fvu = error * float(n / sum_over_processes((x - mean).square().sum()))
            dead = float(self.dead.float().mean())
            self.log_dict({"L0": l0, "FVU": fvu}, prog_bar=True)
            self.log_dict({"loss": loss.total.detach(), "coefficient": self.coefficient, "shifted": float(self.shifted),
                           "density": float(self.density), "lr": optimizer.param_groups[0]["lr"],
                           "dead_fraction": dead})
            self._watch(dead, fvu)
        self._control(l0)
        return loss.total

    def _watch(self, dead: float, fvu: float) -> None:
        """Say so, once, when the SAE collapses."""
        found = collapse(dead=dead, least_dead=float(self.least_dead), fvu=fvu, fvu_before=float(self.last_fvu))
        if found and not self.notes:
            self.notes.append(f"collapsed at step {self.global_step + 1}: {found}; likely {self.likely_cause}")
            if self.trainer.is_global_zero:
                log.warning("%s", self.notes[-1])
        self.least_dead.clamp_max_(dead)
        self.last_fvu.fill_(fvu)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["notes"] = list(self.notes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.notes = list(checkpoint["notes"])

    @torch.no_grad()
    def _count(self, counts) -> tuple[float, float]:
        """Update counters with what a step saw on all devices; returns its L0 and mean squared error."""
        tokens_of, excess_of = sum_over_processes(torch.stack([counts.tokens_of, counts.excess_of]))
        totals = torch.stack([counts.n_selected.double(), counts.squared_error, counts.bounded_error,
                              torch.full_like(counts.squared_error, counts.n_tokens)])
        n_selected, squared_error, bounded_error, n_tokens = sum_over_processes(totals).tolist()
        if self._recipe.error_bound is not None:
            self.error_bound.fill_(self._recipe.error_bound * bounded_error / n_tokens)
        fired = tokens_of > 0
        # A mean over the last twenty tokens or so on which a latent was active, however rare it is.
        weight = tokens_of / (tokens_of + _EXCESS_TOKENS)
        self.mean_excess.lerp_(excess_of / tokens_of.clamp_min(1), weight)
        self.tokens_since_fired.add_(int(n_tokens)).mul_(~fired)
        self.density.fill_(n_selected / (n_tokens * self.d_sae))
        return float(tokens_of.sum(dtype=torch.float64)) / n_tokens, squared_error / n_tokens

    def _control(self, l0: float) -> None:
        """Drive thresholds and coefficient so that the held-out L0 meets its target.

        The coefficient follows the mean error of L0, and so comes to where thresholds stay by themselves. Thresholds
        are raised directly where that is too slow: those that are trained as such while L0 is far off, and any while
        the rates fall, and with them the hold of the coefficient. Biases are left to the coefficient before that:
        raised too, they take over what the penalty has to teach (in one trial FVU of Gated 0.152 instead of 0.135).
        """
        if not self.controlled:
            return
        recipe, average, target = self._recipe, float(self.l0_average), self.l0_target
        assert target is not None  # of what is controlled
        ratio = float(self.heldout_l0_ratio)
        falling = decays(self.global_step, n_steps=recipe.n_steps, decay_fraction=recipe.lr_decay_fraction)
        if falling or not self.bias_is_threshold:
            self._shift = threshold_shift(l0_error(l0 * ratio, target), share=recipe.control_shift, always=falling)
        average = l0 if math.isnan(average) else average + _L0_WEIGHT * (l0 - average)
        largest = LARGEST_ERROR if self.bias_is_threshold else LARGEST_BESIDE_SHIFTS
        error = l0_error(average * ratio, target, largest=largest)
        previous = error if math.isnan(float(self.control_error)) else float(self.control_error)
        self.log_coefficient.fill_(next_log_coefficient(
            float(self.log_coefficient), error=error, previous_error=previous,
            proportional=recipe.control_proportional, integral=recipe.control_integral))
        self.control_error.fill_(error)
        self.l0_average.fill_(average)

    # Held-out rows: how L0 there compares with L0 in training. Control aims at the former.

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._heldout.append((float((self.encode_sparse(batch).values > 0).sum()), len(batch)))

    def on_validation_epoch_end(self) -> None:
        seen = torch.tensor(self._heldout, dtype=torch.float64, device=self.device).sum(0)
        self._heldout.clear()
        active, tokens = sum_over_processes(seen).tolist()
        l0 = active / tokens
        self.log("heldout_L0", l0, prog_bar=True)
        if l0 > 0 and float(self.l0_average) > 0:
            ratio = float(self.heldout_l0_ratio)
            self.heldout_l0_ratio.fill_(ratio + _RATIO_WEIGHT * (l0 / float(self.l0_average) - ratio))
