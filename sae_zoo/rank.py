"""``python -m sae_zoo.rank``: one of the processes that :mod:`sae_zoo.processes` starts for a job on several devices."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import time
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from sae_zoo.config import one_line, prepare_process
from sae_zoo.processes import INTERRUPTED, end_with, place_of_process


def _train(config: dict, run_dir: str) -> None:
    from sae_zoo.train import run_job

    run_job(OmegaConf.create(config), Path(run_dir))


def _harvest(config: dict) -> None:
    from sae_zoo.harvest import harvest_all

    harvest_all(OmegaConf.create(config))


TASKS = {"train": _train, "harvest": _harvest}


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
