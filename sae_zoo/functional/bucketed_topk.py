"""Approximate top-k in two stages: the largest entry of each bucket of columns, then the k largest of these.

The algorithm is that of accelerators whose sort is slow (Chern et al. 2022, arXiv 2206.14286, for TPUs). Column c is in
bucket c mod ``n_buckets``. What is lost are entries of the k largest that share a bucket with a larger one.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor


def expected_recall(n: int, k: int, n_buckets: int) -> float:
    """Expected share of the ``k`` largest of ``n`` entries that are found, all their places being equally likely.

    Every bucket that holds one of them or more finds one, so that the share is the expected number of such buckets over
    k: sum_b (1 - C(n - n_b, k) / C(n, k)) / k, n_b the size of bucket b; that is at least 1 - (k - 1) / (2 n_buckets).
    Source: Samaga et al. 2025 (arXiv 2506.04165), theorem 1 with one entry kept a bucket, here also for buckets of
    unequal size.
    """
    small, n_large = divmod(n, n_buckets)
    found = 0.0
    for size, how_many in ((small + 1, n_large), (small, n_buckets - n_large)):
        none_of_them = math.prod((n - size - j) / (n - j) for j in range(k)) if n - size >= k else 0.0
        found += how_many * (1 - none_of_them)
    return found / k


def buckets_for(n: int, k: int, recall: float) -> int:
    """The least number of buckets, from ``k`` to ``n``, with at least that :func:`expected_recall`."""
    return bisect_left(range(n), recall, lo=k, key=lambda n_buckets: expected_recall(n, k, n_buckets))


def largest_of_buckets(values: Tensor, k: int, n_buckets: int) -> Tensor:
    """Columns [rows, k], in no order, of the ``k`` largest of the bucket maxima of each row of ``values`` [rows, n]."""
    rows, n = values.shape
    best, place = F.pad(values, (0, -n % n_buckets), value=-torch.inf).view(rows, -1, n_buckets).max(dim=1)
    buckets = best.topk(k, dim=1, sorted=False).indices
    return place.gather(1, buckets) * n_buckets + buckets
