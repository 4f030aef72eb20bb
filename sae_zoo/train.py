"""``python -m sae_zoo.train``: train and evaluate one SAE; with ``-m`` a sweep, which ends with its frontier.

A job has a folder of its own, ``outputs/runs/<sweep>/<job>/``, that depends on its config alone. Giving the same command
again skips what is finished, and goes on with what is not from its last checkpoint.
"""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.strategies import DDPStrategy

from sae_zoo.checkpoints import CheckpointFiles, Checkpoints, newest_checkpoint
from sae_zoo.config import build_sae, check_settings, config_hash, device_of, one_line, run_entry_point
from sae_zoo.curves import Curves
from sae_zoo.data.module import START_ROWS
from sae_zoo.data.norms import TOLD_ABOVE
from sae_zoo.evaluation.suite import HeldOutRows, score_attribution, score_in_lm, score_sae, within
from sae_zoo.files import locked, replacing, write_text
from sae_zoo.memory import give_back_freed_memory
from sae_zoo.one_stream import current
from sae_zoo.processes import RankFailed, devices_of, in_this_process, place_of_process, run_in_processes, use_own_device
from sae_zoo.records import FAILED, FINISHED, read_record, versions, write_record
from sae_zoo.saes import SAE
from sae_zoo.saes.io import save_sae
from sae_zoo.saes.lightning import Calibration
from sae_zoo.source import Source, open_source

log = logging.getLogger(__name__)

# A run whose held-out L0 is further from its target than this share of it says so.
L0_TOLERANCE = 0.05
# So does one whose calibration raised thresholds by more than this share of their mean excess.
CALIBRATION_TOLERANCE = 0.02


