"""``python -m sae_zoo.harvest layers=[1,3,5] sites=[residual,mlp,attention]``: make activation caches ahead of training."""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from sae_zoo.config import build_lm, device_of, run_entry_point
from sae_zoo.source import harvest_caches, hooks_of

log = logging.getLogger(__name__)


def harvest_all(cfg: DictConfig) -> None:
    """Harvest every site at every layer in one pass and say where the caches are."""
    lm = build_lm(cfg.lm, device_of(cfg.accelerator))
    hooks = hooks_of(cfg, lm, layers=cfg.layers, sites=cfg.sites)
    for name, cache in harvest_caches(cfg, lm, hooks, progress_bar=cfg.progress_bar).items():
        log.info("%-14s d_in %5d  %s rows  %.2f GB  %s", name, cache.d_in, f"{cache.n_rows('train'):,}",
                 cache.n_bytes / 1e9, cache.path)


def main() -> None:
    run_entry_point(harvest_all, "harvest")


if __name__ == "__main__":
    main()
