"""A cache harvested in parts is, read as one, the cache that one harvest makes: the same rows in another order."""

import math
import re

import numpy as np
import pytest
import torch

from sae_zoo.data.cache_parts import Blend, MergedCache, open_cache_or_parts
from sae_zoo.data.copies import Copies
from sae_zoo.data.corpus import TextFilesCorpus
from sae_zoo.data.remote import RemoteFolder
from sae_zoo.functional.norms import squared_norms
from tests.data.parts.spec import HELD_OUT, SPEC
from tests.data.test_cache import harvest as numbered_cache


def test_the_parts_are_the_one_cache_in_another_order(merged, whole):
    """Values differ where documents share a sequence with others than in the one cache; see the next test."""
    assert isinstance(merged, MergedCache) and merged.d_in == whole.d_in == 24
    n = merged.n_rows("train")
    assert n == whole.n_rows("train") > 3 * SPEC["rows_per_shard"]
    ids = [cache.origin("train", 0, n).token_ids for cache in (merged, whole)]
    assert torch.equal(*(part.sort().values for part in ids))
    for split in HELD_OUT:
        count = whole.n_rows(split)
        assert merged.n_rows(split) == count
        assert torch.equal(merged.rows(split, 1, count), whole.rows(split, 1, count))
        assert all(map(torch.equal, merged.origin(split, 0, count), whole.origin(split, 0, count)))
        assert torch.equal(merged.tokens(split), whole.tokens(split))


