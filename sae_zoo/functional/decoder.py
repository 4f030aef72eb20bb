"""The decoder's end: unit rows, and the squared error of a reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_zoo.functional.precision import operand
from sae_zoo.functional.sparse_code import ActiveSet


@torch.no_grad()
def normalise_rows_(W_dec: Tensor) -> None:
    """Scale every row of ``W_dec`` [d_sae, d_in] to norm 1, in place; a zero row stays zero.

    :class:`sae_zoo.training.adam.Adam` keeps them so.
    """
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, b_dec, target, active, bound):
        weight = operand(W_dec)
        if active is None:
            values = values.to(weight.dtype)
            error = (values @ weight).to(target.dtype)
        else:
            error = active.matmul(values, weight)
        error.sub_(target)
        norms = torch.linalg.vector_norm(error, dim=1)
        inside = norms.clamp_max(bound)
        share = inside / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # of each row's error that its gradient is of
        ctx.active = active
        # Half of the backward pass now, and the error is not kept.
        if active is not None and not ctx.needs_input_grad[1]:
            ctx.save_for_backward(active.matmul_backward(None, error * share.unsqueeze(1), weight)[0])
        else:
            ctx.save_for_backward(values, weight, error, share)
        ctx.mark_non_differentiable(error, norms)
        ctx.set_materialize_grads(False)  # no zeros for the error's
        return (inside * (2 * norms - inside)).sum(), error, norms

    @staticmethod
    def backward(ctx, grad, *_):
        saved = ctx.saved_tensors
        if len(saved) == 1:
            return saved[0] * (2 * grad), None, None, None, None, None
        values, weight, error, share = saved
        scale = (2 * grad * share).unsqueeze(1)
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        if ctx.active is None:
            d_decoded = error * scale  # a compiled graph may not write to what it saved
            product = d_decoded.to(weight.dtype)
            d_values, d_W_dec = product @ weight.T, values.T @ product if wants_weight else None
        else:
            d_decoded = error.mul_(scale)  # nobody reads the error any more; a second backward pass is refused
            d_values, d_W_dec = ctx.active.matmul_backward(values if wants_weight else None, d_decoded, weight)
        d_b_dec = d_decoded.sum(0) if wants_bias else None
        return d_values, d_W_dec, d_b_dec, None, None, None


def squared_error(values: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor, active: ActiveSet | None,
                  bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tokens of ||x_hat - x||^2, where x_hat = latents W_dec + b_dec, without making x_hat.

    Of a token whose error e is longer than ``bound`` it is Huber's 2 bound ||e|| - bound^2 (Huber 1964), whose gradient
    is that of an error of length ``bound`` in the direction of e: no token pulls harder than that.

    By automatic differentiation the product, the bias, the difference and the square would each hold [tokens, d_in];
    here one such buffer serves for the error and then for its gradient, so the gradient can be taken once.

    Args:
        values: latents, [tokens, d_sae] where ``active`` is None, else [n_active].
        W_dec: [d_sae, d_in].
        b_dec: [d_in], the bias in x_hat, for its gradient; None where it shall get none.
        target: [tokens, d_in], x - b_dec, of which no gradient is taken.
        active: which latents ``values`` are of.
        bound: [] of the same float type as ``target``; infinite for the plain squared error.

    Returns:
        The sum; x_hat - x [tokens, d_in], which may be overwritten by the backward pass; and its norms [tokens]. The
        last two are not differentiable.
    """
    return _SquaredError.apply(values, W_dec, b_dec, target, active, bound)
