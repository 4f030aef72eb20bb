"""Triton kernels of the sparse training step, for CUDA tensors: weighted sums of rows, sampled products, selection.

Import this module where a CUDA tensor has arrived and nowhere else: it needs Triton, which torch brings along on Linux
only in its CUDA builds. With ``TRITON_INTERPRET=1`` set before the import the same code runs on CPU tensors; that, and
compiling it for sm_90, is how it is tested. **Its speed is unmeasured.**

No atomics and no autotuning: block sizes decide the order in which a sum is taken, so a block size that a stopwatch
chose would cost the repetition of a run to the bit. Sums are taken in float32 whatever the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)

# Entries (row numbers with their weights) that a program loads at once. Each is a row somewhere else in memory, so this
# is what keeps many loads in flight; with 512 columns it takes 32 registers a thread.
_ENTRIES = tl.constexpr(8)
# Longest piece of a bag that one program sums. A latent that fires on a third of the batch would otherwise keep one
# program busy long after all others have finished; at 128 the decode of up to 128 latents a token is never split.
_PIECE = tl.constexpr(128)
# Columns of a row, and candidates for its k largest, that a program selects from at once; below 2^15, see _compact.
_COLUMNS = tl.constexpr(2048)
_CANDIDATES = tl.constexpr(256)
_WARPS = 8  # of the programs that hold _COLUMNS values: 8 values and at most 64 registers a thread

_LOWEST = tl.constexpr(-(1 << 31))  # of int32
_ALL_BUT_SIGN = tl.constexpr((1 << 31) - 1)


def _check(name: str, tensor: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.ndim != ndim or tensor.dtype not in dtypes or not tensor.is_contiguous():
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)} and strides {list(tensor.stride())}; "
                         f"it must be a contiguous {ndim}-D tensor of {allowed}: call .to(...) or .contiguous()")


def _check_same(name: str, size: int, other_name: str, other_size: int) -> None:
    if size != other_size:
        raise ValueError(f"{name} is {size} and {other_name} is {other_size}; they must be equal")


def _block_of_columns(d: int) -> int:
    """Columns of a matrix of width ``d`` that one program takes: the largest power of two that leaves no ragged last
    block, but no less than a row segment that memory delivers well and no more than registers hold.
    """
    return max(128, min(512, d & -d))


# Weighted sums of rows.


@triton.jit
def _sum_rows(ids, weights, matrix, start, end, d, columns, BLOCK_D: tl.constexpr):
    """Float32 [BLOCK_D]: the sum over entries start:end of weight * (columns of a matrix row)."""
    total = tl.zeros((_ENTRIES, BLOCK_D), tl.float32)
    for first in range(start, end, _ENTRIES):
        entry = first + tl.arange(0, _ENTRIES)
        there = entry < end
        row = tl.load(ids + entry, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=there, other=0.0)
        mask = there[:, None] & (columns < d)[None, :]
        values = tl.load(matrix + row[:, None] * d + columns[None, :], mask=mask, other=0.0)
        total += weight[:, None] * values.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _sum_short_bags(ids, offsets, weights, matrix, out, d, BLOCK_D: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    if end - start <= _PIECE:
        total = _sum_rows(ids, weights, matrix, start, end, d, columns, BLOCK_D)
        tl.store(out + bag * d + columns, total.to(out.dtype.element_ty), mask=columns < d)


@triton.jit
def _sum_pieces(ids, offsets, weights, matrix, owner, first_piece, partial, n_bags, d, BLOCK_D: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = tl.load(owner + piece)
    if bag < n_bags:
        start = tl.load(offsets + bag) + (piece - tl.load(first_piece + bag)) * _PIECE
        end = tl.minimum(start + _PIECE, tl.load(offsets + bag + 1))
        total = _sum_rows(ids, weights, matrix, start, end, d, columns, BLOCK_D)
        tl.store(partial + piece * d + columns, total, mask=columns < d)


@triton.jit
def _sum_long_bags(owner, first_piece, pieces, partial, out, n_bags, d, BLOCK_D: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = tl.load(owner + piece)
    if tl.load(first_piece + bag, mask=bag < n_bags, other=-1) == piece:  # one program a bag: that of its first piece
        total = tl.zeros((_ENTRIES, BLOCK_D), tl.float32)
        n_pieces = tl.load(pieces + bag)
        for first in range(0, n_pieces, _ENTRIES):
            row = first + tl.arange(0, _ENTRIES)
            mask = (row < n_pieces)[:, None] & (columns < d)[None, :]
            total += tl.load(partial + (piece + row)[:, None] * d + columns[None, :], mask=mask, other=0.0)
        tl.store(out + bag * d + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < d)


def bag_sum(ids: Tensor, offsets: Tensor, weights: Tensor, matrix: Tensor, *,
            out_dtype: torch.dtype | None = None) -> Tensor:
    """Weighted sums of matrix rows: out[j] = sum of weights[e] * matrix[ids[e]] over e in offsets[j]:offsets[j + 1].

    Decode has one bag a token, both weight gradients one bag a latent. Bags may be empty, and as uneven as they like:
    those longer than 128 entries are summed in pieces by several programs, whose sums are then added in order. Nothing
    waits for the device: what is launched depends on shapes only.

    Args:
        ids: [n_entries] int64 or int32, row numbers; not checked.
        offsets: [n_bags + 1] int64, from 0 to n_entries.
        weights: [n_entries] float32.
        matrix: [n, d] float32 or bfloat16.
        out_dtype: float32 or bfloat16; None for that of ``matrix``.

    Returns:
        [n_bags, d]; the same to the bit in every run.

    Raises:
        ValueError: if a tensor has another dtype or shape, or is not contiguous.
    """
    _check("ids", ids, 1, _INTEGERS)
    _check("offsets", offsets, 1, (torch.int64,))
    _check("weights", weights, 1, (torch.float32,))
    _check("matrix", matrix, 2, _FLOATS)
    _check_same("len(ids)", len(ids), "len(weights)", len(weights))
    n_bags, d = len(offsets) - 1, matrix.shape[1]
    out = matrix.new_empty(n_bags, d, dtype=out_dtype)
    if out.dtype not in _FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; choose torch.float32 or torch.bfloat16")
    block = _block_of_columns(d)
    # Blocks of columns on the slow axis: programs that run together read the same columns, and of those the cache holds
    # all rows of a batch of activations where it could not hold the whole matrix.
    columns = triton.cdiv(d, block)
    with torch.cuda.device_of(matrix):
        _sum_short_bags[n_bags, columns](ids, offsets, weights, matrix, out, d, BLOCK_D=block)
        piece = _PIECE.value
        # A bag of more than `piece` entries has fewer than 2 * entries / piece pieces, so this many hold them all.
        max_pieces = 2 * len(ids) // piece
        if max_pieces:
            lengths = offsets.diff()
            pieces = (lengths + piece - 1) // piece * (lengths > piece)
            ends = pieces.cumsum(0)
            first_piece = ends - pieces
            owner = torch.searchsorted(ends, torch.arange(max_pieces, device=ends.device), right=True)
            partial = matrix.new_empty(max_pieces, d, dtype=torch.float32)
            _sum_pieces[max_pieces, columns](ids, offsets, weights, matrix, owner, first_piece, partial, n_bags, d,
                                             BLOCK_D=block)
            _sum_long_bags[max_pieces, columns](owner, first_piece, pieces, partial, out, n_bags, d, BLOCK_D=block)
    return out


# Sampled products.


@triton.jit
def _dot_entries(rows, ids, dense, weight, out, n_entries, d, BLOCK_D: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * _ENTRIES + tl.arange(0, _ENTRIES)
    there = entry < n_entries
    left = dense + tl.load(rows + entry, mask=there, other=0).to(tl.int64)[:, None] * d
    right = weight + tl.load(ids + entry, mask=there, other=0).to(tl.int64)[:, None] * d
    total = tl.zeros((_ENTRIES, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D))[None, :]
        mask = there[:, None] & (columns < d)
        total += (tl.load(left + columns, mask=mask, other=0.0).to(tl.float32)
                  * tl.load(right + columns, mask=mask, other=0.0).to(tl.float32))
    tl.store(out + entry, tl.sum(total, 1), mask=there)


def sampled_dot(rows: Tensor, ids: Tensor, dense: Tensor, weight: Tensor) -> Tensor:
    """Chosen entries of dense @ weight^T: out[e] = dense[rows[e]] . weight[ids[e]].

    Args:
        rows, ids: [n_active] int64 or int32, row numbers of ``dense`` and of ``weight``; not checked. Sorted ``rows``
            are fastest: neighbours then share a row that is already in the cache.
        dense: [batch, d] float32 or bfloat16.
        weight: [n, d] float32 or bfloat16.

    Returns:
        [n_active] float32.

    Raises:
        ValueError: if a tensor has another dtype or shape, or is not contiguous.
    """
    _check("rows", rows, 1, _INTEGERS)
    _check("ids", ids, 1, _INTEGERS)
    _check("dense", dense, 2, _FLOATS)
    _check("weight", weight, 2, _FLOATS)
    _check_same("len(rows)", len(rows), "len(ids)", len(ids))
    _check_same("dense.shape[1]", dense.shape[1], "weight.shape[1]", weight.shape[1])
    out = dense.new_empty(len(rows), dtype=torch.float32)
    d = dense.shape[1]
    with torch.cuda.device_of(dense):
        _dot_entries[(triton.cdiv(len(rows), _ENTRIES.value),)](rows, ids, dense, weight, out, len(rows), d,
                                                                BLOCK_D=_block_of_columns(d))
    return out


# Selection of the k largest.


@triton.jit
def _keys(values):
    """Int32 keys in the order of the floats; -0 and 0 are one key."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.where(bits == _LOWEST, 0, bits)
    return bits ^ ((bits >> 31) & _ALL_BUT_SIGN)


