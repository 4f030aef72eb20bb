"""A cache that lies elsewhere: read through fsspec and a bounded local copy, it is the same cache."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem

from sae_zoo import train
from sae_zoo.data import remote
from sae_zoo.data.cache import open_cache
from sae_zoo.data.copies import Copies
from sae_zoo.data.remote import RemoteFolder
from sae_zoo.records import read_record
from tests.data.test_cache import DAMAGE, harvest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return harvest(tmp_path_factory.mktemp("cache"), n_rows={"train": 157, "validation": 23, "test": 8})[0]


@pytest.fixture
def bucket(local):
    """URL of the same cache in fsspec's memory, where a test may damage it."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    url = f"memory://bucket/caches/{local.cache_id}"
    for file in local.path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"{url}/{file.relative_to(local.path).as_posix()}", file.read_bytes())
    yield url
    memory.store.clear()


@pytest.fixture
def fetched(monkeypatch):
    """Ranges that were asked for, as (name of the file, start, stop), headers excepted."""
    asked, honest = [], RemoteFolder.ranges

    def ranges(self, names, starts, stops):
        asked.extend(zip(names, starts, stops, strict=True))
        return honest(self, names, starts, stops)

    monkeypatch.setattr(RemoteFolder, "ranges", ranges)
    return asked


def open_remote(url, folder, max_bytes=10**6):
    return open_cache(RemoteFolder(url, Copies(folder, max_bytes)))


def size(folder):
    return sum(f.stat().st_size for f in folder.iterdir() if f.name != ".lock")


class AsyncMemory(AsyncFileSystemWrapper):
    """fsspec's memory behind the interface of the file systems that go over a network."""

    protocol = "asyncmemory"

    def __init__(self, **kwargs):
        super().__init__(fsspec.filesystem("memory"), asynchronous=False, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("asyncmemory://", "memory://"))


