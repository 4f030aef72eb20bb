"""The active set of a batch of latents, and the two products that a training step needs on it.

With k active latents a token, everything after the encoder GEMM costs 2 * batch * k * d_in a product instead of
2 * batch * d_sae * d_in. Both products and their gradients are embedding bags (rows of one matrix, weighted and summed
into bags), which are parallel and deterministic on a CPU and native on CUDA:

* decode:              row b of x_hat sums the decoder rows of its active latents;
* transposed product:  row i of a weight gradient sums the tokens on which latent i is active (the same entries, sorted
  by latent).

``SparseCode.to_dense`` is the oracle that tests compare with.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# Said once a process by torch about the layout that `sampled_addmm` takes.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """Which latents are active on which tokens of a batch.

    Attributes:
        row_offsets: [batch + 1] int64; the entries of token b are ``row_offsets[b]:row_offsets[b + 1]``.
        latent_ids: [n_active] int64, without repetition within a token.
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

    @cached_property
    def rows(self) -> Tensor:
        """[n_active] int64: the token of each entry."""
        return torch.repeat_interleave(
            torch.arange(self.batch, device=self.latent_ids.device), self.row_offsets.diff(),
            output_size=len(self.latent_ids),
        )

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order that sorts the entries by latent, their tokens in that order, and offsets [d_sae + 1] of the latents."""
        order = torch.sort(self.latent_ids.int(), stable=True).indices
        counts = torch.bincount(self.latent_ids, minlength=self.d_sae)
        return order, self.rows[order], F.pad(counts.cumsum(0), (1, 0))

    def matmul(self, values: Tensor, weight: Tensor) -> Tensor:
        """S @ weight: [batch, d], where S [batch, d_sae] holds ``values`` [n_active] and ``weight`` is [d_sae, d]."""
        return F.embedding_bag(self.latent_ids, weight, self.row_offsets, mode="sum", per_sample_weights=values,
                               include_last_offset=True)

    def transposed_matmul(self, values: Tensor, dense: Tensor) -> Tensor:
        """S^T @ dense: [d_sae, d], where ``dense`` is [batch, d]."""
        order, rows, offsets = self._by_latent
        return F.embedding_bag(rows, dense, offsets, mode="sum", per_sample_weights=values[order],
                               include_last_offset=True)

    def sampled_matmul(self, dense: Tensor, weight: Tensor) -> Tensor:
        """[n_active]: the entries of dense @ weight^T ([batch, d] @ [d, d_sae]) that are in the set."""
        pattern = torch.sparse_csr_tensor(
            self.row_offsets, self.latent_ids, dense.new_zeros(len(self.latent_ids)), (self.batch, self.d_sae),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, dense.contiguous(), weight.T, beta=0.0).values()

    def sum_by_latent(self, values: Tensor) -> Tensor:
        """[d_sae]: the sum of ``values`` [n_active] over the tokens of each latent."""
        return values.new_zeros(self.d_sae).index_add_(0, self.latent_ids, values)


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Latents of a batch: an active set and one value an entry. An entry may be zero (inside a threshold's window)."""

    active: ActiveSet
    values: Tensor

    @classmethod
    def from_dense(cls, latents: Tensor) -> SparseCode:
        """The nonzero entries of ``latents`` [batch, d_sae]."""
        active = active_from_mask(latents != 0)
        return cls(active, latents[active.rows, active.latent_ids])

    def to_dense(self) -> Tensor:
        """[batch, d_sae]."""
        dense = self.values.new_zeros(self.active.batch, self.active.d_sae)
        return dense.index_put((self.active.rows, self.active.latent_ids), self.values)


def active_from_mask(mask: Tensor) -> ActiveSet:
    """The active set of a [batch, d_sae] bool mask."""
    flat = mask.reshape(-1).nonzero().squeeze(1)
    rows = torch.div(flat, mask.shape[1], rounding_mode="floor")
    counts = torch.bincount(rows, minlength=mask.shape[0])
    return ActiveSet(F.pad(counts.cumsum(0), (1, 0)), flat - rows * mask.shape[1], mask.shape[1])


def active_from_indices(indices: Tensor, d_sae: int) -> ActiveSet:
    """The active set of [batch, k] latent ids, k on every token."""
    batch, k = indices.shape
    return ActiveSet(torch.arange(0, batch * k + 1, k, device=indices.device), indices.reshape(-1), d_sae)


def concatenate(parts: list[ActiveSet]) -> ActiveSet:
    """One active set from those of consecutive pieces of a batch."""
    if len(parts) == 1:
        return parts[0]
    counts = torch.cat([part.row_offsets.diff() for part in parts])
    return ActiveSet(F.pad(counts.cumsum(0), (1, 0)), torch.cat([part.latent_ids for part in parts]), parts[0].d_sae)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, active):
        ctx.save_for_backward(values, W_dec)
        ctx.active = active
        return active.matmul(values, W_dec)

    @staticmethod
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        d_values = ctx.active.sampled_matmul(grad, W_dec) if ctx.needs_input_grad[0] else None
        d_W_dec = ctx.active.transposed_matmul(values, grad) if ctx.needs_input_grad[1] else None
        return d_values, d_W_dec, None


def sparse_decode(code: SparseCode, W_dec: Tensor) -> Tensor:
    """x_hat without its bias: [batch, d_in] from a code and ``W_dec`` [d_sae, d_in]; differentiable in both."""
    return _SparseDecode.apply(code.values, W_dec, code.active)