@triton.jit
def _compact(keys, there, threshold, max_ties, n_above, n_ties):
    """The keys to keep (all above the threshold, and the first ``max_ties`` that equal it) and their places in the
    row's output, given how many were above and equal in earlier blocks of the row; and these counts, updated.
    """
    above, tie = there & (keys > threshold), there & (keys == threshold)
    # Both prefix sums in one: neither count fills its half of the bits.
    both = above.to(tl.int32) + tie.to(tl.int32) * 65536
    before = tl.cumsum(both, 0) - both
    above_before, ties_before = n_above + (before & 65535), n_ties + (before >> 16)
    place = above_before + tl.minimum(ties_before, max_ties)
    total = tl.sum(both, 0)
    return above | (tie & (ties_before < max_ties)), place, n_above + (total & 65535), n_ties + (total >> 16)


@triton.jit
def _find_candidates(pre_acts, candidates, n_candidates, n, k, capacity):
    """Columns of the row, ascending, that contain its k largest and few others.

    The k-th largest of the maxima of _COLUMNS groups of columns is at most the k-th largest value, and fewer than k of
    the groups hold anything above it.
    """
    row = tl.program_id(0).to(tl.int64)
    values = pre_acts + row * n
    candidates += row * capacity
    lane = tl.arange(0, _COLUMNS)
    largest = tl.full((_COLUMNS,), _LOWEST, tl.int32)
    for first in range(0, n, _COLUMNS):
        keys = _keys(tl.load(values + first + lane, mask=first + lane < n, other=0.0))
        largest = tl.maximum(largest, tl.where(first + lane < n, keys, _LOWEST))
    # Bisection from the sign bit down: each step keeps its bit if at least k maxima reach the trial.
    threshold = tl.full((), _LOWEST, tl.int32)
    bit = threshold
    for _ in range(32):
        trial = threshold ^ bit
        threshold = tl.where(tl.sum((largest >= trial).to(tl.int32), 0) >= k, trial, threshold)
        bit = (bit >> 1) & _ALL_BUT_SIGN
    n_above, n_ties = 0, 0
    for first in range(0, n, _COLUMNS):
        column = first + lane
        keys = _keys(tl.load(values + column, mask=column < n, other=0.0))
        keep, place, n_above, n_ties = _compact(keys, column < n, threshold, k, n_above, n_ties)
        tl.store(candidates + place, column, mask=keep)
    tl.store(n_candidates + row, n_above + tl.minimum(n_ties, k))


