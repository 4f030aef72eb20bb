"""The attributes by which the training of an SAE and its maths know each other, by type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from torch import Tensor, nn

from sae_zoo.functional.selection import Selection
from sae_zoo.functional.sparse_code import SparseCode
from sae_zoo.training.recipe import Recipe

if TYPE_CHECKING:
    from sae_zoo.saes.base import SAELoss


class SAEAttributes(pl.LightningModule):
    """Declarations alone: :class:`sae_zoo.saes.lightning.LightningSAE` makes the buffers, and
    :class:`sae_zoo.saes.base.SAE` the rest.
    """

    recipe: Recipe | None
    # Buffers, [d_sae] where one number is kept for each latent.
    tokens_since_fired: Tensor
    density: Tensor
    log_coefficient: Tensor
    control_error: Tensor
    mean_excess: Tensor
    shifted: Tensor
    error_bound: Tensor
    least_dead: Tensor
    last_fvu: Tensor
    l0_average: Tensor
    heldout_l0_ratio: Tensor
    input_scale: Tensor

    d_in: int
    seed: int
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    _normalise: Callable[[Tensor], Tensor]
    start_at: Callable[[Tensor], None]
    raise_thresholds: Callable[[Tensor], None]
    observe: Callable[[Selection], None]
    encode_sparse: Callable[[Tensor], SparseCode]
    decode: Callable[[Tensor | SparseCode], Tensor]
    loss: Callable[[Tensor], SAELoss]

    @property
    def _recipe(self) -> Recipe:
        """:attr:`recipe`, in training, which an SAE without one never gets to."""
        assert self.recipe is not None, "an SAE without a recipe is trained"
        return self.recipe
