"""Pretraining through its entry point: a tiny model with dropout, so that the random state has to survive too."""

import itertools
import os
import random
import signal
from contextlib import nullcontext

import pytest
import torch

from sae_zoo import pretrain
from sae_zoo.config import CONFIG_DIR, compose_config
from sae_zoo.lm.hooks import capture, hook_width, resolve_hook
from sae_zoo.lm.load import load_lm
from sae_zoo.lm.pretraining import Float32, LanguageModelPretraining, build_model

ARCHITECTURE = "+architecture={model_type: gpt2, n_embd: 32, n_inner: 48, n_layer: 2, n_head: 2}"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["def", "class", "self", "return", "import", "for"]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(words) for _ in range(90)))
    return folder


@pytest.fixture
def run(text, enter, monkeypatch):
    def call(folder, *overrides):
        monkeypatch.chdir(folder)  # so that no path differs
        status, out, err = enter(
            pretrain, "corpus=text_files", f"corpus.paths={text}", "vocab_size=270", "context_size=32", "batch_size=4",
            "n_steps=40", "checkpoint_every=10", "warmup_steps=5", "precision=32-true", "progress_bar=false",
            "name=tiny", "output_dir=out", "~architecture", ARCHITECTURE, *overrides)
        assert "Traceback" not in err
        return status, out + err

    return call


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(run, tmp_path_factory):
    """The files of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder)[0] == 0
    return files(folder)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIG_DIR / "architecture").glob("*.yaml"))])
def test_every_architecture_has_the_sites_that_saes_are_trained_on(name):
    config = compose_config("pretrain", [f"architecture={name}"])
    architecture = config["architecture"]
    model = build_model(architecture, load_lm("builtin").tokenizer, config["context_size"], config["seed"])
    tokens = torch.randint(3, config["vocab_size"], (1, 8))
    for site in ("residual", "mlp", "attention"):
        hook = resolve_hook(model, "auto", architecture["num_hidden_layers"] - 1, site)
        assert capture(model, [hook], tokens)[hook.name].shape == (1, 8, hook_width(model, hook))


def test_a_finished_model_is_loaded_and_skipped_and_another_config_is_refused(run, tmp_path):
    assert run(tmp_path)[0] == 0
    lm_dir, before = tmp_path / "out/lm/tiny", files(tmp_path)
    assert load_lm(str(lm_dir)).n_layers == 2 and not (lm_dir / "training/checkpoints").exists()
    status, printed = run(tmp_path, "checkpoint_every=20")
    assert status == 0 and "is finished; skipped" in printed and files(tmp_path) == before
    status, printed = run(tmp_path, "seed=1")
    assert status == 2 and "holds a language model of another config" in printed and files(tmp_path) == before


def test_a_processor_without_bfloat16_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for precision, said in (("bf16-mixed", True), ("32-true", False)):
        status, printed = run(tmp_path, f"precision={precision}", f"name={precision}", "n_steps=8")
        assert status == 0 and ("precision=32-true is many times as fast" in printed) == said


def test_what_was_interrupted_ends_as_if_it_had_not_been(run, whole, tmp_path, monkeypatch):
    honest, waiting = LanguageModelPretraining.training_step, [7, 23]

    def interrupted(self, batch, batch_idx):
        if self.global_step in waiting:
            waiting.remove(self.global_step)
            os.kill(os.getpid(), signal.SIGINT)
        return honest(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModelPretraining, "training_step", interrupted)
    for after in (8, 24):
        status, printed = run(tmp_path)
        assert status == 130
        assert f"sae_zoo.pretrain: interrupted after step {after}; the same command goes on" in printed
    assert run(tmp_path)[0] == 0 and files(tmp_path) == whole


@pytest.mark.parametrize("n_left", [0, 20_000], ids=["no file", "half the weights"])
def test_a_disk_that_is_full_when_the_model_is_written(run, whole, small_disk, monkeypatch, n_left):
    disk, honest = small_disk(8_000_000), pretrain.bits_per_byte

    def fill(*args):
        with (open(disk / "filler", "wb", buffering=0) as file,
              pytest.raises(OSError, match="No space left on device")):
            file.writelines(itertools.repeat(b"0" * 1024))
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - n_left)
        return honest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "bits_per_byte", fill)
        status, printed = run(disk)
    assert status == 2 and "No space left on device" in printed and not (disk / "out/lm/tiny/pretraining.json").exists()
    (disk / "filler").unlink()
    monkeypatch.setattr(LanguageModelPretraining, "training_step", lambda *_: pytest.fail("it trains again"))
    assert run(disk)[0] == 0 and files(disk) == whole


def test_muon_in_float32_is_muon_but_for_the_rounding_of_bfloat16():
    def step(context):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(48, 32))
        weight.grad = torch.randn(48, 32)
        gradient = weight.grad.clone()
        with context:
            torch.optim.Muon([weight], lr=0.02).step()
        assert torch.equal(weight.grad, gradient)
        return weight.detach()

    difference = (step(nullcontext()) - step(Float32())).norm() / (0.02 * 32**0.5)  # singular values of a step: about 1
    assert 0 < difference < 0.02