@triton.jit
def _candidate_keys(values, candidates, first, n_candidates):
    lane = first + tl.arange(0, _CANDIDATES)
    column = tl.load(candidates + lane, mask=lane < n_candidates, other=0)
    return column, _keys(tl.load(values + column, mask=lane < n_candidates, other=0.0)), lane < n_candidates


@triton.jit
def _keep_largest(pre_acts, candidates, n_candidates, indices, n, k, capacity):
    """The k largest of the candidates, exactly."""
    row = tl.program_id(0).to(tl.int64)
    values = pre_acts + row * n
    candidates += row * capacity
    indices += row * k
    n_candidates = tl.load(n_candidates + row)
    threshold = tl.full((), _LOWEST, tl.int32)
    bit = threshold
    max_ties = tl.full((), 0, tl.int32) + k
    for _ in range(32):
        trial = threshold ^ bit
        reach = tl.zeros((_CANDIDATES,), tl.int32)
        for first in range(0, n_candidates, _CANDIDATES):
            column, keys, there = _candidate_keys(values, candidates, first, n_candidates)
            reach += (there & (keys >= trial)).to(tl.int32)
        n_reach = tl.sum(reach, 0)
        # The last trial that fails is the key after the threshold: what reaches it is above the threshold.
        max_ties = tl.where(n_reach >= k, max_ties, k - n_reach)
        threshold = tl.where(n_reach >= k, trial, threshold)
        bit = (bit >> 1) & _ALL_BUT_SIGN
    n_above, n_ties = 0, 0
    for first in range(0, n_candidates, _CANDIDATES):
        column, keys, there = _candidate_keys(values, candidates, first, n_candidates)
        keep, place, n_above, n_ties = _compact(keys, there, threshold, max_ties, n_above, n_ties)
        tl.store(indices + place, column.to(tl.int64), mask=keep)


