import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo.functional.sparse_code import SparseCode, active_set, sparse_decode

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
    for wanted in (values, None):
        d_values, d_weight = active.matmul_backward(wanted, dense, weight)
        torch.testing.assert_close(d_values, expected)
    assert d_weight is None
    torch.testing.assert_close(active.matmul_backward(values, dense, weight)[1], latents.T @ dense)


def test_active_set_from_counts():
    active = active_set(torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1]), 4)
    code = SparseCode(active, torch.tensor([1.0, 2.0, 3.0]))
    assert code.to_dense().tolist() == [[2, 0, 1, 0], [0] * 4, [0, 3, 0, 0]]


def test_decode_gradients_in_float64():
    latents = torch.tensor([[0.0, 1.5, 0, -2.0], [0, 0, 0, 0], [3.0, 0, 0, 0.5]], dtype=torch.float64)
    code = SparseCode.from_dense(latents)
    values = code.values.clone().requires_grad_()
    W_dec = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(SparseCode(code.active, v), w), (values, W_dec))
