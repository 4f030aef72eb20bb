"""``python -m sae_zoo.running.worker``: a process of a job on several devices, as :mod:`sae_zoo.running.devices` starts
it.
"""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from sae_zoo.command_line import one_line
from sae_zoo.process import prepare_process
from sae_zoo.running.checks import Config
from sae_zoo.running.devices import INTERRUPTED, end_with, place_of_process
from sae_zoo.running.job import run_job
from sae_zoo.running.settings import HarvestSettings, TrainSettings
from sae_zoo.running.sources import harvest_all


def _train(config: Config, run_dir: str) -> None:
    run_job(TrainSettings.of(config), Path(run_dir))


def _harvest(config: Config) -> None:
    harvest_all(HarvestSettings.of(config))


TASKS: dict[str, Callable[..., None]] = {"train": _train, "harvest": _harvest}


def main() -> None:
    folder, (rank, _) = Path(sys.argv[1]), place_of_process()
    job = json.loads((folder / "job.json").read_text())
    end_with(job["starter"])
    prepare_process()
    if rank == 0:
        logging.config.dictConfig(job["logging"])
    else:
        logging.basicConfig(level=logging.WARNING, format=f"[device {rank}] %(message)s")

    def say(kind: str, error: BaseException) -> None:
        (folder / f"error-{rank}.json").write_text(json.dumps(
            {"rank": rank, "time": time.time(), "kind": kind, "message": one_line(error)}))

    try:
        TASKS[job["task"]](**job["arguments"])
    except KeyboardInterrupt as stop:
        say("KeyboardInterrupt", stop)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError) as error:
        say("ValueError" if isinstance(error, ValueError) else "OSError", error)
        raise SystemExit(2) from None
    except Exception as error:
        say(type(error).__name__, error)
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
