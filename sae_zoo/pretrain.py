"""``python -m sae_zoo.pretrain``: train a small causal language model and write it as a Hugging Face folder.

A run that was interrupted goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from transformers import PreTrainedTokenizerFast

from sae_zoo.config import build_corpus, run_entry_point
from sae_zoo.data.corpus import HELD_OUT, pack
from sae_zoo.data.loading import SeededRows, StepDataModule
from sae_zoo.lm.pretraining import LanguageModelPretraining, bits_per_byte, build_model, train_tokenizer

log = logging.getLogger(__name__)


def pretrain(cfg: DictConfig) -> dict:
    """Tokenizer, training, held-out evaluation, export; returns what ``pretraining.json`` in the folder says."""
    started = time.time()
    lm_dir = Path(cfg.lm_dir)
    work = lm_dir / "training"
    work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(cfg.corpus)

    if not (work / "tokenizer.json").exists():
        log.info("training a tokenizer of %d tokens", cfg.vocab_size)
        texts = (document.text for document in corpus.documents("train"))
        train_tokenizer(texts, cfg.vocab_size, cfg.context_size).save_pretrained(work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    packed = {split: pack(corpus.documents(split), tokenizer, cfg.context_size) for split in ("train", *HELD_OUT)}
    for split, rows in packed.items():
        log.info("%-10s %8d tokens, %9d bytes, %4d documents", split, rows.n_tokens, rows.n_bytes, rows.n_documents)

    model = build_model(OmegaConf.to_container(cfg.architecture), tokenizer, cfg.context_size, cfg.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    log.info("%s, %.2f million parameters", type(model).__name__, n_parameters / 1e6)
    module = LanguageModelPretraining(
        model, n_steps=cfg.n_steps, matrix_lr=cfg.matrix_lr, other_lr=cfg.other_lr, weight_decay=cfg.weight_decay,
        warmup_steps=cfg.warmup_steps, ignore_ids=(tokenizer.pad_token_id,),
    )
    trainer = pl.Trainer(
        max_steps=cfg.n_steps, accelerator=cfg.accelerator, devices=1, precision=cfg.precision,
        default_root_dir=work, logger=pl.loggers.CSVLogger(work, name="", version="log"), log_every_n_steps=20,
        enable_progress_bar=cfg.progress_bar, num_sanity_val_steps=0, val_check_interval=cfg.checkpoint_every,
        callbacks=[ModelCheckpoint(work, filename="{step}", every_n_train_steps=cfg.checkpoint_every),
                   *([TQDMProgressBar(refresh_rate=10)] if cfg.progress_bar else [])],
    )
    checkpoints = sorted(work.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    trainer.fit(
        module,
        datamodule=StepDataModule(
            SeededRows(packed["train"].tokens, cfg.batch_size, cfg.n_steps, seed=cfg.seed),
            torch.utils.data.DataLoader(packed["validation"].tokens[:64], cfg.batch_size),
        ),
        ckpt_path=checkpoints[-1] if checkpoints else None, weights_only=True,
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device=device, dtype=torch.bfloat16)  # evaluated as it is shipped
    report = {
        "parameters": n_parameters, "n_steps": cfg.n_steps, "tokens_seen": cfg.n_steps * cfg.batch_size * cfg.context_size,
        "corpus_fingerprint": corpus.fingerprint(), "seconds": round(time.time() - started),
        "torch": torch.__version__,
        "bits_per_byte": {s: bits_per_byte(module, packed[s].tokens.to(device), packed[s].n_bytes, cfg.batch_size)
                          for s in HELD_OUT},
        "held_out_bytes": {s: packed[s].n_bytes for s in HELD_OUT},
    }
    model.save_pretrained(lm_dir)
    tokenizer.save_pretrained(lm_dir)
    (lm_dir / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info("%s\nwritten to %s", json.dumps(report, indent=2), lm_dir)
    return report


def main() -> None:
    run_entry_point(pretrain, "pretrain")


if __name__ == "__main__":
    main()
