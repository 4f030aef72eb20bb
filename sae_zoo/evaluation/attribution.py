"""How evenly the active latents of a token share in what the language model predicts next."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from sae_zoo.functional.sparse_code import SparseCode
from sae_zoo.lm.hooks import HookPoint, splice
from sae_zoo.lm.resume import FromLayer


def gradients(forward: FromLayer, hook: HookPoint, tokens: Tensor, keep: Tensor, *, n_positions: int, batch_size: int,
              seed: int, progress_bar: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations [n, d_in] at random positions, and the gradients [n, d_in] there of L, the logit of the right next
    token less the mean of the logits. Each gradient is of L at its own position alone, in the unchanged model.

    Args:
        forward: passes of the language model.
        tokens: [n_rows, context] int.
        keep: [n_rows, context] bool, False at special tokens; only a token that is not special itself and whose
            successor is not is taken.
        n_positions: of each row, drawn with replacement; a row without any is left out.
        batch_size: rows a forward pass.
    """
    usable = keep[:, :-1] & keep[:, 1:]
    tokens, usable = tokens[usable.any(1)], usable[usable.any(1)]
    generator = torch.Generator().manual_seed(seed)
    batches = list(zip(tokens.split(batch_size), usable.split(batch_size), strict=True))
    for rows, allowed in tqdm(batches, desc=f"attribution, {hook.name}", unit="batch", leave=False,
                              disable=not progress_bar):
        activation: list[Tensor] = []

        def leaf(x: Tensor, activation: list[Tensor] = activation) -> Tensor:
            activation.append(x.detach().requires_grad_())
            return activation[0]

        chosen = torch.multinomial(allowed.float(), n_positions, replacement=True, generator=generator)
        row = torch.arange(len(rows))
        with torch.enable_grad(), splice(forward.model, hook, leaf):
            logits = forward(rows).logits
            for i, position in enumerate(chosen.T):
                at = logits[row, position].float()
                target = rows[row, position + 1].long().to(at.device)
                # Rows do not see one another, so the gradient of their sum is that of each.
                total = (at.gather(1, target[:, None]).squeeze(1) - at.mean(1)).sum()
                (gradient,) = torch.autograd.grad(total, activation[0], retain_graph=i + 1 < n_positions)
                yield activation[0].detach()[row, position].float(), gradient[row, position].float()


def uniformity(code: SparseCode, W_dec: Tensor, gradient: Tensor) -> Tensor:
    """r_L0 of each token (Rajamanoharan et al. 2024, section 5): exp(entropy(p)) / ||y||_0, where
    y = f * (W_dec grad L) is each latent's first-order effect on L and p = |y| / ||y||_1. 1: all active latents count
    alike; 1 / L0: one counts.

    Args:
        code: latents f of n tokens, in raw units.
        W_dec: [d_sae, d_in].
        gradient: [n, d_in].

    Returns:
        [n] float64, NaN where no latent has an effect.
    """
    rows = code.active.rows
    effect = (gradient.index_select(0, rows) * W_dec.index_select(0, code.active.latent_ids)).sum(1)
    y = (code.values * effect).double().abs()

    def by_token(values: Tensor) -> Tensor:
        return values.new_zeros(code.active.batch).index_add(0, rows, values)

    p = y / by_token(y).index_select(0, rows)
    n_effective = by_token((y > 0).double())
    return by_token(torch.special.entr(p)).exp() / n_effective.where(n_effective > 0, torch.nan)
