"""Activations on the fly: training rows straight from the language model, through a shuffle buffer of bounded memory.

Held-out rows are those of an ordinary cache. A training row is never stored: the sequences of the packed text are read
in a seeded order, and their rows wait in a buffer until they are drawn from it. Row m of the stream is a pure function
of the text, the seed and m. A run that goes on gives the language model again what had not been drawn yet, which is
spread over the last dozen buffers or so. What grows with the text is its tokens, 4 bytes each.
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

from sae_zoo.data.activations import Batches, Origin, TextActivations, first_not_finite
from sae_zoo.data.cache import DTYPES, Cache, make_cache_id
from sae_zoo.data.corpus import Corpus, PackedTokens, pack
from sae_zoo.data.harvesting import HarvestSpec
from sae_zoo.data.norms import Norms
from sae_zoo.data.permutation import Permutation, draws
from sae_zoo.lm.hooks import HookPoint, capture
from sae_zoo.lm.load import LoadedLM

# Rows that stand for all of train where their mean ||x||^2 is asked for, at most: some seconds of reading. Where rows
# are asked for by their number, so many are in an order of their own.
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
            begin = int(np.searchsorted(ends, start, side="right")) // self.batch_size * self.batch_size
            skipped = start - (int(ends[begin - 1]) if begin else 0)
            until = min(self.n_rows, start + stop - first)
            for group in range(begin, int(np.searchsorted(ends, until)) + 1, self.batch_size):
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
    """A :class:`~sae_zoo.data.activations.RowStream` out of a buffer, in which the language model runs ahead in a
    thread.

    Draw m takes the row in slot s(m), a hash, and puts row ``n_slots + m`` of the text in its place. So it gives row
    ``n_slots + m'`` where m' is the draw before it from the same slot, and row s(m) where there is none. A row waits
    for ``n_slots`` draws on the average, but some for ten times that: what is in a batch comes from far more of the
    text than is in memory. (Shuffled blocks of as many rows, one after the other, cost an SAE 1 % in FVU:
    analysis/LOG.md.)

    Args:
        rows: of one pass.
        seed: of the order.
        buffer_rows: rows in memory, but no more than a pass has.
        stop: rows that will be read; the language model stops where no more are needed.

    Raises:
        ValueError: if ``buffer_rows`` is below 1.
    """

    def __init__(self, rows: LMRows, seed: int, *, buffer_rows: int, stop: int = _ENDLESS):
        if buffer_rows < 1:
            raise ValueError(f"data.buffer_rows is {buffer_rows}; it must be at least 1")
        self._rows, self._seed = rows, seed
        self._n_slots = min(buffer_rows, rows.n_rows)
        self._stop = stop + self._n_slots  # row of the text
        self._next: int | None = None  # draw that comes next without going anywhere first

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of the stream, float32 [count, d_in]."""
        if first != self._next:
            self._go_to(first)
        slots, coming = draws(self._n_slots, first, count, self._seed), self._take(count)
        # Of draws from one slot in one call, a later one gets what the one before it has put there.
        order = np.argsort(slots, kind="stable")
        again = np.flatnonzero(slots[order][1:] == slots[order][:-1])
        before, after = torch.from_numpy(order[again]), torch.from_numpy(order[again + 1])
        places = torch.from_numpy(slots)
        drawn = self._buffer[places]
        drawn[after] = coming[before]
        stays = torch.ones(count, dtype=torch.bool)
        stays[before] = False
        self._buffer[places[stays]] = coming[stays]
        self._next = first + count
        return drawn.float()

    def _go_to(self, draw: int) -> None:
        """Fill the buffer as it is just before ``draw``."""
        wanted = self._content(draw)  # row of the text by slot
        slots = np.argsort(wanted)
        wanted = wanted[slots]
        at, stop = int(wanted[0]), self._n_slots + draw
        pieces = self._rows.pieces(self._seed, at, self._stop)
        self._ahead = lambda: self._rows.thread.submit(next, pieces, None)
        self._coming = deque(self._ahead() for _ in range(PASSES_AHEAD))
        self._piece = self._next_piece()
        self._buffer = self._piece.new_empty(self._n_slots, self._piece.shape[1])
        while at < stop:
            rows = self._take(min(stop - at, max(1, len(self._piece))))
            here = slice(*np.searchsorted(wanted, (at, at + len(rows))))
            self._buffer[torch.from_numpy(slots[here])] = rows[torch.from_numpy(wanted[here] - at)]
            at += len(rows)
        self._next = draw

    def _content(self, draw: int) -> np.ndarray:
        """The row of the text that is in each slot just before ``draw``, int64 [n_slots]."""
        content = np.full(self._n_slots, -1)
        while draw > 0 and (content < 0).any():
            first = max(0, draw - self._n_slots)
            last = np.full(self._n_slots, -1)
            last[draws(self._n_slots, first, draw - first, self._seed)] = np.arange(first, draw)  # the last one stays
            content = np.where((content < 0) & (last >= 0), self._n_slots + last, content)
            draw = first
        return np.where(content < 0, np.arange(self._n_slots), content)

    def _take(self, count: int) -> Tensor:
        """The next rows of the text, as stored [count, d_in]."""
        parts = [self._piece[:count]]
        self._piece = self._piece[count:]
        while (missing := count - sum(map(len, parts))) > 0:
            piece = self._next_piece()
            parts.append(piece[:missing])
            self._piece = piece[missing:]
        return torch.cat(parts)

    def _next_piece(self) -> Tensor:
        piece = self._coming.popleft().result()
        assert piece is not None  # no more is taken than there is up to ``stop``
        self._coming.append(self._ahead())
        return piece


