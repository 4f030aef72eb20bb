"""A cache whose writer died, at every moment at which something on the disk changes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo.data import cache_writer
from sae_zoo.data.cache import make_cache_id, open_cache
from sae_zoo.data.cache_writer import CacheWriter, partial_folder
from sae_zoo.data.corpus import SPLITS, PackedTokens

IDENTITY = {"a": 1}
CACHE_ID = make_cache_id(lm="m", hook="h", identity=IDENTITY)
N_ROWS = {"train": 36, "validation": 4, "test": 8}
CONTEXT = 5  # a BOS and four tokens a row


def packed(split):
    tokens = torch.arange(N_ROWS[split] // 4 * CONTEXT, dtype=torch.int32).reshape(-1, CONTEXT) + 3
    tokens[:, 0] = 1
    return PackedTokens(tokens, (0, 1, 2), 1, 100)


def rows_of(split):
    return torch.randn(N_ROWS[split], 3, generator=torch.Generator().manual_seed(len(split)))


def write(root, *, batch=2, splits=N_ROWS):
    """Appends what the writer does not have, ``batch`` rows of tokens at a time; returns the cache and how many rows
    were appended."""
    n_appended, parts = 0, {split: packed(split) for split in SPLITS}
    with CacheWriter(root, CACHE_ID, identity=IDENTITY, d_in=3, dtype="float32", splits=splits, rows_per_shard=16,
                     seed=0) as writer:
        for split in () if writer.complete else SPLITS:
            tokens = parts[split].tokens
            for start in range(writer.sequences_done[split], len(tokens), batch):
                rows = tokens[start : start + batch, 1:]
                n, first = rows.numel(), 4 * start
                sequences = torch.arange(start, start + len(rows)).repeat_interleave(4)
                writer.append(split, rows_of(split)[first : first + n], rows.flatten(), sequences,
                              torch.arange(1, CONTEXT).repeat(len(rows)))
                writer.sequences_appended(split, start + len(rows))
                n_appended += n
        return writer.finish(parts), n_appended


def files_of(path):
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture(autouse=True)
def notes_at_once(monkeypatch):
    monkeypatch.setattr(cache_writer, "_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(cache_writer, "_BUFFER_BYTES", 200)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a process that dies takes nothing with it; hundreds are slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return files_of(write(tmp_path_factory.mktemp("whole"))[0].path)


def dies(root, event):
    """Whether a process that writes dies, without another word, before the ``event``-th change of the disk."""
    child = os.fork()
    if not child:
        left = event

        def counted(change):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return change(*args, **kwargs)
            return call

        try:
            for place, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (Path, "unlink"),
                                (cache_writer, "save_file")):
                setattr(place, name, counted(getattr(place, name)))
            write(root)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_what_the_moments_are(tmp_path):
    """Those that are used below: in the midst of the rows, with nothing but rows; and in the midst of the shards."""
    for event, n_shards in ((25, 0), (57, 1)):
        partial = interrupted(tmp_path / str(event), event)
        assert len(list(partial.glob("train/*.safetensors"))) == n_shards
        assert (partial / "part0of1" / "bucket00002").exists()


def test_a_writer_that_died_anywhere_is_taken_over(tmp_path, expected):
    appended, event = [], 0
    while dies(root := tmp_path / str(event), event):
        if (root / CACHE_ID).exists():
            assert files_of(root / CACHE_ID) == expected
        else:
            cache, n = write(root)
            assert files_of(cache.path) == expected, f"died at event {event}"
            assert [path.name for path in root.iterdir()] == [CACHE_ID]
            appended.append(n)
        event += 1
        shutil.rmtree(root)
    assert event > 60 and appended[0] == sum(N_ROWS.values()) and appended[-1] == 0
    assert len(set(appended)) > 6  # it does not begin again each time


@settings(max_examples=15, deadline=None)
@given(events=st.lists(st.integers(0, 60), min_size=2, max_size=6), batch=st.integers(1, 20))
def test_a_writer_that_died_again_and_again(tmp_path_factory, expected, events, batch):
    root = tmp_path_factory.mktemp("again")
    for event in events:
        if (root / CACHE_ID).exists() or not dies(root, event):
            break
    if not (root / CACHE_ID).exists():
        write(root, batch=batch)  # its rows need not come as before
    assert files_of(root / CACHE_ID) == expected


def interrupted(root, event):
    assert dies(root, event)
    return partial_folder(root, CACHE_ID)


@pytest.mark.parametrize("event", [25, 57], ids=["rows", "shards"])
@pytest.mark.parametrize("spoil", [
    lambda p: (p / "part0of1" / "progress.json").write_text("{"),
    lambda p: (p / "part0of1" / "progress.json").write_text("[1]"),
    lambda p: (p / "part0of1" / "progress.json").write_text(json.dumps({"of": {}, "bucket_bytes": []})),
    lambda p: os.truncate(p / "part0of1" / "bucket00002", 8),
    lambda p: (p / "part0of1" / "bucket00002").unlink(),
], ids=["cut", "list", "other", "short bucket", "no bucket"])
def test_what_cannot_be_used_is_said_and_written_again(tmp_path, expected, spoil, event, caplog):
    spoil(interrupted(tmp_path, event))
    cache, n = write(tmp_path)
    assert n == sum(N_ROWS.values()) and files_of(cache.path) == expected
    assert "cannot be used; starting again" in caplog.text


def test_what_was_left_of_other_row_counts_is_not_used(tmp_path):
    interrupted(tmp_path, 25)
    with CacheWriter(tmp_path, CACHE_ID, identity=IDENTITY, d_in=3, dtype="float32", splits=N_ROWS | {"train": 32},
                     rows_per_shard=16, seed=0) as writer:
        assert writer.sequences_done == dict.fromkeys(SPLITS, 0)


def test_an_interrupt_and_a_full_disk_leave_what_there_is(tmp_path, small_disk, expected):
    disk = small_disk(60_000)
    (disk / "filler").write_bytes(b"0" * 28_000)
    with pytest.raises(
            OSError, match=r"(bucket\d+|progress\.json|safetensors) cannot be written: .*[Nn]o space left") as error:
        write(disk)
    assert "\n" not in str(error.value)
    (disk / "filler").unlink()
    cache, n = write(disk)
    assert n < sum(N_ROWS.values()) and files_of(cache.path) == expected
    open_cache(cache.path, verify="hashes")