def topk_indices(pre_acts: Tensor, k: int) -> Tensor:
    """Columns of the k largest values of each row, exactly k; of equal values the lower columns.

    Reads ``pre_acts`` twice, with a program a row (so give it some hundred rows at a time), and is made for k far below
    n: its scratch memory is about k * n / 2048 int32 a row.

    Args:
        pre_acts: [rows, n] float32 or bfloat16; NaN is ordered by its bits, beyond the infinity of its sign.
        k: from 1 to n.

    Returns:
        [rows, k] int64, ascending.

    Raises:
        ValueError: if ``pre_acts`` has another dtype or shape or is not contiguous, or ``k`` is out of bounds.
    """
    _check("pre_acts", pre_acts, 2, _FLOATS)
    rows, n = pre_acts.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must be from 1 to n = {n}")
    # All columns of fewer than k groups, and k ties.
    capacity = min(n, k + (k - 1) * triton.cdiv(n, _COLUMNS.value))
    candidates = pre_acts.new_empty(rows, capacity, dtype=torch.int32)
    n_candidates = pre_acts.new_empty(rows, dtype=torch.int32)
    indices = pre_acts.new_empty(rows, k, dtype=torch.int64)
    with torch.cuda.device_of(pre_acts):
        _find_candidates[(rows,)](pre_acts, candidates, n_candidates, n, k, capacity, num_warps=_WARPS)
        _keep_largest[(rows,)](pre_acts, candidates, n_candidates, indices, n, k, capacity)
    return indices


# Selection of everything above a bound.


@triton.jit
def _load_segment(pre_acts, bound, n, PER_LATENT: tl.constexpr):
    """Columns and values of this program's segment of a row, and which are above the bound."""
    segment = tl.program_id(0)
    per_row = tl.cdiv(n, _COLUMNS)
    column = segment % per_row * _COLUMNS + tl.arange(0, _COLUMNS)
    values = pre_acts + (segment // per_row).to(tl.int64) * n
    values = tl.load(values + column, mask=column < n, other=0.0).to(tl.float32)
    if PER_LATENT:
        bound = tl.load(bound + column, mask=column < n, other=0.0)
    return column, values, (column < n) & (values > bound)


@triton.jit
def _count_above(pre_acts, bound, counts, n, PER_LATENT: tl.constexpr):
    _, _, above = _load_segment(pre_acts, bound, n, PER_LATENT)
    tl.store(counts + tl.program_id(0), tl.sum(above.to(tl.int32), 0))


@triton.jit
def _write_above(pre_acts, bound, offsets, latent_ids, out, n, PER_LATENT: tl.constexpr):
    column, values, above = _load_segment(pre_acts, bound, n, PER_LATENT)
    start = tl.load(offsets + tl.program_id(0))
    place = tl.cumsum(above.to(tl.int32), 0) - 1
    tl.store(latent_ids + start + place, column.to(tl.int64), mask=above)
    tl.store(out + start + place, values, mask=above)


def select_above(pre_acts: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of ``pre_acts`` that exceed ``bound``, compared in float32. NaN exceeds nothing.

    Waits once for the device, to learn how much memory the entries need.

    Args:
        pre_acts: [rows, n] float32 or bfloat16.
        bound: a number, or [n] float32.

    Returns:
        counts [rows] int64; and in row-major order latent_ids [n_active] int64 and values [n_active] float32.

    Raises:
        ValueError: if a tensor has another dtype or shape, or is not contiguous.
    """
    _check("pre_acts", pre_acts, 2, _FLOATS)
    rows, n = pre_acts.shape
    per_latent = isinstance(bound, Tensor)
    if per_latent:
        _check("bound", bound, 1, (torch.float32,))
        _check_same("len(bound)", len(bound), "pre_acts.shape[1]", n)
    else:
        bound = float(bound)
    # A program a segment of a row, to fill the device however few rows there are.
    segments = triton.cdiv(n, _COLUMNS.value)
    shape = {"PER_LATENT": per_latent, "num_warps": _WARPS}
    counts = pre_acts.new_empty(rows, segments, dtype=torch.int32)
    with torch.cuda.device_of(pre_acts):
        _count_above[(rows * segments,)](pre_acts, bound, counts, n, **shape)
        offsets = F.pad(counts.view(-1).cumsum(0), (1, 0))
        n_active = int(offsets[-1])
        latent_ids = pre_acts.new_empty(n_active, dtype=torch.int64)
        values = pre_acts.new_empty(n_active, dtype=torch.float32)
        _write_above[(rows * segments,)](pre_acts, bound, offsets, latent_ids, values, n, **shape)
    return counts.sum(1), latent_ids, values
