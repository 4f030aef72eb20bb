"""The folder that a cache lies in, on a disk of this machine or (see remote.py) elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sae_zoo.data.shards import LocalFile, StoredFile, StoredTensor, stored_tensors


class Found(NamedTuple):
    """Result of a look at a file: its size, and its tensors by name; None if it is not a safetensors file."""

    n_bytes: int
    tensors: dict[str, StoredTensor] | None


class Folder(Protocol):
    """A cache's folder; ``str()`` of it names it for people.

    Attributes:
        path: of the folder, or its URL.
        name: the last part of it.
        remedy: what to do about damage, for messages.
    """

    @property
    def path(self) -> Path | str: ...

    @property
    def name(self) -> str: ...

    @property
    def remedy(self) -> str: ...

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""

    def folders(self) -> Sequence[Folder]:
        """The folders directly in it, by name; none if it is not there itself."""

    def look(self, entries: Sequence[Mapping[str, Any]]) -> Iterator[Found | None]:
        """A look at the file of each of some file entries of a manifest, in order; None where there is no such file."""

    def file(self, entry: Mapping[str, Any]) -> StoredFile:
        """The file of a file entry."""


class LocalFolder:
    """A :class:`Folder` on a disk of this machine."""

    remedy = "delete the folder to harvest it again"

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().name

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def folders(self) -> list[LocalFolder]:
        return [LocalFolder(path) for path in sorted(self.path.glob("*")) if path.is_dir()]

    def look(self, entries: Sequence[Mapping[str, Any]]) -> Iterator[Found | None]:
        return map(self._look, entries)

    def file(self, entry: Mapping[str, Any]) -> LocalFile:
        return LocalFile(self.path / entry["file"])

    def _look(self, entry: Mapping[str, Any]) -> Found | None:
        file = self.file(entry)
        if not file.path.is_file():
            return None
        with file.open() as stream:
            n_bytes, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if 8 + length <= n_bytes else b""
        try:
            return Found(n_bytes, stored_tensors(file, header))
        except ValueError:
            return Found(n_bytes, None)
