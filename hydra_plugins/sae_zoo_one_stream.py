"""``python -m sae_zoo.train -m hydra/launcher=one_stream ...``: jobs that share a stream of batches train together.

Found by Hydra, which looks into every module of the namespace package ``hydra_plugins``.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


# No dataclass: while Hydra looks for plugins, this module is not in sys.modules, where one would look for its types.
ConfigStore.instance().store(group="hydra/launcher", name="one_stream", provider="sae_zoo",
                             node={"_target_": f"{__name__}.OneStreamLauncher"})


class OneStreamLauncher(Launcher):
    """Trains the jobs of a sweep in this process, those on the same stream together, one such group after the other."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; what each returned, in their order.

        Raises:
            ValueError: if the jobs train no SAE.
        """
        from sae_zoo.running.turns import (
            train_together,  # not when Hydra looks for plugins, which every entry point does
        )

        setup_globals()
        self._log_as_sweep()
        hydra = self.config.hydra
        Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        configs = [self._config(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        groups = _groups(configs)
        log.info(f"Launching {len(configs)} jobs locally, on {len(groups)} streams")
        found, returns = HydraConfig.instance().cfg, {}
        try:
            for stream, group in enumerate(groups):
                for job in group:
                    log.info(f"\t#{initial_job_idx + job} on stream {stream} : "
                             f"{' '.join(filter_overrides(job_overrides[job]))}")
                tasks = [partial(run_job, hydra_context=self.hydra_context, task_function=self.task_function,
                                 config=configs[job], job_dir_key="hydra.sweep.dir",
                                 job_subdir_key="hydra.sweep.subdir") for job in group]
                returns |= zip(group, train_together(tasks), strict=True)
                self._log_as_sweep()
        finally:
            HydraConfig.instance().cfg = found  # each job puts back what it found, but they do not end in order
        return [returns[job] for job in range(len(configs))]

    def _log_as_sweep(self) -> None:
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)

    def _config(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config


def _of_task(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def _groups(configs: Sequence[DictConfig]) -> list[list[int]]:
    """The numbers of the jobs on each stream.

    Jobs hold the locks of their folders while they take turns. So of jobs with the same folder each but the first waits
    for a later group; and a group begins in the order of its folders, else two sweeps at once could each hold what the
    other waits for.
    """
    from sae_zoo.config import plain
    from sae_zoo.running.turns import stream_key

    folders = [str(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir) for config in configs]
    seen, groups = Counter(), defaultdict(list)
    for job, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        groups[stream_key(plain(_of_task(config))), seen[folder]].append(job)
        seen[folder] += 1
    return [sorted(group, key=folders.__getitem__) for group in groups.values()]
