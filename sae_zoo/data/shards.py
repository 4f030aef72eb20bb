"""Shards: safetensors files of a fixed number of rows, and the endless shuffled stream over them."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_zoo.data.permutation import Permutation

# safetensors' names of the types that are stored, https://huggingface.co/docs/safetensors
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file: ``offset`` in bytes from the file's start; dtype None if not ours."""

    path: Path
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
        with open(self.path, "rb") as file:
            file.seek(self.offset + first * math.prod(self.shape[1:]) * out.element_size())
            if file.readinto(target) != target.nbytes:
                raise ValueError(f"{self.path} ends too early; delete the cache's folder to harvest it again")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: if the file is not one.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, size = 8 + length, os.fstat(file.fileno()).st_size
        try:
            header = json.loads(file.read(length)) if start <= size else None
            header.pop("__metadata__", None)
            return {name: StoredTensor(path, _TORCH_DTYPES.get(entry["dtype"]), tuple(entry["shape"]),
                                       start + entry["data_offsets"][0]) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from None


class ShardStream:
    """An endless stream over shards: every pass takes the shards, and the rows inside each, in a new seeded order.

    A shard is read whole while the one before it is in use, into one of two buffers that are kept.

    Args:
        paths: the shards, none longer than the first.
    """

    def __init__(self, paths: list[Path], seed: int):
        self._shards = [read_header(path)["activations"] for path in paths]
        self._n_rows = np.array([shard.shape[0] for shard in self._shards])
        self._seed = seed
        shape, dtype = self._shards[0].shape, self._shards[0].dtype
        self._buffers = [torch.empty(shape, dtype=dtype) for _ in range(2)]
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
            target = out[done : done + len(taken)]
            if rows.dtype == out.dtype:
                torch.index_select(rows, 0, taken, out=target)
            else:
                target.copy_(rows.index_select(0, taken))
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
