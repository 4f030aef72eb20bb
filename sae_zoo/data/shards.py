"""Shards: safetensors files of a fixed number of rows, and the endless shuffled stream over them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sae_zoo.data.gather import Gather
from sae_zoo.data.permutation import Permutation

# safetensors' names of the types that are stored, https://huggingface.co/docs/safetensors
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}


class StoredFile(Protocol):
    """A file of a cache, wherever it lies; ``str()`` of it names it for people."""

    def open(self) -> BinaryIO:
        """All of it, from its first byte on, as a file on a disk of this machine.

        Raises:
            ValueError: in one line, if it cannot be had.
        """


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk of this machine."""

    path: Path

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def __str__(self) -> str:
        return str(self.path)


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file: ``offset`` in bytes from the file's start; dtype None if not ours."""

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
            file.seek(self.offset + first * math.prod(self.shape[1:]) * out.element_size())
            if file.readinto(target) != target.nbytes:
                raise ValueError(f"{self.file} ends too early; delete the cache's folder to harvest it again")


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


class ShardStream:
    """An endless stream over shards: every pass takes the shards, and the rows inside each, in a new seeded order.

    A shard is read whole (and fetched, where it lies elsewhere) while the one before it is in use, into one of two
    buffers that are kept.

    Args:
        shards: the rows of each, none longer than the first.
    """

    def __init__(self, shards: Sequence[StoredTensor], seed: int):
        self._shards = shards
        self._n_rows = np.array([shard.shape[0] for shard in self._shards])
        self._seed = seed
        shape, dtype = self._shards[0].shape, self._shards[0].dtype
        self._buffers = [torch.empty(shape, dtype=dtype) for _ in range(2)]
        self._gather = Gather()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._loading: dict[int, Future] = {}
        self._pass: int | None = None

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of the stream, float32 [count, d_in]."""
        out = torch.empty(count, self._shards[0].shape[1])
        done = 0
        while done < count:
            pass_, offset = divmod(first + done, int(self._n_rows.sum()))
            if pass_ != self._pass:
                self._pass, self._ends = pass_, np.cumsum(self._n_rows[self._order(pass_)])
            place = int(np.searchsorted(self._ends, offset, side="right"))
            rows, order = self._shard(pass_ * len(self._shards) + place)
            at = offset - (int(self._ends[place]) - len(order))
            taken = order[at : at + count - done]
            self._gather(rows, taken, out[done : done + len(taken)])
            done += len(taken)
        return out

    def _order(self, pass_: int) -> np.ndarray:
        """The shards in the order of a pass."""
        return Permutation(len(self._shards), self._seed, pass_)(np.arange(len(self._shards)))

    def _shard(self, place: int) -> tuple[Tensor, Tensor]:
        """Rows and their order of the shard at ``place`` of the endless sequence of shards; starts to read the next."""
        # `place` uses buffer place % 2 and its successor the other one, which held a shard that is used up by now. The
        # one reading thread works in order, so what it still reads for an abandoned place is overwritten, not mixed in.
        ahead = {p: loading for p, loading in self._loading.items() if p in (place, place + 1)}
        for p in (place, place + 1):
            if p not in ahead:
                ahead[p] = self._reader.submit(self._load, p)
        self._loading = ahead
        return ahead[place].result()

    def _load(self, place: int) -> tuple[Tensor, Tensor]:
        pass_, i = divmod(place, len(self._shards))
        which = int(self._order(pass_)[i])
        rows = self._buffers[place % 2][: self._n_rows[which]]
        self._shards[which].read_into(rows)
        order = Permutation(len(rows), self._seed, pass_, which)(np.arange(len(rows)))
        return rows, torch.from_numpy(order)
