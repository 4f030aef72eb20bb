"""The LightningDataModule that every SAE trains from, whatever the activations come from."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader

from sae_zoo.data.activations import Activations, Batches
from sae_zoo.data.read_ahead import ReadAhead, SizedBatches

# Held-out rows on which L0 is measured while training runs; enough for about 1 % at any L0 of interest.
VALIDATION_ROWS = 8192
# Training rows that a data-dependent start looks at.
START_ROWS = 8192


class ActivationData(pl.LightningDataModule):
    """Seeded training batches and a fixed set of validation rows.

    A resumed run reads on at the step where the trainer stands; every device reads its own slice of each global batch.

    Args:
        activations: a cache or a user's file.
        batch_size: rows of a global batch.
        n_steps: batches of the whole run.
        seed: of the order.
    """

    def __init__(self, activations: Activations, *, batch_size: int, n_steps: int, seed: int):
        super().__init__()
        self.activations, self.batch_size, self.n_steps, self.seed = activations, batch_size, n_steps, seed

    def batches(self, *, start: int = 0, rank: int = 0, world_size: int = 1) -> Batches:
        """The training batches from step ``start`` on."""
        return self.activations.batches("train", self.batch_size, n_batches=self.n_steps, seed=self.seed, start=start,
                                        rank=rank, world_size=world_size)

    def train_dataloader(self) -> SizedBatches:
        assert self.trainer is not None  # it is who asks
        batches = self.batches(start=self.trainer.global_step, rank=self.trainer.global_rank,
                               world_size=self.trainer.world_size)
        return ReadAhead(batches, pin=self.trainer.strategy.root_device.type == "cuda")

    def validation_rows(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """The rows on which L0 is measured, [n, d_in]; the ``rank``-th of ``world_size`` slices of them."""
        n = min(VALIDATION_ROWS, self.activations.n_rows("validation"))
        return self.activations.kept_rows("validation", n * rank // world_size, n * (rank + 1) // world_size)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None  # it is who asks
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        rows = self.validation_rows(rank, world_size)
        return DataLoader(rows,  # type: ignore[arg-type]  # len() and [] are enough for torch
                          batch_size=min(self.batch_size, len(rows)))
