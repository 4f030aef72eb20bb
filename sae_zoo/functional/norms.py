"""Norms of rows, and rows that are too long."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_norms(rows: Tensor) -> Tensor:
    """||x||^2 of ``rows`` [n, d], float64 [n], independent of the number of threads."""
    return rows.double().square().sum(dim=1)


def is_within(rows: Tensor, bound: float) -> Tensor:
    """[n] bool: which of ``rows`` [n, d] have a norm below ``bound``."""
    if math.isinf(bound):
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) < bound


def in_place_of_long_rows(rows: Tensor, bound: float) -> Tensor:
    """``rows`` [n, d] with the nearest row before it (or after, at the start) in place of each that is not within
    ``bound``: a batch keeps its size, which compiled steps and equal shares of several devices need. As it is where all
    are within, or none is.
    """
    if math.isinf(bound):
        return rows
    within = is_within(rows, bound)
    if bool(within.all()) or not bool(within.any()):
        return rows
    position = torch.arange(len(rows), device=rows.device)
    before = torch.where(within, position, -1).cummax(0).values
    first = within.int().argmax()
    return rows.index_select(0, torch.where(before < 0, first, before))
