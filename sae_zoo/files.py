"""Files that are either the old one or the whole new one, whatever happens meanwhile, and locks that die with their
holder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

log = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file by writing the one whose name this yields; it becomes ``path`` when the block ends without an error.

    Flushed to disk before it is renamed, and its folder after: a power cut leaves the old file or the new one.

    Raises:
        OSError: if it cannot be written (naming ``path`` and the reason); nothing but the old file is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors speaks of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text by :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold the lock file ``path``; waits, and says that ``work`` is what another process is at, while it is held there.

    The operating system takes the lock from a process that dies. Look inside the block whether the work is done
    already: who has waited finds it finished.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is %s; waiting for it", work)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