def test_values_are_those_of_the_one_cache_where_no_sequence_holds_two_documents(make, corpus, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for document in corpus.documents("train", *HELD_OUT):
        content = document.text
        while (len(make.lm.tokenizer(content, add_special_tokens=False)["input_ids"]) + 1) % (SPEC["context_size"] - 1):
            content += " !?"[len(content) % 3]
        (text / document.name).write_text(content)
    aligned = TextFilesCorpus(paths=str(text))
    whole = make(tmp_path / "whole", text=aligned)
    for number in range(3):
        make(tmp_path / "parts", text=aligned, part=[number, 3])
    n = whole.n_rows("train")
    found = []
    for cache in (whole, open_cache_or_parts(tmp_path / "parts")):
        rows, origin, tokens = cache.rows("train", 0, n), cache.origin("train", 0, n), cache.tokens("train")
        at = [(*tokens[s].tolist(), p)
              for s, p in zip(origin.sequences.tolist(), origin.positions.tolist(), strict=True)]
        order = sorted(range(n), key=at.__getitem__)
        found.append(([at[i] for i in order], rows[order]))
    (at, rows), (at_of_parts, rows_of_parts) = found
    assert at == at_of_parts
    torch.testing.assert_close(rows, rows_of_parts, rtol=1e-4, atol=1e-5)  # rounding: other batches of sequences


def test_rows_origins_and_tokens_agree_through_any_window(make, merged):
    n = merged.n_rows("train")
    tokens, origin, rows = merged.tokens("train"), merged.origin("train", 0, n), merged.rows("train", 0, n)
    assert torch.equal(tokens[origin.sequences, origin.positions], origin.token_ids)
    places = set(zip(origin.sequences.tolist(), origin.positions.tolist(), strict=True))
    special = torch.isin(tokens, torch.tensor(merged.manifest["special_ids"]))
    assert len(places) == n and places == set(map(tuple, (~special).nonzero().tolist()))
    states = make.lm.model(tokens.long(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(rows, states[origin.sequences.long(), origin.positions.long()], rtol=1e-4, atol=1e-5)
    edges = [part.n_rows("train") for part in merged.parts]
    for start, stop in ((0, 0), (n, n), (edges[0], edges[0]), (5, edges[0]), (edges[0] - 1, edges[0] + 1),
                        (edges[0], n), (3, n - 3), (edges[0] + edges[1] - 130, edges[0] + edges[1] + 140)):
        assert torch.equal(merged.rows("train", start, stop), rows[start:stop])
        for window, column in zip(merged.origin("train", start, stop), origin, strict=True):
            assert torch.equal(window, column[start:stop]) and window.dtype == torch.int32
    with pytest.raises(ValueError, match=f"rows 0 to {n + 1} of train were asked for; it has {n}"):
        merged.rows("train", 0, n + 1)
    with pytest.raises(ValueError, match=r"split 'tarin' is not in .*; it has train, validation, test"):
        merged.rows("tarin", 0, 1)


def test_a_pass_gives_every_row_once_and_the_next_in_another_order(merged):
    n = merged.n_rows("train")
    stored = merged.rows("train", 0, n)
    batches = list(merged.batches("train", 64, n_batches=2 * n // 64, seed=3))
    stream = torch.cat([*batches, merged.stream("train", 3).read(2 * n // 64 * 64, 2 * n % 64)])
    first, second = stream[:n], stream[n:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(stored.tolist())
    assert not torch.equal(first, second)
    again = list(merged.batches("train", 64, n_batches=2 * n // 64, seed=3, start=9))
    assert all(map(torch.equal, again, batches[9:]))


@pytest.mark.parametrize("rows_per_shard", [1, 5, 12, 40])
def test_every_blend_has_its_share_of_every_part(tmp_path, rows_per_shard):
    n_rows = [4, 2, 31]
    numbers = torch.arange(37.0).split(n_rows)
    parts = [numbered_cache(tmp_path / str(n), n_rows={"train": n, "validation": 1, "test": 1}, d_in=1,
                            rows_per_shard=rows_per_shard, activations={
                                "train": rows[:, None], "validation": torch.ones(1, 1), "test": torch.ones(1, 1)})[0]
             for n, rows in zip(n_rows, numbers, strict=True)]
    merged = MergedCache(parts)
    stored = merged.rows("train", 0, 37).flatten()
    assert stored.sort().values.tolist() == list(range(37))

    n = min(math.ceil(37 / rows_per_shard), 31)
    blends = [Blend.of([part.shards("train", "activations") for part in parts], i, n) for i in range(n)]
    rows_of = []
    for blend in blends:
        rows, backwards = torch.empty(blend.shape), torch.empty(blend.shape)
        blend.read_permuted(rows, np.arange(len(rows)))
        blend.read_permuted(backwards, np.arange(len(rows))[::-1])
        assert torch.equal(rows, backwards.flip(0))
        rows_of.append(rows.flatten().tolist())
        for count, of_part in zip(n_rows, numbers, strict=True):
            assert abs(len(set(of_part.tolist()) & set(rows_of[-1])) - count / n) < 1
        assert 0 < len(rows) < rows_per_shard + len(parts)
    assert sorted(row for rows in rows_of for row in rows) == list(range(37))

    starts = set()
    for seed in range(4):
        stream = merged.stream("train", seed)
        first = stream.read(0, 1).item()
        (start,) = (i for i in range(n) if first in rows_of[i])
        starts.add(start)
        at = 0
        for i in range(2 * n):  # two passes, the second from a blend of its own
            if i == n:
                (start,) = (j for j in range(n) if stream.read(at, 1).item() in rows_of[j])
            expected = rows_of[(start + i) % n]
            assert sorted(stream.read(at, len(expected)).flatten().tolist()) == sorted(expected)
            at += len(expected)
    assert len(starts) > 1 or n <= 2


def test_batches_hold_rows_of_all_parts_as_those_of_one_cache_would(merged):
    """Which part a row is of is seen by its value; a few values are in several."""
    part_of = {tuple(row): number for number, part in enumerate(merged.parts)
               for row in part.rows("train", 0, part.n_rows("train")).tolist()}
    shares = torch.tensor([part.n_rows("train") for part in merged.parts]) / merged.n_rows("train")
    for batch in merged.batches("train", 100, n_batches=merged.n_rows("train") // 100, seed=0):
        counts = torch.bincount(torch.tensor([part_of[tuple(row)] for row in batch.tolist()]), minlength=3)
        assert (counts - 100 * shares).abs().max() < 25  # five standard deviations


def test_a_pass_fetches_a_file_once_with_room_for_two_of_each_part(folder, tmp_path, monkeypatch):
    opened = open_cache_or_parts(RemoteFolder(folder.as_uri(), Copies(
        tmp_path, 6 * max(entry["bytes"] for entry in open_cache_or_parts(folder).files()))))
    fetched, honest = [], RemoteFolder.ranges

    def ranges(self, names, starts, stops):
        fetched.extend(names)
        return honest(self, names, starts, stops)

    monkeypatch.setattr(RemoteFolder, "ranges", ranges)
    n = opened.n_rows("train")
    stream = opened.stream("train", 0)
    rows = torch.cat([stream.read(first, min(64, n - first)) for first in range(0, n, 64)])
    assert sorted(rows.tolist()) == sorted(opened.rows("train", 0, n).tolist())
    fetched.clear()
    for first in range(n, 2 * n, 64):
        stream.read(first, min(64, 2 * n - first))
    n_files = sum(len(part.shards("train", "activations")) for part in opened.parts)
    assert n_files > 15 and n_files - 6 <= len(fetched) <= n_files + 6  # a pass begins in the middle of files


def test_facts_of_all_parts(merged, folder, whole):
    n = merged.n_rows("train")
    assert merged.mean_squared_norm == pytest.approx(float(squared_norms(merged.rows("train", 0, n)).mean()), rel=1e-12)
    assert merged.manifest["identity"] == whole.manifest["identity"]
    train = merged.manifest["splits"]["train"]
    assert train["n_rows"] == n and train["n_documents"] == whole.manifest["splits"]["train"]["n_documents"]
    assert train["n_special_tokens"] == merged.tokens("train").numel() - n
    assert {entry["file"] for entry in merged.files()} == {
        file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
    assert merged.n_bytes == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    merged.verify_hashes()


def test_the_name_says_merged_and_depends_on_the_parts(make, folder, merged, tmp_path):
    assert re.fullmatch("tiny-residual.1-merged3-[0-9a-f]{16}", merged.cache_id)
    assert merged.data_id == merged.cache_id == open_cache_or_parts(folder).cache_id
    for number in range(3):
        make(tmp_path, part=[number, 3], seed=1)
    other = open_cache_or_parts(tmp_path)
    assert other.cache_id != merged.cache_id and other.n_rows("train") == merged.n_rows("train")


# ------------------------------------------------------------------------------------------------- what is not right
