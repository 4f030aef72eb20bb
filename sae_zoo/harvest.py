"""``python -m sae_zoo.harvest layers=[1,3,5] sites=[residual,mlp,attention]``: make activation caches ahead of
training.
"""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig

from sae_zoo.config import plain, run_entry_point
from sae_zoo.running.checks import Config
from sae_zoo.running.devices import place_of_process, run_in_processes
from sae_zoo.running.settings import HarvestSettings
from sae_zoo.running.sources import harvest_all


def _task(config: Config) -> None:
    """:func:`harvest_all`, here or in a process for each device."""
    settings = HarvestSettings.of(config)
    n = len(settings.local_devices)
    if n == 1 or place_of_process()[1] > 1:  # torchrun or SLURM has started the others
        harvest_all(settings)
    else:
        logging_config = plain(HydraConfig.get().job_logging)  # type: ignore[arg-type]  # it is a DictConfig
        run_in_processes("harvest", {"config": config}, n, logging_config=logging_config)


def main() -> None:
    run_entry_point(_task, "harvest")


if __name__ == "__main__":
    main()
