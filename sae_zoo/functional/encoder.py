"""Pre-activations, dense and on an active set, with the gradients that training needs and no others.

pre_acts = (x - b_dec) W_enc + b_enc. Automatic differentiation would run a sixth GEMM for the gradient of ``x`` only to
sum it into ``b_dec``; since the sum over the batch commutes with the product, d_b_dec = -W_enc (sum_b d_pre), which
costs one matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae_zoo.functional.sparse_code import ActiveSet, concatenate

# Elements of pre-activations that exist at once while selecting: 16 MB in float32, which stays near the caches and
# below the size that the C library hands back to the system.
_CHUNK_ELEMENTS = 1 << 22


class _DensePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_centred, W_enc, b_enc, b_dec):
        ctx.save_for_backward(x_centred, W_enc)
        return torch.addmm(b_enc, x_centred, W_enc)

    @staticmethod
    def backward(ctx, grad):
        x_centred, W_enc = ctx.saved_tensors
        d_b_enc = grad.sum(0)
        d_b_dec = -(W_enc @ d_b_enc) if ctx.needs_input_grad[3] else None
        return None, (grad.T @ x_centred).T, d_b_enc, d_b_dec  # transposed as W_enc is in memory


class _SparsePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre_acts, x_centred, W_enc, b_enc, b_dec, active):
        ctx.save_for_backward(x_centred, W_enc)
        ctx.active = active
        return pre_acts.view_as(pre_acts)

    @staticmethod
    def backward(ctx, grad):
        x_centred, W_enc = ctx.saved_tensors
        d_b_enc = ctx.active.sum_by_latent(grad)
        d_b_dec = -(W_enc @ d_b_enc) if ctx.needs_input_grad[4] else None
        return None, None, ctx.active.transposed_matmul(grad, x_centred).T, d_b_enc, d_b_dec, None


def dense_pre_acts(x_centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """[batch, d_sae] pre-activations; differentiable in the weights and biases, not in ``x_centred``.

    Args:
        x_centred: [batch, d_in], ``x - b_dec`` already.
        W_enc: [d_in, d_sae].
        b_enc: [d_sae].
        b_dec: [d_in], the bias that was subtracted, for its gradient; None where none was.
    """
    return _DensePreActs.apply(x_centred.detach(), W_enc, b_enc, b_dec)


def sparse_pre_acts(x_centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None,
                    select: Callable[[Tensor], ActiveSet]) -> tuple[Tensor, ActiveSet]:
    """Pre-activations of the entries that ``select`` picks, and the set of them.

    The dense pre-activations exist for a chunk of tokens at a time, in one buffer.

    Args:
        select: takes [rows, d_sae] pre-activations (and must not keep them) and returns their active set.

    Returns:
        [n_active] pre-activations, differentiable as :func:`dense_pre_acts`, and the active set of the batch.
    """
    x_centred = x_centred.detach()
    d_sae = W_enc.shape[1]
    rows = min(len(x_centred), max(1, _CHUNK_ELEMENTS // d_sae))
    parts, values = [], []
    with torch.no_grad():
        buffer = x_centred.new_empty(rows, d_sae)
        for piece in x_centred.split(rows):
            pre_acts = torch.addmm(b_enc, piece, W_enc, out=buffer[: len(piece)])
            part = select(pre_acts)
            parts.append(part)
            values.append(pre_acts.view(-1)[part.rows * d_sae + part.latent_ids])
        active = concatenate(parts)
        pre_acts = torch.cat(values)
    return _SparsePreActs.apply(pre_acts, x_centred, W_enc, b_enc, b_dec, active), active
