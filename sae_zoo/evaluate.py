"""``python -m sae_zoo.evaluate run=outputs/runs/<sweep>/<job>``: score a finished run again, beside two sanity rows.

The mean predictor has FVU 1 and the identity 0; what they cost the language model shows what a delta LM loss means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_zoo.config import device_of, run_entry_point
from sae_zoo.evaluation.suite import HeldOutRows, score_in_lm, score_reconstruction, score_sae, within
from sae_zoo.saes.io import load_sae
from sae_zoo.source import open_source

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> pd.DataFrame:
    """One row each for the SAE, the mean predictor and the identity."""
    run_dir, device = Path(cfg.run), device_of(cfg.accelerator)
    sae = load_sae(run_dir).to(device)
    of_run = OmegaConf.load(run_dir / "config.yaml")
    source = open_source(of_run, device, progress_bar=cfg.progress_bar)
    activations = source.activations

    def rows():
        return HeldOutRows(activations, cfg.split, cfg.n_rows, device=device, progress_bar=cfg.progress_bar)

    sums, n = zip(*((x.double().sum(0), len(x)) for x in rows()), strict=True)
    mean = (sum(sums) / sum(n)).float()  # of the very rows that are scored
    reconstructions: dict[str, Callable[[Tensor], Tensor]] = {
        sae.variant: sae.reconstruct, "mean predictor": lambda x: mean.expand_as(x), "identity": lambda x: x}
    table = {}
    for name, reconstruct in reconstructions.items():
        if name == sae.variant:
            scores, _ = score_sae(sae, rows())
        else:
            scores = asdict(score_reconstruction(reconstruct, rows()))
        row = {key: scores.get(key) for key in ("l0", "fvu", "mse", "cosine")}
        if source.lm is not None:
            in_lm = score_in_lm(within(reconstruct, activations.norm_bound), source.lm, source.hook, activations.tokens(cfg.split),
                                activations.manifest["special_ids"], n_tokens=cfg.n_lm_tokens,
                                batch_size=of_run.lm.batch_size, progress_bar=cfg.progress_bar)
            row |= {key: in_lm[key] for key in ("delta_lm_loss", "loss_recovered", "kl")}
        table[name] = row
    frame = pd.DataFrame.from_dict(table, orient="index")
    log.info("%s\n%s", run_dir, frame.to_string(float_format=lambda v: f"{v:.4g}", na_rep="-"))
    return frame


def main() -> None:
    run_entry_point(evaluate, "evaluate")


if __name__ == "__main__":
    main()
