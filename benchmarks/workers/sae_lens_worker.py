"""Runs SAELens (``sae-lens``): its training SAEs and its ``SAETrainer.fit`` on given batches; see protocol.py.

Settings that are not its defaults, where it is not asked for those, and why:

* ``normalize_activations=expected_average_only_in``: its coefficients and thresholds are meant for E||x|| = sqrt(d_in).
* learning rate: warm-up over 5 % and linear decay over the last 20 % of the steps, the latter as its training tutorial.
* the coefficient's warm-up: 5 % of the steps, as its tutorial.
* ``dead_feature_window``: 1,000 steps of its tutorial's 30,000, in proportion (AuxK would never start otherwise).

JumpReLU is trained by its default penalty (``step``, the paper's) at a coefficient that is searched for. Its penalty
with a target (``quadratic``) was tried at l0_coefficient 1, 0.1 and 0.01 and with a wider window (d_sae 2,048, 1,000
steps of 1,024, rate 2e-3): brought to one L0, its FVU was 3 to 8 % higher.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from protocol import Run, Trained, open_channel, serve

CHANNEL = open_channel()  # before the peer is imported: it prints

import torch  # noqa: E402
from sae_lens import (  # noqa: E402
    SAE,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402
from torch import Tensor  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"control": "k"},
    "jumprelu": {"control": "coefficient", "start": 1.0},
    "relu": {"control": "coefficient", "start": 1.0},
    "gated": {"control": "coefficient", "start": 1.0},
}
_CLASSES = {"topk": TopKTrainingSAE, "jumprelu": JumpReLUTrainingSAE, "relu": StandardTrainingSAE,
            "gated": GatedTrainingSAE}
_DEFAULT_LENGTH = 30_000  # steps, of the run in its training tutorial
_NORM_BATCHES = 100


def _sae_config(run: Run) -> Any:
    common: dict[str, Any] = {"d_in": run.d_in, "d_sae": run.d_sae}
    warm_up = 0 if run.defaults else run.steps // 20
    if not run.defaults:
        common["normalize_activations"] = "expected_average_only_in"
    if run.variant == "topk":
        return TopKTrainingSAEConfig(k=int(run.sparsity), **common)
    if run.sparsity is not None:
        common["l0_coefficient" if run.variant == "jumprelu" else "l1_coefficient"] = run.sparsity
    if run.variant == "jumprelu":
        return JumpReLUTrainingSAEConfig(l0_warm_up_steps=warm_up, **common)
    config = StandardTrainingSAEConfig if run.variant == "relu" else GatedTrainingSAEConfig
    return config(l1_warm_up_steps=warm_up, **common)


def _trainer_config(run: Run) -> SAETrainerConfig:
    settings: dict[str, Any] = {} if run.lr is None else {"lr": run.lr}
    if not run.defaults:
        settings |= {"lr_warm_up_steps": run.steps // 20, "lr_decay_steps": run.steps // 5,
                     "dead_feature_window": max(1, 1000 * run.steps // _DEFAULT_LENGTH),
                     "n_batches_for_norm_estimate": min(_NORM_BATCHES, run.steps)}
    config = SAETrainerConfig(total_training_samples=run.steps * run.batch, train_batch_size_samples=run.batch,
                              **settings)
    return dataclasses.replace(config, lr_end=config.lr / 10)  # as its runner does; a constant rate ignores it


def fit(run: Run, batches: Iterator[Tensor]) -> tuple[Any, SAETrainerConfig]:
    torch.manual_seed(run.seed)
    sae = _CLASSES[run.variant](_sae_config(run))
    trainer_config = _trainer_config(run)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        # It takes its estimate from the first batches that it is given; training then starts with the first again.
        n_batches = trainer_config.n_batches_for_norm_estimate
        batches = itertools.chain(itertools.islice(run.batches(), n_batches), batches)
    return SAETrainer(trainer_config, sae, batches).fit(), trainer_config


def export(run: Run, handle: tuple[Any, SAETrainerConfig]) -> Trained:
    trained, trainer_config = handle
    settings = {**dataclasses.asdict(trainer_config), **trained.cfg.to_dict()}
    trained.save_inference_model(run.scratch)  # folds decoder norms where the variant has to
    sae = SAE.load_from_disk(run.scratch)
    weights = {name: p.detach() for name, p in sae.named_parameters()}
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp_min(0)  # it multiplies by a ReLU, so the same function
    for logging_or_identity in ("logger", "metadata", "device", "dtype", "autocast"):
        settings.pop(logging_or_identity, None)
    return Trained(
        weights=weights, apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input, k=getattr(sae.cfg, "k", None),
        settings=settings, notes=[], encode=sae.encode, reconstruct=sae.forward,
    )


if __name__ == "__main__":
    serve(CHANNEL, packages=["sae-lens", "torch", "numpy"], variants=VARIANTS, fit=fit, export=export)
