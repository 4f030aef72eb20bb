"""``python -m benchmarks reading [--cache DIR | --gb N,N]``: what reading batches costs beside reading files.

A round reads every training shard three times, with the files out of the system's page cache and then in it: by ``dd``,
by plain reads into one buffer of a shard's size, and as the shuffled float32 batches that training gets. Bytes are
those of the activations as stored; seconds of CPU, which a busy machine changes less than the clock's, are this
process's. Without ``--cache`` caches of the given sizes are written, by the same writer as a harvest's, and deleted in
the end; how fast that went is shown too.

Whether the batches are well shuffled is measured on the first pass, against perfect shuffles of the same rows and
against the order of the text.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import align
from sae_zoo.data.activations import Batches
from sae_zoo.data.cache import Cache, make_cache_id, open_cache
from sae_zoo.data.cache_writer import CacheWriter, check_disk_space, estimated_bytes
from sae_zoo.data.corpus import SPLITS, PackedTokens
from sae_zoo.data.shards import ShardStream
from sae_zoo.process import keep_freed_memory

_D_IN, _CONTEXT, _ROWS_PER_SHARD = 3584, 1024, 65536  # Gemma 2 9B's residual stream
_SEED = 0
_DIMENSIONS = 64  # rows are looked at in a random projection, so that a whole pass of them fits into memory
_PERFECT = 20  # perfect shuffles


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = [0.0]
    if not all(0 < size < math.inf for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of gigabytes above 0")
    return sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cache", metavar="DIR", help="the folder of a finished cache")
    what.add_argument("--gb", type=_sizes, default=[1.0], metavar="N,N,...", help="sizes of caches to write, 1e9 bytes")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.cache is not None:
        results = [_measure(open_cache(args.cache), args.batch, args.rounds)]
    else:
        results = []
        for gb in args.gb:
            for dtype in ("float32", "bfloat16"):
                with tempfile.TemporaryDirectory() as folder:
                    cache, seconds = write_synthetic(Path(folder), gb * 1e9, dtype, d_in=_D_IN)
                    written = {"write_gb_per_s": _train_bytes(cache) / 1e9 / seconds}
                    results.append({**_measure(cache, args.batch, args.rounds), **written})
    _show(results)
    return {"batch": args.batch, "rounds": args.rounds, "threads": torch.get_num_threads(), "caches": results}


def write_synthetic(root: Path, n_bytes: float, dtype: str, *, d_in: int) -> tuple[Cache, float]:
    """A cache of ``n_bytes`` of training rows that are alike within a sequence, and the seconds that writing it took.

    Raises:
        ValueError: if the disk is too small.
    """
    row_bytes = d_in * (4 if dtype == "float32" else 2)
    n_sequences = {"train": max(1, round(n_bytes / row_bytes / _CONTEXT)), "validation": 1, "test": 1}
    n_rows = {split: n * _CONTEXT for split, n in n_sequences.items()}
    check_disk_space(root, estimated_bytes(n_rows, d_in=d_in, dtype=dtype, rows_per_shard=_ROWS_PER_SHARD))
    packed = {split: PackedTokens(torch.ones(n, _CONTEXT, dtype=torch.int32), (), 1, n * _CONTEXT)
              for split, n in n_sequences.items()}
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(_CONTEXT, d_in, generator=generator)
    positions, tokens = torch.arange(_CONTEXT), torch.ones(_CONTEXT, dtype=torch.int32)
    identity = {"synthetic": n_rows, "d_in": d_in, "dtype": dtype}
    seconds = 0.0
    with CacheWriter(root, make_cache_id(lm="synthetic", hook=dtype, identity=identity), identity=identity, d_in=d_in,
                     dtype=dtype, splits=n_rows, rows_per_shard=_ROWS_PER_SHARD, seed=_SEED) as writer:
        for split in SPLITS:
            for i in range(n_sequences[split]):
                rows = noise + torch.randn(d_in, generator=generator)
                started = time.perf_counter()
                writer.append(split, rows, tokens, torch.full((_CONTEXT,), i), positions)
                seconds += time.perf_counter() - started
        started = time.perf_counter()
        cache = writer.finish(packed)
        return cache, seconds + time.perf_counter() - started


def _train_bytes(cache: Cache) -> int:
    return sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in cache.shards("train", "activations"))


def _shard_paths(cache: Cache) -> list[Path]:
    return [cache.path / shard["file"] for shard in cache.manifest["splits"]["train"]["shards"]]


# Three ways of reading all training shards.


def _read_by_dd(cache: Cache) -> None:
    for path in _shard_paths(cache):
        subprocess.run(["dd", f"if={path}", f"of={os.devnull}", "bs=1M"], check=True, stderr=subprocess.DEVNULL)


class _Buffer:
    def __init__(self, cache: Cache):
        self._shards = cache.shards("train", "activations")
        self._memory = torch.empty(self._shards[0].shape, dtype=self._shards[0].dtype)

    def read(self) -> None:
        for shard in self._shards:
            shard.read_into(self._memory[: shard.shape[0]])


class _Stream:
    """Pass after pass of a stream. Each finds its first shard read ahead, and ends when that of the next has been read,
    so that it reads as many as it gives.
    """

    def __init__(self, cache: Cache, batch: int):
        self._stream, self._batch, self._n_rows = cache.stream("train", _SEED), batch, cache.n_rows("train")
        self._pass = 0

    def read(self) -> None:
        for first in range(0, self._n_rows, self._batch):
            self._stream.read(self._pass * self._n_rows + first, min(self._batch, self._n_rows - first))
        for loading in self._stream._loading.values():
            loading.result()
        self._pass += 1


def _forget(paths: list[Path]) -> None:
    """Ask the system to drop files from its page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_memory(paths: list[Path]) -> float:
    """Share of some places spread over files that the system can read without its disk."""
    found = []
    for path in paths:
        with open(path, "rb") as file:
            for place in np.linspace(0, path.stat().st_size - 1, 16).astype(int):
                try:
                    found.append(os.preadv(file.fileno(), [bytearray(1)], int(place), os.RWF_NOWAIT) == 1)
                except BlockingIOError:
                    found.append(False)
    return statistics.mean(found)


