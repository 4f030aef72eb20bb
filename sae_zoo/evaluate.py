"""``python -m sae_zoo.evaluate run=outputs/runs/<sweep>/<job>``: score a finished run again, beside two sanity rows.

The mean predictor has FVU 1 and the identity 0; what they cost the language model shows what a delta LM loss means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from torch import Tensor

from sae_zoo.config import run_entry_point
from sae_zoo.data.activations import TextActivations
from sae_zoo.evaluation.suite import HeldOutRows, score_in_lm, score_reconstruction, score_sae, within
from sae_zoo.running.checks import Config
from sae_zoo.running.job import read_config
from sae_zoo.running.settings import CacheSettings, SourceSettings, device_of
from sae_zoo.running.sources import open_source
from sae_zoo.saes.io import load_sae

log = logging.getLogger(__name__)


def evaluate(config: Config) -> pd.DataFrame:
    """One row each for the SAE, the mean predictor and the identity."""
    run_dir, device = Path(config["run"]), device_of(config["accelerator"])
    split, show = config["split"], config["progress_bar"]
    sae = load_sae(run_dir).to(device)
    settings = SourceSettings.of(read_config(run_dir))
    source = open_source(settings, device, progress_bar=show)
    activations = source.activations

    def rows():
        return HeldOutRows(activations, split, config["n_rows"], device=device, progress_bar=show)

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
            # What there is where there is a language model.
            assert isinstance(activations, TextActivations) and isinstance(settings.data, CacheSettings)
            assert source.hook is not None
            in_lm = score_in_lm(within(reconstruct, activations.norm_bound), source.lm, source.hook,
                                activations.tokens(split), activations.special_ids,
                                n_tokens=config["n_lm_tokens"], batch_size=settings.data.lm.batch_size,
                                progress_bar=show)
            row |= {key: in_lm[key] for key in ("delta_lm_loss", "loss_recovered", "kl")}
        table[name] = row
    frame = pd.DataFrame.from_dict(table, orient="index")
    log.info("%s\n%s", run_dir, frame.to_string(float_format=lambda v: f"{v:.4g}", na_rep="-"))
    return frame


def main() -> None:
    run_entry_point(evaluate, "evaluate")


if __name__ == "__main__":
    main()
