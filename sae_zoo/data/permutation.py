"""A seeded pseudo-random permutation that is computed element by element, so that shuffling needs no table.

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

_N_ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 values in place and return them: the finaliser of splitmix64 (Steele et al. 2014)."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
        self._sizes = np.uint64(n_left), np.uint64(-(-n // n_left))
        text = "/".join(str(int(part)) for part in seed)
        self._keys = [np.uint64(int.from_bytes(hashlib.sha256(f"{text}/{i}".encode()).digest()[:8], "little"))
                      for i in range(_N_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each of ``indices`` (integers in ``[0, n)``, any shape) goes: int64 of the same shape.

        Raises:
            ValueError: if an index is outside ``[0, n)``.
        """
        indices = np.asarray(indices)
        if indices.size and not (0 <= indices.min() and indices.max() < self.n):
            raise ValueError(f"indices {indices.min()} to {indices.max()} were given; they must be in [0, {self.n})")
        flat = self._network(indices.astype(np.uint64).ravel())
        outside = np.flatnonzero(flat >= self.n)
        while outside.size:
            flat[outside] = self._network(flat[outside])
            outside = outside[flat[outside] >= self.n]
        return flat.astype(np.int64).reshape(indices.shape)

    def _network(self, x: np.ndarray) -> np.ndarray:
        """One pass through the network: a bijection on ``[0, n_left * n_right)``."""
        n_right = self._sizes[1]
        halves = [x // n_right, x % n_right]
        for i, key in enumerate(self._keys):
            changed, size = halves[i % 2], self._sizes[i % 2]
            shift = _mix(halves[1 - i % 2] + key)
            shift >>= np.uint64(32)  # 32 random bits times size, divided by 2^32: uniform in [0, size), no slow modulo
            shift *= size
            shift >>= np.uint64(32)
            changed += shift
            np.subtract(changed, size, out=changed, where=changed >= size)
        return halves[0] * n_right + halves[1]
