import json
import math
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig

from sae_zoo.lm import load
from sae_zoo.lm.dtype import DTYPES
from sae_zoo.lm.hooks import SITES, capture, lm_forward, resolve_hook
from sae_zoo.lm.load import LoadedLM, check_context_size, load_lm
from sae_zoo.lm.pretraining import build_model, train_tokenizer

CONF = Path(__file__).parents[2] / "conf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARCHITECTURE = {
    "model_type": "gemma2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "sliding_window": 4,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as ``python -m sae_zoo.pretrain`` writes it, and the model that was written."""
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"], 260, 8)
    model = build_model(ARCHITECTURE, tokenizer, 8, seed=0).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(saved[0], tmp_path / "lm"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def error_of(path, **kwargs) -> str:
    with pytest.raises(ValueError, match=r"\S") as info:
        load_lm(str(path), **kwargs)
    return " ".join(str(info.value).split())


def test_a_folder(saved):
    folder, original = saved
    lm = load_lm(str(folder))
    assert (lm.path, lm.n_layers) == (str(folder), 2)
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    ids = torch.tensor([lm.tokenizer("return x")["input_ids"]])
    assert lm.tokenizer.decode(ids[0]) == "return x" and lm.tokenizer.bos_token == "<bos>"
    assert torch.equal(lm_forward(lm.model, ids).logits, original(ids).logits)


def test_builtin_is_the_packaged_folder(saved, monkeypatch):
    assert Path(load.__file__).parent / "builtin" == load.BUILTIN
    monkeypatch.setattr(load, "BUILTIN", saved[0])
    assert load_lm("builtin").fingerprint == load_lm(str(saved[0])).fingerprint


@pytest.mark.skipif(not load.BUILTIN.is_dir(), reason="the built-in language model is not there yet")
def test_the_builtin_language_model_has_learnt_python():
    lm = load_lm("builtin")
    assert lm.model.config.model_type == "gemma2"
    text = ("import os\n\n\ndef main():\n    for name in os.listdir(path):\n        if name.endswith('.py'):\n"
            "            print(name)\n")
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    log_probs = lm_forward(lm.model, ids).logits[:, :-1].log_softmax(-1)
    loss = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    assert loss < math.log(lm.model.config.vocab_size) / 2
    hooks = [resolve_hook(lm.model, "auto", layer, site) for layer in range(lm.n_layers) for site in SITES["gemma2"]]
    assert len(capture(lm.model, hooks, ids)) == 3 * lm.n_layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_decides_the_weights_but_not_the_fingerprint(saved, dtype):
    lm = load_lm(str(saved[0]), dtype=dtype)
    assert {p.dtype for p in lm.model.parameters()} == {getattr(torch, dtype)}
    assert lm.fingerprint == load_lm(str(saved[0])).fingerprint


def test_a_model_that_is_spread_over_devices_computes_the_same(saved):
    pytest.importorskip("accelerate")
    whole, spread = load_lm(str(saved[0])), load_lm(str(saved[0]), device_map="auto")
    assert spread.fingerprint == whole.fingerprint and not any(p.requires_grad for p in spread.model.parameters())
    ids = torch.arange(12).reshape(2, 6) % 200
    hooks = [resolve_hook(lm.model, "auto", 1, "residual") for lm in (whole, spread)]
    a, b = (capture(lm.model, [hook], ids)[hook.name] for lm, hook in zip((whole, spread), hooks, strict=True))
    assert torch.equal(a.cpu(), b.cpu())


def test_a_device_map_without_accelerate(saved, monkeypatch):
    monkeypatch.setattr("sae_zoo.lm.load.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm\.device_map is 'auto', which needs the accelerate package: pip install"):
        load_lm(str(saved[0]), device_map="auto")


def test_the_fingerprint_is_that_of_the_contents(saved, folder):
    reference = load_lm(str(saved[0])).fingerprint
    (folder / "README.md").write_text("a model card")
    assert load_lm(str(folder)).fingerprint == reference  # another place, a file that decides nothing

    seen = {reference}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    seen.add(load_lm(str(folder)).fingerprint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 20.0}))
    seen.add(load_lm(str(folder)).fingerprint)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        seen.add(load_lm(str(folder)).fingerprint)
    assert len(seen) == 5


