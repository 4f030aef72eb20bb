"""The unit-norm constraint on decoder rows (PAPER: norms 1, gradient component along a row removed before Adam)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def normalise_rows_(W_dec: Tensor) -> None:
    """Scale every row of ``W_dec`` [d_sae, d_in] to norm 1, in place; a zero row stays zero."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))


@torch.no_grad()
def remove_parallel_(gradient: Tensor, W_dec: Tensor) -> None:
    """Remove from each row of ``gradient`` its component along the unit-norm row of ``W_dec``, in place."""
    along = torch.linalg.vecdot(gradient, W_dec)
    gradient.addcmul_(along.unsqueeze(1), W_dec, value=-1.0)