@pytest.mark.parametrize("protocol", ["memory", "asyncmemory"])
def test_a_remote_cache_is_the_local_one(local, bucket, tmp_path, protocol):
    fsspec.register_implementation("asyncmemory", AsyncMemory, clobber=True)
    bucket = bucket.replace("memory", protocol, 1)
    cache = open_remote(bucket, tmp_path)
    assert cache.manifest == local.manifest and cache.data_id == local.data_id and cache.path == bucket
    assert not any(tmp_path.iterdir())  # headers and the manifest are enough to open it
    for split in ("train", "validation", "test"):
        n = local.n_rows(split)
        assert torch.equal(cache.rows(split, 0, n), local.rows(split, 0, n))
        assert torch.equal(cache.rows(split, n // 3, n - 2), local.rows(split, n // 3, n - 2))
        assert all(map(torch.equal, cache.origin(split, 0, n), local.origin(split, 0, n)))
        assert torch.equal(cache.tokens(split), local.tokens(split))
        arguments = {"n_batches": 3 * n // 7, "seed": 1}
        assert all(map(torch.equal, cache.batches(split, 7, **arguments), local.batches(split, 7, **arguments)))
    cache.verify_hashes()
    copies = {f.name for f in tmp_path.iterdir()} - {".lock"}
    assert copies == {entry["sha256"] for entry in local.files()}


def test_opening_and_reading_fetch_no_more_than_they_need(local, bucket, tmp_path, fetched):
    cache = open_remote(bucket, tmp_path)
    assert len(fetched) == 2 * len(local.files()) and max(stop for _, _, stop in fetched) < 1000
    fetched.clear()
    cache.rows("train", 25, 35)
    cache.rows("train", 20, 22)
    (entry,) = (e for e in local.files() if e["file"] == "train/00001.safetensors")
    assert fetched == [("train/00001.safetensors", 0, entry["bytes"])]
    fetched.clear()
    for other in (cache, open_remote(bucket, tmp_path)):  # in this run, and in the next
        fetched.clear()
        other.rows("train", 25, 35)
        assert not [name for name, start, stop in fetched if stop - start == entry["bytes"]]


def test_large_files_come_in_ranges(local, bucket, tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(remote, "_RANGE_BYTES", 100)
    monkeypatch.setattr(remote, "_RANGES_AT_ONCE", 3)
    cache = open_remote(bucket, tmp_path)
    fetched.clear()
    assert torch.equal(cache.rows("test", 0, 8), local.rows("test", 0, 8))
    starts, stops = zip(*[(start, stop) for _, start, stop in fetched], strict=True)
    n_bytes = (local.path / "test/00000.safetensors").stat().st_size
    assert starts == (0, *stops[:-1]) and stops[-1] == n_bytes
    assert max(b - a for a, b in zip(starts, stops, strict=True)) == 100


def test_the_copy_stays_within_its_bound(local, bucket, tmp_path, monkeypatch):
    sizes = []
    honest = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (sizes.append(size(tmp_path)), honest(a, b)))
    largest = max(entry["bytes"] for entry in local.files())
    cache = open_remote(bucket, tmp_path, 2 * largest)
    arguments = {"n_batches": 80, "seed": 0}
    assert all(map(torch.equal, cache.batches("train", 7, **arguments), local.batches("train", 7, **arguments)))
    assert len(sizes) > 20 and largest < max(sizes) <= 2 * largest  # while the newest is there, under another name
    small = open_remote(bucket, tmp_path, largest - 1)
    with pytest.raises(ValueError, match=r"train/0000\d.safetensors has .* GB, but copies may take .*; allow more"):
        list(small.batches("train", 7, **arguments))


CONTENTS = {name: name.encode() * 10 for name in "abcd"}


def open_copy(copies, name, content=None):
    content = CONTENTS[name] if content is None else content
    return copies.open(name, hashlib.sha256(CONTENTS[name]).hexdigest(), len(CONTENTS[name]), lambda: [content])


def names_in(folder):
    return {name for name, content in CONTENTS.items() if (folder / hashlib.sha256(content).hexdigest()).exists()}


def test_the_copy_used_longest_ago_goes_first(tmp_path):
    copies = Copies(tmp_path, 30)
    for name in "abc":
        open_copy(copies, name).close()
    assert names_in(tmp_path) == set("abc")
    open_copy(copies, "a").close()
    for i, name in enumerate("bca"):  # times that no coarse clock can mix up
        os.utime(tmp_path / hashlib.sha256(CONTENTS[name]).hexdigest(), (i, i))
    with open_copy(copies, "b", b"not asked for") as file:
        assert file.read() == CONTENTS["b"]
        with open_copy(copies, "d"):
            assert names_in(tmp_path) == set("abd")
    with open_copy(Copies(tmp_path, 10), "c") as file, open_copy(copies, "c", b"") as again:  # a smaller bound now
        assert names_in(tmp_path) == {"c"} and file.read() == again.read() == CONTENTS["c"]


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"x" + c[1:], lambda c: c + b"x", lambda c: b""])
def test_a_damaged_copy_is_fetched_again(tmp_path, damage):
    open_copy(Copies(tmp_path, 30), "a").close()
    path = tmp_path / hashlib.sha256(CONTENTS["a"]).hexdigest()
    path.write_bytes(damage(CONTENTS["a"]))
    (tmp_path / f"{path.name}.tmp").write_bytes(b"half a file of a process that died")
    with open_copy(Copies(tmp_path, 30), "a") as file:
        assert file.read() == CONTENTS["a"] == path.read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {path.name, ".lock"}


@pytest.mark.parametrize("content", [b"", b"aaaaaaaaa", b"aaaaaaaaab", b"a" * 11])
def test_what_comes_with_other_bytes_never_counts(tmp_path, content):
    with pytest.raises(ValueError, match=r"a came with other bytes than .*manifest says \(\d+ of them, 10 expected\)"):
        open_copy(Copies(tmp_path, 30), "a", content)
    assert {f.name for f in tmp_path.iterdir()} == {".lock"}


def test_names_of_copies_never_leave_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"x has '\.\./x' for its SHA-256; it must be 64 digits"):
        Copies(tmp_path, 30).open("x", "../x", 1, lambda: [b"x"])


READ = """
import sys
from pathlib import Path
from sae_zoo.data.cache import open_cache
from sae_zoo.data.copies import Copies
from sae_zoo.data.remote import RemoteFolder

url, folder, max_bytes = sys.argv[1:]
fetched, honest = [], RemoteFolder.ranges
def ranges(self, names, starts, stops):
    fetched.extend(name for name, start, stop in zip(names, starts, stops) if start == 0 and stop > 8)
    return honest(self, names, starts, stops)
RemoteFolder.ranges = ranges
cache = open_cache(RemoteFolder(url, Copies(folder, int(max_bytes))))
print("ready", flush=True)
sys.stdin.readline()
largest = 0
for batch in cache.batches("train", 7, n_batches=60, seed=0):
    files = [f for f in Path(folder).iterdir() if f.name != ".lock"]
    total = 0
    for f in files:
        try:
            total += f.stat().st_size
        except FileNotFoundError:
            pass
    largest = max(largest, total)
print(float(sum(b.double().sum() for b in cache.batches("train", 7, n_batches=60, seed=0))), len(fetched), largest)
"""


