"""``python -m sae_zoo.harvest layers=[1,3,5] sites=[residual,mlp,attention]``: make activation caches ahead of training."""

from __future__ import annotations

import logging

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sae_zoo.config import build_lm, device_of, run_entry_point
from sae_zoo.processes import devices_of, place_of_process, run_in_processes, use_own_device
from sae_zoo.source import harvest_caches, hooks_of

log = logging.getLogger(__name__)


def harvest_all(cfg: DictConfig) -> None:
    """Harvest every site at every layer in one pass and say where the caches are."""
    use_own_device(devices_of(cfg.accelerator, cfg.devices))
    lm = build_lm(cfg, device_of(cfg.accelerator))
    hooks = hooks_of(cfg, lm, layers=cfg.layers, sites=cfg.sites)
    caches = harvest_caches(cfg, lm, hooks, process=place_of_process(), progress_bar=cfg.progress_bar)
    for name, cache in caches.items():
        log.info("%-14s d_in %5d  %s rows  %.2f GB  %s", name, cache.d_in, f"{cache.n_rows('train'):,}",
                 cache.n_bytes / 1e9, cache.path)


def _task(cfg: DictConfig) -> None:
    """:func:`harvest_all`, here or in a process for each device."""
    devices = devices_of(cfg.accelerator, cfg.devices)
    if len(devices) == 1 or place_of_process()[1] > 1:  # torchrun or SLURM has started the others
        harvest_all(cfg)
        return
    run_in_processes("harvest", {"config": OmegaConf.to_container(cfg, resolve=True)}, len(devices),
                     logging_config=OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))


def main() -> None:
    run_entry_point(_task, "harvest")


if __name__ == "__main__":
    main()
