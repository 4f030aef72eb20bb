import json
import shutil

import pytest
import torch

from sae_zoo.data import cache_writer, harvesting
from sae_zoo.data.cache import manifest_digest
from sae_zoo.data.corpus import TextFilesCorpus
from sae_zoo.data.harvesting import HarvestSpec, _pack, harvest
from sae_zoo.lm.hooks import capture, resolve_hook

SPEC = {"context_size": 16, "n_tokens": {"train": 700, "validation": 60, "test": 60}, "dtype": "float32",
        "rows_per_shard": 128, "seed": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(f"word{(i * j) % 17} is {j}" for j in range(12)))
    return folder


@pytest.fixture(scope="module")
def lm(text, tiny_gemma2, tmp_path_factory):
    """A tiny Gemma 2: the module tree of the 9B model, its heads together wider than the stream."""
    return tiny_gemma2(text, tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def caches(lm, text, tmp_path_factory):
    hooks = [resolve_hook(lm.model, "auto", layer, site)
             for layer, site in ((1, "residual"), (1, "attention"), (2, "mlp"))]
    root = tmp_path_factory.mktemp("cache")
    corpus = TextFilesCorpus(paths=str(text))
    return hooks, root, corpus, harvest(lm, "tiny", hooks, corpus, HarvestSpec(**SPEC), root=root, batch_size=4,
                                        progress_bar=False)


def test_every_row_is_the_activation_at_its_token(lm, caches):
    cache = caches[3]["residual.1"]
    for split in ("train", "validation", "test"):
        tokens, n = cache.tokens(split), cache.n_rows(split)
        assert n == pytest.approx(SPEC["n_tokens"][split], abs=16)
        states = lm.model(tokens.long(), output_hidden_states=True).hidden_states[2]
        origin = cache.origin(split, 0, n)
        torch.testing.assert_close(cache.rows(split, 0, n), states[origin.sequences.long(), origin.positions.long()],
                                   rtol=1e-4, atol=1e-5)


def test_special_tokens_are_never_rows_and_are_counted(caches):
    cache = caches[3]["residual.1"]
    special = set(cache.manifest["special_ids"])
    assert special == {0, 1, 2}
    for split in ("train", "test"):
        assert not special & set(cache.origin(split, 0, cache.n_rows(split)).token_ids.tolist())
        table = cache.tokens(split)
        assert cache.manifest["splits"][split]["n_special_tokens"] == table.numel() - cache.n_rows(split) > 0


def test_hook_points_of_one_pass_have_their_widths_and_the_same_rows(caches):
    widths = {name: cache.d_in for name, cache in caches[3].items()}
    assert widths == {"residual.1": 24, "attention.1": 32, "mlp.2": 24}
    a, b = (caches[3][name].origin("train", 0, 200) for name in ("residual.1", "mlp.2"))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_finished_cache_is_not_harvested_again(lm, caches, monkeypatch):
    hooks, root, corpus, made = caches
    monkeypatch.setattr("sae_zoo.data.harvesting.capture", None)
    again = harvest(lm, "tiny", hooks[:2], corpus, HarvestSpec(**SPEC), root=root, batch_size=4, progress_bar=False)
    assert again["attention.1"].path == made["attention.1"].path


def test_what_decides_the_bytes_decides_the_name(lm, caches, text):
    hooks, root, corpus, made = caches
    other = harvest(lm, "tiny", hooks[:1], corpus, HarvestSpec(**SPEC | {"context_size": 12}), root=root, batch_size=4,
                    progress_bar=False)
    assert other["residual.1"].cache_id != made["residual.1"].cache_id


def test_too_small_a_disk_is_said_before_the_work(lm, caches, text, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr("sae_zoo.data.harvesting.CacheWriter", None)
    with pytest.raises(ValueError, match=r"needs 0\.00 GB, but only 0\.00 GB are free"):
        harvest(lm, "tiny", caches[0][:1], caches[2], HarvestSpec(**SPEC), root=tmp_path, batch_size=4,
                progress_bar=False)


def test_a_cache_of_another_width_than_the_hook_point_is_refused(lm, caches, tmp_path):
    """A cache that was put where that of another hook point belongs."""
    hooks, _, corpus, made = caches
    theirs, ours = made["residual.1"], made["attention.1"]
    folder = shutil.copytree(theirs.path, tmp_path / ours.cache_id)
    manifest = theirs.manifest | {"cache_id": ours.cache_id}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    with pytest.raises(
            ValueError, match="has rows of 24 numbers, but the hook point gives 32; it belongs to another") as error:
        harvest(lm, "tiny", [hooks[1]], corpus, HarvestSpec(**SPEC), root=tmp_path, batch_size=4, progress_bar=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stopped_at", [0, 6, 13])
def test_an_interrupted_harvest_reads_on_where_it_was(lm, caches, tmp_path, monkeypatch, stopped_at):
    hooks, _, corpus, made = caches
    passes = []

    def counted(model, hooks, tokens):
        if len(passes) == stopped_at:
            passes.append(None)
            raise KeyboardInterrupt
        passes.append(tokens)
        return capture(model, hooks, tokens)

    monkeypatch.setattr(cache_writer, "_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(harvesting, "capture", counted)
    arguments = {"root": tmp_path, "batch_size": 4, "progress_bar": False}
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, "tiny", hooks, corpus, HarvestSpec(**SPEC), **arguments)
    again = harvest(lm, "tiny", hooks, corpus, HarvestSpec(**SPEC), **arguments)
    read = torch.cat([tokens for tokens in passes if tokens is not None])
    assert torch.equal(read, torch.cat([made["mlp.2"].tokens(split) for split in SPEC["n_tokens"]]))  # none of it twice
    for name, cache in again.items():
        files = [{f.relative_to(c.path): f.read_bytes() for f in c.path.rglob("*") if f.is_file()}
                 for c in (cache, made[name])]
        assert files[0] == files[1]


def test_bad_splits():
    with pytest.raises(ValueError, match=r"data\.n_tokens has train; it needs exactly train, validation, test"):
        HarvestSpec(**SPEC | {"n_tokens": {"train": 5}})


# ------------------------------------------------------------------------------------------- corpora that are too small


def test_too_few_documents_are_counted(lm, tmp_path):
    (tmp_path / "book.txt").write_text("the same words again and again " * 500)
    with pytest.raises(ValueError, match=r"corpus has no .* document: it has 1 document and is split by document"):
        packed_of(lm, tmp_path)


def test_files_that_are_not_utf8_are_counted(lm, tmp_path, caplog):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_bytes(("words of some length " * 20).encode("utf-16" if i % 2 else "utf-8"))
    corpus = TextFilesCorpus(paths=str(tmp_path))
    corpus.fingerprint()
    assert corpus.left_out() == "30 of 60 files are not UTF-8"
    assert packed_of(lm, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes("words".encode("utf-16"))
    with pytest.raises(ValueError, match="corpus holds no document: 60 of 60 files are not UTF-8"):
        packed_of(lm, tmp_path)


def test_fewer_held_out_tokens_than_two_rows_are_refused(lm, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("words of some length " * 20)
    with pytest.raises(ValueError, match=r"data.n_tokens.validation \+ test = 10 is 1 row of lm.context_size 16"):
        packed_of(lm, tmp_path, validation=5, test=5)


def packed_of(lm, folder, **n_tokens):
    corpus = TextFilesCorpus(paths=str(folder))
    corpus.fingerprint()
    spec = HarvestSpec(context_size=16, n_tokens={"train": 300, "validation": 40, "test": 40, **n_tokens},
                       dtype="float32", rows_per_shard=100, seed=0)
    return _pack(corpus, lm, spec)
