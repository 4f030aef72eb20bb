import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo.evaluation.latents import LatentCounts
from sae_zoo.evaluation.reconstruction import ReconstructionSums
from sae_zoo.functional.sparse_code import SparseCode


def brute_force(x, x_hat):
    x, x_hat = x.double().numpy(), x_hat.double().numpy()
    error = ((x - x_hat) ** 2).sum()
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, x_hat, strict=True)]
    return {
        "mse": error / x.size, "fvu": error / ((x - x.mean(0)) ** 2).sum(), "cosine": np.mean(cosine),
        "relative_reconstruction_bias": (x_hat**2).sum(1).mean() / (x_hat * x).sum(1).mean(),
    }


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40), st.integers(1, 5), st.floats(0, 1e4), st.integers(1, 50), st.integers(0, 10**6),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_against_brute_force_at_any_mean_chunking_and_dtype(n, d, mean, chunk, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + mean).to(dtype)
    x_hat = (x.double() + 0.3 * torch.randn(n, d, generator=generator)).to(dtype)
    if (x.double() - x.double().mean(0)).square().sum() == 0:
        return
    sums = ReconstructionSums()
    for a, b in zip(x.split(chunk), x_hat.split(chunk), strict=True):
        sums.add(a, b)
    result = sums.result()
    for key, value in brute_force(x, x_hat).items():
        assert getattr(result, key) == pytest.approx(value, rel=1e-6), key


def test_anchors(generator):
    x = torch.randn(1000, 5, generator=generator) + torch.tensor([1e4, 0, 0, -50, 3])
    for x_hat, fvu in ((x.double().mean(0).expand_as(x), 1.0), (x, 0.0)):
        sums = ReconstructionSums()
        sums.add(x, x_hat)
        assert sums.result().fvu == pytest.approx(fvu, abs=1e-9)
    shrunk = ReconstructionSums()
    shrunk.add(x, 0.8 * x)
    assert shrunk.result().relative_reconstruction_bias == pytest.approx(0.8)


def test_nothing_is_not_a_number_but_an_error():
    with pytest.raises(ValueError, match="no row was added"):
        ReconstructionSums().result()


def test_latents_by_hand(tmp_path):
    counts = LatentCounts(4)
    # An entry of the active set that is zero (inside a threshold's window) has not fired.
    dense = torch.tensor([[0.0, 2.0, 0, 0], [0.0, 4.0, 0, 1.0]])
    code = SparseCode.from_dense(dense + torch.tensor([[0, 0, 1e-9, 0]]))
    counts.add(SparseCode(code.active, torch.where(code.values < 1e-6, 0.0, code.values)))
    counts.add(SparseCode.from_dense(torch.zeros(6, 4)))
    assert counts.frequency.tolist() == [0, 0.25, 0, 0.125]
    summary = counts.summary()
    assert math.isnan(summary.pop("l0_standard_error"))
    assert summary == {"l0": 3 / 8, "dead_fraction": 0.5, "fraction_above_1pct": 0.5, "fraction_above_10pct": 0.5}
    counts.write_csv(tmp_path / "latents.csv")
    rows = list(csv.DictReader((tmp_path / "latents.csv").read_text().splitlines()))
    assert rows[1] == {"latent": "1", "frequency": "0.25", "mean_active_value": "3", "max_value": "4"}
    assert rows[3] == {"latent": "3", "frequency": "0.125", "mean_active_value": "1", "max_value": "1"}
    assert rows[0] == {"latent": "0", "frequency": "0", "mean_active_value": "0", "max_value": "0"}


def test_shares_of_latents_by_hand():
    """Of five latents one never fires; the others on 1, 2, 10 and 11 of 100 tokens: 1 % and 10 % are not more."""
    dense = torch.zeros(100, 5)
    for latent, n in enumerate((1, 2, 10, 11)):
        dense[:n, latent] = 1.0
    counts = LatentCounts(5)
    counts.add(SparseCode.from_dense(dense))
    summary = counts.summary()
    assert summary["dead_fraction"] == 0.2 and summary["l0"] == pytest.approx(0.24)
    assert summary["fraction_above_1pct"] == pytest.approx(0.6)
    assert summary["fraction_above_10pct"] == pytest.approx(0.2)


def test_what_cannot_be_said_is_nan():
    """Constant rows have no variance to explain; a reconstruction of zeros has no bias."""
    sums = ReconstructionSums()
    sums.add(torch.ones(5, 3), torch.zeros(5, 3))
    found = sums.result()
    assert math.isnan(found.fvu) and math.isnan(found.relative_reconstruction_bias)
    assert found.mse == 1.0 and found.n_rows == 5


def test_the_error_of_l0_takes_neighbours_for_alike():
    """Of 40 runs of 256 equal tokens: that of the mean of 40 values, not of 10,240; a part of a block at the end is
    left out."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) > 0.5
    counts = LatentCounts(2)
    for value in values:
        counts.add(SparseCode.from_dense(torch.full((256, 2), float(value))))
    expected = 2 * float(values.double().std()) / 40**0.5
    assert counts.l0_standard_error == pytest.approx(expected)
    counts.add(SparseCode.from_dense(torch.zeros(100, 2)))
    assert counts.l0_standard_error == pytest.approx(expected)
