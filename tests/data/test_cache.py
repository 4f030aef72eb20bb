import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae_zoo.data import cache_writer
from sae_zoo.data.cache import cache_lock, make_cache_id, manifest_digest, open_cache
from sae_zoo.data.cache_writer import CacheWriter, check_disk_space, estimated_bytes
from sae_zoo.data.corpus import SPLITS, PackedTokens

SPECIAL = (0, 1, 2)
N_ROWS = {"train": 157, "validation": 23, "test": 8}


def packed_tokens(n_rows, context_size, seed):
    """Token rows with BOS, some EOS, and padding at the end; exactly ``n_rows`` tokens are not special."""
    rng = np.random.default_rng(seed)
    stream, left = [], n_rows
    while left:
        length = int(min(left, rng.integers(1, 12)))
        stream += [*rng.integers(3, 1000, length), 2]
        left -= length
    stream += [0] * (-len(stream) % (context_size - 1))
    rows = np.pad(np.array(stream, np.int32).reshape(-1, context_size - 1), ((0, 0), (1, 0)), constant_values=1)
    return PackedTokens(torch.from_numpy(rows), SPECIAL, 3, 100)


def harvest(root, *, n_rows=N_ROWS, d_in=5, dtype="float32", rows_per_shard=20, seed=0, chunk=13, context_size=9,
            activations=None, scale=1.0):
    """A cache of random activations; returns it and, for each split, its packed tokens and rows in reading order."""
    packed = {split: packed_tokens(n, context_size, i) for i, (split, n) in enumerate(n_rows.items())}
    generator = torch.Generator().manual_seed(1)
    given_rows = activations or {split: scale * torch.randn(n, d_in, generator=generator)
                                 for split, n in n_rows.items()}
    identity = {"d_in": d_in, "dtype": dtype, "rows_per_shard": rows_per_shard, "seed": seed, "n": dict(n_rows)}
    cache_id = make_cache_id(lm="some/lm", hook="layer 2: mlp", identity=identity)
    with CacheWriter(root, cache_id, identity=identity, d_in=d_in, dtype=dtype, splits=n_rows,
                     rows_per_shard=rows_per_shard, seed=seed) as writer:
        for split, part in packed.items():
            sequences, positions = part.keep.nonzero(as_tuple=True)
            for start in range(0, n_rows[split], chunk):
                rows = slice(start, start + chunk)
                writer.append(split, given_rows[split][rows], part.tokens[part.keep][rows], sequences[rows],
                              positions[rows])
        return writer.finish(packed), packed, given_rows


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return harvest(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copied(built, tmp_path):
    """A copy of the cache that a test may damage."""
    return shutil.copytree(built[0].path, tmp_path / built[0].path.name)


def files_of(path):
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def sorted_rows(rows):
    return sorted(map(tuple, rows.tolist()))


# ----------------------------------------------------------------------------------------------------- write and read


@settings(max_examples=25, deadline=None)
@given(n_train=st.integers(1, 90), n_test=st.integers(1, 12), rows_per_shard=st.integers(1, 40),
       chunk=st.integers(1, 100), buffer_rows=st.integers(1, 60), d_in=st.integers(1, 6),
       dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_every_row_is_found_once_with_its_token(tmp_path_factory, n_train, n_test, rows_per_shard, chunk, buffer_rows,
                                                dtype, d_in):
    n_rows = {"train": n_train, "validation": 1, "test": n_test}
    record = 16 + d_in * (4 if dtype == "float32" else 2)
    with pytest.MonkeyPatch.context() as patch:  # buckets are appended to many times, as in a large cache
        patch.setattr(cache_writer, "_BUFFER_BYTES", buffer_rows * record)
        cache, packed, given_rows = harvest(tmp_path_factory.mktemp("c"), n_rows=n_rows, d_in=d_in, dtype=dtype,
                                            rows_per_shard=rows_per_shard, chunk=chunk)
    for split, n in n_rows.items():
        shards = [load_file(cache.path / entry["file"]) for entry in cache.manifest["splits"][split]["shards"]]
        sizes = [len(shard["activations"]) for shard in shards]
        assert sum(sizes) == n == cache.n_rows(split)
        assert set(sizes[:-1]) <= {rows_per_shard} and 0 < sizes[-1] <= rows_per_shard
        # Where each row stands in the text identifies it; through it, back to what was appended.
        sequences = torch.cat([shard["sequences"] for shard in shards])
        positions = torch.cat([shard["positions"] for shard in shards])
        where = {place: i for i, place in enumerate(map(tuple, packed[split].keep.nonzero().tolist()))}
        places = zip(sequences.tolist(), positions.tolist(), strict=True)
        i = torch.tensor([where[place] for place in places])
        assert sorted(i.tolist()) == list(range(n))
        stored = torch.cat([shard["activations"] for shard in shards])
        assert stored.dtype == getattr(torch, dtype)
        assert torch.equal(stored, given_rows[split][i].to(stored.dtype))
        token_ids = torch.cat([shard["token_ids"] for shard in shards])
        assert torch.equal(token_ids, packed[split].tokens[packed[split].keep][i])
        # The reader says the same, through any window.
        assert torch.equal(cache.rows(split, 0, n), stored.float())
        a, b = n // 3, n - n // 4
        assert torch.equal(cache.rows(split, a, b), stored[a:b].float())
        origin = cache.origin(split, a, b)
        assert torch.equal(cache.tokens(split)[origin.sequences, origin.positions], origin.token_ids)
        assert torch.equal(cache.tokens(split), packed[split].tokens)


def test_manifest_states_facts(built):
    cache, packed, given_rows = built
    assert cache.d_in == 5 and cache.data_id == cache.cache_id == cache.path.name
    by_hand = sum(float(value) ** 2 for row in given_rows["train"].tolist() for value in row) / 157
    assert cache.mean_squared_norm == pytest.approx(by_hand, rel=1e-12)
    for split, part in packed.items():
        facts = cache.manifest["splits"][split]
        assert facts["n_rows"] == N_ROWS[split] and facts["n_documents"] == 3
        assert facts["n_special_tokens"] == sum(token in SPECIAL for row in part.tokens.tolist() for token in row)
        for entry in cache.files():
            content = (cache.path / entry["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    sizes = {name: len(content) for name, content in files_of(cache.path).items()}
    assert sorted(sizes) == sorted([entry["file"] for entry in cache.files()] + ["manifest.json"])
    assert cache.n_bytes == sum(sizes.values()) - sizes["manifest.json"]


def test_mean_squared_norm_is_of_the_stored_values_and_exact_at_large_norms(tmp_path):
    cache, _, given_rows = harvest(tmp_path, dtype="bfloat16", scale=1e15)
    stored = given_rows["train"].bfloat16().double().numpy()
    assert cache.mean_squared_norm == pytest.approx((stored**2).sum() / 157, rel=1e-12)


def test_two_builds_give_the_same_bytes_however_rows_arrive(built, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "_BUFFER_BYTES", 500)
    again = harvest(tmp_path, chunk=1)[0]
    assert files_of(again.path) == files_of(built[0].path)


def test_seed_decides_the_order_and_aligns_caches(built, tmp_path):
    cache, _, _ = built
    reversed_rows = {split: torch.arange(n * 2.0).reshape(n, 2) for split, n in N_ROWS.items()}
    other_hook = harvest(tmp_path, d_in=2, activations=reversed_rows)[0]
    other_seed = harvest(tmp_path, seed=1)[0]
    for split, n in N_ROWS.items():
        assert all(map(torch.equal, cache.origin(split, 0, n), other_hook.origin(split, 0, n)))
    assert not torch.equal(cache.origin("train", 0, 157).sequences, other_seed.origin("train", 0, 157).sequences)
    assert sorted_rows(cache.rows("train", 0, 157)) == sorted_rows(other_seed.rows("train", 0, 157))


def test_shards_are_mixtures_of_the_whole_text(built):
    cache = built[0]
    n_sequences = len(cache.tokens("train"))
    sequences = cache.origin("train", 0, 140).sequences.view(7, 20)
    means = sequences.double().mean(dim=1) / n_sequences
    assert max(abs(mean - 0.5) for mean in means.tolist()) < 4 * (1 / 12 / 20) ** 0.5


def test_cache_id_is_readable_safe_and_decided_by_the_identity():
    one = make_cache_id(lm="google/gemma-2-2b", hook="../layer 3:é", identity={"a": 1, "b": 2})
    assert one.startswith("google_gemma-2-2b-layer_3-") and "/" not in one and ":" not in one
    assert one == make_cache_id(lm="google/gemma-2-2b", hook="../layer 3:é", identity={"b": 2, "a": 1})
    assert one != make_cache_id(lm="google/gemma-2-2b", hook="../layer 3:é", identity={"a": 1, "b": 3})


# ------------------------------------------------------------------------------------------------------ what goes wrong


def writer_for(root, *, dtype="float32", **changes):
    identity = {"a": 1}
    arguments = {"identity": identity, "d_in": 2, "dtype": dtype, "splits": dict.fromkeys(SPLITS, 4),
                 "rows_per_shard": 3, "seed": 0, **changes}
    return CacheWriter(root, make_cache_id(lm="m", hook="h", identity=identity), **arguments)


def append_rows(writer, split, n, activations=None):
    column = torch.arange(n)
    writer.append(split, torch.ones(n, 2) if activations is None else activations, column, column, column)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_appended_rows_must_be_finite(tmp_path, bad):
    with writer_for(tmp_path) as writer:
        append_rows(writer, "test", 1)
        rows = torch.full((3, 2), 3.4e38)  # their sum is beyond float32, they are not
        rows[1, 1] = rows[2, 0] = bad
        with pytest.raises(ValueError, match="split 'test': row 2 holds NaN or inf"):
            append_rows(writer, "test", 3, rows)


def test_rows_must_fit_the_dtype(tmp_path):
    with (writer_for(tmp_path, dtype="float16") as writer,
          pytest.raises(ValueError, match="row 0 is too large for float16")):
        append_rows(writer, "train", 2, torch.full((2, 2), 1e5))


def test_a_build_of_bad_rows_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="NaN"), writer_for(tmp_path) as writer:
        append_rows(writer, "train", 4, torch.full((4, 2), float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_row_counts_must_be_as_announced(tmp_path):
    with writer_for(tmp_path) as writer:
        append_rows(writer, "train", 3)
        with pytest.raises(ValueError, match="'train' gets row 5, but 4 were announced"):
            append_rows(writer, "train", 2)
        with pytest.raises(ValueError, match="'train' got 3 of the 4 rows"):
            writer.finish({})
        with pytest.raises(ValueError, match=r"shape \(2, 3\); \(n, d_in = 2\)"):
            append_rows(writer, "train", 2, torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"token_ids have shape \(1,\); \(2,\)"):
            writer.append("train", torch.ones(2, 2), *[torch.ones(1)] * 3)
        with pytest.raises(ValueError, match="'tran' was not announced"):
            append_rows(writer, "tran", 1)


def test_tokens_must_be_those_of_the_text(tmp_path):
    n_rows = dict.fromkeys(SPLITS, 4)
    packed = {split: packed_tokens(4, 9, 0) for split in SPLITS}
    for wrong in ("token", "position"):
        with writer_for(tmp_path / wrong, splits=n_rows) as writer:
            for split, part in packed.items():
                sequences, positions = part.keep.nonzero(as_tuple=True)
                tokens = part.tokens[part.keep].clone()
                if split == "test":
                    if wrong == "token":
                        tokens[2] += 1
                    else:
                        positions[1] = 9
                writer.append(split, torch.ones(4, 2), tokens, sequences, positions)
            with pytest.raises(ValueError, match="split 'test': a row's token is not where"):
                writer.finish(packed)


@pytest.mark.parametrize("changes, message", [
    ({"dtype": "int8"}, "'int8'; choose from float32"),
    ({"rows_per_shard": 0}, "rows_per_shard is 0"),
    ({"d_in": 0}, "d_in is 0"),
    ({"splits": {"train": 1}}, "must be train, validation, test"),
    ({"splits": {"train": 1, "validation": 0, "test": 1}}, "'validation' of the cache has 0 rows"),
    ({"identity": {"a": 2}}, "is not make_cache_id"),
    ({"identity": {"a": (1,)}}, "is not make_cache_id"),
])
def test_writer_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        writer_for(tmp_path, **changes)


def test_leftovers_of_a_crash_are_removed_and_a_finished_cache_is_kept(built, tmp_path):
    first = harvest(tmp_path)[0]
    partial = tmp_path / f".{first.cache_id}.partial"
    (partial / "train").mkdir(parents=True)
    (partial / "bucket00000").write_bytes(b"half a row")
    before = {f: f.stat().st_ino for f in first.path.rglob("*")}
    second = harvest(tmp_path)[0]
    assert {f: f.stat().st_ino for f in second.path.rglob("*")} == before
    assert not partial.exists()
    assert files_of(second.path) == files_of(built[0].path)


def test_disk_space(tmp_path):
    n_bytes = estimated_bytes({"train": 1000, "test": 100}, d_in=10, dtype="bfloat16", rows_per_shard=50)
    assert 1100 * 20 < n_bytes < 1100 * 50
    check_disk_space(tmp_path, n_bytes)
    with pytest.raises(ValueError, match=r"needs 1000000000.00 GB, but only"):
        check_disk_space(tmp_path, 10**18)


def test_the_estimate_is_not_below_the_peak(tmp_path, monkeypatch):
    peak = 0

    def measure(path, missing_ok=False):
        nonlocal peak
        peak = max(peak, sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))
        os_unlink(path)

    os_unlink = os.unlink
    monkeypatch.setattr(cache_writer.Path, "unlink", measure)  # the moment when a shard and its bucket are both there
    n_rows = {"train": 4000, "validation": 300, "test": 300}
    cache = harvest(tmp_path, n_rows=n_rows, d_in=64, rows_per_shard=500, chunk=1000, context_size=64)[0]
    estimate = estimated_bytes(n_rows, d_in=64, dtype="float32", rows_per_shard=500)
    assert cache.n_bytes < peak <= estimate < 1.2 * peak


def replace(file, change):
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


def edit(path, change, *, sign):
    """Change the manifest as an editor, or (``sign``) a writer with a defect, would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["digest"] = manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


# What is done to a whole cache, the check that finds it, and what it says.
DAMAGE = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "sizes", "is not a cache: it has no manifest.json"),
    "not JSON": (lambda p: (p / "manifest.json").write_text("{"), "sizes", "not a JSON object with a format_version"),
    "a list": (lambda p: (p / "manifest.json").write_text("[1]"), "sizes", "not a JSON object with a format_version"),
    "version": (lambda p: edit(p, lambda m: m.update(format_version=1), sign=True), "sizes", "has format version 1"),
    "key": (lambda p: edit(p, lambda m: m.pop("mean_squared_norm"), sign=True), "sizes", "lacks mean_squared_norm"),
    "edited norm": (lambda p: edit(p, lambda m: m.update(mean_squared_norm=1.0), sign=False), "sizes", "was changed"),
    "edited rows": (lambda p: edit(p, lambda m: m["splits"]["test"].update(n_rows=3), sign=False), "sizes", "changed"),
    "shard missing": (lambda p: (p / "train/00003.safetensors").unlink(), "sizes", "00003.safetensors is missing"),
    "truncated": (lambda p: replace(p / "test/00000.safetensors", lambda c: c.pop()), "sizes",
                  r"test/00000.safetensors has \d+ bytes, the manifest says \d+"),
    "wrong width": (lambda p: edit(p, lambda m: m.update(d_in=6), sign=True), "sizes", "does not hold the tensors"),
    "wrong type": (lambda p: edit(p, lambda m: m.update(dtype="float16"), sign=True), "sizes", "does not hold"),
    "garbage": (lambda p: (p / "train/00000.safetensors").write_bytes(
        b"\xff" * (p / "train/00000.safetensors").stat().st_size), "sizes", "does not hold the tensors"),
    "shard renamed": (lambda p: os.replace(p / "train/00001.safetensors", p / "train/00000.safetensors"), "sizes",
                       "train/00001.safetensors is missing"),
    "a bit": (lambda p: replace(p / "train/00002.safetensors", lambda c: c.__setitem__(-3, c[-3] ^ 4)), "hashes",
              "SHA-256 of train/00002.safetensors"),
    "a token": (lambda p: replace(p / "tokens/test.safetensors", lambda c: c.__setitem__(-1, 7)), "hashes",
                "SHA-256 of tokens/test.safetensors"),
    "another shard": (lambda p: shutil.copy(p / "train/00001.safetensors", p / "train/00000.safetensors"), "hashes",
                      "SHA-256 of train/00000.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_gets_one_clear_line(copied, damage):
    do, verify, message = DAMAGE[damage]
    open_cache(copied, verify="hashes")
    do(copied)
    if verify == "hashes":
        open_cache(copied, verify="sizes")  # only a full read shows it
    with pytest.raises(ValueError, match=message) as error:
        open_cache(copied, verify=verify)
    assert "\n" not in str(error.value) and str(copied) in str(error.value)
    assert "delete the folder" in str(error.value) or "harvest it first" in str(error.value)


def test_a_renamed_cache_is_refused(copied):
    moved = copied.rename(copied.with_name("other"))
    with pytest.raises(ValueError, match="calls itself some_lm"):
        open_cache(moved)
    with pytest.raises(ValueError, match="'full'; it must be 'sizes' or 'hashes'"):
        open_cache(moved, verify="full")


def test_a_shard_that_shrinks_while_it_is_in_use_is_an_error(copied):
    cache = open_cache(copied)
    batches = cache.batches("train", 20, n_batches=9, seed=0)
    for shard in (copied / "train").iterdir():
        os.truncate(shard, 200)
        shard.write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=r"ends too early|cannot be read"):
        list(batches)


def test_bad_requests(built):
    cache = built[0]
    for start, stop in ((-1, 2), (3, 2), (150, 158)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} of train were asked for; it has 157"):
            cache.rows("train", start, stop)
    with pytest.raises(ValueError, match="split 'dev' is not in"):
        cache.n_rows("dev")
    assert cache.rows("train", 157, 157).shape == (0, 5)


# -------------------------------------------------------------------------------------------------------------- batches


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 157), seed=st.integers(0, 5), data=st.data())
def test_a_batch_is_a_pure_function_of_the_step(built, batch_size, seed, data):
    cache = built[0]
    n_batches = 157 * 3 // batch_size
    whole = list(cache.batches("train", batch_size, n_batches=n_batches, seed=seed))
    assert len(whole) == n_batches and all(batch.shape == (batch_size, 5) for batch in whole)
    batches = cache.batches("train", batch_size, n_batches=n_batches, seed=seed)
    for step in data.draw(st.lists(st.integers(0, n_batches - 1), max_size=8)):  # also back, also far
        batches.step = step
        assert torch.equal(next(iter(batches)), whole[step]) and batches.step == step + 1


@pytest.mark.parametrize("start", [0, 1, 7, 15, 16])
def test_resuming_midway_reads_on(built, start):
    arguments = {"n_batches": 16, "seed": 3}
    whole = list(built[0].batches("train", 50, **arguments))
    resumed = built[0].batches("train", 50, start=start, **arguments)
    assert len(resumed) == 16 and resumed.step == start
    rest = list(resumed)
    assert len(rest) == 16 - start and all(map(torch.equal, rest, whole[start:]))
    assert list(resumed) == []  # it is used up, and says so by its step
    resumed.step = 0
    assert all(map(torch.equal, resumed, whole))


def test_every_pass_has_every_row_once_in_a_new_order(built):
    cache = built[0]
    rows = torch.cat(list(cache.batches("train", 30, n_batches=16, seed=0)))[: 3 * 157]
    passes = rows.split(157)
    stored = cache.rows("train", 0, 157)
    for one in passes:
        assert sorted_rows(one) == sorted_rows(stored)
    assert len({tuple(one[:, 0].tolist()) for one in (stored, *passes)}) == 4
    one_shard = [tuple(batch[:, 0].tolist()) for batch in cache.batches("test", 8, n_batches=4, seed=0)]
    assert len(set(one_shard)) == 4 and len(set(map(frozenset, one_shard))) == 1
    other = torch.cat(list(cache.batches("train", 30, n_batches=16, seed=1)))
    assert not torch.equal(rows[:30], other[:30])


@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_of_ranks_make_the_global_batch(built, world_size):
    arguments = {"n_batches": 14, "seed": 5}
    ranks = [built[0].batches("train", 36, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
    for parts, whole in zip(zip(*ranks, strict=True), built[0].batches("train", 36, **arguments), strict=True):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_batches_come_in_the_type_that_is_stored(tmp_path, dtype):
    cache = harvest(tmp_path, dtype=dtype)[0]
    (batch,) = cache.batches("train", 157, n_batches=1, seed=0)
    assert batch.dtype == getattr(torch, dtype)
    assert sorted_rows(batch) == sorted_rows(cache.rows("train", 0, 157))


def test_batches_that_were_given_are_not_overwritten(built):
    batches = iter(built[0].batches("train", 40, n_batches=12, seed=0))
    first = next(batches)
    kept = first.clone()
    for _ in batches:
        pass
    assert torch.equal(first, kept)


@pytest.mark.parametrize("arguments, message", [
    ({"batch_size": 158}, "batch_size is 158, but train of .* has only 157 rows"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"start": 4}, "start is 4; it must be from 0 to the number of batches, 3"),
    ({"rank": 2, "world_size": 2}, "rank is 2"),
    ({"world_size": 3}, "batch_size is 10; it must be a multiple of the 3"),
])
def test_bad_batches(built, arguments, message):
    with pytest.raises(ValueError, match=message):
        built[0].batches("train", **{"batch_size": 10, "n_batches": 3, "seed": 0, **arguments})


# --------------------------------------------------------------------------------------------------- memory, processes

MEASURE = """
import sys, numpy as np, torch
from sae_zoo.data import cache_writer
from sae_zoo.data.cache import make_cache_id
from sae_zoo.data.permutation import Permutation
from sae_zoo.data.corpus import SPLITS, PackedTokens

def peak_megabytes():
    return int([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]) / 1024

torch.set_num_threads(1)
cache_writer._BUFFER_BYTES = 1 << 21
tokens = PackedTokens(torch.ones(24, 1024, dtype=torch.int32), (), 1, 1)
n_rows = dict.fromkeys(SPLITS, 24 * 1024)
Permutation(2, 0)(np.arange(2))  # loads the compiler, once
writer = cache_writer.CacheWriter(sys.argv[1], make_cache_id(lm="m", hook="h", identity={}), identity={}, d_in=512,
                                  dtype="float32", splits=n_rows, rows_per_shard=1024, seed=0)
before = peak_megabytes()
for split in SPLITS:
    for sequence in range(24):
        column = torch.arange(1024)
        writer.append(split, torch.randn(1024, 512), torch.ones(1024), torch.full((1024,), sequence), column)
cache = writer.finish(dict.fromkeys(SPLITS, tokens))
for batch in cache.batches("train", 256, n_batches=200, seed=0):
    pass
print(peak_megabytes() - before, cache.n_bytes / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_cache(tmp_path):
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True)
    growth, size = map(float, ran.stdout.split())
    assert size > 140 and growth < 80


HOLD = """
import sys
from sae_zoo.data.cache import cache_lock
with cache_lock(sys.argv[1], "c"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_lock_keeps_a_second_process_waiting(tmp_path, caplog):
    root = tmp_path / "new"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with caplog.at_level("INFO"):
                with cache_lock(root, "another"):
                    assert "waiting" not in caplog.text
                started = time.monotonic()
                timer = threading.Timer(0.3, lambda: process.communicate("go on\n"))
                timer.start()
                with cache_lock(root, "c"):
                    assert time.monotonic() - started >= 0.29
                timer.join()
            assert "another process is building c" in caplog.text
        finally:
            process.kill()
    assert process.returncode == 0
