"""Rows of a shard in another order, as float32: the one thing that reading batches does with every number.

Not torch's ``index_select``: its threads wait for each other by spinning, and where they do not all have a core of
their own (a training step, a language model, another run beside this) 1 kB rows came 30 times slower than by one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor


@njit(nogil=True, cache=True)
def _copy(rows, order, out):
    for i in range(order.shape[0]):
        source, target = rows[order[i]], out[i]
        for j in range(source.shape[0]):
            target[j] = source[j]


@njit(nogil=True, cache=True)
def _widen(rows, order, out):
    for i in range(order.shape[0]):
        source, target = rows[order[i]], out[i]
        for j in range(source.shape[0]):
            target[j] = np.uint32(source[j]) << np.uint32(16)  # a bfloat16 is the upper half of a float32


_KERNELS = {torch.float32: (_copy, torch.int32, np.uint32), torch.bfloat16: (_widen, torch.int16, np.uint16)}


class Gather:
    """``out[i] = rows[order[i]]``, by as many threads as torch computes with."""

    def __init__(self):
        self._n_threads = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix="gather")

    def __call__(self, rows: Tensor, order: Tensor, out: Tensor) -> None:
        """Fill ``out``.

        Args:
            rows: [n, d] float32, bfloat16 or another floating type, which is slower.
            order: [m] int64, from 0 to n - 1.
            out: [m, d] float32.
        """
        if rows.dtype not in _KERNELS:
            out.copy_(rows.index_select(0, order))
            return
        kernel, as_integers, bits = _KERNELS[rows.dtype]
        source, target = rows.view(as_integers).numpy().view(bits), out.numpy().view(np.uint32)
        parts = zip(np.array_split(order.numpy(), self._n_threads), np.array_split(target, self._n_threads))
        list(self._threads.map(lambda part: kernel(source, *part), parts))
