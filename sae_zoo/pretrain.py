"""``python -m sae_zoo.pretrain``: train a small causal language model and write it as a Hugging Face folder.

A run that was interrupted goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import lzma
import os
import shutil
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import TQDMProgressBar
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from sae_zoo.config import run_entry_point
from sae_zoo.data.corpus import HELD_OUT, pack
from sae_zoo.files import locked, replacing, write_text
from sae_zoo.lm.pretraining import LanguageModelPretraining, bits_per_byte, build_model, train_tokenizer
from sae_zoo.lm.pretraining_data import SeededRows, StepDataModule
from sae_zoo.records import digest, versions, write_json
from sae_zoo.running.checkpoints import CheckpointFiles, Checkpoints, newest_checkpoint
from sae_zoo.running.checks import Config
from sae_zoo.running.curves import Curves
from sae_zoo.running.settings import corpus_of, device_of

log = logging.getLogger(__name__)

REPORT = "pretraining.json"
# What does not change the model, or is no part of what it is made from.
_WITHOUT_EFFECT = ("output_dir", "lm_dir", "name", "checkpoint_every", "accelerator", "progress_bar")


def pretrain(config: Config) -> dict:
    """Tokenizer, training, held-out evaluation, export; returns what ``pretraining.json`` in the folder says.

    Raises:
        ValueError: if the folder holds a finished or half-trained model of another config.
    """
    lm_dir = Path(config["lm_dir"])
    with locked(lm_dir / "training" / ".lock", f"training {lm_dir}"):
        return _pretrain(config, lm_dir)


def _pretrain(config: Config, lm_dir: Path) -> dict:
    work, report_file = lm_dir / "training", lm_dir / REPORT
    config_file, tokenizer_dir, checkpoint_dir = work / "config.yaml", work / "tokenizer", work / "checkpoints"
    hash_ = _hash(config)
    if config_file.exists() and (found := _hash(yaml.safe_load(config_file.read_text()))) != hash_:
        raise ValueError(f"{lm_dir} holds a language model of another config (hash {found}, this one has {hash_}); "
                         "choose another name=..., or delete that folder")
    if report_file.exists():
        log.info("%s is finished; skipped", lm_dir)
        shutil.rmtree(checkpoint_dir, ignore_errors=True)  # left by a process that died just after its report
        return json.loads(report_file.read_text())
    write_text(config_file, yaml.safe_dump(dict(config), sort_keys=False))
    corpus = corpus_of(config["corpus"])

    unfinished = work / "tokenizer.tmp"
    if unfinished.exists() or not tokenizer_dir.exists():
        log.info("training a tokenizer of %d tokens", config["vocab_size"])
        texts = (document.text for document in corpus.documents("train"))
        train_tokenizer(texts, config["vocab_size"], config["context_size"]).save_pretrained(unfinished)
        _move_files(unfinished, tokenizer_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    packed = {split: pack(corpus.documents(split), tokenizer, config["context_size"]) for split in ("train", *HELD_OUT)}
    for split, rows in packed.items():
        log.info("%-10s %8d tokens, %9d bytes, %4d documents", split, rows.n_tokens, rows.n_bytes, rows.n_documents)

    if device_of(config["accelerator"]).type == "cpu" and "bf16" in str(config["precision"]) and (
            torch.backends.cpu.get_cpu_capability() == "AVX2"):
        log.warning("this processor has no products of bfloat16; precision=32-true is many times as fast")
    model = build_model(config["architecture"], tokenizer, config["context_size"], config["seed"])
    n_parameters = sum(p.numel() for p in model.parameters())
    log.info("%s, %.2f million parameters", type(model).__name__, n_parameters / 1e6)
    module = LanguageModelPretraining(
        model, n_steps=config["n_steps"], matrix_lr=config["matrix_lr"], other_lr=config["other_lr"],
        weight_decay=config["weight_decay"], warmup_steps=config["warmup_steps"], ignore_ids=(tokenizer.pad_token_id,),
    )
    curves = Curves(work / "metrics.csv")
    checkpoints = Checkpoints(checkpoint_dir, every=config["checkpoint_every"], curves=curves)
    trainer = pl.Trainer(
        max_steps=config["n_steps"], accelerator=config["accelerator"], devices=1, precision=config["precision"],
        default_root_dir=work, logger=curves, log_every_n_steps=20, enable_progress_bar=config["progress_bar"],
        enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=min(config["checkpoint_every"], config["n_steps"]), plugins=[CheckpointFiles()],
        callbacks=[checkpoints, *([TQDMProgressBar(refresh_rate=10)] if config["progress_bar"] else [])],
    )
    data = StepDataModule(
        SeededRows(packed["train"].tokens, config["batch_size"], config["n_steps"], seed=config["seed"]),
        torch.utils.data.DataLoader(
            packed["validation"].tokens[:64],  # type: ignore[arg-type]  # len() and [] are enough for torch
            config["batch_size"]))
    torch.manual_seed(config["seed"])  # of the dropout that some architectures have
    checkpoints.fit(trainer, module, data, newest_checkpoint(checkpoint_dir))

    device = device_of(config["accelerator"])
    # Evaluated as it is shipped, and loaded: rounded, then widened.
    module.to(device=device, dtype=torch.bfloat16).float()
    report = {
        "architecture": type(model).__name__, "n_parameters": n_parameters, "n_steps": config["n_steps"],
        "tokens_seen": config["n_steps"] * config["batch_size"] * config["context_size"],
        "context_size": config["context_size"], "vocab_size": len(tokenizer),
        "corpus_fingerprint": corpus.fingerprint(), "versions": versions(), "held_out": {},
    }
    for split in HELD_OUT:
        text = "".join(document.text for document in corpus.documents(split)).encode()
        report["held_out"][split] = {
            "bytes": len(text), "documents": packed[split].n_documents,
            "bits_per_byte": bits_per_byte(module, packed[split].tokens.to(device), len(text), config["batch_size"]),
            "bits_per_byte_of_xz_9": len(lzma.compress(text, preset=9)) * 8 / len(text),
        }
    unfinished = work / "export"
    module.bfloat16()
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    except SafetensorError as error:  # how safetensors speaks of a full disk
        raise OSError(f"{unfinished} cannot be written: {error}") from error
    _move_files(unfinished, lm_dir)
    write_text(lm_dir / "README.md", model_card(config, report))
    write_json(report_file, report)  # last: it says that all is there
    shutil.rmtree(checkpoint_dir)
    for split, measured in report["held_out"].items():
        log.info("%-10s %.3f bits per byte (xz -9: %.3f)", split, measured["bits_per_byte"],
                 measured["bits_per_byte_of_xz_9"])
    log.info("written to %s", lm_dir)
    return report


def _hash(config: Config) -> str:
    return digest({key: value for key, value in config.items() if key not in _WITHOUT_EFFECT})


def _move_files(source: Path, target: Path) -> None:
    """Move the files of ``source`` into ``target``, each whole or not at all, and remove ``source``."""
    for file in sorted(source.iterdir()):
        with replacing(target / file.name) as temporary:
            os.replace(file, temporary)
    source.rmdir()


def model_card(config: Config, report: dict) -> str:
    """The README.md of the folder: what the model is, how it was made, what was measured."""
    rows = "\n".join(
        f"| {split} | {m['documents']} | {m['bytes']:,} | {m['bits_per_byte']:.3f} | {m['bits_per_byte_of_xz_9']:.3f} |"
        for split, m in report["held_out"].items())
    architecture = ", ".join(f"{key} {value}" for key, value in config['architecture'].items())
    model = f"{report['architecture']}, {report['n_parameters'] / 1e6:.2f} million parameters, bfloat16"
    corpus, seen, muon, adamw = (config["corpus"]["name"], report["tokens_seen"] / 1e6, config["matrix_lr"],
                                 config["other_lr"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config['name']}

A small causal language model ({model}) to
train sparse autoencoders on where no other can be had. It knows its corpus (`{corpus}`) and nothing else.

* Architecture: {architecture}; context {report["context_size"]}, byte-level BPE of {report["vocab_size"]:,} tokens.
* Training: {report["n_steps"]:,} steps of {config['batch_size']} x {config['context_size']} tokens ({seen:.1f}
  million in all), Muon {muon} on matrices and AdamW {adamw} on the rest, {config['precision']}, seed {config['seed']}.
* Documents are split by a hash of their name; held-out ones were not trained on. Corpus fingerprint
  `{report["corpus_fingerprint"][:16]}`, Python {report["versions"]["python"]}, torch {report["versions"]["torch"]}.

| held-out split | documents | bytes | bits per byte | `xz -9` |
|---|---|---|---|---|
{rows}

Made by `python -m sae_zoo.pretrain`.
"""


def main() -> None:
    run_entry_point(pretrain, "pretrain")


if __name__ == "__main__":
    main()
