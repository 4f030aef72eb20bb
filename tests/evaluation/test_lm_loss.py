import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from sae_zoo.evaluation import lm_loss
from sae_zoo.evaluation.lm_loss import ablated_cross_entropy, lm_metrics
from sae_zoo.lm.hooks import capture, resolve_hook
from sae_zoo.lm.resume import FromLayer

N_LAYERS, HEADS, KV_HEADS, HEAD_DIM, WINDOW, VOCAB, CONTEXT = 3, 4, 2, 8, 4, 40, 9
SPECIAL = 3  # token ids below are special


def tiny() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=N_LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, sliding_window=WINDOW, query_pre_attn_scalar=HEAD_DIM,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    )
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    return model


MODEL = tiny()
TOKENS = torch.randint(SPECIAL, VOCAB, (5, CONTEXT), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
TOKENS[:, 0] = 1  # BOS
TOKENS[1, 4], TOKENS[2, 3] = 2, 2  # EOS in the middle
TOKENS[4, 5:] = 0  # padding
KEEP = TOKENS >= SPECIAL


def poor(x):
    """A reconstruction that is wrong in a way that depends on x."""
    return 0.6 * x + 0.2 * torch.sin(3 * x)


def metrics(site="residual", layer=1, reconstruct=poor, *, model=MODEL, tokens=TOKENS, keep=KEEP, batch_size=2):
    hook = resolve_hook(model, "auto", layer, site)
    where = (FromLayer(model, hook), hook, tokens, keep)
    return lm_metrics(*where, reconstruct, ce_ablated=ablated_cross_entropy(*where, batch_size=batch_size),
                      batch_size=batch_size)


def gemma_by_hand(row, kept, site=None, layer=None, substitute=None):
    """Logits [context, vocabulary] of one row in float64, from the weights and the Gemma 2 paper's equations; with
    ``substitute`` in the place of the activation at (site, layer) where ``kept``."""
    w = {name: value.double() for name, value in MODEL.state_dict().items()}
    rows_kept = torch.tensor(kept)

    def at(here, i, x):
        if (here, i) == (site, layer):
            x = torch.where(rows_kept[:, None], substitute(x), x)
        return x

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w[name + ".weight"])

    def rotate(x):  # [context, heads, head_dim]
        angles = torch.arange(CONTEXT)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][row] * 24**0.5
    for i in range(N_LAYERS):
        name = f"model.layers.{i}."
        h = norm(x, name + "input_layernorm")
        q, k, v = ((h @ w[f"{name}self_attn.{p}_proj.weight"].T).view(CONTEXT, -1, HEAD_DIM) for p in "qkv")
        q, k = rotate(q), rotate(k)
        heads = torch.zeros(CONTEXT, HEADS, HEAD_DIM, dtype=torch.float64)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            for t in range(CONTEXT):
                first = max(0, t - WINDOW + 1) if i % 2 == 0 else 0  # even layers see a sliding window
                scores = k[first : t + 1, group] @ q[t, head] / HEAD_DIM**0.5
                heads[t, head] = (5 * torch.tanh(scores / 5)).softmax(0) @ v[first : t + 1, group]
        attention = at("attention", i, heads.flatten(1)) @ w[name + "self_attn.o_proj.weight"].T
        x = x + norm(attention, name + "post_attention_layernorm")
        h = norm(x, name + "pre_feedforward_layernorm")
        h = F.gelu(h @ w[name + "mlp.gate_proj.weight"].T, approximate="tanh") * (h @ w[name + "mlp.up_proj.weight"].T)
        mlp = norm(h @ w[name + "mlp.down_proj.weight"].T, name + "post_feedforward_layernorm")
        x = at("residual", i, x + at("mlp", i, mlp))
    return 10 * torch.tanh(norm(x, "model.norm") @ w["model.embed_tokens.weight"].T / 10)


