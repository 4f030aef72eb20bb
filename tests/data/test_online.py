"""Training rows straight from the language model, beside the cache that holds the same ones."""

import threading
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sae_zoo import load_sae, train
from sae_zoo.data import online
from sae_zoo.data.corpus import TextFilesCorpus
from sae_zoo.data.harvesting import HarvestSpec, harvest
from sae_zoo.data.online import OnlineActivations, ShuffleBuffer
from sae_zoo.lm.hooks import capture, resolve_hook
from sae_zoo.records import read_record
from sae_zoo.saes.topk import TopKSAE

SPEC = HarvestSpec(context_size=16, n_tokens={"train": 700, "validation": 60, "test": 60}, dtype="float32",
                   rows_per_shard=128, seed=0)


@pytest.fixture(scope="module")
def place(tiny_gemma2, tmp_path_factory):
    """A tiny Gemma 2, a hook point in it, a corpus, and the root of their caches."""
    text, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("lm")
    for i in range(60):
        (text / f"{i}.txt").write_text(" ".join(f"word{(i * j) % 17} is {j}" for j in range(12)))
    lm = tiny_gemma2(text, folder)
    hook, corpus = resolve_hook(lm.model, "auto", 1, "residual"), TextFilesCorpus(paths=str(text))
    return lm, hook, corpus, tmp_path_factory.mktemp("cache")


def caches(place, spec):
    """The whole cache of ``spec``, and the one that holds its held-out rows."""
    lm, hook, corpus, root = place
    for n_train in (spec.n_tokens["train"], 1):
        of_cache = replace(spec, n_tokens={**spec.n_tokens, "train": n_train})
        yield harvest(lm, "tiny", [hook], corpus, of_cache, root=root, batch_size=4, progress_bar=False)[hook.name]


@pytest.fixture(scope="module")
def cache(place):
    return next(caches(place, SPEC))


@pytest.fixture(scope="module")
def make(place):
    """Makes activations on the fly."""

    def make(*, spec=SPEC, buffer_rows=100):
        lm, hook, corpus, _ = place
        _, held_out = caches(place, spec)
        return OnlineActivations(held_out, lm, "tiny", hook, corpus, spec, buffer_rows=buffer_rows, batch_size=4)

    return make


@pytest.fixture
def forwarded(monkeypatch):
    """The tokens of every forward pass from here on."""
    passes = []

    def counted(model, hooks, tokens):
        passes.append(tokens)
        return capture(model, hooks, tokens)

    monkeypatch.setattr(online, "capture", counted)
    return passes


def assert_same_set(rows, stored, dtype="float32"):
    """The same rows in any order: paired one to one so that they are as near as can be, all pairs are equal."""
    assert rows.shape == stored.shape
    pairs = linear_sum_assignment(torch.cdist(rows, stored, compute_mode="donot_use_mm_for_euclid_dist"))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(rows[pairs[0]], stored[pairs[1]], **tolerance)


def take(activations, n_batches, *, size=50, start=0, seed=0, **where):
    return list(activations.batches("train", size, n_batches=n_batches, seed=seed, start=start, **where))


