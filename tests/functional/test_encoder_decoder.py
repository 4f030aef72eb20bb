import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo.functional.decoder import normalise_rows_
from sae_zoo.functional.encoder import _CHUNK_ELEMENTS, dense_pre_acts, sparse_pre_acts
from sae_zoo.functional.selection import Above, Largest
from sae_zoo.functional.sparse_code import SparseCode, active_set


def parameters(generator):
    W_enc = torch.randn(7, 5, generator=generator).T.double().requires_grad_()
    b_enc = torch.randn(7, generator=generator).double().requires_grad_()
    b_dec = torch.randn(5, generator=generator).double().requires_grad_()
    return torch.randn(6, 5, generator=generator).double(), W_enc, b_enc, b_dec


def test_dense_gradients_equal_automatic_ones(generator):
    x, *weights = parameters(generator)
    W_enc, b_enc, b_dec = weights
    upstream = torch.randn(6, 7, generator=generator).double()
    expected = torch.autograd.grad(((x - b_dec) @ W_enc + b_enc), weights, upstream)
    found = torch.autograd.grad(dense_pre_acts(x - b_dec, W_enc, b_enc, b_dec), weights, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_values_and_gradients_equal_automatic_ones_in_chunks(generator, monkeypatch):
    monkeypatch.setattr("sae_zoo.functional.encoder._CHUNK_ROWS", 2)
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 1)
    x, *weights = parameters(generator)
    W_enc, b_enc, b_dec = weights
    full = (x - b_dec) @ W_enc + b_enc
    mask = full > 0.3
    upstream = torch.randn(int(mask.sum()), generator=generator).double()
    expected = torch.autograd.grad(full[mask], weights, upstream)
    values, _ = sparse_pre_acts(x - b_dec, W_enc, b_enc, b_dec, Above(0.3))
    torch.testing.assert_close(values, full[mask])
    for a, b in zip(torch.autograd.grad(values, weights, upstream), expected, strict=True):
        torch.testing.assert_close(a, b)


@settings(deadline=None, max_examples=200)
@given(rows=st.integers(1, 9), d_sae=st.integers(1, 300), share=st.floats(0, 1), ties=st.booleans(),
       seed=st.integers(0, 10**6), threads=st.integers(1, 3))
def test_selection_equals_its_mask(rows, d_sae, share, ties, seed, threads):
    generator = torch.Generator().manual_seed(seed)
    product, bias = torch.randn(rows, d_sae, generator=generator), torch.randn(d_sae, generator=generator)
    if ties:
        product, bias = product.round(), bias.round()
    dense, before = product + bias, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bound = dense.flatten().sort().values[int(share * (dense.numel() - 1))]
        per_latent = bound + torch.rand(d_sae, generator=generator).round()
        k = 1 + int(share * (d_sae - 1))
        picked = [(rule, rule.select(product, bias)) for rule in (Above(float(bound)), Above(per_latent), Largest(k))]
    finally:
        torch.set_num_threads(before)
    for rule, (counts, ids, values) in picked:
        code = SparseCode(active_set(counts, ids, d_sae), values)
        chosen = SparseCode(code.active, torch.ones_like(values)).to_dense().bool()
        assert chosen.sum() == len(ids), "an entry was picked twice"
        assert torch.equal(chosen.sum(1), counts) and torch.equal(values, dense[code.active.rows, ids])
        if isinstance(rule, Above):
            assert torch.equal(chosen, rule.mask(dense))
        else:  # which of equal entries is free; the values are not
            mask = rule.mask(dense)
            assert counts.tolist() == [k] * rows
            for row, ours, theirs in zip(dense, chosen, mask, strict=True):
                assert torch.equal(row[ours].sort().values, row[theirs].sort().values)


@pytest.mark.parametrize("n_nan", [1, 2, 50, 100])
def test_nan_is_shown_and_never_an_index_out_of_range(generator, n_nan):
    product = torch.randn(8, 100, generator=generator)
    product[3, torch.randperm(100, generator=generator)[:n_nan]] = float("nan")
    for k in (1, 10, 100):
        counts, ids, values = Largest(k).select(product, torch.zeros(100))
        assert counts.tolist() == [k] * 8 and ids.min() >= 0 and ids.max() < 100
        finite = values.view(8, k).isfinite().all(1)
        assert finite[[0, 1, 2, 4, 5, 6, 7]].all() and (not finite[3] or k <= 100 - n_nan)
    counts, ids, values = Above(-1e9).select(product, torch.zeros(100))
    assert counts.tolist() == [100, 100, 100, 100 - n_nan, 100, 100, 100, 100] and values.isfinite().all()


def test_selection_finds_room_for_everything():
    product, bias = torch.ones(64, 2000), torch.zeros(2000)
    counts, ids, values = Above(0.5).select(product, bias)
    assert counts.tolist() == [2000] * 64 and torch.equal(ids, torch.arange(2000).repeat(64)) and (values == 1).all()


def test_unit_rows(generator):
    W = torch.randn(4, 3, generator=generator)
    W[2] = 0
    normalise_rows_(W)
    torch.testing.assert_close(W.norm(dim=1), torch.tensor([1.0, 1, 0, 1]))
