from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from sae_zoo.lm.hooks import SITES, HookPoint, capture, hook_width, lm_forward, resolve_hook, splice

N_LAYERS, HIDDEN, VOCAB = 3, 24, 50
# Where the architecture has a head_dim of its own, the heads together (4 x 8) are not as wide as the stream (24).
ARCHITECTURES = {
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": 4,
               "query_pre_attn_scalar": 8},
    "llama": {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 40},
    "gpt_neox": {"intermediate_size": 40},
    "gpt2": {},
}
ATTENTION_WIDTH = {"gemma2": 32, "llama": 32, "gpt_neox": 24, "gpt2": 24}


def tiny(model_type: str):
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=N_LAYERS,
                                  num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                  max_position_embeddings=32, **ARCHITECTURES[model_type])
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases too: fresh ones are 0 or 1 and would hide a missing norm
        parameter.normal_(0.1, 0.3, generator=generator)
    return model


MODELS = {name: tiny(name) for name in ARCHITECTURES}
TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return MODELS[request.param]


def layers_of(model):
    return model.transformer.h if model.config.model_type == "gpt2" else model.base_model.layers


def final_norm_of(model):
    return {"gemma2": lambda: model.model.norm, "llama": lambda: model.model.norm,
            "gpt_neox": lambda: model.gpt_neox.final_layer_norm,
            "gpt2": lambda: model.transformer.ln_f}[model.config.model_type]()


def attention_to_stream(layer, model_type):
    """What a layer makes of its concatenated heads before it adds them to the stream, written out by hand."""
    return {"gemma2": lambda heads: layer.post_attention_layernorm(layer.self_attn.o_proj(heads)),
            "llama": lambda heads: layer.self_attn.o_proj(heads),
            "gpt_neox": lambda heads: layer.attention.dense(heads),
            "gpt2": lambda heads: layer.attn.c_proj(heads)}[model_type]


def all_hooks(model):
    return [resolve_hook(model, "auto", layer, site) for layer in range(N_LAYERS) for site in SITES["gemma2"]]


def n_hooks_inside(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_residual_is_hidden_states_after_the_layer(model):
    reference = model(TOKENS.long(), output_hidden_states=True).hidden_states
    captured = capture(model, all_hooks(model), TOKENS)
    for layer in range(N_LAYERS - 1):
        torch.testing.assert_close(captured[f"residual.{layer}"], reference[layer + 1], rtol=0, atol=0)
    # transformers gives the last layer's state after the final norm
    torch.testing.assert_close(final_norm_of(model)(captured[f"residual.{N_LAYERS - 1}"]), reference[-1])


def test_the_three_sites_of_a_layer_add_up(model):
    """residual out = residual in + what the attention heads become + mlp, in every architecture."""
    captured = capture(model, all_hooks(model), TOKENS)
    for layer in range(1, N_LAYERS):
        heads = attention_to_stream(layers_of(model)[layer], model.config.model_type)(captured[f"attention.{layer}"])
        total = captured[f"residual.{layer - 1}"] + heads + captured[f"mlp.{layer}"]
        torch.testing.assert_close(total, captured[f"residual.{layer}"])


def test_attention_and_mlp_as_seen_by_hand_registered_hooks(model):
    layer = layers_of(model)[1]
    out_projection, mlp = {
        "gemma2": lambda: (layer.self_attn.o_proj, layer.post_feedforward_layernorm),
        "llama": lambda: (layer.self_attn.o_proj, layer.mlp),
        "gpt_neox": lambda: (layer.attention.dense, layer.mlp),
        "gpt2": lambda: (layer.attn.c_proj, layer.mlp),
    }[model.config.model_type]()
    seen = {}
    handles = [out_projection.register_forward_hook(lambda m, args, out: seen.update(attention=args[0])),
               mlp.register_forward_hook(lambda m, args, out: seen.update(mlp=out))]
    model(TOKENS.long())
    for handle in handles:
        handle.remove()
    hooks = [resolve_hook(model, "auto", 1, site) for site in ("attention", "mlp")]
    captured = capture(model, hooks, TOKENS)
    assert list(captured) == ["attention.1", "mlp.1"]
    for site, expected in seen.items():
        torch.testing.assert_close(captured[f"{site}.1"], expected, rtol=0, atol=0)


def test_widths(model):
    width = {site: hook_width(model, resolve_hook(model, "auto", 1, site)) for site in SITES["gemma2"]}
    assert width == {"residual": HIDDEN, "mlp": HIDDEN, "attention": ATTENTION_WIDTH[model.config.model_type]}


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
def test_capture_stops_after_the_last_hook_point(model, site):
    calls = []
    watched = {**{f"layer {i}": layer for i, layer in enumerate(layers_of(model))},
               "final norm": final_norm_of(model), "head": model.get_output_embeddings()}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, m in watched.items()]
    try:
        # asked for out of order: the later one decides where to stop
        capture(model, [resolve_hook(model, "auto", 1, site), resolve_hook(model, "auto", 0, site)], TOKENS)
        assert calls == ["layer 0", "layer 1"]
        calls.clear()
        lm_forward(model, TOKENS)
        assert calls == ["layer 0", "layer 1", "layer 2", "final norm", "head"]
    finally:
        for handle in handles:
            handle.remove()