@pytest.mark.parametrize("files_that_fit", [3, 100])
def test_two_processes_share_a_copy(local, tmp_path, files_that_fit):
    largest = max(entry["bytes"] for entry in local.files())
    command = [sys.executable, "-c", READ, local.path.as_uri(), str(tmp_path), str(files_that_fit * largest)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [map(float, process.communicate(timeout=60)[0].split()) for process in both]
        sums, n_fetched, sizes = zip(*told, strict=True)
    finally:
        for process in both:
            process.kill()
            process.wait()
    expected = sum(b.double().sum() for b in local.batches("train", 7, n_batches=60, seed=0))
    assert sums == (float(expected),) * 2
    assert max(sizes) <= files_that_fit * largest
    n_shards = len(local.manifest["splits"]["train"]["shards"])
    if files_that_fit == 100:
        assert sum(n_fetched) == n_shards  # by whichever came first
    else:
        assert sum(n_fetched) > 2 * n_shards


@pytest.mark.parametrize("damage", [name for name, (_, verify, _) in DAMAGE.items() if verify == "sizes"])
def test_a_damaged_remote_cache_gets_one_clear_line(local, tmp_path, damage):
    do, _, message = DAMAGE[damage]
    folder = shutil.copytree(local.path, tmp_path / "there" / local.cache_id)
    open_remote(folder.as_uri(), tmp_path / "copies")
    do(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_remote(folder.as_uri(), tmp_path / "copies")
    assert "\n" not in str(error.value) and folder.as_uri() in str(error.value)
    assert "copy it there again" in str(error.value) or "harvest it first" in str(error.value)


@pytest.mark.parametrize("what", ["bits", "gone", "shorter", "unreachable"])
def test_damage_after_opening_gets_one_clear_line(local, bucket, tmp_path, monkeypatch, what):
    cache = open_remote(bucket, tmp_path)
    file = f"{bucket}/test/00000.safetensors"
    memory = fsspec.filesystem("memory")
    content = memory.cat_file(file)
    if what == "unreachable":
        def refused(*_, **__):
            raise ConnectionError("connection\nrefused")

        monkeypatch.setattr(type(memory), "cat_file", refused)
        message = r"test/00000.safetensors cannot be read \(ConnectionError: connection refused\); look at the address"
    elif what == "gone":
        memory.rm(file)
        message = "test/00000.safetensors is missing"
    else:
        memory.pipe_file(file, content[:-1] if what == "shorter" else content[:-1] + bytes([content[-1] ^ 1]))
        message = "test/00000.safetensors came with other bytes"
    with pytest.raises(ValueError, match=message) as error:
        cache.rows("test", 0, 8)
    assert "\n" not in str(error.value) and {f.name for f in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize("url, message", [
    ("memory://nowhere/x", "memory://nowhere/x is not a cache: it has no manifest.json"),
    ("nonsense://a/b", "nonsense://a/b cannot be read .*Protocol not known: nonsense"),
])
def test_a_bad_address_gets_one_clear_line(url, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        open_remote(url, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol, package", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(protocol, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(ValueError, match=f"{protocol}://b/c needs a package that is not installed here: .*{package}"):
        open_remote(f"{protocol}://b/c", tmp_path)


# ---------------------------------------------------------------------------------------------------- a run, end to end

SMALL = ["data.n_tokens={train: 6000, validation: 2000, test: 2000}", "data.rows_per_shard=1024", "d_sae=128",
         "recipe.n_steps=40", "recipe.batch_size=256", "evaluation.n_lm_tokens=512", "trainer.progress_bar=false",
         "sae=topk", "l0_target=10"]


def test_a_run_trains_from_a_remote_cache(enter, tmp_path):
    at_home, away = tmp_path / "home", tmp_path / "away"
    status, _, err = enter(train, f"output_dir={at_home}", *SMALL)
    assert status == 0, err
    (path,) = (file.parent for file in (at_home / "cache").glob("*/manifest.json"))
    remote_path = [f"output_dir={away}", f"data.remote.path={path.as_uri()}", "data.remote.copy_gb=1e-2"]
    status, _, err = enter(train, *remote_path, *SMALL)
    assert status == 0, err
    (here,), (there,) = (list((root / "runs").rglob("record.json")) for root in (at_home, away))
    assert here.relative_to(at_home) == there.relative_to(away)  # it is the same run
    ours, theirs = read_record(here.parent), read_record(there.parent)
    same = ("config_hash", "cache_id", "fvu", "l0", "delta_lm_loss", "r_l0")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert (here.parent / "sae.safetensors").read_bytes() == (there.parent / "sae.safetensors").read_bytes()
    assert [p.name for p in (away / "cache").iterdir()] == [".copies"]  # nothing was harvested

    for overrides, message in (
        (["data.seed=1"], "is not what this config would harvest: its seed is 0, the config's 1"),
        (["hook.layer=2"], "is not what this config would harvest: its hook is"),
        (["data=online"], "data.remote.path is .* but data is online; choose data=cache"),
        (["data.remote.copy_gb=0"], "data.remote.copy_gb is 0; it must be above 0"),
        (["data.remote.copy_gb=1e-6"], "copies may take 1e-06 GB in all; allow more"),
        (["data.remote.path=5"], "data.remote.path is 5; it must be text or null"),
    ):
        status, _, err = enter(train, "sweep=bad", *remote_path, *SMALL, *overrides)
        *_, last = err.splitlines()
        assert status == 2 and last.startswith("sae_zoo.train: error: ") and re.search(message, last), err
