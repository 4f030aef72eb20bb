import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_zoo.config import compose_config
from sae_zoo.lm.hooks import SITES, capture, hook_width, resolve_hook
from sae_zoo.lm.load import load_lm
from sae_zoo.lm.skeleton import KNOWN_CONFIGS, load_skeleton, n_bytes, one_layer
from sae_zoo.planning.lm import harvest_cost, hook_widths, lm_cost

# As the hub shows them; width of the stream, of the concatenated heads, layers (arXiv 2408.00118, table 1).
GEMMA_2 = {"gemma2_2b": (2_614_341_888, 2304, 2048, 26), "gemma2_9b": (9_241_705_984, 3584, 4096, 42)}


@pytest.mark.parametrize("name", GEMMA_2)
def test_gemma_2_has_every_hook_point_of_the_paper_at_its_width(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    n_parameters, stream, heads, n_layers = GEMMA_2[name]
    lm = compose_config("train", [f"lm={name}"])["lm"]
    model = load_skeleton(lm["path"], dtype=lm["dtype"])
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.config.model_type == "gemma2"
    assert len(model.model.layers) == n_layers and model.num_parameters() == n_parameters
    assert n_bytes(model) == 2 * n_parameters  # bfloat16
    places = [(layer, site) for layer in (9, 20, min(31, n_layers - 1)) for site in SITES["gemma2"]]
    hooks = [resolve_hook(model, lm["sites"], *place) for place in places]
    assert hook_widths(model, hooks) == [heads if site == "attention" else stream for _, site in places]


def test_a_skeleton_is_the_model_without_its_weights():
    skeleton, real = load_skeleton("builtin"), load_lm("builtin").model
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert n_bytes(skeleton) == sum(p.numel() * 4 for p in real.parameters())
    hooks = [resolve_hook(real, "auto", 2, site) for site in SITES["gemma2"]]
    assert hook_widths(skeleton, hooks) == [hook_width(real, hook) for hook in hooks]


def test_a_folder_and_its_own_config_come_before_what_is_known(tmp_path, monkeypatch):
    config = AutoConfig.for_model(**{**KNOWN_CONFIGS["google/gemma-2-2b"], "num_hidden_layers": 3})
    config.save_pretrained(tmp_path / "google" / "gemma-2-2b")
    monkeypatch.chdir(tmp_path)
    assert len(load_skeleton("google/gemma-2-2b").model.layers) == 3


def test_what_is_no_language_model_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in ("acme/nothing-there", str(tmp_path)):
        with pytest.raises(ValueError, match=r"no config\.json within reach") as info:
            load_skeleton(path)
        assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match="'float8' is unknown"):
        load_skeleton("builtin", dtype="float8")
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a causal language model"):
        load_skeleton(str(tmp_path))


def tiny(n_layers: int):
    config = AutoConfig.for_model("llama", vocab_size=100, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                                  num_key_value_heads=4, num_hidden_layers=n_layers, max_position_embeddings=64)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_flops_of_a_model_by_hand():
    """2 a multiplication, for each weight of a layer and token, and for attention's two products, context x context."""
    batch, context, model = 3, 16, tiny(4)
    tokens, a_layer = batch * context, 4 * 32 * 32 + 3 * 32 * 48
    layer = 2 * tokens * a_layer + 2 * 2 * tokens * context * 32
    head = 2 * tokens * 32 * 100
    cost = lm_cost(model, resolve_hook(model, "auto", 1, "residual"), batch_size=batch, context_size=context)
    rope = 0.01  # the angles are a small product too
    assert cost.to_hook.flops == pytest.approx(2 * layer, rel=rope)
    assert cost.below == pytest.approx(layer, rel=2 * rope) and cost.stream_bytes == tokens * 32 * 4
    assert cost.forward.flops == pytest.approx(4 * layer + head, rel=rope)
    # Backward from the head through two layers: as much as forward for each weight, twice for attention's products.
    backward = 2 * layer + 2 * 2 * 2 * tokens * context * 32 + head
    assert cost.attribution.flops - cost.forward.flops == pytest.approx(backward, rel=rope)
    assert cost.d_in == 32 and cost.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert cost.to_hook.peak_bytes < cost.forward.peak_bytes <= cost.attribution.peak_bytes


def test_one_pass_for_all_hook_points_costs_what_the_last_does():
    model = tiny(4)
    hooks = [resolve_hook(model, "auto", layer, "residual") for layer in (0, 2, 1)]
    rows = {"batch_size": 2, "context_size": 8}
    together = harvest_cost(model, hooks, **rows)
    assert together.flops == lm_cost(model, hooks[1], **rows).to_hook.flops


def test_one_layer_of_a_model_runs():
    layer = one_layer(tiny(4)).to_empty(device="cpu")
    assert len(layer.model.layers) == 1
    assert capture(layer, [resolve_hook(layer, "auto", 0, "residual")], torch.zeros(1, 4, dtype=torch.int32))