class _ProgressBar(TQDMProgressBar):
    """Lightning's bar, without its epochs and without a second bar for the short looks at held-out rows."""

    def on_train_epoch_start(self, trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def init_validation_tqdm(self):
        return Tqdm(disable=True)  # from the start: a bar writes a line as soon as it is made

    def get_metrics(self, *args) -> dict:
        return {key: value for key, value in super().get_metrics(*args).items() if key != "v_num"}


def _loggers(cfg: DictConfig, run_dir: Path, curves: Curves) -> list:
    loggers: list = [curves]
    if cfg.logger.name == "wandb":
        from pytorch_lightning.loggers import WandbLogger  # only where it was asked for

        loggers.append(WandbLogger(project=cfg.logger.project, name=run_dir.name, group=run_dir.parent.name,
                                   save_dir=run_dir, config=OmegaConf.to_container(cfg, resolve=True),
                                   reinit="create_new"))  # a run for each job of a sweep
    elif cfg.logger.name != "csv":
        raise ValueError(f"logger.name is {cfg.logger.name!r}; choose csv or wandb")
    return loggers


def fit(cfg: DictConfig, source: Source, run_dir: Path, *,
        callbacks: Sequence[pl.Callback] = ()) -> tuple[SAE, Calibration | None]:
    """Train the SAE of ``cfg`` on ``source``, from the last checkpoint in ``run_dir`` if there is one; what its
    calibration did is known to the first of several processes alone.
    """
    activations, place = source.activations, current()
    sae = build_sae(cfg, d_in=activations.d_in, input_scale=activations.mean_squared_norm**0.5)
    if (bound := activations.norms.bound(TOLD_ABOVE)) < activations.norm_bound and activations.norms.above(bound):
        sae.likely_cause = (f"rows of up to {activations.norms.quantile(1.0) / activations.norms.median:.0f} times the "
                            f"median norm: try data.max_norm={TOLD_ABOVE:g}, or half of recipe.lr and the other rates")
    data = place.data(activations, batch_size=sae.recipe.batch_size, n_steps=sae.recipe.n_steps, seed=cfg.seed)
    trainer_cfg = cfg.trainer
    curves = Curves(run_dir / "metrics.csv")
    checkpoints = Checkpoints(run_dir / "checkpoints", every=trainer_cfg.checkpoint_every, curves=curves,
                              interrupts=place.interrupts)
    checkpoint = newest_checkpoint(checkpoints.folder)
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    else:
        n_rows = min(START_ROWS, activations.n_rows("train"))
        sae.initialise(activations.kept_rows("train", 0, n_rows))
        give_back_freed_memory()
    # Of variants that draw random numbers in training. None here does, but what a checkpoint says of them should not
    # depend on what the process did before.
    torch.manual_seed(cfg.seed)
    callbacks = [*callbacks, checkpoints]
    progress_bar = trainer_cfg.progress_bar and place.leads  # SAEs on one stream all stand at the same step
    if progress_bar:
        callbacks.append(_ProgressBar(refresh_rate=20))
    trainer = pl.Trainer(
        max_steps=sae.recipe.n_steps, accelerator=trainer_cfg.accelerator, devices=trainer_cfg.devices,
        num_nodes=trainer_cfg.num_nodes, precision=trainer_cfg.precision,
        gradient_clip_val=trainer_cfg.gradient_clip_val,
        # Buffers are counters of what all devices saw, so the same everywhere, and need not be sent.
        strategy="auto" if _n_processes(cfg) == 1 else DDPStrategy(broadcast_buffers=False),
        logger=_loggers(cfg, run_dir, curves), log_every_n_steps=trainer_cfg.log_every_n_steps,
        val_check_interval=min(trainer_cfg.validation_every, sae.recipe.n_steps), num_sanity_val_steps=0,
        default_root_dir=run_dir, callbacks=callbacks, enable_progress_bar=progress_bar,
        enable_model_summary=False, use_distributed_sampler=False, plugins=[CheckpointFiles()],
    )
    try:
        checkpoints.fit(trainer, sae, data, checkpoint)
    finally:
        if cfg.logger.name == "wandb":
            trainer.loggers[-1].experiment.finish()
    sae.eval().requires_grad_(False).to(device_of(trainer_cfg.accelerator))
    return sae, sae.calibrate(data.validation_rows()) if trainer.is_global_zero else None


def _notes(sae: SAE, calibration: Calibration | None, record: dict[str, Any]) -> list[str]:
    """What somebody who reads the result must know, in words."""
    # One that was said while it trained may be over: ReLU and JumpReLU recover from some.
    notes = [f"{note}; at the end {record['dead_fraction']:.1%} of the latents are silent, FVU is {record['fvu']:.3f}"
             for note in sae.notes]
    if calibration is not None and abs(calibration.shift) > CALIBRATION_TOLERANCE:
        notes.append(f"calibration moved thresholds by {calibration.shift:+.1%} of their mean excess (L0 "
                     f"{calibration.l0_before:.1f} to {calibration.l0_after:.1f}, FVU {calibration.fvu_before:.4f} to "
                     f"{calibration.fvu_after:.4f} on validation rows)")
    if record["l0_missed"]:
        notes.append(f"L0 target missed: {record['l0']:.1f} measured on held-out tokens, {record['l0_target']:g} asked for")
    if record["fvu"] >= 1:
        notes.append(f"FVU is {record['fvu']:.3f}: the mean of the activations alone would leave 1")
    return notes


def evaluate_sae(cfg: DictConfig, sae: SAE, source: Source, run_dir: Path) -> dict[str, Any]:
    """Held-out metrics of ``sae``; writes ``latents.csv``. LM metrics are None where there is no language model."""
    device = device_of(cfg.trainer.accelerator)
    sae.to(device)
    show = cfg.trainer.progress_bar
    rows = HeldOutRows(source.activations, "test", cfg.evaluation.n_rows, device=device, progress_bar=show)
    metrics, counts = score_sae(sae, rows)
    metrics |= rows.left_out()
    with replacing(run_dir / "latents.csv") as temporary:
        counts.write_csv(temporary)
    lm_keys = ("ce_clean", "ce_spliced", "ce_ablated", "delta_lm_loss", "loss_recovered", "kl", "n_lm_targets", "r_l0")
    if source.lm is None:
        return {**metrics, **dict.fromkeys(lm_keys)}
    cache = source.activations
    where = (source.lm, source.hook, cache.tokens("test"), cache.manifest["special_ids"])
    how = {"n_tokens": cfg.evaluation.n_lm_tokens, "batch_size": cfg.lm.batch_size, "progress_bar": show}
    bound = cache.norm_bound
    # A language model that is spread over devices has the hook point on any of them.
    in_lm = {**score_in_lm(within(lambda x: sae.reconstruct(x.to(device)), bound), *where, **how),
             "r_l0": score_attribution(sae, *where, norm_bound=bound, **how)}
    return {**metrics, **{key: in_lm[key] for key in lm_keys}}


def _identity(cfg: DictConfig) -> dict[str, Any]:
    """What a record says of a run before anything was measured."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    with_lm = cfg.data.name != "file"
    return {
        "status": FAILED, "error": "interrupted", "variant": cfg.sae.variant, "label": cfg.sae.name, "l0_target": cfg.l0_target,
        "sparsity_coefficient": cfg.sae.get("sparsity_coefficient"), "seed": cfg.seed,
        "lm": cfg.lm.name if with_lm else None, "hook": f"{cfg.hook.site}.{cfg.hook.layer}" if with_lm else None,
        "d_sae": cfg.d_sae, "n_steps": cfg.recipe.n_steps, "batch_size": cfg.recipe.batch_size,
        "n_tokens": cfg.recipe.n_steps * cfg.recipe.batch_size, "config_hash": config_hash(resolved),
        "versions": versions(),
        **{f"sae.{key}": value for key, value in resolved["sae"].items()
           if key not in ("name", "variant", "sparsity_coefficient")},
        **{f"recipe.{key}": value for key, value in resolved["recipe"].items()},
    }


def run_job(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """One job from config to record; returns the record. Of two processes that are given the same job, one waits.

    Raises:
        ValueError: if the folder holds a finished or half-trained run of another config, or for whatever is wrong with
            the config or the data; the record then says ``failed``.
    """
    leader = not _is_helper()  # of several devices, one process evaluates and writes
    with locked(run_dir / ".lock", f"training {run_dir}") if leader else nullcontext():
        return _run_job(cfg, run_dir, leader)


def _n_processes(cfg: DictConfig) -> int:
    return len(devices_of(cfg.trainer.accelerator, cfg.trainer.devices)) * cfg.trainer.num_nodes


def _is_helper() -> bool:
    """Whether this is one of several processes of a job, and not the first."""
    return place_of_process()[0] > 0


def _finished(run_dir: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished run of the config of ``record`` in ``run_dir``; None if there is none.

    Raises:
        ValueError: if what is there is of another config.
    """
    old, config_file, checkpoints = read_record(run_dir), run_dir / "config.yaml", run_dir / "checkpoints"
    found = config_hash(OmegaConf.load(config_file)) if config_file.exists() else record["config_hash"]
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


def _run_job(cfg: DictConfig, run_dir: Path, leader: bool) -> dict[str, Any]:
    record = _identity(cfg)
    if (old := _finished(run_dir, record)) is not None:
        return old
    checkpoints = run_dir / "checkpoints"
    if leader:
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    place = current()
    started, at_once = place.clock(), not any(checkpoints.glob("*"))
    try:
        check_settings(cfg)
        use_own_device(devices_of(cfg.trainer.accelerator, cfg.trainer.devices))
        build_sae(cfg, d_in=1, input_scale=1.0)  # a mistake in the config is said before the harvest, not after it
        device, show = device_of(cfg.trainer.accelerator), cfg.trainer.progress_bar
        process = place_of_process() if _n_processes(cfg) > 1 else (0, 1)
        source = place.open(lambda: open_source(cfg, device, process=process, progress_bar=show))
        record |= {"data_id": source.activations.data_id, "cache_id": source.cache_id, "d_in": source.activations.d_in}
        if not leader:
            source = replace(source, lm=None)  # which the evaluation alone needs, and the leader alone evaluates
        fit_started = place.clock()
        with source.aside():
            sae, calibration = fit(cfg, source, run_dir)
        if not leader:
            return record
        # Of a run that was interrupted the seconds of its last process alone are known, which would mislead.
        record["seconds_training"] = round(place.clock() - fit_started, 1) if at_once else None
        metrics = evaluate_sae(cfg, sae, source, run_dir)
        record |= metrics
        norms = source.activations.norms
        record |= {"coefficient": sae.coefficient if sae.has_coefficient else None, "shifted": float(sae.shifted),
                   "input_scale": float(sae.input_scale), "median_norm": norms.median, "norm_bound": source.activations.norm_bound,
                   "left_out_of_training": norms.above(source.activations.norm_bound) / norms.n_rows}
        if calibration is not None:
            record |= {f"calibration.{key}": value for key, value in asdict(calibration).items()}
        missed = None
        if cfg.l0_target is not None and record["sparsity_coefficient"] is None:
            missed = abs(record["l0"] / cfg.l0_target - 1) > L0_TOLERANCE
        record["l0_missed"] = missed
        for note in (notes := _notes(sae, calibration, record)):
            log.warning("%s: %s", run_dir.name, note)
        record["notes"] = "; ".join(notes) or None
        keys = ("lm", "hook", "cache_id", "l0_target", "l0", "fvu", "seed", "config_hash")
        save_sae(sae, run_dir, about={key: record[key] for key in keys})
        record |= {"status": FINISHED, "error": None,
                   "seconds": round(place.clock() - started, 1) if at_once else None}
    except Exception as error:
        record |= {"error": one_line(error), "traceback": traceback.format_exc(),
                   "seconds": round(place.clock() - started, 1)}
        raise
    finally:
        if leader:
            write_record(run_dir, record)
    shutil.rmtree(checkpoints, ignore_errors=True)  # the finished SAE stands beside the record
    return record


# The folders of the jobs of this sweep, in order; its frontier is drawn from them when it ends.
_swept: list[Path] = []


def _run(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """:func:`run_job`, here or in a process for each device; returns its record."""
    record = _identity(cfg)
    if (old := _finished(run_dir, record)) is not None:
        return old
    try:
        check_settings(cfg)
        n = _n_processes(cfg)
        if not in_this_process(n):
            if cfg.trainer.num_nodes != 1:
                raise ValueError(f"trainer.num_nodes is {cfg.trainer.num_nodes}; start the command on every machine with "
                                 "torchrun or SLURM, or leave it at 1")
            arguments = {"config": OmegaConf.to_container(cfg, resolve=True), "run_dir": str(run_dir)}
            run_in_processes("train", arguments, n,
                             logging_config=OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))
            return read_record(run_dir)
    except (ValueError, OSError, RankFailed) as error:
        write_record(run_dir, {**record, **(read_record(run_dir) or {}), "status": FAILED, "error": one_line(error)})
        raise
    return run_job(cfg, run_dir)


def _task(cfg: DictConfig) -> None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.RUN:
        record = _run(cfg, run_dir)
        if not _is_helper():
            _report(record, run_dir)
        return
    _swept.append(run_dir)
    try:
        _run(cfg, run_dir)
    except Exception as error:
        log.error("job failed: %s", one_line(error))  # now; Hydra speaks of it only when the sweep has ended
        raise
    except KeyboardInterrupt:
        _swept.clear()  # no frontier of a sweep that was broken off
        raise


def _report(record: dict[str, Any], run_dir: Path) -> None:
    shown = ("l0_target", "l0", "fvu", "delta_lm_loss", "loss_recovered", "relative_reconstruction_bias",
             "dead_fraction", "seconds")
    for key in shown:
        if record.get(key) is not None:
            log.info("%-28s %.4g", key, record[key])
    log.info("written to %s", run_dir)


def _report_sweep() -> bool:
    """Table and plot of every run in each of the folders that this sweep wrote to (one for each hook point, say); whether
    all of them came out.
    """
    from sae_zoo.frontier.plot import draw_frontier  # matplotlib and pandas, needed only here

    drawn = True
    for folder in sorted({run_dir.parent for run_dir in _swept}):
        try:
            result = draw_frontier(folder)
        except Exception as error:  # whatever it is, the runs are finished and their records safe
            log.error("no frontier of %s: %s", folder, one_line(error))
            drawn = False
        else:
            print(f"\n{result.text}\n\n{result.png}")
    return drawn


def main() -> None:
    drawn = True
    try:
        run_entry_point(_task, "train")
    finally:
        if _swept and not _is_helper():
            drawn = _report_sweep()
    if not drawn:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
