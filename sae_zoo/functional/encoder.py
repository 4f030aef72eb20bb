"""Pre-activations, dense and on an active set, with the gradients that training needs and no others.

pre_acts = (x - b_dec) W_enc + b_enc. Automatic differentiation would run a sixth GEMM for the gradient of ``x`` only to
sum it into ``b_dec``; since the sum over the batch commutes with the product, d_b_dec = -W_enc (sum_b d_pre), which
costs one matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_zoo.functional import workspace
from sae_zoo.functional.precision import operand
from sae_zoo.functional.selection import Selection
from sae_zoo.functional.sparse_code import ActiveSet, active_set

# Elements of pre-activations that exist at once. On a CPU 16 MB in float32, which stay near the caches; on a CUDA
# device 1 GB in bfloat16, where fewer and larger products are faster.
_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 29}
# A product of fewer rows than this costs as much as it.
_CHUNK_ROWS = 256


def chunk_rows(x: Tensor, d_sae: int) -> int:
    """Rows of ``x`` whose dense pre-activations may exist at once."""
    elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS["cpu"])
    # No more than x is wide: such a chunk is as large as a weight's gradient, which takes its memory afterwards.
    return max(1, min(len(x), max(_CHUNK_ROWS, min(elements // d_sae, x.shape[1]))))


class _DensePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_centred, W_enc, b_enc, b_dec):
        x_centred, weight = operand(x_centred), operand(W_enc)
        ctx.save_for_backward(x_centred, weight)
        return torch.addmm(b_enc.to(weight.dtype), x_centred, weight)

    @staticmethod
    def backward(ctx, grad):
        x_centred, weight = ctx.saved_tensors
        d_b_enc = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        d_b_dec = -(weight.to(d_b_enc.dtype) @ d_b_enc) if ctx.needs_input_grad[3] else None
        d_W_enc = (grad.T @ x_centred).T  # transposed as W_enc is in memory
        return None, d_W_enc.to(d_b_enc.dtype), d_b_enc, d_b_dec


class _SparsePreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre_acts, x_centred, W_enc, b_enc, b_dec, active):
        ctx.save_for_backward(x_centred, W_enc)
        ctx.active = active
        return pre_acts.view_as(pre_acts)

    @staticmethod
    def backward(ctx, grad):
        x_centred, weight = ctx.saved_tensors
        d_b_enc = ctx.active.sum_by_latent(grad)
        d_b_dec = -(weight.to(grad.dtype) @ d_b_enc) if ctx.needs_input_grad[4] else None
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


@torch.no_grad()
def products(x_centred: Tensor, W_enc: Tensor) -> Iterator[Tensor]:
    """``x_centred`` [batch, d_in] times ``W_enc`` [d_in, d_sae], as many rows at a time as may exist at once, each time
    in the same buffer.
    """
    x, weight = operand(x_centred.detach()), operand(W_enc)
    rows = chunk_rows(x, weight.shape[1])
    buffer = workspace.empty(rows, weight.shape[1], like=x)
    for piece in x.split(rows):
        yield torch.mm(piece, weight, out=buffer[: len(piece)])


def sparse_pre_acts(x_centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None,
                    selection: Selection) -> tuple[Tensor, ActiveSet]:
    """Pre-activations of the entries that ``selection`` picks, and the set of them.

    The dense product exists for a chunk of tokens at a time, in one buffer.

    Returns:
        [n_active] pre-activations, differentiable as :func:`dense_pre_acts`, and the active set of the batch.
    """
    with torch.no_grad():
        x_operand = operand(x_centred.detach())
        parts = [selection.select(product, b_enc) for product in products(x_operand, W_enc)]
        counts, latent_ids, pre_acts = (torch.cat(kind) for kind in zip(*parts, strict=True))
        active = active_set(counts, latent_ids, W_enc.shape[1])
    return _SparsePreActs.apply(pre_acts, x_operand, W_enc, b_enc, b_dec, active), active
