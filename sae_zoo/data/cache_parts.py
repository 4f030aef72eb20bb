"""A cache that several machines harvested in parts, read as one; see "Parts" in CACHE_FORMAT.md.

Nothing is copied or written: the parts stay what they are, caches of their own, in one folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_zoo.data.cache import MANIFEST, Cache, StoredActivations, open_cache
from sae_zoo.data.folders import Folder, LocalFolder
from sae_zoo.data.norms import Norms
from sae_zoo.data.shards import ShardStream, StoredTensor, inverse
from sae_zoo.records import digest

# What all parts share beside their identity, as the rows of one are read like those of any other.
_SHARED = ("d_in", "dtype", "rows_per_shard", "special_ids")


@dataclass(frozen=True)
class Blend:
    """An equal share of the rows of every part, which a stream reads as it does a shard.

    Shards of one part after those of another would be blocks of other documents, and cost an SAE dearly: numbers are in
    CACHE_FORMAT.md. A share of every part has rows of all documents, as a shard of a cache that one machine made.

    Attributes:
        windows: of shards, in order.
    """

    windows: tuple[StoredTensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Sequence[StoredTensor]], number: int, of: int) -> Blend:
        """Blend ``number`` of ``of``, of parts that consist of shards each."""
        windows = []
        for shards in parts:
            ends = np.cumsum([shard.shape[0] for shard in shards])
            start, stop = (int(ends[-1]) * i // of for i in (number, number + 1))
            for shard, end in zip(shards, ends.tolist(), strict=True):
                first = end - shard.shape[0]
                if max(start, first) < min(stop, end):
                    windows.append(shard.window(max(start, first) - first, min(stop, end) - first))
        return cls(tuple(windows))

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(window.shape[0] for window in self.windows), *self.windows[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype | None:
        return self.windows[0].dtype

    def read_permuted(self, out: Tensor, order: np.ndarray) -> None:
        """See :meth:`sae_zoo.data.shards.StoredTensor.read_permuted`."""
        places = np.split(inverse(order), np.cumsum([window.shape[0] for window in self.windows])[:-1])
        for window, place in zip(self.windows, places, strict=True):
            window.read_to(out, place)


class _BlendStream(ShardStream):
    """A stream over blends, one after the other from a seeded one on, as neighbours are in the same files: what was
    fetched of a part is used up before it may have to go.
    """

    def _order(self, pass_: int) -> np.ndarray:
        n = len(self._shards)
        return (np.arange(n) + int(super()._order(pass_)[0])) % n


class MergedCache(StoredActivations):
    """All parts of a cache as one: train is theirs one after the other, the held-out splits are those of the first.

    Attributes:
        parts: in order of their numbers.
        manifest: of the first part, with what is of all of them in its place; ``identity`` is that of the whole.
    """

    def __init__(self, parts: Sequence[Cache]):
        super().__init__(_manifest(parts))
        self.parts = parts

    def files(self) -> list[dict[str, Any]]:
        return [{**entry, "file": f"{part.folder.name}/{entry['file']}"}
                for part in self.parts for entry in part.files()]

    def n_rows(self, split: str) -> int:
        return sum(part.n_rows(split) for part in self._parts(split))

    def tokens(self, split: str) -> Tensor:
        return torch.cat([part.tokens(split) for part in self._parts(split)])

    def shards(self, split: str, name: str) -> list[StoredTensor]:
        """The tensor ``name`` of every shard, as stored; ``sequences`` count from 0 in every part."""
        return [shard for part in self._parts(split) for shard in part.shards(split, name)]

    def stream(self, split: str, seed: int) -> ShardStream:
        """Over blends of the parts, of as many rows as a shard; see :class:`Blend`."""
        n_rows = [part.n_rows(split) for part in self._parts(split)]
        shards = [part.shards(split, "activations") for part in self._parts(split)]
        n = min(math.ceil(sum(n_rows) / self.manifest["rows_per_shard"]), max(n_rows))  # so that none is empty
        return _BlendStream([Blend.of(shards, i, n) for i in range(n)], seed)

    def verify_hashes(self) -> None:
        for part in self.parts:
            part.verify_hashes()

    def _parts(self, split: str) -> Sequence[Cache]:
        """The parts that hold rows of ``split``."""
        return self.parts if split == "train" else self.parts[:1]

    def _read(self, split: str, name: str, start: int, stop: int) -> Tensor:
        self._check_range(split, start, stop)
        parts = self._parts(split)
        found = [parts[0]._read(split, name, 0, 0)]
        first_row = first_sequence = 0
        for part in parts:
            end = first_row + part.n_rows(split)
            if max(start, first_row) < min(stop, end):  # no file is opened, or fetched, for nothing
                rows = part._read(split, name, max(start, first_row) - first_row, min(stop, end) - first_row)
                found.append(rows + first_sequence if name == "sequences" else rows)
            first_row, first_sequence = end, first_sequence + part.manifest["splits"][split]["tokens"]["rows"]
        return torch.cat(found)


def open_cache_or_parts(place: Path | str | Folder) -> StoredActivations:
    """The finished cache in a folder or, where it has no manifest but folders directly in it do, these as one.

    Raises:
        ValueError: in one line, if there is no cache, a part is missing, damaged, or of another cache than the others,
            or one cannot be reached.
    """
    folder: Folder = LocalFolder(Path(place)) if isinstance(place, (Path, str)) else place
    inside = []
    if folder.read(MANIFEST) is None:
        inside = [part for part in folder.folders()
                  if not part.name.startswith(".") and part.read(MANIFEST) is not None]
    if not inside:
        return open_cache(folder)
    return MergedCache(_in_order(folder, [open_cache(part) for part in inside]))


def _in_order(folder: Folder, found: Sequence[Cache]) -> list[Cache]:
    """``found`` by number.

    Raises:
        ValueError: in one line, unless they are all parts of one cache, each of them once.
    """
    for cache in found:
        if "part" not in cache.manifest["identity"]:
            raise ValueError(f"{folder} has no {MANIFEST}, and {cache.cache_id} in it is no part of a cache but a "
                             "whole one; give the folder of one cache, or one that holds all parts of one")
    first = _shared(found[0])
    for cache in found[1:]:
        shared = _shared(cache)
        differing = [key for key in {**first, **shared} if first.get(key) != shared.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(f"{folder} holds parts of more than one cache: {key} is {first.get(key)} of "
                             f"{found[0].cache_id}, {shared.get(key)} of {cache.cache_id}; keep the parts of each in a "
                             "folder of their own")
    of = first["parts"]
    by_number: dict[int, Cache] = {}
    for cache in found:
        number, _ = cache.manifest["identity"]["part"]
        if number in by_number:
            raise ValueError(f"{folder} holds part {number} of {of} twice, as {by_number[number].cache_id} and "
                             f"{cache.cache_id}; take one out")
        by_number[number] = cache
    missing = [str(number) for number in range(of) if number not in by_number]
    if missing:
        raise ValueError(f"{folder} lacks part {', '.join(missing)} of {of} (the first is 0); copy what is missing "
                         "there, or harvest it first")
    return [by_number[number] for number in range(of)]


def _shared(part: Cache) -> dict[str, Any]:
    """Facts that are the same in all parts of a cache."""
    identity = {**part.manifest["identity"]}
    _, of = identity.pop("part")
    return {**identity, "parts": of, **{key: part.manifest[key] for key in _SHARED}}


def _manifest(parts: Sequence[Cache]) -> dict[str, Any]:
    first, trains = parts[0].manifest, [part.manifest["splits"]["train"] for part in parts]
    train = {key: sum(train[key] for train in trains) for key in ("n_rows", "n_documents", "n_special_tokens")}
    norms = sum((part.norms for part in parts), Norms())
    name, _, _ = first["cache_id"].rpartition("-")
    return {**{key: value for key, value in first.items() if key != "digest"},
            "cache_id": f"{name}-merged{len(parts)}-{digest([part.cache_id for part in parts])}",
            "identity": {key: value for key, value in first["identity"].items() if key != "part"},
            "mean_squared_norm": norms.mean_square(), "norms": {"histogram": norms.to_json()},
            "splits": {**first["splits"], "train": train}}
