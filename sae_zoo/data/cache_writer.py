"""Writing an activation cache: shuffled while it is written, in memory that does not grow with the cache.

Row i of a split, in the order in which the language model reads, goes to slot ``permutation(i)``. While rows arrive
they are appended to one bucket file for every shard; when all are there each bucket becomes a shard and is deleted, so
that at its peak the disk holds one cache and one shard. All of it is built in a folder with a temporary name and
published by one rename.

Several processes may write one cache, each the rows of its own part of the text, into buckets of its own; the first of
them makes the shards of all, which are the same bytes as one process would have made.

A writer that was killed leaves its part of that folder, and the next one goes on with it: from the last note of how
long each bucket was at which row of the text, and, once the shards are being made, from those that are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sae_zoo.data.activations import Origin, first_not_finite
from sae_zoo.data.cache import DTYPES, FORMAT_VERSION, MANIFEST, Cache, manifest_digest, open_cache
from sae_zoo.data.corpus import SPLITS, PackedTokens
from sae_zoo.data.norms import LongRows
from sae_zoo.data.permutation import Permutation
from sae_zoo.data.writer_parts import Part, part_folder, partial_folder
from sae_zoo.files import replacing, sync_folder
from sae_zoo.records import digest, write_json

log = logging.getLogger(__name__)

_PROGRESS = "progress.json"  # in the folder that is being built
_NOTE_SECONDS = 30.0  # between two notes: each flushes all buckets to disk
_BUFFER_BYTES = 1 << 27  # rows that wait in memory to be appended to their buckets: few opens, long writes
_CHUNK_ROWS = 4096  # rows taken from a bucket at a time
_WAIT_SECONDS = 0.2  # between two looks at what the other writers of a cache have done


def estimated_bytes(splits: Mapping[str, int], *, d_in: int, dtype: str, rows_per_shard: int) -> int:
    """Disk space that writing a cache takes at its peak: rows, token tables, one more shard.

    Args:
        splits: rows of each split.
    """
    row_bytes = d_in * DTYPES[dtype].itemsize
    n_rows = sum(splits.values())
    # A bucket has 16 bytes beside each row, a shard 12; a token table 4 a token, of which at worst half are special.
    return n_rows * (row_bytes + 24) + min(n_rows, rows_per_shard) * (row_bytes + 12)


def check_disk_space(root: Path | str, n_bytes: int) -> None:
    """Refuse work that cannot be finished.

    Raises:
        ValueError: if fewer than ``n_bytes`` are free where ``root`` (an existing folder) is.
    """
    free = shutil.disk_usage(root).free
    if free < n_bytes:
        raise ValueError(f"the activation cache needs {n_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in "
                         f"{root}; free some, lower the number of tokens, choose a 16-bit dtype or another output_dir")


class CacheWriter:
    """Writes one cache, or a part of it; hold :func:`~sae_zoo.data.cache.cache_lock` of that part meanwhile.

    It goes on with what an earlier writer of the same cache has left, if that can be used. A context manager: left by a
    ValueError (the rows are wrong), it removes what was written; left by anything else, that stays for the next one.

    Attributes:
        sequences_done: of each split, how many rows of packed tokens need not be appended again.
        complete: whether all rows have been appended already; then only :meth:`finish` is left.

    Args:
        root: the folder of all caches.
        cache_id: from :func:`~sae_zoo.data.cache.make_cache_id` and the same ``identity``.
        identity: everything that decides the bytes, as plain JSON values.
        d_in: width of a row.
        dtype: ``float32``, ``bfloat16`` or ``float16``; rows are rounded to it.
        splits: how many rows will be appended to each split.
        rows_per_shard: rows of every shard but the last of a split.
        seed: of the shuffle. Caches with equal ``splits`` and ``seed`` have the same tokens in the same rows.
        part: what this writer appends, if others append the rest; None is all of it.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, root: Path | str, cache_id: str, *, identity: Mapping[str, Any], d_in: int, dtype: str,
                 splits: Mapping[str, int], rows_per_shard: int, seed: int, part: Part | None = None):
        if dtype not in DTYPES:
            raise ValueError(f"cache dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; it must be at least 1")
        if d_in < 1:
            raise ValueError(f"d_in is {d_in}; it must be at least 1")
        if tuple(splits) != SPLITS:
            raise ValueError(f"splits of the cache are {', '.join(splits)}; they must be {', '.join(SPLITS)}")
        for split, n_rows in splits.items():
            if n_rows < 1:
                raise ValueError(f"split {split!r} of the cache has {n_rows} rows; it needs at least 1: give more text")
        identity = dict(identity)
        if json.loads(json.dumps(identity, default=str)) != identity or not cache_id.endswith(digest(identity)):
            raise ValueError(f"cache_id {cache_id!r} is not make_cache_id(...) of this identity in plain JSON values")
        self.root, self.cache_id, self.identity = Path(root), cache_id, identity
        self.d_in, self.dtype, self.splits, self.rows_per_shard = d_in, dtype, dict(splits), rows_per_shard
        self._permutations = {split: Permutation(n, seed) for split, n in splits.items()}
        self._partial = partial_folder(self.root, cache_id)
        self._part = part or Part(0, 1, dict.fromkeys(splits, range(0)), {split: (0, n) for split, n in splits.items()})
        self._own = self._part_folder(self._part.number)
        self._shards: list[tuple[str, int, int]] = []  # of all splits: (split, number in it, rows)
        self._first_shard: dict[str, int] = {}
        for split, n_rows in splits.items():
            self._first_shard[split] = len(self._shards)
            self._shards += [(split, i, min(rows_per_shard, n_rows - i * rows_per_shard))
                             for i in range(math.ceil(n_rows / rows_per_shard))]
        row_bytes = d_in * DTYPES[dtype].itemsize
        self._record = np.dtype([("slot", "<u4"), *((name, "<i4") for name in Origin._fields),
                                 ("activations", "u1", (row_bytes,))])
        buffer_rows = max(1, min(sum(splits.values()), _BUFFER_BYTES // self._record.itemsize))
        self._waiting = np.empty(buffer_rows, self._record)
        self._shard_of = np.empty(buffer_rows, np.int64)
        self._n_waiting = 0
        self._unsynced: set[int] = set()  # buckets
        self._noted = time.monotonic()
        if not self._go_on():
            shutil.rmtree(self._own, ignore_errors=True)
            self.complete = False
            self.sequences_done = {split: own.start for split, own in self._part.sequences.items()}
            self._n_appended = dict.fromkeys(splits, 0)
            self._own.mkdir(parents=True)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, ValueError):
            shutil.rmtree(self._own, ignore_errors=True)
            with suppress(OSError):  # the other writers' parts stay
                self._partial.rmdir()

    def append(self, split: str, activations: Tensor, token_ids: Tensor, sequences: Tensor, positions: Tensor) -> None:
        """Add rows in reading order.

        Args:
            activations: [n, d_in], any float type and device.
            token_ids: [n], the token of each row.
            sequences, positions: [n], row and column of the packed tokens where it stands.

        Raises:
            ValueError: if a row holds NaN or inf (the split and the first such row are named), if shapes are wrong, or
                if these are more rows than were announced.
        """
        if split not in self.splits:
            raise ValueError(f"split {split!r} was not announced; {', '.join(self.splits)} were")
        n, first = len(activations), self._part.rows[split][0] + self._n_appended[split]
        if activations.shape != (n, self.d_in):
            raise ValueError(f"activations have shape {tuple(activations.shape)}; (n, d_in = {self.d_in}) is expected")
        origin = Origin(token_ids, sequences, positions)
        for name, values in zip(Origin._fields, origin, strict=True):
            if values.shape != (n,):
                raise ValueError(f"{name} have shape {tuple(values.shape)}; ({n},) is expected, one for each row")
        if self._n_appended[split] + n > self._part.rows[split][1]:
            raise ValueError(f"split {split!r} gets row {self._n_appended[split] + n}, but {self._part.rows[split][1]} "
                             "were announced")
        stored = activations.detach().to("cpu", DTYPES[self.dtype]).contiguous()
        bad = first_not_finite(stored)
        if bad is not None:
            reason = (f"is too large for {self.dtype}; choose bfloat16 or float32" if activations[bad].isfinite().all()
                      else "holds NaN or inf; the language model's numbers are broken at this hook")
            raise ValueError(f"activations of split {split!r}: row {first + bad} {reason}")
        slots = self._permutations[split](np.arange(first, first + n))
        raw = stored.view(torch.uint8).numpy()
        columns = [values.cpu().numpy() for values in origin]
        done = 0
        while done < n:
            take = min(n - done, len(self._waiting) - self._n_waiting)
            source, target = slice(done, done + take), slice(self._n_waiting, self._n_waiting + take)
            shard, slot = np.divmod(slots[source], self.rows_per_shard)
            self._shard_of[target] = self._first_shard[split] + shard
            self._waiting["slot"][target] = slot
            self._waiting["activations"][target] = raw[source]
            for name, column in zip(Origin._fields, columns, strict=True):
                self._waiting[name][target] = column[source]
            self._n_waiting += take
            done += take
            if self._n_waiting == len(self._waiting):
                self._flush()
        self._n_appended[split] += n

    def sequences_appended(self, split: str, n_sequences: int) -> None:
        """Say that all rows of the first ``n_sequences`` rows of packed tokens have been appended: a writer that comes
        after this one need not be given them again.
        """
        self.sequences_done[split] = n_sequences
        if time.monotonic() - self._noted >= _NOTE_SECONDS:
            self._note()

    def finish(self, packed: Mapping[str, PackedTokens], *, progress_bar: bool = False) -> Cache:
        """Make the shards, publish the cache and open it, when all parts are complete. Of several writers the first
        does so and the others wait for it. Keeps a finished cache that is there already.

        Args:
            packed: of every split, the tokens that the rows come from.

        Raises:
            ValueError: if rows are missing, or a row's token is not where it says.
        """
        for split, (_, n_rows) in self._part.rows.items():
            if self._n_appended[split] != n_rows:
                raise ValueError(f"split {split!r} got {self._n_appended[split]} of the {n_rows} rows announced")
        if not self.complete:
            self.complete = True
            self._note()
        if self._part.number > 0:
            while not (self.root / self.cache_id / MANIFEST).exists():
                time.sleep(_WAIT_SECONDS)
            return open_cache(self.root / self.cache_id)
        for number in range(1, self._part.of):
            while not self._is_complete(number):
                time.sleep(_WAIT_SECONDS)
        for name in ("tokens", *self.splits):
            (self._partial / name).mkdir(exist_ok=True)
        largest, long_rows = max(rows for _, _, rows in self._shards), LongRows()
        tensors = {"activations": torch.empty(largest, self.d_in, dtype=DTYPES[self.dtype]),
                   **{name: torch.empty(largest, dtype=torch.int32) for name in Origin._fields}}
        splits: dict[str, dict[str, Any]] = {
            split: {
                "n_rows": n_rows, "n_documents": packed[split].n_documents,
                "n_special_tokens": packed[split].tokens.numel() - packed[split].n_tokens,
                "tokens": {**self._write(f"tokens/{split}.safetensors", {"tokens": packed[split].tokens.contiguous()}),
                           "context_size": packed[split].tokens.shape[1]},
                "shards": [],
            } for split, n_rows in self.splits.items()
        }
        for i in tqdm(range(len(self._shards)), desc="shards", unit="shard", disable=not progress_bar):
            split, _, rows = self._shards[i]
            name = self._shard_name(i)
            if made := (self._partial / name).exists():  # by a writer before this one
                shard = load_file(self._partial / name)
            else:
                shard = {key: tensor[:rows] for key, tensor in tensors.items()}
                self._fill(shard, i)
            self._check_tokens(shard, split, packed[split].tokens)
            if split == "train":
                long_rows.add(*(shard[key] for key in ("activations", "token_ids", "positions")))
            splits[split]["shards"].append(self._entry(name, shard) if made else self._write(name, shard))
            for number in range(self._part.of):
                self._bucket(i, number).unlink(missing_ok=True)
        manifest = {
            "format_version": FORMAT_VERSION, "cache_id": self.cache_id, "identity": self.identity, "d_in": self.d_in,
            "dtype": self.dtype, "rows_per_shard": self.rows_per_shard,
            "mean_squared_norm": long_rows.norms.mean_square(), "norms": long_rows.summary(),
            "special_ids": list(packed["train"].special_ids), "splits": splits,
        }
        write_json(self._partial / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})
        return open_cache(self._publish())

    def _go_on(self) -> bool:
        """Take over what a writer of the same cache has left; False if there is nothing, or nothing usable."""
        file = self._own / _PROGRESS
        if (self._partial / MANIFEST).exists():  # all is there, but was not published
            self.sequences_done, self.complete = {}, True
            self._n_appended = {split: n for split, (_, n) in self._part.rows.items()}
            return True
        if not file.exists():
            return False
        try:
            noted = json.loads(file.read_text())
            sizes = dict(zip(range(len(self._shards)), noted["bucket_bytes"], strict=True))
            usable = noted["of"] == self._made_of()
            self.sequences_done, self.complete = noted["sequences_done"], noted["complete"]
            self._n_appended = noted["n_appended"]
        except (ValueError, KeyError, TypeError):
            usable = False
        if usable:  # what was appended after the note is cut off
            for shard, size in sizes.items():
                bucket = self._bucket(shard)
                if (self._partial / self._shard_name(shard)).exists():
                    continue
                if (bucket.stat().st_size if bucket.exists() else 0) < size:
                    usable = False
                elif bucket.exists():
                    os.truncate(bucket, size)
        if not usable:
            log.warning("what an interrupted harvest left in %s cannot be used; starting again", self._own)
            return False
        log.info("going on with %s: %s rows are there", self.cache_id, f"{sum(self._n_appended.values()):,}")
        return True

    def _made_of(self) -> dict[str, Any]:
        """Facts in which a note has to agree with this writer, beside the name of the cache."""
        return {"splits": self.splits, "d_in": self.d_in, "dtype": self.dtype, "rows_per_shard": self.rows_per_shard,
                "rows": {split: list(rows) for split, rows in self._part.rows.items()}}

    def _is_complete(self, number: int) -> bool:
        """Whether all rows of a part have been appended."""
        file = self._part_folder(number) / _PROGRESS
        return file.exists() and json.loads(file.read_text())["complete"]

    def _part_folder(self, number: int) -> Path:
        return part_folder(self.root, self.cache_id, number, self._part.of)

    def _note(self) -> None:
        """Write down how far this writer is, so that the next one can go on from here."""
        self._flush()
        for shard in self._unsynced:
            with open(self._bucket(shard), "rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()
        buckets = (self._bucket(shard) for shard in range(len(self._shards)))
        write_json(self._own / _PROGRESS, {
            "of": self._made_of(), "complete": self.complete, "sequences_done": self.sequences_done,
            "n_appended": self._n_appended, "bucket_bytes": [b.stat().st_size if b.exists() else 0 for b in buckets]})
        self._noted = time.monotonic()

    def _bucket(self, shard: int, number: int | None = None) -> Path:
        """The file of a part's rows of a shard; by default this writer's."""
        return self._part_folder(self._part.number if number is None else number) / f"bucket{shard:05d}"

    def _shard_name(self, shard: int) -> str:
        split, number, _ = self._shards[shard]
        return f"{split}/{number:05d}.safetensors"

    def _flush(self) -> None:
        """Append the waiting rows to their buckets."""
        shard_of = self._shard_of[: self._n_waiting]
        order = np.argsort(shard_of)
        shards, starts = np.unique(shard_of[order], return_index=True)
        for shard, rows in zip(shards, np.split(order, starts[1:]), strict=False):  # 0 and 1 if nothing waits
            bucket = self._bucket(int(shard))
            try:
                with open(bucket, "ab") as file:
                    file.write(self._waiting[rows].view(np.uint8))  # type: ignore[arg-type]  # a Buffer from 3.12 on
            except OSError as error:
                raise OSError(f"{bucket} cannot be written: {error.strerror}") from error
            self._unsynced.add(int(shard))
        self._n_waiting = 0

    def _fill(self, shard: dict[str, Tensor], number: int) -> None:
        """Place the rows of a shard's buckets at their slots."""
        arrays = {name: tensor.numpy() for name, tensor in shard.items() if name != "activations"}
        arrays["activations"] = shard["activations"].view(torch.uint8).numpy()
        n_left = len(shard["activations"])
        for bucket in (self._bucket(number, part) for part in range(self._part.of)):
            if not bucket.exists():  # none of the part's rows is in this shard
                continue
            with open(bucket, "rb") as file:
                while len(records := np.fromfile(file, self._record, _CHUNK_ROWS)):
                    for name, array in arrays.items():
                        array[records["slot"]] = records[name]
                    n_left -= len(records)
        assert n_left == 0, "the buckets of a shard do not have its rows"

    def _check_tokens(self, shard: dict[str, Tensor], split: str, tokens: Tensor) -> None:
        """Raise ValueError unless every row's token stands in ``tokens`` where the row says."""
        sequences, positions = shard["sequences"].long(), shard["positions"].long()
        inside = (sequences >= 0) & (sequences < tokens.shape[0]) & (positions >= 0) & (positions < tokens.shape[1])
        if not inside.all() or not torch.equal(tokens[sequences, positions].int(), shard["token_ids"]):
            raise ValueError(f"split {split!r}: a row's token is not where its sequence and position say; append the "
                             "tokens that the activations were computed from")

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write a file for good and return its entry in the manifest."""
        with replacing(self._partial / name) as temporary:
            save_file(tensors, temporary)
        return self._entry(name, tensors)

    def _entry(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        path = self._partial / name
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": name, "rows": len(next(iter(tensors.values()))), "bytes": path.stat().st_size, "sha256": sha256}

    def _publish(self) -> Path:
        final = self.root / self.cache_id
        for part in self._partial.glob("part*of*"):  # also an interrupted harvest's by another number of processes
            shutil.rmtree(part)
        sync_folder(self._partial)
        try:
            os.rename(self._partial, final)
        except OSError:
            if not (final / MANIFEST).exists():
                raise
            shutil.rmtree(self._partial)
        sync_folder(self.root)
        return final
