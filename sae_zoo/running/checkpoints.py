"""Checkpoints from which a run that was killed at any moment goes on to the very result that it would have had.

They are taken between two steps, when all that belongs to the last one (its look at held-out rows, its curves) is done.
What training depends on is in them or a function of the step: weights, optimiser, buffers (counters, L0 control), the
random state; the order of the data follows from the step.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from sae_zoo.files import replacing
from sae_zoo.running.curves import Curves

log = logging.getLogger(__name__)

_PATTERN = "[0-9]*.ckpt"
_KEPT = 2  # the newest, and the one before it in case that one turns out damaged


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning writes a checkpoint: under another name first, flushed to disk, then renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(Path(path)) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # how torch speaks of a full disk
                raise OSError(f"the disk may be full ({str(error).splitlines()[0]})") from error


def _damage(path: Path) -> str | None:
    """The damage of a checkpoint, on one line; None if it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a CRC-32 for each part of it, but does not look at them
            if (part := archive.testzip()) is not None:
                return f"the checksum of {part} is wrong"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # What the two make of damage depends on where it is.
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, NotImplementedError,
            ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, None if there is none; says which ones it passes over, and why."""
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        damage = _damage(path)
        if damage is None:
            return path
        log.warning("%s is damaged (%s); going back to the one before it", path, damage)
    return None


class Stopped(BaseException):
    """Training was asked to stop; not a KeyboardInterrupt, which Lightning turns into an exit status of its own."""


class Interrupts:
    """Ctrl-C while SAEs train: once asks them to stop after the step, twice stops at once.

    Attributes:
        count: how often it came.
    """

    def __init__(self):
        self.count = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take what Ctrl-C does from Python, which would raise in the middle of a step."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, *_: Any) -> None:
        self.count += 1
        if self.count > 1:
            raise Stopped
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # logging is not for signal handlers


class Checkpoints(Checkpoint):
    """Saves every so many steps and at the end, keeps the last two, and on Ctrl-C saves and stops.

    Args:
        folder: where they are, named by the number of steps taken.
        every: steps between two of them.
        curves: what is to be there, whole, whenever a checkpoint is.
        interrupts: what SAEs that train together share.

    Raises:
        ValueError: if ``every`` is below 1.
    """

    def __init__(self, folder: Path, *, every: int, curves: Curves, interrupts: Interrupts | None = None):
        if every < 1:
            raise ValueError(f"checkpoint_every is {every}; it must be at least 1")
        self.folder, self.every, self.curves = folder, every, curves
        self._saved_at = 0
        self._random_state: dict[str, Any] | None = None  # to go on with
        self._interrupts = Interrupts() if interrupts is None else interrupts

    def fit(self, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule,
            checkpoint: Path | None) -> None:
        """``trainer.fit`` from ``checkpoint``, or from the start.

        Raises:
            KeyboardInterrupt: on Ctrl-C, after the step that is running and with a checkpoint; on a second one at once.
        """
        with self._interrupts.handled():
            try:
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                if self._interrupts.count:
                    raise Stopped
            except Stopped:
                raise KeyboardInterrupt(f"interrupted after step {self._saved_at}") from None

    # Lightning's hooks.

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved_at = trainer.global_step
        self.curves.start_at(trainer.global_step)
        if trainer.is_global_zero:  # what is newer is damaged, or half written by a process that died
            newer = (path for path in self.folder.glob(_PATTERN) if int(path.stem) > trainer.global_step)
            for path in (*newer, *self.folder.glob("*.tmp")):
                path.unlink()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random_state is not None:  # not before: Lightning draws random numbers when it restarts
            torch.set_rng_state(self._random_state["cpu"])
            if self._random_state["cuda"]:
                torch.cuda.set_rng_state_all(self._random_state["cuda"])
            self._random_state = None
        # Lightning counts steps once more for its loggers, and after a restart from here is one ahead.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self._interrupts.count > 0, all=False)
        if stop or trainer.global_step % self.every == 0:
            self._save(trainer)
        if stop:
            raise Stopped

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_state = state_dict

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_at:
            return
        self.curves.sync()
        trainer.save_checkpoint(self.folder / f"{step:09d}.ckpt")
        self._saved_at = step
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(_PATTERN))[:-_KEPT]:
                old.unlink()
