"""Shards: safetensors files of a fixed number of rows, and the endless shuffled stream over them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sae_zoo.data.permutation import Permutation

# safetensors' names of the types that are stored, https://huggingface.co/docs/safetensors
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
_PIECE_BYTES = 1 << 20  # of a shard that is put into its order at a time
_SHARED_BYTES = 1 << 24  # of that many and more two threads put half each


class StoredFile(Protocol):
    """A file of a cache, wherever it lies; ``str()`` of it names it for people."""

    def open(self) -> BufferedReader:
        """All of it, from its first byte on, as a file on a disk of this machine.

        Raises:
            ValueError: in one line, if it cannot be had.
        """


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk of this machine."""

    path: Path

    def open(self) -> BufferedReader:
        return open(self.path, "rb")

    def __str__(self) -> str:
        return str(self.path)


class StoredTensor(NamedTuple):
    """Place of a tensor in a safetensors file: ``offset`` in bytes from the file's start; dtype None if not ours."""

    file: StoredFile
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int

    def read_into(self, out: Tensor, first: int = 0) -> None:
        """Fill ``out`` (contiguous, same dtype) with the rows from ``first`` on, reading nothing else.

        Raises:
            ValueError: if the file ends before.
        """
        # Not a memory map: a plain read is sequential, goes into memory that is already there, and frees the GIL.
        target = out.view(torch.uint8).reshape(-1).numpy()
        with self.file.open() as file:
            file.seek(self.offset + first * self._row_bytes)
            if file.readinto(target) != target.nbytes:  # type: ignore[arg-type]  # by numpy a Buffer from 3.12 on
                raise self._too_short()

    def window(self, start: int, stop: int) -> StoredTensor:
        """Rows ``start`` to ``stop`` of it."""
        return self._replace(shape=(stop - start, *self.shape[1:]), offset=self.offset + start * self._row_bytes)

    def read_permuted(self, out: Tensor, order: np.ndarray) -> None:
        """Fill ``out`` (contiguous, same dtype and shape) so that row i of it is row ``order[i]`` of the tensor.

        Raises:
            ValueError: if the file ends before.
        """
        self.read_to(out, inverse(order))

    def read_to(self, out: Tensor, place: np.ndarray) -> None:
        """Put row i of the tensor where row ``place[i]`` of ``out`` (contiguous, same dtype) is.

        Raises:
            ValueError: if the file ends before.
        """
        n = len(place)
        if n * self._row_bytes < _SHARED_BYTES:
            return self._put(out, place)
        # Memory is what limits this, and one thread does not use all that memory can do: alone it puts rows into their
        # places at half the speed of a plain read, two reach 0.9 of it.
        with ThreadPoolExecutor(1, thread_name_prefix="half a shard") as pool:
            other = pool.submit(self.window(n // 2, n)._put, out, place[n // 2 :])
            self.window(0, n // 2)._put(out, place[: n // 2])
            other.result()

    def _put(self, out: Tensor, place: np.ndarray) -> None:
        """:meth:`read_to` in this thread."""
        n = len(place)
        target = out.view(torch.uint8).view(len(out), self._row_bytes).numpy()
        # Through a piece that stays in the processor's cache: the disk is read in order, and every row goes once to
        # memory, where it belongs. Reading the whole shard first would pass all of it through memory twice.
        rows = max(1, _PIECE_BYTES // self._row_bytes)
        piece = np.empty((min(n, rows), self._row_bytes), np.uint8)
        with self.file.open() as file:
            file.seek(self.offset)
            for first in range(0, n, rows):
                part = piece[: n - first]
                if file.readinto(part.reshape(-1)) != part.nbytes:  # type: ignore[arg-type]  # as in read_into
                    raise self._too_short()
                target[place[first : first + len(part)]] = part

    @property
    def _row_bytes(self) -> int:
        assert self.dtype is not None  # what is read has the type that a manifest says
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _too_short(self) -> ValueError:
        return ValueError(f"{self.file} ends too early; delete the cache's folder to harvest it again")


def inverse(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes ``order``."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return place


def stored_tensors(file: StoredFile, header: bytes) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Args:
        header: the JSON that follows the first 8 bytes of the file, which are its length.

    Raises:
        ValueError: if it is not such a header.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {name: StoredTensor(file, _TORCH_DTYPES.get(entry["dtype"]), tuple(entry["shape"]),
                                   8 + len(header) + entry["data_offsets"][0]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{file} is not a safetensors file: its header cannot be read") from None


class ShardRows(Protocol):
    """The rows of a shard, or what a stream reads like them; members are those of :class:`StoredTensor`."""

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_permuted(self, out: Tensor, order: np.ndarray) -> None: ...


class ShardStream:
    """An endless stream over shards: every pass takes the shards, and the rows inside each, in a new seeded order.

    A shard is read whole (and fetched, where it lies elsewhere) while the one before it is in use. What is read of it
    are views of its memory, which is used again when the last of them is gone: two shards and what readers hold on to.

    Args:
        shards: the rows of each, alike but for their number; or what is read like them.
    """

    def __init__(self, shards: Sequence[ShardRows], seed: int):
        self._shards = shards
        self._n_rows = np.array([shard.shape[0] for shard in self._shards])
        self._seed = seed
        self._memory: list[_Memory] = []
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._loading: dict[int, Future] = {}
        self._pass: int | None = None

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of the stream as stored, [count, d_in]."""
        parts = []
        while count:
            pass_, offset = divmod(first, int(self._n_rows.sum()))
            if pass_ != self._pass:
                self._pass, self._ends = pass_, np.cumsum(self._n_rows[self._order(pass_)])
            place = int(np.searchsorted(self._ends, offset, side="right"))
            rows = self._shard(pass_ * len(self._shards) + place)
            at = offset - (int(self._ends[place]) - len(rows))
            parts.append(rows[at : at + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, pass_: int) -> np.ndarray:
        """The shards in the order of a pass."""
        return Permutation(len(self._shards), self._seed, pass_)(np.arange(len(self._shards)))

    def _shard(self, place: int) -> Tensor:
        """The rows, in their order, of the shard at ``place`` of the endless sequence of shards; starts to read the
        next.
        """
        ahead = {p: loading for p, loading in self._loading.items() if p in (place, place + 1)}
        for p in (place, place + 1):
            if p not in ahead:
                ahead[p] = self._reader.submit(self._load, p)
        self._loading = ahead
        return ahead[place].result()

    def _load(self, place: int) -> Tensor:
        pass_, i = divmod(place, len(self._shards))
        which = int(self._order(pass_)[i])
        shard, n = self._shards[which], int(self._n_rows[which])
        assert shard.dtype is not None  # as a manifest says
        rows = self._free().view(shard.dtype).view(-1, *shard.shape[1:])[:n]
        shard.read_permuted(rows, Permutation(n, self._seed, pass_, which)(np.arange(n)))
        return rows

    def _free(self) -> Tensor:
        """Memory for any shard that no tensor is on; the reading thread alone asks for it."""
        memory = next((memory for memory in self._memory if memory.is_free), None)
        if memory is None:
            largest, dtype = max(shard.shape for shard in self._shards), self._shards[0].dtype
            assert dtype is not None  # as a manifest says
            memory = _Memory(np.empty(math.prod(largest) * dtype.itemsize, np.uint8))
            self._memory.append(memory)
        return torch.from_numpy(memory.array)


class _Memory(NamedTuple):
    array: np.ndarray

    @property
    def is_free(self) -> bool:
        # Every tensor on it holds a reference to it. What is left: this tuple's, and that of getrefcount's argument.
        return sys.getrefcount(self.array) == 2
