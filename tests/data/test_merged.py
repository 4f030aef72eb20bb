"""A cache harvested in parts is, read as one, the cache that one harvest makes: the same rows in another order."""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import fsspec
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_zoo import evaluate, train
from sae_zoo import harvest as harvest_entry_point
from sae_zoo.config import build_harvest_spec, compose_config, config_hash
from sae_zoo.data.activations import summed_squares
from sae_zoo.data.cache import make_cache_id, manifest_digest, open_cache
from sae_zoo.data.copies import Copies
from sae_zoo.data.corpus import TextFilesCorpus, dealt_to, split_of
from sae_zoo.data.finished import open_finished
from sae_zoo.data.folders import LocalFolder
from sae_zoo.data.harvesting import HarvestSpec, harvest, identity_of
from sae_zoo.data.merged import Blend, MergedCache, open_cache_or_parts
from sae_zoo.data.remote import RemoteFolder
from sae_zoo.lm.hooks import resolve_hook
from sae_zoo.records import read_record
from tests.data.test_cache import harvest as numbered_cache

SPEC = {"context_size": 16, "n_tokens": {"train": 100_000, "validation": 60, "test": 60}, "dtype": "float32",
        "rows_per_shard": 128, "seed": 0}
HELD_OUT = ("validation", "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"{i}: " + " ".join(f"word{(i * j) % 17} is {j}" for j in range(12)))
    return TextFilesCorpus(paths=str(folder))


@pytest.fixture(scope="module")
def make(corpus, tiny_gemma2, tmp_path_factory):
    """Harvests residual.1 of a tiny Gemma 2 into a folder; what is asked for overrides ``SPEC``."""
    lm = tiny_gemma2(corpus.root, tmp_path_factory.mktemp("lm"))
    hook = resolve_hook(lm.model, "auto", 1, "residual")

    def make(root, lm_name="tiny", text=corpus, **values):
        return harvest(lm, lm_name, [hook], text, HarvestSpec(**SPEC | values), root=root, batch_size=4,
                       progress_bar=False)[hook.name]

    make.lm, make.hook, make.finished = lm, hook, partial(open_finished, lm=lm, hook=hook, corpus=corpus)
    return make


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    """Of all three parts."""
    root = tmp_path_factory.mktemp("parts")
    for number in (2, 0, 1):
        make(root, part=[number, 3])
    return root


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the three parts that a test may change."""
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture(params=["local", "memory"])
def merged(request, folder, tmp_path):
    if request.param == "local":
        yield open_cache_or_parts(folder)
        return
    memory = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"memory://bucket/parts/{file.relative_to(folder).as_posix()}", file.read_bytes())
    yield open_cache_or_parts(RemoteFolder("memory://bucket/parts", Copies(tmp_path / "copies", 10**7)))
    memory.store.clear()


def documents_of(cache, split, tokenizer):
    """Texts that the token table of a split is made of."""
    documents, current = [], []
    for token in cache.tokens(split)[:, 1:].flatten().tolist():  # without BOS
        if token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert not current  # the last one ends, too
    return [text for text in documents if text]


# ------------------------------------------------------------------------------------------------- who harvests what


def test_every_train_document_is_in_one_part_and_held_out_ones_are_in_all(make, corpus, whole, folder):
    parts = open_cache_or_parts(folder).parts
    tokenizer = make.lm.tokenizer
    texts = [Counter(documents_of(part, "train", tokenizer)) for part in parts]
    assert sum(texts, Counter()) == Counter(documents_of(whole, "train", tokenizer))
    assert sum(texts, Counter()) == Counter(document.text for document in corpus.documents("train"))
    assert all(texts)
    for number, part in enumerate(parts):
        assert part.manifest["identity"] == {**whole.manifest["identity"], "part": [number, 3]}
        for split in HELD_OUT:
            assert torch.equal(part.tokens(split), whole.tokens(split))
            assert torch.equal(part.rows(split, 0, part.n_rows(split)), whole.rows(split, 0, whole.n_rows(split)))


def test_documents_are_dealt_evenly_and_whatever_their_split():
    names = [f"folder/{i}.py" for i in range(20_000)]
    counts = Counter((split_of(name), dealt_to(name, 8)) for name in names)
    for split, share in {"train": 0.9, "validation": 0.05, "test": 0.05}.items():
        expected = share * len(names) / 8
        for number in range(8):
            assert abs(counts[split, number] - expected) < 5 * expected**0.5


def test_a_part_has_its_share_of_the_tokens_rounded_up(make, tmp_path):
    n_tokens = {**SPEC["n_tokens"], "train": 401}
    assert make(tmp_path, part=[1, 4], n_tokens=n_tokens).n_rows("train") == 101
    assert make(tmp_path, part=[0, 1], n_tokens=n_tokens).n_rows("train") == 401


def test_caches_keep_their_names_and_runs_their_hashes(make):
    """The name is that of a cache which was made before there were parts."""
    old = {"lm": "8922a27e6609dfda56a69b55fe47aaec682c76f7a5f40d512c49868a973b8c8b",
           "corpus": "e8d1f8f5a3625168909b1931e0f576b9c1d3207394a215c5b52798e950e95dd8"}
    cfg = compose_config("train", ["data.n_tokens={train: 800000, validation: 60000, test: 100000}",
                                   "data.dtype=float32", "data.rows_per_shard=65536", "data.seed=0",
                                   "lm.context_size=256"])
    hook = replace(make.hook, layer=3, module="model.layers.3")
    lm = replace(make.lm, fingerprint=old["lm"])
    names = [make_cache_id(lm="builtin", hook="residual.3", identity=identity_of(lm, hook, old["corpus"], spec))
             for spec in (build_harvest_spec(cfg), replace(build_harvest_spec(cfg), part=[0, 2]))]
    assert names[0] == "builtin-residual.3-3e2d936fac94516f" != names[1]

    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert resolved["data"].pop("part", 0) is None
    without = config_hash(resolved)
    for part, same in ((None, True), ([0, 2], False)):
        assert (config_hash({**resolved, "data": {**resolved["data"], "part": part}}) == without) is same


@pytest.mark.parametrize("part, message", [
    ("5", "data.part is 5; it must be a list of a whole number or null"),
    ("[0,x]", r"data.part is \[0, 'x'\]; it must be a list of a whole number or null"),
    ("[1]", r"data.part is \[1\]; it must be \[number, of\], with a number from 0 to of - 1"),
    ("[0,1,2]", r"data.part is \[0, 1, 2\]; it must be \[number, of\]"),
    ("[2,2]", r"data.part is \[2, 2\]; it must be \[number, of\]"),
    ("[-1,2]", r"data.part is \[-1, 2\]; it must be \[number, of\]"),
    ("[0,0]", r"data.part is \[0, 0\]; it must be \[number, of\]"),
    ("[0,2] online", r"data.part is \[0, 2\], but data is online, which stores no training rows; choose"),
])
def test_a_bad_part_gets_one_line(part, message):
    part, *online = part.split()
    cfg = compose_config("harvest", [*(f"data={name}" for name in online), f"data.part={part}"])
    with pytest.raises(ValueError, match=message) as error:
        build_harvest_spec(cfg)
    assert "\n" not in str(error.value)


def test_a_bad_part_ends_the_command(enter, tmp_path):
    status, _, err = enter(harvest_entry_point, f"output_dir={tmp_path}", "data.part=[2,2]")
    *_, last = err.splitlines()
    assert status == 2 and last.startswith("sae_zoo.harvest: error: data.part is [2, 2]; it must be"), err
    assert not list(tmp_path.glob("cache/*"))


# ------------------------------------------------------------------------------------------------------- read as one


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
        at = [(*tokens[s].tolist(), p) for s, p in zip(origin.sequences.tolist(), origin.positions.tolist())]
        order = sorted(range(n), key=at.__getitem__)
        found.append(([at[i] for i in order], rows[order]))
    (at, rows), (at_of_parts, rows_of_parts) = found
    assert at == at_of_parts
    torch.testing.assert_close(rows, rows_of_parts, rtol=1e-4, atol=1e-5)  # rounding: other batches of sequences


def test_rows_origins_and_tokens_agree_through_any_window(make, merged):
    n = merged.n_rows("train")
    tokens, origin, rows = merged.tokens("train"), merged.origin("train", 0, n), merged.rows("train", 0, n)
    assert torch.equal(tokens[origin.sequences, origin.positions], origin.token_ids)
    places = set(zip(origin.sequences.tolist(), origin.positions.tolist()))
    special = torch.isin(tokens, torch.tensor(merged.manifest["special_ids"]))
    assert len(places) == n and places == set(map(tuple, (~special).nonzero().tolist()))
    states = make.lm.model(tokens.long(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(rows, states[origin.sequences.long(), origin.positions.long()], rtol=1e-4, atol=1e-5)
    edges = [part.n_rows("train") for part in merged.parts]
    for start, stop in ((0, 0), (n, n), (edges[0], edges[0]), (5, edges[0]), (edges[0] - 1, edges[0] + 1),
                        (edges[0], n), (3, n - 3), (edges[0] + edges[1] - 130, edges[0] + edges[1] + 140)):
        assert torch.equal(merged.rows("train", start, stop), rows[start:stop])
        for window, column in zip(merged.origin("train", start, stop), origin):
            assert torch.equal(window, column[start:stop]) and window.dtype == torch.int32
    with pytest.raises(ValueError, match=f"rows 0 to {n + 1} of train were asked for; it has {n}"):
        merged.rows("train", 0, n + 1)
    with pytest.raises(ValueError, match="split 'tarin' is not in .*; it has train, validation, test"):
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
             for n, rows in zip(n_rows, numbers)]
    merged = MergedCache(LocalFolder(tmp_path), parts)
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
        for count, of_part in zip(n_rows, numbers):
            assert abs(len(set(of_part.tolist()) & set(rows_of[-1])) - count / n) < 1
        assert 0 < len(rows) < rows_per_shard + len(parts)
    assert sorted(sum(rows_of, [])) == list(range(37))

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
    assert merged.mean_squared_norm == pytest.approx(summed_squares(merged.rows("train", 0, n)) / n, rel=1e-12)
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


def edited(path, **changes):
    """Change the manifest of a cache, so that only who compares it with something else can see it."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))


def names_of(folder):
    """The names of the parts, by number."""
    caches = [open_cache(path.parent) for path in folder.glob("*/manifest.json")]
    return {cache.manifest["identity"]["part"][0]: cache.cache_id for cache in caches}


def put(folder, cache):
    shutil.copytree(cache.path, folder / cache.cache_id)


def _without(folder, make, **_):
    for number in (0, 2):
        shutil.rmtree(folder / names_of(folder)[number])


def _unfinished(folder, make, **_):
    (folder / names_of(folder)[1] / "manifest.json").unlink()


WRONG = {
    "missing": (_without, r"lacks part 0, 2 of 3 \(the first is 0\); copy what is missing there"),
    "manifest not there yet": (_unfinished, "lacks part 1 of 3"),
    "hidden": (lambda folder, **_: (folder / names_of(folder)[1]).rename(folder / ".gone"), "lacks part 1 of 3"),
    "twice": (lambda folder, make, aside: put(folder, make(aside, lm_name="again", part=[1, 3])),
              "holds part 1 of 3 twice, as .*again-residual.1.*; take one out"),
    "whole": (lambda folder, make, aside: put(folder, make(aside)), "in it is no part of a cache but a whole one"),
    "of another number": (lambda folder, make, aside: put(folder, make(aside, part=[1, 2])),
                          "holds parts of more than one cache: parts is .* of .*, .* of .*; keep the parts of each"),
    "another seed": (lambda folder, make, aside: put(folder, make(aside, part=[1, 3], seed=5)),
                     "holds parts of more than one cache: seed is"),
    "another width": (lambda folder, **_: edited(folder / names_of(folder)[2], d_in=23),
                      "is damaged: .* does not hold"),
    "other special tokens": (lambda folder, **_: edited(folder / names_of(folder)[2], special_ids=[]),
                             "holds parts of more than one cache: special_ids is"),
    "a truncated file": (lambda folder, **_: (folder / names_of(folder)[2] / "train/00001.safetensors").write_bytes(
                         b"x"), "is damaged: train/00001.safetensors has 1 bytes"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("place", ["local", "url"])
def test_what_is_not_right_gets_one_line(make, copied, tmp_path, what, place):
    do, message = WRONG[what]
    do(copied, make=make, aside=tmp_path / "aside")
    where = copied if place == "local" else RemoteFolder(copied.as_uri(), Copies(tmp_path / "copies", 10**7))
    with pytest.raises(ValueError, match=message) as error:
        open_cache_or_parts(where)
    assert "\n" not in str(error.value) and str(copied) in str(error.value)


@pytest.mark.parametrize("place", ["local", "url"])
def test_an_empty_folder_and_none_at_all_get_one_line(tmp_path, place):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for folder in (tmp_path / "empty", tmp_path / "none"):
        where = folder if place == "local" else RemoteFolder(folder.as_uri(), Copies(tmp_path / "copies", 10**7))
        with pytest.raises(ValueError, match="is not a cache: it has no manifest.json; harvest it first"):
            open_cache_or_parts(where)


def test_a_folder_of_a_cache_is_that_cache(whole):
    cache = open_cache_or_parts(whole.path)
    assert type(cache) is type(whole) and cache.manifest == whole.manifest


def test_it_must_be_what_the_config_would_harvest(make, folder, whole, copied):
    spec = HarvestSpec(**SPEC)
    assert make.finished(LocalFolder(folder), spec=spec).parts
    assert make.finished(LocalFolder(whole.path), spec=spec).cache_id == whole.cache_id
    part = folder / names_of(folder)[1]
    assert make.finished(LocalFolder(part), spec=replace(spec, part=[1, 3])).cache_id == part.name
    for place, asked, message in (
        (folder, replace(spec, seed=1), "its seed is 0, the config's 1; change the config, or data.remote.path"),
        (folder, replace(spec, part=[0, 3]), r"its part is None, the config's \[0, 3\]"),
        (part, spec, r"its part is \[1, 3\], the config's None"),
        (part, replace(spec, part=[0, 3]), r"its part is \[1, 3\], the config's \[0, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"is not what this config would harvest: {message}"):
            make.finished(LocalFolder(place), spec=asked)
    file = copied / names_of(copied)[2] / "train/00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{names_of(copied)[2]} is damaged: the SHA-256 of train/00001.safetensors"):
        make.finished(LocalFolder(copied), spec=spec)


# ---------------------------------------------------------------------------------------------------- a run, end to end

SMALL = ["data.n_tokens={train: 4000, validation: 1000, test: 1000}", "data.rows_per_shard=1024"]
RUN = ["d_sae=128", "recipe.n_steps=40", "recipe.batch_size=256", "evaluation.n_lm_tokens=256", "sae=topk",
       "l0_target=10", "trainer.progress_bar=false", *SMALL]


def test_a_run_trains_from_a_folder_of_parts(enter, tmp_path):
    machines = [tmp_path / f"machine{number}" for number in range(2)]
    for number, machine in enumerate(machines):
        status, _, err = enter(harvest_entry_point, f"output_dir={machine}", f"data.part=[{number},2]",
                               "progress_bar=false", *SMALL)
        assert status == 0, err
        shutil.copytree(machine / "cache", tmp_path / "parts", dirs_exist_ok=True)
    where = [f"output_dir={tmp_path / 'out'}", f"data.remote.path={tmp_path / 'parts'}"]
    status, _, err = enter(train, *where, *RUN)
    assert status == 0, err
    (run_dir,) = (file.parent for file in (tmp_path / "out" / "runs").rglob("record.json"))
    record = read_record(run_dir)
    assert record["status"] == "finished" and 0 < record["fvu"] < 1 and record["delta_lm_loss"] > 0
    assert record["cache_id"] == record["data_id"] == open_cache_or_parts(tmp_path / "parts").cache_id
    assert not (tmp_path / "out" / "cache").exists()  # nothing was harvested, nothing copied
    status, out, err = enter(evaluate, f"run='{run_dir}'", "progress_bar=false", "n_lm_tokens=256")
    assert status == 0 and f"{record['fvu']:.3g}" in out + err, err

    (path, _) = sorted((tmp_path / "parts").glob("*/manifest.json"))
    shutil.rmtree(path.parent)
    status, _, err = enter(train, "sweep=bad", *where, *RUN)
    *_, last = err.splitlines()
    assert status == 2 and re.search(r"sae_zoo.train: error: .* lacks part [01] of 2", last), err
