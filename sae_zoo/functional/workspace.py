"""Large CPU buffers that are used again as soon as the last tensor on them is gone.

A training step needs the same few large buffers every time. From the C library they come either with fresh pages, which
cost more than the arithmetic on them, or out of a heap that small objects have broken into pieces, which grows. Whether
a buffer is free is known by Python's own count of references to it, so a gradient that somebody keeps is never
overwritten.
"""

from __future__ import annotations

import sys
from math import prod
from threading import Lock

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 20  # bytes; below, the C library does well
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector registers
# Buffers come in so many sizes from a power of two to the next, so that an active set, which has as many entries as it
# happens to have, finds the buffers of the one before.
_SIZES_AN_OCTAVE = 16
# A buffer may be so many times what is asked for. At 2 the decoder's error takes the chunk of pre-activations that is
# done with, and a weight's gradient takes the error's.
_LOOSEST = 2.1
# A buffer that lay free while so many others were taken belongs to work that has ended; a step takes about a dozen.
_PATIENCE = 200
# References to a free buffer while `_is_free` looks at it: those of its `_Buffer` and of getrefcount.
_FREE = 2


class _Buffer:
    def __init__(self, n_bytes: int):
        self.memory, self.last_taken = np.empty(n_bytes, dtype=np.uint8), 0

    @property
    def is_free(self) -> bool:
        return sys.getrefcount(self.memory) == _FREE


_buffers: list[_Buffer] = []
_lock = Lock()
_n_taken = 0


def _take(n_bytes: int) -> np.ndarray:
    global _n_taken
    with _lock:
        _n_taken += 1
        _buffers[:] = [b for b in _buffers if _n_taken - b.last_taken < _PATIENCE or not b.is_free]
        fitting = [b for b in _buffers if n_bytes <= b.memory.nbytes <= _LOOSEST * n_bytes and b.is_free]
        found = min(fitting, key=lambda b: b.memory.nbytes, default=None)
        if found is None:
            found = _Buffer(n_bytes)
            _buffers.append(found)
        found.last_taken = _n_taken
        return found.memory


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of ``shape`` on the device of ``like``, of ``dtype`` or that of ``like``."""
    dtype = dtype or like.dtype
    n_bytes = prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or n_bytes < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device=like.device)
    unit = (1 << n_bytes.bit_length()) // _SIZES_AN_OCTAVE
    buffer = _take(-(-n_bytes // unit) * unit + _ALIGNMENT)
    start = -buffer.ctypes.data % _ALIGNMENT
    return torch.from_numpy(buffer[start : start + n_bytes]).view(dtype).view(shape)
