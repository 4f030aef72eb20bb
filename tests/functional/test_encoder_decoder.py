import torch

from sae_zoo.functional.decoder import normalise_rows_, remove_parallel_
from sae_zoo.functional.encoder import dense_pre_acts, sparse_pre_acts
from sae_zoo.functional.sparse_code import active_from_mask


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
    monkeypatch.setattr("sae_zoo.functional.encoder._CHUNK_ELEMENTS", 14)  # two rows a chunk
    x, *weights = parameters(generator)
    W_enc, b_enc, b_dec = weights
    full = (x - b_dec) @ W_enc + b_enc
    mask = full > 0.3
    upstream = torch.randn(int(mask.sum()), generator=generator).double()
    expected = torch.autograd.grad(full[mask], weights, upstream)
    values, active = sparse_pre_acts(x - b_dec, W_enc, b_enc, b_dec, lambda piece: active_from_mask(piece > 0.3))
    torch.testing.assert_close(values, full[mask])
    for a, b in zip(torch.autograd.grad(values, weights, upstream), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_unit_rows_and_projection(generator):
    W = torch.randn(4, 3, generator=generator)
    W[2] = 0
    normalise_rows_(W)
    torch.testing.assert_close(W.norm(dim=1), torch.tensor([1.0, 1, 0, 1]))
    gradient = torch.randn(4, 3, generator=generator)
    projected = gradient.clone()
    remove_parallel_(projected, W)
    torch.testing.assert_close((projected * W).sum(1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(projected + (gradient * W).sum(1, keepdim=True) * W, gradient)
