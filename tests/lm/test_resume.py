import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_zoo.lm.hooks import SITES, lm_forward, resolve_hook, splice
from sae_zoo.lm.resume import FromLayer, Streams

TOKENS = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def tiny(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=0, n_embd=16, n_layer=4,
        n_head=2)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def calls_of(model, path="model.layers"):
    """A list that grows by the number of each layer that computes."""
    seen = []
    for i, layer in enumerate(model.get_submodule(path)):
        next(layer.children()).register_forward_hook(lambda *_, i=i: seen.append(i))
    return seen


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
@pytest.mark.parametrize("model_type", SITES)
def test_a_pass_that_begins_at_the_layer_gives_the_bits_of_a_whole_one(model_type, site):
    model = tiny(model_type)
    hook = resolve_hook(model, "auto", 2, site)
    streams = Streams()
    forward = FromLayer(model, hook, streams)
    with splice(model, hook, torch.zeros_like):
        forward(TOKENS)
    assert streams.trusted and len(streams.kept) == 1
    assert torch.equal(forward(TOKENS).logits, lm_forward(model, TOKENS).logits)
    with splice(model, hook, lambda x: 0.5 * x):
        assert torch.equal(forward(TOKENS).logits, lm_forward(model, TOKENS).logits)
    other = TOKENS.flip(0)
    assert torch.equal(FromLayer(model, hook, streams)(other).logits, lm_forward(model, other).logits)


def test_layers_below_run_once_for_each_batch():
    model = tiny("llama")
    seen, forward = calls_of(model), FromLayer(model, resolve_hook(model, "auto", 2, "residual"))
    forward(TOKENS)
    assert seen == [0, 1, 2, 3, 2, 3]  # whole, and from the layer on, to see that they are the same
    seen.clear()
    forward(TOKENS)
    assert seen == [2, 3]
    seen.clear()
    forward(TOKENS.flip(0))
    forward(TOKENS.flip(0))
    assert seen == [0, 1, 2, 3, 2, 3]


def test_a_layer_that_takes_more_than_the_stream_is_found_out():
    model = tiny("llama")
    layers, first = model.model.layers, []
    layers[0].register_forward_hook(lambda module, args, output: first.append(output))
    layers[3].register_forward_pre_hook(lambda module, args: (args[0] + first.pop() if first else args[0], *args[1:]))
    hook, streams = resolve_hook(model, "auto", 2, "residual"), Streams()
    # Asked of the pass that begins at the layer, the first layer's hook sees the stream of the layer instead.
    expected = lm_forward(model, TOKENS).logits
    for _ in range(2):
        first.clear()
        assert torch.equal(FromLayer(model, hook, streams)(TOKENS).logits, expected)
    assert streams.trusted is False and not streams.kept


def test_without_room_or_layers_below_passes_are_whole():
    model = tiny("llama")
    seen = calls_of(model)
    for layer, streams in ((2, Streams(room=100)), (0, Streams())):
        forward = FromLayer(model, resolve_hook(model, "auto", layer, "residual"), streams)
        seen.clear()
        forward(TOKENS), forward(TOKENS)
        assert seen == [0, 1, 2, 3] * 2 and not streams.kept


def test_another_thread_reads_the_whole_model_meanwhile():
    model = tiny("llama")
    hook, expected, found = resolve_hook(model, "auto", 2, "residual"), lm_forward(model, TOKENS).logits, []
    forward = FromLayer(model, hook)
    forward(TOKENS.flip(0))

    def beside(x):
        reader = threading.Thread(target=lambda: found.append(lm_forward(model, TOKENS).logits))
        reader.start()
        reader.join()
        return x

    with splice(model, hook, beside):
        forward(TOKENS.flip(0))
    assert len(found) == 1 and torch.equal(found[0], expected)
    assert all("forward" not in vars(layer) for layer in model.model.layers)
