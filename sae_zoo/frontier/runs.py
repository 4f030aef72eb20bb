"""Runs that may share a frontier, from their records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sae_zoo.records import FINISHED, read_records

Record = dict[str, Any]

# Runs are compared on one plot only if they agree on all of these.
COMPARABLE = ("lm", "hook", "data_id", "d_in", "d_sae", "n_tokens")


def run_name(record: Record) -> str:
    """A run's name for people: the last two parts of its folder, ``<sweep>/<job>``."""
    return "/".join(Path(record["run_dir"]).parts[-2:])


def some(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_comparable(finished: Iterable[Record], keys: Iterable[str] = COMPARABLE) -> None:
    """Refuse runs that must not share a plot.

    Raises:
        ValueError: if they differ in one of ``keys``; it names the keys, the values and the runs.
    """
    finished = list(finished)
    differences = []
    for key in keys:
        runs_of: dict[Any, list[str]] = {}
        for record in finished:
            runs_of.setdefault(record.get(key), []).append(run_name(record))
        if len(runs_of) > 1:
            values = " against ".join(f"{value} ({some(names)})" for value, names in runs_of.items())
            differences.append(f"{key} differs: {values}")
    if differences:
        raise ValueError("these runs cannot share a frontier; draw them separately: " + "; ".join(differences))


def read_runs(directories: Iterable[Path | str]) -> tuple[list[Record], list[Record], list[str]]:
    """All runs in and below ``directories``, those that have finished, and a line for each that has not.

    A folder given twice, or with one inside the other, does not count its runs twice.

    Raises:
        ValueError: if a folder does not exist or holds no record, or no run has finished.
    """
    directories = list(directories)
    records = list({Path(record["run_dir"]).resolve(): record for record in read_records(directories)}.values())
    finished = [record for record in records if record.get("status") == FINISHED]
    failed = [f"{run_name(record)}: {' '.join(str(record.get('error')).split())}"
              for record in records if record.get("status") != FINISHED]
    if not finished:
        raise ValueError(f"no run has finished in {some([str(d) for d in directories])}; {len(failed)} failed, "
                         f"the first with {failed[0]}")
    return records, finished, failed