@pytest.mark.parametrize("buffer_rows", [3, 33, 349, 5000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_pass_has_the_rows_of_the_cache_once(place, make, buffer_rows, dtype):
    spec = replace(SPEC, dtype=dtype)
    whole = next(caches(place, spec))
    activations, n = make(spec=spec, buffer_rows=buffer_rows), whole.n_rows("train")
    assert activations.n_rows("train") == n
    stream, stored = activations.stream("train", 3), whole.rows("train", 0, n)
    passes = [torch.cat([stream.read(first, 1), stream.read(first + 1, n - 1)]) for first in (0, n, 2 * n)]
    for rows in passes:
        assert rows.dtype == torch.float32
        assert_same_set(rows, stored, dtype)
    assert not torch.allclose(passes[0], passes[1]) and not torch.allclose(passes[1], passes[2])


def test_all_but_train_is_the_cache_and_runs_on_both_can_stand_side_by_side(make, cache):
    activations = make()
    assert activations.data_id == cache.data_id and activations.d_in == cache.d_in
    for split in ("validation", "test"):
        n = cache.n_rows(split)
        assert activations.n_rows(split) == n and torch.equal(activations.rows(split, 0, n), cache.rows(split, 0, n))
        assert torch.equal(activations.tokens(split), cache.tokens(split))
        assert all(map(torch.equal, activations.origin(split, 0, n), cache.origin(split, 0, n)))
    assert torch.equal(activations.tokens("train"), cache.tokens("train"))
    assert activations.mean_squared_norm == pytest.approx(cache.mean_squared_norm, rel=1e-5)  # all of so few rows
    n = activations.n_rows("train")
    assert_same_set(activations.rows("train", 0, n), cache.rows("train", 0, n))
    assert torch.equal(activations.rows("train", 40, 300), activations.rows("train", 0, n)[40:300])
    with pytest.raises(ValueError, match=f"rows 0 to {n + 1} of train were asked for; it has {n}"):
        activations.rows("train", 0, n + 1)
    with pytest.raises(ValueError, match="have no origin; harvest them"):
        activations.origin("train", 0, 1)


def test_a_batch_depends_on_seed_and_step_alone(make):
    batches = take(make(), 40)
    assert all(map(torch.equal, batches, take(make(), 40)))
    assert not any(map(torch.equal, batches, take(make(), 40, seed=1)))
    assert all(map(torch.equal, batches, take(make(), 90)))  # and not on how many come after it
    for start in range(1, 40, 6):  # to the bit: in the middle of a block, at its border, in another pass
        assert all(map(torch.equal, batches[start:], take(make(), 40, start=start)))


def test_going_on_costs_at_most_two_buffers(make, forwarded):
    activations = make(buffer_rows=150)
    for step in range(0, 14, 2):
        batches = activations.batches("train", 50, n_batches=100, seed=0, start=step)
        forwarded.clear()
        next(iter(batches))
        activations._train.thread.submit(lambda: None).result()  # what runs ahead
        read = sum(len(tokens) for tokens in forwarded) * 15
        assert read <= 2 * 150 + 50 + (2 + 2) * 4 * 15, step  # a batch; passes ahead, and halves of passes at both ends


def test_no_more_text_is_read_than_the_blocks_that_are_used(make, forwarded):
    activations = make(buffer_rows=100)
    n = activations.n_rows("train")
    forwarded.clear()
    batches = take(activations, 4)  # 200 rows: two blocks of 100 at most, or the start of a third
    activations._train.thread.submit(lambda: None).result()  # what runs ahead
    read = sum(len(tokens) for tokens in forwarded) * 15
    assert len(batches) == 4 and 200 <= read <= 300 + 2 * 4 * 15 < n


def test_the_buffer_is_bounded_and_the_language_model_waits(make, forwarded):
    activations = make(buffer_rows=100)
    batches = iter(activations.batches("train", 10, n_batches=1000, seed=0))
    forwarded.clear()
    for i in range(1, 100):
        next(batches)
        read = sum(len(tokens) for tokens in forwarded) * 15
        assert read <= 100 + 10 * i + (1 + 2 + 1) * 4 * 15 + i * 10 * 0.1  # buffer, drawn, passes in hand and ahead
    stream = activations.stream("train", 0)
    stream.read(0, 700)
    n = activations.n_rows("train")
    assert stream._buffer.shape == (-(-n // -(-n // 100)), 24)  # as many blocks of at most 100 as it takes


def test_the_language_model_runs_in_a_thread_of_its_own(make, monkeypatch):
    names = set()

    def named(model, hooks, tokens):
        names.add(threading.current_thread().name)
        return capture(model, hooks, tokens)

    monkeypatch.setattr(online, "capture", named)
    take(make(), 10)
    assert names == {"language model_0"}


def test_neighbours_in_the_text_are_none_in_a_block(make):
    """Where the rows of a block stand, beside where their neighbours in the text do: uncorrelated if well shuffled."""
    rows = make()._train
    n = rows.n_rows
    read = torch.cat(list(rows.pieces(0, 0, n)))  # as the language model gives them
    drawn = ShuffleBuffer(rows, 0, buffer_rows=n).read(0, n)
    place = torch.from_numpy(linear_sum_assignment(torch.cdist(read, drawn))[1]).double()
    assert torch.corrcoef(torch.stack([place[:-1], place[1:]]))[0, 1].abs() < 4 / n**0.5


def test_processes_share_a_pass(make, cache):
    activations, n = make(), cache.n_rows("train")
    ranks = [take(activations, 3 * n // 40, size=40, rank=rank, world_size=2) for rank in (0, 1)]
    assert all(batch.shape == (20, 24) for batches in ranks for batch in batches)
    halves = [activations._train.share(rank, 2).n_rows for rank in (0, 1)]
    assert sum(halves) == n
    rows = torch.cat([torch.cat(batches)[:half] for batches, half in zip(ranks, halves)])
    assert_same_set(rows, cache.rows("train", 0, n))
    with pytest.raises(ValueError, match="batch_size is 50; it must be a multiple of the 3 processes"):
        take(activations, 3, world_size=3)


def test_what_is_wrong_is_one_line(make, place):
    with pytest.raises(ValueError, match="data.buffer_rows is 0; it must be at least 1"):
        take(make(buffer_rows=0), 1)
    with pytest.raises(ValueError, match="batch_size is 9999, but train of tiny-.* has only"):
        take(make(), 1, size=9999)
    activations, weight = make(), place[0].model.model.layers[0].mlp.down_proj.weight
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="train: token 1 of sequence [0-9]+ holds NaN or inf as float32") as error:
            take(activations, 1)
    finally:
        weight.copy_(before)
    assert "\n" not in str(error.value)


RUN = ["data=online", "data.n_tokens={train: 4000, validation: 1000, test: 1000}", "data.buffer_rows=1500", "d_sae=64",
       "sae=topk", "l0_target=10", "recipe.n_steps=50", "recipe.batch_size=128", "evaluation.n_lm_tokens=512",
       "trainer.progress_bar=false", "trainer.checkpoint_every=10", "trainer.validation_every=10"]


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, enter, monkeypatch):
    """The entry point as a user runs it, with the built-in language model: whole, and broken off within a block."""
    honest = TopKSAE.loss

    def run(name):
        status, *printed = enter(train, *RUN, f"output_dir={tmp_path}", f"sweep={name}")
        assert status == 0
        return tmp_path / "runs" / name / "topk-l0_10-seed_0", "".join(printed)

    def dies(self, x, **kwargs):
        if self.global_step == 27:
            raise RuntimeError("power cut")
        return honest(self, x, **kwargs)

    whole, _ = run("whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(TopKSAE, "loss", dies)
        run("cut")
    cut, printed = run("cut")
    assert "going on from" in printed
    for (name, a), b in zip(load_sae(whole).named_parameters(), load_sae(cut).parameters(), strict=True):
        assert torch.equal(a, b), name
    records = [read_record(folder) for folder in (whole, cut)]
    assert records[0]["fvu"] == records[1]["fvu"] < 1 and records[0]["delta_lm_loss"] == records[1]["delta_lm_loss"] > 0
    assert records[0]["lm"] == "builtin" and records[0]["hook"] == "residual.3"
    (held_out,) = (tmp_path / "cache").glob("builtin-*")  # and nothing else of the training rows on the disk
    assert records[0]["cache_id"] == held_out.name != records[0]["data_id"]
    assert sum(file.stat().st_size for file in held_out.rglob("*.safetensors")) < 2100 * (256 * 4 + 30)
