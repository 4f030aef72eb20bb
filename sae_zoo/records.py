"""One run = one ``record.json`` = one row: everything that analysis ever reads.

A record is a flat JSON object of plain values, written once, when a run ends in success or failure. A metric that was
not measured (LM metrics without a language model, say) is null, never zero.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_zoo.files import write_text

RECORD = "record.json"
FINISHED, FAILED = "finished", "failed"
_VERSIONS_OF = ("sae_zoo", "torch", "pytorch-lightning", "transformers", "hydra-core", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def digest(value: Any) -> str:
    """A short hex digest of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one, also after a power cut."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Write ``record`` into ``run_dir``; numbers that are not finite become null."""
    plain = {key: None if isinstance(value, float) and not abs(value) < float("inf") else value
             for key, value in record.items()}
    write_json(run_dir / RECORD, plain)


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The record of a run, or None where there is none yet.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    path = Path(run_dir) / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a record: {error}; delete it to run this job again") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a record: a JSON object is expected; delete it to run this job again")
    return record


def read_records(directories: Iterable[Path | str]) -> list[dict[str, Any]]:
    """Records of all runs in and below ``directories``, in order of path; each has its folder under ``run_dir``.

    Raises:
        ValueError: if a directory does not exist or holds no record.
    """
    records = []
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a folder; give a run or a sweep, e.g. outputs/runs/<sweep>")
        found = sorted(directory.rglob(RECORD))
        if not found:
            raise ValueError(f"{directory} holds no {RECORD}; has a run in it ended?")
        for path in found:
            record = read_record(path.parent)
            assert record is not None  # it was found a moment ago
            records.append({**record, "run_dir": str(path.parent)})
    return records
