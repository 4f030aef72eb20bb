"""The interface of activations for training and evaluation, wherever they come from (a cache, a user's file)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae_zoo.data.norms import Norms
from sae_zoo.functional.norms import in_place_of_long_rows, is_within


def first_not_finite(rows: Tensor) -> int | None:
    """Index of the first of ``rows`` [n, d_in] (at most 32 bits a number) that holds NaN or inf; None if none does."""
    # They survive a sum, and finite numbers of 32 bits cannot overflow one of 64: one pass, where isfinite takes three.
    bad = ~torch.isfinite(rows.sum(dim=1, dtype=torch.float64))
    return int(bad.int().argmax()) if bad.any() else None


class RowStream(Protocol):
    """An endless sequence of rows: pass after pass over a split, each pass in its own seeded order."""

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of the sequence, [count, d_in], float32 or the 16-bit type in which they
        are stored; fast when read in order. Not to be written to.
        """


class Batches:
    """Batches in which number ``step`` is a pure function of the data, the seed, ``batch_size`` and ``step``.

    Attributes:
        step: the batch that comes next; set it to go on from anywhere.

    Args:
        stream: where the rows come from.
        batch_size: rows of a global batch.
        n_batches: ``len()`` of this; iteration ends there.
        start: first ``step``.
        rank, world_size: this process gets the ``rank``-th of ``world_size`` equal slices of every global batch.
        norm_bound: a row of at least this norm has another row of its slice in its place
            (:func:`~sae_zoo.functional.norms.in_place_of_long_rows`).

    Raises:
        ValueError: if a number is out of its range, or ``world_size`` does not divide ``batch_size``.
    """

    def __init__(self, stream: RowStream, batch_size: int, *, n_batches: int, start: int = 0, rank: int = 0,
                 world_size: int = 1, norm_bound: float = math.inf):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 <= start <= n_batches:
            raise ValueError(f"start is {start}; it must be from 0 to the number of batches, {n_batches}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}; it must be a multiple of the {world_size} processes")
        self.stream, self.batch_size, self.n_batches = stream, batch_size, n_batches
        self.rank, self.rows_of_rank = rank, batch_size // world_size
        self.step, self.norm_bound = start, norm_bound

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        """Yields [batch_size / world_size, d_in], float32 or the 16-bit type in which the rows are stored."""
        while self.step < self.n_batches:
            first = self.step * self.batch_size + self.rank * self.rows_of_rank
            self.step += 1
            yield in_place_of_long_rows(self.stream.read(first, self.rows_of_rank), self.norm_bound)


class Activations(ABC):
    """Rows of activations in the splits train, validation and test.

    Attributes:
        d_in: width of a row.
        norms: how long the rows of train are.
        norm_bound: rows of at least this norm are left out, of training as of scoring; see :meth:`leave_out`.
        data_id: names the data and their split; equal ids mean equal rows.
    """

    d_in: int
    norms: Norms
    norm_bound: float = math.inf
    data_id: str

    def leave_out(self, max_norm: float | None) -> None:
        """Leave rows out whose norm is more than ``max_norm`` times the median; None leaves out none.

        Raises:
            ValueError: if ``max_norm`` is not above 1.
        """
        self.norm_bound = self.norms.bound(max_norm)

    @property
    def mean_squared_norm(self) -> float:
        """Mean of ||x||^2 over the rows of train that are not left out."""
        return self.norms.mean_square(below=self.norm_bound)

    def kept_rows(self, split: str, start: int, stop: int) -> Tensor:
        """The rows of :meth:`rows` that are not left out."""
        rows = self.rows(split, start, stop)
        return rows[is_within(rows, self.norm_bound)]

    @abstractmethod
    def n_rows(self, split: str) -> int:
        """Rows of ``split``.

        Raises:
            ValueError: if there is no such split.
        """

    @abstractmethod
    def rows(self, split: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of ``split`` in storage order, converted to float32, [stop - start, d_in]; only
        these are read.

        Raises:
            ValueError: if they are not all there.
        """

    @abstractmethod
    def stream(self, split: str, seed: int) -> RowStream:
        """An endless stream over ``split``."""

    def batches(self, split: str, batch_size: int, *, n_batches: int, seed: int, start: int = 0, rank: int = 0,
                world_size: int = 1) -> Batches:
        """Shuffled batches of ``split``; passes over it follow each other without a seam. See :class:`Batches`.

        Raises:
            ValueError: if the split has fewer rows than one batch, or an argument is out of range.
        """
        if batch_size > self.n_rows(split):
            raise ValueError(f"batch_size is {batch_size}, but {split} of {self.data_id} has only {self.n_rows(split)} "
                             "rows; lower batch_size or give more data")
        return Batches(self.stream(split, seed), batch_size, n_batches=n_batches, start=start, rank=rank,
                       world_size=world_size, norm_bound=self.norm_bound)

    def _check_range(self, split: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_rows(split):
            raise ValueError(f"rows {start} to {stop} of {split} were asked for; it has {self.n_rows(split)}")


class Origin(NamedTuple):
    """Origins of rows, int32 [n] each: ``token_ids[i]`` is ``tokens(split)[sequences[i], positions[i]]``."""

    token_ids: Tensor
    sequences: Tensor
    positions: Tensor


class TextActivations(Activations):
    """Activations of a language model on text that is kept, so that each row is a token of it.

    Attributes:
        cache_id: the name of the cache that holds the held-out rows.
        special_ids: ids of the tokens that give no row: BOS, EOS and padding.
    """

    cache_id: str
    special_ids: Sequence[int]

    @abstractmethod
    def tokens(self, split: str) -> Tensor:
        """The packed tokens that the language model read, int32 [n_sequences, context_size]."""

    @abstractmethod
    def origin(self, split: str, start: int, stop: int) -> Origin:
        """Token id, row of :meth:`tokens` and position in it, of rows ``start`` to ``stop``.

        Raises:
            ValueError: if they are not all there.
        """
