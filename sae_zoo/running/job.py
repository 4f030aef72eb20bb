"""One job, from a config to a record, in this process or in one for each device."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sae_zoo.command_line import one_line
from sae_zoo.files import locked, write_text
from sae_zoo.records import FAILED, FINISHED, read_record, versions, write_record
from sae_zoo.running.checks import Config, value_at
from sae_zoo.running.devices import (
    RankFailed,
    in_this_process,
    is_helper,
    place_of_process,
    run_in_processes,
    use_own_device,
)
from sae_zoo.running.fitting import fit
from sae_zoo.running.scoring import evaluate_sae, l0_missed, notes_on
from sae_zoo.running.settings import TrainSettings, config_hash
from sae_zoo.running.sources import open_source
from sae_zoo.running.turns import current
from sae_zoo.saes.io import save_sae

log = logging.getLogger(__name__)

_CONFIG, _CHECKPOINTS = "config.yaml", "checkpoints"


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config of the run in ``run_dir``.

    Raises:
        ValueError: if there is none that can be read.
    """
    path = run_dir / _CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not the config of a run: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the config of a run: a mapping is expected")
    return config


def _identity(config: Config) -> dict[str, Any]:
    """The part of a record that says what a run is, before anything was measured."""
    at = partial(value_at, config)
    sae, recipe, with_lm = at("sae"), at("recipe"), at("data.name") != "file"
    n_steps, batch_size = at("recipe.n_steps"), at("recipe.batch_size")
    return {
        "status": FAILED, "error": "interrupted", "variant": at("sae.variant"), "label": at("sae.name"),
        "l0_target": at("l0_target"), "sparsity_coefficient": sae.get("sparsity_coefficient"), "seed": at("seed"),
        "lm": at("lm.name") if with_lm else None, "hook": f"{at('hook.site')}.{at('hook.layer')}" if with_lm else None,
        "d_sae": at("d_sae"), "n_steps": n_steps, "batch_size": batch_size,
        "n_tokens": n_steps * batch_size if isinstance(n_steps, int) and isinstance(batch_size, int) else None,
        "config_hash": config_hash(config), "versions": versions(),
        **{f"sae.{key}": value for key, value in sae.items()
           if key not in ("name", "variant", "display", "sparsity_coefficient")},
        **{f"recipe.{key}": value for key, value in recipe.items()},
    }


