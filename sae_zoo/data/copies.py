"""Copies of files that lie elsewhere, in a folder of bounded size on a disk of this machine."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from sae_zoo.files import locked, replacing

_LOCK, _UNFINISHED = ".lock", ".tmp"  # the latter is how :func:`~sae_zoo.files.replacing` names what it writes


class Copies:
    """Keeps fetched files between passes and between runs, by their content; the one used longest ago goes first.

    Several processes may use one folder at once: they fetch one after the other, so that no file is fetched twice and
    the bound is one for all of them. Reading what is there waits for nobody. A file that is in use when it goes can be
    read to its end, on systems that let open files be deleted.

    Args:
        folder: made where it is missing.
        max_bytes: of all copies together, the one being fetched included.
    """

    def __init__(self, folder: Path | str, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._right: set[str] = set()  # by their hash, as this process has seen

    def open(self, name: str, sha256: str, n_bytes: int, fetch: Callable[[], Iterable[bytes]]) -> BufferedReader:
        """The file of this content, from its first byte on.

        Args:
            name: for messages.
            sha256, n_bytes: of the whole file; the former in lower-case hex.
            fetch: gives its content, piece by piece; called only where there is no good copy.

        Raises:
            ValueError: if the file is larger than ``max_bytes``, or what was fetched is not of this content.
            OSError: if the copy cannot be written.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes the name of a file
            raise ValueError(f"{name} has {sha256!r} for its SHA-256; it must be 64 digits of lower-case hex")
        if n_bytes > self.max_bytes:
            raise ValueError(f"{name} has {n_bytes / 1e9:.3g} GB, but copies may take {self.max_bytes / 1e9:.3g} GB in "
                             "all; allow more")
        if file := self._kept(sha256, n_bytes):
            return file
        with locked(self.folder / _LOCK, f"fetching into {self.folder}"):
            if file := self._kept(sha256, n_bytes):  # another process has fetched it meanwhile
                return file
            path = self.folder / sha256
            path.unlink(missing_ok=True)  # damaged, if it is there
            self._make_room(n_bytes)
            with replacing(path) as temporary:
                found, written = hashlib.sha256(), 0
                with open(temporary, "wb") as made:
                    for piece in fetch():
                        found.update(piece)
                        written += made.write(piece)
                if (written, found.hexdigest()) != (n_bytes, sha256):
                    raise ValueError(f"{name} came with other bytes than the manifest says ({written} of them, "
                                     f"{n_bytes} expected); copy the cache there again")
            self._right.add(sha256)
            return open(path, "rb")

    def _kept(self, sha256: str, n_bytes: int) -> BufferedReader | None:
        """The copy that is there, unless it is damaged; marks it as used."""
        path = self.folder / sha256
        try:
            file = open(path, "rb")  # noqa: SIM115  given to the caller open
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == n_bytes:
            if sha256 not in self._right and hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                self._right.add(sha256)
            if sha256 in self._right:
                file.seek(0)
                with suppress(FileNotFoundError):  # another process has made room for something else
                    os.utime(path)
                return file
        file.close()
        return None

    def _make_room(self, n_bytes: int) -> None:
        """Delete copies until ``n_bytes`` more are within the bound; hold the lock meanwhile."""
        kept = []
        for path in self.folder.iterdir():
            if path.name.endswith(_UNFINISHED):  # of a process that died, since this one has the lock
                path.unlink()
            elif path.name != _LOCK:
                kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + n_bytes <= self.max_bytes:
                break
            path.unlink()
            total -= size
