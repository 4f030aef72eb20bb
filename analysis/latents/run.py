"""A finished run, opened to be looked into: its record, its SAE, and where its activations come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_zoo.records import FINISHED, RECORD, read_record
from sae_zoo.running.job import read_config
from sae_zoo.running.settings import SourceSettings, device_of
from sae_zoo.running.sources import Source, open_source
from sae_zoo.saes import SAE
from sae_zoo.saes.io import load_sae


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        record: what it measured, and its folder under ``run_dir``.
        sae: raw activations in, raw reconstruction out.
        source: where its activations come from.
    """

    record: dict[str, Any]
    sae: SAE
    source: Source


def _finished_record(directory: Path) -> dict[str, Any]:
    record = read_record(directory)
    if record is None:
        raise ValueError(f"{directory} holds no {RECORD}; give the folder of a finished run, e.g. "
                         "outputs/runs/<sweep>/<job>")
    if record["status"] != FINISHED:
        raise ValueError(f"the run in {directory} has not finished ({record['error']}); start it again, or "
                         "give another")
    return {**record, "run_dir": str(directory)}


def open_runs(directories: Sequence[Path | str], *, progress_bar: bool = False) -> list[Run]:
    """Runs on the same activations, which they share. As ``sae_zoo.evaluate``, this finds the cache by the config of
    the (first) run, and harvests it where it is missing.

    Args:
        directories: ``outputs/runs/<sweep>/<job>`` each.

    Raises:
        ValueError: if a folder holds no finished run, the runs are of different activations, or theirs are not to be
            had any more.
    """
    records = [_finished_record(Path(directory)) for directory in directories]
    first = records[0]
    for record in records[1:]:
        if record["data_id"] != first["data_id"]:
            raise ValueError(f"{first['run_dir']} is of the activations {first['data_id']}, {record['run_dir']} of "
                             f"{record['data_id']}; only runs on the same ones can stand side by side")
    device = device_of("auto")
    saes = [load_sae(record["run_dir"]).to(device) for record in records]
    config = read_config(Path(first["run_dir"]))
    try:
        settings = SourceSettings.of(config)
    except ValueError as error:
        raise ValueError(f"the config of {first['run_dir']} does not say where the activations are ({error}); use the "
                         "version of sae_zoo that wrote it") from None
    source = open_source(settings, device, progress_bar=progress_bar)
    if source.activations.data_id != first["data_id"]:
        raise ValueError(f"{first['run_dir']} was trained on {first['data_id']}, but its config gives "
                         f"{source.activations.data_id} here; the text or the language model has changed since")
    return [Run(record, sae, source) for record, sae in zip(records, saes, strict=True)]
