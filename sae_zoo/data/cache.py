"""The activation cache: immutable, named by what decides its bytes, specified in CACHE_FORMAT.md. This is the reader.

One cache holds one hook point of one language model over one corpus, shuffled when it was written, so that reading is
sequential: a whole shard at a time, two in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_zoo.data.activations import Origin, TextActivations
from sae_zoo.data.folders import Folder, Found, LocalFolder
from sae_zoo.data.norms import Norms
from sae_zoo.data.shards import ShardStream, StoredTensor
from sae_zoo.files import locked
from sae_zoo.records import digest

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEYS = ("format_version", "cache_id", "identity", "d_in", "dtype", "rows_per_shard", "mean_squared_norm",
         "norms", "special_ids", "splits", "digest")


def make_cache_id(*, lm: str, hook: str, identity: Mapping[str, Any]) -> str:
    """The name of a cache: readable parts made safe for any file system, then the digest of ``identity``.

    Args:
        lm, hook: names for people.
        identity: everything that decides the cache's bytes, as plain JSON values.
    """
    readable = [re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[-60:] for name in (lm, hook)]
    return "-".join([*readable, digest(identity)])


def cache_lock(root: Path | str, cache_id: str, *, part: int = 0) -> AbstractContextManager[None]:
    """Hold the right to build ``cache_id`` below ``root``; waits while another process holds it.

    Look for the cache inside this block, before building it: who has waited finds it finished.

    Args:
        part: which of several writers asks.
    """
    name = f".{cache_id}.lock" if part == 0 else f".{cache_id}.part{part}.lock"
    return locked(Path(root) / name, f"building {cache_id}")


class StoredActivations(TextActivations):
    """Activations of every split in files: of one finished cache, or of all its parts.

    Attributes:
        manifest: facts, see CACHE_FORMAT.md.
    """

    def __init__(self, manifest: dict[str, Any]):
        self.manifest = manifest
        self.cache_id = self.data_id = manifest["cache_id"]
        self.d_in = manifest["d_in"]
        self.special_ids = manifest["special_ids"]
        self.norms = Norms.from_json(manifest["norms"]["histogram"])

    @property
    def n_bytes(self) -> int:
        """Bytes on disk, without the manifest."""
        return sum(entry["bytes"] for entry in self.files())

    def rows(self, split: str, start: int, stop: int) -> Tensor:
        return self._read(split, "activations", start, stop).float()

    def origin(self, split: str, start: int, stop: int) -> Origin:
        return Origin(*(self._read(split, name, start, stop) for name in Origin._fields))

    @abstractmethod
    def files(self) -> list[dict[str, Any]]:
        """Every file but the manifest: ``file`` (relative), ``rows``, ``bytes``, ``sha256``."""

    @abstractmethod
    def shards(self, split: str, name: str) -> list[StoredTensor]:
        """The tensor ``name`` of every shard, as stored."""

    @abstractmethod
    def verify_hashes(self) -> None:
        """Compare the SHA-256 of every file with the manifest; reads everything.

        Raises:
            ValueError: at the first file whose content has changed.
        """

    @abstractmethod
    def _read(self, split: str, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the tensor ``name``, across shards."""


