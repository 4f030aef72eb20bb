"""Parts of the text for the processes that make a cache together, and the folders where each keeps its rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sae_zoo.data.cache import MANIFEST
from sae_zoo.data.corpus import PackedTokens

_WAIT_SECONDS = 0.2  # between two looks at what the first of several processes does


def partial_folder(root: Path | str, cache_id: str) -> Path:
    """The folder where a cache is built before it is published."""
    return Path(root) / f".{cache_id}.partial"


def part_folder(root: Path | str, cache_id: str, number: int, of: int) -> Path:
    """The folder where a writer keeps its rows until all parts are complete."""
    return partial_folder(root, cache_id) / f"part{number}of{of}"


class Part(NamedTuple):
    """The rows that one of several writers of a cache appends.

    Attributes:
        number, of: which part this is, from 0, and how many there are.
        sequences: of each split, the rows of packed tokens that it reads.
        rows: of each split, the first and the number of its activations, in reading order.
    """

    number: int
    of: int
    sequences: dict[str, range]
    rows: dict[str, tuple[int, int]]


def wait_for_first(root: Path, cache_id: str, of: int) -> None:
    """Wait until the first of ``of`` processes has begun a cache, or it is there."""
    while not (root / cache_id / MANIFEST).exists() and not part_folder(root, cache_id, 0, of).exists():
        time.sleep(_WAIT_SECONDS)


def part_of(packed: Mapping[str, PackedTokens], batch_size: int, number: int, of: int) -> Part:
    """The part that process ``number`` reads: the batches of one process, as evenly as they can be dealt out in blocks.
    """
    sequences, rows = {}, {}
    for split, text in packed.items():
        n_batches = math.ceil(len(text.tokens) / batch_size)
        start, stop = (min(n_batches * n // of * batch_size, len(text.tokens)) for n in (number, number + 1))
        before, own = (int(text.keep[a:b].sum()) for a, b in ((0, start), (start, stop)))
        sequences[split], rows[split] = range(start, stop), (before, own)
    return Part(number, of, sequences, rows)