class OnlineActivations(TextActivations):
    """Held-out rows of a cache, and train straight from the language model.

    ``rows("train", ...)`` are in a fixed order, the first ones from sequences all over the text;
    ``norms`` are of the first 32,768 or so. ``data_id`` is that of the cache which has the same rows.

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
        self._held_out = held_out
        self.cache_id, self.d_in, self.special_ids = held_out.cache_id, held_out.d_in, held_out.special_ids
        identity = {**held_out.manifest["identity"], "n_tokens": dict(spec.n_tokens)}
        self.data_id = make_cache_id(lm=lm_name, hook=hook.name, identity=identity)
        packed = pack(corpus.documents("train"), lm.tokenizer, spec.context_size, spec.n_tokens["train"])
        self._train = LMRows(lm, hook, packed, DTYPES[spec.dtype], batch_size)
        self._seed, self._buffer_rows = spec.seed, buffer_rows
        n_sample = self._train.n_rows // -(-self._train.n_rows // SAMPLE_ROWS)  # the first block of rows("train", ...)
        self.norms = Norms.of(self.rows("train", 0, n_sample))

    def n_rows(self, split: str) -> int:
        return self._train.n_rows if split == "train" else self._held_out.n_rows(split)

    def rows(self, split: str, start: int, stop: int) -> Tensor:
        if split != "train":
            return self._held_out.rows(split, start, stop)
        self._check_range(split, start, stop)
        parts, n_blocks = [], -(-self._train.n_rows // SAMPLE_ROWS)
        for block in range(n_blocks):
            first, end = (self._train.n_rows * i // n_blocks for i in (block, block + 1))
            if max(first, start) < min(end, stop):
                order = Permutation(end - first, self._seed, block)(np.arange(end - first))
                rows = torch.cat(list(self._train.pieces(self._seed, first, end)))
                parts.append(rows[torch.from_numpy(order[max(first, start) - first : min(end, stop) - first])])
        return torch.cat(parts).float()

    def origin(self, split: str, start: int, stop: int) -> Origin:
        if split == "train":
            raise ValueError("training rows on the fly have no origin; harvest them (data=cache) to look them up")
        return self._held_out.origin(split, start, stop)

    def tokens(self, split: str) -> Tensor:
        return self._train.packed.tokens if split == "train" else self._held_out.tokens(split)

    def stream(self, split: str, seed: int):
        if split != "train":
            return self._held_out.stream(split, seed)
        return ShuffleBuffer(self._train, seed, buffer_rows=self._buffer_rows)

    def batches(self, split: str, batch_size: int, *, n_batches: int, seed: int, start: int = 0, rank: int = 0,
                world_size: int = 1) -> Batches:
        """Batches as of any activations; but of several processes each reads its own share of the text, so that no
        sequence goes through the language model twice. A batch then depends on how many they are.
        """
        checked = super().batches(split, batch_size, n_batches=n_batches, seed=seed, start=start, rank=rank,
                                  world_size=world_size)
        if split != "train":
            return checked
        n = checked.rows_of_rank
        stream = ShuffleBuffer(self._train.share(rank, world_size), seed, buffer_rows=self._buffer_rows // world_size,
                               stop=n * n_batches)
        return Batches(stream, n, n_batches=n_batches, start=start, norm_bound=self.norm_bound)
