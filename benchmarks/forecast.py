"""``python -m benchmarks forecast [OVERRIDE ...]``: what ``sae_zoo.plan`` says of a run, beside what it then takes.

Both are new processes; the run's is told apart by phases: its harvest (where the cache is not there yet), training and
evaluation, each with its seconds, the peak of resident memory while it lasts, and, of the harvest and the evaluation,
the FLOPs of torch's matrix products. Training is not counted: a step on the active set computes in kernels that torch
does not see. Overrides are those of ``sae_zoo.train``. Give an ``output_dir`` without the run; with its cache, the
harvest is not there to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.quality import align
from benchmarks.step import _CLEAR_REFS, _status

# Names of functions in sae_zoo.running.job, and the phase that each is.
_PHASES = {"open_source": "harvest", "fit": "training", "evaluate_sae": "evaluation"}
_QUANTITIES = ("seconds", "host_bytes", "flops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as sae_zoo.train takes them: lm=smollm2")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows.

    Raises:
        ValueError: if the plan or the run fails, in its own words.
    """
    if args.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    planned = json.loads(_output("-m", "sae_zoo.plan", *args.overrides, "--json"))["phases"]
    with tempfile.TemporaryDirectory() as folder:
        found_at = Path(folder) / "found.json"
        _output("-m", __name__, str(found_at), *args.overrides)
        found = json.loads(found_at.read_text())
    rows = [{"phase": phase, "quantity": quantity, "planned": planned[phase][quantity], "real": found[phase][quantity],
             "ratio": planned[phase][quantity] / found[phase][quantity]}
            for phase in planned for quantity in _QUANTITIES if found[phase].get(quantity)]
    print(align([["phase", "quantity", "planned", "real", "planned / real"],
                 *([row["phase"], row["quantity"], f"{row['planned']:.4g}", f"{row['real']:.4g}", f"{row['ratio']:.2f}"]
                   for row in rows)]))
    return {"rows": rows}


def _output(*arguments: str) -> str:
    """The last line that a Python process prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments[1:])} failed: {done.stderr.strip()[-1000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


class _Flops(TorchDispatchMode):
    """Counts FLOPs by torch's own formulas. (Its FlopCounterMode follows modules too, which ``autograd.grad`` breaks.)
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _measured(function: Callable[..., Any], into: dict[str, Any], *, count: bool) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # the peak starts anew
        started = time.perf_counter()
        if count:
            with _Flops() as flops:
                result = function(*args, **kwargs)
            into["flops"] = flops.total
        else:
            result = function(*args, **kwargs)
        into.update(seconds=time.perf_counter() - started,
                    host_bytes=_status("VmHWM") if _CLEAR_REFS.exists() else None)
        return result

    return measured


def _train(found_at: Path, overrides: list[str]) -> None:
    from sae_zoo import train
    from sae_zoo.running import job

    found: dict[str, dict[str, Any]] = {phase: {} for phase in _PHASES.values()}
    for name, phase in _PHASES.items():
        setattr(job, name, _measured(getattr(job, name), found[phase], count=phase != "training"))
    sys.argv = ["sae_zoo.train", *overrides]
    train.main()
    found_at.write_text(json.dumps(found))


if __name__ == "__main__":
    _train(Path(sys.argv[1]), sys.argv[2:])