def metrics_by_hand(site, layer):
    ce, kl, n = [0.0, 0.0, 0.0], 0.0, 0
    for row, kept in zip(TOKENS.tolist(), KEEP.tolist(), strict=True):
        clean, spliced, ablated = (gemma_by_hand(row, kept, site, layer, f).log_softmax(-1)
                                   for f in (lambda x: x, poor, torch.zeros_like))
        for t in range(CONTEXT - 1):
            if kept[t + 1]:
                n += 1
                for i, log_probs in enumerate((clean, spliced, ablated)):
                    ce[i] -= float(log_probs[t, row[t + 1]])
                kl += sum(math.exp(p) * (p - q) for p, q in zip(clean[t].tolist(), spliced[t].tolist(), strict=True))
    return [value / n for value in ce], kl / n, n


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
@pytest.mark.parametrize("layer", [0, 1])
def test_against_a_language_model_written_by_hand(site, layer):
    (clean, spliced, ablated), kl, n = metrics_by_hand(site, layer)
    found = metrics(site, layer)
    assert found.n_targets == n == int(KEEP.sum())
    assert found.ce_clean == pytest.approx(clean, rel=1e-5)
    assert found.ce_spliced == pytest.approx(spliced, rel=1e-5)
    assert found.ce_ablated == pytest.approx(ablated, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.delta_lm_loss == pytest.approx(spliced - clean, abs=1e-5)
    assert found.loss_recovered == pytest.approx(1 - (spliced - clean) / (ablated - clean), abs=1e-4)
    assert min(abs(spliced - clean), abs(ablated - clean), abs(ablated - spliced), kl) > 1e-3  # something is at stake


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_costs_nothing_and_zero_recovers_nothing(site, dtype):
    model = tiny().to(dtype)
    identity = metrics(site, reconstruct=lambda x: x, model=model)
    assert (identity.delta_lm_loss, identity.loss_recovered, identity.kl) == (0.0, 1.0, 0.0)
    zero = metrics(site, reconstruct=torch.zeros_like, model=model)
    assert (zero.loss_recovered, zero.ce_spliced) == (0.0, zero.ce_ablated)
    assert zero.ce_ablated == identity.ce_ablated != zero.ce_clean


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
@pytest.mark.parametrize("logits_at_once", [1, 7 * VOCAB])
def test_chunks_do_not_matter(monkeypatch, batch_size, logits_at_once):
    whole = metrics(batch_size=5)
    monkeypatch.setattr(lm_loss, "_LOGITS_AT_ONCE", logits_at_once)
    found = metrics(batch_size=batch_size)
    assert vars(found) == pytest.approx(vars(whole), rel=1e-5)


def test_reconstruct_sees_the_kept_activations_in_float32_and_nothing_else():
    model = tiny().to(torch.bfloat16)
    seen = []

    def reconstruct(x):
        seen.append(x)
        return x

    metrics("attention", reconstruct=reconstruct, model=model)
    activations = capture(model, [resolve_hook(model, "auto", 1, "attention")], TOKENS)["attention.1"]
    assert {x.dtype for x in seen} == {torch.float32}
    torch.testing.assert_close(torch.cat(seen), activations[KEEP].float(), rtol=2e-2, atol=2e-2)


def test_what_is_not_kept_is_neither_replaced_nor_scored():
    """Only the tokens of one row count when every other is marked special, wherever they stand."""
    keep = torch.zeros_like(KEEP)
    keep[3] = KEEP[3]
    only = metrics(keep=keep)
    alone = metrics(tokens=TOKENS[3:4], keep=KEEP[3:4])
    assert vars(only) == pytest.approx(vars(alone), rel=1e-5)


def test_rows_of_nothing_but_padding_never_reach_reconstruct():
    seen = []
    rows = torch.cat([TOKENS, torch.zeros_like(TOKENS[:3])])
    found = metrics(tokens=rows, keep=rows >= SPECIAL, batch_size=1,
                    reconstruct=lambda x: seen.append(len(x)) or poor(x))
    assert min(seen) > 0 and found == metrics(batch_size=1)


def test_the_model_is_as_before():
    hook = resolve_hook(MODEL, "auto", 1, "residual")
    clean = MODEL(TOKENS.long()).logits
    with pytest.raises(ZeroDivisionError):
        metrics(reconstruct=lambda x: 1 / 0)
    metrics()
    assert torch.equal(MODEL(TOKENS.long()).logits, clean)
    assert not MODEL.get_submodule(hook.module)._forward_pre_hooks


def test_an_ablation_without_effect_gives_no_loss_recovered():
    model = tiny()
    model.model.layers[1].post_feedforward_layernorm.weight.fill_(-1)  # 1 + weight = 0: this MLP adds nothing
    found = metrics("mlp", model=model)
    assert found.ce_ablated == found.ce_clean and math.isnan(found.loss_recovered)


def test_a_reconstruction_of_nan_is_reported_as_such():
    found = metrics(reconstruct=lambda x: x * math.nan)
    assert math.isnan(found.ce_spliced) and math.isnan(found.delta_lm_loss) and math.isfinite(found.ce_clean)


@pytest.mark.parametrize("bad", [
    {"keep": torch.zeros_like(KEEP)}, {"keep": KEEP[:, 1:]}, {"tokens": TOKENS[0], "keep": KEEP[0]},
    {"reconstruct": lambda x: x[:, :1]}, {"reconstruct": lambda x: x[:1]},
])
def test_what_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match=r"shape|target"):
        metrics(**bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    assert vars(metrics(model=tiny().cuda())) == pytest.approx(vars(metrics()), rel=1e-3)
