"""Runs sparsify (``eai-sparsify``): its ``Trainer`` and ``SparseCoder``; see protocol.py.

Its trainer takes activations from the hook of a language model and from nowhere else, so it is given a model whose one
module puts out the batch that is due. Everything else is its own: the signum optimiser, the loss, the loop.
Settings that are not its defaults: the optimiser's rate where it is asked for, and no logging. Its signum has no
warm-up, and its default for AuxK is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from protocol import Run, Trained, open_channel, serve

CHANNEL = open_channel()  # before the peer is imported: it prints

import torch  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {"topk": {"control": "k"}}


class _Source(nn.Module):
    """Puts out the batch that is due, [1, batch, d_in], whatever it reads."""

    def __init__(self, d_in: int):
        super().__init__()
        self.due = torch.zeros(1, 1, d_in)

    def forward(self, _: Tensor) -> Tensor:
        return self.due


class _Model(nn.Module):
    """As much of a language model as the trainer looks at."""

    def __init__(self, d_in: int):
        super().__init__()
        self.source = _Source(d_in)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.source(input_ids)


class _Dataset:
    """One sequence a batch; reading it makes the next batch due. The tokens themselves say nothing."""

    def __init__(self, batches: Iterator[Tensor], run: Run, source: _Source):
        self._batches, self._source = batches, source
        self._steps, self._tokens = run.steps, torch.zeros(run.batch, dtype=torch.long)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, _: int) -> dict[str, Tensor]:
        self._source.due = next(self._batches)[None]
        return {"input_ids": self._tokens}


def fit(run: Run, batches: Iterator[Tensor]) -> Trainer:
    model = _Model(run.d_in)
    config = TrainConfig(
        SparseCoderConfig(num_latents=run.d_sae, k=int(run.sparsity)), batch_size=1, lr=run.lr,
        hookpoints=["source"], init_seeds=[run.seed], save_every=run.steps + 2, save_dir=str(run.scratch),
        log_to_wandb=False,
    )
    trainer = Trainer(config, _Dataset(batches, run, model.source), model)
    trainer.fit()
    return trainer


def export(run: Run, trainer: Trainer) -> Trained:
    sae = SparseCoder.load_from_disk(run.scratch / "unnamed" / "source")  # saved after schedule-free averaging
    settings = trainer.cfg.to_dict()
    settings["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    for identity in ("save_dir", "save_every", "log_to_wandb", "run_name", "wandb_log_frequency", "hookpoints"):
        settings.pop(identity)

    def encode(x: Tensor) -> Tensor:
        top_acts, top_indices, _ = sae.encode(x)
        return x.new_zeros(len(x), run.d_sae).scatter(1, top_indices, top_acts)

    return Trained(
        weights={"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec},
        apply_b_dec_to_input=True, k=sae.cfg.k, settings=settings,
        notes=["its trainer was given a model that puts out the batches"], encode=encode,
        reconstruct=lambda x: sae(x).sae_out,
    )


if __name__ == "__main__":
    serve(CHANNEL, packages=["eai-sparsify", "torch", "numpy"], variants=VARIANTS, fit=fit, export=export)
