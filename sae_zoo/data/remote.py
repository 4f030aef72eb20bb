"""A finished cache that lies elsewhere, on any file system that fsspec knows: ``s3://``, ``gs://``, ``hf://``, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import fsspec

from sae_zoo.data.copies import Copies
from sae_zoo.data.folders import Found
from sae_zoo.data.shards import stored_tensors

_RANGE_BYTES, _RANGES_AT_ONCE = 1 << 23, 8  # of a file that is fetched: that much of it is in memory
_HEADER_BYTES = 1 << 20  # of a safetensors header at most; ours have some hundred


def is_url(place: str) -> bool:
    """Whether ``place`` is for fsspec, and not a path on this machine."""
    return "://" in place


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into one line; each has errors of its own, which share no base class."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what} needs a package that is not installed here: {_line(error)}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{what} is missing; copy the cache there again") from error
    except Exception as error:
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {_line(error)}); look at the address, the "
                         "network and the credentials") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class RemoteFile:
    """A file of a :class:`RemoteFolder`; :meth:`open` fetches it whole unless a copy is here."""

    folder: RemoteFolder
    entry: Mapping[str, Any]

    def open(self) -> BufferedReader:
        return self.folder.copies.open(str(self), self.entry["sha256"], self.entry["bytes"], self._pieces)

    def _pieces(self) -> Iterator[bytes]:
        group = _RANGE_BYTES * _RANGES_AT_ONCE
        for start in range(0, self.entry["bytes"], group):
            starts = range(start, min(start + group, self.entry["bytes"]), _RANGE_BYTES)
            with _reaching(str(self)):
                pieces = self.folder.ranges([self.entry["file"]] * len(starts), starts,
                                            [min(s + _RANGE_BYTES, self.entry["bytes"]) for s in starts])
            yield from pieces

    def __str__(self) -> str:
        return f"{self.folder}/{self.entry['file']}"


class RemoteFolder:
    """A :class:`~sae_zoo.data.folders.Folder` that is no folder of this machine.

    Sizes come from one listing, headers from ranged reads; a shard is fetched whole when it is needed, which is ahead
    of time where a stream reads it, and its size and SHA-256 are then compared with the manifest.

    Args:
        url: as fsspec takes it; its last part is the cache's name.
        copies: keeps what was fetched.

    Raises:
        ValueError: in one line, if the address cannot be used, or needs a package that is not installed.
    """

    remedy = "copy it there again"

    def __init__(self, url: str, copies: Copies):
        self.path, self.copies = url.rstrip("/"), copies
        self.name = self.path.rsplit("/", 1)[-1]
        with _reaching(self.path):
            self._fs, self._root = fsspec.url_to_fs(self.path)

    def __str__(self) -> str:
        return self.path

    def ranges(self, names: Sequence[str], starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Bytes ``starts[i]`` to ``stops[i]`` of the file ``names[i]``, fetched at the same time where that can be."""
        paths = [f"{self._root}/{name}" for name in names]
        return self._fs.cat_ranges(paths, list(starts), list(stops), on_error="raise")

    def read(self, name: str) -> bytes | None:
        with _reaching(self.path):
            try:
                return self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def folders(self) -> list[RemoteFolder]:
        with _reaching(self.path):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        names = sorted(info["name"].rstrip("/").rsplit("/", 1)[-1] for info in found if info["type"] == "directory")
        return [RemoteFolder(f"{self.path}/{name}", self.copies) for name in names]

    def look(self, entries: Sequence[Mapping[str, Any]]) -> Iterator[Found | None]:
        with _reaching(self.path):
            self._fs.invalidate_cache()
            sizes = {path.removeprefix(self._root).lstrip("/"): info["size"]
                     for path, info in self._fs.find(self._root, detail=True).items()}
            names = [entry["file"] for entry in entries if sizes.get(entry["file"]) == entry["bytes"] >= 8]
            lengths = self.ranges(names, [0] * len(names), [8] * len(names))
            ends = [min(8 + int.from_bytes(length, "little"), 8 + _HEADER_BYTES, sizes[name])
                    for name, length in zip(names, lengths, strict=True)]
            headers = dict(zip(names, self.ranges(names, [8] * len(names), ends), strict=True))
        for entry in entries:
            n_bytes = sizes.get(entry["file"])
            yield None if n_bytes is None else Found(n_bytes, self._tensors(entry, headers.get(entry["file"])))

    def file(self, entry: Mapping[str, Any]) -> RemoteFile:
        return RemoteFile(self, entry)

    def _tensors(self, entry: Mapping[str, Any], header: bytes | None):
        try:
            return stored_tensors(self.file(entry), header or b"")
        except ValueError:
            return None
