"""The approximate top-k: its recall against the formula, the formula against an enumeration, both devices' code."""

import itertools
import math

import pytest
import torch
from scipy import stats

from sae_zoo.functional.bucketed_topk import buckets_for, expected_recall, largest_of_buckets
from sae_zoo.functional.selection import LargestOfBuckets


def found_by(values, k, n_buckets):
    """Columns of each row, by sorting lists."""
    rows = []
    for row in values.tolist():
        best = [max(range(b, len(row), n_buckets), key=row.__getitem__) for b in range(n_buckets)]
        rows.append(sorted(sorted(best, key=row.__getitem__)[-k:]))
    return rows


@pytest.mark.parametrize(("n", "k", "n_buckets"), [(7, 3, 3), (8, 3, 4), (8, 2, 8), (6, 3, 4), (9, 4, 4)])
def test_expected_recall_is_the_mean_over_all_places(n, k, n_buckets):
    """The k largest at every set of k places."""
    shares = [len({place % n_buckets for place in places}) / k for places in itertools.combinations(range(n), k)]
    assert expected_recall(n, k, n_buckets) == pytest.approx(sum(shares) / len(shares))


def test_expected_recall_is_that_of_the_source_for_equal_buckets():
    n, k, n_buckets = 4096, 40, 256
    in_a_bucket = stats.hypergeom(n, k, n // n_buckets)
    excess = sum((r - 1) * in_a_bucket.pmf(r) for r in range(2, n // n_buckets + 1))
    assert expected_recall(n, k, n_buckets) == pytest.approx(1 - n_buckets / k * excess)
    assert 1 - (k - 1) / (2 * n_buckets) < expected_recall(n, k, n_buckets) < 1 - (k - 1) / (3 * n_buckets)


@pytest.mark.parametrize(("n", "k", "n_buckets"), [(4096, 40, 160), (4096, 40, 400), (1000, 20, 64), (300, 5, 5)])
def test_measured_recall_is_the_expected_one(generator, n, k, n_buckets):
    values = torch.randn(4000, n, generator=generator)
    exact = torch.zeros(values.shape, dtype=torch.bool).scatter_(1, values.topk(k, dim=1).indices, True)
    shares = exact.gather(1, largest_of_buckets(values, k, n_buckets)).double().mean(1)
    error = shares.std().item() / math.sqrt(len(shares))
    assert abs(shares.mean().item() - expected_recall(n, k, n_buckets)) < 4 * error < 0.02


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize(("n", "k"), [(4096, 40), (512, 5), (512, 160), (60, 1)])
def test_fewest_buckets_that_have_the_recall(n, k, recall):
    n_buckets = buckets_for(n, k, recall)
    assert k <= n_buckets <= n and expected_recall(n, k, n_buckets) >= recall
    assert n_buckets == k or expected_recall(n, k, n_buckets - 1) < recall


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "k", "n_buckets"), [(60, 5, 7), (64, 8, 16), (33, 4, 32), (10, 10, 10), (50, 1, 1)])
def test_both_implementations_equal_sorted_lists(generator, threads, n, k, n_buckets):
    product, bias = torch.randn(20, n, generator=generator), torch.randn(n, generator=generator)
    expected, before = found_by(product + bias, k, n_buckets), torch.get_num_threads()
    rule = LargestOfBuckets(k, n_buckets)
    torch.set_num_threads(threads)
    try:
        counts, ids, values = rule.select(product, bias)
    finally:
        torch.set_num_threads(before)
    assert counts.tolist() == [k] * 20 and ids.view(20, k).sort(1).values.tolist() == expected
    assert torch.equal(values.view(20, k), (product + bias).gather(1, ids.view(20, k).long()))
    assert [row.nonzero().flatten().tolist() for row in rule.mask(product + bias)] == expected


def test_ties_and_nan_give_k_columns_that_exist(generator):
    rule = LargestOfBuckets(4, 6)
    for product in (torch.zeros(3, 20), torch.randn(3, 20, generator=generator).round()):
        counts, ids, values = rule.select(product, torch.zeros(20))
        assert all(len({*row}) == 4 for row in ids.view(3, 4).tolist()) and ids.max() < 20
        assert torch.equal(values.view(3, 4).sort(1).values,
                           product.gather(1, largest_of_buckets(product, 4, 6)).sort(1).values)
    product[1] = float("nan")
    counts, ids, values = rule.select(product, torch.zeros(20))
    assert counts.tolist() == [4] * 3 and ids.min() >= 0 and ids.max() < 20
    assert values.view(3, 4).isnan().all(1).tolist() == [False, True, False]