def _measure(cache: Cache, batch: int, rounds: int) -> dict[str, Any]:
    paths, n_bytes = _shard_paths(cache), _train_bytes(cache)
    # The memory of the latter two is made, and written to, before the clock runs, as in a run of many passes.
    readers = {"dd": lambda: _read_by_dd(cache), "buffer": _Buffer(cache).read, "batches": _Stream(cache, batch).read}
    for read in readers.values():
        read()
    seconds, of_cpu = ({(state, name): [] for state in ("cold", "warm") for name in readers} for _ in range(2))
    left = []
    for i in range(rounds):
        for name in sorted(readers, key=lambda name: (list(readers).index(name) + i) % len(readers)):
            _forget(paths)
            left.append(_in_memory(paths))
            for state in ("cold", "warm"):
                started, cpu = time.perf_counter(), time.process_time()
                readers[name]()
                seconds[state, name].append(time.perf_counter() - started)
                of_cpu[state, name].append(time.process_time() - cpu)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    result: dict[str, Any] = {
        "cache_id": cache.cache_id, "dtype": cache.manifest["dtype"], "d_in": cache.d_in, "bytes": n_bytes,
        "rows": cache.n_rows("train"), "in_memory_when_cold": statistics.mean(left),
        "peak_mb": _peak_of_a_pass(cache, batch), "shuffle": shuffle_quality(cache, batch)}
    for state in ("cold", "warm"):
        raw = {name: [raw / ours for raw, ours in zip(seconds[state, name], seconds[state, "batches"], strict=True)]
               for name in ("dd", "buffer")}
        result[state] = {
            **{f"{name}_gb_per_s": n_bytes / 1e9 / medians[state, name] for name in readers},
            **{f"{name}_cpu_s_per_gb": statistics.median(of_cpu[state, name]) * 1e9 / n_bytes
               for name in ("buffer", "batches")},
            "rows_per_s": cache.n_rows("train") / medians[state, "batches"],
            **{f"ratio_to_{name}": statistics.median(ratios) for name, ratios in raw.items()}}
    return result


def _peak_of_a_pass(cache: Cache, batch: int) -> float | None:
    """Megabytes that a pass adds to the peak memory of a process of its own; None where the system does not say."""
    if not Path("/proc/self/status").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (cache.path, batch))


def _growth(path: Path, batch: int) -> float:
    def peak() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    keep_freed_memory()
    cache = open_cache(path)
    before = peak()
    _Stream(cache, batch).read()
    return peak() - before


# Shuffle quality.


