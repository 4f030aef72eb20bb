"""Several devices: a process for each, started from the job's own config, watched, and ended together.

Lightning starts the processes of the other devices by running the command line again, which under ``-m`` is the whole
sweep (Lightning issue 11300). Here the job's process stays out of the training: it starts
``python -m sae_zoo.running.worker`` once for each device of this machine and waits. Where torchrun or SLURM has started
a process for each device already, each of them runs the job itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# What says a process's number and how many there are: torchrun and we, SLURM's srun. (A batch script of SLURM's has
# SLURM_NTASKS too, and is one process.)
_NUMBERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
_POLL_SECONDS = 0.1
# When a process has died the others notice by themselves, or wait for it in a collective call until they are killed.
_GRACE_SECONDS = 5.0
INTERRUPTED = 130


class RankFailed(RuntimeError):
    """The process of a device ended with an error that is no mistake of the user's."""


def place_of_process() -> tuple[int, int]:
    """Number of this process and how many there are, from the environment; (0, 1) where nobody started several."""
    for rank, size in _NUMBERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def is_helper() -> bool:
    """Whether this is one of several processes of a job, and not the first."""
    return place_of_process()[0] > 0


def devices_of(accelerator: str, devices: int | str | Sequence[int]) -> list[int]:
    """The devices of this machine that Lightning's ``accelerator`` and ``devices`` mean, by number.

    Raises:
        ValueError: if they are not there.
    """
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    kind: Any = CUDAAccelerator if on_cuda else CPUAccelerator  # parse_devices takes less by the types of either
    try:
        found = kind.auto_device_count() if devices == "auto" else kind.parse_devices(devices)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer.devices is {devices!r}: {' '.join(str(error).split())}") from None
    if isinstance(found, int):
        found = list(range(found))
    if not found:
        raise ValueError(f"trainer.devices is {devices!r}; it must name at least one device")
    return found


def in_this_process(n_processes: int) -> bool:
    """Whether a job for ``n_processes`` in all is to run in this process: because it is the only one, or because
    somebody has started the others too.

    Raises:
        ValueError: if somebody has started another number of them.
    """
    if n_processes == 1:
        return True
    _, started = place_of_process()
    if started not in (1, n_processes):
        raise ValueError(f"{started} processes were started, but trainer.devices x trainer.num_nodes is {n_processes}; "
                         "make them equal")
    return started == n_processes


def use_own_device(devices: Sequence[int]) -> None:
    """Make the device of this process CUDA's current one, where it is one of several."""
    if place_of_process()[1] > 1 and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        torch.cuda.set_device(devices[local])


def run_in_processes(task: str, arguments: Mapping[str, Any], n: int, *, logging_config: Mapping[str, Any]) -> None:
    """Run a task of :mod:`sae_zoo.running.worker` in ``n`` processes, which see each other, and wait for them.

    When one ends with an error the others are ended too. Ctrl-C is passed on once for each time that it comes.

    Args:
        arguments: of the task, plain JSON values.
        logging_config: for ``logging.config.dictConfig`` in the first of them; the others show warnings.

    Raises:
        ValueError, OSError: what the first of them that failed said.
        RankFailed: if that was an error of another kind, or a signal.
        KeyboardInterrupt: after Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="sae_zoo-") as folder:
        job = {"task": task, "arguments": dict(arguments), "logging": dict(logging_config), "starter": os.getpid()}
        Path(folder, "job.json").write_text(json.dumps(job))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # A process of a SLURM task is none of SLURM's own: Lightning would take it for one.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "NODE_RANK": "0"}
        if "OMP_NUM_THREADS" not in environment:  # n processes with as many threads each as there are cores would fight
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // n))
        # In sessions of their own, so that Ctrl-C reaches them through us, and once.
        processes = [
            subprocess.Popen([sys.executable, "-m", "sae_zoo.running.worker", folder], start_new_session=True,
                             env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(n)]
        interrupts: list[int] = []

        def pass_on(*_: Any) -> None:
            interrupts.append(1)
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)

        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, pass_on) if in_main_thread else None
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            if in_main_thread:
                signal.signal(signal.SIGINT, before)
        if failed is None:
            return
        said = _what_they_said(folder)
        if interrupts or INTERRUPTED in [process.returncode for process in processes]:
            raise KeyboardInterrupt(said[0]["message"] if said else "interrupted")
        _raise(failed, processes[failed].returncode, said)


def _wait(processes: Sequence[subprocess.Popen]) -> int | None:
    """Until all have ended; or until one has failed and the others had time to. Which one was first, None if none."""
    failed, since = None, 0.0
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            # Of several at once the one that a signal ended: the others then fail for want of it.
            bad = sorted((code > 0, rank) for rank, code in enumerate(codes) if code not in (None, 0))
            if bad:
                failed, since = bad[0][1], time.monotonic()
        if None not in codes or (failed is not None and time.monotonic() - since > _GRACE_SECONDS):
            return failed
        time.sleep(_POLL_SECONDS)


def _what_they_said(folder: str) -> list[dict[str, Any]]:
    """The errors that processes have written down, the first first."""
    return sorted((json.loads(file.read_text()) for file in Path(folder).glob("error-*.json")), key=lambda e: e["time"])


def _raise(failed: int, code: int, said: Sequence[Mapping[str, Any]]) -> None:
    if code < 0 or not said:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        raise RankFailed(f"the process of device {failed} {how}; the same command goes on from the last checkpoint")
    first = said[0]
    if first["kind"] == "ValueError":
        raise ValueError(first["message"])
    if first["kind"] == "OSError":
        raise OSError(first["message"])
    raise RankFailed(f"the process of device {first['rank']} failed: {first['message']}")


def end_with(starter: int) -> None:
    """End this process when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="starter", daemon=True).start()
