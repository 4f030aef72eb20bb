"""What is said of a latent, against brute force: everything in memory, dense latents, the language model itself."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.latents import (
    KINDS,
    Context,
    UnknownEffects,
    contexts,
    highlighted,
    logit_effects,
    nearest,
    open_runs,
    stratified,
    survey,
    token_texts,
)
from analysis.latents.contexts import choose_places
from analysis.latents.streaming import BINS, Histograms, Kept
from sae_zoo.data.array_file import FileActivations
from sae_zoo.lm.hooks import HookPoint, capture, resolve_hook
from sae_zoo.records import read_record, write_record
from sae_zoo.saes import variant_class


@pytest.fixture(scope="module")
def run(trained):
    return open_runs([trained / "topk"])[0]


@pytest.fixture(scope="module")
def found(run):
    return survey(run.sae, run.source.activations)


@pytest.fixture(scope="module")
def dense(run):
    """[n_sequences, context, d_sae]: latents from the language model's own forward pass, 0 on special tokens."""
    cache, source = run.source.activations, run.source
    tokens = cache.tokens("test")
    x = torch.cat([capture(source.lm.model, [source.hook], part)[source.hook.name] for part in tokens.split(4)])
    latents = run.sae.encode(x.flatten(0, 1)).view(*tokens.shape, -1)
    return latents * ~torch.isin(tokens, torch.tensor(cache.manifest["special_ids"]))[:, :, None]


def random_entries(generator, n_latents, n):
    latents = (torch.rand(n, generator=generator) ** 2 * n_latents).long()
    return latents, torch.rand(n, generator=generator).exp() ** 8, torch.randperm(n, generator=generator)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_kept_are_the_largest_in_whatever_pieces(generator, piece):
    latents, keys, places = random_entries(generator, 12, 500)
    kept = Kept(13, 6)
    for parts in zip(*(x.split(piece) for x in (latents, keys, 2 * keys, places)), strict=True):
        kept.add(*parts)
    for latent in range(13):  # the last one never comes
        own = zip(keys[latents == latent].tolist(), places[latents == latent].tolist(), strict=True)
        own = sorted(own, reverse=True)[:6]
        assert kept.of(latent) == ([pytest.approx(2 * key) for key, _ in own], [place for _, place in own])


def test_random_keys_are_a_uniform_sample(generator):
    n, k, repeats = 40, 8, 2000
    hits = torch.zeros(n)
    for _ in range(repeats):
        kept = Kept(1, k)
        for part in torch.arange(n).split(13):
            kept.add(torch.zeros_like(part), torch.rand(len(part), generator=generator), part.float(), part)
        places = kept.of(0)[1]
        assert len(set(places)) == k
        hits[places] += 1
    expected = repeats * k / n
    deviation = (hits - expected) / math.sqrt(expected * (1 - k / n))
    assert deviation.abs().max() < 4.5 and deviation.square().mean() == pytest.approx(1, abs=0.7)


@pytest.mark.parametrize("piece", [1, 64, 1000])
def test_histograms_are_those_of_all_values_at_once(generator, piece):
    latents, values, _ = random_entries(generator, 5, 700)
    latents[latents == 3] = 2  # latent 3 never fires, and the others come from small to large
    order = values.argsort()
    latents, values = latents[order], values[order]
    histograms = Histograms(5)
    for parts in zip(latents.split(piece), values.split(piece), strict=True):
        histograms.add(*parts)
    assert histograms.of(3)[1] == []
    for latent in (0, 1, 2, 4):
        own = values[latents == latent].double().numpy()
        end = 2.0 ** (math.floor(math.log2(own.max())) + 1)
        counts, edges = np.histogram(own, np.linspace(0, end, BINS + 1))
        width, shown = histograms.of(latent)
        assert width == edges[1] and shown == np.trim_zeros(counts, "b").tolist() and sum(shown) == len(own)


def test_a_value_at_an_edge_belongs_to_the_bin_above_it():
    histograms = Histograms(1)
    histograms.add(torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 2.0, 1.999]))
    assert histograms.of(0) == (4 / BINS, [0] * 8 + [1] + [0] * 6 + [1, 1])


@pytest.mark.parametrize("larger, bins", [(7.0, [0, 0, 0, 3] + [0] * 24 + [1]), (20.0, [3] + [0] * 19 + [1]),
                                          (700.0, [3] + [0] * 20 + [1])])
def test_a_value_that_is_many_times_larger_than_all_before(larger, bins):
    histograms = Histograms(1)
    histograms.add(torch.zeros(3, dtype=torch.int64), torch.full((3,), 0.9))
    histograms.add(torch.zeros(1, dtype=torch.int64), torch.tensor([larger]))
    assert histograms.of(0)[1] == bins


