"""Cost of a reconstruction to the language model: its loss with the reconstruction spliced in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sae_zoo.lm.hooks import HookPoint, splice
from sae_zoo.lm.resume import FromLayer

# Entries of float32 logits (positions x vocabulary) at once: 64 MB, of which _sum_losses holds about four.
_LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class LMLoss:
    """Means over all target tokens.

    Attributes:
        ce_clean, ce_spliced, ce_ablated: cross-entropy in nats a token with the activation as it is, reconstructed, and
            set to zero.
        delta_lm_loss: ce_spliced - ce_clean.
        loss_recovered: 1 - delta_lm_loss / (ce_ablated - ce_clean); NaN where the ablation changes nothing.
        kl: KL(clean || spliced) of the next-token distributions in nats.
        n_targets: tokens that were predicted.
    """

    ce_clean: float
    ce_spliced: float
    ce_ablated: float
    delta_lm_loss: float
    loss_recovered: float
    kl: float
    n_targets: int


def _at_kept(keep: Tensor, reconstruct: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``reconstruct`` [n, d] -> [n, d] on the positions of ``keep`` [batch, context], the identity on the others."""

    def replace(x: Tensor) -> Tensor:
        kept = keep.to(x.device)
        original = x[kept].float()
        x_hat = reconstruct(original)
        if x_hat.shape != original.shape:
            raise ValueError(f"reconstruct gave shape {list(x_hat.shape)} for activations {list(original.shape)}; "
                             "the two must be equal")
        replaced = x.clone()
        replaced[kept] = x_hat.to(device=x.device, dtype=x.dtype)
        return replaced

    return replace


def _sum_losses(tokens: Tensor, keep: Tensor, *logits: Tensor) -> tuple[list[float], float]:
    """Sums over the targets of ``tokens`` [batch, context]: the cross-entropy of each of ``logits`` [batch, context,
    vocabulary], and KL(first || last) of them, in nats."""
    ce, kl = [0.0] * len(logits), 0.0
    tokens, keep = tokens.to(logits[0].device), keep.to(logits[0].device)
    rows, positions = keep[:, 1:].nonzero(as_tuple=True)
    targets = tokens[rows, positions + 1].long()[:, None]
    n_chunk = max(1, _LOGITS_AT_ONCE // logits[0].shape[-1])
    chunks = (entry.split(n_chunk) for entry in (rows, positions, targets))
    for row, position, target in zip(*chunks, strict=True):
        log_probs = [entry[row, position].float().log_softmax(-1) for entry in logits]
        for i, entry in enumerate(log_probs):
            ce[i] -= float(entry.gather(1, target).cpu().double().sum())
        first, last = log_probs[0], log_probs[-1]
        kl += float((first.exp() * (first - last)).sum(1).cpu().double().sum())
    return ce, kl


def _batches(tokens: Tensor, keep: Tensor, batch_size: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Rows with a target, as pairs of tokens and keep, and the number of targets.

    Raises:
        ValueError: if shapes do not fit, or no token is a target.
    """
    if tokens.ndim != 2 or keep.shape != tokens.shape:
        raise ValueError(f"tokens have shape {list(tokens.shape)} and keep {list(keep.shape)}; both must be "
                         "[n_rows, context]")
    n_targets = int(keep[:, 1:].sum())
    if not n_targets:
        raise ValueError(f"none of the {tokens.numel()} tokens is a target; give more text")
    has_target = keep[:, 1:].any(1)  # a row of nothing but padding would hand reconstruct no activation at all
    return list(zip(tokens[has_target].split(batch_size), keep[has_target].split(batch_size), strict=True)), n_targets


def _spliced_logits(forward: FromLayer, hook: HookPoint, rows: Tensor, keep: Tensor,
                    substitute: Callable[[Tensor], Tensor]) -> Tensor:
    with splice(forward.model, hook, _at_kept(keep, substitute)):
        return forward(rows).logits


@torch.no_grad()
def ablated_cross_entropy(forward: FromLayer, hook: HookPoint, tokens: Tensor, keep: Tensor, *, batch_size: int,
                          progress_bar: bool = False) -> float:
    """Cross-entropy in nats a token with zero in place of the activation: one forward pass of every row; arguments and
    errors as for :func:`lm_metrics`.
    """
    batches, n_targets = _batches(tokens, keep, batch_size)
    total = 0.0
    for rows, kept in tqdm(batches, desc=f"LM loss without {hook.name}", unit="batch", leave=False,
                           disable=not progress_bar):
        (ce,), _ = _sum_losses(rows, kept, _spliced_logits(forward, hook, rows, kept, torch.zeros_like))
        total += ce
    return total / n_targets


@torch.no_grad()
def lm_metrics(forward: FromLayer, hook: HookPoint, tokens: Tensor, keep: Tensor,
               reconstruct: Callable[[Tensor], Tensor], *, ce_ablated: float, batch_size: int,
               progress_bar: bool = False) -> LMLoss:
    """Delta LM loss, loss recovered and KL of a reconstruction, from two forward passes of every row.

    Special positions (BOS, EOS, padding) and the first of a row keep their clean activation, in the splice and in the
    zero-ablation: no SAE is trained on them. A token is a target where it is not special itself; the first after BOS is
    one.

    Sums are kept in float64 and divided once, so the result depends on ``batch_size`` by rounding only. Beside the
    model, memory holds two batches of logits in the model's dtype and some 250 MB.

    Args:
        forward: passes of a Hugging Face causal language model in eval mode, from the layer of ``hook`` on where they
            can.
        tokens: [n_rows, context] int.
        keep: [n_rows, context] bool, of :func:`sae_zoo.lm.rows.data_points`; on the same device as ``tokens``.
        reconstruct: raw activations x [n, d] float32 -> x_hat [n, d], on the device of the hooked layer.
        ce_ablated: what :func:`ablated_cross_entropy` gives for these arguments; it is the same for every
            reconstruction.
        batch_size: rows a forward pass.

    Raises:
        ValueError: if shapes do not fit, or no token is a target.
    """
    batches, n_targets = _batches(tokens, keep, batch_size)
    ce, kl = torch.zeros(2, dtype=torch.float64), 0.0
    for rows, kept in tqdm(batches, desc=f"LM loss, {hook.name}", unit="batch", leave=False, disable=not progress_bar):
        batch_ce, batch_kl = _sum_losses(rows, kept, forward(rows).logits,
                                         _spliced_logits(forward, hook, rows, kept, reconstruct))
        ce += torch.tensor(batch_ce, dtype=torch.float64)
        kl += batch_kl
    ce_clean, ce_spliced = (ce / n_targets).tolist()
    delta, scale = ce_spliced - ce_clean, ce_ablated - ce_clean
    return LMLoss(ce_clean, ce_spliced, ce_ablated, delta, 1 - delta / scale if scale else math.nan, kl / n_targets,
                  n_targets)
