"""A seeded pseudo-random permutation that is computed element by element, so that shuffling needs no table; and draws.

A table of 10^9 row numbers takes 8 GB; this takes eight keys. The construction is the generalised Feistel network of
Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002): an index is written as ``left * n_right + right``,
and in turn one half is shifted by a hash of the other, which can be undone and therefore is a bijection on
``n_left * n_right`` values. The few values that fall outside ``[0, n)`` are sent through again until they are inside
(cycle walking); with ``n_left = ceil(sqrt(n))`` fewer than ``n_left`` of them exist.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numba import njit

_N_ROUNDS = 8


@njit(nogil=True, cache=True)
def _mix(x):
    """Hash a uint64: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _shifted(half, other, key, size):
    """``half`` in [0, size), shifted by a hash of the other half."""
    # 32 random bits times size, divided by 2^32: uniform in [0, size), no slow modulo
    half += ((_mix(other + key) >> np.uint64(32)) * size) >> np.uint64(32)
    return half - size if half >= size else half


@njit(nogil=True, cache=True)
def _permute(values, n, n_left, n_right, keys):
    """Replace each of ``values`` [m] uint64 by where it goes."""
    for i in range(values.shape[0]):
        x = values[i]
        while True:
            left, right = x // n_right, x % n_right
            for r in range(0, keys.shape[0], 2):
                left = _shifted(left, right, keys[r], n_left)
                right = _shifted(right, left, keys[r + 1], n_right)
            x = left * n_right + right
            if x < n:
                break
        values[i] = x


@njit(nogil=True, cache=True)
def _draw(numbers, n, key):
    """Replace each of ``numbers`` [m] uint64 by a hash of it in [0, n)."""
    for i in range(numbers.shape[0]):
        numbers[i] = ((_mix(numbers[i] * np.uint64(0x9E3779B97F4A7C15) + key) >> np.uint64(32)) * n) >> np.uint64(32)


def _keys(seed: tuple[int, ...], n: int) -> np.ndarray:
    text = "/".join(str(int(part)) for part in seed)
    return np.array([int.from_bytes(hashlib.sha256(f"{text}/{i}".encode()).digest()[:8], "little") for i in range(n)],
                    np.uint64)


def draws(n: int, first: int, count: int, *seed: int) -> np.ndarray:
    """Draws number ``first`` to ``first + count`` (with replacement) from ``[0, n)``, int64; ``n`` below 2^32.

    The generator is splitmix64 (Steele et al. 2014), whose every number can be computed by itself.
    """
    numbers = np.arange(first, first + count, dtype=np.uint64)
    _draw(numbers, np.uint64(n), _keys(seed, 1)[0])
    return numbers.astype(np.int64)


class Permutation:
    """A bijection on ``[0, n)``, the same on every machine and in every version of every library.

    Args:
        n: size of the domain.
        seed: one or more integers; another seed is another permutation.

    Raises:
        ValueError: if ``n`` is below 1.
    """

    def __init__(self, n: int, *seed: int):
        if n < 1:
            raise ValueError(f"a permutation of {n} elements was asked for; it needs at least 1")
        self.n = n
        n_left = math.isqrt(n - 1) + 1
        self._sizes = np.uint64(n), np.uint64(n_left), np.uint64(-(-n // n_left))
        self._keys = _keys(seed, _N_ROUNDS)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The places that ``indices`` (integers in ``[0, n)``, any shape) go to: int64 of the same shape.

        Raises:
            ValueError: if an index is outside ``[0, n)``.
        """
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.n):
            raise ValueError(f"indices {indices.min()} to {indices.max()} were given; they must be in [0, {self.n})")
        flat = indices.astype(np.uint64).ravel()
        _permute(flat, *self._sizes, self._keys)
        return flat.astype(np.int64).reshape(indices.shape)