def test_survey_is_what_the_language_model_shows(run, found, dense):
    flat = dense.flatten(0, 1)
    n = run.source.activations.n_rows("test")
    assert found.counts.n_tokens == n == read_record(run.record["run_dir"])["n_eval_tokens"]
    # Rounding of another forward pass may move a latent across the edge of TopK: on a few of 20,000 entries.
    fired = (flat > 0).sum(0)
    assert (fired - found.counts.fired).abs().sum() <= 20
    for latent in fired.argsort(descending=True)[:40].tolist():
        values, places = found.top.of(latent)
        torch.testing.assert_close(torch.tensor(values), flat[:, latent].topk(len(values)).values, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(torch.tensor(values), flat[places, latent], rtol=2e-3, atol=2e-3)
        values, places = found.sample.of(latent)
        assert len(set(places)) == len(places) == min(64, int(found.counts.fired[latent]))
        own = flat[:, latent][flat[:, latent] > 0]
        assert 0.25 < (own < np.median(values)).double().mean() < 0.75  # of all of them, not of the strongest
        torch.testing.assert_close(torch.tensor(values), flat[places, latent], rtol=2e-3, atol=2e-3)


def test_contexts_are_the_text_with_every_activation_in_it(run, found, dense):
    cache = run.source.activations
    tokens = cache.tokens("test")
    latents = stratified(found.counts.frequency, 25)
    shown = contexts(run.sae, cache, found, latents)
    flat, context_size = tokens.flatten(), tokens.shape[1]
    n_differ = n_values = 0
    for latent in latents:
        places = choose_places(found, latent, context_size)
        windows = []
        assert [c.kind for c in shown[latent]] == [kind for kind in KINDS for _ in places[kind]]
        for context in shown[latent]:
            # the place that it is about, found again by its text and value
            (place,) = [p for p in places[context.kind] if tokens[p // context_size].tolist()[
                max(0, p % context_size - 20) : p % context_size + 10] == context.token_ids
                and abs(float(dense.flatten(0, 1)[p, latent]) - context.values[context.at]) < 1e-2][:1]
            assert flat[place] == context.token_ids[context.at]
            sequence, first = place // context_size, place % context_size - context.at
            own = dense[sequence, first : first + len(context.token_ids), latent]
            difference = (own - torch.tensor(context.values)).abs() > 2e-3 * (1 + own)
            n_differ, n_values = n_differ + int(difference.sum()), n_values + len(own)
            windows.append((sequence, first, first + len(own)))
        assert all(a[0] != b[0] or a[2] <= b[1] or b[2] <= a[1] for a in windows for b in windows if a is not b)
    assert n_values > 5000 and n_differ <= 3  # as above: a latent at TopK's edge


def test_kinds_are_what_they_say(run, found):
    latent = int(found.counts.fired.argmax())
    shown = contexts(run.sae, run.source.activations, found, [latent])[latent]
    by_kind = {kind: [c.values[c.at] for c in shown if c.kind == kind] for kind in KINDS}
    assert {kind: len(values) for kind, values in by_kind.items()} == KINDS
    assert by_kind["top"][0] == found.counts.value_max[latent]
    assert by_kind["top"] == sorted(by_kind["top"], reverse=True)
    sample = sorted(found.sample.of(latent)[0])
    assert max(by_kind["bottom"]) <= sample[len(sample) // 4]
    assert sample[len(sample) // 4] < min(by_kind["middle"]) and max(by_kind["middle"]) < sample[3 * len(sample) // 4]
    assert min(by_kind["top"]) > max(by_kind["middle"])


def test_a_latent_that_never_fired_has_no_context(run, found):
    dead = int((found.counts.fired == 0).nonzero()[0])
    assert contexts(run.sae, run.source.activations, found, [dead]) == {dead: []}
    assert found.histograms.of(dead)[1] == [] and found.top.of(dead) == ([], [])


def test_stratified_takes_as_many_from_each_quarter_of_a_decade():
    frequency = torch.cat([torch.full((1000,), 2e-4), torch.full((40,), 2e-3), torch.full((3,), 0.2), torch.zeros(50)])
    chosen = torch.tensor(stratified(frequency, 63))
    assert [int(((frequency[chosen] - f).abs() < 1e-9).sum()) for f in (2e-4, 2e-3, 0.2)] == [30, 30, 3]
    assert stratified(frequency, 5000) == list(range(1043)) and stratified(frequency, 63) == chosen.tolist()
    assert stratified(frequency, 63, seed=1) != chosen.tolist() and stratified(torch.zeros(4), 3) == []


def test_nearest_are_the_largest_cosines(generator):
    a, b = torch.randn(30, 6, generator=generator), 7 * torch.randn(40, 6, generator=generator)
    cosines = np.array([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in b.numpy()] for u in a.numpy()])
    values, ids = nearest(a, b, 3)
    assert ids.tolist() == np.argsort(-cosines, axis=1)[:, :3].tolist()
    np.testing.assert_allclose(values, -np.sort(-cosines, axis=1)[:, :3], rtol=1e-5)
    assert nearest(a, b[:2], 3)[1].shape == (30, 2)


# Logit effects, against the derivative of the real norm and unembedding.

ARCHITECTURES = {"gemma2": {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 40},
                 "llama": {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 40},
                 "gpt_neox": {"intermediate_size": 40}, "gpt2": {}}
FINAL_NORMS = {"gemma2": "model.norm", "llama": "model.norm", "gpt_neox": "gpt_neox.final_layer_norm",
               "gpt2": "transformer.ln_f"}


def tiny(model_type, generator):
    config = AutoConfig.for_model(model_type, vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                                  pad_token_id=0, bos_token_id=1, eos_token_id=2, **ARCHITECTURES[model_type])
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0.1, 0.3, generator=generator)
    return model


def derivative_of_norm(norm, direction, generator):
    """That of ``norm`` along ``direction`` [d], where the stream has RMS 1 and the direction does not change it."""
    axes, _ = torch.linalg.qr(torch.stack([direction, torch.ones_like(direction)], dim=1))
    h = torch.randn(len(direction), generator=generator)
    h -= axes @ (axes.T @ h)
    h *= math.sqrt(len(h)) / h.norm()
    return torch.func.jvp(norm, (h,), (direction,))[1]


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logit_effects_are_the_derivative_of_the_logits(generator, model_type, site):
    model = tiny(model_type, generator)
    hook = resolve_hook(model, "auto", 1, site)
    width = 32 if site == "attention" and model_type in ("gemma2", "llama") else 24
    W_dec = torch.randn(3, width, generator=generator)
    effects = logit_effects(model, hook, W_dec, 5)
    for i, d in enumerate(W_dec):
        if site == "attention":
            weight = model.get_submodule(hook.module).weight
            d = d @ weight if model_type == "gpt2" else weight @ d
            if model_type == "gemma2":
                d = derivative_of_norm(model.model.layers[1].post_attention_layernorm, d, generator)
        logits = model.get_output_embeddings().weight @ derivative_of_norm(
            model.get_submodule(FINAL_NORMS[model_type]), d, generator)
        logits -= logits.mean()
        torch.testing.assert_close(effects.promoted[i], logits.sort(descending=True).values[:5], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(effects.suppressed[i], logits.sort().values[:5], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[effects.promoted_ids[i]], effects.promoted[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[effects.suppressed_ids[i]], effects.suppressed[i], rtol=1e-4, atol=1e-4)


def test_logit_effects_of_what_is_no_part_of_the_stream_are_unknown(generator):
    model = tiny("llama", generator)
    inside = HookPoint(1, "inside", "model.layers.1.mlp.act_fn", "output")
    with pytest.raises(UnknownEffects, match=r"inside\.1 is 40 wide and the residual stream 24"):
        logit_effects(model, inside, torch.randn(3, 40), 5)


def test_texts_of_tokens(run):
    tokenizer = run.source.lm.tokenizer
    ids = run.source.activations.tokens("test")[2].tolist()
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)

    class SentencePiece:  # such a decoder drops the space before a word that begins a text
        def convert_ids_to_tokens(self, ids):
            return ["▁the", "re"]

        def decode(self, ids):
            return "re"

    assert token_texts(SentencePiece(), [5, 6]) == [" the", "re"]


def test_highlighted_text_is_escaped():
    shown = highlighted(Context("top", [1, 2, 3], [0.0, 2.0, 1.0], 1), ["<b>", "</script>", '"\n'], 2.0)
    assert "&lt;b&gt;" in shown and "&lt;/script&gt;" in shown and "&quot;↵" in shown and "<b>2</b>" in shown
    assert shown.count("<span") == 2 and 'title="2"' in shown and "0.85" in shown and "0.50" in shown


def test_users_files_are_surveyed_by_row(tmp_path, generator):
    x = torch.randn(12_000, 8, generator=generator)
    np.save(tmp_path / "acts.npy", x.numpy())
    activations = FileActivations(tmp_path / "acts.npy", heldout_fraction=0.8)
    sae = variant_class("topk")(d_in=8, d_sae=16, l0_target=3)
    found = survey(sae, activations)
    latents = sae.encode(x[-4800:])  # two pieces
    assert found.counts.fired.tolist() == (latents > 0).sum(0).tolist()
    _, places = found.top.of(4)
    assert places == latents[:, 4].topk(len(places)).indices.tolist()


# Opening runs.


def test_runs_that_cannot_be_opened(trained, tmp_path):
    record = read_record(trained / "topk")

    def copy(name, **values):
        for file in (trained / "topk").glob("sae.*"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "config.yaml").write_text((trained / "topk" / "config.yaml").read_text())
        write_record(tmp_path / name, {**record, **values})
        return tmp_path / name

    for folders, message in (
        ([tmp_path], "holds no record.json; give the folder of a finished run"),
        ([copy("failed", status="failed", error="no room")], "has not finished \\(no room\\)"),
        ([trained / "topk", copy("other", data_id="x")], "of x; only runs on the same ones can stand side by side"),
        ([tmp_path / "other"], "was trained on x, but its config gives builtin-residual.3-"),
    ):
        with pytest.raises(ValueError, match=message):
            open_runs(folders)
    old = copy("old")
    (old / "config.yaml").write_text((old / "config.yaml").read_text().replace("site: residual", ""))
    with pytest.raises(ValueError, match=r"does not say where the activations are .*hook\.site is missing"):
        open_runs([old])
