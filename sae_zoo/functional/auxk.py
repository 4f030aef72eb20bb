"""AuxK (Gao et al. 2024, arXiv 2406.04093): dead latents learn to reconstruct what the others leave."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sae_zoo.functional.encoder import chunk_rows


def auxk_error(x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor | None, W_dec: Tensor, k: int) -> Tensor:
    """||residual - e_hat||^2, where e_hat sums the ``k`` largest ReLU(x W_enc + b_enc) of each token, times their rows
    of ``W_dec``, without the decoder's bias.

    Args:
        x: [tokens, d_in], what the encoder sees; no gradient is taken of it, nor of ``residual``.
        residual: [tokens, d_in], x - x_hat.
        W_enc, b_enc, W_dec: [d_in, n], [n] or None, [n, d_in] of the dead latents alone; all of them where n < k.
    """
    x, residual = x.detach(), residual.detach()
    rows = chunk_rows(x, len(W_dec))
    errors = [checkpoint(_error, *pieces, W_enc, b_enc, W_dec, k, use_reentrant=False)
              for pieces in zip(x.split(rows), residual.split(rows), strict=True)]
    return sum(errors)


def _error(x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor | None, W_dec: Tensor, k: int) -> Tensor:
    pre_acts = x @ W_enc if b_enc is None else torch.addmm(b_enc, x, W_enc)
    largest = pre_acts.topk(min(k, len(W_dec)), dim=1, sorted=False)
    latents = torch.zeros_like(pre_acts).scatter(1, largest.indices, torch.relu(largest.values))
    return (latents @ W_dec - residual).square().sum()