def _finished(run_dir: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a finished run of the config of ``record`` in ``run_dir``; None if there is none.

    Raises:
        ValueError: if what is there is of another config.
    """
    old, checkpoints = read_record(run_dir), run_dir / _CHECKPOINTS
    found = config_hash(read_config(run_dir)) if (run_dir / _CONFIG).exists() else record["config_hash"]
    finished = old is not None and old["status"] == FINISHED
    if found != record["config_hash"] and (finished or checkpoints.exists()):
        raise ValueError(f"{run_dir} holds a {'finished' if finished else 'half-trained'} run of another config (hash "
                         f"{found}, this one has {record['config_hash']}); choose another sweep=..., or delete that "
                         "folder")
    if not finished:
        return None
    log.info("%s is finished; skipped", run_dir)
    shutil.rmtree(checkpoints, ignore_errors=True)  # left by a process that died just after its record
    return old


def run_on_devices(config: Config, run_dir: Path, *, logging_config: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`run_job`, here or in a process for each device of ``trainer.devices``; returns its record.

    Args:
        logging_config: for ``logging.config.dictConfig`` in the first of several processes.

    Raises:
        ValueError, OSError, RankFailed: as the job says; the record then says ``failed``.
    """
    record = _identity(config)
    if (old := _finished(run_dir, record)) is not None:
        return old
    try:
        settings = TrainSettings.of(config)
        n, num_nodes = settings.trainer.n_processes, settings.trainer.num_nodes
        here = in_this_process(n)
        if not here and num_nodes != 1:
            raise ValueError(f"trainer.num_nodes is {num_nodes}; start the command on every machine with torchrun or "
                             "SLURM, or leave it at 1")
    except ValueError as error:
        write_record(run_dir, record | _failure(error))
        raise
    if here:
        return run_job(settings, run_dir)
    try:
        run_in_processes("train", {"config": config, "run_dir": str(run_dir)}, n, logging_config=logging_config)
    except (ValueError, OSError, RankFailed) as error:  # of which the first of the processes may have said more
        write_record(run_dir, {**record, **(read_record(run_dir) or {}), "status": FAILED, "error": one_line(error)})
        raise
    written = read_record(run_dir)
    assert written is not None  # by the first of the processes
    return written


def _failure(error: Exception) -> dict[str, str]:
    """The part of a record that tells the error that is being handled."""
    return {"error": one_line(error), "traceback": traceback.format_exc()}


def run_job(settings: TrainSettings, run_dir: Path) -> dict[str, Any]:
    """Train, evaluate, write the record; returns it. Of two processes that are given the same job, one waits.

    Raises:
        ValueError: if the folder holds a finished or half-trained run of another config, or for whatever is wrong with
            the data; the record then says ``failed``.
    """
    leader = not is_helper()  # of several devices, one process evaluates and writes
    with locked(run_dir / ".lock", f"training {run_dir}") if leader else nullcontext():
        record = _identity(settings.config)
        if (old := _finished(run_dir, record)) is not None:  # by now
            return old
        if leader:
            write_text(run_dir / _CONFIG, yaml.safe_dump(dict(settings.config), sort_keys=False, allow_unicode=True))
        place = current()
        started = place.clock()
        at_once = not any((run_dir / _CHECKPOINTS).glob("*"))
        try:
            _run(settings, run_dir, record, leader=leader, at_once=at_once)
            if not leader:
                return record
            record |= {"status": FINISHED, "error": None,
                       "seconds": round(place.clock() - started, 1) if at_once else None}
        except Exception as error:
            record |= {**_failure(error), "seconds": round(place.clock() - started, 1)}
            raise
        finally:
            if leader:
                write_record(run_dir, record)
        shutil.rmtree(run_dir / _CHECKPOINTS, ignore_errors=True)  # the finished SAE stands beside the record
        return record


def _run(settings: TrainSettings, run_dir: Path, record: dict[str, Any], *, leader: bool, at_once: bool) -> None:
    """Adds to ``record`` what is known as it becomes known; ``at_once`` says that no checkpoint was there."""
    trainer, place = settings.trainer, current()
    use_own_device(trainer.local_devices)
    process = place_of_process() if trainer.n_processes > 1 else (0, 1)
    source = place.open(lambda: open_source(settings.source, trainer.device, process=process,
                                            progress_bar=trainer.progress_bar))
    activations = source.activations
    record |= {"data_id": activations.data_id, "cache_id": source.cache_id, "d_in": activations.d_in}
    if not leader:
        source = replace(source, lm=None)  # which the evaluation alone needs, and the leader alone evaluates
    fit_started = place.clock()
    with source.aside():
        sae, calibration = fit(settings, source, run_dir)
    if not leader:
        return
    # Of a run that was interrupted the seconds of its last process alone are known, which would mislead.
    record["seconds_training"] = round(place.clock() - fit_started, 1) if at_once else None
    record |= evaluate_sae(settings, sae, source, run_dir)
    norms, bound = activations.norms, activations.norm_bound
    record |= {"coefficient": sae.coefficient if sae.has_coefficient else None, "shifted": float(sae.shifted),
               "input_scale": float(sae.input_scale), "median_norm": norms.median, "norm_bound": bound,
               "left_out_of_training": norms.above(bound) / norms.n_rows}
    if calibration is not None:
        record |= {f"calibration.{key}": value for key, value in asdict(calibration).items()}
    record["l0_missed"] = l0_missed(settings, record["l0"])
    notes = notes_on(sae, calibration, record)
    for note in notes:
        log.warning("%s: %s", run_dir.name, note)
    record["notes"] = "; ".join(notes) or None
    about = ("lm", "hook", "cache_id", "l0_target", "l0", "fvu", "seed", "config_hash")
    save_sae(sae, run_dir, about={key: record[key] for key in about})
