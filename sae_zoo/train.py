"""``python -m sae_zoo.train``: train and evaluate one SAE; with ``-m`` a sweep, which ends with its frontier.

A job has a folder of its own, ``outputs/runs/<sweep>/<job>/``, that depends on its config alone. Giving the same
command again skips what is finished, and goes on with what is not from its last checkpoint.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sae_zoo.command_line import one_line
from sae_zoo.config import plain, run_entry_point
from sae_zoo.running.checks import Config
from sae_zoo.running.devices import is_helper
from sae_zoo.running.job import run_on_devices

log = logging.getLogger(__name__)

# The folders of the jobs of this sweep, in order; its frontier is drawn from them when it ends.
_swept: list[Path] = []


def _task(config: Config) -> None:
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    logging_config = plain(hydra.job_logging)  # type: ignore[arg-type]  # it is a DictConfig
    if hydra.mode == RunMode.RUN:
        record = run_on_devices(config, run_dir, logging_config=logging_config)
        if not is_helper():
            _report(record, run_dir)
        return
    _swept.append(run_dir)
    try:
        run_on_devices(config, run_dir, logging_config=logging_config)
    except Exception as error:
        log.error("job failed: %s", one_line(error))  # now; Hydra speaks of it only when the sweep has ended
        raise
    except KeyboardInterrupt:
        _swept.clear()  # no frontier of a sweep that was broken off
        raise


def _report(record: dict[str, Any], run_dir: Path) -> None:
    shown = ("l0_target", "l0", "fvu", "delta_lm_loss", "loss_recovered", "relative_reconstruction_bias",
             "dead_fraction", "seconds")
    for key in shown:
        if record.get(key) is not None:
            log.info("%-28s %.4g", key, record[key])
    log.info("written to %s", run_dir)


def _report_sweep() -> bool:
    """Table and plot of every run in each of the folders that this sweep wrote to (one for each hook point, say);
    whether all of them came out.
    """
    from sae_zoo.frontier.plot import draw_frontier  # matplotlib and pandas, needed only here

    drawn = True
    for folder in sorted({run_dir.parent for run_dir in _swept}):
        try:
            result = draw_frontier(folder)
        except Exception as error:  # whatever it is, the runs are finished and their records safe
            log.error("no frontier of %s: %s", folder, one_line(error))
            drawn = False
        else:
            print(f"\n{result.text}\n\n{result.png}")
    return drawn


def main() -> None:
    drawn = True
    try:
        run_entry_point(_task, "train")
    finally:
        if _swept and not is_helper():
            drawn = _report_sweep()
    if not drawn:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