def test_captured_activations_carry_no_graph_even_from_a_trainable_model():
    model = tiny("llama").requires_grad_(True)
    x = capture(model, [resolve_hook(model, "auto", 1, "mlp")], TOKENS)["mlp.1"]
    assert not x.requires_grad and not x.is_inference()  # an SAE must be able to train on it
    (x * torch.ones((), requires_grad=True)).sum().backward()


def test_hooks_are_removed_also_after_an_error(model):
    lm_forward(model, TOKENS)  # transformers may install its own on the first call
    before = n_hooks_inside(model)
    hooks = all_hooks(model)
    capture(model, hooks, TOKENS)
    with pytest.raises(IndexError):
        capture(model, hooks, torch.full((1, 3), VOCAB))
    with pytest.raises(ZeroDivisionError), splice(model, hooks[0], lambda x: x):
        1 / 0  # noqa: B018
    assert n_hooks_inside(model) == before
    clean = lm_forward(model, TOKENS).logits
    with splice(model, hooks[0], torch.zeros_like):
        assert not torch.equal(lm_forward(model, TOKENS).logits, clean)
    assert torch.equal(lm_forward(model, TOKENS).logits, clean)
    assert n_hooks_inside(model) == before


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
def test_splice_of_the_same_changes_nothing(model, site):
    clean = lm_forward(model, TOKENS).logits
    with splice(model, resolve_hook(model, "auto", 1, site), lambda x: x.double()):  # the dtype is put back
        spliced = lm_forward(model, TOKENS).logits
    assert spliced.dtype == clean.dtype and torch.equal(spliced, clean)


def test_what_is_spliced_in_is_what_the_next_modules_see(model):
    """Against the sum of test_the_three_sites_of_a_layer_add_up, with each site replaced in turn."""
    after = resolve_hook(model, "auto", 1, "residual")
    before = [resolve_hook(model, "auto", *where) for where in ((0, "residual"), (1, "attention"), (1, "mlp"))]
    clean = capture(model, [*before, after], TOKENS)
    to_stream = attention_to_stream(layers_of(model)[1], model.config.model_type)

    new_stream = torch.randn_like(clean["residual.0"])
    with splice(model, before[0], lambda x: new_stream):
        seen = capture(model, [*before[1:], after], TOKENS)
    torch.testing.assert_close(seen["residual.1"], new_stream + to_stream(seen["attention.1"]) + seen["mlp.1"])
    assert not torch.allclose(seen["attention.1"], clean["attention.1"])

    new_mlp = torch.randn_like(clean["mlp.1"])
    with splice(model, before[2], lambda x: new_mlp):
        seen = capture(model, [after], TOKENS)["residual.1"]
    torch.testing.assert_close(seen, clean["residual.1"] - clean["mlp.1"] + new_mlp)

    new_heads = torch.randn_like(clean["attention.1"])
    with splice(model, before[1], lambda x: new_heads):
        seen = capture(model, [before[2], after], TOKENS)  # the mlp reads the attention's result, so it changes too
    torch.testing.assert_close(seen["residual.1"], clean["residual.0"] + to_stream(new_heads) + seen["mlp.1"])


def test_tuple_outputs(model):
    """An attention module returns (its output, the attention weights)."""
    name = {"gpt2": "transformer.h.{layer}.attn", "gpt_neox": "gpt_neox.layers.{layer}.attention"}.get(
        model.config.model_type, "model.layers.{layer}.self_attn")
    hook = resolve_hook(model, {"whole": {"module": name, "io": "output"}}, 1, "whole")
    assert hook == HookPoint(1, "whole", name.format(layer=1), "output") and hook.name == "whole.1"
    assert hook_width(model, hook) == HIDDEN
    heads = resolve_hook(model, "auto", 1, "attention")
    logits = []
    for point in (hook, heads):
        with splice(model, point, torch.zeros_like):
            logits.append(lm_forward(model, TOKENS).logits)
    bias = getattr(model.get_submodule(heads.module), "bias", None)
    assert torch.allclose(*logits) == (bias is None)  # zero heads leave W_O's bias; a zero output does not


