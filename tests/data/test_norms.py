"""Norms of rows, and rows that are too long."""

import math

import numpy as np
import pytest
import torch

from sae_zoo.data.array_file import FileActivations
from sae_zoo.data.norms import LongRows, Norms, describe
from sae_zoo.functional.norms import in_place_of_long_rows, is_within, squared_norms

D_IN = 6


def rows(n=2000, *, long=(), factor=100.0):
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(0))
    x[list(long)] *= factor
    return x


def test_sums_are_exact_at_the_edges_and_quantiles_are_near():
    x = rows(long=(3, 77))
    norms, squares = Norms.of(x), squared_norms(x)
    bound = norms.bound(4.0)
    assert bound == pytest.approx(4 * float(squares.sqrt().median()), rel=0.05)
    inside = squares < bound**2
    assert norms.n_rows == 2000 and norms.above(bound) == int((~inside).sum()) == 2
    assert norms.mean_square(below=bound) == pytest.approx(float(squares[inside].mean()), rel=1e-12)
    assert norms.mean_square() == pytest.approx(float(squares.mean()), rel=1e-12)
    assert norms.square_share_above(bound) == pytest.approx(float(squares[~inside].sum() / squares.sum()), rel=1e-12)
    for share in (0.01, 0.5, 0.999, 1.0):
        exact = float(squares.sqrt().sort().values[math.ceil(share * 2000) - 1])
        assert exact <= norms.quantile(share) <= exact * 1.05


def test_histograms_add_up_and_survive_json():
    x = rows()
    whole, parts = Norms.of(x), Norms.of(x[:700]) + Norms.of(x[700:])
    assert {i: n for i, (n, _) in whole.bins.items()} == {i: n for i, (n, _) in parts.bins.items()}
    assert parts.mean_square() == pytest.approx(whole.mean_square(), rel=1e-12)
    assert Norms.from_json(whole.to_json()).bins == whole.bins


def test_rows_of_norm_zero_and_no_rows():
    norms = Norms.of(torch.cat([torch.zeros(1, D_IN), rows(9)]))
    assert norms.n_rows == 10 and math.isfinite(norms.median)
    with pytest.raises(ValueError, match="no row was counted"):
        Norms().quantile(0.5)


def test_the_median_is_of_rows_that_are_not_zero(tmp_path):
    x = rows(400)
    x[torch.arange(400) % 3 > 0] = 0
    assert Norms.of(x).median == Norms.of(x[::3]).median
    np.save(tmp_path / "acts.npy", x.numpy())
    activations = FileActivations(tmp_path / "acts.npy")
    activations.leave_out(4.0)
    squared = squared_norms(x)[: activations.n_rows("train")]
    assert activations.mean_squared_norm == pytest.approx(float(squared.mean()), rel=0.1)


@pytest.mark.parametrize("multiple", [1, 0, -3])
def test_a_bound_that_makes_no_sense(multiple):
    with pytest.raises(ValueError, match=rf"data.max_norm is {multiple}; it is a multiple of the median"):
        Norms.of(rows()).bound(multiple)
    assert math.isinf(Norms.of(rows()).bound(None))


def test_what_is_long_is_named():
    found = LongRows()
    x, tokens, positions = rows(long=(5, 6, 900)), torch.arange(2000) % 7, torch.full((2000,), 3)
    tokens[[5, 6, 900]] = torch.tensor([11, 11, 4])
    for part in zip(x.split(600), tokens.split(600), positions.split(600), strict=True):
        found.add(*part)
    long = found.summary()["long"]
    assert (long["rows"], long["tokens"], long["positions"]) == (3, [[11, 2], [4, 1]], [[3, 3]])
    assert long["square_share"] == pytest.approx(float(squared_norms(x[[5, 6, 900]]).sum() / squared_norms(x).sum()))
    assert "3 of 2,000 rows (0.15%) have more than 4 times the median norm" in describe(found.summary(), 2000)
    none = LongRows()
    none.add(rows(), tokens, positions)
    assert describe(none.summary(), 2000) is None


def test_another_row_stands_in_place_of_a_long_one():
    x = rows(8, long=(0, 4, 5))
    bound = Norms.of(rows()).bound(4.0)
    filled = in_place_of_long_rows(x, bound)
    assert torch.equal(filled, x[[1, 1, 2, 3, 3, 3, 6, 7]]) and is_within(filled, bound).all()
    assert in_place_of_long_rows(x, math.inf) is x
    assert torch.equal(in_place_of_long_rows(100 * x, bound), 100 * x), "none is within: nothing to put there"


def test_long_rows_are_left_out_of_batches_starts_and_scale(tmp_path):
    x = rows(long=range(0, 1800, 100))
    np.save(tmp_path / "x.npy", x.numpy())
    activations = FileActivations(str(tmp_path / "x.npy"))
    as_they_are = activations.mean_squared_norm
    activations.leave_out(4.0)
    clean = x[:1800][is_within(x[:1800], activations.norm_bound)]
    assert len(clean) == 1782 == len(activations.kept_rows("train", 0, 1800)) and as_they_are > 10 * D_IN
    assert activations.mean_squared_norm == pytest.approx(float(squared_norms(clean).mean()))
    batches = list(activations.batches("train", 450, n_batches=4, seed=0))
    assert all(batch.shape == (450, D_IN) and is_within(batch, activations.norm_bound).all() for batch in batches)
    activations.leave_out(None)
    assert activations.mean_squared_norm == as_they_are
