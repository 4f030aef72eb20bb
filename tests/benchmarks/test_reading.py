"""The benchmark of reading, on caches so small that only its bookkeeping is tested, never a time."""

import json
import sys

import pytest
import torch

from benchmarks import reading
from benchmarks.__main__ import main
from benchmarks.reading import _likeness, shuffle_quality, write_synthetic

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux to drop files from memory")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(reading, "_D_IN", 70)
    monkeypatch.setattr(reading, "_CONTEXT", 32)
    monkeypatch.setattr(reading, "_ROWS_PER_SHARD", 300)


def cache_of(folder, n_rows=1600, d_in=70):
    return write_synthetic(folder, n_rows * d_in * 4, "float32", d_in=d_in)[0]


def test_reading(capsys):
    main(["reading", "--gb", "4e-4", "--batch", "128", "--rounds", "2", "--threads", "1", "--json"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [round(cache["bytes"], -4) for cache in result["caches"]] == [400_000, 400_000]
    assert [cache["dtype"] for cache in result["caches"]] == ["float32", "bfloat16"]
    for cache in result["caches"]:
        assert cache["rows"] * 70 * (4 if cache["dtype"] == "float32" else 2) == cache["bytes"]
        assert cache["write_gb_per_s"] > 0 and cache["peak_mb"] >= 0 and 0 <= cache["in_memory_when_cold"] <= 1
        for state in ("cold", "warm"):
            s = cache[state]
            assert s["rows_per_s"] == pytest.approx(cache["rows"] * s["batches_gb_per_s"] * 1e9 / cache["bytes"])
            assert min(s.values()) > 0
    assert "of dd" in out and "perfect shuffle" in out


def test_a_given_cache_is_read_and_kept(capsys, tmp_path):
    cache = cache_of(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(["reading", "--cache", str(cache.path), "--batch", "64", "--rounds", "1", "--json"])
    (only,) = json.loads(capsys.readouterr().out.splitlines()[-1])["caches"]
    assert only["cache_id"] == cache.cache_id and "write_gb_per_s" not in only and sorted(tmp_path.rglob("*")) == before


def test_the_stream_is_a_perfect_shuffle_and_the_text_is_not(tmp_path):
    for name, s in shuffle_quality(cache_of(tmp_path, n_rows=3200), 128).items():
        assert abs(s["ours"] - s["perfect"]) < 5 * s["spread"], name
        assert s["text"] - s["perfect"] > 20 * s["spread"], name


def test_likeness_by_hand():
    rows = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    same = _likeness(rows, torch.tensor([5, 5, 6, 7]), 2)
    assert same == {"same_sequence": 0.5, "neighbour_cosine": pytest.approx(1 / 3), "batch_mean_variance": 2.0}
    mixed = _likeness(rows[[0, 2, 1, 3]], torch.tensor([5, 6, 5, 7]), 2)
    assert mixed == {"same_sequence": 0.0, "neighbour_cosine": pytest.approx(-1.0), "batch_mean_variance": 0.0}


def test_dropped_files_are_seen_to_be_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert reading._in_memory([path]) == 1.0


@pytest.mark.parametrize("arguments, message", [
    (["--gb", "0"], "'0' is no list of gigabytes above 0"),
    (["--gb", "1,a"], "'1,a' is no list of gigabytes above 0"),
    (["--gb", "1e9"], "the activation cache needs"),
    (["--gb", "1", "--cache", "x"], "not allowed with argument"),
    (["--cache", "nowhere"], "nowhere is not a cache"),
])
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["reading", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
