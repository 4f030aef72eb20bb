"""Runs dictionary_learning (``dictionary-learning``): its trainers by its ``trainSAE``; see protocol.py.

Settings that are not its defaults, where it is not asked for those, and why:

* ``normalize_activations=True`` of ``trainSAE``: "very helpful for hyperparameter transfer", and its demo does so.
* warm-ups: its defaults are 1,000 steps (learning rate) and 2,000 (penalty), more than a short run has; they are taken
  in proportion to a run of 30,000. It refuses a warm-up longer than the run, so this goes for its defaults too.
* linear decay over the last 20 % of the steps, as in its demo.
* JumpReLU: ``bandwidth=0.01``, ten times its default, at which the window catches few of a short run's tokens. At
  one L0 its FVU was 3 % lower than at 0.001 and 2 % lower than at 0.03 (d_sae 2,048, 1,000 steps of 1,024, rate 2e-3);
  a ``sparsity_penalty`` of 0.1 instead of 1 made it 15 % higher.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from protocol import Run, Trained, open_channel, serve

CHANNEL = open_channel()  # before the peer is imported: it prints

import torch  # noqa: E402
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers import (  # noqa: E402
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402
from torch import Tensor  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"control": "k"},
    "jumprelu": {"control": "target"},
    "relu": {"control": "coefficient", "start": 0.1},
    "gated": {"control": "coefficient", "start": 0.1},
}
_TRAINERS = {"topk": TopKTrainer, "jumprelu": JumpReluTrainer, "relu": StandardTrainer, "gated": GatedSAETrainer}
_DEFAULT_LENGTH = 30_000  # steps


class _Data:
    """What ``trainSAE`` iterates over twice: once for the norm, where it is asked for, then to train."""

    def __init__(self, *passes: Iterator[Tensor]):
        self._passes = iter(passes)

    def __iter__(self) -> Iterator[Tensor]:
        return next(self._passes)


def _trainer_config(run: Run) -> dict[str, Any]:
    config: dict[str, Any] = {
        "trainer": _TRAINERS[run.variant], "steps": run.steps, "activation_dim": run.d_in, "dict_size": run.d_sae,
        "layer": 0, "lm_name": "none", "device": "cpu", "seed": run.seed,
        "warmup_steps": 1000 * run.steps // _DEFAULT_LENGTH,
    }
    if run.lr is not None:
        config["lr"] = run.lr
    if not run.defaults:
        config["decay_start"] = run.steps * 4 // 5
    if run.variant == "topk":
        return {**config, "k": int(run.sparsity)}
    config["sparsity_warmup_steps"] = 2000 * run.steps // _DEFAULT_LENGTH
    if run.variant == "jumprelu":
        return {**config, "target_l0": run.sparsity, **({} if run.defaults else {"bandwidth": 0.01})}
    return config if run.sparsity is None else {**config, "l1_penalty": run.sparsity}


def fit(run: Run, batches: Iterator[Tensor]) -> None:
    torch.manual_seed(run.seed)  # not all of its trainers seed
    normalise = not run.defaults
    data = _Data(run.batches(), batches) if normalise else _Data(batches)
    trainSAE(data=data, trainer_configs=[_trainer_config(run)], steps=run.steps, save_dir=str(run.scratch),
             normalize_activations=normalise, device="cpu")


def export(run: Run, _: None) -> Trained:
    folder = run.scratch / "trainer_0"
    settings = json.loads((folder / "config.json").read_text())["trainer"]
    settings["normalize_activations"] = not run.defaults
    file, k, apply_b_dec = folder / "ae.pt", None, True
    if run.variant == "topk":
        sae = AutoEncoderTopK.from_pretrained(file)
        k = int(sae.k)
        weights = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.decoder.weight.T,
                   "b_dec": sae.b_dec}
    elif run.variant == "jumprelu":
        sae = JumpReluAutoEncoder.from_pretrained(file)
        apply_b_dec = sae.apply_b_dec_to_input
        weights = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        weights["threshold"] = sae.threshold.clamp_min(0)  # a ReLU follows, so the same function
    elif run.variant == "relu":
        sae = AutoEncoder.from_pretrained(file, normalize_decoder=False)
        weights = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.decoder.weight.T,
                   "b_dec": sae.bias}
    else:
        sae = GatedAutoEncoder.from_pretrained(file)
        weights = {"W_enc": sae.encoder.weight.T, "W_dec": sae.decoder.weight.T, "b_dec": sae.decoder_bias,
                   "b_gate": sae.gate_bias, "b_mag": sae.mag_bias, "r_mag": sae.r_mag}
    for identity in ("layer", "lm_name", "wandb_name", "submodule_name", "device"):
        settings.pop(identity, None)
    return Trained(weights=weights, apply_b_dec_to_input=apply_b_dec, k=k, settings=settings, notes=[],
                   encode=sae.encode, reconstruct=sae.forward)


if __name__ == "__main__":
    serve(CHANNEL, packages=["dictionary-learning", "torch", "numpy"], variants=VARIANTS, fit=fit, export=export)
