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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_pass_over_the_text_has_the_rows_of_the_cache_once(place, make, dtype):
    spec = replace(SPEC, dtype=dtype)
    whole = next(caches(place, spec))
    activations, n = make(spec=spec), whole.n_rows("train")
    assert activations.n_rows("train") == n
    passes = [torch.cat(list(activations._train.pieces(3, first, first + n))).float() for first in (0, n, 2 * n)]
    for rows in passes:
        assert_same_set(rows, whole.rows("train", 0, n), dtype)
    assert not torch.allclose(passes[0], passes[1]) and not torch.allclose(passes[1], passes[2])


@pytest.mark.parametrize("buffer_rows", [3, 33, 349, 5000])
def test_each_row_of_the_text_is_drawn_once_or_waits(make, buffer_rows):
    activations = make(buffer_rows=buffer_rows)
    n, stream = activations.n_rows("train"), activations.stream("train", 3)
    n_slots = min(buffer_rows, n)
    counts = (1, n_slots + 5, n - 40, 2, 300)  # also more than there are slots
    drawn = torch.cat([stream.read(sum(counts[:i]), count) for i, count in enumerate(counts)])
    text = torch.cat(list(activations._train.pieces(3, 0, sum(counts) + n_slots)))
    assert drawn.dtype == torch.float32 and stream._buffer.shape == (n_slots, 24)
    assert_same_set(torch.cat([drawn, stream._buffer]), text)


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
    for start in range(1, 40, 6):  # to the bit: while some rows of the first buffer wait, later, in another pass
        assert all(map(torch.equal, batches[start:], take(make(), 40, start=start)))


def test_going_on_costs_a_dozen_buffers_or_so(make, forwarded):
    activations = make(buffer_rows=60)
    for step in range(0, 200, 33):
        batches = activations.batches("train", 50, n_batches=1000, seed=0, start=step)
        forwarded.clear()
        next(iter(batches))
        activations._train.thread.submit(lambda: None).result()  # what runs ahead
        read = sum(len(tokens) for tokens in forwarded) * 15
        # A batch; passes ahead and at both ends.
        assert read <= min(50 * step + 60, 15 * 60) + 50 + (2 + 2) * 4 * 15, step


def test_no_more_text_is_read_than_is_drawn_and_waits(make, forwarded):
    activations = make(buffer_rows=100)
    forwarded.clear()
    batches = take(activations, 4)
    activations._train.thread.submit(lambda: None).result()  # what runs ahead
    read = sum(len(tokens) for tokens in forwarded) * 15
    assert len(batches) == 4 and 300 <= read <= 300 + 4 * 15


def test_the_buffer_is_bounded_and_the_language_model_waits(make, forwarded):
    activations = make(buffer_rows=100)
    batches = iter(activations.batches("train", 10, n_batches=1000, seed=0))
    forwarded.clear()
    for i in range(1, 100):
        next(batches)
        read = sum(len(tokens) for tokens in forwarded) * 15
        assert read <= 100 + 10 * i + (1 + 2 + 1) * 4 * 15 + i * 10 * 0.1  # buffer, drawn, passes in hand and ahead


def test_the_language_model_runs_in_a_thread_of_its_own(make, monkeypatch):
    names = set()

    def named(model, hooks, tokens):
        names.add(threading.current_thread().name)
        return capture(model, hooks, tokens)

    activations = make()
    monkeypatch.setattr(online, "capture", named)
    take(activations, 10)
    assert names == {"language model_0"}


def test_rows_wait_at_random_and_for_one_buffer_on_the_average(make):
    """How long the rows that are drawn one after the other have waited: uncorrelated, and exponential as draws are."""
    rows = make()._train
    n_slots, n = 60, rows.n_rows
    text = torch.cat(list(rows.pieces(0, 0, n)))  # as the language model gives them
    drawn = ShuffleBuffer(rows, 0, buffer_rows=n_slots).read(0, n - n_slots)
    place = torch.from_numpy(linear_sum_assignment(torch.cdist(drawn, text))[1])
    waited = (torch.arange(len(drawn)) + n_slots - place)[3 * n_slots :].double()
    n = len(waited)
    assert waited.min() >= 1 and torch.corrcoef(torch.stack([waited[:-1], waited[1:]]))[0, 1].abs() < 4 / n**0.5
    assert waited.mean() == pytest.approx(n_slots, abs=4 * n_slots / n**0.5)
    assert waited.std() == pytest.approx(n_slots, rel=0.3) and waited.max() > 2 * n_slots


def test_processes_share_the_text(make, cache):
    activations, n = make(), cache.n_rows("train")
    shares = [activations._train.share(rank, 2) for rank in (0, 1)]
    assert_same_set(torch.cat([torch.cat(list(share.pieces(0, 0, share.n_rows))) for share in shares]),
                    cache.rows("train", 0, n))
    for rank, share in enumerate(shares):
        batches = take(activations, 6, size=40, rank=rank, world_size=2)
        assert all(batch.shape == (20, 24) for batch in batches)
        assert torch.equal(torch.cat(batches), ShuffleBuffer(share, 0, buffer_rows=50).read(0, 120))
    with pytest.raises(ValueError, match="batch_size is 50; it must be a multiple of the 3 processes"):
        take(activations, 3, world_size=3)


def test_what_is_wrong_is_one_line(make, place):
    with pytest.raises(ValueError, match=r"data\.buffer_rows is 0; it must be at least 1"):
        take(make(buffer_rows=0), 1)
    with pytest.raises(ValueError, match=r"batch_size is 9999, but train of tiny-.* has only"):
        take(make(), 1, size=9999)
    activations, weight = make(), place[0].model.model.layers[0].mlp.down_proj.weight
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"train: token 1 of sequence [0-9]+ holds NaN or inf as float32") as error:
            take(activations, 1)
    finally:
        weight.copy_(before)
    assert "\n" not in str(error.value)


RUN = ["data=online", "data.n_tokens={train: 4000, validation: 1000, test: 1000}", "data.buffer_rows=1500", "d_sae=64",
       "sae=topk", "l0_target=10", "recipe.n_steps=50", "recipe.batch_size=128", "evaluation.n_lm_tokens=512",
       "trainer.progress_bar=false", "trainer.checkpoint_every=10", "trainer.validation_every=10"]


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, enter, monkeypatch):
    """The entry point as a user runs it, with the built-in language model: whole, and broken off while rows wait."""
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
    with monkeypatch.context() as patch:
        patch.setattr(TopKSAE, "loss", dies)
        with pytest.raises(RuntimeError, match="power cut"):
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
