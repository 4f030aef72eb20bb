"""Training one SAE on a source, under Lightning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.strategies import DDPStrategy

from sae_zoo.data.activations import Activations
from sae_zoo.data.module import START_ROWS
from sae_zoo.data.norms import TOLD_ABOVE
from sae_zoo.process import give_back_freed_memory
from sae_zoo.running.checkpoints import CheckpointFiles, Checkpoints, newest_checkpoint
from sae_zoo.running.curves import Curves
from sae_zoo.running.settings import TrainSettings
from sae_zoo.running.sources import Source
from sae_zoo.running.turns import current
from sae_zoo.saes import SAE
from sae_zoo.saes.lightning import Calibration

log = logging.getLogger(__name__)


class _ProgressBar(TQDMProgressBar):
    """Lightning's bar, without its epochs and without a second bar for the short looks at held-out rows."""

    def on_train_epoch_start(self, trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def init_validation_tqdm(self):
        return Tqdm(disable=True)  # from the start: a bar writes a line as soon as it is made

    def get_metrics(self, *args) -> dict:
        return {key: value for key, value in super().get_metrics(*args).items() if key != "v_num"}


def fit(settings: TrainSettings, source: Source, run_dir: Path, *,
        callbacks: Sequence[pl.Callback] = ()) -> tuple[SAE, Calibration | None]:
    """Train an SAE on ``source``, from the last checkpoint in ``run_dir`` if there is one; what its calibration did is
    known to the first of several processes alone.
    """
    activations, place, recipe = source.activations, current(), settings.recipe
    sae = settings.sae(d_in=activations.d_in, input_scale=activations.mean_squared_norm**0.5)
    if (cause := _long_rows(activations)) is not None:
        sae.likely_cause = cause
    data = place.data(activations, batch_size=recipe.batch_size, n_steps=recipe.n_steps, seed=settings.seed)
    curves = Curves(run_dir / "metrics.csv")
    checkpoints = Checkpoints(run_dir / "checkpoints", every=settings.trainer.checkpoint_every, curves=curves,
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
    torch.manual_seed(settings.seed)
    show = settings.trainer.progress_bar and place.leads  # SAEs on one stream all stand at the same step
    bar = [_ProgressBar(refresh_rate=20)] if show else []
    trainer = _trainer(settings, run_dir, curves, [*callbacks, checkpoints, *bar])
    try:
        checkpoints.fit(trainer, sae, data, checkpoint)
    finally:
        if settings.wandb_project is not None:
            trainer.loggers[-1].experiment.finish()  # type: ignore[attr-defined]  # it is wandb's
    sae.eval().requires_grad_(False).to(settings.trainer.device)
    return sae, sae.calibrate(data.validation_rows()) if trainer.is_global_zero else None


def _long_rows(activations: Activations) -> str | None:
    """The likely cause of a collapse, if there are rows that are long and not left out."""
    norms, bound = activations.norms, activations.norms.bound(TOLD_ABOVE)
    if bound >= activations.norm_bound or not norms.above(bound):
        return None
    return (f"rows of up to {norms.quantile(1.0) / norms.median:.0f} times the median norm: try "
            f"data.max_norm={TOLD_ABOVE:g}, or half of recipe.lr and the other rates")


def _trainer(settings: TrainSettings, run_dir: Path, curves: Curves, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    of_trainer, n_steps = settings.trainer, settings.recipe.n_steps
    return pl.Trainer(
        max_steps=n_steps, accelerator=of_trainer.accelerator, devices=of_trainer.devices,
        num_nodes=of_trainer.num_nodes, gradient_clip_val=of_trainer.gradient_clip_val,
        precision=of_trainer.precision,  # type: ignore[arg-type]  # Lightning refuses what it does not know
        # Buffers are counters of what all devices saw, so the same everywhere, and need not be sent.
        strategy="auto" if of_trainer.n_processes == 1 else DDPStrategy(broadcast_buffers=False),
        logger=_loggers(settings, run_dir, curves), log_every_n_steps=of_trainer.log_every_n_steps,
        val_check_interval=min(of_trainer.validation_every, n_steps), num_sanity_val_steps=0,
        default_root_dir=run_dir, callbacks=list(callbacks),
        enable_progress_bar=any(isinstance(callback, _ProgressBar) for callback in callbacks),
        enable_model_summary=False, use_distributed_sampler=False, plugins=[CheckpointFiles()],
    )


def _loggers(settings: TrainSettings, run_dir: Path, curves: Curves) -> list:
    loggers: list = [curves]
    if settings.wandb_project is not None:
        from pytorch_lightning.loggers import WandbLogger  # only where it was asked for

        loggers.append(WandbLogger(project=settings.wandb_project, name=run_dir.name, group=run_dir.parent.name,
                                   save_dir=run_dir, config=dict(settings.config),
                                   reinit="create_new"))  # a run for each job of a sweep
    return loggers
