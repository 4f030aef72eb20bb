"""Mixed precision: matrix products in the autocast type, everything that decides or adds up in the weights' type."""

from __future__ import annotations

import torch
from torch import Tensor


def operand(tensor: Tensor) -> Tensor:
    """``tensor`` as the operand of a large product: in the autocast type where autocast is on, else as it is."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
