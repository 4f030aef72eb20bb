"""The positions of packed token rows that are data: one rule for harvest, training on the fly and evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def data_points(tokens: Tensor, special_ids: Iterable[int]) -> Tensor:
    """True where a position of ``tokens`` [n_rows, context] int is a data point: bool [n_rows, context].

    It is none where its token is special, nor in the first column, whatever stands there: without BOS it is an ordinary
    token, but attention sinks to it all the same, and its activation is a hundred times as long as others.
    """
    keep = ~torch.isin(tokens, torch.tensor(list(special_ids), dtype=tokens.dtype, device=tokens.device))
    keep[:, 0] = False
    return keep
