"""Pretraining of a small causal language model: how the built-in one was made, and how another is made from a config.

Muon (Jordan et al. 2024, through ``torch.optim.Muon``) on the matrices of the transformer blocks, AdamW on the rest,
learning rates that warm up and then fall linearly to zero. The step is a pure function of the step number and of what a
checkpoint holds, so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def train_tokenizer(texts, vocab_size: int, context_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every string round-trips, there is no unknown token.

    Raises:
        ValueError: if ``vocab_size`` cannot hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context_size,
                                   clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def build_model(architecture: dict, tokenizer: PreTrainedTokenizerFast, context_size: int,
                seed: int) -> PreTrainedModel:
    """A randomly initialised causal language model.

    Args:
        architecture: ``model_type`` and the fields of its Hugging Face config; vocabulary and special tokens come from
            the tokenizer.
    """
    config = AutoConfig.for_model(
        **architecture, vocab_size=len(tokenizer), max_position_embeddings=context_size,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


class LanguageModelPretraining(pl.LightningModule):
    """Next-token training of a Hugging Face causal language model.

    The head and its loss run over ``loss_chunk`` positions at a time: the logits of a whole batch (positions x
    vocabulary, in float32) cost more in page faults than in arithmetic on a CPU.

    Args:
        model: any ``*ForCausalLM`` with an output embedding.
        n_steps: length of the schedule.
        matrix_lr, other_lr: peak learning rates of Muon (matrices inside blocks) and AdamW (the rest).
        weight_decay: of the matrices inside blocks.
        warmup_steps: linear warm-up; then linear decay to zero at ``n_steps``.
        ignore_ids: token ids that are never a target (padding).
        loss_chunk: positions whose logits exist at once.
    """

    def __init__(self, model: PreTrainedModel, *, n_steps: int, matrix_lr: float, other_lr: float, weight_decay: float,
                 warmup_steps: int, ignore_ids: tuple[int, ...], loss_chunk: int = 512):
        super().__init__()
        self.automatic_optimization = False  # two optimisers, and a loss that runs its own backward in chunks
        self.model = model
        self.n_steps, self.warmup_steps = n_steps, warmup_steps
        self.matrix_lr, self.other_lr, self.weight_decay = matrix_lr, other_lr, weight_decay
        self.ignore_ids, self.loss_chunk = ignore_ids, loss_chunk

    def configure_optimizers(self):
        inside = [p for p in self.model.base_model.parameters() if p.requires_grad]
        embeddings = {id(p) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
                      for p in m.parameters()}
        matrices = [p for p in inside if p.ndim == 2 and id(p) not in embeddings]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        return [
            torch.optim.Muon(matrices, lr=self.matrix_lr, weight_decay=self.weight_decay,
                             adjust_lr_fn="original"),
            torch.optim.AdamW(rest, lr=self.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at ``step``."""
        return min((step + 1) / self.warmup_steps, (self.n_steps - step) / (self.n_steps - self.warmup_steps), 1.0)

    def _targets(self, tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].long()
        ignored = torch.isin(targets, torch.tensor(self.ignore_ids, device=targets.device))
        return targets.masked_fill(ignored, -100).flatten()

    def summed_loss(self, tokens: Tensor, *, backward: bool) -> tuple[Tensor, int]:
        """Summed cross-entropy in nats over the targets of ``tokens`` [batch, context], and how many targets there are.

        With ``backward`` the gradient of the **mean** has been accumulated when this returns.
        """
        targets = self._targets(tokens)
        n_targets = int((targets != -100).sum())
        hidden = self.model.base_model(input_ids=tokens.long(), use_cache=False).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1)
        leaf = hidden.detach().requires_grad_(backward)
        head = self.model.get_output_embeddings()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(leaf), self.loss_chunk):
            rows = slice(start, start + self.loss_chunk)
            logits = head(leaf[rows]).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, targets[rows], ignore_index=-100, reduction="sum")
            if backward:
                self.manual_backward(loss / n_targets)
            total += loss.detach()
        if backward:
            self.manual_backward(hidden, leaf.grad)
        return total, n_targets

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        # Lightning counts a step for every optimiser it wraps; only the first is wrapped, so one batch is one step.
        wrapped, bare = self.optimizers(), self.optimizers(use_pl_optimizer=False)
        assert isinstance(wrapped, list) and isinstance(bare, list)  # of two
        muon, adamw = wrapped[0], bare[1]
        for optimizer, peak in ((muon, self.matrix_lr), (adamw, self.other_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.lr_factor(self.global_step)
            optimizer.zero_grad()
        total, n_targets = self.summed_loss(batch, backward=True)
        loss = float(total) / n_targets
        if not math.isfinite(loss):
            raise ValueError(f"loss is {loss} at step {self.global_step}; lower the learning rates")
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with Float32() if batch.device.type == "cpu" else nullcontext():
            muon.step()
        adamw.step()
        self.log("loss", loss, prog_bar=True)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        total, n_targets = self.summed_loss(batch, backward=False)
        self.log("validation_loss", total / n_targets, batch_size=n_targets, prog_bar=True)


class Float32(TorchFunctionMode):
    """A context in which ``Tensor.bfloat16()`` gives a float32 copy.

    Muon orthogonalises by matrix products in bfloat16, which a processor without instructions for it (AVX2 alone) works
    out one by one: 2.9 s a step for four layers of width 192, 0.09 s in float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def bits_per_byte(module: LanguageModelPretraining, tokens: Tensor, n_bytes: int, batch_size: int) -> float:
    """Held-out cross-entropy in bits for every UTF-8 byte of the text.

    Args:
        tokens: [n_rows, context] packed rows that hold all of the text; every token but BOS is a target once.
        n_bytes: bytes of that text.
    """
    module.eval()
    nats = sum(float(module.summed_loss(rows, backward=False)[0]) for rows in tokens.split(batch_size))
    return nats / math.log(2) / n_bytes
