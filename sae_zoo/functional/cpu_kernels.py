"""Kernels for a CPU, compiled by numba, where torch is slow: picking active entries, products on them, and Adam.

Each function splits its rows over as many threads as torch uses; a row is computed by one thread alone, so results do
not depend on how many there are. All tensors are float32 or float64 and on the CPU; latents,
entries and rows are int32, offsets and counts int64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sae_zoo.functional import workspace

# Sums may be reordered and contracted, which is what lets them be vectorised; NaN and inf keep their meaning.
_SUMS = {"reassoc", "contract", "nsz"}
# Room for entries above a bound, as a share of all; `select_above` starts again with enough if there are more.
_FIRST_SHARE = 0.05
# Latents of a row in one residue class, whose largest entries bound the k-th largest of the row from below.
_CLASS_SIZE = 32


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # By process: the threads of a pool do not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="sae_zoo")


def _in_parallel(kernel: Callable, n: int, arguments: Callable[[int], tuple]) -> list:
    """Run ``kernel(start, stop, *arguments(part))`` on equal parts of ``range(n)``; their results in order."""
    parts = max(1, min(torch.get_num_threads(), n))
    bounds = [n * part // parts for part in range(parts + 1)]
    futures = [_pool(os.getpid(), parts - 1).submit(kernel, bounds[p], bounds[p + 1], *arguments(p))
               for p in range(1, parts)]
    return [kernel(bounds[0], bounds[1], *arguments(0)), *(future.result() for future in futures)]


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    # numpy has no bfloat16; its numbers are float32 numbers.
    return tuple((t.float() if t.dtype is torch.bfloat16 else t).detach().contiguous().numpy() for t in tensors)


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype is torch.bfloat16 else tensor.dtype


@njit(nogil=True, cache=True)
def _select_above(start, stop, product, bias, bound, mask, words, ids, values, counts):
    n, room, filled = product.shape[1], ids.shape[0], 0
    for r in range(start, stop):
        row, before = product[r], filled
        for c in range(n):  # vectorised; eight of its answers are then looked at in one comparison
            mask[c] = np.int8(row[c] + bias[c] > bound[c])
        for w in range(words.shape[0]):
            if words[w] != 0:
                for c in range(8 * w, min(8 * w + 8, n)):
                    if mask[c]:
                        if filled < room:
                            ids[filled] = c
                            values[filled] = row[c] + bias[c]
                        filled += 1
        counts[r] = filled - before
    return filled


def select_above(product: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of ``product + bias`` that exceed ``bound``, row after row.

    Args:
        product: [rows, d_sae], contiguous.
        bias, bound: [d_sae].

    Returns:
        How many in each row [rows]; their columns [n]; their values [n].
    """
    rows, n = product.shape
    counts, parts = torch.empty(rows, dtype=torch.int64), torch.get_num_threads()
    arrays = _arrays(product, bias, bound)
    room = int(_FIRST_SHARE * rows * n / parts) + n
    while True:
        masks = [torch.zeros(-(-n // 8) * 8, dtype=torch.int8) for _ in range(parts)]
        ids = [torch.empty(room, dtype=torch.int32) for _ in range(parts)]
        values = [torch.empty(room, dtype=_sum_type(product)) for _ in range(parts)]
        filled = _in_parallel(_select_above, rows, lambda p, masks=masks, ids=ids, values=values: (
            *arrays, *_arrays(masks[p], masks[p].view(torch.int64), ids[p], values[p], counts)))
        if max(filled) <= room:
            break
        room = max(filled)
    return (counts, torch.cat([part[:count] for part, count in zip(ids, filled, strict=False)]),
            torch.cat([part[:count] for part, count in zip(values, filled, strict=False)]))


@njit(nogil=True, cache=True)
def _kth_largest(buffer, n, k):
    """The k-th largest of ``buffer[:n]``, which is reordered."""
    low, high = 0, n - 1
    while low < high:
        a, b, c = buffer[low], buffer[(low + high) >> 1], buffer[high]
        pivot, i, j = max(min(a, b), min(max(a, b), c)), low, high
        while i <= j:
            while buffer[i] > pivot:
                i += 1
            while buffer[j] < pivot:
                j -= 1
            if i <= j:
                buffer[i], buffer[j] = buffer[j], buffer[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return buffer[k - 1]


@njit(nogil=True, cache=True)
def _largest_of_classes(row, bias, best):
    """Into ``best``: the largest entry of ``row + bias`` in each residue class of columns."""
    n_classes = best.shape[0]
    for c in range(n_classes):
        best[c] = row[c] + bias[c]
    for first in range(n_classes, row.shape[0], n_classes):
        part, part_bias = row[first : first + n_classes], bias[first : first + n_classes]
        for c in range(part.shape[0]):
            value = part[c] + part_bias[c]
            best[c] = value if value > best[c] else best[c]


@njit(nogil=True, cache=True)
def _select_largest(start, stop, product, bias, k, n_classes, ids, values):
    n = product.shape[1]
    best, scratch = np.empty(n_classes, product.dtype), np.empty(n, product.dtype)
    candidates, columns = np.empty(n, product.dtype), np.empty(n, np.int64)
    for r in range(start, stop):
        row = product[r]
        # k of these are entries of the row, so the k-th largest of them is a lower bound of the row's, and nearly as
        # large.
        _largest_of_classes(row, bias, best)
        scratch[:n_classes] = best
        bound, m = _kth_largest(scratch, n_classes, k), 0
        for c in range(n_classes):
            if best[c] >= bound:
                for j in range(c, n, n_classes):
                    value = row[j] + bias[j]
                    if value >= bound:
                        candidates[m] = value
                        columns[m] = j
                        m += 1
        scratch[:m] = candidates[:m]
        bound, above, filled = _kth_largest(scratch, m, k), 0, 0
        for i in range(m):
            above += np.int64(candidates[i] > bound)
        for i in range(m):
            value = candidates[i]
            if value > bound or (value == bound and above < k):
                above += np.int64(value == bound)
                ids[r, filled] = columns[i]
                values[r, filled] = value
                filled += 1
        for i in range(filled, k):  # only where the row has NaN, which compares with nothing: show it, do not hide it
            ids[r, i] = i
            values[r, i] = np.nan


def select_largest(product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [rows, k] and values [rows, k], in no order, of the ``k`` largest entries of each row of
    ``product + bias`` ([rows, d_sae], contiguous; and [d_sae]). Of equal entries, any; a row with NaN may give NaN.
    """
    rows, n = product.shape
    ids, values = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k, dtype=_sum_type(product))
    n_classes = min(n, max(4 * k, n // _CLASS_SIZE))
    _in_parallel(_select_largest, rows, lambda _: (*_arrays(product, bias), k, n_classes, *_arrays(ids, values)))
    return ids, values


@njit(nogil=True, cache=True)
def _select_largest_of_buckets(start, stop, product, bias, k, n_buckets, ids, values):
    best, scratch = np.empty(n_buckets, product.dtype), np.empty(n_buckets, product.dtype)
    for r in range(start, stop):
        row = product[r]
        _largest_of_classes(row, bias, best)
        scratch[:] = best
        bound, above, filled = _kth_largest(scratch, n_buckets, k), 0, 0
        for c in range(n_buckets):
            above += np.int64(best[c] > bound)
        for c in range(n_buckets):
            value = best[c]
            if value > bound or (value == bound and above < k):
                above += np.int64(value == bound)
                for j in range(c, row.shape[0], n_buckets):
                    if row[j] + bias[j] == value:
                        ids[r, filled] = j
                        values[r, filled] = value
                        filled += 1
                        break
        for i in range(filled, k):  # as in _select_largest
            ids[r, i] = i
            values[r, i] = np.nan


def select_largest_of_buckets(product: Tensor, bias: Tensor, k: int, n_buckets: int) -> tuple[Tensor, Tensor]:
    """Select the largest entries as :func:`select_largest` does, but of the largest entry of each of ``n_buckets``
    residue classes of columns alone (:mod:`sae_zoo.functional.bucketed_topk`).
    """
    rows = len(product)
    ids, values = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k, dtype=_sum_type(product))
    arrays = _arrays(product, bias), _arrays(ids, values)
    _in_parallel(_select_largest_of_buckets, rows, lambda _: (*arrays[0], k, n_buckets, *arrays[1]))
    return ids, values


@njit(nogil=True, cache=True)
def _sort_by_latent(row_offsets, latent_ids, offsets, entries, rows):
    for e in range(latent_ids.shape[0]):
        offsets[latent_ids[e] + 1] += 1
    for i in range(offsets.shape[0] - 1):
        offsets[i + 1] += offsets[i]
    position = offsets[:-1].copy()
    for r in range(row_offsets.shape[0] - 1):
        for e in range(row_offsets[r], row_offsets[r + 1]):
            p = position[latent_ids[e]]
            position[latent_ids[e]] = p + 1
            entries[p] = e
            rows[p] = r


def sort_by_latent(row_offsets: Tensor, latent_ids: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of an active set in the order of their latents: offsets [d_sae + 1], entries [n], their rows [n]."""
    offsets = torch.zeros(d_sae + 1, dtype=torch.int64)
    entries, rows = torch.empty_like(latent_ids), torch.empty_like(latent_ids)
    _sort_by_latent(*_arrays(row_offsets, latent_ids, offsets, entries, rows))
    return offsets, entries, rows


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _bag_sum(start, stop, offsets, rows, weights, matrix, out):
    d = matrix.shape[1]
    for j in range(start, stop):
        total = out[j]
        total[:] = 0
        for e in range(offsets[j], offsets[j + 1]):
            weight, row = weights[e], matrix[rows[e]]
            for c in range(d):
                total[c] += weight * row[c]


def bag_sum(offsets: Tensor, rows: Tensor, weights: Tensor, matrix: Tensor) -> Tensor:
    """[bags, d]: bag j is the sum of ``weights[e] * matrix[rows[e]]`` over the e in ``offsets[j]:offsets[j + 1]``."""
    out = workspace.empty(len(offsets) - 1, matrix.shape[1], like=weights)
    arrays = _arrays(offsets, rows, weights, matrix, out)
    _in_parallel(_bag_sum, len(out), lambda _: arrays)
    return out


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _bag_dot(start, stop, offsets, entries, rows, grad, weight, dots):
    d = weight.shape[1]
    for i in range(start, stop):
        own = weight[i]
        for p in range(offsets[i], offsets[i + 1]):
            other, dot = grad[rows[p]], own[0] * 0
            for c in range(d):
                dot += other[c] * own[c]
            dots[entries[p]] = dot


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _bag_dot_and_sum(start, stop, offsets, entries, rows, grad, weight, dots, values, total):
    d = weight.shape[1]
    for i in range(start, stop):
        own, summed = weight[i], total[i]
        summed[:] = 0
        for p in range(offsets[i], offsets[i + 1]):
            other, value, dot = grad[rows[p]], values[entries[p]], own[0] * 0
            for c in range(d):
                dot += other[c] * own[c]
                summed[c] += value * other[c]
            dots[entries[p]] = dot


def decode_backward(by_latent: tuple[Tensor, Tensor, Tensor], grad: Tensor, weight: Tensor,
                    values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of S @ weight, each token's ``grad`` read once for both.

    Args:
        by_latent: from :func:`sort_by_latent`.
        grad: [batch, d].
        weight: [d_sae, d].
        values: [n] of S; None where the gradient of ``weight`` is not wanted.

    Returns:
        The gradients of the values [n] and of ``weight`` (or None).
    """
    dots = torch.empty(len(by_latent[1]), dtype=_sum_type(weight))
    arrays = _arrays(*by_latent, grad, weight, dots)
    if values is None:
        _in_parallel(_bag_dot, len(weight), lambda _: arrays)
        return dots, None
    total = workspace.empty(*weight.shape, like=weight, dtype=_sum_type(weight))
    _in_parallel(_bag_dot_and_sum, len(weight), lambda _: (*arrays, *_arrays(values, total)))
    return dots, total


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _adam(start, stop, weight, grad, first, second, step_size, beta1, beta2, scale, eps, unit_rows):
    one, d = weight.dtype.type(1), weight.shape[1]
    by_row = second.shape[1] != d
    for i in range(start, stop):
        w, g, v, m = weight[i], grad[i], second[i], first[i]
        along, norm, square, factor = w[0] * 0, w[0] * 0, w[0] * 0, w[0] * 0
        if unit_rows:
            for c in range(d):
                along += w[c] * g[c]
        if by_row:
            for c in range(d):
                slope = g[c] - along * w[c]
                square += slope * slope
            v[0] = beta2 * v[0] + (one - beta2) * square / d
            factor = step_size / (np.sqrt(v[0]) * scale + eps)
        for c in range(d):
            slope, own = g[c] - along * w[c], factor
            if not by_row:
                v[c] = beta2 * v[c] + (one - beta2) * slope * slope
                own = step_size / (np.sqrt(v[c]) * scale + eps)
            if beta1 != 0:
                m[c] = beta1 * m[c] + (one - beta1) * slope
                slope = m[c]
            w[c] -= own * slope
            norm += w[c] * w[c]
        if unit_rows and norm > 0:
            norm = one / np.sqrt(norm)
            for c in range(d):
                w[c] *= norm


def adam_(weight: Tensor, grad: Tensor, first: Tensor | None, second: Tensor, *, step_size: float, beta1: float,
          beta2: float, scale: float, eps: float, unit_rows: bool) -> None:
    """One step of Adam on the rows of ``weight``, in place; see :class:`sae_zoo.training.adam.Adam`.

    Args:
        weight, grad: [rows, d], the weights' memory contiguous; ``first`` too, or None where ``beta1`` is 0.
        second: [rows, d], or [rows, 1] for one of each row.
        step_size: learning rate over 1 - beta1^t.
        scale: 1 / sqrt(1 - beta2^t).
        unit_rows: take the component along its row out of the gradient first, and scale each row to norm 1 after.
    """
    arrays = _arrays(weight, grad, weight if first is None else first, second)
    numbers = tuple(arrays[0].dtype.type(x) for x in (step_size, beta1, beta2, scale, eps))
    _in_parallel(_adam, len(weight), lambda _: (*arrays, *numbers, unit_rows))
