import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo.functional.sparse_code import (
    SparseCode,
    active_from_indices,
    active_from_mask,
    concatenate,
    sparse_decode,
)

cases = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))


def make(case):
    batch, d_sae, d_in, density, seed = case
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, d_sae, generator=generator) < density
    latents = torch.randn(batch, d_sae, generator=generator) * mask
    return latents, torch.randn(d_sae, d_in, generator=generator), torch.randn(batch, d_in, generator=generator)


@settings(deadline=None)
@given(cases)
def test_products_equal_dense_ones(case):
    latents, weight, dense = make(case)
    code = SparseCode.from_dense(latents)
    active, values = code.active, code.values
    assert torch.equal(code.to_dense(), latents)
    assert active.batch == len(latents) and active.density == pytest.approx((latents != 0).double().mean().item())
    torch.testing.assert_close(active.matmul(values, weight), latents @ weight)
    torch.testing.assert_close(active.transposed_matmul(values, dense), latents.T @ dense)
    torch.testing.assert_close(active.sum_by_latent(values), latents.sum(0))
    expected = (dense @ weight.T)[active.rows, active.latent_ids]
    torch.testing.assert_close(active.sampled_matmul(dense, weight), expected)


@settings(deadline=None)
@given(cases)
def test_pieces_concatenate_to_the_whole(case):
    mask = make(case)[0] != 0
    whole = active_from_mask(mask)
    parts = concatenate([active_from_mask(piece) for piece in mask.split(2)])
    assert torch.equal(parts.row_offsets, whole.row_offsets) and torch.equal(parts.latent_ids, whole.latent_ids)


def test_indices():
    active = active_from_indices(torch.tensor([[2, 0], [1, 2]]), 4)
    dense = SparseCode(active, torch.tensor([1.0, 2.0, 3.0, 4.0])).to_dense()
    assert dense.tolist() == [[2, 0, 1, 0], [0, 3, 4, 0]]


def test_decode_gradients_in_float64():
    latents = torch.tensor([[0.0, 1.5, 0, -2.0], [0, 0, 0, 0], [3.0, 0, 0, 0.5]], dtype=torch.float64)
    code = SparseCode.from_dense(latents)
    values = code.values.clone().requires_grad_()
    W_dec = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(SparseCode(code.active, v), w), (values, W_dec))
