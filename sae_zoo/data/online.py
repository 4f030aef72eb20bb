"""Activations on the fly: training rows straight from the language model, through a shuffle buffer of bounded memory.

Held-out rows are those of an ordinary cache. A training row is never stored: the sequences of the packed text are read
in a seeded order, their rows cut into blocks that fit into memory, and every block is shuffled. So row m of the stream
is a pure function of the text, the seed and m. A run that goes on in the middle of a block gives it to the language
model again, and the next one as far as it had been read: at most two buffers of rows. What grows with the text is its
tokens, 4 bytes each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sae_zoo.data.activations import Batches, first_not_finite, summed_squares
from sae_zoo.data.cache import DTYPES, Cache, Origin, make_cache_id
from sae_zoo.data.corpus import Corpus, PackedTokens, pack
from sae_zoo.data.harvesting import HarvestSpec
from sae_zoo.data.permutation import Permutation
from sae_zoo.lm.hooks import HookPoint, capture
from sae_zoo.lm.load import LoadedLM

# Rows that stand for all of train where their mean ||x||^2 is asked for, at most: some seconds of reading.
SAMPLE_ROWS = 32768
PASSES_AHEAD = 2  # of the language model
_ENDLESS = 1 << 60


@dataclass(frozen=True)
class LMRows:
    """The rows that a language model gives for packed tokens, as :func:`~sae_zoo.data.harvesting.harvest` would.

    Attributes:
        packed: what it reads; special tokens give no row.
        dtype: of the rows, as a cache would store them.
        batch_size: sequences a forward pass.
        thread: where forward passes run ahead.
    """

    lm: LoadedLM
    hook: HookPoint
    packed: PackedTokens
    dtype: torch.dtype
    batch_size: int
    # Python waits for it when it ends; a daemon thread would die inside torch, and take the exit status with it.
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "language model"))

    @cached_property
    def kept(self) -> np.ndarray:
        """Rows that each sequence gives, int64 [n_sequences]."""
        return self.packed.keep.sum(dim=1).numpy()

    @cached_property
    def n_rows(self) -> int:
        """Rows of a pass."""
        return int(self.kept.sum())

    def share(self, rank: int, world_size: int) -> LMRows:
        """Every ``world_size``-th sequence from ``rank`` on."""
        return replace(self, packed=replace(self.packed, tokens=self.packed.tokens[rank::world_size]))

    def pieces(self, seed: int, first: int, stop: int) -> Iterator[Tensor]:
        """Rows ``first`` to ``stop`` of pass after pass over the sequences, each in its own seeded order; [n, d_in].

        A sequence is always read with the same others, so that its rows are the same to the bit wherever one begins.

        Raises:
            ValueError: if a row holds NaN or inf.
        """
        n_sequences = len(self.kept)
        while first < stop:
            pass_, start = divmod(first, self.n_rows)
            order = Permutation(n_sequences, seed, pass_)(np.arange(n_sequences))
            ends = self.kept[order].cumsum()
            group = int(np.searchsorted(ends, start, side="right")) // self.batch_size * self.batch_size
            skipped = start - (int(ends[group - 1]) if group else 0)
            until = min(self.n_rows, start + stop - first)
            for group in range(group, int(np.searchsorted(ends, until)) + 1, self.batch_size):
                rows = self._read(order[group : group + self.batch_size])[skipped : skipped + stop - first]
                skipped = 0
                yield rows
                first += len(rows)

    def _read(self, sequences: np.ndarray) -> Tensor:
        tokens = self.packed.tokens[sequences]
        kept = replace(self.packed, tokens=tokens).keep
        activations = capture(self.lm.model, [self.hook], tokens)[self.hook.name]
        rows = activations[kept.to(activations.device)].to("cpu", self.dtype)
        bad = first_not_finite(rows)
        if bad is not None:
            row, position = (int(i[bad]) for i in kept.nonzero(as_tuple=True))
            raise ValueError(f"activations of train: token {position} of sequence {sequences[row]} holds NaN or inf as "
                             f"{str(self.dtype).removeprefix('torch.')}; choose another data.dtype, or the language "
                             "model's numbers are broken at this hook")
        return rows


class ShuffleBuffer:
    """A :class:`~sae_zoo.data.activations.RowStream` of shuffled blocks, of which one at a time is in memory.

    Where a row of a block has been drawn, a row of the next one takes its place; the language model runs ahead of that
    in a thread. A pass is cut into as few blocks of at most ``buffer_rows`` as there can be, equal but for one row.

    Args:
        rows: of one pass.
        seed: of the order, another one in every pass and block.
        buffer_rows: rows in memory.
        stop: rows that will be read; the language model stops at the end of that block.

    Raises:
        ValueError: if ``buffer_rows`` is below 1.
    """

    def __init__(self, rows: LMRows, seed: int, *, buffer_rows: int, stop: int = _ENDLESS):
        if buffer_rows < 1:
            raise ValueError(f"data.buffer_rows is {buffer_rows}; it must be at least 1")
        self._rows, self._seed = rows, seed
        self._n_rows, self._n_blocks = rows.n_rows, -(-rows.n_rows // buffer_rows)  # of a pass
        self._stop = self._first_row(self._block_of(stop - 1) + 1)
        self._next: int | None = None  # row that is read without going anywhere first

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of the stream, float32 [count, d_in]."""
        if first != self._next:
            self._go_to(first)
        drawn = []
        while count:
            if self._drawn == len(self._order):
                self._next_block()
            slots = self._order[self._drawn : self._drawn + count]
            drawn.append(self._buffer[slots].float())
            self._refill(slots)
            count -= len(slots)
            self._next += len(slots)
        return torch.cat(drawn)

    def _first_row(self, block: int) -> int:
        pass_, i = divmod(block, self._n_blocks)
        return pass_ * self._n_rows + i * self._n_rows // self._n_blocks

    def _block_of(self, row: int) -> int:
        pass_, i = divmod(row, self._n_rows)
        return pass_ * self._n_blocks + ((i + 1) * self._n_blocks - 1) // self._n_rows

    def _size(self, block: int) -> int:
        """Rows of a block that will be read."""
        return min(self._stop, self._first_row(block + 1)) - min(self._stop, self._first_row(block))

    def _go_to(self, row: int) -> None:
        """Fill the buffer as it is just before ``row`` is drawn."""
        block = self._block_of(row)
        first = self._first_row(block)
        pieces = self._rows.pieces(self._seed, first, self._stop)
        self._ahead = lambda: self._rows.thread.submit(next, pieces, None)
        self._coming = deque(self._ahead() for _ in range(PASSES_AHEAD))
        self._take()
        n_slots = -(-self._n_rows // self._n_blocks)
        self._buffer = torch.empty(n_slots, self._piece.shape[1], dtype=self._piece.dtype)
        self._block, self._slots = block, torch.arange(n_slots)
        self._fill(self._slots[: self._size(block)])
        self._shuffle()
        self._refill(self._order[: row - first])
        self._next = row

    def _shuffle(self) -> None:
        """Order of drawing from the block, row i of which is at slot ``slots[i]``."""
        size = self._size(self._block)
        order = Permutation(size, self._seed, *divmod(self._block, self._n_blocks))(np.arange(size))
        self._order, self._drawn = self._slots[torch.from_numpy(order)], 0

    def _refill(self, slots: Tensor) -> None:
        """The next slots in the order of drawing are free: put the next block's rows there."""
        n_left = max(0, self._size(self._block + 1) - self._drawn)
        self._fill(slots[:n_left])
        self._drawn += len(slots)

    def _next_block(self) -> None:
        self._slots = torch.cat([self._order, self._slots[len(self._order) :]])
        last, self._block = len(self._order), self._block + 1
        self._fill(self._slots[last : self._size(self._block)])  # this block may have one row more
        self._shuffle()

    def _take(self) -> None:
        """The next piece that the language model gives."""
        self._piece = self._coming.popleft().result()
        self._coming.append(self._ahead())

    def _fill(self, slots: Tensor) -> None:
        while len(slots):
            if not len(self._piece):
                self._take()
            n = min(len(slots), len(self._piece))
            self._buffer[slots[:n]] = self._piece[:n]
            slots, self._piece = slots[n:], self._piece[n:]


class OnlineActivations(Cache):
    """A cache of held-out rows, with train straight from the language model.

    ``rows("train", ...)`` are in a fixed order, the first ones from sequences all over the text;
    ``mean_squared_norm`` is of the first 32,768 or so. ``data_id`` is that of the cache which has the same rows.

    Args:
        held_out: a cache of the same text, hook point and dtype; its train rows are not used.
        lm_name: as in the names of caches.
        spec: of the cache that this stands for.
        buffer_rows: training rows in memory.
        batch_size: sequences a forward pass.

    Raises:
        ValueError: if ``buffer_rows`` is below 1, the train documents give no token, or an activation is not finite.
    """

    def __init__(self, held_out: Cache, lm: LoadedLM, lm_name: str, hook: HookPoint, corpus: Corpus, spec: HarvestSpec,
                 *, buffer_rows: int, batch_size: int):
        super().__init__(held_out.folder, held_out.manifest, held_out.stored)
        identity = {**held_out.manifest["identity"], "n_tokens": dict(spec.n_tokens)}
        self.data_id = make_cache_id(lm=lm_name, hook=hook.name, identity=identity)
        packed = pack(corpus.documents("train"), lm.tokenizer, spec.context_size, spec.n_tokens["train"])
        self._train = LMRows(lm, hook, packed, DTYPES[spec.dtype], batch_size)
        self._seed, self._buffer_rows = spec.seed, buffer_rows
        n_sample = self._train.n_rows // -(-self._train.n_rows // SAMPLE_ROWS)  # the first block of rows("train", ...)
        self.mean_squared_norm = summed_squares(self.rows("train", 0, n_sample)) / n_sample

    def n_rows(self, split: str) -> int:
        return self._train.n_rows if split == "train" else super().n_rows(split)

    def rows(self, split: str, start: int, stop: int) -> Tensor:
        if split != "train":
            return super().rows(split, start, stop)
        self._check_range(split, start, stop)
        return ShuffleBuffer(self._train, self._seed, buffer_rows=SAMPLE_ROWS, stop=stop).read(start, stop - start)

    def origin(self, split: str, start: int, stop: int) -> Origin:
        if split == "train":
            raise ValueError("training rows on the fly have no origin; harvest them (data=cache) to look them up")
        return super().origin(split, start, stop)

    def tokens(self, split: str) -> Tensor:
        return self._train.packed.tokens if split == "train" else super().tokens(split)

    def stream(self, split: str, seed: int):
        if split != "train":
            return super().stream(split, seed)
        return ShuffleBuffer(self._train, seed, buffer_rows=self._buffer_rows)

    def batches(self, split: str, batch_size: int, *, n_batches: int, seed: int, start: int = 0, rank: int = 0,
                world_size: int = 1) -> Batches:
        """As of any activations; but of several processes each reads its own share of the text, so that no sequence
        goes through the language model twice. A batch then depends on how many they are.
        """
        checked = super().batches(split, batch_size, n_batches=n_batches, seed=seed, start=start, rank=rank,
                                  world_size=world_size)
        if split != "train":
            return checked
        n = checked.rows_of_rank
        stream = ShuffleBuffer(self._train.share(rank, world_size), seed, buffer_rows=self._buffer_rows // world_size,
                               stop=n * n_batches)
        return Batches(stream, n, n_batches=n_batches, start=start)
