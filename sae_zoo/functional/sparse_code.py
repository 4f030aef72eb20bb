"""The active set of a batch of latents, and the two products that a training step needs on it.

With k active latents a token, everything after the encoder GEMM costs 2 * batch * k * d_in a product instead of
2 * batch * d_sae * d_in:

* decode:              row b of x_hat sums the decoder rows of its active latents;
* transposed product:  row i of a weight gradient sums the tokens on which latent i is active (the same entries, sorted
  by latent).

``SparseCode.to_dense`` is the oracle that tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_zoo.functional.kernels import kernels_for
from sae_zoo.functional.precision import operand


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The (token, latent) pairs of a batch that are active.

    Attributes:
        row_offsets: [batch + 1] int64; the entries of token b are ``row_offsets[b]:row_offsets[b + 1]``.
        latent_ids: [n_active] int32 (int64 on a CUDA device), without repetition within a token.
        d_sae: number of latents.
    """

    row_offsets: Tensor
    latent_ids: Tensor
    d_sae: int

    @property
    def batch(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def density(self) -> float:
        """Share of all (token, latent) pairs that are in the set."""
        return len(self.latent_ids) / (self.batch * self.d_sae)

    @property
    def rows(self) -> Tensor:
        """[n_active] int64: the token of each entry."""
        return torch.repeat_interleave(
            torch.arange(self.batch, device=self.latent_ids.device), self.row_offsets.diff(),
            output_size=len(self.latent_ids),
        )

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets [d_sae + 1] of the latents, the entries in their order [n_active], and the tokens of these."""
        return kernels_for(self.latent_ids).sort_by_latent(self.row_offsets, self.latent_ids, self.d_sae)

    def matmul(self, values: Tensor, weight: Tensor) -> Tensor:
        """S @ weight: [batch, d], where S [batch, d_sae] holds ``values`` [n_active] and ``weight`` is [d_sae, d]."""
        return kernels_for(values).bag_sum(self.row_offsets, self.latent_ids, values, weight)

    def transposed_matmul(self, values: Tensor, dense: Tensor) -> Tensor:
        """S^T @ dense: [d_sae, d], where ``dense`` is [batch, d]."""
        offsets, entries, rows = self._by_latent
        return kernels_for(values).bag_sum(offsets, rows, values.index_select(0, entries), dense)

    def matmul_backward(self, values: Tensor | None, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of :meth:`matmul` for ``grad`` [batch, d]: those of the values [n_active], which are the entries of
        grad @ weight^T in the set, and those of the weight [d_sae, d], S^T @ grad (None where ``values`` is None).
        """
        return kernels_for(grad).decode_backward(self._by_latent, grad, weight, values)

    def sum_by_latent(self, values: Tensor) -> Tensor:
        """[d_sae]: the sum of ``values`` [n_active] over the tokens of each latent, in a fixed order."""
        offsets, entries, _ = self._by_latent
        return torch.segment_reduce(values.index_select(0, entries), "sum", offsets=offsets, initial=0)


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Latents of a batch: an active set and one value an entry. An entry may be zero (inside a threshold's window)."""

    active: ActiveSet
    values: Tensor

    @classmethod
    def from_dense(cls, latents: Tensor) -> SparseCode:
        """The nonzero entries of ``latents`` [batch, d_sae]."""
        mask = latents != 0
        return cls(active_set(mask.sum(1), mask.nonzero()[:, 1].int(), latents.shape[1]), latents[mask])

    def to_dense(self) -> Tensor:
        """[batch, d_sae]."""
        dense = self.values.new_zeros(self.active.batch, self.active.d_sae)
        return dense.index_put((self.active.rows, self.active.latent_ids), self.values)


def active_set(counts: Tensor, latent_ids: Tensor, d_sae: int) -> ActiveSet:
    """The active set whose token b has ``counts[b]`` of ``latent_ids``, which stand token after token."""
    return ActiveSet(F.pad(counts.cumsum(0), (1, 0)), latent_ids, d_sae)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, active):
        weight = operand(W_dec)
        ctx.save_for_backward(values, weight)
        ctx.active = active
        return active.matmul(values, weight)

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        d_values, d_W_dec = ctx.active.matmul_backward(
            values if ctx.needs_input_grad[1] else None, grad.to(weight.dtype), weight)
        return d_values, d_W_dec, None


def sparse_decode(code: SparseCode, W_dec: Tensor) -> Tensor:
    """x_hat without its bias: [batch, d_in] from a code and ``W_dec`` [d_sae, d_in]; differentiable in both."""
    return _SparseDecode.apply(code.values, W_dec, code.active)