def test_a_hub_model_has_its_commit_as_fingerprint(saved, hub):
    """A hub cache as huggingface_hub lays it out, read without a network."""
    repository = hub / "models--acme--tiny"
    shutil.copytree(saved[0], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    lm = load_lm("acme/tiny")
    assert (lm.fingerprint, lm.path, lm.n_layers) == (COMMIT, "acme/tiny", 2)
    assert load_lm("acme/tiny", revision=COMMIT).fingerprint == COMMIT
    assert "another-branch" in error_of("acme/tiny", revision="another-branch")


@pytest.mark.parametrize("path", ["acme/nothing-there", "no/such/folder", "/no/such/folder"])
def test_a_path_that_leads_nowhere(hub, path):
    message = error_of(path)
    assert f"lm.path: {path!r}" in message and "HF_HUB_OFFLINE" in message


def test_an_unknown_dtype(saved):
    assert "'float8'" in (message := error_of(saved[0], dtype="float8")) and "float32, bfloat16, float16" in message


def test_a_folder_has_no_revision(saved):
    assert "lm.revision is 'main'" in error_of(saved[0], revision="main")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # a pickle is never opened
    assert f"{folder} is an LM folder without weights" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_config_or_tokenizer(folder, name):
    (folder / name).unlink()
    assert f"{folder} has no {name}" in error_of(folder)


def test_weights_that_lack_some(folder):
    """transformers alone would fill them in at random."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = error_of(folder)
    assert "lacks 2 of the model's weights, model.layers.1.mlp.up_proj.weight" in message


def test_weights_that_are_cut_off_or_of_another_shape(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert f"{folder} cannot be loaded" in error_of(folder)
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    assert f"{folder} cannot be loaded" in error_of(folder)


def test_no_code_of_the_repository_is_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    assert "cannot be loaded" in error_of(folder)
    assert not (folder / "ran").exists()


def test_a_small_folder_shows_no_progress_bar(saved, capfd):
    load_lm(str(saved[0]))
    assert capfd.readouterr().err == ""


def test_padding_that_the_model_does_not_know_becomes_eos(folder):
    tokenizer = load_lm(str(folder)).tokenizer
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    assert tokenizer.pad_token_id == 260
    tokenizer.save_pretrained(folder)
    tokenizer = load_lm(str(folder)).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"bos_token": "<another bos>"})
    tokenizer.save_pretrained(folder)
    assert "BOS at 261, but the model knows 260 tokens" in error_of(folder)


def test_rows_longer_than_the_positions_are_refused():
    learned, rotary = GPT2Config(n_positions=64), LlamaConfig(max_position_embeddings=64)
    for config in (learned, rotary):
        check_context_size(config, 64)
        with pytest.raises(ValueError, match=r"lm\.context_size is 65; the model was trained on 64"):
            check_context_size(config, 65)


def test_the_lm_configs_say_the_same_things():
    configs = {file.stem: OmegaConf.load(file) for file in (CONF / "lm").glob("*.yaml")}
    assert set(configs) >= {"builtin", "gemma2_2b", "gemma2_9b", "hf"}
    for name, config in configs.items():
        assert list(config) == ["name", "path", "revision", "dtype", "device_map", "context_size", "batch_size",
                                "document_separator", "sites"], name
        assert config.dtype in (*DTYPES, "auto")
        assert name == "hf" or config.name == name


def test_a_user_can_name_a_model_and_write_sites():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("lm/hf", overrides=[
            "lm.path=acme/tiny", "lm.sites={embedding: {module: model.embed_tokens, io: output}}"]).lm
    assert (config.name, config.path) == ("acme/tiny", "acme/tiny")
    model = build_model(ARCHITECTURE, train_tokenizer(["x"], 260, 8), 8, seed=0)
    assert resolve_hook(model, config.sites, 0, "embedding").module == "model.embed_tokens"


class Moved(torch.nn.Linear):
    """Says where it was put; there may be no other device here."""

    def __init__(self):
        super().__init__(2, 2)
        self.places = []

    def to(self, device):
        self.places.append(str(device))


def test_a_model_waits_in_host_memory_and_comes_back():
    model = Moved()
    lm = LoadedLM(model, None, "x", "x", 1, torch.device("cuda"))
    with lm.aside():
        assert model.places == ["cpu"]
    assert model.places == ["cpu", "cuda"]
    with pytest.raises(MemoryError), lm.aside():
        raise MemoryError
    assert model.places == ["cpu", "cuda", "cpu"]  # it stays away from a device that may be full


def test_a_model_that_is_spread_over_devices_stays():
    model = Moved()
    with LoadedLM(model, None, "x", "x", 1, None).aside():
        pass
    assert model.places == []