def shuffle_quality(cache: Cache, batch: int) -> dict[str, dict[str, float]]:
    """Three measures of how alike the rows of a batch are, over a pass; see :func:`_likeness`.

    Returns:
        For each measure: ``ours``, ``text`` (the order of the text), ``perfect`` and ``spread`` (mean and standard
        deviation over perfect shuffles).
    """
    generator = torch.Generator().manual_seed(_SEED)
    projection = torch.randn(cache.d_in, _DIMENSIONS, generator=generator) if cache.d_in > _DIMENSIONS else None
    n_batches = cache.n_rows("train") // batch
    rows = torch.cat([x.float() if projection is None else x.float() @ projection
                      for x in cache.batches("train", batch, n_batches=n_batches, seed=_SEED)])
    # Read in the same order: the permutation of a shard depends on its number of rows alone.
    columns = [torch.cat(list(Batches(ShardStream([shard._replace(shape=(*shard.shape, 1)) for shard in
                                                   cache.shards("train", name)], _SEED), batch,
                                      n_batches=n_batches))).squeeze(1).long()
               for name in ("sequences", "positions")]
    rows -= rows.mean(dim=0)
    sequences = columns[0]
    text = torch.argsort(sequences * (int(columns[1].max()) + 1) + columns[1])
    ours = _likeness(rows, sequences, batch)
    in_text = _likeness(rows[text], sequences[text], batch)
    perfect = []
    for _ in range(_PERFECT):
        order = torch.randperm(len(rows), generator=generator)
        perfect.append(_likeness(rows[order], sequences[order], batch))
    return {name: {"ours": ours[name], "perfect": statistics.mean(values), "spread": statistics.stdev(values),
                   "text": in_text[name]} for name in ours for values in [[one[name] for one in perfect]]}


def _likeness(rows: Tensor, sequences: Tensor, batch: int) -> dict[str, float]:
    """How alike the rows of a batch are, when batches are taken in order.

    Args:
        rows: [n, d], their mean 0; n a multiple of ``batch``.
        sequences: [n], the sequence of the text that each row comes from.

    Returns:
        ``same_sequence``: share of the pairs of a batch that come from one sequence. ``neighbour_cosine``: mean cosine
        of neighbours. ``batch_mean_variance``: of batch means, as a multiple of that of means of independent rows.
    """
    pairs = sum(int((counts * (counts - 1)).sum()) for part in sequences.split(batch)
                for counts in [torch.bincount(part)])
    cosines = torch.cosine_similarity(rows[:-1], rows[1:])
    means = torch.stack([part.mean(dim=0) for part in rows.split(batch)])
    variance = float(rows.square().sum(dim=1).mean())
    return {"same_sequence": pairs / (len(rows) // batch) / (batch * (batch - 1)),
            "neighbour_cosine": float(cosines.mean()),
            "batch_mean_variance": float(means.square().sum(dim=1).mean()) * batch / variance}


def _show(results: list[dict[str, Any]]) -> None:
    table = [["GB", "dtype", "files", "dd GB/s", "buffer", "batches", "rows/s", "of dd", "of buffer", "CPU s/GB buffer",
              "batches", "peak MB", "written GB/s"]]
    for r in results:
        for state in ("cold", "warm"):
            s = r[state]
            table.append([f"{r['bytes'] / 1e9:.2f}", r["dtype"], state, *(f"{s[f'{name}_gb_per_s']:.2f}" for name in
                                                                         ("dd", "buffer", "batches")),
                          f"{s['rows_per_s']:,.0f}", f"{s['ratio_to_dd']:.2f}", f"{s['ratio_to_buffer']:.2f}",
                          f"{s['buffer_cpu_s_per_gb']:.2f}", f"{s['batches_cpu_s_per_gb']:.2f}",
                          "-" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}",
                          f"{r['write_gb_per_s']:.2f}" if "write_gb_per_s" in r else "-"])
    print(align(table))
    for r in results:
        if r["in_memory_when_cold"] > 0.05:
            print(f"{r['cache_id']}: the system kept {r['in_memory_when_cold']:.0%} of the files in memory when it was "
                  "asked to drop them; cold is no measure of the disk")
    table = [["cache", "measure", "ours", "perfect shuffle", "order of the text"]]
    for r in results:
        for name, s in r["shuffle"].items():
            table.append([r["cache_id"], name, f"{s['ours']:.3g}", f"{s['perfect']:.3g} ± {s['spread']:.2g}",
                          f"{s['text']:.3g}"])
    print(f"\n{align(table)}")
