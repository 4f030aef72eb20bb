"""The rule over a whole batch, beside a sort of everything."""

import pytest
import torch

from sae_zoo.functional.selection import Above, LargestOfBatch

ROWS, D_SAE = 60, 40


def largest(values, k):
    """The oracle: [rows, d_sae] bool, the round(k rows) largest entries above 0."""
    n = round(k * len(values))
    edge = values.flatten().sort(descending=True).values[n - 1]
    return (values >= edge) & (values > 0)


@pytest.mark.parametrize("guess", [0.0, 0.7, 100.0], ids=["none", "about right", "too high"])
@pytest.mark.parametrize("k", [0.5, 1, 7, 30])
@pytest.mark.parametrize("piece", [7, ROWS])
def test_the_same_entries_as_a_sort(guess, k, piece):
    values = torch.randn(ROWS, D_SAE, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-0.5, 0.5, D_SAE)
    product = values - bias
    rule = LargestOfBatch(k, torch.tensor(guess)).of_batch(lambda: iter(product.split(piece)), bias, ROWS)
    assert torch.equal(rule.mask(product + bias), largest(product + bias, k))
    counts, ids, found = rule.select(product, bias)
    assert int(counts.sum()) == len(ids) == int(largest(product + bias, k).sum()) and (found > 0).all()


def test_no_more_than_what_is_above_0():
    values = -torch.ones(ROWS, D_SAE)
    values[3, 5] = 2.0
    rule = LargestOfBatch(4, torch.tensor(1.0)).of_batch(lambda: [values], torch.zeros(D_SAE), ROWS)
    assert float(rule.bound) == 0 and rule.mask(values).nonzero().tolist() == [[3, 5]]


def test_a_rule_of_single_rows_asks_for_no_batch():
    rule = Above(0.5)
    assert rule.of_batch(lambda: pytest.fail("asked"), torch.zeros(D_SAE), ROWS) is rule
