"""Batches of pretraining: a pure function of a seed and of the step."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from torch import Tensor


class StepDataModule(pl.LightningDataModule):
    """Serves training batches from the step that the trainer stands at, so that a resumed run reads on where it was.

    Args:
        batches: has ``step``, the next batch to give, and ``len()``.
        validation: what Lightning's validation loop reads, or None.
    """

    def __init__(self, batches, validation=None):
        super().__init__()
        self.batches, self.validation = batches, validation

    def train_dataloader(self):
        assert self.trainer is not None  # it is who asks
        self.batches.step = self.trainer.global_step
        return self.batches

    def val_dataloader(self):
        return [] if self.validation is None else self.validation


class SeededRows:
    """Batches of rows of a tensor in a new seeded order every pass; from any ``step`` on.

    Args:
        rows: [n_rows, ...].
        batch_size: rows a batch; the tail of a pass that does not fill one is left out of that pass.
        n_steps: batches to give.

    Raises:
        ValueError: if there are fewer rows than one batch needs.
    """

    def __init__(self, rows: Tensor, batch_size: int, n_steps: int, *, seed: int):
        if len(rows) < batch_size:
            raise ValueError(f"{len(rows)} rows do not fill a batch of {batch_size}; lower batch_size or add data")
        self.rows, self.batch_size, self.n_steps, self.seed = rows, batch_size, n_steps, seed
        self.step = 0

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Tensor]:
        per_pass = len(self.rows) // self.batch_size
        order, order_of = torch.empty(0, dtype=torch.int64), -1  # of no pass yet
        while self.step < self.n_steps:
            pass_, position = divmod(self.step, per_pass)
            if pass_ != order_of:
                generator = torch.Generator().manual_seed((self.seed << 20) + pass_)
                order, order_of = torch.randperm(len(self.rows), generator=generator), pass_
            self.step += 1
            yield self.rows[order[position * self.batch_size : (position + 1) * self.batch_size]]