def test_a_hook_is_of_the_thread_that_attached_it(model):
    """Somebody who reads the model ahead in another thread gets it as it is, and takes nothing from who is here."""
    hook, other = resolve_hook(model, "auto", 1, "residual"), ThreadPoolExecutor(1)
    clean = lm_forward(model, TOKENS).logits
    expected, seen = capture(model, [hook], TOKENS)[hook.name], []
    with splice(model, hook, lambda x: seen.append(1) or torch.zeros_like(x)):
        assert torch.equal(other.submit(capture, model, [hook], TOKENS).result()[hook.name], expected)
        assert torch.equal(other.submit(lm_forward, model, TOKENS).result().logits, clean) and not seen
        assert not torch.equal(lm_forward(model, TOKENS).logits, clean) and seen



def test_half_precision_stays_so():
    model = tiny("gemma2").to(torch.bfloat16)
    hook = resolve_hook(model, "auto", 1, "residual")
    assert capture(model, [hook], TOKENS)["residual.1"].dtype == torch.bfloat16
    with splice(model, hook, lambda x: x.float() * 1.5):
        assert lm_forward(model, TOKENS).logits.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(model):
    on_gpu = tiny(model.config.model_type).cuda()
    hooks = all_hooks(model)
    expected = capture(model, hooks, TOKENS)
    for name, x in capture(on_gpu, hooks, TOKENS).items():
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), expected[name], rtol=1e-3, atol=1e-3)
    with splice(on_gpu, hooks[0], lambda x: x.cpu()):  # the device is put back
        spliced = lm_forward(on_gpu, TOKENS).logits
    assert torch.equal(spliced, lm_forward(on_gpu, TOKENS).logits)


def error_of(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match=r"\S") as info:
        resolve_hook(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_unknown_sites_layers_and_modules_are_named():
    model = MODELS["gemma2"]
    assert "'resid'" in (message := error_of(model, "auto", 0, "resid")) and "residual, mlp, attention" in message
    for layer in (-1, N_LAYERS, "two", 1.0):
        assert "0 to 2" in (message := error_of(model, "auto", layer, "mlp")) and repr(layer) in message
    message = error_of(model, {"x": {"module": "model.layers.{layer}.mlp.gate", "io": "output"}}, 1, "x")
    assert "'model.layers.1.mlp.gate'" in message and "'model.layers.1.mlp' has gate_proj, up_proj" in message
    assert "the model has model, lm_head" in error_of(model, {"x": {"module": "h.{layer}", "io": "output"}}, 1, "x")
    assert "lm.sites.x" in error_of(model, {"x": {"module": "lm_head", "io": "both"}}, 1, "x")
    assert "lm.sites.x" in error_of(model, {"x": {"module": "lm_head"}}, 1, "x")
    assert "'automatic'" in error_of(model, "automatic", 1, "mlp")


def test_an_unknown_model_type_needs_its_own_sites():
    config = AutoConfig.for_model("opt", vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, ffn_dim=8,
                                  num_attention_heads=2, word_embed_proj_dim=8, max_position_embeddings=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert "'opt'" in (message := error_of(model, "auto", 0, "residual")) and "gpt_neox" in message
    sites = OmegaConf.create({"residual": {"module": "model.decoder.layers.{layer}", "io": "output"}})
    assert hook_width(model, resolve_hook(model, sites, 1, "residual")) == 8


def test_a_module_that_gives_no_activation_is_refused():
    model = MODELS["gemma2"]
    for module, io, found in (("model.embed_tokens", "input", "shape [1, 2]"),
                              ("model.layers.{layer}.self_attn", "input", "NoneType"),  # called with keywords only
                              ("model", "output", "BaseModelOutputWithPast")):
        hook = resolve_hook(model, {"x": {"module": module, "io": io}}, 0, "x")
        with pytest.raises(ValueError, match="not an activation") as info:
            hook_width(model, hook)
        assert found in str(info.value)


def test_a_module_that_is_never_called_is_refused():
    model = tiny("llama")
    model.unused = torch.nn.Identity()
    hook = resolve_hook(model, {"x": {"module": "unused", "io": "output"}}, 0, "x")
    with pytest.raises(ValueError, match="never called 'unused'"):
        capture(model, [hook], TOKENS)
    with pytest.raises(ValueError, match="never called 'unused'"), splice(model, hook, torch.zeros_like):
        lm_forward(model, TOKENS)


def test_splice_refuses_another_shape():
    model = MODELS["llama"]
    hook = resolve_hook(model, "auto", 0, "residual")
    with pytest.raises(ValueError, match=r"shape \[2, 9, 1\]"), splice(model, hook, lambda x: x[..., :1]):
        lm_forward(model, TOKENS)