class Cache(StoredActivations):
    """A finished cache; made by :func:`open_cache`.

    Attributes:
        folder: where it lies.
        stored: the tensors of each of its files, by the names of file and tensor.
    """

    def __init__(self, folder: Folder, manifest: dict[str, Any], stored: Mapping[str, Mapping[str, StoredTensor]]):
        super().__init__(manifest)
        self.folder, self.stored = folder, stored

    @property
    def path(self) -> Path | str:
        """Its folder on a disk of this machine, or its URL."""
        return self.folder.path

    def files(self) -> list[dict[str, Any]]:
        return [entry for split in self.manifest["splits"].values() for entry in (split["tokens"], *split["shards"])]

    def n_rows(self, split: str) -> int:
        return self._split(split)["n_rows"]

    def tokens(self, split: str) -> Tensor:
        stored = self.stored[self._split(split)["tokens"]["file"]]["tokens"]
        table = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read_into(table)
        return table

    def stream(self, split: str, seed: int) -> ShardStream:
        return ShardStream(self.shards(split, "activations"), seed)

    def verify_hashes(self) -> None:
        for entry in self.files():
            with self.folder.file(entry).open() as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise _damaged(self.folder, f"the SHA-256 of {entry['file']} is not the manifest's")

    def shards(self, split: str, name: str) -> list[StoredTensor]:
        return [self.stored[shard["file"]][name] for shard in self._split(split)["shards"]]

    def _split(self, split: str) -> dict[str, Any]:
        splits = self.manifest["splits"]
        if split not in splits:
            raise ValueError(f"split {split!r} is not in {self.cache_id}; it has {', '.join(splits)}")
        return splits[split]

    def _read(self, split: str, name: str, start: int, stop: int) -> Tensor:
        self._check_range(split, start, stop)
        shards, size = self.shards(split, name), self.manifest["rows_per_shard"]
        out = torch.empty(stop - start, *shards[0].shape[1:], dtype=shards[0].dtype)
        for i in range(start // size, math.ceil(stop / size)):
            first, last = max(start, i * size), min(stop, (i + 1) * size)
            shards[i].read_into(out[first - start : last - start], first - i * size)
        return out


def open_cache(place: Path | str | Folder, *, verify: str = "sizes") -> Cache:
    """Open a finished cache and check that its manifest and its files agree.

    Args:
        place: its folder; see :class:`~sae_zoo.data.remote.RemoteFolder` for one that is not on this machine.
        verify: ``"sizes"`` looks at the size and the header of every file; ``"hashes"`` then also reads all of them.

    Raises:
        ValueError: in one line, if there is no cache, it is damaged, or cannot be reached.
    """
    if verify not in ("sizes", "hashes"):
        raise ValueError(f"verify is {verify!r}; it must be 'sizes' or 'hashes'")
    folder: Folder = LocalFolder(Path(place)) if isinstance(place, (Path, str)) else place
    manifest = _read_manifest(folder)
    expected = _expected(manifest)
    stored = {}
    for (entry, tensors), found in zip(expected, folder.look([entry for entry, _ in expected]), strict=True):
        stored[entry["file"]] = _check_file(folder, entry, found, tensors)
    cache = Cache(folder, manifest, stored)
    if verify == "hashes":
        cache.verify_hashes()
    return cache


def _expected(manifest: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, tuple[torch.dtype, tuple[int, ...]]]]]:
    """Every file entry of a manifest, with type and shape of the tensors in it."""
    files: list[tuple[dict[str, Any], dict[str, tuple[torch.dtype, tuple[int, ...]]]]] = []
    for split in manifest["splits"].values():
        table = split["tokens"]
        files.append((table, {"tokens": (torch.int32, (table["rows"], table["context_size"]))}))
        for shard in split["shards"]:
            n = shard["rows"]
            files.append((shard, {"activations": (DTYPES[manifest["dtype"]], (n, manifest["d_in"])),
                                  **{name: (torch.int32, (n,)) for name in Origin._fields}}))
    return files


def _damaged(folder: Folder, what: str) -> ValueError:
    return ValueError(f"cache {folder} is damaged: {what}; {folder.remedy}")


def _read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of the cache in ``folder``, whole and consistent in itself."""
    text = folder.read(MANIFEST)
    if text is None:
        raise ValueError(f"{folder} is not a cache: it has no {MANIFEST}; harvest it first")
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(folder, f"{MANIFEST} is not a JSON object with a format_version") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"cache {folder} has format version {version}, this program reads {FORMAT_VERSION}; use the "
                         f"version of sae_zoo that wrote it, or {folder.remedy}")
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise _damaged(folder, f"{MANIFEST} lacks {missing[0]}")
    if manifest["digest"] != manifest_digest(manifest):  # from here on its content is the writer's
        raise _damaged(folder, f"{MANIFEST} was changed after it was written")
    if manifest["cache_id"] != folder.name:
        raise ValueError(f"cache {folder} calls itself {manifest['cache_id']}; give the folder that name, or delete it")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of everything in a manifest but the digest itself."""
    return digest({key: value for key, value in manifest.items() if key != "digest"})


def _check_file(folder: Folder, entry: dict[str, Any], found: Found | None,
                tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    """What was found of a file; raises ValueError unless it has the size that the manifest says, and exactly these
    tensors.
    """
    name = entry["file"]
    if found is None:
        raise _damaged(folder, f"{name} is missing")
    if found.n_bytes != entry["bytes"]:
        raise _damaged(folder, f"{name} has {found.n_bytes} bytes, the manifest says {entry['bytes']}")
    in_it = found.tensors or {}
    if {tensor: (stored.dtype, stored.shape) for tensor, stored in in_it.items()} != tensors:
        raise _damaged(folder, f"{name} does not hold the tensors that the manifest says; it belongs to another cache")
    return in_it
