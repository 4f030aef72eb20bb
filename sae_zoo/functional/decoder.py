"""Unit-norm decoder rows; :class:`sae_zoo.training.adam.Adam` keeps them so."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def normalise_rows_(W_dec: Tensor) -> None:
    """Scale every row of ``W_dec`` [d_sae, d_in] to norm 1, in place; a zero row stays zero."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))
