"""The functions of :mod:`sae_zoo.functional.cpu_kernels` for CUDA tensors, from Triton kernels and torch's sort.

**Their speed is unmeasured**; that they are right is tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_zoo.functional import triton_kernels
from sae_zoo.functional.bucketed_topk import largest_of_buckets


def select_above(product: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the function of this name for a CPU."""
    counts, ids, values = triton_kernels.select_above(product, bound - bias)
    return counts, ids, values + bias[ids]


def select_largest(product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See the function of this name for a CPU; ``product`` is overwritten."""
    pre_acts = product.add_(bias)
    ids = triton_kernels.topk_indices(pre_acts, k)
    return ids, pre_acts.gather(1, ids).float()


def select_largest_of_buckets(product: Tensor, bias: Tensor, k: int, n_buckets: int) -> tuple[Tensor, Tensor]:
    """See the function of this name for a CPU; ``product`` is overwritten."""
    pre_acts = product.add_(bias)
    ids = largest_of_buckets(pre_acts, k, n_buckets)
    return ids, pre_acts.gather(1, ids).float()


def sort_by_latent(row_offsets: Tensor, latent_ids: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """See the function of this name for a CPU."""
    sorted_ids, entries = torch.sort(latent_ids.int(), stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(d_sae + 1, dtype=torch.int32, device=latent_ids.device))
    rows = torch.repeat_interleave(torch.arange(len(row_offsets) - 1, device=latent_ids.device), row_offsets.diff(),
                                   output_size=len(latent_ids))
    return offsets, entries, rows[entries]


def bag_sum(offsets: Tensor, rows: Tensor, weights: Tensor, matrix: Tensor) -> Tensor:
    """See the function of this name for a CPU."""
    return triton_kernels.bag_sum(rows, offsets, weights.float().contiguous(), matrix.contiguous(),
                                  out_dtype=torch.float32)


def decode_backward(by_latent: tuple[Tensor, Tensor, Tensor], grad: Tensor, weight: Tensor,
                    values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See the function of this name for a CPU."""
    offsets, entries, rows = by_latent
    ids = torch.repeat_interleave(torch.arange(len(weight), device=weight.device), offsets.diff(),
                                  output_size=len(entries))
    in_order = triton_kernels.sampled_dot(rows, ids, grad.contiguous(), weight.contiguous())
    dots = torch.empty_like(in_order)
    dots[entries] = in_order  # each entry stands there once
    return dots, None if values is None else bag_sum(offsets, rows, values[entries], grad)
