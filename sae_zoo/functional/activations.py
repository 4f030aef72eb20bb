"""JumpReLU, the Heaviside step and their straight-through pseudo-derivatives.

Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), section 3. With a kernel K that integrates to one and a bandwidth
eps, the pseudo-derivatives are

    d/dz     JumpReLU_theta(z) = H(z - theta)                  d/dz     H(z - theta) = 0
    d/dtheta JumpReLU_theta(z) = -(theta / eps) K((z - theta) / eps)
    d/dtheta H(z - theta)      = -(1 / eps) K((z - theta) / eps)

All functions are elementwise on ``pre_acts`` and a ``threshold`` of the same shape or one that broadcasts to it.
Thresholds and the window are computed in float32 whatever the dtype of ``pre_acts``, so that the penalty reaches the
threshold at full strength under mixed precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sae_zoo.functional import workspace

# Kernels by name: (K(u), half-width of the support in units of the bandwidth). Rectangle is the paper's; the others are
# named in its appendix. The Gaussian is cut where it has fallen below 4e-4 of its peak. K may overwrite u.
_SQRT_2PI = math.sqrt(2 * math.pi)
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "rectangle": (lambda u: u.abs_().lt_(0.5), 0.5),
    "triangle": (lambda u: (1 - u.abs()).clamp_min(0), 1.0),
    "epanechnikov": (lambda u: (0.75 * (1 - u * u)).clamp_min(0), 1.0),
    "gaussian": (lambda u: torch.exp(-0.5 * u * u) / _SQRT_2PI * (u.abs() < 4.0), 4.0),
}


def kernel_half_width(kernel: str, bandwidth: float) -> float:
    """Distance from the threshold beyond which the pseudo-derivatives are zero, in units of the pre-activations.

    Raises:
        ValueError: if the kernel is unknown or the bandwidth is not positive.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; choose from {', '.join(sorted(KERNELS))}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}; it must be positive")
    return KERNELS[kernel][1] * bandwidth


def _window(pre_acts: Tensor, threshold: Tensor, bandwidth: float, kernel: str) -> Tensor:
    """(1 / eps) K((z - theta) / eps), in float32."""
    # In place as far as it goes: with hundreds of thousands of entries every temporary shows in the peak of memory.
    distance = workspace.empty(*pre_acts.shape, like=pre_acts, dtype=torch.float32)
    torch.sub(pre_acts.float(), threshold.float(), out=distance)
    return KERNELS[kernel][0](distance.div_(bandwidth)).div_(bandwidth)


def _of_entries(threshold: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None:
        return threshold
    return torch.index_select(threshold, 0, ids, out=workspace.empty(len(ids), like=threshold))


def _times(values: Tensor, mask: Tensor) -> Tensor:
    return torch.mul(values, mask, out=workspace.empty(*values.shape, like=values))


def _of_thresholds(d_entries: Tensor, threshold: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None:
        return d_entries.sum_to_size(threshold.shape).to(threshold.dtype)
    return torch.zeros_like(threshold).index_add_(0, ids, d_entries.to(threshold.dtype))


# Thresholds are laid out by entry when they are needed, and again in the backward pass, not kept from one to the other.


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre_acts, threshold, ids, bandwidth, kernel, ste_into_pre_acts):
        ctx.save_for_backward(pre_acts, threshold, ids)
        ctx.bandwidth, ctx.kernel, ctx.ste_into_pre_acts = bandwidth, kernel, ste_into_pre_acts
        return _times(pre_acts, pre_acts > _of_entries(threshold, ids))

    @staticmethod
    def backward(ctx, grad):
        pre_acts, threshold, ids = ctx.saved_tensors
        edges = _of_entries(threshold, ids)
        d_pre = _times(grad, pre_acts > edges)
        d_edges = _window(pre_acts, edges, ctx.bandwidth, ctx.kernel).mul_(edges.float()).mul_(grad.float())
        if ctx.ste_into_pre_acts:
            d_pre += d_edges.to(grad.dtype)
        return d_pre, _of_thresholds(d_edges.neg_(), threshold, ids), None, None, None, None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre_acts, threshold, ids, bandwidth, kernel, ste_into_pre_acts):
        ctx.save_for_backward(pre_acts, threshold, ids)
        ctx.bandwidth, ctx.kernel, ctx.ste_into_pre_acts = bandwidth, kernel, ste_into_pre_acts
        return (pre_acts > _of_entries(threshold, ids)).to(torch.float32)

    @staticmethod
    def backward(ctx, grad):
        pre_acts, threshold, ids = ctx.saved_tensors
        d_edges = _window(pre_acts, _of_entries(threshold, ids), ctx.bandwidth, ctx.kernel).mul_(grad)
        d_pre = d_edges.to(pre_acts.dtype, copy=True) if ctx.ste_into_pre_acts else None
        return d_pre, _of_thresholds(d_edges.neg_(), threshold, ids), None, None, None, None


def jumprelu(pre_acts: Tensor, threshold: Tensor, *, ids: Tensor | None = None, bandwidth: float,
             kernel: str = "rectangle", ste_into_pre_acts: bool = False) -> Tensor:
    """z * H(z - theta), with the paper's pseudo-derivatives.

    Args:
        pre_acts: z, any shape.
        threshold: theta, broadcasts to ``pre_acts``; or with ``ids`` [d_sae].
        ids: [n_active] of ``pre_acts`` [n_active]: which of the thresholds is each entry's.
        bandwidth: eps, in the units of ``pre_acts``.
        kernel: a key of :data:`KERNELS`.
        ste_into_pre_acts: also send the window's gradient into ``pre_acts``, as the derivative of a function of
            z - theta would; the paper does not (claim C13 says that it hurts).
    """
    return _JumpReLU.apply(pre_acts, threshold, ids, bandwidth, kernel, ste_into_pre_acts)


def heaviside(pre_acts: Tensor, threshold: Tensor, *, ids: Tensor | None = None, bandwidth: float,
              kernel: str = "rectangle", ste_into_pre_acts: bool = False) -> Tensor:
    """H(z - theta) in float32, with the paper's pseudo-derivative into theta; summed over latents it is the L0.

    It takes **pre-activations**: on latents that a JumpReLU has already cut, the lower half of the window is empty and
    the gradient about half of what it should be. Arguments as :func:`jumprelu`.
    """
    return _Heaviside.apply(pre_acts, threshold, ids, bandwidth, kernel, ste_into_pre_acts)
